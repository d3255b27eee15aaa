"""Whole numbers that are written with an exponent or a decimal point, as in trainer.max_steps=1e5."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import get_args, get_origin

from reformer_dist.config.key_reference import keys

OVERRIDE = re.compile(r"([+]{0,2})([\w.]+)=(\[?[-+\d.eE, ]*[.eE][-+\d.eE, ]*\]?)")
FLOAT = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][+]?\d+)?")
LONGEST = 18  # digits; a whole number of a key has fewer, and 1e999999999 would fill the memory


def with_whole_numbers(words: Iterable[str]) -> list[str]:
    """Overrides with 100000 for 1e5 where the key is a whole number or a list of them; others as they are."""
    return [_rewritten(word) for word in words]


def whole_number(text: str) -> str:
    """100000 for 1e5 or 100000.0; the text itself if it is not such a number."""
    if not FLOAT.fullmatch(text):
        return text
    number = float(text)
    return str(int(number)) if number.is_integer() and abs(number) < 10**LONGEST else text


def _rewritten(word: str) -> str:
    match = OVERRIDE.fullmatch(word)
    key = keys().get(match[2]) if match else None
    if match is None or key is None:
        return word
    is_list = get_origin(key.type) is list
    if (get_args(key.type)[0] if is_list else key.type) is not int:
        return word
    value = re.sub(r"[-+\d.eE]+", lambda number: whole_number(number[0]), match[3])
    return f"{match[1]}{match[2]}={value}"
