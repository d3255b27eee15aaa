"""Streaming detokenization: complete characters only, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pieces import train_pieces

from reformer_dist.data import BpeTokenizer, ByteTokenizer
from reformer_dist.data.format.sentencepiece import SentencePieceTokenizer
from reformer_dist.generation import TextStream
from reformer_dist.generation.text_stream import CONTEXT
from reformer_dist.inference.continuation import make_stop_check

BYTES = ByteTokenizer()


def shown(
    tokens: list[int], stops: list[str], decode=BYTES.decode, prompt: Sequence[int] = ()
) -> tuple[list[str], bool]:
    """Text printed for each token and at the end, and whether a stop string was found."""
    stream = TextStream(decode, stops, prompt)
    parts = []
    for token in tokens:
        parts.append(stream.add(token))
        if stream.is_stopped:
            break
    return [*parts, stream.flush()], stream.is_stopped


def test_a_stop_string_across_tokens() -> None:
    parts, is_stopped = shown(list(b"one END two"), ["END"])
    assert is_stopped and parts == ["o", "n", "e", " ", "", "", "", ""]


def test_a_partial_match_is_held_back_until_it_fails() -> None:
    parts, is_stopped = shown(list(b"aENaE"), ["END"])
    assert not is_stopped and parts == ["a", "", "", "ENa", "", "E"]


def test_the_first_of_several_ends_the_text() -> None:
    assert "".join(shown(list(b"x\n\ny##"), ["##", "\n\n"])[0]) == "x"
    assert "".join(shown(list(b"xabc"), ["bc", "abc"])[0]) == "x"


def test_characters_are_shown_whole() -> None:
    parts, _ = shown(list("né\N{GRINNING FACE}!".encode()), [])
    assert parts == ["n", "", "é", "", "", "", "\N{GRINNING FACE}", "!", ""]
    # invalid bytes are printed when something follows, or at the end
    assert "".join(shown([0xFF, 0x41, 0xC3], [])[0]) == "\ufffdA\ufffd"


def test_tokens_of_bpe() -> None:
    """Stop strings within and across tokens; a token may contain part of a character."""
    text = "the cat sat on the mat. été, \N{GRINNING FACE} naïve " * 20
    tokenizer = BpeTokenizer.train([text.encode()], 290)
    ids = tokenizer.encode(text.encode()).tolist()
    for stop in ("at. é", "mat", "t", "\N{GRINNING FACE}", " naï", "the mat. été"):
        parts, is_stopped = shown(ids, [stop], tokenizer.decode)
        assert is_stopped and "".join(parts) == text[: text.index(stop)]
    assert "".join(shown(ids, [], tokenizer.decode)[0]) == text


SENTENCE = "Train any model, été \N{GRINNING FACE} or not, with every layer of the stack on a few ranks"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_pieces(tmp_path_factory.mktemp("pieces"), ["any model of a layer"] * 20)


@pytest.mark.parametrize("n_prompt", [0, 1, 5, 20])
def test_pieces_keep_their_spaces(pieces: SentencePieceTokenizer, n_prompt: int) -> None:
    """A space before a word belongs to the word, and SentencePiece drops it at the beginning of a text."""
    ids = pieces.encode(SENTENCE.encode()).tolist()
    assert len(ids) > n_prompt + 2 * CONTEXT and pieces.decode(ids) == SENTENCE
    prompt, rest = ids[:n_prompt], ids[n_prompt:]
    text = SENTENCE[len(pieces.decode(prompt)) :]
    assert "".join(shown(rest, [], pieces.decode, prompt)[0]) == text
    for stop in (" layer", "ry layer of", " a few"):
        parts, is_stopped = shown(rest, [stop], pieces.decode, prompt)
        assert is_stopped and "".join(parts) == text[: text.index(stop)]


def test_beam_search_keeps_the_space_of_its_first_token(pieces: SentencePieceTokenizer) -> None:
    ids = pieces.encode(b"a model of any layer").tolist()
    first = next(n for n in range(1, len(ids)) if pieces.decode(ids[:n]) == "a")
    ends = [
        n for n in range(1, len(ids) - first) if make_stop_check(pieces, ids[:first], [" model"])(ids[first:][:n])
    ]
    n_tokens = len(pieces.encode(b"model"))
    assert ends[0] == n_tokens
    # stop strings in the prompt are ignored
    assert not make_stop_check(pieces, ids[:-1], [" model", "an"])(ids[-1:])


def test_the_cost_of_a_token_does_not_grow() -> None:
    """Also with a run of invalid bytes that never become a character."""
    lengths: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return BYTES.decode(ids)

    tokens = [*b"text", *[0xFF] * 200, *"é".encode()]
    parts, _ = shown(tokens, [], decode)
    assert "".join(parts) == BYTES.decode(tokens)
    assert max(lengths) <= 2 * CONTEXT and len("".join(parts[:104])) >= 100


@given(
    st.lists(
        st.sampled_from([0x61, 0x62, 0xC3, 0xA9, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 0x98, 0x80, 0xFF]), max_size=60
    )
)
def test_any_bytes(tokens: list[int]) -> None:
    parts, _ = shown(tokens, [])
    assert "".join(parts) == BYTES.decode(tokens)


@given(
    text=st.text(alphabet="abé\N{GRINNING FACE}", max_size=30),
    stops=st.lists(st.text(alphabet="abé\N{GRINNING FACE}", min_size=1, max_size=4), max_size=3),
)
def test_any_text(text: str, stops: list[str]) -> None:
    parts, is_stopped = shown(list(text.encode()), stops)
    # the stop string that is complete first ends the text, at the first match of any stop string by then
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert is_stopped == bool(ends)
    whole = text[: min(ends)] if ends else text
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert "".join(parts) == (whole[: min(places)] if places else whole)
