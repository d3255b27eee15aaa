"""Keywords and masks of calls: unknown ones are refused with a name to use, whatever the class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_helpers import EXACT, LSH, random_tokens, small_config
from torch import Tensor

from reformer_dist.config import ModelConfig, OptimConfig
from reformer_dist.config.keywords import FORWARD_COUNTERPARTS, MODEL_CONFIG_COUNTERPARTS
from reformer_dist.models import (
    ExactSelfAttention,
    LocalSelfAttention,
    LSHSelfAttention,
    ReformerEncoderDecoder,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerLM,
    ReformerStack,
)

CONFIG = small_config(layers=[LSH, EXACT], n_layers=2, causal=True)
TOKENS, VECTORS = random_tokens(), torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(0))
LM = ReformerLM(CONFIG, 50).eval()
PAIR = ReformerEncoderDecoder(CONFIG, 50).eval()
CALLS: dict[str, Callable[..., Any]] = {
    "lm": lambda **options: LM(TOKENS, **options),
    "encode": lambda **options: LM.encode(TOKENS, **options),
    "classifier": lambda **options: ReformerForSequenceClassification(CONFIG, 50, 3).eval()(TOKENS, **options),
    "reader": lambda **options: ReformerForQuestionAnswering(CONFIG, 50).eval()(TOKENS, **options)[0],
    "pair": lambda **options: PAIR(TOKENS, TOKENS, **options),
    "source": lambda **options: PAIR.encode(TOKENS, **options),
    "stack": lambda **options: ReformerStack(CONFIG).eval()(VECTORS, **options),
    "lsh": lambda **options: LSHSelfAttention(CONFIG).eval()(VECTORS, **options),
    "local": lambda **options: LocalSelfAttention(CONFIG).eval()(VECTORS, **options),
    "exact": lambda **options: ExactSelfAttention(CONFIG).eval()(VECTORS, **options),
}
MASK = torch.arange(37) < torch.tensor([[37], [20]])


@pytest.mark.parametrize("name", list(CALLS))
def test_unknown_keywords_are_refused(name: str) -> None:
    call = CALLS[name]
    for keyword in ("attention_mask", "input_mask", "mask", "key_padding_msk"):
        with pytest.raises(TypeError, match=rf"{keyword}=Tensor\[2, 37\].*\bkey_padding_mask\b"):
            call(**{keyword: MASK})
    with pytest.raises(TypeError, match=r"stp=3: did you mean step\?"):
        call(stp=3)
    with pytest.raises(TypeError, match="attention_mask=None"):
        call(attention_mask=None)


def test_every_well_known_keyword_has_its_counterpart() -> None:
    for keyword, counterpart in FORWARD_COUNTERPARTS.items():
        with pytest.raises(TypeError) as raised:
            LM(TOKENS, **{keyword: 1})
        assert f"{keyword}=1: use {counterpart}" in str(raised.value)


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("mask", [MASK.long(), torch.where(MASK, 0.0, -torch.inf)], ids=["integers", "additive"])
def test_masks_of_numbers_are_refused(name: str, mask: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"mask\.dtype={mask.dtype}: .*True for real tokens"):
        CALLS[name](key_padding_mask=mask)


def test_options_beside_a_context_are_refused() -> None:
    context = LM._build_context(TOKENS, {})
    for module in (LM.stack, LM.stack.blocks[0].attention):
        with pytest.raises(TypeError, match=r"step: .*context"):
            module(VECTORS, context, step=1)


def test_constructors_name_the_nearest_key() -> None:
    with pytest.raises(TypeError, match=r"ModelConfig: .*n_hashs=3: did you mean n_hashes\?"):
        ModelConfig(n_hashs=3)
    with pytest.raises(TypeError, match=r"OptimConfig: .*betaz=.*did you mean betas\?"):
        OptimConfig(betaz=(0.9, 0.99))
    keys = ModelConfig.__dataclass_fields__
    for name, counterpart in MODEL_CONFIG_COUNTERPARTS.items():
        assert name not in keys and counterpart.split(",")[0].split("=")[0].split(" ")[0] in {*keys, "vocab_size"}
        with pytest.raises(TypeError, match=f"{name}=8: use "):
            ModelConfig(**{name: 8})


def order_matters(stack: Callable[[Tensor], Tensor]) -> bool:
    permutation = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    return not torch.allclose(stack(VECTORS)[:, permutation], stack(VECTORS[:, permutation]), atol=1e-3)


@pytest.mark.parametrize("position", ["axial", "learned", "sinusoidal", "rotary"])
def test_a_standalone_stack_knows_the_order(position: str) -> None:
    config = small_config(position=position, head_dim=8, causal=False, layers=[EXACT], max_seq_len=128)
    assert order_matters(ReformerStack(config).eval())
    if position in ("axial", "learned"):
        with pytest.raises(ValueError, match=r"129 tokens.*128"):
            ReformerStack(config)(torch.randn(1, 129, 24))
