"""What `meshproxy dev` prints when it is up: lines to paste, each of which works as it stands."""

import json
from typing import Any

from msgspec import Struct

PROMPT = [{"role": "user", "content": "Say hello."}]
SHOWN = 5  # models that are named


class Place(Struct, frozen=True):
    """Where a development gateway is, and what it was seeded with."""

    base_url: str
    admin_url: str
    redis_url: str
    key: str
    account: str
    balance_usd: str
    template: str
    model: str
    models: list[str]


def greeting(place: Place) -> str:
    """The whole text."""
    parts = {
        "curl": curl(place, {"model": place.model, "messages": PROMPT}),
        "curl, streaming": curl(place, {"model": place.model, "messages": PROMPT, "stream": True}),
        "curl, a stored template": curl(place, {"template": place.template, "variables": {"name": "Ada"}}),
        "Python: pip install openai": python(place),
        "Node: npm install openai, and save as hello.mjs": node(place),
        "the commands, on this store": commands(place),
    }
    pasted = "\n\n".join(f"# {title}\n{text}" for title, text in parts.items())
    return f"{summary(place)}\n\n{pasted}\n\nCtrl-C ends it; nothing is kept."


def summary(place: Place) -> str:
    """Where everything is."""
    return (
        f"meshproxy is up.\n\n"
        f"  data      {place.base_url}\n"
        f"  admin     {place.admin_url}\n"
        f"  store     {place.redis_url}\n"
        f"  key       {place.key}\n"
        f"  account   {place.account}, with {place.balance_usd} USD\n"
        f"  template  {place.template}\n"
        f"  models    {', '.join(place.models[:SHOWN])}\n"
        f"            and {len(place.models) - SHOWN} more that misbehave: meshproxy simulate --help tells how"
    )


def commands(place: Place) -> str:
    """Commands that work on a development gateway's store."""
    return f"meshproxy usage --by model --redis {place.redis_url}\nmeshproxy top --redis {place.redis_url}"


def curl(place: Place, body: dict[str, Any]) -> str:
    """One chat completion; -N shows a stream as it comes."""
    return (
        f"curl -sN {place.base_url}/chat/completions \\\n"
        f"  -H 'Authorization: Bearer {place.key}' \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'"
    )


def python(place: Place) -> str:
    """A stream through OpenAI's SDK for Python."""
    return (
        f"from openai import OpenAI\n"
        f'client = OpenAI(base_url="{place.base_url}", api_key="{place.key}")\n'
        f"stream = client.chat.completions.create(\n"
        f'    model="{place.model}", messages={json.dumps(PROMPT)}, stream=True)\n'
        f"for chunk in stream:\n"
        f'    print(chunk.choices[0].delta.content or "", end="", flush=True)'
    )


def node(place: Place) -> str:
    """A stream through OpenAI's SDK for Node."""
    return (
        f'import OpenAI from "openai";\n'
        f'const client = new OpenAI({{ baseURL: "{place.base_url}", apiKey: "{place.key}" }});\n'
        f"const stream = await client.chat.completions.create({{\n"
        f'  model: "{place.model}", messages: {json.dumps(PROMPT)}, stream: true }});\n'
        f'for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");'
    )
