"""Write docs/configuration.md: types, bounds and defaults from the typed settings, descriptions from config.example.toml.

`make docs` runs it; tests/docs/test_configuration_doc.py fails when the page is not what it would write.
"""

# ruff: noqa: INP001 - a script, not a package

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from meshproxy import config
from meshproxy.units import MAX_EXACT_INT

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "config.example.toml"
PAGE = ROOT / "docs" / "configuration.md"

SECTIONS: dict[str, type[Struct]] = {
    "server": config.Server,
    "stream": config.Stream,
    "log": config.Log,
    "redis": config.Redis,
    "defaults": config.Defaults,
    "credits": config.Credits,
    "limits": config.RateLimits,
    "idempotency": config.Idempotency,
    "metrics": config.Metrics,
    "metrics.buckets": config.Buckets,
    "tracing": config.Tracing,
    "upstreams.NAME": config.Upstream,
    'models."ID"': config.Model,
    'models."ID".price_tiers': config.PriceTier,
    'models."ID".service_tiers.NAME': config.ServiceTier,
}
# For keys whose comment in the example stands above them or is too short for this page.
DESCRIPTIONS = {
    "defaults.model": "the model of a request if neither it nor its key or template names one; it should be in "
    "`[models]`",
    "defaults.requests_per_minute": "limit of a key that has none of its own",
    "defaults.tokens_per_minute": "limit of a key that has none of its own",
    "log.format": "`json`: one JSON object a line; `console`: coloured text for people",
    "log.level": "the lowest level that is logged",
    "redis.url": "`redis://`, `rediss://` (TLS), `unix://`, `redis+sentinel://h1,h2/mymaster/0`, `redis+cluster://h1,h2`, or "
    "`embedded`: a server that meshproxy starts, for trials; or a secret that is such a URL",
    "upstreams.NAME.kind": "`openai`: any provider with OpenAI's chat completions; `openrouter`: handles `models` and "
    "`transforms` itself; `simulator`: `meshproxy simulate`",
    "upstreams.NAME.base_url": "the same URL that an SDK gets, with its `/v1`",
    "upstreams.NAME.api_key": "sent as a bearer token; without it no token is sent",
    "upstreams.NAME.cap_field": "the field in which a cap on output is sent, whatever field the client used. The "
    "default depends on `base_url`: `max_completion_tokens` for OpenAI and Azure, `max_tokens` for all others",
    "upstreams.NAME.connect_timeout_s": "for the DNS look-up, TCP and TLS together",
    'models."ID".upstreams': "tried in order; adjacent entries with a `weight` share requests in proportion to it",
    'models."ID".context_window': "tokens of prompt and completion together",
    'models."ID".max_output_tokens': "output tokens of one choice",
    'models."ID".output_usd_per_mtok': "USD for a million tokens, as a string",
    'models."ID".above_prompt_tokens': "prompts with more tokens than this are billed at these prices",
    'models."ID".service_tiers.NAME.price_tiers': "price tiers of this service tier; those of the model don't apply to it",
}
HEAD = """\
# Configuration

<!-- Written by scripts/configuration_doc.py (`make docs`) from the typed settings. Don't edit it here. -->

The configuration is one TOML file, named by `--config FILE` or `MESHPROXY_CONFIG`.
[config.example.toml](../config.example.toml) has every key.

`meshproxy check --config FILE` shows every fault of a file at once, each with its line. An unknown key is a fault; the message
names the nearest known key. `check` tries everything that `serve` needs: secrets, certificates, the TLS files of `redis.url`, the
journal's directory. A file that `check` accepts can be served. A file that it refuses (exit code 78) is also refused by `serve`.

`check` also warns of what can be served but is likely a mistake:

- a price that looks like the price of one token, or is higher than any model's; a `markup` that has no effect
- a `base_url` with an endpoint's path, without the API's path, with plain HTTP instead of TLS, or with the gateway's own address
- a secret in plain text in `headers`
- a model's name with a `*`
- a `listen` on every interface in plain HTTP without a proxy in `trusted_proxies`

On SIGHUP the file is read again. Every worker builds the new configuration first, and it is used only if all succeed: a bad file
changes nothing.

An amount of money is a decimal string, never a float. A secret is `{ env = "NAME" }` or `{ file = "/path" }`, a regular file of
at most 64 KiB; the configuration itself never contains it. `redis.url` and a value of `headers` may be secrets too. An entry of
a model's `upstreams` is `{ upstream = "NAME", model = "the provider's name for it", weight = 1 }`; the weight is optional.
"""

