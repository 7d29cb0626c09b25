"""`meshproxy dev`: everything with nothing. A store, a simulated provider and the gateway over them, seeded, in one process."""

import argparse
import contextlib
import os
import time
import uuid

from meshproxy import config
from meshproxy.app.load import filled
from meshproxy.app.process import run
from meshproxy.cli.arguments import make_command, port
from meshproxy.cli.dev_greeting import greeting
from meshproxy.cli.dev_settings import dev_settings
from meshproxy.cli.output import Failed, Misused, Output
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.ledger import Ledger
from meshproxy.money import parse_usd
from meshproxy.policy.template import Template
from meshproxy.upstream.simulator import start

ACCOUNT = "dev"
CREDIT_USD = "25.00"
TEMPLATE = "greeter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`dev [--port N]`"""
    make_command(parser, dev)
    parser.add_argument(
        "--port", metavar="N", type=port, default=8080, help="metrics are on the next (default: 8080; 0: any free ones)"
    )


async def dev(args: argparse.Namespace, out: Output) -> None:
    """Run the gateway over an embedded store and a simulated provider, with a key, credit and a template,
    and print lines to paste. With OPENAI_API_KEY or OPENROUTER_API_KEY set, the real provider is there too.
    Nothing is kept when it ends. --config is not used.

    meshproxy dev
    meshproxy dev --port 9000                           data on 9000, metrics and status on 9001
    OPENAI_API_KEY=sk-... meshproxy dev                 with the real models beside the simulated ones
    """
    if args.port == 65535:
        raise Misused("argument --port: the next port is wanted too")
    async with contextlib.AsyncExitStack() as stack:
        try:
            store = await stack.enter_async_context(Embedded())
        except RuntimeError as error:
            raise Failed("no_store", str(error)) from error
        simulator = await start()
        stack.push_async_callback(simulator.close)
        settings = dev_settings(redis_url=store.url, simulator_url=simulator.base_url, port=args.port, env=os.environ)
        secret = await seed(settings.redis)

        def on_ready(data_address: str, admin_address: str) -> None:
            place = {
                "base_url": f"http://{data_address}/v1",
                "admin_url": f"http://{admin_address}/",
                "redis_url": store.url,
                "key": secret,
                "account": ACCOUNT,
                "balance_usd": CREDIT_USD,
                "template": TEMPLATE,
                "model": settings.defaults.model,
                "models": list(settings.models),
            }
            out.told(place, greeting(place))

        try:
            await run(*filled(settings), on_ready=on_ready)
        except OSError as error:
            raise Failed("cannot_listen", f"{settings.server.listen}: {error.strerror or error}") from error


async def seed(redis: config.Redis) -> str:
    """An account with a key, credit and a template; the key's secret."""
    store = await connect(redis)
    try:
        directory = Directory(store)
        secret, _ = await directory.create_key(ACCOUNT, name="made by meshproxy dev")
        await Ledger(store).grant(ACCOUNT, parse_usd(CREDIT_USD), "made by meshproxy dev")
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
