"""An answer that has begun: its status, its headers, and its body pushed to a `Sink` or read whole.

Until someone takes the body, what arrives is kept here, and reading stops when that is more than `MAX_EARLY_BYTES`.
"""

import asyncio
from typing import Protocol

from meshproxy.errors import UpstreamFault
from meshproxy.upstream import faults

MAX_EARLY_BYTES = 65_536


class Sink(Protocol):
    """Where a streamed body goes. Called from the event loop as bytes arrive, and not once more after `Response.close()`.

    Exactly one of `end` and `fail` comes last. A sink may pause, resume and close its response from within a call.
    """

    def data(self, payload: bytes, frame: bytes | None) -> None:
        """Body bytes, never none. `frame`: the very object read from the socket, if it was whole chunks and nothing else."""

    def end(self) -> None:
        """The body is whole."""

    def fail(self, fault: UpstreamFault) -> None:
        """The body will never be whole."""


class Flow(Protocol):
    """What a response needs of its connection while the body isn't whole."""

    sink: Sink

    def pause(self) -> None:
        """Read no more from the socket."""

    def resume(self) -> None:
        """Read on."""

    def abort(self) -> None:
        """Close the socket at once."""


class Response:
    """One answer of a provider. Names of headers are lower-case.

    It is its own connection's sink until `relay` or `read` names another.
    """

    def __init__(self, status: int, headers: list[tuple[str, str]], flow: Flow | None, max_bytes: int) -> None:
        self.status = status
        self.headers = headers
        self._flow = flow
        self._max_bytes = max_bytes
        self._early: list[tuple[bytes, bytes | None]] = []
        self._early_bytes = 0
        self._fault: UpstreamFault | None = None
        self._listener: asyncio.Future[None] | None = None
        self._closed = False

    @classmethod
    def whole(cls, status: int, headers: list[tuple[str, str]], body: bytes) -> "Response":
        """A response that is all here, without a connection."""
        made = cls(status, headers, None, len(body))
        made.data(body, None)
        return made

    def header(self, name: str) -> str | None:
        """The first value of the header `name` (lower-case)."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    async def read(self) -> bytes:
        """The whole body; UpstreamFault if it breaks off or is larger than the settings allow."""
        if self._flow is None and self._fault is None and self._early_bytes <= self._max_bytes:  # it came with its head
            return b"".join([payload for payload, _ in self._early])
        whole = _Whole(self, self._max_bytes)
        self.relay(whole)
        try:
            return await whole.result
        except asyncio.CancelledError:
            self.close()
            raise

    def early(self, since: int = 0) -> list[bytes]:
        """What of the body has arrived before anyone took it, from the piece with the number `since` on."""
        return [payload for payload, _ in self._early[since:]]

    @property
    def goes_on(self) -> bool:
        """Whether more of the body may come before it is taken: it isn't over, and no more has come than is kept."""
        return self._flow is not None and self._early_bytes <= MAX_EARLY_BYTES

    @property
    def ended(self) -> bool:
        """Whether the body is over: whole, or broken off by `fault`."""
        return self._flow is None

    @property
    def fault(self) -> UpstreamFault | None:
        """What broke the body off before anyone took it."""
        return self._fault

    async def hear(self, timeout_s: float) -> None:
        """Return when another piece of the body or its end has come, or after `timeout_s`. One caller at a time."""
        loop = asyncio.get_running_loop()
        self._listener = loop.create_future()
        timer = loop.call_later(timeout_s, self._tell)
        try:
            await self._listener
        finally:
            timer.cancel()
            self._listener = None

    def relay(self, sink: Sink) -> None:
        """Push the body to `sink` from now on. What has arrived is pushed, end or failure included, before this returns."""
        if self._early_bytes > MAX_EARLY_BYTES:
            self.resume()
        early, self._early, self._early_bytes = self._early, [], 0
        for payload, frame in early:
            if self._closed:
                return
            sink.data(payload, frame)
        if self._closed:
            return
        if self._flow is not None:
            self._flow.sink = sink
        elif self._fault is not None:
            sink.fail(self._fault)
        else:
            sink.end()

    def pause(self) -> None:
        """Read no more from the socket. What was read before still comes. Not counted as the provider's silence."""
        if self._flow is not None:
            self._flow.pause()

    def resume(self) -> None:
        """Read on after `pause`."""
        if self._flow is not None:
            self._flow.resume()

    def close(self) -> None:
        """Want no more. An unfinished answer's socket is closed at once, so that the provider stops; else does nothing."""
        self._closed = True
        self._early.clear()
        flow, self._flow = self._flow, None
        if flow is not None:
            flow.abort()

    def detach(self) -> None:
        """For the connection: the exchange is over, and the connection no longer this response's to touch."""
        self._flow = None

    def data(self, payload: bytes, frame: bytes | None) -> None:
        """Keep what arrives before anyone wants it."""
        self._early.append((payload, frame))
        self._early_bytes += len(payload)
        if self._early_bytes > MAX_EARLY_BYTES:
            self.pause()
        self._tell()

    def end(self) -> None:
        """The body was whole before anyone wanted it; being detached says so."""
        self._tell()

    def fail(self, fault: UpstreamFault) -> None:
        """The body broke off before anyone wanted it."""
        self._fault = fault
        self._tell()

    def _tell(self) -> None:
        """Wake who listens."""
        if self._listener is not None and not self._listener.done():
            self._listener.set_result(None)


class _Whole:
    """The sink that `Response.read` waits for."""

    def __init__(self, response: Response, max_bytes: int) -> None:
        self.result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._response = response
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []

    def data(self, payload: bytes, frame: bytes | None) -> None:  # noqa: ARG002  # frames are for those who relay
        self._left -= len(payload)
        if self._left < 0:
            self._response.close()
            self.fail(faults.too_large(self._max_bytes))
        else:
            self._pieces.append(payload)

    def end(self) -> None:
        if not self.result.done():
            self.result.set_result(b"".join(self._pieces))

    def fail(self, fault: UpstreamFault) -> None:
        if not self.result.done():
            self.result.set_exception(fault)
