"""Cuts that hurt but lose nothing."""

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.simulator.delivery import awkward_pieces, halves


def test_every_awkward_place_is_found():
    frames = b'1f\r\ndata: "\xe2\x80\xa8"\r\n\r\n\n\n\r\n'
    expected = [b"1", b"f\r", b"\nda", b'ta: "\xe2', b'\x80\xa8"\r', b"\n", b"\r", b"\n", b"\n", b"\n", b"\r", b"\n"]
    assert list(awkward_pieces(frames)) == expected


@given(st.binary())
def test_pieces_make_up_the_whole(frames):
    assert (b"".join(awkward_pieces(frames)), b"".join(halves(frames))) == (frames, frames)


def test_a_wide_character_is_halved():
    assert halves("a\u00e9b".encode()) == ("a\u00e9".encode()[:2], b"\xa9b")
