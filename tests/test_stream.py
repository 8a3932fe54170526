"""Streamed text: whole characters only, and nothing of a stop string."""

import pytest

from llamakern.stream import TextStream


class Pieces:
    """Token i stands for the i-th of some byte strings."""

    def __init__(self, *pieces: bytes):
        self.pieces = pieces

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def stream(pieces, stop=(), ends=()):
    """What is written after each token, and at the close."""
    written = []
    out = TextStream(Pieces(*pieces), ends=ends, stop=stop, write=written.append)
    steps = []
    for i in range(len(pieces)):
        out([i])
        steps.append("".join(written))
    out.close()
    return steps, "".join(written)


def test_text_is_written_as_it_grows():
    assert stream([b"a", b"b c", b"d"]) == (["a", "ab c", "ab cd"], "ab cd")


def test_a_character_waits_for_its_bytes():
    steps, text = stream([b"a", *(bytes([b]) for b in "é€".encode()), b"!"])
    assert steps == ["a", "a", "aé", "aé", "aé", "aé€", "aé€!"]
    assert text == "aé€!"
    assert stream([b"a", b"\xe2", b"\x82"]) == (["a", "a", "a"], "a\ufffd")  # it never came whole


def test_a_stop_string_over_several_tokens_is_held_back_and_not_written():
    steps, text = stream([b"one", b" #", b"#", b"# two"], stop=["###"])
    assert steps == ["one", "one ", "one ", "one "]
    assert text == "one "


def test_what_was_held_back_is_written_when_it_becomes_something_else():
    assert stream([b"a#", b"#", b"b"], stop=["###"]) == (["a", "a", "a##b"], "a##b")
    assert stream([b"a#", b"#"], stop=["###"]) == (["a", "a"], "a##")
    assert stream([b"aa", b"ab"], stop=["aab"]) == (["", "a"], "a")  # the held tail itself may start later


def test_a_stop_string_of_several_bytes_cut_within_a_character():
    euro = "€".encode()
    assert stream([b"5 " + euro[:1], euro[1:], b" x"], stop=["€ "]) == (["5 ", "5 ", "5 "], "5 ")
    assert stream([b"5" + euro[:2], euro[2:], b"x"], stop=["€ "]) == (["5", "5", "5€x"], "5€x")


def test_the_earliest_of_several_stop_strings_counts_and_nothing_follows_it():
    assert stream([b"a b c", b" d"], stop=["c", "b"]) == (["a ", "a "], "a ")
    assert stream([b"ab"], stop=["ab"]) == ([""], "")


@pytest.mark.parametrize("ends", [(1,), (1, 2), [2, 1]])
def test_end_tokens_are_not_written(ends):
    assert stream([b"a", b"<end>"], ends=ends) == (["a", "a"], "a")


def test_an_ended_row_adds_nothing():
    written = []
    out = TextStream(Pieces(b"a"), write=written.append)
    out([None])
    out.close()
    assert written == []
