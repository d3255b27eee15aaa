"""A text shown while it grows: never too much, never torn characters, and it ends where it must."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reformer_dist.data import BpeTokenizer, ByteTokenizer
from reformer_dist.generation import TextStream

BYTES = ByteTokenizer()


def shown(tokens: list[int], stops: list[str], decode=BYTES.decode) -> tuple[list[str], bool]:
    """What comes with each token and at the end, and whether a stop string came."""
    stream = TextStream(decode, stops)
    parts = []
    for token in tokens:
        parts.append(stream.add(token))
        if stream.is_stopped:
            break
    return [*parts, stream.close()], stream.is_stopped


def test_a_stop_string_across_tokens() -> None:
    parts, is_stopped = shown(list(b"one END two"), ["END"])
    assert is_stopped and parts == ["o", "n", "e", " ", "", "", "", ""]


def test_what_only_begins_like_one_is_shown_when_that_is_clear() -> None:
    parts, is_stopped = shown(list(b"aENaE"), ["END"])
    assert not is_stopped and parts == ["a", "", "", "ENa", "", "E"]


def test_the_first_of_several_ends_the_text() -> None:
    assert "".join(shown(list(b"x\n\ny##"), ["##", "\n\n"])[0]) == "x"
    assert "".join(shown(list(b"xabc"), ["bc", "abc"])[0]) == "x"


def test_characters_are_shown_whole() -> None:
    parts, _ = shown(list("né\N{GRINNING FACE}!".encode()), [])
    assert parts == ["n", "", "é", "", "", "", "\N{GRINNING FACE}", "!", ""]
    # bytes that are no character are shown as such when something follows, or at the end
    assert "".join(shown([0xFF, 0x41, 0xC3], [])[0]) == "\ufffdA\ufffd"


def test_tokens_of_bpe() -> None:
    """Stop strings lie inside tokens and across them, and a token may hold half a character."""
    text = "the cat sat on the mat. été, \N{GRINNING FACE} naïve " * 20
    tokenizer = BpeTokenizer.train([text.encode()], 290)
    ids = tokenizer.encode(text.encode()).tolist()
    for stop in ("at. é", "mat", "t", "\N{GRINNING FACE}", " naï", "the mat. été"):
        parts, is_stopped = shown(ids, [stop], tokenizer.decode)
        assert is_stopped and "".join(parts) == text[: text.index(stop)]
    assert "".join(shown(ids, [], tokenizer.decode)[0]) == text


@given(
    text=st.text(alphabet="abé\N{GRINNING FACE}", max_size=30),
    stops=st.lists(st.text(alphabet="abé\N{GRINNING FACE}", min_size=1, max_size=4), max_size=3),
)
def test_any_text(text: str, stops: list[str]) -> None:
    parts, is_stopped = shown(list(text.encode()), stops)
    # the stop string that is whole first ends the text, at the first place where it or another then stands
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert is_stopped == bool(ends)
    whole = text[: min(ends)] if ends else text
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert "".join(parts) == (whole[: min(places)] if places else whole)
