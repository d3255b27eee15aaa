"""What a recompute in backward must repeat: the weights, the tensors that the forward read, and no random draws.

Backward runs after forward has returned. By then, `torch.func.functional_call` has put the module's own parameters
back, `torch.nn.utils.parametrize.cached` has dropped its cache, and torch's generators have moved on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

WAY_OUT = "set model.recompute=none or checkpoint"


class ReachedTensors(TorchFunctionMode):
    """Collects the tensors requiring a gradient that functions of torch read, if `select` accepts them.

    While gradients are disabled, results never require one, so what is read comes from outside: parameters, and
    tensors of the outer graph, such as a gate that a forward hook multiplies by.
    """

    def __init__(self, select: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._select = select
        self.by_id: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._collect(args)
        if not kwargs:
            return func(*args)
        self._collect(kwargs.values())
        return func(*args, **kwargs)

    def _collect(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                if value.requires_grad and self._select(value) and not self._is_view_of_collected(value):
                    self.by_id[id(value)] = value
            elif isinstance(value, list | tuple):
                self._collect(value)

    def _is_view_of_collected(self, value: Tensor) -> bool:
        """A view made inside an autograd function requires a gradient without being part of a graph."""
        return value.is_leaf and value._base is not None and id(value._base) in self.by_id


class LayerWeights:
    """Parameters and buffers of a layer during its forward, which its recompute must use again."""

    def __init__(self, layer: nn.Module) -> None:
        self._entries: list[tuple[dict[str, Any], str, Tensor]] = [
            (registry, name, tensor)
            for module in layer.modules()
            for registry in cast("tuple[dict[str, Any], ...]", (module._parameters, module._buffers))
            for name, tensor in registry.items()
            if tensor is not None
        ]
        self._versions = [tensor._version for _, _, tensor in self._entries if tensor.requires_grad]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The layer has these weights. Raises RuntimeError if they were modified in place since."""
        if self._versions != [tensor._version for _, _, tensor in self._entries if tensor.requires_grad]:
            raise RuntimeError(
                "weights of a layer were modified between its forward and backward, which recomputes it; "
                "run backward before the optimizer's step, or set model.recompute=none"
            )
        others = [(registry, name, registry[name], tensor) for registry, name, tensor in self._entries]
        others = [entry for entry in others if entry[2] is not entry[3]]
        try:
            for registry, name, _, tensor in others:
                registry[name] = tensor
            with uncached_parametrizations():
                yield
        finally:
            for registry, name, other, _ in others:
                registry[name] = other


@contextmanager
def uncached_parametrizations() -> Iterator[None]:
    """Parametrized weights are computed from their originals, also inside `parametrize.cached`.

    A cache filled while gradients are disabled would hold weights without a graph.
    """
    depth, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = depth


@contextmanager
def without_random_draws(device: torch.device) -> Iterator[None]:
    """Raises RuntimeError if the body draws from torch's global generators: a recompute would draw anew."""
    before = _generator_states(device)
    yield
    if not all(map(torch.equal, before, _generator_states(device))):
        raise RuntimeError(
            "model.recompute=reversible: a layer drew from torch's global generator, such as by nn.Dropout in a "
            f"hook, and its recompute would draw other values; {WAY_OUT}, which repeats the draw"
        )


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        states.append(torch.cuda.get_rng_state(device))
    return states


def check_reversible(layer: nn.Module) -> None:
    """Raises RuntimeError if FSDP or ZeRO stage 3 shards the layer in parts.

    Their hooks gather and release the weights of a sublayer around each of its calls, and the gradients of a
    recompute do not pass through them.
    """
    fsdp = "torch.distributed.fsdp"
    if fsdp in sys.modules:
        for name, module in layer.named_modules():
            is_sharded = any(base.__module__.startswith(fsdp) for base in type(module).__mro__)
            if name and is_sharded:
                raise RuntimeError(
                    f"model.recompute=reversible: FSDP shards the sublayer {name} of a Block; shard whole Blocks, "
                    f"as in fully_shard(block) for each block of model.stack.blocks, or {WAY_OUT}"
                )
    for name, parameter in layer.named_parameters():
        if parameter.numel() == 0 and hasattr(parameter, "ds_id"):
            raise RuntimeError(
                f"model.recompute=reversible: ZeRO stage 3 has not gathered {name} of a Block; call "
                "deepspeed.utils.set_z3_leaf_modules(model, [reformer_dist.Block]) before deepspeed.initialize, "
                f"or {WAY_OUT}"
            )
