"""Counts the bytes of tensors as they come and go, whatever the allocator makes of them."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is entered, knows the bytes of all storages made since, and their peak.

    Storages that exist only inside one operation of PyTorch are not seen.
    """

    def __init__(self, tells_where: bool = False) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._live: dict[int, tuple[int, str]] = {}
        self._at_peak: dict[int, tuple[int, str]] = {}
        self._tells_where = tells_where

    def reset_peak(self) -> None:
        self.peak = self.now
        self._at_peak = dict(self._live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        older = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in older:  # else a view of something, which may have been there before
                self._see(storage)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._live or size == 0:
            return
        self._live[key] = (size, _where() if self._tells_where else "")
        self.now += size
        weakref.finalize(storage, self._forget, key)
        if self.now > self.peak:
            if self._tells_where and self.now > self.peak * 1.002:
                self._at_peak = dict(self._live)
            self.peak = self.now

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key)[0]

    def owners(self) -> list[tuple[int, str]]:
        """(bytes, lines of ours that made them) at the peak, most first; with tells_where."""
        found: Counter[str] = Counter()
        for size, place in self._at_peak.values():
            found[place] += size
        return [(size, place) for place, size in found.most_common()]


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"]
    return [leaf.untyped_storage() for leaf in leaves]


def _where() -> str:
    frame, places = sys._getframe(3), []
    while frame is not None and len(places) < 3:
        path = Path(frame.f_code.co_filename)
        if "reformer_dist" in path.parts or "deepspeed" in path.parts:
            places.append(f"{path.name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(places)
