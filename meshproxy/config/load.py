"""Decode TOML text to `Settings`, with every fault and every likely mistake.

A fault or warning is a sentence that begins with the path of its key. `lines_of` and `line_of` find its line in the
text. `contradictions` are faults between keys; `likely_mistakes` are warnings.
"""

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from meshproxy.config.settings import (
    DEFAULT_PORTS,
    STANDARD_TIERS,
    Defaults,
    Model,
    Prices,
    Secret,
    Server,
    ServiceTier,
    Settings,
    Upstream,
    is_everywhere,
    is_private,
    split_address,
)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_KEY = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")
_HEADER = re.compile(rf"[ \t]*(\[\[?[ \t]*{_DOTTED}[ \t]*\]?\])[ \t]*(?:#.*)?")
_LONG_QUOTE = re.compile(r"\"\"\"|'''")


def under(path: str, key: str) -> str:
    """Return the path of a key in the table at `path`, quoted where TOML needs quotes."""
    name = key if _BARE_KEY.fullmatch(key) else json.dumps(key)
    return f"{path}.{name}" if path else name


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `, did you mean NAME?`, or an empty string if no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def lines_of(text: str) -> dict[str, int]:
    """Return the line on which each table, key and inline table in a list begins, by its path.

    It reads line by line and not into inline tables; for a key in one, `line_of` gives the line of the nearest key around it.
    """
    lines: dict[str, int] = {}
    seen: Counter[str] = Counter()
    table = key = ""
    quote: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if quote is None:
            if header := _HEADER.fullmatch(line):
                table = _path(header[1])
                if header[1].startswith("[["):
                    seen[table] += 1
                    table = f"{table}[{seen[table] - 1}]"
                lines.setdefault(table, number)
            elif assigned := _KEY.match(line):
                key = f"{table}.{_path(f'{assigned[1]} = 0')}".removeprefix(".")
                lines.setdefault(key, number)
            elif line.lstrip().startswith("{"):
                lines.setdefault(f"{key}[{seen[key]}]", number)
                seen[key] += 1
        for mark in _LONG_QUOTE.findall(line):
            quote = mark if quote is None else None if mark == quote else quote
    return lines


def line_of(fault: str, lines: Mapping[str, int]) -> int | None:
    """Return the line that a fault is about; None if the text has nothing of the path that the fault begins with."""
    near = [path for path in lines if fault.startswith(path) and fault[len(path) :][:1] in {":", ".", "["}]
    return lines[max(near, key=len)] if near else None


def _path(toml: str) -> str:
    """Return the path of the only key in one line of TOML, however it is quoted."""
    path, value = "", tomllib.loads(toml)
    while isinstance(value, dict) and value:
        ((key, inner),) = value.items()
        path = under(path, key)
        value = inner[0] if isinstance(inner, list) else inner
    return path


# A price below this is likely per token, not per million: o1-pro's output, one of the most expensive, cost 600 USD per
# million (https://platform.openai.com/docs/pricing), so 0.0006 per token. No model is so cheap per million.
MIN_USD_PER_MTOK = 0.001
MAX_USD_PER_MTOK = 10_000
PRICE_KEYS = Prices.__struct_fields__
# Paths of OpenAI's API that must not be part of a base URL.
ENDPOINTS = ("/chat/completions", "/completions", "/chat", "/responses", "/embeddings", "/models")
# Hosts that serve nothing without this path. docs/providers.md links their pages.
API_PATHS = {
    "api.openai.com": "/v1",
    "openrouter.ai": "/api/v1",
    "api.anthropic.com": "/v1",
    "api.x.ai": "/v1",
    "api.mistral.ai": "/v1",
    "api.groq.com": "/openai/v1",
}
MIN_SECRET_CHARS = 8  # shorter values are placeholders, such as local models take
_SECRET_HEADER = re.compile(r"(?i)key|token|secret")
ANY_NETWORK = frozenset({"0.0.0.0/0", "::/0"})


def contradictions(settings: Settings) -> Iterator[str]:
    """Yield the faults that are between keys, not in the value of one."""
    if settings.server is not None:
        yield from _server_faults(settings.server)
    if settings.redis is not None and settings.redis.on_failure == "local" and settings.redis.journal is None:
        yield 'redis.journal: required with on_failure = "local", which keeps settlements in this file'
    for name, upstream in (settings.upstreams or {}).items():
        if upstream is not None:
            yield from _header_faults(upstream.headers or {}, f"{under('upstreams', name)}.headers")
    for name, model in (settings.models or {}).items():
        if model is not None:
            yield from _model_faults(model, under("models", name), settings)
    models, default = settings.models or {}, settings.defaults and settings.defaults.model
    if (
        default and default != Defaults().model and default not in models
    ):  # without the built-in one, requests name a model
        yield f"defaults.model: no model is named {default}{nearest(default, models)}"


