"""The typed settings, and how TOML text becomes them. Pure: whoever calls hands in the text, the environment and a way to
read secret files, so that a configuration can be checked anywhere.

Every fault of a text is found and told at once, each with its path and, for an unknown key, the nearest right name.
"""

import difflib
import ipaddress
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct, field

REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster")

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]
Usd = Annotated[str, Meta(pattern=r"^\d{1,7}(\.\d{1,9})?$", description="a decimal string in USD, as 2.50")]


class Secret(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a secret comes from: `{ env = "NAME" }` or `{ file = "/path" }`."""

    env: str | None = None
    file: str | None = None


class Server(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[server]: the listeners and their bounds."""

    listen: str = "127.0.0.1:8080"
    admin_listen: str = "127.0.0.1:8081"
    workers: Natural = 0
    trusted_proxies: list[str] = field(default_factory=lambda: ["127.0.0.0/8"])
    max_body_bytes: Positive = 33_554_432
    max_in_flight: Positive = 4096
    heartbeat_s: Seconds = 15
    drain_s: Annotated[float, Meta(ge=0, le=86400)] = 600
    drain_grace_s: Annotated[float, Meta(ge=0, le=3600)] = 0


class Log(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[log]"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class Redis(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[redis]: the one store, and what happens without it."""

    url: str = "redis://127.0.0.1:6379/0"
    on_failure: Literal["deny", "local"] = "deny"
    timeout_s: Seconds = 2
    journal: str | None = None
    journal_max_bytes: Positive = 67_108_864
    local_allowance_usd: Usd = "1.00"


class Defaults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[defaults]: what holds for a key that doesn't say."""

    model: str = "openai/gpt-4o"
    requests_per_minute: Positive = 600
    tokens_per_minute: Positive = 1_000_000


class Credits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[credits]: how much is held for a request, and for how long."""

    strict: bool = True
    default_output_tokens: Positive = 4096
    lease_output_tokens: Positive = 256
    hold_ttl_s: Seconds = 60
    clamp: bool = False


class RateLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[limits]"""

    enforce_mid_stream: bool = False


class Idempotency(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[idempotency]: how long and how large an answer is kept for replay."""

    ttl_s: Seconds = 3600
    max_bytes: Positive = 1_048_576


class Upstream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[upstreams.NAME]: one provider and the patience it is given."""

    kind: Literal["openai", "openrouter", "simulator"]
    base_url: Annotated[str, Meta(pattern=r"^https?://[^/?#\s]+[^?#\s]*$", description="an http or https URL")]
    api_key: Secret | None = None
    connect_timeout_s: Seconds = 5
    first_byte_timeout_s: Seconds = 60
    idle_timeout_s: Seconds = 60
    on_disconnect: Literal["cancel", "drain"] = "cancel"
    max_connections: Positive = 1024
    keepalive_s: Seconds = 60
    max_response_bytes: Positive = 33_554_432
    headers: dict[str, str] = field(default_factory=dict)


class Route(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of a model's `upstreams`: tried in order; `weight` balances neighbours that carry one."""

    upstream: str
    model: str
    weight: Positive | None = None


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[models."ID"]: where a model is served, its size and its price."""

    upstreams: Annotated[list[Route], Meta(min_length=1)]
    context_window: Positive = 128_000
    max_output_tokens: Positive = 16_384
    input_usd_per_mtok: Usd
    output_usd_per_mtok: Usd
    cached_input_usd_per_mtok: Usd | None = None
    cache_write_usd_per_mtok: Usd | None = None
    reasoning_usd_per_mtok: Usd | None = None
    audio_input_usd_per_mtok: Usd | None = None
    audio_output_usd_per_mtok: Usd | None = None


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration, decoded and without contradictions."""

    server: Server = field(default_factory=Server)
    log: Log = field(default_factory=Log)
    redis: Redis = field(default_factory=Redis)
    defaults: Defaults = field(default_factory=Defaults)
    credits: Credits = field(default_factory=Credits)
    limits: RateLimits = field(default_factory=RateLimits)
    idempotency: Idempotency = field(default_factory=Idempotency)
    upstreams: dict[str, Upstream] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)


class Unfit(Exception):
    """A configuration that can't be used. `faults`: every one, each a sentence that begins with its path."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def parse(text: str) -> Settings:
    """The settings of a TOML text; Unfit with every fault in it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Unfit([f"not TOML: {error}"]) from error
    faults = list(_faults(table, Settings, ""))
    if faults:
        raise Unfit(faults)
    settings = msgspec.convert(table, Settings)
    faults = list(_contradictions(settings))
    if faults:
        raise Unfit(faults)
    return settings


def resolve_secrets(settings: Settings, env: Mapping[str, str], read_file: Callable[[str], str]) -> dict[str, str]:
    """The API key of each upstream that names one, by upstream; Unfit if a variable is unset or a file can't be read."""
    keys: dict[str, str] = {}
    faults: list[str] = []
    for name, upstream in settings.upstreams.items():
        if upstream.api_key is None:
            continue
        path = f"upstreams.{name}.api_key"
        try:
            value = _secret(upstream.api_key, env, read_file).strip()
        except KeyError:
            faults.append(f"{path}: the environment has no {upstream.api_key.env}")
        except OSError as error:
            faults.append(f"{path}: {upstream.api_key.file} can't be read ({error.strerror})")
        else:
            if not value or not value.isprintable() or not value.isascii():
                faults.append(f"{path}: the secret is empty or has characters that no header may carry")
            keys[name] = value
    if faults:
        raise Unfit(faults)
    return keys


def _secret(secret: Secret, env: Mapping[str, str], read_file: Callable[[str], str]) -> str:
    return env[secret.env] if secret.env is not None else read_file(secret.file or "")


def _faults(value: Any, kind: Any, path: str) -> Iterator[str]:
    """Walk a decoded table beside its type, so that one fault doesn't hide the next."""
    kind = _without_none(kind)
    if isinstance(kind, type) and issubclass(kind, Struct):
        yield from _struct_faults(value, kind, path)
    elif get_origin(_bare(kind)) is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from _faults(item, get_args(_bare(kind))[1], f'{path}."{key}"' if "/" in key else f"{path}.{key}")
    elif get_origin(_bare(kind)) is list and isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _faults(item, get_args(_bare(kind))[0], f"{path}[{index}]")
    else:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            yield f"{path}: {_plain(str(error))}"


def _struct_faults(value: Any, kind: type[Struct], path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: expected a table"
        return
    hints = get_type_hints(kind, include_extras=True)
    prefix = f"{path}." if path else ""
    for key, item in value.items():
        if key in hints:
            yield from _faults(item, hints[key], prefix + key)
        else:
            yield f"{prefix}{key}: unknown key{_nearest(key, hints)}"
    for item in msgspec.structs.fields(kind):
        if item.required and item.name not in value:
            yield f"{prefix}{item.name}: required, and missing"


def _contradictions(settings: Settings) -> Iterator[str]:
    """What no single type can see: names that point nowhere, addresses that are none, secrets said twice."""
    yield from _upstream_faults(settings)
    yield from _model_faults(settings)
    yield from _server_faults(settings.server)
    yield from _redis_faults(settings.redis)


def _upstream_faults(settings: Settings) -> Iterator[str]:
    for name, upstream in settings.upstreams.items():
        secret = upstream.api_key
        if secret is not None and (secret.env is None) == (secret.file is None):
            yield f'upstreams.{name}.api_key: say one of {{ env = "NAME" }} and {{ file = "/path" }}'


def _model_faults(settings: Settings) -> Iterator[str]:
    for name, model in settings.models.items():
        for index, route in enumerate(model.upstreams):
            if route.upstream not in settings.upstreams:
                hint = _nearest(route.upstream, settings.upstreams)
                yield f'models."{name}".upstreams[{index}].upstream: no upstream is named {route.upstream}{hint}'
        if model.max_output_tokens > model.context_window:
            yield f'models."{name}".max_output_tokens: more than context_window'
    default = settings.defaults.model
    if default != Defaults().model and default not in settings.models:
        yield f"defaults.model: no model is named {default}{_nearest(default, settings.models)}"


def _server_faults(server: Server) -> Iterator[str]:
    for index, network in enumerate(server.trusted_proxies):
        if not _is_network(network):
            yield f"server.trusted_proxies[{index}]: {network!r} is not a network such as 10.0.0.0/8"
    for key in ("listen", "admin_listen"):
        fault = _address_fault(getattr(server, key))
        if fault:
            yield f"server.{key}: {fault}"


def _redis_faults(redis: Redis) -> Iterator[str]:
    scheme = redis.url.partition("://")[0]
    if redis.url != "embedded" and scheme not in REDIS_SCHEMES:
        yield f"redis.url: {scheme!r} is none of {', '.join(REDIS_SCHEMES)} and embedded"
    if redis.on_failure == "local" and redis.journal is None:
        yield 'redis.journal: on_failure = "local" needs a file to journal settlements in'


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8080`, `[::1]:8080` or `:8080` (every interface); ValueError for anything else."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        return str(ipaddress.IPv6Address(host[1:-1])), int(port)
    if ":" in host:
        raise ValueError(f"{address!r}: an IPv6 address goes in brackets")
    return host, int(port)


def _address_fault(address: str) -> str | None:
    if address.startswith("unix:"):
        return None if address.startswith("unix:/") else f"{address!r} needs an absolute path"
    try:
        split_address(address)
    except ValueError as error:
        return str(error)
    return None


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _without_none(kind: Any) -> Any:
    """`X | None` becomes X: TOML has no null, so None only means left out."""
    if get_origin(kind) in {Union, UnionType}:
        rest = [part for part in get_args(kind) if part is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind


def _plain(message: str) -> str:
    """A sentence of msgspec's in our users' words."""
    return message[0].lower() + message[1:]
