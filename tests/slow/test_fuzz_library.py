"""Every public function and class with mixed-up arguments: an error that names the argument, or the right result.

REFORMER_FUZZ_CASES is the number of calls of each; REFORMER_FUZZ_SEED gives others. The calls run in a forked
process, since they may corrupt its heap or hang.
"""

from __future__ import annotations

import enum
import os
import random
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.forks import fork_context
from torch import Tensor

import reformer_dist
from reformer_dist import AttentionKind, CompatConfig, ModelConfig

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("REFORMER_FUZZ_CASES", "60"))
SEED = os.environ.get("REFORMER_FUZZ_SEED", "0")
BOUND = 60  # seconds of a call, which takes milliseconds
Arguments = dict[str, Any]
CONFIG = ModelConfig(
    dim=32, n_layers=2, n_heads=2, n_buckets=4, window=8, local_window=8, max_seq_len=64, position="rotary"
)
TWO_SIDED = ModelConfig(**{each.name: getattr(CONFIG, each.name) for each in fields(CONFIG)} | {"causal": False})
V, B, S = 17, 2, 13


def tokens() -> Tensor:
    return torch.arange(B * S).view(B, S) % V


def real() -> Tensor:
    return torch.arange(S) < torch.tensor([[S], [S - 4]])


def forward(name: str, config: ModelConfig, *more: Any, **call: Any) -> Callable[..., Any]:
    """A call of a module's forward, in evaluation."""

    def run(**arguments: Any) -> Any:
        torch.manual_seed(0)
        return getattr(reformer_dist, name)(config, *more).eval()(**arguments)

    return run


def vectors() -> Tensor:
    return torch.randn(B, S, CONFIG.dim, generator=torch.Generator().manual_seed(1))


def heads(seed: int) -> Tensor:
    return torch.randn(B, 2, S, 16, generator=torch.Generator().manual_seed(seed))


COMMON: Arguments = {"step": 1, "key_padding_mask": real, "dropout_seed": 3, "bucket_stats": list}
# name: how it is called, and arguments with which that is right; tensors are made anew for each call
CALLS: dict[str, tuple[Callable[..., Any], Arguments]] = {
    "lsh_attention": (
        reformer_dist.lsh_attention,
        {
            "qk": lambda: heads(1),
            "v": lambda: heads(2),
            "n_hashes": 2,
            "n_buckets": 4,
            "window": 4,
            "causal": True,
            "seed": 5,
            "key_padding_mask": real,
            "scale": 1.0,
            "hash_scheme": "rotation",
            "count_pairs_once": False,
            "dropout": 0.1,
            "dropout_seed": 7,
            "backend": "auto",
        },
    ),
    "ModelConfig": (ModelConfig, {each.name: getattr(CONFIG, each.name) for each in fields(CONFIG)}),
    "CompatConfig": (
        CompatConfig,
        {each.name: getattr(CompatConfig(), each.name) for each in fields(CompatConfig)},
    ),
    "init_weights": (
        reformer_dist.init_weights,
        {"model": lambda: reformer_dist.ReformerStack(CONFIG), "config": CONFIG, "seed": 1},
    ),
    "inspect_attention": (
        reformer_dist.inspect_attention,
        {
            "model": lambda: reformer_dist.ReformerLM(CONFIG, V),
            "tokens": tokens,
            "key_padding_mask": real,
            "step": 1,
        },
    ),
    "ReformerLM": (reformer_dist.ReformerLM, {"config": CONFIG, "vocab_size": V, "seed": 1}),
    "ReformerLM.forward": (forward("ReformerLM", CONFIG, V), {"tokens": tokens, "labels": tokens, **COMMON}),
    "ReformerForSequenceClassification": (
        reformer_dist.ReformerForSequenceClassification,
        {"config": TWO_SIDED, "vocab_size": V, "n_classes": 3, "seed": 1},
    ),
    "ReformerForSequenceClassification.forward": (
        forward("ReformerForSequenceClassification", TWO_SIDED, V, 3),
        {"tokens": tokens, "labels": lambda: torch.tensor([2, 0]), **COMMON},
    ),
    "ReformerForQuestionAnswering": (
        reformer_dist.ReformerForQuestionAnswering,
        {"config": TWO_SIDED, "vocab_size": V, "seed": 1},
    ),
    "ReformerForQuestionAnswering.forward": (
        forward("ReformerForQuestionAnswering", TWO_SIDED, V),
        {"tokens": tokens, "labels": lambda: torch.tensor([[2, 3], [1, 1]]), "answer_mask": real, **COMMON},
    ),
    "ReformerEncoderDecoder": (
        reformer_dist.ReformerEncoderDecoder,
        {"config": CONFIG, "vocab_size": V, "seed": 1},
    ),
    "ReformerEncoderDecoder.forward": (
        forward("ReformerEncoderDecoder", CONFIG, V),
        {"source": tokens, "tokens": tokens, "labels": tokens, "source_mask": real, **COMMON},
    ),
    "ReformerStack": (reformer_dist.ReformerStack, {"config": CONFIG, "has_cross_attention": False}),
    "ReformerStack.forward": (forward("ReformerStack", CONFIG), {"x": vectors, **COMMON}),
    "Block": (reformer_dist.Block, {"config": CONFIG, "kind": AttentionKind.lsh, "has_cross_attention": False}),
    **{
        name: (getattr(reformer_dist, name), {"config": CONFIG})
        for name in ("LSHSelfAttention", "LocalSelfAttention", "ExactSelfAttention")
    },
    **{
        f"{name}.forward": (forward(name, CONFIG), {"x": vectors, "layer": 1, **COMMON})
        for name in ("LSHSelfAttention", "LocalSelfAttention", "ExactSelfAttention")
    },
}
# values of one's own, without behaviour
PLAIN = {"AttentionView", "__version__", "load"}  # load takes no tensor; tests/entries/test_load.py


