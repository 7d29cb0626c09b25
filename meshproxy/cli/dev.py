"""`meshproxy dev`: everything with nothing. A store, a simulated provider and the gateway over them, seeded, in one process."""

import argparse
import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec.structs import asdict

from meshproxy import app, config
from meshproxy.app.load import secrets_of
from meshproxy.cli.arguments import add_common, port
from meshproxy.cli.dev_greeting import Place, greeting
from meshproxy.cli.dev_settings import dev_settings
from meshproxy.cli.output import Failed, Misused, Output
from meshproxy.ledger.connection import Unavailable, connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.ledger import Ledger
from meshproxy.money import format_usd, parse_usd
from meshproxy.policy.template import Template
from meshproxy.upstream.simulator import start

ACCOUNT = "dev"
CREDIT_NUSD = parse_usd("25.00")
TEMPLATE = "greeter"
READY_S = 10.0
POLL_S = 0.02

EXAMPLES = """\
  meshproxy dev
  meshproxy dev --port 9000                           data on 9000, metrics and status on 9001
  OPENAI_API_KEY=sk-... meshproxy dev                 with the real models beside the simulated ones
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`dev [--port N]`"""
    parser.description = (
        "Run the gateway over an embedded store and a simulated provider, with a key, credit and a template,\n"
        "and print lines to paste. With OPENAI_API_KEY or OPENROUTER_API_KEY set, the real provider is there too.\n"
        "Nothing is kept when it ends. --config is not used."
    )
    add_common(parser, dev, examples=EXAMPLES)
    parser.add_argument(
        "--port", metavar="N", type=port, default=8080, help="metrics are on the next (default: 8080; 0: any free ones)"
    )


async def dev(args: argparse.Namespace, out: Output) -> None:
    """Serve until interrupted."""
    if args.port == 65535:
        raise Misused("argument --port: the next port is wanted too")
    async with _embedded() as store, _simulator() as simulator_url:
        settings = dev_settings(redis_url=store.url, simulator_url=simulator_url, port=args.port, env=os.environ)
        secret = await seed(settings.redis)

        async def on_ready(running: app.Running) -> None:
            await until_admitting(running.ledger)
            place = Place(
                base_url=f"http://{running.data_address}/v1",
                admin_url=f"http://{running.admin_address}/",
                redis_url=store.url,
                key=secret,
                account=ACCOUNT,
                balance_usd=format_usd(CREDIT_NUSD),
                template=TEMPLATE,
                model=settings.defaults.model,
                models=list(settings.models),
            )
            out.document(asdict(place)) if out.as_json else out.line(greeting(place))
            out.flush()

        try:
            await app.run(settings, secrets_of(settings), on_ready=on_ready)
        except OSError as error:
            raise Failed("cannot_listen", f"{settings.server.listen}: {error.strerror or error}") from error


async def until_admitting(ledger: Ledger) -> None:
    """Wait until the gateway has its link to the store, which it dials in the background."""
    try:
        async with asyncio.timeout(READY_S):
            while not await _admitting(ledger):  # noqa: ASYNC110 - the link tells nobody when it is up
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise Failed("ledger_unavailable", "the gateway got no link to its store") from error


async def _admitting(ledger: Ledger) -> bool:
    try:
        await ledger.balance(ACCOUNT)
    except Unavailable:
        return False
    return True


async def seed(redis: config.Redis) -> str:
    """An account with a key, credit and a template; the key's secret."""
    store = await connect(redis)
    try:
        directory = Directory(store)
        secret, _ = await directory.create_key(ACCOUNT, name="made by meshproxy dev")
        await Ledger(store).grant(ACCOUNT, CREDIT_NUSD, "made by meshproxy dev")
        await directory.put_template(greeter(time.time()))
    finally:
        await store.close()
    return secret


def greeter(now: float) -> Template:
    """A global template with one slot."""
    return Template(
        id=str(uuid.uuid4()),
        name=TEMPLATE,
        is_global=True,
        description="Says hello to somebody.",
        system="You are a friendly host. Answer in one short sentence.",
        messages=[{"role": "user", "content": "Please greet {{ name }}."}],
        created_at=now,
        updated_at=now,
    )


@asynccontextmanager
async def _embedded() -> AsyncIterator[Embedded]:
    store = Embedded()
    try:
        await store.start()
    except RuntimeError as error:
        raise Failed("no_store", str(error)) from error
    try:
        yield store
    finally:
        await store.stop()


@asynccontextmanager
async def _simulator() -> AsyncIterator[str]:
    simulator = await start()
    try:
        yield simulator.base_url
    finally:
        await simulator.close()
