import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshproxy.http1.message import MAX_FIELDS, MAX_HEAD_BYTES, may_become_usual, parse_usual_head

LINE = b"POST /v1/chat/completions HTTP/1.1\r\n"
HOST = b"Host: m\r\n"
LENGTH = b"Content-Length: 2\r\n"


def head(*lines, line=LINE):
    return line + b"".join(lines) + b"\r\n"


def test_a_usual_head():
    told = parse_usual_head(head(HOST, b"authorization:Bearer \t x \t\r\n", LENGTH, b"X-Empty:\r\n"), LINE)
    assert told == {"host": "m", "authorization": "Bearer \t x", "content-length": "2", "x-empty": ""}


@pytest.mark.parametrize("connection", [b"keep-alive", b"Keep-Alive", b"close"])
def test_a_connection_may_be_kept_or_closed(connection):
    assert "connection" in parse_usual_head(head(HOST, LENGTH, b"connection: " + connection + b"\r\n"), LINE)


@pytest.mark.parametrize(
    "odd",
    [
        head(HOST, LENGTH, line=b"POST /v1/chat/completions HTTP/1.0\r\n"),
        head(HOST, LENGTH, line=b"GET /v1/chat/completions HTTP/1.1\r\n"),
        head(HOST, LENGTH, line=b"POST http://m/v1/chat/completions HTTP/1.1\r\n"),
        head(HOST, LENGTH, line=b"POST /v1/chat/completions?a=b HTTP/1.1\r\n"),
        head(HOST, LENGTH, line=b"POST /v1/chat/completions HTTP/1.1\n"),
        head(HOST),
        head(LENGTH),
        head(HOST, HOST, LENGTH),
        head(HOST, LENGTH, LENGTH),
        head(HOST, LENGTH, b"content-length: 3\r\n"),
        head(HOST, b"content-length: +2\r\n"),
        head(HOST, b"content-length: 2, 2\r\n"),
        head(HOST, b"content-length: -2\r\n"),
        head(HOST, b"content-length: 0x2\r\n"),
        head(HOST, b"content-length: 2_0\r\n"),
        head(HOST, b"content-length:\r\n"),
        head(HOST, b"content-length: \xc2\xb2\r\n"),
        head(HOST, b"content-length: " + b"1" * 16 + b"\r\n"),
        head(HOST, LENGTH, b"transfer-encoding: chunked\r\n"),
        head(HOST, LENGTH, b"expect: 100-continue\r\n"),
        head(HOST, LENGTH, b"upgrade: h2c\r\n"),
        head(HOST, LENGTH, b"connection: upgrade\r\n"),
        head(HOST, LENGTH, b"connection: keep-alive, x\r\n"),
        head(HOST, LENGTH, b"x : y\r\n"),
        head(HOST, LENGTH, b" x: y\r\n"),
        head(HOST, b" content-length: 2\r\n"),
        head(HOST, LENGTH, b"x: y\r\n folded\r\n"),
        head(HOST, LENGTH, b"x: y\nz: w\r\n"),
        head(HOST, LENGTH, b"x: y\rz: w\r\n"),
        head(HOST, LENGTH, b"x: y\n\r\n"),
        head(HOST, LENGTH, b"x: \x00\r\n"),
        head(HOST, LENGTH, b"x: \x7f\r\n"),
        head(HOST, LENGTH, b"x: \xff\r\n"),
        head(HOST, LENGTH, b"x\r\n"),
        head(HOST, LENGTH, b": y\r\n"),
        head(HOST, LENGTH, b"x\x00: y\r\n"),
        head(HOST, LENGTH, *(b"x-%d: y\r\n" % number for number in range(MAX_FIELDS - 1))),
    ],
)
def test_an_odd_head_is_for_others_to_judge(odd):
    assert parse_usual_head(odd, LINE) is None


def test_as_many_fields_as_may_be():
    fields = [b"x-%d: y\r\n" % number for number in range(MAX_FIELDS - 2)]
    assert len(parse_usual_head(head(HOST, LENGTH, *fields), LINE)) == MAX_FIELDS


@given(st.binary(max_size=64))
@example(b"x: y\r\n")
@example(b"x: y\r\nz: \tw\r\n")
def test_every_byte_between_is_a_fields_or_the_head_is_odd(between):
    told = parse_usual_head(head(HOST, LENGTH, between), LINE)
    if told is not None:
        again = parse_usual_head(head(*(f"{name}: {value}\r\n".encode() for name, value in told.items())), LINE)
        assert told == again
        assert len(told) == head(HOST, LENGTH, between).count(b"\n") - 2


@pytest.mark.parametrize("size", range(len(LINE) + 1))
def test_the_beginning_of_a_usual_head(size):
    assert may_become_usual(LINE[:size], LINE)


@pytest.mark.parametrize("beginning", [b"G", b"POST /v1/models", b"\r\n", LINE + b"x" * MAX_HEAD_BYTES])
def test_what_can_not_become_a_usual_head(beginning):
    assert not may_become_usual(beginning, LINE)