def is_enum(name: str) -> bool:
    value = getattr(reformer_dist, name)
    return isinstance(value, type) and issubclass(value, enum.Enum)


def test_no_public_name_is_left_out() -> None:
    named = {name for name in reformer_dist.__all__ if not is_enum(name)} - PLAIN
    assert named == {name.partition(".")[0] for name in CALLS}


def other_tensor(value: Tensor, draw: random.Random) -> tuple[Any, bool]:
    """Another value in the place of a tensor; whether it must be refused."""
    if draw.random() < 0.5:
        axis = draw.randrange(value.dim())
        size = value.shape[axis]
        kept = torch.arange(draw.choice([0, 1, size - 1, size + 1, 2 * size])) % size
        return value.index_select(axis, kept), False
    dtype = draw.choice([torch.float64, torch.float16, torch.int32, torch.bool, torch.complex64, torch.uint8])
    return draw.choice(
        [
            (value.unsqueeze(0), True),
            (value[0], True),
            (value.flatten(), True) if value.dim() > 1 else (value[0], True),
            (value.to("meta"), True),
            (value.to_sparse(), True),
            (value.to(dtype), False),
            (value.numpy(), True),
            (value.tolist(), True),
            ("nonsense", True),
            (3, True),
            (None, False),
            (value.transpose(0, -1).contiguous().transpose(0, -1), False),
        ]
    )


def other_value(value: Any, draw: random.Random) -> tuple[Any, bool]:
    if isinstance(value, Tensor):
        return other_tensor(value, draw)
    odd = [
        ("", True),
        ("nonsense", True),
        (b"x", True),
        (object(), True),
        (np.arange(3), True),
        (torch.ones(2), True),
    ]
    numbers = [
        (None, False),
        (-1, False),
        (0, False),
        (2**40, False),
        (2**70, False),
        (1.5, False),
        (float("nan"), True),
    ]
    numbers += [(float("inf"), False), (-0.5, False), (True, False), ([], False), ([1, 2], False), ({}, False)]
    return draw.choice(odd + numbers)


