"""Seeded damage to files: what disks, copies that were cut short, and people do to them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random], None]


def flip_bits(path: Path, draw: random.Random) -> None:
    """One to eight bits become others."""
    content = bytearray(path.read_bytes())
    for place in draw.sample(range(len(content)), min(len(content), draw.randint(1, 8))):
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    """The end is missing; at times all of it."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def zero_run(path: Path, draw: random.Random) -> None:
    """A run of bytes was never written."""
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.randint(1, 4096))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def swap_blocks(path: Path, draw: random.Random) -> None:
    """Two blocks of 512 bytes change places."""
    content = path.read_bytes()
    blocks = [content[start : start + 512] for start in range(0, len(content), 512)]
    one, other = draw.randrange(len(blocks)), draw.randrange(len(blocks))
    blocks[one], blocks[other] = blocks[other], blocks[one]
    path.write_bytes(b"".join(blocks))


def append(path: Path, draw: random.Random) -> None:
    """Something follows the end."""
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 2000)))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def become_a_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


BYTES: tuple[Damage, ...] = (
    flip_bits,
    flip_bits,
    truncate,
    zero_run,
    swap_blocks,
    append,
    remove,
    become_a_folder,
)
ODD_VALUES = (None, True, -1, 0, 1, 1.5, 1 << 62, "", "../x", "/etc/passwd", "pipe:true", "x" * 300, [], {}, [[1]])


def edit_json(content: Any, draw: random.Random) -> Any:
    """JSON values with one of them, drawn among all, replaced by an odd one, removed, or moved by one."""
    places = list(_places(content))
    holder, key = draw.choice(places)
    value = holder[key]
    if draw.random() < 0.2:
        del holder[key]
    elif type(value) is int and draw.random() < 0.5:
        holder[key] = value + draw.choice((-512, -1, 1, 512))
    else:
        holder[key] = draw.choice(ODD_VALUES)
    return content


def edit_json_file(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(edit_json(json.loads(path.read_text()), draw)))


def _places(content: Any) -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield content, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
