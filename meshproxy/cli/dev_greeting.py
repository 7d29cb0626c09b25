"""What `meshproxy dev` prints when it is up: lines to paste, each of which works as it stands."""

from string import Template
from typing import Any

SHOWN = 5  # models that are named

GREETING = Template("""\
meshproxy is up.

  data      $base_url
  admin     $admin_url
  store     $redis_url
  key       $key
  account   $account, with $balance_usd USD
  template  $template
  models    $shown
            and $more more that misbehave: meshproxy simulate --help tells how

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

# the commands, on this store
meshproxy usage --by model --redis $redis_url
meshproxy top --redis $redis_url

Ctrl-C ends it; nothing is kept.""")


def greeting(place: dict[str, Any]) -> str:
    """The whole text. `place`: where the gateway is and what it was seeded with, as `dev --json` prints it."""
    models = place["models"]
    return GREETING.substitute(place, shown=", ".join(models[:SHOWN]), more=len(models) - SHOWN)
