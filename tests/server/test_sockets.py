import socket
from contextlib import ExitStack, closing

import pytest

from meshproxy.server.listener import listen, listen_shared, name_of


@pytest.fixture
def stack():
    with ExitStack() as made:
        yield made


@pytest.fixture
def opened(stack):
    """Listen until the test is over."""

    def open_one(address, **options):
        return stack.enter_context(closing(listen(address, **options)))

    return open_one


def connects(sock):
    with socket.socket(sock.family, socket.SOCK_STREAM) as client:
        client.connect(sock.getsockname())
    return True


def test_a_port(opened):
    sock = opened("127.0.0.1:0")
    assert connects(sock)
    assert not sock.getblocking()
    assert name_of(sock) == f"127.0.0.1:{sock.getsockname()[1]}"


def test_ipv6(opened):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    sock = opened("[::1]:0")
    assert connects(sock)
    assert name_of(sock) == f"[::1]:{sock.getsockname()[1]}"


def test_every_interface(opened):
    assert name_of(opened(":0")).rpartition(":")[0] in {"0.0.0.0", "[::]"}


def test_a_port_that_is_taken(opened):
    taken = opened("127.0.0.1:0")
    with pytest.raises(OSError, match="in use"):
        listen(name_of(taken))


def test_workers_share_a_port(stack):
    socks = [stack.enter_context(closing(sock)) for sock in listen_shared("127.0.0.1:0", 3)]
    assert len({sock.getsockname() for sock in socks}) == 1
    assert all(connects(sock) for sock in socks)


def test_workers_do_not_share_with_a_stranger(stack, opened):
    stranger = opened("127.0.0.1:0", shared=True)
    with pytest.raises(OSError, match="in use"):
        listen_shared(name_of(stranger), 2)


def test_a_unix_socket(opened, tmp_path):
    address = f"unix:{tmp_path}/s"
    sock = opened(address)
    assert connects(sock)
    assert name_of(sock) == address


def test_workers_have_one_unix_socket(stack, tmp_path):
    first, second = listen_shared(f"unix:{tmp_path}/s", 2)
    stack.enter_context(closing(first))
    assert first is second


def test_a_stale_socket_file_is_replaced(opened, tmp_path):
    address = f"unix:{tmp_path}/s"
    listen(address).close()
    assert connects(opened(address))


def test_a_socket_that_is_listened_at_is_left_alone(opened, tmp_path):
    address = f"unix:{tmp_path}/s"
    sock = opened(address)
    with pytest.raises(OSError, match="in use"):
        listen(address)
    assert connects(sock)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    (tmp_path / "s").write_text("mine")
    with pytest.raises(OSError, match="in use"):
        listen(f"unix:{tmp_path}/s")
    assert (tmp_path / "s").read_text() == "mine"
