"""Text that comes token by token is the text of all tokens at once: for random ids, valid text or not."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabularies import PIECES, byte_id, vocabulary

from meshway.framework.data.detokenizing import AllAtEnd

KINDS = [
    "byte-level", "byte fallback", "byte fallback, two spaces dropped", "byte fallback without strip", "metaspace",
    "no decoder", "suffix", "WordPiece", "WordPiece as it is", "SentencePiece", "SentencePiece that keeps spaces",
    "SentencePiece without a dummy space", "bytes", "opaque",
]  # fmt: skip


def pieces_of(made, ids):
    detokenizer = made.detokenizer()
    return [*[detokenizer.feed(made.known(token)) for token in ids], detokenizer.finish()]


@pytest.mark.parametrize("name", KINDS)
def test_the_pieces_join_to_the_text(name):
    made = vocabulary(name)
    # Small ids often: special ones, and bytes, of which characters are made.
    ids = st.lists(st.integers(0, made.size + 2) | st.integers(0, min(8, made.size)), max_size=24)

    @settings(max_examples=150, deadline=None, database=None)
    @given(ids)
    def check(ids):
        assert "".join(pieces_of(made, ids)) == made._text([made.known(token) for token in ids])

    check()


@settings(max_examples=100, deadline=None, database=None)
@given(st.sampled_from(["byte fallback", "byte-level", "SentencePiece", "bytes"]), st.text(max_size=6), st.data())
def test_characters_of_several_tokens_come_whole(name, text, data):
    """Bytes of real text, with one missing or doubled here and there, between pieces."""
    made = vocabulary(name)
    found = list(text.encode())
    for place in data.draw(st.lists(st.integers(0, max(len(found) - 1, 0)), max_size=2)):
        found[place : place + 1] = data.draw(st.sampled_from([b"", b"\xe2", b"a", b"\n\n"]))
    ids = [byte_id(made, byte) for byte in found]
    ids.insert(data.draw(st.integers(0, len(ids))), made.size - 4)
    assert "".join(pieces_of(made, ids)) == made._text([made.known(token) for token in ids])


def test_a_broken_byte_does_not_swallow_what_follows():
    made = vocabulary("byte fallback")
    ids = [*[byte_id(made, byte) for byte in b"\n\xe2"], PIECES.index("b"), PIECES.index("▁a")]
    assert pieces_of(made, ids) == ["", "", "\ufffd\ufffdb", " a", ""]


@pytest.mark.parametrize("name", ["byte fallback", "byte-level", "SentencePiece"])
def test_an_endless_run_of_broken_bytes_comes_byte_by_byte(name):
    made = vocabulary(name)
    shown = pieces_of(made, [byte_id(made, 0xFF)] * 50)
    assert all(piece.strip() for piece in shown[:-1]) and "".join(shown) == "\ufffd" * 50


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("suffix", "opaque")])
def test_a_token_costs_the_same_however_many_came_before(name, monkeypatch):
    """The text of what came before is never made again: at most two tokens are decoded at once."""
    made = vocabulary(name)
    assert not isinstance(made.detokenizer(), AllAtEnd)
    longest, decode = [0], type(made)._text

    def watched(self, ids):
        longest[0] = max(longest[0], len(ids))
        return decode(self, ids)

    monkeypatch.setattr(type(made), "_text", watched)
    pieces_of(made, [token % made.size for token in range(1000)])
    assert longest[0] <= 2


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("suffix", "opaque")])
def test_a_text_is_the_bytes_of_its_ids_one_after_the_other(name):
    made = vocabulary(name)
    first, later = made.bytes_of_ids()
    assert len(first) == len(later) == made.size
    word = next(token for token in range(made.size) if first[token].isalpha())
    for token in range(made.size):
        for known, ids in ((first[token], [token]), (later[token] and first[word] + later[token], [word, token])):
            with contextlib.suppress(UnicodeDecodeError):  # part of a character
                assert not known or made.decode(ids) == known.decode()
        if not later[token]:  # no text at all, or of no use in one
            assert token in made.marks or token in (made.unk_id, made.pad_id) or token >= made._known - 3
    firsts, laters = ([token for token in range(made.size) if each[token]] for each in (first, later))

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.sampled_from(firsts), st.lists(st.sampled_from(laters), max_size=12), st.text(max_size=4))
    def check(begin, ids, text):
        if byte_id(made, 0xE2) is not None:
            ids += [byte_id(made, byte) for byte in text.encode()]
        data = first[begin] + b"".join(later[token] for token in ids)
        with contextlib.suppress(UnicodeDecodeError):
            assert made.decode([begin, *ids]) == data.decode()

    check()


@pytest.mark.parametrize("name", ["suffix", "opaque"])
def test_an_id_whose_text_hangs_on_others_has_no_bytes(name):
    with pytest.raises(ValueError, match="depends on those around it"):
        vocabulary(name).bytes_of_ids()
