"""What clients send never becomes a label: a running gateway is sent thousands of made-up names and has as many series as before.
tests/telemetry/test_metrics.py does the same to the counting itself, a hundred thousand times.
"""

import asyncio
import random
import re

from meshproxy.policy.principal import Limits
from meshproxy.telemetry.exposition import decode, render

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

ROUNDS = 150  # of twelve requests each
AT_ONCE = 25
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello there"}]


async def test_made_up_names_make_no_series(mesh):
    caller = await mesh.key(limits=Limits(requests_per_minute=1_000_000, tokens_per_minute=1_000_000_000))
    rng = random.Random(5)
    await one_of_each(mesh, caller, rng)
    before = await series(mesh)
    for _ in range(ROUNDS // AT_ONCE):
        await asyncio.gather(*(one_of_each(mesh, caller, rng) for _ in range(AT_ONCE)))
    assert await series(mesh) == before
    assert await answered(mesh) == 12 * (ROUNDS + 1)


async def one_of_each(mesh, caller, rng):
    def junk():
        return rng.randbytes(rng.randrange(1, 60)).hex()

    good = {"model": "sim/fast", "messages": HELLO}
    await mesh.chat(caller, model=junk())
    await mesh.chat(caller, model='a"} 1\nevil_total{x="' + junk())
    await mesh.chat(caller, model="sim/fast", models=[junk()])
    await mesh.chat(caller, model="sim/fast", template=junk())
    await mesh.chat(caller, model="sim/fast", transforms=[junk()])
    await mesh.chat(caller, model="sim/fast", session_id=junk(), user=junk(), **{junk(): junk()})
    await mesh.post(
        caller, good, headers={"x-request-id": junk(), "traceparent": f"00-{rng.randbytes(16).hex()}-{'1' * 16}-01"}
    )
    await mesh.post(caller, good, headers={"authorization": f"Bearer rsk_{junk()}"})
    await mesh.post(caller, rng.randbytes(100))
    await mesh.request("GET", f"/v1/{junk()}", headers=caller.auth)
    await mesh.request("GET", f"/v1/models/{junk()}/{junk()}", headers=caller.auth)
    await mesh.request(rng.choice(("PURGE", "LINK", "MKCOL")), CHAT, headers=caller.auth)


async def exposed(mesh):
    await mesh.quiet()
    text, _ = await render(decode(await mesh.worker.metrics.snapshot()), OPENMETRICS)
    return [line for line in text.decode().splitlines() if not line.startswith("#")]


async def series(mesh):
    """Names and labels of all there are. Those of one operation may come late: a key's lookup is repeated when it is stale."""
    names = {re.match(r"[^{ ]+({.*?})?(?= )", line)[0] for line in await exposed(mesh)}
    return {name for name in names if "_ledger_op_" not in name}


async def answered(mesh):
    lines = await exposed(mesh)
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("meshproxy_requests_total{"))
