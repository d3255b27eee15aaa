"""Streaming detokenization with stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # decoded for the bytes of an incomplete character
MAX_INCOMPLETE = 3  # bytes of it; a tokenizer decodes them to one replacement each, or to one for all
CONTEXT = 8  # tokens decoded again with each new one


class TextStream:
    """Turns tokens into printable text: complete characters, and nothing that may begin a stop string.

    A stop string may span tokens; the text ends before it. A token is decoded together with some preceding tokens,
    at first those of the prompt, since SentencePiece drops the space before the first token.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        """decode: text of token ids, U+FFFD for invalid bytes. stops: non-empty stop strings."""
        if "" in stops:
            raise ValueError("stops: an empty string would stop at once; must not be empty")
        self._decode, self._stops = decode, stops
        self._newest = list(prompt[-CONTEXT:])
        """The last tokens, fewer than 2 * CONTEXT, so that the cost per token is constant."""
        self._n_consumed = len(decode(self._newest))
        """Leading characters of their text that belong to the prompt or were already searched for stop strings."""
        self._pending = ""
        """Text that may be the beginning of a stop string."""
        self.is_stopped = False
        """A stop string was found."""

    def add(self, token: int) -> str:
        """Returns the text that one more token makes printable."""
        self._newest.append(token)
        text = self._decode(self._newest)
        n_incomplete = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_INCOMPLETE)
        complete = text[self._n_consumed : len(text) - n_incomplete]
        self._n_consumed = max(self._n_consumed, len(text) - n_incomplete)
        if len(self._newest) == 2 * CONTEXT:
            n_left = len(text) - self._n_consumed
            self._newest = self._newest[CONTEXT:]
            self._n_consumed = max(0, len(self._decode(self._newest)) - n_left)
        return self._emit(complete)

    def flush(self) -> str:
        """Returns the remaining text after the last token."""
        text = self._decode(self._newest)
        printable = self._emit(text[self._n_consumed :]) + self._pending
        self._n_consumed, self._pending = len(text), ""
        return printable

    def _emit(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._pending + text
        matches = [index for index in map(text.find, self._stops) if index >= 0]
        if matches:
            self.is_stopped, self._pending = True, ""
            return text[: min(matches)]
        n_pending = max((_overlap(text, stop) for stop in self._stops), default=0)
        printable, self._pending = text[: len(text) - n_pending], text[len(text) - n_pending :]
        return printable


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of text that is a proper prefix of stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
