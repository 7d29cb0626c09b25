"""Writes docs/configuration.md: types, bounds and defaults from the typed settings, words from config.example.toml's comments.

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
from meshproxy.config.settings import MOST

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
# Where the example's comment stands above the key, or says only what the tables here say anyway.
WORDS = {
    "defaults.model": "for requests that name none, with a key and a template that name none; `[models]` should have it",
    "defaults.requests_per_minute": "of a key without its own",
    "defaults.tokens_per_minute": "of a key without its own",
    "log.format": "one JSON object a line for machines, or coloured lines for people",
    "log.level": "what is less urgent isn't logged",
    "redis.url": "`redis://`, `rediss://` (TLS), `unix://`, `redis+sentinel://h1,h2/mymaster/0`, `redis+cluster://h1,h2`, or "
    "`embedded`: a server of our own, for trying things out; or a secret that is such a URL",
    "upstreams.NAME.kind": "`openai`: anything that speaks OpenAI's chat completions; `openrouter` walks `models` and does "
    "`transforms` itself; `simulator`: `meshproxy simulate`",
    "upstreams.NAME.base_url": "with the `/v1`, as an SDK would be given it",
    "upstreams.NAME.api_key": "sent as a bearer token; none is sent without",
    "upstreams.NAME.cap_field": "the one name under which a cap on output goes out, whatever names it came in by. The "
    "default follows `base_url`: `max_completion_tokens` for OpenAI and Azure, `max_tokens` for all others",
    "upstreams.NAME.connect_timeout_s": "name look-up, TCP and TLS together",
    'models."ID".upstreams': "tried in order; neighbours with a `weight` are equals and take turns by it",
    'models."ID".context_window': "prompt and completion together",
    'models."ID".max_output_tokens': "of one choice",
    'models."ID".output_usd_per_mtok': "likewise",
    'models."ID".above_prompt_tokens': "of how large a prompt on",
    'models."ID".service_tiers.NAME.price_tiers': "of this service tier; the model's own don't hold for it",
}
HEAD = """\
# Configuration

<!-- Written by scripts/configuration_doc.py (`make docs`) from the typed settings. Don't edit it here. -->

One TOML file, given as `--config FILE` or in `MESHPROXY_CONFIG`. [config.example.toml](../config.example.toml) has every key
in its place. An unknown key is an error that names the nearest right one, and `meshproxy check --config FILE` shows every
fault at once, each with the file and line. It builds what `serve` builds: secrets, certificates, the TLS files of `redis.url` and
the journal's directory are tried, so that a file which `check` accepts can be served, and one which it refuses (exit code 78)
`serve` refuses likewise, with one worker or several. What is likely a mistake is a warning and no error: a price that looks like
the price of one token, or that no model has, a `base_url` that ends in an endpoint's path, lacks its host's, is the gateway's own
or is plain HTTP where TLS was meant, a `markup` that counts for nothing, a secret in `headers` in plain text, a model's name with
a `*`, a `listen` on every interface in plain HTTP with no proxy in `trusted_proxies`. Money is a decimal string, never a float.
On SIGHUP the file is read again as a transaction: every worker builds it, and only when all could does it hold; a bad file
changes nothing.

A secret is `{ env = "NAME" }` or `{ file = "/path" }`, a regular file of at most 64 KiB: it never stands in the file itself.
`redis.url` and a value of `headers` may be secrets too. An entry of a model's `upstreams` is
`{ upstream = "NAME", model = "the provider's name for it", weight = 1 }`, the weight optional.
"""

_LINE = re.compile(r"(?:# )?(\w+) = (.*?)(?:\s+# (.*))?")
_FAMILY = {"[upstreams.": "upstreams.NAME", "[models.": 'models."ID"'}


def page(example: str) -> str:
    """The whole page."""
    words = dict(_words(example)) | WORDS
    return "\n".join([HEAD, *(_section(name, kind, words, example) for name, kind in SECTIONS.items())])


def _words(example: str) -> Iterator[tuple[str, str]]:
    """Each key with the comment behind it; of several the first."""
    section, seen = "", set()
    for line in example.splitlines():
        if line.startswith("["):
            section = next((name for start, name in _FAMILY.items() if line.startswith(start)), line.split("]")[0][1:])
        elif (found := _LINE.fullmatch(line)) and found[3] and f"{section}.{found[1]}" not in seen:
            seen.add(f"{section}.{found[1]}")
            yield f"{section}.{found[1]}", found[3]


def _section(name: str, kind: type[Struct], words: dict[str, str], example: str) -> str:
    rows = [f"## [{name}]\n", *_told_above(kind), "| key | type | default | |", "|---|---|---|---|"]
    hints = get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        if field.type is config.Buckets:  # it has a section of its own
            continue
        default = _default(field) if kind is not config.Buckets else _commented(field.name, example)
        what = words.get(f"{name}.{field.name}", words.get(f'models."ID".{field.name}', "") if "models" in name else "")
        rows.append(f"| `{field.name}` | {_type(hints[field.name])} | {default} | {_cell(what)} |")
    return "\n".join([*rows, ""])


def _told_above(kind: type[Struct]) -> Iterator[str]:
    """What the section is for, where its type says so: `[name]: words.`"""
    text = re.sub(r" \([^)]*\.py\)", "", " ".join((kind.__doc__ or "").split())).partition(": ")[2]
    if text:
        yield f"{text[0].upper()}{text[1:]}\n"


def _default(field: Any) -> str:
    if field.required:
        return "required"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return "" if value is None else _code(value)


def _commented(key: str, example: str) -> str:
    """A default that the example has in a comment."""
    found = re.search(rf"^# {key} = (\[.*\])$", example, re.MULTILINE)
    return f"`{found[1]}`" if found else ""


def _type(hint: Any) -> str:
    """A type in a reader's words."""
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
    high = f"≤ {meta.le}" if meta.le not in {None, MOST} else ""
    length = f"at most {meta.max_length}" if meta.max_length is not None else ""
    return " ".join([_type(bare), ", ".join(filter(None, (low, high, length)))]).strip()


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(EXAMPLE.read_text(encoding="utf-8")), encoding="utf-8")
