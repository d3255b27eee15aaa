"""From tokens to a text that is shown while it grows, and that ends at a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # how the bytes of a character that is not whole yet are decoded
MOST_UNFINISHED = 3  # bytes of it; a tokenizer decodes each of them so, or all of them together
CONTEXT = 8  # tokens that are decoded again with each new one


class TextStream:
    """Takes tokens and gives what can be shown: whole characters, and nothing that may begin a stop string.

    A stop string may lie across tokens, and ends the text before it. A token is decoded behind some of those
    before it, the prompt's to begin with: SentencePiece leaves out a space that nothing stands before.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        """decode: the text of token ids, U+FFFD for bytes that are no character. stops: not empty each."""
        self._decode, self._stops = decode, stops
        self._newest = list(prompt[-CONTEXT:])
        """The last tokens, less than twice CONTEXT of them: the cost of one does not grow with the text."""
        self._n_taken = len(decode(self._newest))
        """Characters of their text that are the prompt's, or went on to be looked through for stop strings."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.is_stopped = False
        """A stop string has come."""

    def add(self, token: int) -> str:
        """What is to be shown with one more token."""
        self._newest.append(token)
        text = self._decode(self._newest)
        n_unfinished = min(len(text) - len(text.rstrip(UNFINISHED)), MOST_UNFINISHED)
        taken = text[self._n_taken : len(text) - n_unfinished]
        self._n_taken = max(self._n_taken, len(text) - n_unfinished)
        if len(self._newest) == 2 * CONTEXT:
            n_left = len(text) - self._n_taken
            self._newest = self._newest[CONTEXT:]
            self._n_taken = max(0, len(self._decode(self._newest)) - n_left)
        return self._show(taken)

    def close(self) -> str:
        """What is left to be shown behind the last token."""
        text = self._decode(self._newest)
        shown = self._show(text[self._n_taken :]) + self._held
        self._n_taken, self._held = len(text), ""
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
