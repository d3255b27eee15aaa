"""The table of docs/library.md of what each public function refuses, made of its signature and its own messages.

PYTHONPATH=. python tests/library/refusal_table.py     prints the table
"""

from __future__ import annotations

import inspect
import re

from public_calls import CALLS, Call

HEAD = "| function | tensors, of the shapes | numbers and names |\n|---|---|---|\n"
RANGE = re.compile(r"from 0 to \d+, below ([a-z_ ]+)=\d+")


def signature_of(name: str, call: Call) -> str:
    """Such as `rotate(x, cos, sin)`; names after * are keywords."""
    shown: list[str] = []
    for parameter in inspect.signature(call.signature or call.function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in shown):
            shown.append("*")
        stars = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        shown.append(stars + parameter.name)
    return f"`{name}({', '.join(part for part in shown if part != 'self')})`"


def requirement_of(call: Call, argument: str) -> str:
    """What the message of a refused value says would be right."""
    try:
        call.function(**{**call.valid, argument: call.wrong[argument][0]})
    except (ValueError, TypeError) as error:
        words = str(error).partition(": ")[2]
        words = re.sub(
            r" with the product n_buckets=\d+", " with the product n_buckets", RANGE.sub(r"in [0, \1)", words)
        )
        return f"`{argument}` {words}"
    raise AssertionError(f"{argument} is accepted")


def row_of(name: str, call: Call) -> str:
    shapes: dict[str, list[str]] = {}
    for argument, dims in call.dims.items():
        shapes.setdefault(", ".join(dims.split()), []).append(f"`{argument}`")
    tensors = "; ".join(f"{', '.join(names)} [{dims}]" for dims, names in shapes.items())
    rest = "; ".join(requirement_of(call, argument) for argument in call.wrong)
    return f"| {signature_of(name, call)} | {tensors} | {rest} |\n"


def table() -> str:
    return HEAD + "".join(row_of(name, call) for name, call in CALLS.items())


if __name__ == "__main__":
    print(table(), end="")
