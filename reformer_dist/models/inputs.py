"""Checks of the inputs of models and layers: shapes, dtypes, devices and ranges, once per forward call.

Values of tensors on a GPU are checked by assertions in its stream, so that the host never waits for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_dist.models.context import ForwardOptions
from reformer_dist.ops.checks import TensorChecks, check_document_ids, check_integer, check_range, check_type


def check_tokens(name: str, tokens: Tensor, vocab_size: int, mask_name: str, mask: Tensor | None) -> TensorChecks:
    """Raises ValueError unless tokens are [B, S] ids of the vocabulary, and the mask is None or [B, S] bools."""
    checks = TensorChecks()
    checks.integers(name, tokens, "B S")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}.dtype={tokens.dtype}: must be torch.int64 or torch.int32")
    checks.mask(mask_name, mask, "B S")
    check_range(name, tokens, vocab_size, limit="vocab_size")
    return checks


def check_source_rows(source: Tensor, tokens: Tensor) -> None:
    """Raises ValueError unless source [B, T] has the rows of tokens [B, S].

    An encoded source may have others: a decoding state reads it in its first call, before beams multiply rows.
    """
    checks = TensorChecks()
    checks.integers("tokens", tokens, "B S")
    checks.integers("source", source, "B T")


def check_vectors(x: Tensor, dim: int, options: ForwardOptions) -> None:
    """Raises ValueError unless x is [B, S, dim], floating point, and the options of its forward call fit it."""
    checks = TensorChecks(dim=dim)
    checks.floats("x", x, "B S dim")
    checks.mask("key_padding_mask", options.get("key_padding_mask"), "B S")
    check_options(checks, options)


def check_options(checks: TensorChecks, options: ForwardOptions) -> None:
    """Raises ValueError unless rows and numbers of the options fit; checks: of the inputs, with their batch B."""
    rows, step, dropout_seed = (options.get(name) for name in ("rows", "step", "dropout_seed"))
    documents, positions = options.get("document_ids"), options.get("position_ids")
    if documents is not None:
        check_document_ids(checks, documents)
    if positions is not None:
        checks.integers("position_ids", positions, "B S")
    if isinstance(rows, Tensor):
        checks.integers("rows", rows, "B")
    elif rows is not None:
        raise TypeError(f"rows: must be a tensor [B] of integers, not {type(rows).__name__}")
    if options.get("bucket_stats") is not None:
        check_type("bucket_stats", options.get("bucket_stats"), list)
    if step is not None:
        check_integer("step", step, least=0)  # type: ignore[arg-type]  # names of a TypedDict are not inferred
    if dropout_seed is not None:
        check_integer("dropout_seed", dropout_seed)  # type: ignore[arg-type]


def check_labels(labels: Tensor, dims: str, tensor: Tensor) -> None:
    """Raises ValueError unless labels are integers of the shape dims, on the device of a tensor [B, S, ...]."""
    TensorChecks(B=tensor.shape[0], S=tensor.shape[1]).integers("labels", labels, dims)
    if labels.device != tensor.device:
        raise ValueError(f"labels.device={labels.device}: must be that of the inputs, {tensor.device}")
