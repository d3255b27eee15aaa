"""A valid call of every public function, the shapes of its tensors, and wrong values of its other arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reformer_dist import (
    ExactSelfAttention,
    LocalSelfAttention,
    LSHSelfAttention,
    ModelConfig,
    ReformerEncoderDecoder,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerLM,
    ReformerStack,
    init_weights,
    inspect_attention,
    lsh_attention,
)
from reformer_dist.generation import (
    BeamOptions,
    CachedDecoder,
    SamplingOptions,
    TextSampler,
    TextStream,
    UncachedDecoder,
    beam_search,
    generate,
    make_decoder,
)
from reformer_dist.ops.cross_entropy import chunked_cross_entropy
from reformer_dist.ops.dropout import TokenCoords, token_dropout
from reformer_dist.ops.exact_attention import ExactOptions, exact_attention
from reformer_dist.ops.kv_cache import BucketCache, ExactCache, WindowCache
from reformer_dist.ops.lsh import (
    AttentionOptions,
    ChunkRule,
    CrossKeys,
    CrossOptions,
    WindowRule,
    attend_locally,
    bucket_attention,
    cross_attention,
    draw_rotations,
    hash_vectors,
    seeded_rotations,
)
from reformer_dist.ops.lsh.attention import LocalExchange
from reformer_dist.ops.lsh.bucket_stats import measure_bucket_stats
from reformer_dist.ops.lsh.coverage import measure_coverage
from reformer_dist.ops.rotary import rotary_tables, rotate

B, H, S, D, T, V, DIM = 2, 3, 21, 16, 10, 30, 24


@dataclass(frozen=True)
class Call:
    function: Callable[..., Any]
    valid: dict[str, Any]
    """Arguments of a valid call."""
    dims: dict[str, str] = field(default_factory=dict)
    """Letters of the shapes of its tensors. One that a single tensor has may be any size, unless it is `fixed`."""
    fixed: str = ""
    """Letters whose size is not free although one tensor has them."""
    wrong: dict[str, list[Any]] = field(default_factory=dict)
    """Values of other arguments that are refused."""
    accepted: str = ""
    """A description of `test_refused_arguments.wrong_tensors` that is not wrong here."""
    shares_device: bool = True
    """Whether all of its tensors must be on one device."""
    signature: Callable[..., Any] | None = None
    """What the page shows, if not `function` itself."""


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def integers(most: int, *shape: int) -> Tensor:
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(0))


def config(**changed: Any) -> ModelConfig:
    sizes = {"dim": DIM, "n_layers": 2, "n_heads": H, "head_dim": D, "n_hashes": 2, "n_buckets": 4, "window": 8}
    return ModelConfig(**{**sizes, "layers": ["local", "lsh"], "attention_dropout": 0.1, **changed})


INTEGER = [0, -1, 1.5, "4", None, True]
SEED = [1.5, "0", None]
PROBABILITY = [1.0, 1.5, -0.1, float("nan"), "0"]
POSITIVE = [0, -1.0, float("inf"), float("nan"), "1", None]
MASK, ROWS = torch.ones(B, S, dtype=torch.bool), torch.arange(B)
OPTIONS = AttentionOptions(WindowRule(8, causal=True), 4, scale=1.0, dropout=0.1, rows=ROWS)
CHUNKS = ChunkRule(8, causal=True)
CROSS = CrossOptions(n_buckets=4, scale=1.0, dropout=0.1, rows=ROWS)
IDS, TOKENS = integers(4, B, H, 2, S), integers(V, B, S)
QKV = {name: floats(B, H, S, D) for name in "qkv"}
OF_HEADS = dict.fromkeys("qkv", "B H S D")
TOKEN = {name: floats(B, H, 1, D) for name in "qkv"}
OF_TOKEN = dict.fromkeys("qkv", "B H 1 D")
DOCUMENTS, POSITIONS = torch.arange(S).expand(B, S) // 8, torch.arange(S).expand(B, S) % 8
WRONG_DOCUMENTS = [DOCUMENTS.flip(1), DOCUMENTS - 1, DOCUMENTS + 2**31]
FORWARD = {"key_padding_mask": MASK, "rows": ROWS, "step": 3, "dropout_seed": 5}
OF_FORWARD = {"key_padding_mask": "B S", "rows": "B"}
WRONG_FORWARD: dict[str, list[Any]] = {"step": [-1, 1.5, "1"], "dropout_seed": [1.5, "1"]}
IDS_OF_TOKENS = {"document_ids": DOCUMENTS, "position_ids": POSITIONS}
WRONG_IDS: dict[str, list[Any]] = {
    "document_ids": WRONG_DOCUMENTS, "position_ids": [POSITIONS - 1, POSITIONS + 2**40]
}  # fmt: skip
OF_DOCUMENTS = {"document_ids": "B S", "position_ids": "B S"}
"""Of the forward of everything but an encoder-decoder."""
MODELS = {
    "lm": ReformerLM(config(), V),
    "classifier": ReformerForSequenceClassification(config(causal=False), V, 5),
    "reader": ReformerForQuestionAnswering(config(causal=False), V),
    "translator": ReformerEncoderDecoder(config(), V),
}
EVALUATED = ReformerLM(config(), V).eval()


def labels(stop: int, *shape: int) -> list[Tensor]:
    """Wrong values: negative but not -100, and beyond the largest."""
    return [integers(stop, *shape).fill_(value) for value in (-1, -99, -101, stop, 2**40)]


def decoder() -> Any:
    return make_decoder(EVALUATED, EVALUATED.config)


def cached(kind: str) -> Any:
    q, k, v = QKV.values()
    caches = {
        "exact": lambda: ExactCache(k, v, None),
        "window": lambda: WindowCache(k, v, 8, 1.0, None),
        "bucket": lambda: BucketCache(q, v, IDS, OPTIONS, None),
    }
    return caches[kind]()


OPS = {
    "lsh_attention": Call(
        lsh_attention,
        {"qk": QKV["q"], "v": QKV["v"], "key_padding_mask": MASK, "document_ids": DOCUMENTS},
        {"qk": "B H S D", "v": "B H S D", "key_padding_mask": "B S", "document_ids": "B S"},
        wrong={
            "document_ids": WRONG_DOCUMENTS,
            "n_hashes": INTEGER, "n_buckets": [*INTEGER, 3, 2**40], "window": [*INTEGER, 2**40],
            "seed": [*SEED, 2**70],
            "scale": POSITIVE, "dropout": PROBABILITY, "dropout_seed": SEED, "hash_scheme": ["rotations", None, 1],
            "backend": ["cuda", None, 1],
        },
    ),
    "bucket_attention": Call(
        bucket_attention,
        {**QKV, "bucket_ids": IDS, "options": OPTIONS, "key_padding_mask": MASK},
        {**OF_HEADS, "bucket_ids": "B H R S", "key_padding_mask": "B S"},
        wrong={"bucket_ids": [IDS - 1, IDS + 1, IDS + 2**40]},
    ),
    "attend_locally": Call(
        attend_locally, {**QKV, "exchange": LocalExchange(IDS, OPTIONS, MASK)}, OF_HEADS, fixed="B H S"
    ),
    "cross_attention": Call(
        lambda q, query_ids, options, **keys: cross_attention(q, query_ids, CrossKeys(**keys), options),
        {"q": QKV["q"], "query_ids": IDS, "k": floats(B, H, T, D), "v": floats(B, H, T, D),
         "ids": integers(4, B, H, 2, T), "padding_mask": torch.ones(B, T, dtype=torch.bool), "options": CROSS},
        {"q": "B H S D", "query_ids": "B H R S", "k": "B H T D", "v": "B H T D", "ids": "B H R T",
         "padding_mask": "B T"},
        signature=cross_attention,
    ),
    "draw_rotations": Call(
        draw_rotations,
        {"n_heads": 2, "head_dim": 8, "n_hashes": 2, "n_buckets": 12, "scheme": "rotation", "seed": 0},
        wrong={"n_heads": INTEGER, "head_dim": INTEGER, "n_hashes": INTEGER, "n_buckets": [*INTEGER, 3],
               "scheme": ["rotations", None], "seed": SEED, "factors": [(4, 4), (3, 4), (12.0,), (-2, -6)]},
    ),
    "seeded_rotations": Call(
        seeded_rotations,
        {"n_heads": 2, "head_dim": 8, "n_hashes": 2, "n_buckets": 12, "seed": 0},
        wrong={"n_heads": INTEGER, "head_dim": INTEGER, "n_hashes": INTEGER, "n_buckets": [*INTEGER, 3],
               "seed": SEED, "factors": [(4, 4), (3, 4)]},
    ),
    "hash_vectors": Call(
        hash_vectors,
        {"vectors": QKV["q"], "rotations": draw_rotations(H, D, 2, 4, "rotation", 0), "n_buckets": 4,
         "scheme": "rotation"},
        {"vectors": "B H S D", "rotations": "H R D columns"},
        fixed="columns",
        shares_device=False,
        wrong={"n_buckets": [*INTEGER, 3, 6], "scheme": ["rotations", None], "factors": [(2, 4), (3,)],
               "backend": ["cuda", None]},
    ),
    "exact_attention": Call(
        exact_attention, {**QKV, "causal": True, "key_padding_mask": MASK}, {**OF_HEADS, "key_padding_mask": "B S"}
    ),
    "chunked_cross_entropy": Call(
        chunked_cross_entropy,
        {"hidden": floats(S, DIM), "weight": floats(V, DIM), "bias": floats(V), "labels": integers(V, S),
         "chunk": 4},
        {"hidden": "N dim", "weight": "V dim", "bias": "V", "labels": "N"},
        wrong={"labels": labels(V, S), "chunk": INTEGER},
    ),
    "token_dropout": Call(
        lambda x, rows, positions, **rest: token_dropout(x, coords=TokenCoords(rows, positions), **rest),
        {"x": floats(B, S, DIM), "rows": ROWS, "positions": torch.arange(S), "dropout": 0.5, "seed": 3},
        {"x": "B S C", "rows": "B", "positions": "S"},
        wrong={"dropout": PROBABILITY, "seed": SEED},
        signature=token_dropout,
    ),
    "rotary_tables": Call(
        rotary_tables, {"positions": torch.arange(S), "head_dim": D}, {"positions": "S"},
        wrong={"head_dim": [*INTEGER, 15], "base": POSITIVE}, accepted="positions one dimension more",
    ),
    "rotate": Call(
        rotate,
        dict(zip(("x", "cos", "sin"), (QKV["q"], *rotary_tables(torch.arange(S), D)), strict=True)),
        {"x": "B H S D", "cos": "S half", "sin": "S half"},
        fixed="D",
    ),
    "measure_coverage": Call(
        measure_coverage,
        {"q": QKV["q"], "k": QKV["k"], "bucket_ids": IDS, "options": OPTIONS, "key_padding_mask": MASK},
        {"q": "B H S D", "k": "B H S D", "bucket_ids": "B H R S", "key_padding_mask": "B S"},
        wrong={"bucket_ids": [IDS - 1, IDS + 1]},
    ),
    "measure_bucket_stats": Call(
        measure_bucket_stats,
        {"bucket_ids": IDS, "counts": integers(9, B * H, 2, 4), "window": 4},
        {"bucket_ids": "B H R S", "counts": "BH R K"},
        fixed="B H BH",
        wrong={"window": INTEGER},
    ),
    "WindowRule": Call(WindowRule, {"window": 8, "causal": True}, wrong={"window": [*INTEGER, 2**40]}),
    "ChunkRule": Call(
        ChunkRule, {"chunk_len": 8, "causal": True},
        wrong={"chunk_len": INTEGER, "n_before": [-1, 1.5], "n_after": [-1, "0"], "round_to": INTEGER},
    ),
    "AttentionOptions": Call(
        AttentionOptions, {"rule": WindowRule(8, True), "n_buckets": 4, "scale": 1.0},
        wrong={"n_buckets": INTEGER, "scale": POSITIVE, "dropout": PROBABILITY, "dropout_seed": [*SEED, 2**70],
               "first_head": [-1, 0.5], "n_heads": [0, 1.5], "next_value_heads": [-1, 0.5],
               "backend": ["cuda", None]},
    ),
    "CrossOptions": Call(
        CrossOptions, {"n_buckets": 4, "scale": 1.0},
        wrong={"n_buckets": INTEGER, "scale": POSITIVE, "dropout": PROBABILITY, "dropout_seed": SEED},
    ),
    "ExactOptions": Call(
        ExactOptions, {"causal": True, "dropout": 0.1, "seed": 0, "rows": None},
        wrong={"dropout": PROBABILITY, "seed": SEED},
    ),
}  # fmt: skip
CACHES = {
    "BucketCache": Call(
        BucketCache,
        {"q": QKV["q"], "v": QKV["v"], "bucket_ids": IDS, "options": OPTIONS, "key_padding_mask": MASK},
        {"q": "B H S D", "v": "B H S D", "bucket_ids": "B H R S", "key_padding_mask": "B S"},
        wrong={"bucket_ids": [IDS - 1, IDS + 1],
               "options": [AttentionOptions(rule, 4, scale=1.0) for rule in (WindowRule(8, False), CHUNKS)]},
    ),
    "BucketCache.attend": Call(
        lambda **arguments: cached("bucket").attend(**arguments),
        {"q": TOKEN["q"], "v": TOKEN["v"], "bucket_ids": integers(4, B, H, 2, 1)},
        {"q": "B H 1 D", "v": "B H 1 D", "bucket_ids": "B H R 1"},
        fixed="B H R D",
        wrong={"bucket_ids": labels(4, B, H, 2, 1)},
        signature=BucketCache.attend,
    ),
    "BucketCache.select_rows": Call(
        lambda rows: cached("bucket").select_rows(rows), {"rows": torch.tensor([1, 0, 1])}, {"rows": "N"},
        wrong={"rows": labels(B, 2)}, signature=BucketCache.select_rows,
    ),
    "ExactCache": Call(
        ExactCache, {"k": QKV["k"], "v": QKV["v"], "first": torch.zeros(B, dtype=torch.int64)},
        {"k": "B H S D", "v": "B H S D", "first": "B"},
    ),
    "ExactCache.attend": Call(
        lambda **arguments: cached("exact").attend(**arguments), TOKEN, OF_TOKEN, fixed="B H D",
        signature=ExactCache.attend,
    ),
    "ExactCache.select_rows": Call(
        lambda rows: cached("exact").select_rows(rows), {"rows": torch.tensor([1, 0, 1])}, {"rows": "N"},
        wrong={"rows": labels(B, 2)}, signature=ExactCache.select_rows,
    ),
    "WindowCache": Call(
        WindowCache,
        {"k": QKV["k"], "v": QKV["v"], "window": 8, "scale": 1.0, "first": torch.zeros(B, dtype=torch.int64)},
        {"k": "B H S D", "v": "B H S D", "first": "B"},
        wrong={"window": INTEGER, "scale": POSITIVE},
    ),
    "WindowCache.attend": Call(
        lambda **arguments: cached("window").attend(**arguments), TOKEN, OF_TOKEN, fixed="B H D",
        signature=WindowCache.attend,
    ),
    "WindowCache.select_rows": Call(
        lambda rows: cached("window").select_rows(rows), {"rows": torch.tensor([1, 0, 1])}, {"rows": "N"},
        wrong={"rows": labels(B, 2)}, signature=WindowCache.select_rows,
    ),
}  # fmt: skip


def forward(name: str, **wrong: list[Any]) -> dict[str, Any]:
    """Fields of a `Call` of a model's forward."""
    model = MODELS[name]
    if name != "translator":
        wrong = {**WRONG_IDS, **wrong}
    return {"function": model, "signature": type(model).forward, "wrong": {**WRONG_FORWARD, **wrong}}


