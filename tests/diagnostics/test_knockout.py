"""A model without the attention of some layers is the model whose attention there returns 0."""

from __future__ import annotations

import pytest
import torch
from position_cases import make_model

from reformer_dist.diagnostics.knockout import remove_attention
from reformer_dist.errors import ConfigError


@pytest.mark.parametrize(("layers", "removed"), [("lsh", [1]), ("0", [0]), ("0,1", [0, 1])])
def test_removed_layers_contribute_nothing(layers: str, removed: list[int]) -> None:
    model, _, rows = make_model()
    expected, _, _ = make_model()
    whole = model(rows["tokens"])
    for layer in removed:
        for parameter in expected.stack.blocks[layer].attention.parameters():
            parameter.data.zero_()
    assert remove_attention(model, layers) == removed
    torch.testing.assert_close(model(rows["tokens"]), expected(rows["tokens"]), rtol=0, atol=0)
    assert not torch.equal(model(rows["tokens"]), whole)


@pytest.mark.parametrize("layers", ["exact", "2", "0,2", "-1", "", "lsh,local", "all"])
def test_layers_that_there_are_not_are_refused(layers: str) -> None:
    model, _, _ = make_model()
    with pytest.raises(ConfigError, match=f"--without {layers}: .*0 local, 1 lsh"):
        remove_attention(model, layers)
