import asyncio
import contextlib
import inspect
import json
import re
import tracemalloc
from operator import attrgetter
from unittest.mock import Mock

import pytest
from aiohttp import HttpVersion10, web
from aiohttp.http import HttpProcessingError
from yarl import URL

from meshproxy.gateway.exchange import Reply
from meshproxy.server.aiohttp_path import AiohttpConnection, ConnectionLimits, envelope_errors
from meshproxy.server.chat import ClientStream
from meshproxy.server.fast_path import ClientConnection
from meshproxy.server.listener import Runner, listen
from tests.harness.waiting import turns, until

GET = b"GET /work HTTP/1.1\r\nhost: m\r\n\r\n"
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: m\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: m\r\ncontent-length: 2\r\n\r\n{}"
LARGE_BYTES = 16_000_000


class Served:
    """A listener of ours on a real socket. `refused`: the statuses of what was no request."""

    def __init__(self, header_timeout_s=10.0, write_timeout_s=60.0, fast_connections=True):
        self.refused = []
        self.begun, self.cancelled = asyncio.Event(), asyncio.Event()
        app = web.Application(middlewares=[envelope_errors])
        app.router.add_get("/work", self._work)
        app.router.add_get("/bug", self._bug)
        app.router.add_get("/large", self._large)
        for path in ("/", "/seen"):
            app.router.add_get(path, self._seen)
        self.answer_early = False
        app.router.add_post("/v1/chat/completions", self._odd_chat)
        limits = ConnectionLimits(lambda: header_timeout_s, self.refused.append, lambda: write_timeout_s)
        self.runner = Runner(app, (lambda: self) if fast_connections else None, limits)

    async def _work(self, _request):
        return web.Response(body=b"fine")

    async def _large(self, _request):
        return web.Response(body=bytes(LARGE_BYTES))

    async def _seen(self, request):
        return web.json_response([request.host, request.headers["host"], request.path_qs])

    async def _bug(self, _request):
        raise RuntimeError("a bug")

    async def _odd_chat(self, request):
        return web.Response(body=b"odd " + await request.read())

    async def serve(self, connection, fields):
        """Echo the body of a usual request; never answer one that is `[]`."""
        stays = False
        try:
            body = b"" if self.answer_early else await connection.body(5.0)
            if body == b"[]":
                self.begun.set()
                await asyncio.Event().wait()
            keep_alive = fields.get("connection") != "close"
            stream = ClientStream(connection.transport, connection.drained, lambda: False, keep_alive=keep_alive)
            stream.reply(Reply(200, [], bytes(LARGE_BYTES) if body == b"[1]" else b"chat " + body))
            stays = stream.keep_alive
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            connection.answered(keep_alive=stays)

    async def left(self):
        """Return when a client has been here and no one is left."""
        await until(self.runner.connected, poll_s=0)
        await until(lambda: not self.runner.connected())

    async def connect(self):
        return await asyncio.open_connection(*self.runner.addresses[0][:2])

    async def asked(self, data):
        """What comes back until the connection is closed."""
        reader, writer = await self.connect()
        writer.write(data)
        got = await asyncio.wait_for(reader.read(-1), 5)
        writer.close()
        return got


@pytest.fixture
async def start():
    started = []

    async def start_one(**options):
        served = Served(**options)
        await served.runner.setup()
        await web.SockSite(served.runner, listen("127.0.0.1:0")).start()
        started.append(served)
        return served

    yield start_one
    for served in started:
        await served.runner.cleanup()


async def answers(reader, *expected):
    """Read answers, whose bodies these are, from a connection that is kept."""
    for body in expected:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        assert await reader.readexactly(length) == body


