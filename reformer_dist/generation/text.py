"""From tokens to a text that is shown while it grows, and that ends at a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # how the bytes of a character that is not whole yet are decoded


class TextStream:
    """Takes tokens and gives what can be shown: whole characters, and nothing that may begin a stop string.

    A stop string may lie across tokens, and ends the text before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        """decode: the text of token ids, U+FFFD for bytes that are no character. stops: not empty each."""
        self._decode, self._stops = decode, stops
        self._pending: list[int] = []
        """Tokens whose last character is not whole."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.is_stopped = False
        """A stop string has come."""

    def add(self, token: int) -> str:
        """What is to be shown with one more token."""
        self._pending.append(token)
        text = self._decode(self._pending)
        if text.endswith(UNFINISHED):
            return ""
        self._pending = []
        return self._show(text)

    def close(self) -> str:
        """What is left to be shown behind the last token."""
        shown = self._show(self._decode(self._pending)) + self._held
        self._pending, self._held = [], ""
        return shown

    def _show(self, text: str) -> str:
        if self.is_stopped:
            return ""
        whole = self._held + text
        found = [place for place in map(whole.find, self._stops) if place >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return whole[: min(found)]
        n_held = max((_overlap(whole, stop) for stop in self._stops), default=0)
        shown, self._held = whole[: len(whole) - n_held], whole[len(whole) - n_held :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text with which the stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
