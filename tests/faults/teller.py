"""A provider that tells everybody the same bytes, a part at a time, and then hangs up or falls silent."""

import asyncio
import json
import ssl

from tests.faults.phases import HEAD_END, length_in
from tests.faults.proxy import cut_short

USAGE = {"prompt_tokens": 6, "completion_tokens": 24, "total_tokens": 30}
REPLY = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}}], "usage": USAGE}
CHOICES = ({"delta": {"content": "Hel"}}, {"delta": {"content": "lo"}}, {"delta": {}, "finish_reason": "stop"})
CHUNKS = [{"choices": [{"index": 0, **choice}]} for choice in CHOICES] + [{"choices": [], "usage": USAGE}]
EVENTS = [b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in CHUNKS] + [b"data: [DONE]\n\n"]


def answer(payloads: list[bytes], framing: str, *, stream: bool) -> bytes:
    """A whole answer: in chunks, of a length that is told, or to the end of the connection."""
    kind = b"text/event-stream" if stream else b"application/json"
    head, body = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n" % kind, b"".join(payloads)
    if framing == "chunks":
        coded = b"".join(b"%x\r\n%b\r\n" % (len(payload), payload) for payload in [*payloads, b""])
        return head + b"transfer-encoding: chunked" + HEAD_END + coded
    return head + (b"content-length: %d" % len(body) if framing == "length" else b"x: y") + HEAD_END + body


class Teller:
    """`says`: the parts, each but the first when `go` is set. `ends`: "goodbye" (an orderly close), "cut" (without TLS's part
    of one) or "silence".
    """

    def __init__(self) -> None:
        self.says: list[bytes] = []
        self.ends = "goodbye"
        self.go = asyncio.Event()
        self.told = 0  # parts
        self.writers: list[asyncio.StreamWriter] = []

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
            head = await reader.readuntil(HEAD_END)
            await reader.readexactly(length_in(head))
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
