"""`meshproxy dev`: run a gateway for a trial.

It has a simulated provider, and the real providers whose keys are in the environment.
"""

import argparse
import contextlib
import os
import time
import uuid
from collections.abc import Mapping
from string import Template as TextTemplate
from typing import Any

import msgspec

from meshproxy import config
from meshproxy.app.load import read_secrets
from meshproxy.app.serve import run
from meshproxy.cli.arguments import port
from meshproxy.cli.command_line import CommandError, Output, UsageError, make_command
from meshproxy.config import Settings
from meshproxy.ledger.connection import connect
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.embedded import Embedded
from meshproxy.ledger.ledger import Ledger
from meshproxy.policy.template import Template
from meshproxy.simulator import start
from meshproxy.simulator.behaviour import PREFIX, TRAITS
from meshproxy.simulator.dialects import DIALECTS
from meshproxy.units import parse_usd

PROVIDERS: dict[str, dict[str, Any]] = {
    "openai": {"kind": "openai", "base_url": "https://api.openai.com/v1", "api_key": {"env": "OPENAI_API_KEY"}},
    "openrouter": {
        "kind": "openrouter",
        "base_url": "https://openrouter.ai/api/v1",
        "api_key": {"env": "OPENROUTER_API_KEY"},
    },
}
DEFAULT_MODEL = "sim/default"
FAMILY_SAMPLES = ("error-400", "error-429", "error-500", "error-503", "tokens-200", "flaky-2", "fail-first-1")

# The providers' list prices in USD per million tokens (input, cached input, output), with the context and the longest
# answer, as published for these models. Real configurations set their own prices.
_OPENAI: dict[str, tuple[str, str, str, int, int]] = {
    "openai/gpt-4o": ("2.50", "1.25", "10.00", 128_000, 16_384),
    "openai/gpt-4o-mini": ("0.15", "0.075", "0.60", 128_000, 16_384),
    "openai/gpt-4.1": ("2.00", "0.50", "8.00", 1_047_576, 32_768),
    "openai/gpt-4.1-mini": ("0.40", "0.10", "1.60", 1_047_576, 32_768),
}
_SIMULATED_OPENAI = ("openai/gpt-4o", "openai/gpt-4o-mini")


def dev_settings(*, redis_url: str, simulator_url: str, port: int, env: Mapping[str, str]) -> Settings:
    """Return settings for a gateway on `port` and `port` + 1; if `port` is 0, both are free ports."""
    real = {name: provider for name, provider in PROVIDERS.items() if env.get(provider["api_key"]["env"])}
    # Time-outs are short, so that a trial of sim/stall ends soon.
    simulator = {"kind": "simulator", "base_url": simulator_url, "first_byte_timeout_s": 10, "idle_timeout_s": 10}
    table = {
        "metrics": {"accounts": "all"},
        "server": {
            "listen": f"127.0.0.1:{port}",
            "admin_listen": f"127.0.0.1:{port and port + 1}",
            "workers": 1,
            "drain_s": 2,
        },
        "log": {"format": "console"},
        "redis": {"url": redis_url},
        "defaults": {"model": DEFAULT_MODEL if real else "openai/gpt-4o"},
        "upstreams": {"simulator": simulator, **_dialects(simulator), **real},
        "models": {**_openai_models(list(real)), **_simulated_models()},
    }
    return msgspec.convert(table, Settings)


def _simulated_models() -> dict[str, Any]:
    names = {DEFAULT_MODEL: f"{PREFIX}plain"} | {PREFIX + name: PREFIX + name for name in (*TRAITS, *FAMILY_SAMPLES)}
    plain = {name: _simulated("simulator", model) for name, model in names.items()}
    for name, dialect in DIALECTS.items():
        own = f"dialect-{name}"
        plain[PREFIX + own] = {**_simulated(own if dialect.upstream else "simulator", PREFIX + own), **dialect.model}
    return plain


def _simulated(upstream: str, model: str) -> dict[str, Any]:
    routes = [{"upstream": upstream, "model": model}]
    return {"upstreams": routes, "input_usd_per_mtok": "1.00", "output_usd_per_mtok": "4.00"}


def _dialects(simulator: dict[str, Any]) -> dict[str, Any]:
    """Return one simulated upstream for each dialect that needs other settings."""
    settings = {name: dialect.upstream for name, dialect in DIALECTS.items() if dialect.upstream}
    return {f"dialect-{name}": {**simulator, **own} for name, own in settings.items()}


def _openai_models(real: list[str]) -> dict[str, Any]:
    """Return OpenAI's models, served by the real providers that are available, OpenAI first.

    If none is, the simulator serves some.
    """
    return {
        name: {
            "upstreams": [_route(upstream, name) for upstream in real or ["simulator"]],
            "context_window": context_window,
            "max_output_tokens": max_output_tokens,
            "input_usd_per_mtok": input_usd,
            "cached_input_usd_per_mtok": cached_usd,
            "output_usd_per_mtok": output_usd,
        }
        for name, (input_usd, cached_usd, output_usd, context_window, max_output_tokens) in _OPENAI.items()
        if real or name in _SIMULATED_OPENAI
    }


