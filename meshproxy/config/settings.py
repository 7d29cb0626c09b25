"""The typed settings, one struct for each table of the TOML, and the checks of their values.

Addresses of listeners are `HOST:PORT`, `[IPV6]:PORT`, `:PORT` (every interface) or `unix:/path`. The `*_fault`
functions return what is wrong with a value, None if it is valid. docs/configuration.md is made from these structs.
"""

import ipaddress
import re
from itertools import pairwise
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta, Struct, field

from meshproxy.units import MAX_EXACT_INT

REDIS_SCHEMES = ("redis://", "rediss://", "unix://", "redis+sentinel://", "redis+cluster://")
MAX_LABEL = 63  # of a host's name; RFC 1035, section 2.3.4
MAX_HOST = 253  # in text, of the 255 octets that RFC 1035, section 2.3.4, gives to a name on the wire
MAX_IPV4_DIGITS = 10  # of 2**32 - 1
DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_SOCKET_PATH = 107  # sun_path and its NUL; unix(7)

_HOST = re.compile(r"[A-Za-z0-9._-]*")


def split_address(address: str) -> tuple[str, int]:
    """Split `127.0.0.1:8080`, `[::1]:8080` or `:8080` (every interface) into host and port; else raise ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1])), int(port)
        except ValueError as error:
            raise ValueError(f"{address!r}: {host[1:-1]!r} is not an IPv6 address") from error
    if ":" in host:
        raise ValueError(f"{address!r}: an IPv6 address goes in brackets")
    if _HOST.fullmatch(host) is None:
        raise ValueError(f"{address!r} is not HOST:PORT")
    fault = host_fault(host) if host else None
    if fault is not None:
        raise ValueError(f"{address!r}: {fault}")
    return host, int(port)


def address_fault(address: str) -> str | None:
    """Return what is wrong with a listener's address, None if it is valid."""
    if address.startswith("unix:"):
        if not address.startswith("unix:/") or "\0" in address:
            return f"{address!r} needs an absolute path"
        too_long = len(address.removeprefix("unix:").encode()) > MAX_SOCKET_PATH
        return f"the path of a unix socket has at most {MAX_SOCKET_PATH} bytes" if too_long else None
    try:
        split_address(address)
    except ValueError as error:
        return str(error)
    return None


def is_private(address: str) -> bool:
    """Return whether only this machine can reach a listener: loopback or a socket file. False if it is invalid."""
    if address.startswith("unix:"):
        return True
    try:
        host, _ = split_address(address)
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_everywhere(address: str) -> bool:
    """Return whether a listener's address is every interface of the machine. False if it is invalid."""
    if address.startswith("unix:") or address_fault(address) is not None:
        return False
    return split_address(address)[0] in {"", "0.0.0.0", "::"}  # noqa: S104 - compared, not bound


def network_fault(text: str) -> str | None:
    """Return what is wrong with a network or a single address, None if it is valid."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return f"{text!r} is not a network such as 10.0.0.0/8"
    return None


def url_fault(url: str) -> str | None:
    """Return what is wrong with an HTTP URL's host or port, None if they are valid."""
    try:
        parts = urlsplit(url)
        if parts.port == 0:
            return "there is no port 0"
    except ValueError as error:
        return str(error)
    return host_fault(parts.hostname or "")


def host_fault(host: str) -> str | None:
    """Return what is wrong with a host name or address, None if valid. A final dot is the root (RFC 1034, 3.1)."""
    if ":" in host:
        try:
            ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            return "its host is not an IPv6 address"
        return None
    name = host.removesuffix(".")
    if _HOST.fullmatch(name) is None or any(not 1 <= len(label) <= MAX_LABEL for label in name.split(".")):
        return f"a label of its host's name has 1 to {MAX_LABEL} letters, digits, - and _ (RFC 1035, 2.3.4)"
    if len(name) > MAX_HOST:
        return f"its host's name has more than {MAX_HOST} characters (RFC 1035, 2.3.4)"
    is_address = name.rpartition(".")[2].isdigit()  # no top-level domain is a number (RFC 3696, 2)
    return "its host is not an IPv4 address" if is_address and not _is_ipv4(name) else None