def likely_mistakes(settings: Settings, table: Mapping[str, Any]) -> Iterator[str]:
    """Yield warnings about what can be served but is likely a mistake. `table` is the decoded TOML."""
    if settings.server is not None:
        yield from _server_warnings(settings.server)
    for name, upstream in (settings.upstreams or {}).items():
        if upstream is not None:
            yield from _upstream_warnings(upstream, under("upstreams", name), settings.server)
    for name, model in (settings.models or {}).items():
        if model is not None:
            yield from _model_warnings(model, name)
    default = table.get("defaults")
    if isinstance(default, dict) and default.get("model") == Defaults().model not in (settings.models or {}):
        yield f"defaults.model: no model is named {default['model']}, so a request without a model gets 404"


def _server_warnings(server: Server) -> Iterator[str]:
    """Warn of plain HTTP on every interface, of trusting any proxy, and of allowing every origin."""
    is_bare = (
        server.tls_cert is None and not server.allowed_clients and server.trusted_proxies == Server().trusted_proxies
    )
    if server.listen is not None and is_everywhere(server.listen) and is_bare:
        yield (
            "server.listen: plain HTTP on every interface, and server.trusted_proxies names no proxy in front: API keys can be"
            " read on the network, and a load balancer's address is taken for its clients'"
        )
    for index, network in enumerate(server.trusted_proxies or ()):
        if network in ANY_NETWORK:
            yield f"server.trusted_proxies[{index}]: any client can claim any address in a header"
    if "*" in (server.cors_origins or ()):
        yield "server.cors_origins: any web page may send requests with the keys that its visitors enter there"


def _upstream_warnings(upstream: Upstream, path: str, server: Server | None) -> Iterator[str]:
    """Warn of a suspicious base URL, and of secrets in plain text.

    Suspicious is one with an endpoint's path, without the API's path, of the gateway itself, or in plain HTTP.
    """
    url = (upstream.base_url or "").rstrip("/")
    end = next((end for end in ENDPOINTS if url.endswith(end)), None)
    if end is not None:
        yield f"{path}.base_url: leave {end} out: the gateway adds the endpoint's path"
    parts = urlsplit(url)
    api_path = API_PATHS.get(parts.hostname or "")
    if api_path is not None and not parts.path.startswith(api_path):
        yield f"{path}.base_url: the API of {parts.hostname} is at {api_path}"
    if "/v1/v1" in parts.path:
        yield f"{path}.base_url: it contains /v1 twice"
    if parts.scheme == "http" and (api_path is not None or parts.port == DEFAULT_PORTS["https"]):
        yield f"{path}.base_url: plain HTTP to {parts.netloc}: did you mean https://?"
    if upstream.base_url is not None and server is not None and _is_own(server, parts.hostname or "", parts.port):
        yield f"{path}.base_url: this is the gateway's own address, so requests would come back to it"
    for name, value in (upstream.headers or {}).items():
        if isinstance(value, str) and _SECRET_HEADER.search(name) and len(value) >= MIN_SECRET_CHARS:
            where = under(f"{path}.headers", name)
            yield f'{where}: it looks like a secret in plain text; {{ env = "NAME" }} keeps it out of the file'


def _is_own(server: Server, host: str, port: int | None) -> bool:
    """Return whether a listener of the gateway has this port, on an address of this machine."""
    own = [address for address in (server.listen, server.admin_listen) if address and not address.startswith("unix:")]
    return is_private(f"[{host}]:1" if ":" in host else f"{host}:1") and any(
        split_address(address)[1] == port and (is_private(address) or is_everywhere(address)) for address in own
    )