async def test_usual_requests_go_past_the_router_and_others_through_it(start):
    served = await start()
    closing = b"connection: close\r\n\r\n"
    assert (await served.asked(POST.replace(b"\r\n\r\n", b"\r\n" + closing))).endswith(b"\r\n\r\nchat {}")
    assert (await served.asked(GET.replace(b"\r\n\r\n", b"\r\n" + closing))).endswith(b"\r\n\r\nfine")
    assert (await served.asked(CHUNKED.replace(b"\r\n\r\n", b"\r\n" + closing, 1))).endswith(b"\r\n\r\nodd {}")


async def test_a_connection_is_kept_whoever_serves_it(start):
    served = await start()
    reader, writer = await served.connect()
    for request, body in (
        (POST, b"chat {}"),
        (POST, b"chat {}"),
        (GET, b"fine"),
        (CHUNKED, b"odd {}"),
        (POST, b"odd {}"),
    ):
        writer.write(request)
        await answers(reader, body)
    assert (served.runner.connected(), served.runner.busy()) == (1, 0)
    writer.close()


@pytest.mark.parametrize("at", range(1, len(POST + POST + GET)))
async def test_requests_in_two_pieces_and_several_in_one(start, at):
    served = await start()
    reader, writer = await served.connect()
    together = POST + POST + GET
    writer.write(together[:at])
    await turns(3)
    writer.write(together[at:])
    await answers(reader, b"chat {}", b"chat {}", b"fine")
    writer.close()


async def test_a_large_body_in_pieces(start):
    served = await start()
    reader, writer = await served.connect()
    body = b"x" * 1_000_000
    writer.write(POST.replace(b"length: 2\r\n\r\n{}", b"length: 1000000\r\n\r\n") + body[:10])
    for at in range(10, len(body), 99_999):
        writer.write(body[at : at + 99_999])
        await writer.drain()
    writer.write(POST)
    await answers(reader, b"chat " + body, b"chat {}")
    writer.close()


async def test_a_body_in_tiny_pieces_takes_no_more_memory(start):
    """A client that sends two bytes at a time, however fast this machine is: the pieces come straight to the connection."""
    served = await start()
    connection = ClientConnection(served.runner.server, asyncio.get_running_loop(), None)
    connection.connection_made(Mock(get_extra_info=Mock(return_value=None), get_write_buffer_size=Mock(return_value=0)))
    connection.data_received(POST.replace(b"content-length: 2\r\n\r\n{}", b"content-length: 200001\r\n\r\n"))
    await turns(1)
    tracemalloc.start()
    for _ in range(100_000):
        connection.data_received(bytes(2))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    connection.connection_lost(None)
    assert grown < 400_000


