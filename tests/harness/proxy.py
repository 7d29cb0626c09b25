"""A wire that can be made to fail: a TCP proxy which passes bytes on until the moment that its fault names, and then resets,
closes, dawdles or falls silent there. The fault can be changed while connections are open. Where callers speak TLS to it, it
strikes within what they say.
"""

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

from tests.harness.waiting import turns

READ_BYTES = 65_536
DELAY_S = 0.05
DRIP_BYTES, DRIP_S = 64, 0.001
MODES = ("delay", "reset", "half-close", "truncate", "drip", "blackhole")
TLS_MODES = ("reset", "half-close", "truncate", "garbage", "blackhole")
FORGED_RECORDS = (
    b"\x17\x03\x03\x00\x20" + bytes(32)
) * 100  # of TLS: application data that no key has sealed (RFC 8446, section 5.2)
FLUSH_TURNS = 3  # in which a transport passes on what was written to it

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Position = Callable[[bytes], int | None]


class GatewayError(NamedTuple):
    """What is done, and where: in the bytes `towards` one end, at the position that `at` finds in all that were seen since the
    fault was set, or None while it isn't there. Without `at` it is done to a connection as soon as it is made. `after`: look
    only once these bytes have gone the other way. `lasting`: done to every connection, and not once.

    delay: a pause, then all goes on. reset: RST to both ends. half-close: nothing but an end comes that way any more, and
    the other way goes on; under TLS it comes without close_notify, as from someone who cuts the wire. truncate: both ends see
    an orderly close. drip: from there on a few bytes at a time. garbage: a forged record of TLS, and nothing more that way.
    blackhole: not a word either way, and no end of it.
    """

    mode: str
    towards: str = "target"
    at: Position | None = None
    after: bytes = b""
    lasting: bool = False


class FaultProxy:
    """Listens, and connects each caller to the target. `gateway`: which of the ends ("caller" or "target") is the one that is
    tested; it alone can end a connection that was swallowed.
    """

    def __init__(self, *, gateway: str) -> None:
        self.fault: GatewayError | None = None
        self.struck = 0
        self.gateway = gateway
        self._pairs: dict[asyncio.Task[None], _Pair] = {}

    def leads_to(self, connect: Callable[[], Awaitable[Ends]]) -> None:
        """Where callers are connected to."""
        self._connect = connect

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        self.cut()
        if self._pairs:
            await asyncio.wait(list(self._pairs))

    def cut(self) -> None:
        """Reset every connection."""
        for pair in self._pairs.values():
            pair.reset()

    async def strike(self, mode: str, towards: str) -> None:
        """Do it now, to every connection that is open."""
        self.struck += 1
        for pair in list(self._pairs.values()):
            await pair.strike(mode, towards)

    def take(self) -> GatewayError | None:
        """The fault, which is to be done now."""
        fault = self.fault
        self.struck += 1
        if fault is not None and not fault.lasting:
            self.fault = None
        return fault

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        pair = self._pairs[task] = _Pair(self, (reader, writer), await self._connect())
        try:
            await pair.run()
        finally:
            del self._pairs[task]


class _Pair:
    """One connection, and its twin on the other side."""

    def __init__(self, proxy: FaultProxy, caller: Ends, target: Ends) -> None:
        self._proxy = proxy
        self._ends = {"caller": caller, "target": target}
        self._silent = False
        self._passed: dict[str, bytes] = {"caller": b"", "target": b""}
        self._of: GatewayError | None = None

    async def run(self) -> None:
        try:
            fault = self._proxy.fault
            dripping = False
            if fault is not None and fault.at is None:
                self._proxy.take()
                dripping = await self.strike(fault.mode, "target")
            ways = [asyncio.create_task(self._pass(towards, dripping=dripping)) for towards in self._ends]
            done, pending = await asyncio.wait(ways)
            assert not pending
            for way in done:
                way.result()
        finally:
            for _, writer in self._ends.values():
                writer.close()

    def reset(self) -> None:
        for _, writer in self._ends.values():
            if (sock := writer.get_extra_info("socket")) is not None:  # not lost under TLS already
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _pass(self, towards: str, *, dripping: bool) -> None:
        """Everything that goes one way, to its end."""
        source = "caller" if towards == "target" else "target"
        reader, writer = self._ends[source][0], self._ends[towards][1]
        dropping = False
        try:
            while data := await reader.read(READ_BYTES):
                if self._silent or dropping or writer.is_closing():
                    continue
                before, rest = self._split(towards, data)
                await self._send(writer, before, dripping=dripping)
                if rest is None:
                    continue
                fault = self._proxy.take()
                assert fault is not None
                dripping = await self.strike(fault.mode, towards)
                dropping = fault.mode not in ("delay", "drip")
                if not dropping:
                    await self._send(writer, rest, dripping=dripping)
        except OSError:  # TLS's own errors among them
            if not self._silent:
                self.reset()
        if self._silent:
            if source == self._proxy.gateway:
                self.reset()
        elif not writer.is_closing():
            with suppress(OSError):
                end(writer)

    def _split(self, towards: str, data: bytes) -> tuple[bytes, bytes | None]:
        """What goes on as it is, and what lies behind the place of the fault; None if it isn't reached."""
        fault = self._proxy.fault
        if fault is not self._of:
            self._of, self._passed = fault, {"caller": b"", "target": b""}
        if fault is None or fault.at is None:
            return data, None
        other = self._passed["target"]
        if towards != fault.towards or (fault.after and fault.after not in other):
            if towards != fault.towards:
                self._passed[towards] += data
            return data, None
        passed = self._passed[towards]
        self._passed[towards] = seen = passed + data
        at = fault.at(seen)
        if at is None or at > len(seen):
            return data, None
        cut = max(at - len(passed), 0)
        return data[:cut], data[cut:]

    async def _send(self, writer: asyncio.StreamWriter, data: bytes, *, dripping: bool) -> None:
        if writer.is_closing() or not data:
            return
        step = DRIP_BYTES if dripping else len(data)
        for start in range(0, len(data), step):
            writer.write(data[start : start + step])
            if dripping:
                await asyncio.sleep(DRIP_S)  # noqa: TID251 - the fault itself

    async def strike(self, mode: str, towards: str) -> bool:
        """Do it. Whether from here on all goes drop by drop."""
        if mode == "delay":
            await asyncio.sleep(DELAY_S)  # noqa: TID251 - the fault itself
        elif mode == "reset":
            self.reset()
        elif mode == "half-close":
            await half_close(self._ends[towards][1])
        elif mode == "garbage":
            with await beneath(self._ends[towards][1]) as wire:
                wire.send(FORGED_RECORDS)
        elif mode == "truncate":
            for _, writer in self._ends.values():
                writer.close()
        elif mode == "blackhole":
            self._silent = True
        return mode == "drip"


def end(writer: asyncio.StreamWriter) -> None:
    """An orderly end; TLS knows none that leaves the other way open."""
    if writer.can_write_eof():
        writer.write_eof()
    else:
        writer.close()


async def beneath(writer: asyncio.StreamWriter) -> socket.socket:
    """The socket below the transport, and below its TLS, when what was written has gone."""
    await turns(FLUSH_TURNS)
    return socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))


async def half_close(writer: asyncio.StreamWriter) -> None:
    """An end of this way alone."""
    if writer.can_write_eof():
        writer.write_eof()
    else:
        await cut_short(writer)


async def cut_short(writer: asyncio.StreamWriter) -> None:
    """An end of TCP, without a goodbye of TLS."""
    with await beneath(writer) as wire:
        wire.shutdown(socket.SHUT_WR)
