"""The client of whole answers at a chosen rate: open-loop, Poisson arrivals, on sockets that are kept.

A request's latency counts from when it was due and not from when it could be sent, so an answer that is late makes those
behind it late too. A loop around select() is used because asyncio's timers are no finer than a millisecond.
"""

import random
import select
import socket
import time
from collections import deque

CONNECTIONS = 64
SEED = 1


def latencies_s(port: int, request: bytes, per_s: float, seconds: float) -> list[float]:
    """The latencies of requests that arrive for so long, `per_s` of them on average."""
    idle = [_connected(port) for _ in range(CONNECTIONS)]
    busy: dict[socket.socket, float] = {}
    waiting: deque[float] = deque()
    found: list[float] = []
    arrivals = random.Random(SEED)
    now = time.perf_counter()
    end = now + seconds
    due = now + arrivals.expovariate(per_s)
    try:
        while due < end or busy or waiting:
            while due <= now and due < end:
                waiting.append(due)
                due += arrivals.expovariate(per_s)
            while waiting and idle:
                client = idle.pop()
                busy[client] = waiting.popleft()
                client.sendall(request)
            pause_s = max(due - time.perf_counter(), 0.0) if due < end else 1.0
            for client in select.select(list(busy), [], [], pause_s)[0]:
                _take(client)
                found.append(time.perf_counter() - busy.pop(client))
                idle.append(client)
            now = time.perf_counter()
    finally:
        for client in (*idle, *busy):
            client.close()
    return found


def _connected(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def _take(client: socket.socket) -> None:
    """Read a whole answer; they end in the same bytes, so no length need be parsed."""
    data = client.recv(65_536)
    if not data.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"refused: {data[:300]!r}")
    while not data.endswith((b"}\r\n0\r\n\r\n", b"}")):
        piece = client.recv(65_536)
        if not piece:
            raise RuntimeError("the proxy closed the connection in an answer")
        data += piece