def _model_warnings(model: Model, name: str) -> Iterator[str]:
    """Warn of names with a `*`, of prices that hold nothing, and of prices per token."""
    path = under("models", name)
    if "*" in name:
        yield f"{path}: patterns are not supported: this is one model whose name contains *"
    for index, route in enumerate(model.upstreams or ()):
        if route is not None and "*" in (route.model or ""):
            yield f"{path}.upstreams[{index}].model: patterns are not supported: the upstream gets this name with its *"
    if (
        model.cost_from == "usage.cost"
        and model.output_usd_per_mtok is not None
        and not float(model.output_usd_per_mtok)
    ):
        yield f'{path}.output_usd_per_mtok: with cost_from = "usage.cost" the prices only size holds, and 0 holds no credit'
    if model.cost_from == "prices" and model.markup is not None and float(model.markup) != 1:
        yield f'{path}.markup: used only with cost_from = "usage.cost"'
    for where, prices in _prices_of(model, path):
        yield from _price_warnings(prices, where)


def _price_warnings(prices: Prices, where: str) -> Iterator[str]:
    for key in PRICE_KEYS:
        usd = getattr(prices, key)
        if usd is not None and 0 < float(usd) < MIN_USD_PER_MTOK:
            yield f"{where}.{key}: {usd} USD per million tokens: is this the price of one token?"
        if usd is not None and float(usd) > MAX_USD_PER_MTOK:
            yield f"{where}.{key}: {usd} USD per million tokens: no model costs so much"
    cached, whole = prices.cached_input_usd_per_mtok, prices.input_usd_per_mtok
    if cached is not None and whole is not None and float(cached) > float(whole):
        yield f"{where}.cached_input_usd_per_mtok: more than input_usd_per_mtok, but cached tokens cost less"


def _prices_of(model: Model, path: str) -> Iterator[tuple[str, Prices]]:
    """Yield every table of prices of a model, with its path."""
    tables: list[tuple[str, Model | ServiceTier]] = [(path, model)]
    for name, tier in (model.service_tiers or {}).items():
        if tier is not None:
            tables.append((under(f"{path}.service_tiers", name), tier))
    for where, table in tables:
        yield where, table
        for index, prices in enumerate(table.price_tiers or ()):
            if prices is not None:
                yield f"{where}.price_tiers[{index}]", prices


def _server_faults(server: Server) -> Iterator[str]:
    """Check that the listeners differ, that a public admin listener has a token, and that TLS has both files."""
    admin = server.admin_listen
    if admin is not None:
        if server.listen == admin and not admin.endswith(":0"):
            yield "server.admin_listen: the same as server.listen"
        elif server.admin_token is None and not is_private(admin):
            yield f"server.admin_listen: other machines can reach {admin}, so server.admin_token is required"
    if (server.tls_cert is None) != (server.tls_key is None):
        here, missing = ("tls_cert", "tls_key") if server.tls_key is None else ("tls_key", "tls_cert")
        yield f"server.{missing}: required with server.{here}"


def _header_faults(headers: Mapping[str, object], path: str) -> Iterator[str]:
    """Check that no header is there twice: names are the same in any case (RFC 9110, 5.1)."""
    counted = Counter(name.lower() for name in headers)
    for name in headers:
        if counted[name.lower()] > 1:
            yield f"{under(path, name)}: this header is set twice"


def _model_faults(model: Model, path: str, settings: Settings) -> Iterator[str]:
    """Check a model's upstreams, its output bound and its service tiers."""
    upstreams = settings.upstreams or {}
    for index, route in enumerate(model.upstreams or ()):
        if route is not None and route.upstream is not None and route.upstream not in upstreams:
            name = route.upstream
            yield f"{path}.upstreams[{index}].upstream: no upstream is named {name}{nearest(name, upstreams)}"
    output, window = model.max_output_tokens, model.context_window
    if output is not None and window is not None and output > window:
        yield f"{path}.max_output_tokens: {output} is more than context_window, {window}"
    for name in sorted(STANDARD_TIERS & (model.service_tiers or {}).keys()):
        yield f"{under(f'{path}.service_tiers', name)}: this tier always has the model's own prices"


NOT_A_REFERENCE = 'a secret must not be written here: use { env = "NAME" } or { file = "/path" }'


