"""A gateway in a process of its own, so that its memory, its descriptors and its time can be told from the test's.

Prints its port, then serves until its standard input ends; each line there is answered with what lives in it. It is told
`{"settings": {...}}` in its argument.
"""

import asyncio
import gc
import json
import sys

import msgspec
import uvloop

from meshproxy.app.application import DataListener
from meshproxy.app.worker import Worker
from meshproxy.config import Settings
from meshproxy.server.listener import listen
from meshproxy.telemetry.logs import RequestLog, configure


def living(worker: Worker) -> dict[str, int]:
    """How much there is of what must not grow."""
    gc.collect()
    return {
        "tasks": len(asyncio.all_tasks()),
        "spawned": len(worker.tasks),
        "in_flight": worker.recorder.in_flight,
        "leases": len(worker.live.leases),
        "relays": len(worker.live.relays),
        "recordings": len(worker.live.recordings),
        "journal": len(worker.journal),
        "objects": len(gc.get_objects()),
    }


async def main(told) -> None:
    configure("error", "json", sys.stderr.buffer)
    worker = Worker(msgspec.convert(told["settings"], Settings), {"sim": "sk-provider"}, RequestLog(level="error"))
    await worker.start()
    sock = listen("127.0.0.1:0")
    listener = DataListener(worker, sock)
    await listener.start()
    sys.stdout.write(f"{sock.getsockname()[1]}\n")
    sys.stdout.flush()
    while await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.write(json.dumps(living(worker)) + "\n")
        sys.stdout.flush()
    await listener.close()
    await worker.stop()


if __name__ == "__main__":
    uvloop.run(main(json.loads(sys.argv[1])))
