"""Clients: what a request came back with, and requests as bytes on a bare connection."""

import asyncio
import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from tests.harness.waiting import PATIENCE_S

HELLO = [{"role": "user", "content": "Hello there"}]
CHAT = "/v1/chat/completions"
DONE = "[DONE]"
MARK_BYTES = 6  # of a piece that may be the beginning of the next event's mark


class Answer:
    """What an HTTP request came back with. `broken`: why the connection ended before the answer did. `times`: when each event
    came; `pinged_s`: after how long there was a comment; `took_s`: until the end.
    """

    def __init__(self, status: int = 0, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        self.status = status
        self.headers: Mapping[str, str] = headers or {}
        self.body = body
        self.broken = ""
        self.began_at = time.monotonic()
        self.times: list[float] = []
        self.pinged_s: float | None = None
        self.took_s = 0.0

    @property
    def body_text(self) -> str:
        return self.body.decode(errors="replace")

    @property
    def json(self) -> Any:
        """The body's JSON; None if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def data(self) -> list[str]:
        """The data of each event of a stream."""
        lines = self.body_text.split("\n")
        return [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]

    @property
    def events(self) -> list[Any]:
        """The events of a stream; those that aren't JSON, as `[DONE]`, as text."""
        return [_decoded(text) for text in self.data]

    @property
    def text(self) -> str:
        """What the model said in a stream."""
        chunks = [event for event in self.events if isinstance(event, dict) and event.get("choices")]
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a stream's last event, or of a body whose envelope was found to be as it must."""
        if self.data:
            return self.events[-1]["error"]
        assert self.headers["content-type"] == "application/json", self.body
        told = self.json
        assert told["request_id"] == told["error"]["request_id"] == self.headers["x-request-id"]
        assert {"message", "type", "param", "code", "request_id"} <= told["error"].keys()
        return told["error"]

    @property
    def code(self) -> str | None:
        """Of the error; None if there is none."""
        last = self.events[-1] if self.data else _decoded(self.body_text)
        return self.error["code"] if isinstance(last, dict) and "error" in last else None

    @property
    def is_done(self) -> bool:
        """Whether a stream came to its end."""
        return not self.broken and self.body.endswith(b"data: [DONE]\n\n")

    @property
    def is_whole(self) -> bool:
        """Whether it succeeded, whatever its kind."""
        return self.status == 200 and not self.broken and self.code is None and (not self.data or self.is_done)

    @property
    def first_event_s(self) -> float:
        return self.times[0] - self.began_at

    @property
    def max_gap_s(self) -> float:
        return max((after - before for before, after in itertools.pairwise(self.times)), default=0.0)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


async def fetch(
    method: str,
    url: str,
    *,
    session: aiohttp.ClientSession | None = None,
    into: Answer | None = None,
    hang_up_after_events: int | None = None,
    timeout_s: float = 90,
    **options: Any,
) -> Answer:
    """Make a request and read its answer, to which what comes is added as it comes. A connection that fails is no exception.

    Without a session it is a connection of its own, by a client that takes no compression. Bytes are JSON.
    """
    answer = into or Answer()
    own = session or aiohttp.ClientSession(auto_decompress=False, headers={"accept-encoding": "identity"})
    if isinstance(options.get("data"), bytes):
        options["headers"] = {"content-type": "application/json", **options.get("headers", {})}
    try:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with own.request(method, url, timeout=timeout, **options) as response:
            answer.status, answer.headers = response.status, response.headers
            before = b"\n"
            async for piece in response.content.iter_any():
                now = time.monotonic()
                answer.body += piece
                seen = before + piece
                answer.times += [now] * (seen.count(b"\ndata:") - before.count(b"\ndata:"))
                if answer.pinged_s is None and b"\n:" in seen:
                    answer.pinged_s = now - answer.began_at
                before = seen[-MARK_BYTES:]
                if hang_up_after_events is not None and len(answer.times) >= hang_up_after_events:
                    response.close()
                    break
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        answer.broken = repr(error)
    finally:
        if session is None:
            await own.close()
    answer.took_s = time.monotonic() - answer.began_at
    return answer


async def chat(
    url: str, auth: Mapping[str, str], *, headers: Mapping[str, str] | None = None, **options: Any
) -> Answer:
    """POST a chat completion. `messages` are a greeting unless they are among the fields; see `fetch` for other options."""
    reading = {name: options.pop(name) for name in ("session", "into", "hang_up_after_events") if name in options}
    body = {"messages": HELLO, **options}
    return await fetch("POST", f"{url}{CHAT}", json=body, headers={**auth, **(headers or {})}, **reading)


RawAnswer = tuple[int, dict[str, str], bytes]


def chat_bytes(auth: Mapping[str, str], *lines: str, **fields: Any) -> bytes:
    """A chat completion as bytes, with more lines in its head; `messages` are a greeting unless given."""
    body = msgspec.json.encode({"messages": HELLO, **fields})
    head = [f"POST {CHAT} HTTP/1.1", "Host: mesh", *(f"{name}: {value}" for name, value in auth.items()), *lines]
    head += ["Content-Type: application/json", f"Content-Length: {len(body)}", "\r\n"]
    return "\r\n".join(head).encode() + body


async def said(host: str, port: int, data: bytes, timeout_s: float = PATIENCE_S) -> bytes:
    """All that comes back for bytes until the connection ends; what came if it fails or patience ends."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    got = b""
    try:
        writer.write(data)
        async with asyncio.timeout(timeout_s):
            while piece := await reader.read(65_536):
                got += piece
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return got


async def next_answer(reader: asyncio.StreamReader, timeout_s: float = PATIENCE_S) -> RawAnswer:
    """The next answer with a length on a connection that stays open."""
    async with asyncio.timeout(timeout_s):
        head = await reader.readuntil(b"\r\n\r\n")
        (answer,) = answers_in(head + await reader.readexactly(length_in(head)))
        return answer


def length_in(head: bytes) -> int:
    """The content-length of a head that has one."""
    return int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])


def answers_in(data: bytes) -> list[RawAnswer]:
    """Every answer in what came back on a connection, by the strictest reading: nothing may be left over."""
    answers = []
    while data:
        head, found, data = data.partition(b"\r\n\r\n")
        assert found, head
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), pairs  # no header twice
        if version == "HTTP/1.0":  # closes without saying so: RFC 9112, section 9.3
            headers.setdefault("connection", "close")
        body, data = _body(int(status), headers, data)
        answers.append((int(status), headers, body))
    return answers


def _body(status: int, headers: dict[str, str], data: bytes) -> tuple[bytes, bytes]:
    if status < 200 or status == 204:
        return b"", data
    if headers.get("transfer-encoding") == "chunked":
        return _chunks(data)
    size = int(headers["content-length"])
    assert len(data) >= size
    return data[:size], data[size:]


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        assert data[size : size + 2] == b"\r\n"
        body, data = body + data[:size], data[size + 2 :]
        if not size:
            return body, data