def _route(upstream: str, name: str) -> dict[str, str]:
    """Return a model's name at a provider. OpenRouter uses the same names; other providers leave out the maker."""
    return {"upstream": upstream, "model": name if upstream == "openrouter" else name.partition("/")[2]}


SHOWN_MODELS = 5

GREETING = TextTemplate("""\
meshproxy is up.

  data      $base_url
  admin     $admin_url
  store     $redis_url
  key       $key
  account   $account, with $balance_usd USD
  template  $template
  models    $shown
            and $more more with faults: meshproxy simulate --help lists them

# curl
curl -s $base_url/chat/completions \\
  -H 'Authorization: Bearer $key' \\
  -H 'Content-Type: application/json' \\
  -d '{"model": "$model", "messages": [{"role": "user", "content": "Say hello."}]}'

# curl, streaming
curl -sN $base_url/chat/completions \\
  -H 'Authorization: Bearer $key' \\
  -H 'Content-Type: application/json' \\
  -d '{"model": "$model", "messages": [{"role": "user", "content": "Say hello."}], "stream": true}'

# curl, a stored template
curl -s $base_url/chat/completions \\
  -H 'Authorization: Bearer $key' \\
  -H 'Content-Type: application/json' \\
  -d '{"template": "$template", "variables": {"name": "Ada"}}'

# Python: pip install openai
from openai import OpenAI
client = OpenAI(base_url="$base_url", api_key="$key")
stream = client.chat.completions.create(
    model="$model", messages=[{"role": "user", "content": "Say hello."}], stream=True)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)

# Node: npm install openai, and save as hello.mjs
import OpenAI from "openai";
const client = new OpenAI({ baseURL: "$base_url", apiKey: "$key" });
const stream = await client.chat.completions.create({
  model: "$model", messages: [{ role: "user", content: "Say hello." }], stream: true });
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");

# other commands, on this store
meshproxy usage --by model --redis $redis_url
meshproxy top --redis $redis_url

Ctrl-C ends it; nothing is kept.""")


def greeting(summary: dict[str, Any]) -> str:
    """Return the text that `dev` prints. `summary`: the gateway's addresses and data, as `dev --json` prints them."""
    models = summary["models"]
    return GREETING.substitute(summary, shown=", ".join(models[:SHOWN_MODELS]), more=len(models) - SHOWN_MODELS)


ACCOUNT = "dev"
CREDIT_USD = "25.00"
TEMPLATE = "greeter"


def add_dev(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dev [--port N]`."""
    make_command(parser, dev)
    parser.add_argument(
        "--port",
        metavar="N",
        type=port,
        default=8080,
        help="the data port; the admin port is the next one (default: 8080; 0: any free ports)",
    )


async def dev(args: argparse.Namespace, out: Output) -> None:
    """Run the gateway with an embedded Redis server, a simulated provider, a key with credit and a template.

    It prints commands to paste. If OPENAI_API_KEY or OPENROUTER_API_KEY is set, that provider's models are served too.
    Nothing is kept when it ends. --config is not used.

    meshproxy dev
    meshproxy dev --port 9000                           data on 9000, metrics and status on 9001
    OPENAI_API_KEY=sk-... meshproxy dev                 with the real models beside the simulated ones
    """
    if args.port == 65535:
        raise UsageError("argument --port: the next port is needed too")
    async with contextlib.AsyncExitStack() as stack:
        try:
            store = await stack.enter_async_context(Embedded())
        except RuntimeError as error:
            raise CommandError("no_store", str(error)) from error
        simulator = await start()
        stack.push_async_callback(simulator.close)
        settings = dev_settings(redis_url=store.url, simulator_url=simulator.base_url, port=args.port, env=os.environ)
        secret = await seed(settings.redis)

        def on_ready(data_address: str, admin_address: str) -> None:
            summary = {
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
            out.print(summary, greeting(summary))

        try:
            await run(*read_secrets(settings), on_ready=on_ready)
        except OSError as error:
            raise CommandError("cannot_listen", f"{settings.server.listen}: {error.strerror or error}") from error


async def seed(redis: config.Redis) -> str:
    """Create an account with a key, credit and a template; return the key's secret."""
    store = await connect(redis)
    try:
        directory = Directory(store)
        secret, _ = await directory.create_key(ACCOUNT, name="made by meshproxy dev")
        await Ledger(store).grant(ACCOUNT, parse_usd(CREDIT_USD), "made by meshproxy dev")
        await directory.templates.put(greeter(time.time()))
    finally:
        await store.close()
    return secret


def greeter(now: float) -> Template:
    """Return a global template with one slot."""
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
