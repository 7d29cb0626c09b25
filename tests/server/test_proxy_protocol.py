import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.server.client_address import MAX_V2_BYTES, SIGNATURE, InvalidProxyHeader, read_source


class Wire:
    """Bytes to be received, and how many were taken."""

    def __init__(self, data):
        self.data = data
        self.taken = 0

    async def receive(self, size):
        if self.taken + size > len(self.data):
            raise InvalidProxyHeader("the connection ended in its header")
        self.taken += size
        return self.data[self.taken - size : self.taken]


async def read(header, rest=b"GET / HTTP/1.1\r\n"):
    wire = Wire(header + rest)
    source = await read_source(wire.receive)
    assert len(header) == wire.taken
    return source


def v2(command, family, addresses):
    return SIGNATURE + struct.pack("!BBH", command, family, len(addresses)) + addresses


def tcp4(source, port):
    return socket.inet_aton(source) + socket.inet_aton("10.0.0.1") + struct.pack("!HH", port, 443)


def tcp6(source, port):
    return socket.inet_pton(socket.AF_INET6, source) + bytes(16) + struct.pack("!HH", port, 443)


@pytest.mark.parametrize(
    "line, expected",
    [
        (b"PROXY TCP4 203.0.113.7 10.0.0.1 56324 443\r\n", ("203.0.113.7", 56324)),
        (b"PROXY TCP6 2001:db8::1 ::1 65535 443\r\n", ("2001:db8::1", 65535)),
        (b"PROXY UNKNOWN\r\n", None),
        (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None),
    ],
)
async def test_version_1(line, expected):
    assert await read(line) == expected


@pytest.mark.parametrize(
    "header, expected",
    [
        (v2(0x21, 0x11, tcp4("203.0.113.7", 56324)), ("203.0.113.7", 56324)),
        (v2(0x21, 0x11, tcp4("203.0.113.7", 1) + b"\x04\x00\x01x"), ("203.0.113.7", 1)),
        (v2(0x21, 0x21, tcp6("2001:db8::1", 2)), ("2001:db8::1", 2)),
        (v2(0x20, 0x11, tcp4("203.0.113.7", 1)), None),
        (v2(0x20, 0x00, b""), None),
        (v2(0x21, 0x31, bytes(216)), None),
    ],
)
async def test_version_2(header, expected):
    assert await read(header) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PROXY TCP4 203.0.113.7 10.0.0.1 56324\r\n",
        b"PROXY TCP4 2001:db8::1 10.0.0.1 56324 443\r\n",
        b"PROXY TCP4 203.0.113.7 10.0.0.1 65536 443\r\n",
        b"PROXY TCP4 203.0.113.7 10.0.0.1 -1 443\r\n",
        b"PROXY TCP5 203.0.113.7 10.0.0.1 1 443\r\n",
        b"PROXY TCP4 \xff 10.0.0.1 1 443\r\n",
        b"PROXY " + b"x" * 200 + b"\r\n",
        v2(0x11, 0x11, tcp4("203.0.113.7", 1)),
        v2(0x22, 0x11, tcp4("203.0.113.7", 1)),
        v2(0x21, 0x11, tcp4("203.0.113.7", 1)[:-1]),
        v2(0x21, 0x21, tcp4("203.0.113.7", 1)),
        v2(0x21, 0x11, bytes(MAX_V2_BYTES + 1)),
        v2(0x21, 0x11, tcp4("203.0.113.7", 1))[:-1],
    ],
)
async def test_what_is_no_header(data):
    with pytest.raises(InvalidProxyHeader):
        await read_source(Wire(data).receive)


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda tail: SIGNATURE + tail),
                 st.binary(max_size=120).map(lambda tail: b"PROXY TCP4 " + tail + b"\r\n")))  # fmt: skip
async def test_any_bytes_are_a_source_or_refused(data):
    try:
        source = await read_source(Wire(data).receive)
    except InvalidProxyHeader:
        return
    assert source is None or ipaddress.ip_address(source[0])
