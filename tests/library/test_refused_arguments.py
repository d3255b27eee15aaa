"""Every public function refuses tensors of other shapes, dtypes and devices, and numbers out of range, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from public_calls import CALLS, Call
from torch import Tensor


def wrong_tensors(call: Call, name: str) -> Iterator[tuple[str, object]]:
    """Descriptions and values that this tensor argument must not have."""
    x, letters = call.valid[name], call.dims[name].split()
    yield "a list", x.tolist()
    yield "one dimension more", x.unsqueeze(0)
    yield "one dimension less", x[0]
    yield "sparse", x.to_sparse()
    yield "complex", x.to(torch.complex64)
    yield "integers or floats", x.long() if x.is_floating_point() else x.float()
    yield "bools or integers", x.int() if x.dtype == torch.bool else x.bool()
    used = Counter(letter for dims in call.dims.values() for letter in set(dims.split()))
    for dim, letter in enumerate(letters):
        yield f"empty in {letter}", x.narrow(dim, 0, 0)
        if used[letter] > 1 or letter in call.fixed.split() or letter.isdigit():
            yield f"longer in {letter}", torch.cat([x, x.narrow(dim, 0, 1)], dim)
            if x.shape[dim] > 1:
                yield f"shorter in {letter}", x.narrow(dim, 0, x.shape[dim] - 1)
    if len(call.dims) > 1 and call.shares_device:
        yield "on another device", x.to("meta")


def refused(call: Call, name: str, value: object, others: set[str]) -> str | None:
    """None if the call refuses the value in a message with a name of an argument, else what happened instead."""
    try:
        call.function(**{**call.valid, name: value})
    except (ValueError, TypeError) as error:
        message = str(error)
        if any(other in message or other.replace("_", "-") in message for other in {name, *others}):
            return None
        return f"refused without a name: {error!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize("name", CALLS)
def test_valid_calls_run(name: str) -> None:
    CALLS[name].function(**CALLS[name].valid)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.dims])
def test_wrong_tensors_are_refused(name: str) -> None:
    call = CALLS[name]
    problems = []
    for argument in call.dims:
        for description, value in wrong_tensors(call, argument):
            if f"{argument} {description}" in call.accepted:
                continue
            problem = refused(call, argument, value, set(call.dims))
            problems += [f"{argument} {description}: {problem}"] if problem else []
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.wrong])
def test_values_out_of_range_are_refused(name: str) -> None:
    call = CALLS[name]
    aliases = {"scheme": "hash_scheme", "options": "rule", "prompt": "tokens"}
    problems = []
    for argument, values in call.wrong.items():
        for value in values:
            problem = refused(call, argument, value, {*call.dims, aliases.get(argument, argument)})
            shown = value.unique().tolist() if isinstance(value, Tensor) else repr(value)
            problems += [f"{argument}={shown}: {problem}"] if problem else []
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@pytest.mark.parametrize("name", ["lsh_attention", "hash_vectors"])
def test_each_backend_is_behind_the_checks(name: str, backend: str) -> None:
    call = CALLS[name]
    chosen = replace(call, valid={**call.valid, "backend": backend})
    problems = []
    for argument in chosen.dims:
        for description, value in wrong_tensors(chosen, argument):
            problem = refused(chosen, argument, value, set(chosen.dims))
            problems += [f"{argument} {description}: {problem}"] if problem else []
    assert not problems, "\n".join(problems)
