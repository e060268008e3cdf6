"""Where a prediction ends, as text: against a search by brute force over the text of all its tokens."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_vocabularies import byte_id, vocabulary

from meshway.framework.data.vocabularies import Bytes
from meshway.framework.errors import UserError
from meshway.framework.inference.rows import Text, stop_texts

KINDS = ["byte-level", "byte fallback", "WordPiece", "SentencePiece", "bytes"]


def text_of(name, stops):
    made = vocabulary(name)
    return Text(made, made, made.start, () if made.eos_id is None else (made.eos_id,), stops=stops)


def brute_force(text, ids):
    """(how many ids, their text): the text of all ids up to where a stop first ends, and the fewest ids that say it."""
    whole = text.targets.decode(ids)
    ends = [end for end in range(1, len(whole) + 1) if whole[:end].endswith(text.stops)]
    if not ends:
        return len(ids), whole
    counts = [count for count in range(len(ids) + 1) if text.targets.decode(ids[:count]).startswith(whole[: ends[0]])]
    while len(counts) > 1 and counts[-1] - counts[-2] == 1:
        counts.pop()
    return counts[-1], whole[: ends[0]]


def streamed(text, ids):
    written, pieces = text.stream(), []
    for token in ids:
        pieces.append(written.feed(token))
        if written.ended:
            break
    return "".join([*pieces, written.finish()])


@pytest.mark.parametrize("name", KINDS)
def test_a_prediction_ends_where_a_text_first_stands_in_it(name):
    made = vocabulary(name)

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.lists(st.integers(0, made.size - 1), max_size=16), st.data())
    def check(ids, data):
        whole = made.decode(ids)
        stops = []
        for _ in range(data.draw(st.integers(1, 3))):  # mostly texts that are there, across tokens
            start = data.draw(st.integers(0, max(len(whole) - 1, 0)))
            stops.append(whole[start : start + data.draw(st.integers(1, 5))] or "x")
        text = text_of(name, (*stops, data.draw(st.text(min_size=1, max_size=2))))
        assert text.ended(ids) == brute_force(text, ids)
        assert streamed(text, ids) == text.write(ids)

    check()


@settings(max_examples=60, deadline=None, database=None)
@given(st.text(alphabet="ab.\n \u2603", max_size=12), st.text(alphabet="ab.\n \u2603", min_size=1, max_size=3))
@example("Return the current file.", ".")
@example("Return the current file.", "tur")
@example("Return the current file.", " ")
@example("aab", "ab")
def test_it_is_the_text_that_ends_it_however_it_is_cut_into_tokens(said, stop):
    text = text_of("bytes", (stop,))
    ids = Bytes().encode(said)
    wanted = said[: said.index(stop) + len(stop)] if stop in said else said
    assert text.write(ids) == wanted == streamed(text, ids)
    assert text.ended(ids)[0] == len(wanted.encode())


def test_a_token_that_says_more_than_the_stop_is_kept_and_its_text_is_cut():
    made = vocabulary("SentencePiece")
    ids = made.encode("A naïve line 12, and")
    assert text_of("SentencePiece", ("ine",)).write(ids) == "A naïve line"
    assert text_of("SentencePiece", ("lin",)).write(ids) == "A naïve lin"


def test_a_stop_that_a_broken_byte_takes_back_is_none():
    made = vocabulary("byte fallback")
    newline = byte_id(made, ord("\n"))
    text = text_of("byte fallback", ("\n",))
    assert text.ended([newline, byte_id(made, 0xE2), made.size - 4])[0] == 3
    assert text.ended([newline, made.size - 4]) == (1, "\n")


def test_a_lone_string_is_one_stop():
    assert stop_texts("xyb") == ("xyb",)
    assert stop_texts(["xy", "b"]) == ("xy", "b")
    for wrong in ("", ["a", ""], [3]):
        with pytest.raises(UserError, match="stop: .* is not a text that can end a prediction"):
            stop_texts(wrong)


def test_what_follows_eos_stops_nothing():
    text = text_of("bytes", ("b",))
    assert text.ended([*Bytes().encode("a"), 1, *Bytes().encode("b")]) == (3, "a")
