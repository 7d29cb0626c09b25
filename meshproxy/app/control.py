"""Between the supervisor and a worker: a socket pair with one question and one answer at a time, each a frame of msgpack."""

import asyncio
import contextlib
import socket
from typing import Any

import msgspec
from msgspec import Struct

from meshproxy.app.reload import Standing

LENGTH_BYTES = 4  # ahead of each frame, big-endian


class Ask(Struct, tag="ask", frozen=True):
    """How are you? The answer is a `Report`."""


class Prepare(Struct, tag="prepare", frozen=True):
    """Build what this needs, and go on as before. The answer is a list of what can't be built."""

    standing: Standing


class Report(Struct, frozen=True):
    """How a worker is: its metrics (telemetry.snapshot), why it isn't ready, and whether it has the ledger."""

    snapshot: bytes
    not_ready: list[str]
    connected: bool


class Drain(Struct, tag="drain", frozen=True):
    """Stop being ready, let what runs end, and exit. There is no answer."""


class Hurry(Struct, tag="hurry", frozen=True):
    """End what runs now. There is no answer."""


Order = Drain | Hurry
# A Standing holds from now on, and the first one has the worker begin. The answer is a list of what keeps it from that.
Question = Standing | Prepare | Ask

MESSAGES: msgspec.msgpack.Decoder[Question | Order] = msgspec.msgpack.Decoder(Question | Order)


class Control:
    """One end of the pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._asking = asyncio.Lock()
        self._answer: asyncio.Task[bytes] | None = None

    @classmethod
    async def over(cls, sock: socket.socket) -> "Control":
        """The end that `sock` is."""
        return cls(*await asyncio.open_connection(sock=sock))

    async def ask(self, question: Question) -> bytes:
        """The answer to a question, still encoded. ConnectionError if the other end is gone.

        Whoever stops waiting leaves an answer behind, which the next one takes away first.
        """
        async with self._asking:
            if self._answer is not None:
                await asyncio.shield(self._answer)
            self.send(question)
            self._answer = asyncio.create_task(self.receive(), name="answer")
            answer = await asyncio.shield(self._answer)
            self._answer = None
            return answer

    def send(self, message: Any) -> None:
        """Send one frame. ConnectionError if the other end is known to be gone."""
        if self._writer.is_closing():
            raise ConnectionError("the other end is gone")
        data = msgspec.msgpack.encode(message)
        self._writer.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)

    async def sent(self) -> None:
        """Return when what was sent is on its way: for one who is about to exit."""
        with contextlib.suppress(ConnectionError):
            self._writer.close()
            await self._writer.wait_closed()

    async def receive(self) -> bytes:
        """The next frame. ConnectionError if the other end is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
            return await self._reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the other end is gone") from error

    def close(self) -> None:
        """Hang up."""
        self._writer.close()
