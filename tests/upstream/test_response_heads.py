"""Heads: what each says, what is refused, and that no way of cutting the bytes changes either."""

import asyncio
import contextlib
import itertools

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import UpstreamError
from meshproxy.http1.message import Chunked, HeadReader, Sized, UntilEof, parse_head

VALID = {
    "sized": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 11\r\n\r\nhello world",
    "empty": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n",
    "extensions": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b;c="d"\r\nhello\r\n0;z\r\n\r\n',
    "trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\nX-T: 1\r\nX-U: 2\r\n\r\n",
    "until eof": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello world",
    "http/1.0": b"HTTP/1.0 200 OK\r\n\r\nhello world",
    "http/1.0 sized": b"HTTP/1.0 500 Oops\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\nhello",
    "close": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "no content": b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
    "redirect": b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n",
    "no reason": b"HTTP/1.1 404 \r\nContent-Length: 2\r\n\r\nno",
    "spaces": b"HTTP/1.1 429 Too Many\r\nX:  a b\t \r\nContent-Length:\t2\r\n\r\nno",
    "odd bytes": b"HTTP/1.1 200 OK\r\nX: \xe9\xff\r\nContent-Length: 2\r\n\r\n\x00\xff",
}

HEAD = b"HTTP/1.1 200 OK\r\n"
BROKEN = {
    "http/0.9": b"hello world, this is no head\r\n\r\n",
    "http/2 frame": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "http/2 in words": b"HTTP/2.0 200 OK\r\n\r\n",
    "http/1.2": b"HTTP/1.2 200 OK\r\n\r\n",
    "lower case": b"http/1.1 200 OK\r\n\r\n",
    "icy": b"ICY 200 OK\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01",
    "empty line first": b"\r\nHTTP/1.1 200 OK\r\n\r\n",
    "status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "status 099": b"HTTP/1.1 099 OK\r\n\r\n",
    "status 600": b"HTTP/1.1 600 OK\r\n\r\n",
    "two spaces": b"HTTP/1.1  200 OK\r\n\r\n",
    "nul in the reason": b"HTTP/1.1 200 O\x00K\r\n\r\n",
    "switching": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "switching quietly": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "bare line feed": HEAD + b"A: b\nC: d\r\n\r\n",
    "bare carriage return": HEAD + b"A: b\rC: d\r\n\r\n",
    "obs-fold": HEAD + b"A: b\r\n c\r\n\r\n",
    "space before the colon": HEAD + b"A : b\r\n\r\n",
    "space before the name": HEAD + b" A: b\r\n\r\n",
    "no colon": HEAD + b"A\r\n\r\n",
    "no name": HEAD + b": b\r\n\r\n",
    "name that is no token": HEAD + b"A\xe9: b\r\n\r\n",
    "nul": HEAD + b"A: \x00\r\n\r\n",
    "both framings": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "both framings, turned": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "list of lengths": HEAD + b"Content-Length: 5, 6\r\n\r\n",
    "equal lengths of two spellings": HEAD + b"Content-Length: 5\r\nContent-Length: 05\r\n\r\n",
    "list with a gap": HEAD + b"Content-Length: 5,,5\r\n\r\n",
    "signed length": HEAD + b"Content-Length: +5\r\n\r\n",
    "negative length": HEAD + b"Content-Length: -5\r\n\r\n",
    "hex length": HEAD + b"Content-Length: 0x5\r\n\r\n",
    "empty length": HEAD + b"Content-Length: \r\n\r\n",
    "huge length": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
    "gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "chunked, gzip": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n",
    "chunked over 1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "no end": HEAD + b"A: " + b"b" * 66_000,
    "many interim heads": b"HTTP/1.1 100 Continue\r\n\r\n" * 17,
}


def outcome(pieces):
    """What a reader of these pieces knows in the end."""
    reader, head, payload, surplus = HeadReader(), None, b"", False
    try:
        for piece in pieces:
            if head is None:
                if (result := reader.feed(piece)) is None:
                    continue
                head, piece = result  # noqa: PLW2901
            if head.body.done:
                surplus = surplus or piece != b""
            else:
                payload += head.body.decode(piece)
                surplus = surplus or head.body.surplus
    except UpstreamError as fault:
        return fault.response.code, fault.safe_to_repeat
    assert head is not None
    return head.status, head.headers, payload, head.body.done, surplus, head.keep_alive