_LINE = re.compile(r"(?:# )?(\w+) = (.*?)(?:\s+# (.*))?")
_FAMILY = {"[upstreams.": "upstreams.NAME", "[models.": 'models."ID"'}


def page(example: str) -> str:
    """Build the whole page."""
    descriptions = dict(_descriptions(example)) | DESCRIPTIONS
    return "\n".join([HEAD, *(_section(name, kind, descriptions, example) for name, kind in SECTIONS.items())])


def _descriptions(example: str) -> Iterator[tuple[str, str]]:
    """Yield each key with the first comment behind it."""
    section, seen = "", set()
    for line in example.splitlines():
        if line.startswith("["):
            section = next((name for start, name in _FAMILY.items() if line.startswith(start)), line.split("]")[0][1:])
        elif (match := _LINE.fullmatch(line)) and match[3] and f"{section}.{match[1]}" not in seen:
            seen.add(f"{section}.{match[1]}")
            yield f"{section}.{match[1]}", match[3]


def _section(name: str, kind: type[Struct], descriptions: dict[str, str], example: str) -> str:
    rows = [f"## [{name}]\n", *_purpose(kind), "| key | type | default | |", "|---|---|---|---|"]
    hints = get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        if field.type is config.Buckets:  # it has a section of its own
            continue
        default = _default(field) if kind is not config.Buckets else _commented(field.name, example)
        description = descriptions.get(
            f"{name}.{field.name}", descriptions.get(f'models."ID".{field.name}', "") if "models" in name else ""
        )
        rows.append(f"| `{field.name}` | {_type(hints[field.name])} | {default} | {_cell(description)} |")
    return "\n".join([*rows, ""])


def _purpose(kind: type[Struct]) -> Iterator[str]:
    """Yield what the section is for: its type's docstring after `[name]: `."""
    text = re.sub(r" \([^)]*\.py\)", "", " ".join((kind.__doc__ or "").split())).partition(": ")[2]
    if text:
        yield f"{text[0].upper()}{text[1:]}\n"


def _default(field: Any) -> str:
    if field.required:
        return "required"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return "" if value is None else _code(value)


def _commented(key: str, example: str) -> str:
    """Return a default that the example has in a comment."""
    match = re.search(rf"^# {key} = (\[.*\])$", example, re.MULTILINE)
    return f"`{match[1]}`" if match else ""


def _type(hint: Any) -> str:
    """Describe a type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return _type(next(arg for arg in args if arg is not type(None)))
    if origin is Annotated:
        return _bounded(args[0], args[1])
    if origin is Literal:
        return " or ".join(_code(arg) for arg in args)
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is dict:
        is_struct = isinstance(args[1], type) and issubclass(args[1], Struct)
        return f"table of {_type(args[1])}s" if is_struct else "table of strings"
    if isinstance(hint, type) and issubclass(hint, Struct):
        return re.sub(r"\B([A-Z])", r" \1", hint.__name__).lower()
    return {str: "string", bool: "boolean", int: "integer", float: "number"}[hint]


def _bounded(bare: Any, meta: Meta) -> str:
    if meta.description:
        return _cell(meta.description)
    low = f"≥ {meta.ge}" if meta.ge is not None else f"> {meta.gt}" if meta.gt is not None else ""
    high = f"≤ {meta.le}" if meta.le not in {None, MAX_EXACT_INT} else ""
    length = f"at most {meta.max_length}" if meta.max_length is not None else ""
    return " ".join([_type(bare), ", ".join(filter(None, (low, high, length)))]).strip()


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(EXAMPLE.read_text(encoding="utf-8")), encoding="utf-8")
