"""One seed is one history, byte for byte, in one process or in another."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshproxy.policy.principal import KeyChange
from simulation.drawing import draw
from simulation.run import Left, World, run
from simulation.story import played

ROOT = Path(__file__).parents[2]
SEEDS = (1, 2, 3)
CONFIGURATION = """
[server]
drain_grace_s = 0
[redis]
url = "redis://store"
[upstreams.openai]
kind = "openai"
base_url = "http://provider/v1"
[models."openai/gpt-4o"]
upstreams = [{ upstream = "openai", model = "gpt-4o" }]
input_usd_per_mtok = "2.50"
output_usd_per_mtok = "10.00"
"""
ANSWER = {
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
}


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A provider that thinks for 0.3 s."""
    body = json.dumps(ANSWER).encode()
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
        except (asyncio.IncompleteReadError, ConnectionError):
            break
        await asyncio.sleep(0.3)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
    writer.close()


async def ask(world: World, port: int, secret: str) -> bytes:
    """A client that asks once, and all that it gets."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {secret}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        got = await reader.read(-1)
    except ConnectionError:
        got = b""
    writer.close()
    world.note(f"a client got {got!r}")
    return got


async def story(world: World) -> list[bytes]:
    """Two workers and four clients; one worker is killed in the middle and started again, and all reload."""
    await world.spawn(world.process("provider"), asyncio.start_server(answer, "provider", 80))
    gateway = await world.start_gateway(CONFIGURATION, workers=2)
    administration = await gateway.administration()
    secret = (await administration.create_key("acme", KeyChange()))["key"]
    await administration.ledger.grant("acme", 25_000_000_000)
    ports = [instance.port for instance in gateway.instances]
    asking = [asyncio.create_task(ask(world, ports[at % 2], secret)) for at in range(4)]
    await asyncio.sleep(0.3)
    gateway.instances[0].kill()
    await gateway.instances[0].restart()
    gateway.reload()
    got = await asyncio.gather(*asking)
    return [*got, await ask(world, ports[0], secret)]


async def proxied(world: World) -> str:
    """A client behind a balancer that sends a PROXY header: the address that the gateway logs."""
    text = CONFIGURATION.replace("[server]", "[server]\nproxy_protocol = true\ntrusted_proxies = ['10.0.0.0/8']")
    gateway = await world.start_gateway(text)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.instances[0].port)
    writer.write(b"PROXY TCP4 1.2.3.4 5.6.7.8 1111 80\r\n")
    await asyncio.sleep(0.1)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer rsk_x\r\ncontent-type: application/json\r\n"
    writer.write(head + b"connection: close\r\ncontent-length: 2\r\n\r\n{}")
    await reader.read(-1)
    (line,) = [entry for _, entry in world.log if isinstance(entry, bytes)]
    return json.loads(line)["client"]


async def supervised(world: World) -> list[bytes]:
    """A supervisor with two workers, one of which is killed in the middle, and a reload of both."""
    await world.spawn(world.process("provider"), asyncio.start_server(answer, "provider", 80))
    gateway = await world.start_gateway(CONFIGURATION, supervised=2)
    (instance,) = gateway.instances
    administration = await gateway.administration()
    secret = (await administration.create_key("acme", KeyChange()))["key"]
    await administration.ledger.grant("acme", 25_000_000_000)
    asking = [asyncio.create_task(ask(world, instance.port, secret)) for _ in range(6)]
    await asyncio.sleep(0.3)
    world.kill(instance.workers[0])
    await asyncio.gather(*asking)
    await asyncio.sleep(2)
    gateway.reload()
    await asyncio.sleep(1)
    return [await ask(world, instance.port, secret) for _ in range(4)]


@pytest.mark.parametrize("story", [story, supervised])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_gives_one_transcript_in_one_process(seed, story):
    assert run(seed, story).transcript == run(seed, story).transcript


@pytest.mark.parametrize("seed", SEEDS)
def test_a_balancer_s_header_names_the_client(seed):
    assert run(seed, proxied).result == "1.2.3.4"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_supervisor_starts_a_killed_worker_again(seed):
    assert [got[:15] for got in run(seed, supervised).result] == [b"HTTP/1.1 200 OK"] * 4


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drained_supervisor_leaves_nothing_but_what_the_killed_worker_held(seed):
    left = run(seed, supervised).left
    assert left == Left([], [], [], [], left.holds, left.slots, [])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_gives_one_transcript_in_fresh_interpreters(seed):
    first, second = [
        subprocess.run(
            [sys.executable, __file__, str(seed)],
            env={**os.environ, "PYTHONHASHSEED": hashed, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for hashed in ("1", "2")
    ]
    assert first == second


def test_histories_depend_neither_on_hashes_nor_on_histories_before():
    first, second = [
        subprocess.run(
            [sys.executable, __file__, "histories", step],
            env={**os.environ, "PYTHONHASHSEED": hashed, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for hashed, step in (("1", "1"), ("2", "-1"))
    ]
    assert first == second


def test_seeds_give_different_transcripts():
    assert run(1, story).transcript != run(2, story).transcript


def test_a_killed_worker_leaves_its_clients_without_an_answer_and_its_successor_serves():
    outcome = run(1, story)
    assert [b"200 OK" in got for got in outcome.result] == [False, True, False, True, True]


def test_a_drained_gateway_leaves_nothing_but_what_the_killed_worker_held():
    left = run(1, story).left
    assert left == Left([], [], [], [], left.holds, left.slots, [])


def digests(step: int) -> list[str]:
    """What came of some histories, played forwards or backwards, by seed."""
    seeds = range(30)[::step]
    return sorted(f"{seed} {played(draw(seed)).outcome.transcript}" for seed in seeds)


if __name__ == "__main__":
    print(
        "\n".join(digests(int(sys.argv[2])) if sys.argv[1] == "histories" else run(int(sys.argv[1]), story).transcript)
    )
