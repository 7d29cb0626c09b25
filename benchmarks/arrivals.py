"""The client of whole answers at a chosen rate: open-loop, Poisson arrivals, on sockets that are kept.

A request's latency counts from when it was due and not from when it could be sent, so an answer that is late makes those
behind it late too. A loop around select() is used because asyncio's timers are no finer than a millisecond.
"""

import random
import re
import select
import socket
import time
from collections import deque

CONNECTIONS = 64
SEED = 1

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def latencies_s(port: int, request: bytes, per_s: float, seconds: float) -> list[float]:
    """The latencies of requests that arrive for so long, `per_s` of them on average."""
    idle = [_connected(port) for _ in range(CONNECTIONS)]
    busy: dict[socket.socket, float] = {}
    waiting: deque[float] = deque()
    latencies: list[float] = []
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
                latencies.append(time.perf_counter() - busy.pop(client))
                idle.append(client)
            now = time.perf_counter()
    finally:
        for client in (*idle, *busy):
            client.close()
    return latencies


def _connected(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def _take(client: socket.socket) -> None:
    """Read a whole answer, by its Content-Length or its chunks (RFC 9112, section 6.3)."""
    data = _received(client)
    while b"\r\n\r\n" not in data:
        data += _received(client)
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"refused: {data[:300]!r}")
    length = _LENGTH.search(head)
    while len(body) < int(length[1]) if length else not body.endswith(b"0\r\n\r\n"):
        body += _received(client)


def _received(client: socket.socket) -> bytes:
    data = client.recv(65_536)
    if not data:
        raise RuntimeError("the proxy closed the connection in an answer")
    return data
