"""The least that a proxy on this event loop can cost: `python -m benchmarks.pipe PORT UPSTREAM_PORT [PORT UPSTREAM_PORT]`.

Two sockets joined: what one receives the other is written. It knows no HTTP, a connection upstream belongs to one client, and
no end waits for one that doesn't keep up.
"""

import argparse
import asyncio
from typing import cast

import uvloop


class End(asyncio.Protocol):
    """One end of a pipe. What comes before the other end is there waits."""

    other: asyncio.Transport | None = None

    def __init__(self) -> None:
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early.append(data)
        else:
            self.other.write(data)

    def connection_lost(self, _exc: Exception | None) -> None:
        if self.other is not None:
            self.other.close()


async def serve(pairs: list[tuple[int, int]]) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    joining: set[asyncio.Task[None]] = set()

    async def join(client: End, upstream_port: int) -> None:
        _, upstream = await loop.create_connection(End, "127.0.0.1", upstream_port)
        upstream.other, client.other = client.transport, upstream.transport
        client.other.writelines(client.early)

    def accept(upstream_port: int) -> End:
        client = End()
        task = loop.create_task(join(client, upstream_port))
        joining.add(task)
        task.add_done_callback(joining.discard)
        return client

    for port, upstream_port in pairs:
        await loop.create_server(lambda to=upstream_port: accept(to), "127.0.0.1", port, backlog=4096)  # type: ignore[misc]
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipe", description="Two sockets joined, and nothing more."
    )
    parser.add_argument("ports", nargs="+", type=int, metavar="PORT UPSTREAM_PORT", help="in pairs, on loopback")
    ports = parser.parse_args().ports
    if len(ports) % 2:
        parser.error("a PORT has no UPSTREAM_PORT")
    uvloop.run(serve(list(zip(ports[::2], ports[1::2], strict=True))))