def layer(kind: Any) -> Call:
    module = kind(config())
    return Call(
        module, {"x": floats(B, S, DIM), **FORWARD, **IDS_OF_TOKENS},
        {"x": "B S dim", **OF_FORWARD, **OF_DOCUMENTS},
        fixed="dim", wrong={**WRONG_FORWARD, **WRONG_IDS}, signature=kind.forward,
    )  # fmt: skip


WRONG_TOKENS = labels(V, B, S)
KEPT = [0, -1, 1.5]
LIBRARY = {
    "ReformerLM.forward": Call(
        valid={"tokens": TOKENS, "labels": TOKENS, **FORWARD, **IDS_OF_TOKENS},
        dims={"tokens": "B S", "labels": "B S", **OF_FORWARD, **OF_DOCUMENTS},
        **forward("lm", tokens=WRONG_TOKENS, labels=WRONG_TOKENS, logits_to_keep=KEPT),
    ),
    "ReformerForSequenceClassification.forward": Call(
        valid={"tokens": TOKENS, "labels": integers(5, B), **FORWARD, **IDS_OF_TOKENS},
        dims={"tokens": "B S", "labels": "B", **OF_FORWARD, **OF_DOCUMENTS},
        **forward("classifier", tokens=WRONG_TOKENS, labels=labels(5, B)),
    ),
    "ReformerForQuestionAnswering.forward": Call(
        valid={"tokens": TOKENS, "labels": integers(S, B, 2), "answer_mask": MASK, **FORWARD, **IDS_OF_TOKENS},
        dims={"tokens": "B S", "labels": "B 2", "answer_mask": "B S", **OF_FORWARD, **OF_DOCUMENTS},
        **forward("reader", tokens=WRONG_TOKENS, labels=labels(S, B, 2)),
    ),
    "ReformerEncoderDecoder.forward": Call(
        valid={"source": integers(V, B, T), "tokens": TOKENS, "labels": TOKENS,
               "source_mask": torch.ones(B, T, dtype=torch.bool), **FORWARD},
        dims={"source": "B T", "tokens": "B S", "labels": "B S", "source_mask": "B T", **OF_FORWARD},
        **forward(
            "translator", source=labels(V, B, T), tokens=WRONG_TOKENS, labels=WRONG_TOKENS, logits_to_keep=KEPT
        ),
    ),
    "ReformerStack.forward": layer(ReformerStack),
    "LSHSelfAttention.forward": layer(LSHSelfAttention),
    "LocalSelfAttention.forward": layer(LocalSelfAttention),
    "ExactSelfAttention.forward": layer(ExactSelfAttention),
    "ReformerLM": Call(
        ReformerLM, {"config": config(), "vocab_size": V, "seed": 0}, wrong={"vocab_size": INTEGER, "seed": SEED}
    ),
    "ReformerForSequenceClassification": Call(
        ReformerForSequenceClassification, {"config": config(), "vocab_size": V, "n_classes": 5},
        wrong={"vocab_size": INTEGER, "n_classes": INTEGER, "seed": SEED},
    ),
    "ReformerForQuestionAnswering": Call(
        ReformerForQuestionAnswering, {"config": config(), "vocab_size": V},
        wrong={"vocab_size": INTEGER, "seed": SEED},
    ),
    "ReformerEncoderDecoder": Call(
        ReformerEncoderDecoder, {"config": config(), "vocab_size": V}, wrong={"vocab_size": INTEGER, "seed": SEED}
    ),
    "init_weights": Call(
        init_weights, {"model": LSHSelfAttention(config()), "config": config(), "seed": 0}, wrong={"seed": SEED}
    ),
    "inspect_attention": Call(
        inspect_attention, {"model": EVALUATED, "tokens": TOKENS, "key_padding_mask": MASK, "step": 3},
        {"tokens": "B S", "key_padding_mask": "B S"}, wrong={"tokens": WRONG_TOKENS, "step": [-1, 1.5]},
    ),
}  # fmt: skip
PROMPT = integers(V, 5)