def make(arguments: Arguments) -> Arguments:
    made = {
        name: value() if callable(value) and not isinstance(value, type) else value
        for name, value in arguments.items()
    }
    return {name: [] if value is list else value for name, value in made.items()}


def mix_up(arguments: Arguments, draw: random.Random) -> tuple[Arguments, list[str], bool]:
    """Changed arguments, their names, and whether the call must be refused."""
    mixed = make(arguments)
    if draw.random() < 0.1:
        name = draw.choice(sorted(mixed))
        wrong = name + draw.choice("_sx")
        return {**mixed, wrong: mixed[name]}, [wrong], True
    name = draw.choice(sorted(mixed))
    mixed[name], must_fail = other_value(mixed[name], draw)
    return mixed, [name], must_fail


def judge(call: Callable[..., Any], arguments: Arguments, names: list[str], must_fail: bool, base: str) -> str:
    """What is wrong with the outcome; empty if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        is_named = any(
            re.search(rf"\b{re.escape(name)}\b", str(error)) for name in [*names, *COMPANIONS.get(names[0], ())]
        )
        return "" if is_named else f"does not name {names}: {type(error).__name__}: {error}"
    except RuntimeError as error:
        # of a layer whose weights have another dtype than its inputs; torch names both
        return "" if "same dtype" in str(error) else f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if must_fail:
        return "silent acceptance"
    if base == "lsh_attention":
        right = call(**{**arguments, "backend": "reference"})
        if result.shape != right.shape or (result - right).abs().max() > 1e-2:
            return f"off by {(result - right).abs().max() if result.shape == right.shape else result.shape}"
    return ""


# another argument that does not fit this one may be named instead
COMPANIONS = {
    "qk": ("v", "key_padding_mask"),
    "v": ("qk",),
    "key_padding_mask": ("tokens", "x", "qk", "source_mask"),
    "tokens": ("labels", "key_padding_mask", "source"),
    "source": ("source_mask", "tokens"),
    "source_mask": ("source",),
    "x": ("key_padding_mask",),
    "labels": ("tokens",),
    "answer_mask": ("tokens",),
}


def run_cases(name: str, first: int, report: str) -> None:
    torch.set_num_threads(1)
    call, arguments = CALLS[name]
    with Path(report).open("a") as file:
        for number in range(first, CASES):
            draw = random.Random(f"{SEED} {name} {number}")
            mixed, names, must_fail = mix_up(arguments, draw)
            value = mixed[names[0]]
            shown = (
                f"{tuple(value.shape)} {value.dtype} {value.device}"
                if isinstance(value, Tensor)
                else repr(value).splitlines()[0][:60]
            )
            file.write(f"{number}\t{names[0]}={shown}\t")
            file.flush()
            wrong = judge(call, mixed, names, must_fail, name.partition(".")[0])
            file.write(wrong.splitlines()[0][:300] + "\n" if wrong else "ok\n")
            file.flush()


@pytest.mark.parametrize("name", CALLS)
def test_mixed_up_arguments(name: str, tmp_path: Path) -> None:
    call, arguments = CALLS[name]
    call(**make(arguments))
    report = tmp_path / "report.txt"
    report.touch()
    while len(lines := report.read_text().splitlines()) < CASES:
        process = fork_context().Process(target=run_cases, args=(name, len(lines), str(report)))
        process.start()
        seen, deadline = 0, time.monotonic() + BOUND
        while process.exitcode is None and time.monotonic() < deadline:
            process.join(0.2)
            if report.stat().st_size != seen:
                seen, deadline = report.stat().st_size, time.monotonic() + BOUND
        process.kill()
        process.join()
        if not report.read_text().endswith("\n"):
            with report.open("a") as file:
                file.write(f"ended with {process.exitcode}\n")
    found = [line for line in lines if not line.endswith("\tok")]
    assert not found, f"{len(found)} of {CASES}:\n" + "\n".join(found)
