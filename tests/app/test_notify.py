import socket

import pytest

from meshproxy.app.reload import READY, STOPPING, notify, reloading, status


def listening(name):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(name)
    sock.settimeout(2)
    return sock


def test_a_socket_file(tmp_path, monkeypatch):
    with listening(str(tmp_path / "notify")) as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify(READY, "STATUS=up")
        assert systemd.recv(100) == b"READY=1\nSTATUS=up"


def test_an_abstract_socket(monkeypatch, tmp_path):
    with listening(f"\0{tmp_path}") as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{tmp_path}")
        notify(STOPPING)
        assert systemd.recv(100) == b"STOPPING=1"


def test_a_reload_is_dated():
    state, stamp = reloading().split("\n")
    assert state == "RELOADING=1"
    assert stamp.removeprefix("MONOTONIC_USEC=").isdigit()


@pytest.mark.parametrize("address", [None, "", "relative", "vsock:2:1234", "/nonexistent/notify"])
def test_without_systemd_nothing_happens(monkeypatch, address):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify(READY)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("up", "STATUS=up"), ("a\nREADY=1", "STATUS=a READY=1"), ("x" * 2000, "STATUS=" + "x" * 1000)],
)
def test_a_status_is_one_short_line(text, expected):
    assert status(text) == expected
