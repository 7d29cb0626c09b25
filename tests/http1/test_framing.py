"""Framing alone, no sockets: what is payload, where it ends, and what is refused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import UpstreamError
from meshproxy.http1.message import Chunked, Sized, UntilEof


def chunk(payload):
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def test_one_whole_chunk_is_a_frame():
    body = Chunked()
    payload = body.decode(b"5\r\nhello\r\n")
    assert (payload, body.whole, body.done) == (b"hello", True, False)


def test_several_whole_chunks_are_a_frame():
    body = Chunked()
    payload = body.decode(b"5\r\nhello\r\n00001\r\n \r\nA\r\n0123456789\r\n")
    assert (payload, body.whole) == (b"hello 0123456789", True)


@pytest.mark.parametrize(
    "data, payload",
    [
        (b"5;a=b\r\nhello\r\n", b"hello"),
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"5\r\nhel", b"hel"),
        (b"5\r\nhello", b"hello"),
        (b"5\r\nhello\r", b"hello"),
        (b"5\r\nhello\r\n5", b"hello"),
        (b"5\r\nhello\r\n5\r\n", b"hello"),
        (b"5\r\nhello\r\n5\r\nhe", b"hellohe"),
        (b"5\r\n", b""),
        (b"0\r\n\r\n", b""),
    ],
)
def test_anything_else_is_no_frame(data, payload):
    body = Chunked()
    assert (body.decode(data), body.whole) == (payload, False)


def test_a_chunk_that_spans_reads_is_passed_on_piece_by_piece_and_the_next_whole_one_is_a_frame_again():
    body = Chunked()
    heard = [(body.decode(data), body.whole) for data in (b"5\r\nhel", b"l", b"o\r\n", b"1\r\n!\r\n")]
    assert heard == [(b"hel", False), (b"l", False), (b"o", False), (b"!", True)]


@pytest.mark.parametrize(
    "data",
    [
        b"0\r\n\r\n",
        b"000\r\n\r\n",
        b"0;last=1\r\n\r\n",
        b'0; a = "b\\"c" ;d\r\n\r\n',
        b"0\r\nx-checksum: 1\r\nEmpty:\r\n\r\n",
    ],
)
def test_the_last_chunk(data):
    body = Chunked()
    assert (body.decode(data), body.done, body.surplus) == (b"", True, False)


def test_bytes_after_the_end_are_surplus():
    body = Chunked()
    body.decode(b"0\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert (body.done, body.surplus) == (True, True)


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n5\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b"-5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b"1_0\r\n0123456789abcdef\r\n",
        b"5\nhello\r\n",
        b"5\r\nhello\n",
        b"5\r\nhelloX",
        b"5\r\nhello\rX",
        b"g\r\n",
        b"\r\n",
        b"00000000000000005\r\nhello\r\n",
        b"ffffffffffffffff0\r\n",
        b"5;\r\nhello\r\n",
        b"5;a=\r\nhello\r\n",
        b'5;a="b\r\nhello\r\n',
        b"5;a\nb\r\nhello\r\n",
        b"5;a=\x00\r\nhello\r\n",
        b"5" + b";a" * 2100 + b"\r\nhello\r\n",
        b"0\r\nno colon\r\n\r\n",
        b"0\r\n folded: x\r\n\r\n",
        b"0\r\na: b\nc: d\r\n\r\n",
        b"0\r\na: \x00\r\n\r\n",
        b"0\r\na: " + b"b" * 17_000,
        b"5" * 5000,
    ],
)
def test_broken_framing_is_refused(data):
    with pytest.raises(UpstreamError) as caught:
        Chunked().decode(data)
    assert (
        caught.value.response.status,
        caught.value.response.code,
        caught.value.response.may_have_run,
        caught.value.safe_to_repeat,
    ) == (502, "upstream_error", True, False)


def test_extensions_are_bounded_over_a_whole_body():
    body, data = Chunked(), b"1;" + b"a" * 2000 + b"\r\nx\r\n"
    assert b"".join(body.decode(data) for _ in range(32)) == b"x" * 32
    with pytest.raises(UpstreamError):
        body.decode(data)


@pytest.mark.parametrize(
    "pieces, payload, done, surplus",
    [
        ([b"hello"], b"hello", True, False),
        ([b"he", b"llo"], b"hello", True, False),
        ([b"he"], b"he", False, False),
        ([b"hello!"], b"hello", True, True),
        ([b"hel", b"lo!!"], b"hello", True, True),
    ],
)
def test_a_sized_body(pieces, payload, done, surplus):
    body = Sized(5)
    assert (b"".join(map(body.decode, pieces)), body.done, body.surplus) == (payload, done, surplus)


def test_an_empty_sized_body_is_done_at_once():
    assert ((body := Sized(0)).done, body.decode(b"x"), body.surplus) == (True, b"", True)


def test_a_body_until_the_end_takes_everything_and_is_never_done_by_itself():
    body = UntilEof()
    assert (body.decode(b"0\r\n\r\n"), body.done, body.until_eof) == (b"0\r\n\r\n", False, True)


@given(
    payloads=st.lists(st.binary(min_size=1, max_size=40), max_size=8),
    cuts=st.lists(st.integers(min_value=0, max_value=400), max_size=12),
)
def test_however_it_is_cut_the_payload_is_the_same_and_a_frame_decodes_to_its_payload(payloads, cuts):
    wire = b"".join(map(chunk, payloads)) + b"0\r\n\r\n"
    edges = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    body = Chunked()
    heard = []
    for start, end in itertools.pairwise(edges):
        data = wire[start:end]
        payload = body.decode(data)
        heard.append(payload)
        if body.whole:
            assert Chunked().decode(data) == payload
    assert (b"".join(heard), body.done, body.surplus) == (b"".join(payloads), True, False)