class ConfigError(Exception):
    """A configuration that can't be used. `faults` lists every fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Decoded(Struct, frozen=True):
    """A decoded TOML text: settings, faults, warnings, and each key's line.

    A value or a table at fault is None in `settings`, whatever its type says.
    """

    settings: Settings
    faults: list[str]
    warnings: list[str]
    lines: dict[str, int]


def parse(text: str) -> Settings:
    """Return the settings of a TOML text. Raises ConfigError with every fault."""
    decoded = decode(text)
    if decoded.faults:
        raise ConfigError(decoded.faults)
    return decoded.settings


def decode(text: str) -> Decoded:
    """Return the settings of a TOML text, with its faults and warnings. Raises ConfigError if it isn't TOML."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"not TOML: {error}"]) from error
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise ConfigError(["not TOML: an integer is too long"]) from error
    except RecursionError as error:
        raise ConfigError(["not TOML: nested too deeply"]) from error
    faults: list[str] = []
    settings: Settings = _struct(table, Settings, "", faults)
    faults.extend(contradictions(settings))
    return Decoded(settings, faults, list(likely_mistakes(settings, table)), lines_of(text))


def _decoded(value: Any, kind: Any, path: str, faults: list[str]) -> Any:
    """Decode a value to its type. If it is at fault, append to `faults` and return None."""
    kind = _union_member(kind, value)
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if isinstance(bare, type) and issubclass(bare, Struct):
        return _struct(value, bare, path, faults)
    if get_origin(bare) is dict and isinstance(value, dict):
        return _mapping(value, bare, path, faults)
    if get_origin(bare) is list and isinstance(value, list) and value:
        item_kind = get_args(bare)[0]
        items = [_decoded(item, item_kind, f"{path}[{index}]", faults) for index, item in enumerate(value)]
        return items if None in items else _scalar(items, kind, path, faults)
    return _scalar(value, kind, path, faults)


def _struct(value: Any, kind: type[Struct], path: str, faults: list[str]) -> Any:
    """Decode a table with fixed keys. The struct is built unchecked, because each value was checked on its own."""
    if not isinstance(value, dict):
        is_text = kind is Secret and isinstance(value, str)
        faults.append(f"{path}: {NOT_A_REFERENCE if is_text else 'expected a table'}")
        return None
    hints = get_type_hints(kind, include_extras=True)
    known: dict[str, Any] = {}
    for key, item in value.items():
        if key in hints:
            known[key] = _decoded(item, hints[key], under(path, key), faults)
        else:
            faults.append(f"{under(path, key)}: unknown key{nearest(key, hints)}")
    for item in msgspec.structs.fields(kind):
        if item.required and item.name not in value:
            faults.append(f"{under(path, item.name)}: required, and missing")
            known[item.name] = None
    try:
        return kind(**known)
    except ValueError as error:
        faults.append(f"{path}: {error}")
        return None


def _mapping(table: dict[str, Any], kind: Any, path: str, faults: list[str]) -> dict[str, Any]:
    """Decode a table whose keys are the user's own names."""
    name_kind, item_kind = get_args(kind)
    for name in table:
        _scalar(name, name_kind, under(path, name), faults)
    return {name: _decoded(item, item_kind, under(path, name), faults) for name, item in table.items()}


def _scalar(value: Any, kind: Any, path: str, faults: list[str]) -> Any:
    """Decode a value without parts, and run its own check."""
    try:
        value = msgspec.convert(value, kind)
        fault = next(filter(None, (meta.extra["fault"](value) for meta in _metadata(kind) if meta.extra)), None)
    except msgspec.ValidationError as error:
        fault = _type_fault(str(error), kind)
    if fault is None:
        return value
    faults.append(f"{path}: {fault}")
    return None


def _type_fault(message: str, kind: Any) -> str:
    """Return a fault in TOML's terms: the type's own description of what is expected, else msgspec's message."""
    for meta in _metadata(kind):
        if meta.description:
            return f"expected {meta.description}"
    words = message.replace("`object`", "a table").replace("`array`", "a list").replace("`", "")
    choices = f", expected {' or '.join(get_args(kind))}" if get_origin(kind) is Literal else ""
    return words[0].lower() + words[1:] + choices


def _metadata(kind: Any) -> tuple[Meta, ...]:
    return getattr(kind, "__metadata__", ())


def _union_member(kind: Any, value: Any) -> Any:
    """Choose the type of a union that a value is decoded as.

    `X | None` is X: TOML has no null, so None only means left out. Of text and Secret, a table chooses Secret.
    """
    if get_origin(kind) not in {Union, UnionType}:
        return kind
    parts = [part for part in get_args(kind) if part is not type(None)]
    tables = [part for part in parts if isinstance(part, type) and issubclass(part, Struct)]
    return tables[0] if tables and (isinstance(value, dict) or len(parts) == len(tables)) else parts[0]
