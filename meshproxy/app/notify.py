"""Word to systemd of what this process is doing: the datagrams of sd_notify(3), for a unit of Type=notify."""

import contextlib
import os
import socket
import time

READY = "READY=1"
STOPPING = "STOPPING=1"
MAX_STATUS_CHARS = 1000  # the whole datagram is lost where it is larger than the socket takes


def notify(*states: str) -> None:
    """Send states to whoever started us and asked for them; do nothing if nobody did."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    name = f"\0{address[1:]}" if address.startswith("@") else address  # @: an abstract socket
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(name)
        sock.sendall("\n".join(states).encode())


def reloading() -> str:
    """The state of a reload that begins now; READY ends it. Type=notify-reload wants the time with it."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def status(text: str) -> str:
    """One line that `systemctl status` shows."""
    return "STATUS=" + " ".join(text.split())[:MAX_STATUS_CHARS]
