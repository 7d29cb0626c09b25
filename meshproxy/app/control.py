"""Between the supervisor and a worker: a socket pair with one question and one answer at a time, each a frame of msgpack."""

import asyncio
import socket
import struct
from typing import Any

import msgspec
from msgspec import Struct

from meshproxy.config import Settings

MAX_FRAME_BYTES = 67_108_864
_LENGTH = struct.Struct(">I")


class Start(Struct, tag="start", frozen=True):
    """Begin to serve, with the configuration of this generation; `reload_failed`: a newer one was unfit. Answer: None."""

    settings: Settings
    secrets: dict[str, str]
    generation: int
    reload_failed: bool
    journal: str | None


class Reload(Struct, tag="reload", frozen=True):
    """Swap in another configuration, the one of this generation. Answer: None."""

    settings: Settings
    secrets: dict[str, str]
    generation: int


class ReloadFailed(Struct, tag="reload_failed", frozen=True):
    """A configuration was unfit. Answer: None."""


class Report(Struct, tag="report", frozen=True):
    """Answer: a `Reported`."""


class Drain(Struct, tag="drain", frozen=True):
    """Stop being ready, let what runs end, and exit. There is no answer."""


class Hurry(Struct, tag="hurry", frozen=True):
    """End what runs now. There is no answer."""


Question = Start | Reload | ReloadFailed | Report | Drain | Hurry


class Reported(Struct, frozen=True):
    """How a worker is: its metrics (telemetry.snapshot), why it isn't ready, and whether it has the ledger."""

    snapshot: bytes
    not_ready: list[str]
    connected: bool


QUESTIONS: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_ENCODER = msgspec.msgpack.Encoder()


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
        data = _ENCODER.encode(message)
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def receive(self) -> bytes:
        """The next frame. ConnectionError if the other end is gone."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            return await self._reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the other end is gone") from error

    def close(self) -> None:
        """Hang up."""
        self._writer.close()
