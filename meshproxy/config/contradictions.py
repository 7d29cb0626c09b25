"""What no single type can see: names that point nowhere, addresses that are none, things said twice.

A value whose own type is at fault is None here and is passed over: its fault was told already.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from urllib.parse import urlsplit

from msgspec.structs import asdict

from meshproxy.config.addresses import address_fault, is_network, is_private
from meshproxy.config.names import nearest, under
from meshproxy.config.settings import (
    MOST_EDGES,
    Buckets,
    Defaults,
    Model,
    Redis,
    Route,
    Secret,
    Server,
    Settings,
    Tracing,
    Upstream,
)

REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster")

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, 5.6.2: what a header's name is made of
_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")  # and what its value may be, if it is sent by us
_OURS = frozenset({"authorization", "content-length", "content-type", "host", "transfer-encoding", "connection"})


def contradictions(settings: Settings) -> Iterator[str]:
    """Each a sentence that begins with its path."""
    if settings.server is not None:
        yield from _server_faults(settings.server)
    if settings.redis is not None:
        yield from _redis_faults(settings.redis)
    if settings.metrics is not None and settings.metrics.buckets is not None:
        yield from _bucket_faults(settings.metrics.buckets)
    yield from _tracing_faults(settings.tracing)
    for name, upstream in (settings.upstreams or {}).items():
        if upstream is not None:
            yield from _upstream_faults(upstream, under("upstreams", name))
    for name, model in (settings.models or {}).items():
        if model is not None:
            yield from _model_faults(model, under("models", name), settings)
    if settings.defaults is not None:
        yield from _default_faults(settings.defaults.model, settings)


def _server_faults(server: Server) -> Iterator[str]:
    for index, network in enumerate(server.trusted_proxies or ()):
        if network is not None and not is_network(network):
            yield f"server.trusted_proxies[{index}]: {network!r} is not a network such as 10.0.0.0/8"
    listen_fault = address_fault(server.listen) if server.listen is not None else None
    if listen_fault:
        yield f"server.listen: {listen_fault}"
    admin_fault = _admin_fault(server) if server.admin_listen is not None else None
    if admin_fault:
        yield f"server.admin_listen: {admin_fault}"
    yield from _secret_faults(server.admin_token, "server.admin_token")
    if (server.tls_cert is None) != (server.tls_key is None):
        here, missing = ("tls_cert", "tls_key") if server.tls_key is None else ("tls_key", "tls_cert")
        yield f"server.{missing}: needed beside server.{here}"


def _admin_fault(server: Server) -> str | None:
    fault = address_fault(server.admin_listen)
    if fault is None and server.listen == server.admin_listen and not server.listen.endswith(":0"):
        return "the same as server.listen"
    if fault is None and server.admin_token is None and not is_private(server.admin_listen):
        return f"others can reach {server.admin_listen}: it needs a server.admin_token"
    return fault


def _secret_faults(secret: Secret | None, path: str) -> Iterator[str]:
    if secret is not None and (secret.env is None) == (secret.file is None):
        yield f'{path}: say one of {{ env = "NAME" }} and {{ file = "/path" }}'


def _redis_faults(redis: Redis) -> Iterator[str]:
    if redis.url is not None and redis.url != "embedded":
        scheme, separator, _ = redis.url.partition("://")
        if not separator or scheme not in REDIS_SCHEMES:  # the rest may hold a password
            yield f"redis.url: its scheme is none of {', '.join(f'{name}://' for name in REDIS_SCHEMES)}, nor is it embedded"
    if redis.on_failure == "local" and redis.journal is None:
        yield 'redis.journal: on_failure = "local" needs a file to journal settlements in'


def _bucket_faults(buckets: Buckets) -> Iterator[str]:
    for family, edges in asdict(buckets).items():
        if edges is None or None in edges:
            continue
        if any(low >= high for low, high in pairwise(edges)):
            yield f"metrics.buckets.{family}: each edge must be more than the one before it"
        if len(edges) > MOST_EDGES:
            yield f"metrics.buckets.{family}: {len(edges)} edges are more than {MOST_EDGES}"


def _tracing_faults(tracing: Tracing | None) -> Iterator[str]:
    fault = _url_fault(tracing.endpoint) if tracing is not None and tracing.endpoint is not None else None
    if fault:
        yield f"tracing.endpoint: {fault}"


def _upstream_faults(upstream: Upstream, path: str) -> Iterator[str]:
    yield from _secret_faults(upstream.api_key, f"{path}.api_key")
    fault = _url_fault(upstream.base_url) if upstream.base_url is not None else None
    if fault:
        yield f"{path}.base_url: {fault}"
    for name, value in (upstream.headers or {}).items():
        if _TOKEN.fullmatch(name) is None:
            yield f"{under(f'{path}.headers', name)}: not a header's name"
        elif name.lower() in _OURS:
            yield f"{under(f'{path}.headers', name)}: the gateway sends this header itself"
        elif value is not None and _VALUE.fullmatch(value) is None:
            yield f"{under(f'{path}.headers', name)}: not what a header can carry"


def _url_fault(url: str) -> str | None:
    try:
        port = urlsplit(url).port
    except ValueError as error:
        return str(error)
    return "there is no port 0" if port == 0 else None


def _model_faults(model: Model, path: str, settings: Settings) -> Iterator[str]:
    for index, route in enumerate(model.upstreams or ()):
        if route is not None and route.upstream is not None:
            yield from _route_faults(route, f"{path}.upstreams[{index}]", settings)
    output, window = model.max_output_tokens, model.context_window
    if output is not None and window is not None and output > window:
        yield f"{path}.max_output_tokens: {output} is more than context_window, {window}"


def _route_faults(route: Route, path: str, settings: Settings) -> Iterator[str]:
    upstreams = settings.upstreams or {}
    if route.upstream not in upstreams:
        yield f"{path}.upstream: no upstream is named {route.upstream}{nearest(route.upstream, upstreams)}"


def _default_faults(model: str | None, settings: Settings) -> Iterator[str]:
    """The built-in default may be missing: then a request has to name its model."""
    models = settings.models or {}
    if model is not None and model != Defaults().model and model not in models:
        yield f"defaults.model: no model is named {model}{nearest(model, models)}"