def _is_ipv4(name: str) -> bool:
    """Return whether inet_aton(3) accepts a name: up to four numbers, the last of which is all remaining bytes."""
    parts = name.split(".")
    if len(parts) > 4 or not all(part.isdigit() and len(part) <= MAX_IPV4_DIGITS for part in parts):
        return False
    *bytes_, rest = map(int, parts)
    return all(byte < 256 for byte in bytes_) and rest < 256 ** (4 - len(bytes_))


def origin_fault(origin: str) -> str | None:
    """Return what is wrong with an origin, None if a browser may send it.

    A browser sends it in lower case, without the scheme's default port (RFC 6454, 6.2).
    """
    if origin == "*":
        return None
    fault = url_fault(origin)
    if fault is not None:
        return fault
    parts = urlsplit(origin)
    own = DEFAULT_PORTS[parts.scheme]
    sent = origin.lower().removesuffix(f":{own}" if parts.port == own else "")
    return None if origin == sent else f"browsers send it as {sent}"


def redis_url_fault(url: str) -> str | None:
    """Return what is wrong with redis.url's scheme, None if it is valid. The rest may contain a password."""
    if url == "embedded" or url.startswith(REDIS_SCHEMES):
        return None
    return f"expected a URL with one of {', '.join(REDIS_SCHEMES)}, or embedded"


# Service tiers at a model's ordinary price (OpenAI, Anthropic, Groq), and those that leave the choice to the provider.
STANDARD_TIERS = frozenset({"auto", "default", "standard", "on_demand"})

Positive = Annotated[int, Meta(ge=1, le=MAX_EXACT_INT)]
Natural = Annotated[int, Meta(ge=0, le=MAX_EXACT_INT)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]
Duration = Annotated[float, Meta(ge=0.001, le=86400)]  # of a timer: a shorter one keeps a loop busy, or always fires
Usd = Annotated[str, Meta(pattern=r"\A[0-9]{1,6}(\.[0-9]{1,9})?\Z", description='a decimal string in USD, as "2.50"')]
Factor = Annotated[
    str,
    Meta(pattern=r"\A(?=.*[1-9])[0-9]{1,3}(\.[0-9]{1,9})?\Z", description='a decimal string above zero, as "1.05"'),
]
Name = Annotated[str, Meta(pattern=r"\A[!-~]{1,256}\Z", description="1 to 256 characters of ASCII without spaces")]
BaseUrl = Annotated[
    str,
    Meta(
        pattern=r"\Ahttps?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?\Z",
        description="an http or https URL without user, query and fragment",
        extra={"fault": url_fault},
    ),
]
HostName = Annotated[
    str,
    Meta(pattern=r"\A[A-Za-z0-9._-]+\Z", description="a host's name without a port", extra={"fault": host_fault}),
]
JournalPath = Annotated[str, Meta(pattern=r"\A[^\0]*[^\0/]\Z", description="the path of a file")]
Listen = Annotated[str, Meta(extra={"fault": address_fault})]
Network = Annotated[str, Meta(extra={"fault": network_fault})]
RedisUrl = Annotated[str, Meta(extra={"fault": redis_url_fault})]
HeaderName = Annotated[  # syntax: RFC 9110, 5.6.2; a connection's headers: 7.6.1
    str,
    Meta(
        pattern=r"\A(?!(?i:authorization|content-length|content-type|host|transfer-encoding|connection|proxy-connection"
        r"|keep-alive|te|trailer|upgrade|http2-settings|expect|content-encoding|content-range)\Z)[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z",
        description="the name of a header, except headers of a connection and those that the gateway sets itself",
    ),
]
Origin = Annotated[
    str,
    Meta(
        pattern=r"\A(\*|https?://[A-Za-z0-9.\-\[\]:]{1,255})\Z",
        description="an origin (RFC 6454), such as https://app.example, or *",
        extra={"fault": origin_fault},
    ),
]
HeaderValue = Annotated[
    str, Meta(pattern=r"\A[!-~]([ -~]*[!-~])?\Z", description="printable ASCII without spaces at its ends")
]


