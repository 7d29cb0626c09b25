"""Providers over TCP. `Provider` plays what a case says: a stream of events, a whole answer, or one that obeys a cap. `Teller`
says given bytes, a part at a time.

One `Provider` plays for every case: `/PLAYER/v1/chat/completions` is the URL of the player with that name. What a case repeats
(`$of`, `$times`) is expanded when it is asked for, and each event of a repetition is encoded once.
"""

import asyncio
import gzip
import itertools
import json
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import suppress
from email.utils import formatdate
from time import time
from typing import Any

from tests.harness.clients import length_in
from tests.harness.proxy import cut_short

CHUNK = {"id": "chatcmpl-7", "object": "chat.completion.chunk", "created": 1764000000, "model": "up-model"}
CAPS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
BURST_BYTES = 65_536  # written before the receiver is waited for
MAX_BODY_BYTES = 64 << 20
WORD = " word"  # one token of o200k_base


def expand(value: Any) -> Any:
    """A value with its repetitions written out."""
    if isinstance(value, list):
        return [item for part in value for item in _items(part)]
    if not isinstance(value, dict):
        return value
    if "$of" in value:
        repeated = expand(value["$of"])
        assert isinstance(repeated, str), "a list is repeated within a list"
        return repeated * value["$times"]
    if "$join" in value:
        return "".join(expand(value["$join"]))
    if "$http_date_in_s" in value:
        return formatdate(time() + value["$http_date_in_s"], usegmt=True)
    return {name: expand(member) for name, member in value.items()}


def _items(part: Any) -> list[Any]:
    if isinstance(part, dict) and isinstance(part.get("$of"), list):
        return list(itertools.islice(itertools.cycle(expand(part["$of"])), part["$times"]))
    return [expand(part)]


def _data(events: list[Any]) -> Iterator[bytes]:
    """Each event of a stream, as it goes over the wire."""
    for part in events:
        if isinstance(part, dict) and isinstance(part.get("$of"), list):
            encoded = [_event(item) for item in part["$of"]]
            yield from itertools.islice(itertools.cycle(encoded), part["$times"])
        else:
            yield _event(part)


def _event(event: Any) -> bytes:
    event = expand(event)
    text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode(errors="surrogatepass") + b"\n\n"


