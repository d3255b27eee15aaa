"""Checks of the arguments of public functions, made once, before anything is computed.

A wrong argument is a ValueError, or a TypeError if its type is wrong. Messages have the form
`name=value: what is wrong; what would be right`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class TensorChecks:
    """Checks of the tensors of one call, which share a device, the sizes that have one letter, and a float dtype.

    Shapes are written as letters and numbers, such as "B H S D". A letter means the size that it had first.
    """

    def __init__(self, **sizes: int) -> None:
        """sizes: of letters whose size is known before the first tensor."""
        self._sizes = dict(sizes)
        self._sources: dict[str, str] = {}
        self._device: tuple[str, torch.device] | None = None
        self._dtype: tuple[str, torch.dtype] | None = None

    def floats(self, name: str, x: Tensor, dims: str, *, any_dtype: bool = False) -> None:
        """x has a floating point dtype and the shape dims. any_dtype: it may differ from earlier ones."""
        self._check(name, x, dims, FLOATS, "floating point numbers")
        if any_dtype:
            return
        if self._dtype is None:
            self._dtype = name, x.dtype
        first, dtype = self._dtype
        if x.dtype != dtype:
            raise ValueError(f"{name}.dtype={x.dtype}: must be that of {first}, {dtype}; convert one of them")

    def integers(self, name: str, x: Tensor, dims: str) -> None:
        """x has an integer dtype and the shape dims."""
        self._check(name, x, dims, INTEGERS, "integers")

    def mask(self, name: str, x: Tensor | None, dims: str) -> None:
        """x is None, or a bool tensor of the shape dims."""
        if x is not None:
            self._check(name, x, dims, (torch.bool,), "bools, True for real tokens")

    def _check(self, name: str, x: Tensor, dims: str, dtypes: Collection[torch.dtype], kind: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: must be a tensor [{_listed(dims)}], not {type(x).__name__}")
        if x.layout is not torch.strided:
            raise ValueError(f"{name}.layout={x.layout}: must be dense (torch.strided)")
        if x.dtype not in dtypes:
            raise ValueError(f"{name}.dtype={x.dtype}: must be {kind}")
        self._check_shape(name, x, dims)
        if self._device is None:
            self._device = name, x.device
        first, device = self._device
        if x.device != device:
            raise ValueError(f"{name}.device={x.device}: must be that of {first}, {device}")

    def _check_shape(self, name: str, x: Tensor, dims: str) -> None:
        letters, shape = dims.split(), list(x.shape)
        if len(letters) != len(shape):
            raise ValueError(f"{name}.shape={shape}: must have {len(letters)} dimensions, [{_listed(dims)}]")
        for letter, size in zip(letters, shape, strict=True):
            if size == 0 and self._sizes.get(letter) != 0:
                raise ValueError(f"{name}.shape={shape}: [{_listed(dims)}] must not be empty, but {letter} is 0")
            expected = int(letter) if letter.isdigit() else self._sizes.setdefault(letter, size)
            if size != expected:
                like = f", as of {self._sources[letter]}" if letter in self._sources else ""
                raise ValueError(f"{name}.shape={shape}: must be [{_listed(dims)}] with {letter}={expected}{like}")
            if letter not in self._sources:
                self._sources[letter] = name


def check_document_ids(checks: TensorChecks, document_ids: Tensor) -> None:
    """document_ids are integers [B, S] of 31 bits that do not decrease along a row."""
    checks.integers("document_ids", document_ids, "B S")
    check_range("document_ids", document_ids.long(), 2**31, limit="2**31")
    check_all("document_ids", document_ids.diff(dim=1) >= 0, "must not decrease along a row")


def one_per_row_or_shared(x: Tensor, dims: str) -> str:
    """dims "B S ..." for a tensor that differs between batch rows, or without the "B" where all rows share it."""
    has_batch = not isinstance(x, Tensor) or x.dim() >= len(dims.split())
    return dims if has_batch else dims.removeprefix("B ")


def _listed(dims: str) -> str:
    return ", ".join(dims.split())


def check_type(name: str, value: object, kind: type) -> None:
    """value is an instance of a class, such as bool."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: must be a {kind.__name__}, not {type(value).__name__}")


def check_integer(name: str, value: int, *, least: int | None = None, most: int | None = None) -> None:
    """value is an integer from least to most."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r}: must be an integer")
    if (least is not None and value < least) or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value}: must be {bounds}")


def check_number(name: str, value: float, *, above: float | None = None, least: float | None = None) -> None:
    """value is a finite number above `above`, or not below `least`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: must be a number")
    is_inside = (above is None or value > above) and (least is None or value >= least)
    if not (math.isfinite(value) and is_inside):
        bounds = [f" and above {above}"] * (above is not None) + [f" and at least {least}"] * (least is not None)
        raise ValueError(f"{name}={value}: must be finite{''.join(bounds)}")


def check_dropout(name: str, value: float) -> None:
    """value is a probability below 1."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value}: must be at least 0 and below 1")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        *others, last = choices
        raise ValueError(f"{name}={value!r}: must be {', '.join(others)} or {last}")


def check_range(name: str, x: Tensor, stop: int, *, limit: str, also: int | None = None) -> None:
    """Every element of an integer tensor is in [0, stop), or is `also`. limit: the name of stop, for the message.

    On a GPU, an assertion in the stream, which ends the process with the message, so that the host never waits.
    """
    is_valid = (x >= 0) & (x < stop)
    expected = f"must be from 0 to {stop - 1}, below {limit}={stop}"
    if also is not None:
        is_valid, expected = is_valid | (x == also), f"{expected}, or {also}"
    check_all(name, is_valid, expected, x)


def check_all(name: str, is_valid: Tensor, expected: str, x: Tensor | None = None) -> None:
    """Every element of is_valid is True; the message has that of x where one is not. On a GPU, as check_range."""
    if is_valid.device.type == "cpu" and not isinstance(is_valid, FakeTensor):  # which has no values
        if not bool(is_valid.all()):
            value = "" if x is None else f"={x[~is_valid][0].item()}"
            raise ValueError(f"{name}{value}: {expected}")
    elif is_valid.device.type != "meta":
        torch._assert_async(is_valid.all(), f"{name}: {expected}")