def _order_fault(edges: list[float]) -> str | None:
    return "each edge must be more than the one before it" if any(a >= b for a, b in pairwise(edges)) else None


Edges = Annotated[list[Seconds], Meta(min_length=1, max_length=50, extra={"fault": _order_fault})]


class Secret(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a secret comes from: `{ env = "NAME" }` or `{ file = "/path" }`."""

    env: str | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        if (self.env is None) == (self.file is None):
            raise ValueError('use either { env = "NAME" } or { file = "/path" }')


class Server(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[server]: the listeners and their limits."""

    listen: Listen = "127.0.0.1:8080"
    admin_listen: Listen = "127.0.0.1:8081"
    workers: Annotated[int, Meta(ge=0, le=256)] = 0
    admin_token: Secret | None = None
    admin_hosts: list[HostName] = field(default_factory=list)
    tls_cert: str | None = None
    tls_key: str | None = None
    cors_origins: list[Origin] = field(default_factory=list)
    proxy_protocol: bool = False
    trusted_proxies: list[Network] = field(default_factory=lambda: ["127.0.0.0/8"])
    allowed_clients: list[Network] = field(default_factory=list)
    failed_logins_per_minute: Natural = 0
    max_body_bytes: Positive = 33_554_432
    max_bodies_bytes: Positive = 134_217_728
    header_timeout_s: Duration = 10
    body_timeout_s: Duration = 60
    write_timeout_s: Duration = 60
    fast_path: bool = True
    max_in_flight: Positive = 4096
    heartbeat_s: Duration = 15
    first_event_hold_s: Annotated[float, Meta(ge=0, le=60)] = 2
    drain_s: Annotated[float, Meta(ge=0, le=86400)] = 600
    drain_grace_s: Annotated[float, Meta(ge=0, le=3600)] = 0


class Stream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[stream]: what an observer of the network can learn from streams."""

    padding: bool = False


class Log(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[log]: level and format of the log."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class Redis(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[redis]: the store, and what happens when it can't be reached."""

    url: RedisUrl | Secret = "redis://127.0.0.1:6379/0"
    password: Secret | None = None
    on_failure: Literal["deny", "local"] = "deny"
    timeout_s: Duration = 2
    journal: JournalPath | None = None
    journal_max_bytes: Positive = 67_108_864
    local_allowance_usd: Usd = "1.00"


class Defaults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[defaults]: values for keys that don't set their own."""

    model: str = "openai/gpt-4o"
    requests_per_minute: Positive = 600
    tokens_per_minute: Positive = 1_000_000


class Credits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[credits]: how much is held for a request, and for how long."""

    strict: bool = True
    default_output_tokens: Positive = 4096
    lease_output_tokens: Positive = 256
    hold_ttl_s: Duration = 60
    clamp: bool = False


class RateLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[limits]: how rate limits apply to streams."""

    enforce_mid_stream: bool = False


class Idempotency(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[idempotency]: how long and up to which size an answer is kept for replay."""

    ttl_s: Duration = 3600
    max_bytes: Positive = 1_048_576
    max_account_bytes: Positive = 268_435_456
    max_keys: Positive = 100_000


class Buckets(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[metrics.buckets]: upper edges of histograms, by name, in place of the defaults (telemetry/families.py)."""

    meshproxy_request_duration_seconds: Edges | None = None
    meshproxy_time_to_first_token_seconds: Edges | None = None
    meshproxy_time_per_output_token_seconds: Edges | None = None
    meshproxy_stream_max_gap_seconds: Edges | None = None
    meshproxy_overhead_seconds: Edges | None = None
    meshproxy_upstream_time_to_first_token_seconds: Edges | None = None
    meshproxy_upstream_request_duration_seconds: Edges | None = None
    meshproxy_upstream_latency_seconds: Edges | None = None
    meshproxy_ledger_op_duration_seconds: Edges | None = None
    meshproxy_event_loop_lag_seconds: Edges | None = None


class Metrics(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[metrics]: whether metrics are also kept by account."""

    accounts: Literal["off", "all"] = "off"
    accounts_max: Positive = 1000
    buckets: Buckets = field(default_factory=Buckets)


class Tracing(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[tracing]: spans for an OpenTelemetry collector. Requires the extra `otel`."""

    endpoint: BaseUrl | None = None
    sample: Annotated[float, Meta(ge=0, le=1)] = 1.0


class Upstream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[upstreams.NAME]: one provider, with its time-outs and limits."""

    kind: Literal["openai", "openrouter", "simulator"]
    base_url: BaseUrl
    api_key: Secret | None = None
    connect_timeout_s: Duration = 5
    first_byte_timeout_s: Duration = 600
    idle_timeout_s: Duration = 300
    cap_field: Literal["max_completion_tokens", "max_tokens"] | None = None
    stream_usage: bool = True
    on_disconnect: Literal["cancel", "drain"] = "cancel"
    max_connections: Positive = 1024
    keepalive_s: Duration = 60
    max_response_bytes: Positive = 33_554_432
    max_event_bytes: Positive = 16_777_216
    headers: dict[HeaderName, HeaderValue | Secret] = field(default_factory=dict)


class Route(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of a model's `upstreams`, tried in order. `weight` balances neighbouring entries that have one."""

    upstream: str
    model: Name
    weight: Positive | None = None


class Prices(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prices of tokens by kind. A kind without a price costs the same as the kind it is a part of."""

    input_usd_per_mtok: Usd
    output_usd_per_mtok: Usd
    cached_input_usd_per_mtok: Usd | None = None
    cache_write_usd_per_mtok: Usd | None = None
    cache_write_1h_usd_per_mtok: Usd | None = None
    reasoning_usd_per_mtok: Usd | None = None
    audio_input_usd_per_mtok: Usd | None = None
    audio_output_usd_per_mtok: Usd | None = None


class PriceTier(Prices, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[[models."ID".price_tiers]]: prices of a whole request with a larger prompt. The highest tier that applies is used."""

    above_prompt_tokens: Positive


def _tiers_fault(tiers: list[PriceTier]) -> str | None:
    edges = [tier.above_prompt_tokens for tier in tiers]
    ascend = None in edges or all(a < b for a, b in pairwise(edges))  # None: at fault, and reported already
    return None if ascend else "above_prompt_tokens of each must be more than that of the one before it"


PriceTiers = Annotated[list[PriceTier], Meta(max_length=16, extra={"fault": _tiers_fault})]


class ServiceTier(Prices, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[models."ID".service_tiers.NAME]: prices of requests that are served in this tier."""

    price_tiers: PriceTiers = field(default_factory=list)


class Model(Prices, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[models."ID"]: the upstreams, size and prices of a model."""

    upstreams: Annotated[list[Route], Meta(min_length=1)]
    context_window: Positive = 128_000
    max_output_tokens: Positive = 16_384
    hidden_reasoning: bool = False
    request_usd: Usd = "0"
    cost_from: Literal["prices", "usage.cost"] = "prices"
    markup: Factor = "1.00"
    field_usd: dict[Name, Usd] = field(default_factory=dict)
    price_tiers: PriceTiers = field(default_factory=list)
    service_tiers: dict[Name, ServiceTier] = field(default_factory=dict)


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration, decoded and free of contradictions."""

    server: Server = field(default_factory=Server)
    stream: Stream = field(default_factory=Stream)
    log: Log = field(default_factory=Log)
    redis: Redis = field(default_factory=Redis)
    defaults: Defaults = field(default_factory=Defaults)
    credits: Credits = field(default_factory=Credits)
    limits: RateLimits = field(default_factory=RateLimits)
    idempotency: Idempotency = field(default_factory=Idempotency)
    metrics: Metrics = field(default_factory=Metrics)
    tracing: Tracing = field(default_factory=Tracing)
    upstreams: dict[Name, Upstream] = field(default_factory=dict)
    models: dict[Name, Model] = field(default_factory=dict)
