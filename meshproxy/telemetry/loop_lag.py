"""How late the event loop is: a timer that notes by how much it woke after its time.

Whatever holds the loop up (a long render, a slow regex, a starved CPU) delays every stream by as much. uvloop's timers
count whole milliseconds, so under it a lag below 1 ms is noise.
"""

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.25


async def watch(observe: Callable[[float], None]) -> None:
    """Observe the lag in seconds every INTERVAL_S until cancelled."""
    now = asyncio.get_running_loop().time
    while True:
        due = now() + INTERVAL_S
        await asyncio.sleep(INTERVAL_S)
        observe(max(0.0, now() - due))
