import http.server
import json
import socketserver
import threading
from contextlib import contextmanager

import pytest

from meshproxy.cli.command_line import main


class Admin(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.status if self.path == "/readyz" else 404)
        self.end_headers()

    def address_string(self):
        return "-"

    def log_message(self, *args):
        pass


class Draining(Admin):
    status = 503


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def config(file):
    return lambda address: file(f'[server]\nadmin_listen = "{address}"\nadmin_token = {{ env = "UNUSED" }}\n')


def test_ready(config, capsys):
    server = http.server.HTTPServer(("127.0.0.1", 0), Admin)
    with serving(server):
        assert main(["healthcheck", "--config", config(f"0.0.0.0:{server.server_port}")]) == 0
    assert capsys.readouterr() == ("ready\n", "")


def test_not_ready(config, capsys):
    server = http.server.HTTPServer(("127.0.0.1", 0), Draining)
    with serving(server):
        address = f"127.0.0.1:{server.server_port}"
        assert main(["healthcheck", "--json", "--config", config(address)]) == 1
    assert json.loads(capsys.readouterr().err) == {"error": {"message": f"{address} answers 503", "code": "not_ready"}}


def test_nobody_there(config, capsys):
    server = http.server.HTTPServer(("127.0.0.1", 0), Admin)
    port = server.server_port
    server.server_close()
    assert main(["healthcheck", "--config", config(f"127.0.0.1:{port}")]) == 1
    assert capsys.readouterr().err == f"meshproxy: 127.0.0.1:{port} doesn't answer: [Errno 111] Connection refused\n"


def test_over_a_unix_socket(config, tmp_path, capsys):
    server = socketserver.UnixStreamServer(str(tmp_path / "admin.sock"), Admin)
    with serving(server):
        assert main(["healthcheck", "--json", "--config", config(f"unix:{tmp_path}/admin.sock")]) == 0
    assert json.loads(capsys.readouterr().out) == {"ready": True, "address": f"unix:{tmp_path}/admin.sock"}