@pytest.mark.parametrize("name", VALID)
def test_no_single_cut_changes_the_outcome(name):
    wire = VALID[name]
    whole = outcome([wire])
    assert [whole] * len(wire) == [outcome([wire[:cut], wire[cut:]]) for cut in range(len(wire))]


@pytest.mark.parametrize("name", VALID)
def test_byte_by_byte_is_the_same(name):
    assert outcome([VALID[name]]) == outcome([bytes([byte]) for byte in VALID[name]])


@given(name=st.sampled_from(sorted(VALID)), cuts=st.lists(st.integers(0, 200), max_size=10), tail=st.binary(max_size=5))
def test_no_cuts_change_the_outcome(name, cuts, tail):
    wire = VALID[name] + tail
    edges = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    pieces = [wire[start:end] for start, end in itertools.pairwise(edges)]
    assert outcome([wire]) == outcome(pieces)


@pytest.mark.parametrize("lengths", [b"Content-Length: 5\r\nContent-Length: 5", b"Content-Length: 5, 5 ,5"])
def test_equal_lengths_are_one(lengths):
    assert outcome([HEAD + lengths + b"\r\n\r\nhello"])[2:5] == (b"hello", True, False)


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_rfc_forbids_is_refused(name):
    assert outcome([BROKEN[name]]) == ("upstream_error", False)


@pytest.mark.parametrize("name", [name for name in BROKEN if len(BROKEN[name]) < 500])
def test_what_the_rfc_forbids_is_refused_byte_by_byte(name):
    assert outcome([bytes([byte]) for byte in BROKEN[name]]) == ("upstream_error", False)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_waited_for(noise):
    with contextlib.suppress(UpstreamError):
        HeadReader().feed(HEAD + noise)


@pytest.mark.parametrize(
    "raw, kind, keep_alive",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n", Sized, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: CHUNKED\r\n\r\n", Chunked, True),
        (b"HTTP/1.1 200 OK\r\n\r\n", UntilEof, False),
        (b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\n", UntilEof, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: Close\r\n\r\n", Sized, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: x, close\r\n\r\n", Sized, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: x\r\nConnection: close\r\n\r\n", Sized, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n", Sized, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: Keep-Alive\r\n\r\n", Sized, True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive, close\r\n\r\n", Sized, False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", Sized, True),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 9\r\n\r\n", Sized, True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", Sized, True),
        (b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\nConnection: upgrade\r\nContent-Length: 1\r\n\r\n", Sized, True),
    ],
)
def test_framing_and_reuse(raw, kind, keep_alive):
    head = parse_head(raw)
    assert (type(head.body), head.keep_alive) == (kind, keep_alive)


def test_names_are_lower_case_and_values_are_trimmed_and_in_order():
    head = parse_head(b"HTTP/1.1 200 OK\r\nX-A:  b c \t\r\nSet-Cookie: 1\r\nset-cookie: \xe9\r\nEmpty:\r\n\r\n")
    assert head.headers == [("x-a", "b c"), ("set-cookie", "1"), ("set-cookie", "\xe9"), ("empty", "")]


def test_a_reader_can_be_used_again():
    reader = HeadReader()
    first = reader.feed(VALID["continue"])
    second = reader.feed(VALID["sized"])
    assert (first[0].status, second[0].status, second[1]) == (200, 200, b"hello world")


@pytest.mark.parametrize("name", VALID)
async def test_aiohttp_reads_the_same(name, serve):
    async def script(conversation):
        await conversation.answer(VALID[name])
        await conversation.hang_up()

    server = await serve(script)
    async with (
        aiohttp.ClientSession() as session,
        session.post(server.url, data=b"{}", allow_redirects=False) as response,
    ):
        theirs = (response.status, await response.read())
    await asyncio.gather(*server.tasks)
    ours = outcome([VALID[name]])
    assert (ours[0], ours[2]) == theirs
