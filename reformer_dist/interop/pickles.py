"""A safe pickle interpreter for arrays, numbers, strings and containers.

`pickletools.genops` parses the opcodes, which executes nothing, and this module interprets those that build plain
values. The few names that NumPy uses to write arrays map to our own implementations. No name in the file is ever
imported or called; every other opcode and name is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from reformer_dist.errors import CheckpointError

CORE = ("numpy.core.multiarray", "numpy._core.multiarray")
NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
NUMBERS = (
    *("bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
NUMERIC_KINDS = "biuf"  # kinds of NumPy dtypes


class Unsupported(Exception):
    """An operation that the interpreter does not support."""


@dataclass(frozen=True)
class _Name:
    """A global name in the file. It is never resolved."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _DType:
    def __init__(self, name: object) -> None:
        if not isinstance(name, str):
            raise Unsupported(f"a dtype of {name!r}")
        try:
            self.value = np.dtype(name)
        except (TypeError, ValueError) as error:
            raise Unsupported(f"the dtype {name!r}") from error
        if self.value.kind not in NUMERIC_KINDS:
            raise Unsupported(f"the dtype {name!r}")

    def set_state(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    value: np.ndarray[Any, Any] | None = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


class _Ignored:
    """A placeholder for objects without weights, such as recorded input shapes."""

    def set_state(self, state: Any) -> None: ...


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
        raise Unsupported("a non-numeric array")
    return np.frombuffer(data, dtype=dtype.value).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise Unsupported(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


# implementations of the names that a file may call
CALLABLES: dict[tuple[str, str], Callable[..., Any]] = {
    **{(module, "_reconstruct"): lambda *_: _Array() for module in CORE},
    **{(module, "scalar"): _scalar for module in CORE},
    **{(module, "_frombuffer"): _array for module in NUMERIC},
    ("numpy", "dtype"): lambda name, *_: _DType(name),
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): lambda *_: {},
    ("collections", "defaultdict"): lambda *_: {},
    ("trax.shapes", "ShapeDtype"): lambda *_: _Ignored(),
}
BUILTINS = ("builtins", "__builtin__")
# names that may occur but not be called
NAMES = {
    ("numpy", "ndarray"),
    *((module, name) for module in BUILTINS for name in ("list", "dict")),
    *(("numpy", name) for name in NUMBERS),
}
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = object()


class _Interpreter:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        if name in VALUES:
            self.stack.append(arg)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in TUPLES:
            self.stack[-TUPLES[name] :] = [tuple(self.stack[-TUPLES[name] :])]
        elif hasattr(self, f"do_{name}"):
            getattr(self, f"do_{name}")(arg)
        else:
            raise Unsupported(f"the opcode {name}")

    def _since_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not MARK:
            items.append(item)
        return items[::-1]

    def do_PROTO(self, arg: Any) -> None: ...

    do_FRAME = do_STOP = do_PROTO

    def do_MARK(self, arg: Any) -> None:
        self.stack.append(MARK)

    def do_POP(self, arg: Any) -> None:
        self.stack.pop()

    def do_POP_MARK(self, arg: Any) -> None:
        self._since_mark()

    def do_MEMOIZE(self, arg: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_PUT(self, arg: Any) -> None:
        self.memo[int(arg)] = self.stack[-1]

    do_BINPUT = do_LONG_BINPUT = do_PUT

    def do_GET(self, arg: Any) -> None:
        self.stack.append(self.memo[int(arg)])

    do_BINGET = do_LONG_BINGET = do_GET

    def do_TUPLE(self, arg: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def do_LIST(self, arg: Any) -> None:
        self.stack.append(self._since_mark())

    def do_DICT(self, arg: Any) -> None:
        items = self._since_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def do_APPEND(self, arg: Any) -> None:
        self._extend([self.stack.pop()])

    def do_APPENDS(self, arg: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Unsupported("appending to a non-list")
        self.stack[-1].extend(items)

    def do_SETITEM(self, arg: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def do_SETITEMS(self, arg: Any) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise Unsupported("setting items of a non-dict")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def do_GLOBAL(self, arg: Any) -> None:
        module, name = arg.split(" ", 1)
        self._push_name(module, name)

    def do_STACK_GLOBAL(self, arg: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._push_name(module, name)

    def _push_name(self, module: Any, name: Any) -> None:
        if (module, name) not in CALLABLES and (module, name) not in NAMES:
            raise Unsupported(f"the name {module}.{name}")
        self.stack.append(_Name(module, name))

    def do_REDUCE(self, arg: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        function = CALLABLES.get((called.module, called.name)) if isinstance(called, _Name) else None
        if function is None or type(arguments) is not tuple:
            raise Unsupported(f"a call of {called}")
        self.stack.append(function(*arguments))

    do_NEWOBJ = do_REDUCE

    def do_BUILD(self, arg: Any) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _DType | _Array | _Ignored):
            raise Unsupported(f"setting the state of {self.stack[-1]!r}")
        self.stack[-1].set_state(state)


def read_pickle(data: bytes, where: str) -> Any:
    """Reads a pickle of containers, strings, numbers and NumPy arrays.

    Raises CheckpointError, naming the opcode and its offset, for anything else or an invalid pickle.
    """
    interpreter, current = _Interpreter(), ""
    cause: Exception
    try:
        for opcode, arg, offset in pickletools.genops(data):
            current = f"opcode {opcode.name} at byte {offset} is refused:"
            interpreter.step(opcode.name, arg)
        (value,) = interpreter.stack
        return _unwrap_arrays(value)
    except Unsupported as error:
        cause, problem = error, f"{current} {error}"
    except RecursionError as error:
        cause, problem = error, "contains itself"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        cause, problem = error, f"can't be read as a pickle ({type(error).__name__}: {error})"
    raise CheckpointError(f"{where}: {problem}; only arrays, numbers, strings and containers are read") from cause


def _unwrap_arrays(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, list | tuple):
        return type(value)(_unwrap_arrays(item) for item in value)
    if isinstance(value, dict):
        return {key: _unwrap_arrays(item) for key, item in value.items()}
    return value