class Player:
    """One provider of a case. `then` is what it does once `turn` is called; `bodies` are what it was sent."""

    def __init__(self, does: dict[str, Any], then: dict[str, Any] | None = None) -> None:
        self._does = does
        self._then = then
        self.bodies: list[dict[str, Any]] = []

    def turn(self) -> None:
        if self._then is not None:
            self._does = self._then

    async def play(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request. The connection is good for another one, unless it is closed afterwards."""
        does = self._does
        await asyncio.sleep(does.get("delay_s", 0))  # noqa: TID251 - the case's delay
        unknown = sorted(body.keys() - set(does["knows"])) if "knows" in does else []
        if unknown:
            detail = [
                {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
                for name in unknown
            ]
            await self._whole(
                writer, {"status": 422}, json.dumps({"object": "error", "message": {"detail": detail}}).encode()
            )
        elif "events" in does:
            await self._stream(writer, reader, does)
        elif "makes" in does:
            await self._made(writer, reader, does, body)
        else:
            text = does["raw"] if "raw" in does else json.dumps(expand(does.get("answer", {})))
            await self._whole(writer, does, text.encode(errors="surrogatepass"))

    async def _whole(self, writer: asyncio.StreamWriter, does: dict[str, Any], body: bytes) -> None:
        headers = {"content-type": "application/json"}
        if does.get("gzip"):
            body = gzip.compress(body)
            headers["content-encoding"] = "gzip"
        headers["content-length"] = str(len(body))
        writer.write(_head(does, headers) + body)
        await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter, reader: asyncio.StreamReader, does: dict[str, Any]) -> None:
        headers = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
        end = does.get("end", "done")
        events = _data(does["events"])
        if end == "done":
            events = itertools.chain(events, [b"data: [DONE]\n\n"])
        if does.get("gzip"):
            headers["content-encoding"] = "gzip"
            events = iter([gzip.compress(b"".join(events))])
        writer.write(_head(does, headers))
        waiting = 0
        for event in events:
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            waiting += len(event)
            if "gap_s" in does or waiting > BURST_BYTES:
                await writer.drain()
                await asyncio.sleep(does.get("gap_s", 0))  # noqa: TID251 - the case's delay
                waiting = 0
        if end == "done":
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        if end == "silent":
            await reader.read(1)
            writer.close()
        elif end == "dies":
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends a reset
            writer.transport.abort()

    async def _made(
        self, writer: asyncio.StreamWriter, reader: asyncio.StreamReader, does: dict[str, Any], body: dict[str, Any]
    ) -> None:
        """What it wants to say, within the largest cap among those that it reads; the hidden tokens come first."""
        makes = does["makes"]
        caps = [body[name] for name in makes["reads"] if isinstance(body.get(name), int)]
        made = min(makes["wants"], max(caps, default=makes["wants"]))
        hidden = min(made, makes.get("hidden", 0))
        finish = "length" if made < makes["wants"] else "stop"
        usage = {
            "prompt_tokens": makes["prompt_tokens"],
            "completion_tokens": made,
            "total_tokens": makes["prompt_tokens"] + made,
            "completion_tokens_details": {"reasoning_tokens": hidden},
        }
        if not body.get("stream"):
            message = {"role": "assistant", "content": WORD * (made - hidden)}
            choices = [{"index": 0, "message": message, "finish_reason": finish}]
            answer = {**CHUNK, "object": "chat.completion", "choices": choices, "usage": usage}
            await self._whole(writer, does, json.dumps(answer).encode())
            return
        word = {**CHUNK, "choices": [{"index": 0, "delta": {"content": WORD}, "finish_reason": None}]}
        last = {**CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
        events = [{"$of": [word], "$times": made - hidden}, last]
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append({**CHUNK, "choices": [], "usage": usage})
        await self._stream(writer, reader, {**does, "events": events})


def _head(does: dict[str, Any], usual: dict[str, str]) -> bytes:
    """A response's head; the case's headers replace the usual ones, and None leaves one out."""
    headers = {**usual, **{name.lower(): expand(value) for name, value in does.get("headers", {}).items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
    return f"HTTP/1.1 {does.get('status', 200)} Played\r\n{lines}\r\n".encode()


class Provider:
    """The server. `players` is by name; a request for none of them is a 404."""

    def __init__(self) -> None:
        self.players: dict[str, Player] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self._port = self._server.sockets[0].getsockname()[1]

    def base_url(self, player: str) -> str:
        return f"http://127.0.0.1:{self._port}/{player}/v1"

    async def close(self) -> None:
        self._server.close()
        for serving in self._serving:
            serving.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._serving.add(serving)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while not writer.is_closing():
                    await self._one(reader, writer)
        finally:
            self._serving.discard(serving)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        size = int(headers["content-length"])
        assert size <= MAX_BODY_BYTES
        body = json.loads(await reader.readexactly(size))
        player = self.players.get(head[0].split(" ")[1].split("/")[1])
        if player is None:
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
            return
        player.bodies.append(body)
        await player.play(body, reader, writer)


USAGE = {"prompt_tokens": 6, "completion_tokens": 24, "total_tokens": 30}
REPLY = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}}], "usage": USAGE}
CHOICES = ({"delta": {"content": "Hel"}}, {"delta": {"content": "lo"}}, {"delta": {}, "finish_reason": "stop"})
CHUNKS = [{"choices": [{"index": 0, **choice}]} for choice in CHOICES] + [{"choices": [], "usage": USAGE}]
EVENTS = [b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in CHUNKS] + [b"data: [DONE]\n\n"]


def framed(payloads: list[bytes], framing: str, *, stream: bool) -> bytes:
    """A whole answer: in chunks, of a length that is told, or to the end of the connection."""
    kind = b"text/event-stream" if stream else b"application/json"
    head, body = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n" % kind, b"".join(payloads)
    if framing == "chunks":
        coded = b"".join(b"%x\r\n%b\r\n" % (len(payload), payload) for payload in [*payloads, b""])
        return head + b"transfer-encoding: chunked\r\n\r\n" + coded
    return head + (b"content-length: %d" % len(body) if framing == "length" else b"x: y") + b"\r\n\r\n" + body


class Teller:
    """Answers each request with the same bytes, on a port of its own. `says`: the parts, after `delay_s` and each but the first
    when `go` is set. `ends`: "goodbye" (an orderly close), "cut" (without TLS's part of one) or "silence". `bodies`: what it
    was sent; `told`: how many parts it has said.
    """

    def __init__(self) -> None:
        self.says: list[bytes] = []
        self.ends = "goodbye"
        self.go = asyncio.Event()
        self.delay_s = 0.0
        self.told = 0
        self.bodies: list[Any] = []
        self.writers: list[asyncio.StreamWriter] = []

    def answers(self, status: int, body: Any, delay_s: float = 0.0, **headers: str) -> "Teller":
        """Answer so from now on: with JSON, or with text or bytes, that ends with the connection. Underscores in names of headers
        stand for hyphens; an empty one is left out.
        """
        told = {"content-type": "application/json", "connection": "close"}
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in told.items() if value), "\r\n"]
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.says, self.delay_s = ["\r\n".join(lines).encode() + payload], delay_s
        return self

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._tell, "127.0.0.1", 0, ssl=tls)
        scheme = "http" if tls is None else "https"
        self.base_url = f"{scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    def close(self) -> None:
        self._server.close()
        for writer in self.writers:
            writer.transport.abort()

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            body = await reader.readexactly(length_in(await reader.readuntil(b"\r\n\r\n")))
            self.bodies.append(json.loads(body))
            await asyncio.sleep(self.delay_s)  # noqa: TID251 - the case's delay
            for number, part in enumerate(self.says):
                if number:
                    await self.go.wait()
                writer.write(part)
                self.told += 1
            if self.ends == "cut":
                await cut_short(writer)
            if self.ends != "goodbye":
                await reader.read()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