@pytest.mark.parametrize("keep_alive", [True, False])
async def test_an_answer_before_the_body_is_there_is_not_lost(start, keep_alive):
    """And what is left of the body is no request."""
    served = await start()
    served.answer_early = True
    reader, writer = await served.connect()
    head = POST[:-2].replace(b"length: 2", b"length: 3000000")
    writer.write(head if keep_alive else head.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    writer.write(GET * 1000)
    await answers(reader, b"chat ")
    writer.write(b"x" * (3_000_000 - 1000 * len(GET)) + GET)
    await writer.drain()
    assert (b"fine" if keep_alive else b"") == (
        await reader.read(-1) if not keep_alive else await reader.readuntil(b"fine")
    )[-4:]
    writer.close()


async def test_more_than_one_request_ahead_waits_in_the_socket(start):
    served = await start()
    _, writer = await served.connect()
    writer.write(POST.replace(b"{}", b"[]"))
    await asyncio.wait_for(served.begun.wait(), 5)
    writer.write(POST * 100_000)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(writer.drain(), 0.2)
    served.runner.interrupt()
    await asyncio.wait_for(served.cancelled.wait(), 5)


@pytest.mark.parametrize(
    "size, count, status",
    [(1, 2000, b"200"), (200, 4000, b"200"), (1, 12_000, b"400"), (64, 6_000, b"400")],
)
async def test_a_body_of_small_chunks_is_taken_up_to_a_bound(start, size, count, status):
    served = await start()
    chunk = b"%x\r\n%b\r\n" % (size, b"x" * size)
    got = await served.asked(
        CHUNKED.replace(b"2\r\n{}\r\n", chunk * count).replace(b"host: m", b"host: m\r\nconnection: close")
    )
    assert got.split()[1] == status


async def test_a_chunk_that_is_invalid_is_answered_when_it_comes(start):
    """The head came before, and its handler waits for the body."""
    served = await start()
    reader, writer = await served.connect()
    head, _, _ = CHUNKED.partition(b"2\r\n{}")
    writer.write(head)
    await until(served.runner.busy, poll_s=0)
    writer.write(b"-2\r\n{}\r\n0\r\n\r\n" + GET)
    head, _, body = (await asyncio.wait_for(reader.read(-1), 5)).partition(b"\r\n\r\n")
    assert head.split()[1] == b"400"
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "bad_request"
    writer.close()


async def test_a_request_is_served_that_came_in_one_read_with_invalid_bytes(start):
    served = await start(fast_connections=False)
    got = await served.asked(POST + GET + b"GARBAGE\r\n\r\n")
    assert re.findall(rb"HTTP/1.[01] (\d+)", got) == [b"200", b"200", b"400"]


async def test_a_bug_is_answered_in_the_envelope(start, caplog):
    served = await start()
    got = await served.asked(GET.replace(b"/work", b"/bug"))
    assert b" 500 Internal Server Error\r\n" in got
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "internal_error"
    assert b"a bug" not in got
    assert "handler failed" in caplog.text


async def test_a_client_that_hangs_up_cancels_its_handler(start):
    served = await start()
    _, writer = await served.connect()
    writer.write(POST.replace(b"{}", b"[]"))
    await asyncio.wait_for(served.begun.wait(), 5)
    assert served.runner.busy() == 1
    writer.transport.abort()
    await asyncio.wait_for(served.cancelled.wait(), 5)


async def test_at_the_end_idle_connections_are_closed_and_busy_ones_interrupted(start):
    served = await start()
    idle, idle_writer = await served.connect()
    idle_writer.write(GET)
    await idle.readuntil(b"fine")
    _, writer = await served.connect()
    writer.write(POST.replace(b"{}", b"[]"))
    await asyncio.wait_for(served.begun.wait(), 5)
    served.runner.close_idle()
    assert await asyncio.wait_for(idle.read(-1), 5) == b""
    assert not served.cancelled.is_set()
    served.runner.interrupt()
    await asyncio.wait_for(served.cancelled.wait(), 5)
    for each in (idle_writer, writer):
        each.close()


async def test_a_listener_that_closes_says_so(start):
    served = await start()
    served.runner.closing = True
    assert b"connection: close" in (await served.asked(GET)).lower()


@pytest.mark.parametrize("ask", [GET.replace(b"/work", b"/large"), POST.replace(b"2\r\n\r\n{}", b"3\r\n\r\n[1]")])
async def test_a_client_that_takes_nothing_is_given_up(start, ask):
    served = await start(write_timeout_s=0.2)
    _, writer = await asyncio.open_connection(*served.runner.addresses[0][:2], limit=1024)
    writer.write(ask)
    await asyncio.wait_for(served.left(), 5)
    writer.close()


async def test_an_answer_that_its_client_does_not_take_keeps_no_socket_of_a_closed_listener(start):
    served = await start()
    reader, writer = await asyncio.open_connection(*served.runner.addresses[0][:2], limit=1024)
    writer.write(GET.replace(b"/work", b"/large"))
    await until(served.runner.busy, poll_s=0)
    await served.runner.cleanup()
    got = 0
    with contextlib.suppress(ConnectionResetError):
        while piece := await asyncio.wait_for(reader.read(LARGE_BYTES), 5):
            got += len(piece)
    writer.close()
    assert got < LARGE_BYTES


async def test_a_client_that_takes_its_time_is_waited_for(start):
    served = await start(write_timeout_s=0.3)
    reader, writer = await asyncio.open_connection(*served.runner.addresses[0][:2], limit=1024)
    writer.write(GET.replace(b"/work", b"/large"))
    left = LARGE_BYTES
    while left > 0:
        left -= len(await reader.read(LARGE_BYTES // 16))
        await asyncio.sleep(0.01)  # noqa: TID251 - the client's pace
    writer.close()


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        *(
            (target, 400, "bad_request")
            for target in (b"http://xn--a/", b"ftp://xn--/", b"http://[::1/", b"http://m:99999/")
        ),
        (b"/" + b"a" * 20_000, 414, "uri_too_long"),
    ],
)
@pytest.mark.parametrize("fast_connections", [True, False])
async def test_a_target_that_can_not_be_read_parks_no_connection(start, target, status, code, fast_connections):
    served = await start(fast_connections=fast_connections)
    got = await served.asked(GET.replace(b"/work", target))
    assert int(got.split()[1]) == status
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == code


LONG_HEADERS = {
    "name-and-value-of-10k": (b"X" * 10_000 + b": " + b"a" * 10_000, 431),
    "name-and-value-of-8k": (b"X" * 8_000 + b": " + b"a" * 8_000, 200),
    "value-behind-16k-spaces": (b"X:" + b" " * 16_384 + b"a", 431),
    "longest": (b"X: " + b"a" * 16_381, 200),
    "longest-and-one": (b"X: " + b"a" * 16_382, 431),
}


async def sent_in_two(served, request: bytes, cut: int | None) -> tuple[int, str | None]:
    """Send a request, cut at a byte if there is one, and return its status and the error's code; None for a 200."""
    reader, writer = await served.connect()
    for piece in (request[:cut], request[cut:]) if cut is not None else (request,):
        writer.write(piece)
        await writer.drain()
        await turns(20)
    got = await asyncio.wait_for(reader.read(-1), 5)
    writer.close()
    status = int(got.split()[1])
    return status, None if status == 200 else json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"]


@pytest.mark.parametrize("name", LONG_HEADERS)
@pytest.mark.parametrize("fast_connections", [True, False])
@pytest.mark.parametrize("cut", [None, 60, 5_000, 10_060, 15_000, 16_440])
async def test_a_long_header_has_one_answer_however_it_arrives(start, name, fast_connections, cut):
    served = await start(fast_connections=fast_connections)
    line, status = LONG_HEADERS[name]
    closing = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n" + line + b"\r\n\r\n")
    assert await sent_in_two(served, closing, cut) == (status, "request_head_too_large" if status == 431 else None)


@pytest.mark.parametrize("size, status", [(10_000, 200), (20_000, 400), (40_000, 400)])
@pytest.mark.parametrize("cut", [None, 5_000, 18_000])
async def test_a_long_chunk_extension_has_one_answer_however_it_arrives(start, size, status, cut):
    served = await start()
    ask = CHUNKED.replace(b"2\r\n", b"2;" + b"a" * size + b"\r\n").replace(b"host: m", b"host: m\r\nconnection: close")
    assert await sent_in_two(served, ask, cut) == (status, "bad_request" if status == 400 else None)


@pytest.mark.parametrize(
    "line, target",
    [
        (b"CONNECT other:443", "other:443"),
        (b"OPTIONS *", "*"),
        (b"GET http://other/nowhere?x=1", "/nowhere"),
    ],
)
async def test_a_target_of_any_form_is_named_where_nothing_is(start, line, target):
    served = await start()
    got = await served.asked(GET.replace(b"GET /work", line).replace(b"host: m", b"host: m\r\nconnection: close"))
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["message"] == f"There is nothing at {target}."


@pytest.mark.parametrize(
    "target, host, path",
    [
        (b"http://other:81/seen?x=1", "other:81", "/seen?x=1"),
        (b"http://other", "other", "/"),
        (b"http://other?x=1", "other", "/?x=1"),
        (b"HTTPS://user:secret@[::1]/seen", "[::1]", "/seen"),
    ],
)
async def test_an_absolute_target_is_served_with_its_own_host(start, target, host, path):
    served = await start()
    got = await served.asked(GET.replace(b"/work", target).replace(b"host: m", b"host: m\r\nconnection: close"))
    assert json.loads(got.partition(b"\r\n\r\n")[2]) == [host, host, path]


async def test_without_chat_every_request_is_the_applications(start):
    served = await start(fast_connections=False)
    ask = POST.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    assert (await served.asked(ask)).endswith(b"\r\n\r\nodd {}")


class Seen(AiohttpConnection):
    """A connection that keeps itself, and shows the names of aiohttp's that are private and used."""

    latest = None
    messages = property(attrgetter("_messages"))
    is_busy = property(attrgetter("_request_in_progress"))
    serving = property(attrgetter("_task_handler"))

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        Seen.latest = self


@pytest.fixture
async def seen(start, monkeypatch):
    """A connection to a listener, and its other end."""
    monkeypatch.setattr("meshproxy.server.listener.AiohttpConnection", Seen)
    served = await start(fast_connections=False)
    reader, writer = await served.connect()
    await until(lambda: Seen.latest is not None and Seen.latest.transport is not None, poll_s=0)
    yield Seen.latest, reader, writer
    writer.close()
    Seen.latest = None


class TestWhatOfAiohttpIsPrivate:
    """docs/decisions/fast-path.md lists it: a release that changes it fails here, by name."""

    async def test_messages_are_the_heads_that_are_parsed_and_not_begun(self, seen):
        connection, _, _ = seen
        connection.data_received(POST + GET)
        assert [message.path for message, _ in connection.messages] == ["/v1/chat/completions", "/work"]
        _, body = connection.messages[0]
        assert (body.is_eof(), body.total_bytes) == (True, 2)

    async def test_a_head_that_the_parser_refuses_is_a_message_with_its_exception(self, seen):
        connection, _, _ = seen
        web.RequestHandler.data_received(connection, b"GARBAGE\r\n\r\n")
        message, _ = connection.messages[-1]
        assert isinstance(message.exc, HttpProcessingError)

    async def test_a_request_is_in_progress_from_its_handlers_start_until_its_answer_is_written(self, seen):
        connection, reader, writer = seen
        assert connection.is_busy is False
        writer.write(POST[:-1])
        await until(lambda: connection.is_busy, poll_s=0)
        writer.write(POST[-1:])
        await answers(reader, b"odd {}")
        assert connection.is_busy is False

    async def test_the_task_that_serves_a_connection_cancels_its_handler(self, seen):
        connection, reader, writer = seen
        writer.write(POST[:-1])
        await until(lambda: connection.is_busy, poll_s=0)
        connection.serving.cancel()
        assert await asyncio.wait_for(reader.read(-1), 5) == b""

    async def test_the_applications_server_has_its_handler_and_its_requests_factory(self):
        runner = web.AppRunner(web.Application())
        await runner.setup()
        assert callable(runner.server.request_handler)
        assert callable(runner.server.request_factory)
        await runner.cleanup()

    async def test_a_message_is_copied_with_what_the_listener_changes(self, seen):
        connection, _, _ = seen
        connection.data_received(GET)
        message, _ = connection.messages[0]
        changed = message._replace(version=HttpVersion10, url=URL("/"), should_close=True)
        assert (changed.version, changed.url, changed.should_close) == (HttpVersion10, URL("/"), True)
        assert message.upgrade is False

    def test_the_listeners_options_are_the_connections(self):
        options = inspect.signature(web.RequestHandler.__init__).parameters
        told = {
            "loop",
            "access_log",
            "auto_decompress",
            "max_line_size",
            "max_field_size",
            "max_headers",
            "lingering_time",
        }
        assert told <= options.keys()
