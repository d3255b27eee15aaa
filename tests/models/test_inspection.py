"""inspect_attention of encoder-decoders, and of modules that contain a layer of this package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import EXACT, LOCAL, LSH, SMALL, VOCAB, random_tokens
from torch import Tensor, nn

from reformer_dist import inspect_attention
from reformer_dist.config import CrossAttentionKind, ModelConfig
from reformer_dist.interop import reformer_pytorch_api
from reformer_dist.models import ReformerEncoderDecoder, ReformerStack
from reformer_dist.models.attention import LSHSelfAttention

ENCODER_DECODER = {**SMALL, "n_layers": 2, "n_encoder_layers": 3, "encoder_layers": [EXACT, LSH, LOCAL]}


class Own(nn.Module):
    """Someone's model: a layer of ours between others, which stay in their mode."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.before, self.layer, self.frozen = nn.Linear(5, width), layer, nn.Dropout(0.5).eval()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        out: Tensor = self.layer(self.frozen(self.before(x)), **options)
        return out


def heads(module: nn.Module, x: Tensor) -> Tensor:
    """Outputs of the heads before their output projection, [B, S, H * D]."""
    outs: list[Tensor] = []
    hook = module.to_out.register_forward_pre_hook(lambda _module, inputs: outs.append(inputs[0]))  # type: ignore[union-attr]
    module(x)
    hook.remove()
    return outs[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", CrossAttentionKind)
def test_all_three_attentions_of_an_encoder_decoder(kind: CrossAttentionKind) -> None:
    model = ReformerEncoderDecoder(ModelConfig(**{**ENCODER_DECODER, "cross_attention": kind}), VOCAB).train()
    source, tokens = random_tokens(2, 40), random_tokens(2, 23)
    source_mask = torch.arange(40) < torch.tensor([[40], [30]])
    views = inspect_attention(model, source, tokens, source_mask=source_mask)
    names = [view.name for view in views]
    decoder = [f"stack.blocks.{layer}.{part}" for layer in range(2) for part in ("attention", "cross_attention")]
    assert names == [*(f"encoder.blocks.{layer}.attention" for layer in range(3)), *decoder]
    shapes = [(40, 40)] * 3 + [(23, 23), (23, 40)] * 2
    for view, shape in zip(views, shapes, strict=True):
        assert view.weights.shape[2:] == shape
    crosses = [view for view in views if view.name.endswith("cross_attention")]
    for view in crosses:
        assert not view.weights[1, :, :, 30:].any()  # padding of the source
        totals = view.weights.sum(dim=-1)
        if kind is CrossAttentionKind.exact:
            assert view.bucket_ids is None and view.key_bucket_ids is None
            torch.testing.assert_close(totals, torch.ones_like(totals))
        else:
            assert view.bucket_ids is not None and view.key_bucket_ids is not None
            meets = (view.bucket_ids.unsqueeze(-1) == view.key_bucket_ids.unsqueeze(-2)).any(dim=2)
            assert not view.weights[~meets].any()
            met = (meets & source_mask[:, None, None]).any(dim=-1)
            torch.testing.assert_close(totals[met], torch.ones_like(totals[met]))
    assert not views[3].weights.triu(1).any()  # the decoder is causal, and the encoder is not
    assert views[0].weights.triu(1).any()


@torch.no_grad()
def test_cross_weights_reproduce_the_output() -> None:
    model = ReformerEncoderDecoder(ModelConfig(**ENCODER_DECODER), VOCAB).eval()
    attention = model.stack.blocks[0].cross_attention
    values, outs = [], []
    attention.to_v.register_forward_hook(lambda _module, _inputs, output: values.append(output))
    attention.to_out.register_forward_pre_hook(lambda _module, inputs: outs.append(inputs[0]))
    views = {view.name: view for view in inspect_attention(model, random_tokens(2, 31), random_tokens(2, 17))}
    v = values[0].view(2, 31, model.config.n_heads, -1).transpose(1, 2)
    weights = views["stack.blocks.0.cross_attention"].weights
    torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(2), outs[0])


@torch.no_grad()
def test_a_layer_in_another_module() -> None:
    config = ModelConfig(**{**SMALL, "layers": [LSH]})
    model = Own(LSHSelfAttention(config), config.dim).train()
    modes = [module.training for module in model.modules()]
    x = torch.randn(2, 33, 5)
    mask = torch.arange(33) < torch.tensor([[33], [20]])
    (view,) = inspect_attention(model, x, key_padding_mask=mask, step=4)
    assert [module.training for module in model.modules()] == modes  # also of what is frozen
    assert view.name == "layer" and not view.weights[1, :, :20, 20:].any()
    (other,) = inspect_attention(model, x, key_padding_mask=mask, step=5)
    assert not torch.equal(view.weights, other.weights)
    layer = model.layer
    assert isinstance(layer, LSHSelfAttention)
    hidden = model.before(x)
    (view,) = inspect_attention(layer, hidden)
    assert view.name == ""
    v = layer.to_v(hidden).view(2, 33, config.n_heads, -1).transpose(1, 2)
    expected = heads(layer.eval(), hidden)
    torch.testing.assert_close((view.weights @ v).transpose(1, 2).flatten(2), expected)


@torch.no_grad()
def test_a_stack_in_another_module_and_under_other_names() -> None:
    config = ModelConfig(**{**SMALL, "layers": [LSH, EXACT], "n_layers": 4, "share_layers": True})
    views = inspect_attention(Own(ReformerStack(config), config.dim), torch.randn(1, 20, 5))
    assert [view.name for view in views] == [f"layer.blocks.{layer % 2}.attention" for layer in range(4)]
    adapted = reformer_pytorch_api.ReformerLM(40, 24, 2, 64, heads=2, dim_head=8, bucket_size=8)
    assert len(inspect_attention(adapted, torch.zeros(1, 30, dtype=torch.int64))) == 2


def test_what_can_not_be_inspected() -> None:
    with pytest.raises(ValueError, match="Linear: no attention layer"):
        inspect_attention(nn.Linear(3, 3), torch.zeros(1, 3))
    config = ModelConfig(**{**SMALL, "layers": [EXACT], "cross_attention": CrossAttentionKind.exact})
    with pytest.raises(ValueError, match=r"\b4097 tokens: .*\b4096\b"):
        inspect_attention(LSHSelfAttention(config), torch.zeros(1, 4097, config.dim))
    with pytest.raises(ValueError, match=r"sequence=object: .*whole sequences"):
        inspect_attention(LSHSelfAttention(config), torch.zeros(1, 3, config.dim), sequence=object())