def prefilled(kind: type[CachedDecoder] | type[UncachedDecoder]) -> Any:
    """A decoder of the evaluated model, after a prompt."""
    made = UncachedDecoder(EVALUATED) if kind is UncachedDecoder else CachedDecoder(EVALUATED, EVALUATED.config)
    made.prefill(TOKENS)
    return made


GENERATION = {
    **{
        f"{kind.__name__}.step": Call(
            lambda tokens, kind=kind: prefilled(kind).step(tokens), {"tokens": integers(V, B)}, {"tokens": "B"},
            fixed="B", wrong={"tokens": labels(V, B)}, signature=kind.step,
        )
        for kind in (CachedDecoder, UncachedDecoder)
    },
    **{
        f"{kind.__name__}.select_rows": Call(
            lambda rows, kind=kind: prefilled(kind).select_rows(rows), {"rows": torch.tensor([1])}, {"rows": "N"},
            wrong={"rows": labels(B, 2)}, signature=kind.select_rows,
        )
        for kind in (CachedDecoder, UncachedDecoder)
    },
    "generate": Call(
        lambda **arguments: list(generate(decoder(), options=SamplingOptions(), **arguments)),
        {"prompt": PROMPT, "n_tokens": 2}, {"prompt": "S"},
        wrong={"prompt": labels(V, 5), "n_tokens": [-1, 1.5, None]}, signature=generate,
    ),
    "beam_search": Call(
        lambda **arguments: beam_search(decoder(), options=BeamOptions(2), is_end=lambda ids: False, **arguments),
        {"prompt": PROMPT, "n_tokens": 2}, {"prompt": "S"},
        wrong={"prompt": labels(V, 5), "n_tokens": INTEGER}, signature=beam_search,
    ),
    "TextSampler": Call(
        lambda prompts, **arguments: TextSampler(decoder(), [prompts], SamplingOptions(), **arguments),
        {"prompts": PROMPT, "n_samples": 2}, {"prompts": "S"},
        wrong={"n_samples": INTEGER, "first_prompt": [-1, 0.5]}, signature=TextSampler,
    ),
    "SamplingOptions": Call(
        SamplingOptions, {},
        wrong={"temperature": [-1.0, float("nan"), float("inf")], "top_k": [-1], "top_p": [0.0, 1.1, float("nan")],
               "repetition_penalty": [0.0, float("inf"), float("nan")]},
    ),
    "BeamOptions": Call(
        BeamOptions, {}, wrong={"beams": [0], "length_penalty": [-1.0, float("nan"), float("inf")]}
    ),
    "TextStream": Call(TextStream, {"decode": str}, wrong={"stops": [["a", ""]]}),
}  # fmt: skip
CALLS = {**LIBRARY, **OPS, **CACHES, **GENERATION}
