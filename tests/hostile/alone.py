"""A gateway in a process of its own, so that its memory, its descriptors and its time can be told from the test's.

Prints its port, then serves until its standard input ends. It is told `{"settings": {...}, "descriptors": N}` in its argument.
"""

import asyncio
import json
import resource
import sys

import msgspec
import uvloop

from meshproxy.app.data_listener import DataListener
from meshproxy.app.worker import Worker
from meshproxy.config import Settings
from meshproxy.server.sockets import listen
from meshproxy.telemetry.logs import RequestLog


async def main(told) -> None:
    worker = Worker(msgspec.convert(told["settings"], Settings), {"sim": "sk-provider"}, RequestLog(level="error"))
    await worker.start()
    sock = listen("127.0.0.1:0")
    listener = DataListener(worker, sock)
    await listener.start()
    if told["descriptors"] is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (told["descriptors"],) * 2)
    sys.stdout.write(f"{sock.getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await listener.close()
    await worker.stop()


if __name__ == "__main__":
    uvloop.run(main(json.loads(sys.argv[1])))
