import asyncio

import pytest

from meshproxy.gateway.exchange import Reply
from meshproxy.server.chat import MAX_BUFFERED_BYTES, ClientStream, WrittenResponse, head


class Transport:
    """Keeps what is written."""

    def __init__(self):
        self.written = []
        self.waiting = 0
        self.closing = False

    def write(self, data):
        self.written.append(data)

    def set_write_buffer_limits(self, high):
        self.high = high

    def get_write_buffer_size(self):
        return self.waiting

    def is_closing(self):
        return self.closing

    def abort(self):
        self.closing = True


@pytest.fixture
def transport():
    return Transport()


def stream(transport, *, minor=1, keep_alive=True, closing=False):
    return ClientStream(transport, drained, lambda: closing, keep_alive=keep_alive, minor=minor)


async def drained():
    """There is always room."""


def lines(data):
    first, *rest = data.partition(b"\r\n\r\n")[0].split(b"\r\n")
    return first, dict(line.split(b": ") for line in rest)


def test_a_stream_in_chunks(transport):
    client = stream(transport)
    client.begin([("content-type", "text/event-stream")])
    client.write(b"data: x\n\n")
    client.finish()
    began, *rest = transport.written
    first, headers = lines(began)
    assert first == b"HTTP/1.1 200 OK"
    assert (headers[b"transfer-encoding"], headers[b"content-type"]) == (b"chunked", b"text/event-stream")
    assert b"connection" not in headers
    assert rest == [b"9\r\ndata: x\n\n\r\n", b"0\r\n\r\n"]


def test_a_frame_is_passed_on_as_it_is(transport):
    client = stream(transport)
    frame = b"1;x=y\r\na\r\n"
    client.write(b"a", frame)
    assert transport.written[0] is frame


def test_a_client_of_http_1_0_reads_to_the_end(transport):
    client = stream(transport, minor=0)
    client.begin([])
    client.write(b"a", b"1\r\na\r\n")
    client.finish()
    began, *rest = transport.written
    assert (lines(began)[1][b"connection"], b"transfer-encoding" in lines(began)[1]) == (b"close", False)
    assert (rest, client.keep_alive) == ([b"a"], False)


def test_a_whole_answer(transport):
    client = stream(transport)
    client.reply(Reply(402, [("x-request-id", "r")], b"{}"))
    (data,) = transport.written
    first, headers = lines(data)
    assert (
        first,
        headers[b"content-length"],
        headers[b"x-request-id"],
    ) == (b"HTTP/1.1 402 Payment Required", b"2", b"r")
    assert data.endswith(b"\r\n\r\n{}")
    assert client.keep_alive


def test_a_stream_that_has_begun_is_broken_off_rather_than_answered_again(transport):
    client = stream(transport)
    client.begin([])
    client.reply(Reply(503, [], b"{}"))
    assert (len(transport.written), transport.closing, client.keep_alive) == (1, True, False)


@pytest.mark.parametrize("options", [{"closing": True}, {"keep_alive": False}])
def test_the_last_answer_says_so(transport, options):
    client = stream(transport, **options)
    client.reply(Reply(200, [], b""))
    assert (lines(transport.written[0])[1][b"connection"], client.keep_alive) == (b"close", False)


def test_nothing_is_written_to_who_has_gone(transport):
    client = stream(transport)
    transport.closing = True
    client.write(b"a")
    client.finish()
    assert transport.written == []
    stream(None).write(b"a")


@pytest.mark.parametrize(
    ("waiting", "expected"), [(0, False), (MAX_BUFFERED_BYTES, False), (MAX_BUFFERED_BYTES + 1, True)]
)
def test_when_a_client_is_congested(transport, waiting, expected):
    transport.waiting = waiting
    assert stream(transport).congested() == expected


def test_without_a_socket_nobody_is_congested():
    assert not stream(None).congested()


async def test_who_is_congested_is_paused_by_the_loop_too():
    """`drained` returns at once unless the loop has paused the protocol, so the loop must agree about what is too much."""

    class Silent(asyncio.Protocol):
        paused = False

        def pause_writing(self):
            self.paused = True

        def connection_made(self, transport):
            transport.pause_reading()

    loop = asyncio.get_running_loop()
    server = await loop.create_server(Silent, "127.0.0.1", 0)
    transport, protocol = await loop.create_connection(Silent, *server.sockets[0].getsockname())
    client = stream(transport)
    client.begin([])
    while not client.congested():
        assert not protocol.paused
        transport.write(b"x" * 4096)
    assert protocol.paused
    transport.abort()
    server.close()


def test_a_head_of_a_status_without_a_name():
    assert head(599, [], keep_alive=True).startswith(b"HTTP/1.1 599 \r\ndate: ")


def test_a_client_of_http_1_0_that_would_stay_is_told_it_may():
    assert b"connection: keep-alive\r\n" in head(200, [], keep_alive=True, minor=0)


async def test_what_was_sent_is_not_sent_again():
    sent = WrittenResponse(keep_alive=True)
    assert (await sent.prepare(None), await sent.write_eof(), sent.keep_alive) == (None, None, True)
