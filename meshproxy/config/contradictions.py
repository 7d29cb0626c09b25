"""What no single value can show: names that point nowhere, keys that need each other, things said twice.

A value whose own type is at fault is None here and is passed over: its fault was told already.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from meshproxy.config.addresses import is_everywhere, is_private
from meshproxy.config.names import nearest, under
from meshproxy.config.settings import STANDARD_TIERS, Defaults, Model, Prices, Server, ServiceTier, Settings, Upstream

# No model costs so little for a million tokens, and for one token none costs so much: o1-pro's output, among the dearest there
# were, took 600 USD for a million (https://platform.openai.com/docs/pricing), and so 0.0006 for one.
LEAST_USD_PER_MTOK = 0.001
PRICES = Prices.__struct_fields__
# What OpenAI's API has behind its base URL.
ENDPOINTS = ("/chat/completions", "/completions", "/responses", "/embeddings", "/models")
# Hosts that serve nothing without this path; their pages are in docs/providers.md.
PATHS = {
    "api.openai.com": "/v1",
    "openrouter.ai": "/api/v1",
    "api.anthropic.com": "/v1",
    "api.x.ai": "/v1",
    "api.mistral.ai": "/v1",
    "api.groq.com": "/openai/v1",
}
LEAST_SECRET_CHARS = 8
_SECRET_HEADER = re.compile(r"(?i)key|token|secret")
EVERYBODY = frozenset({"0.0.0.0/0", "::/0"})


def contradictions(settings: Settings) -> Iterator[str]:
    """Each a sentence that begins with its path."""
    if settings.server is not None:
        yield from _server_faults(settings.server)
    if settings.redis is not None and settings.redis.on_failure == "local" and settings.redis.journal is None:
        yield 'redis.journal: on_failure = "local" needs a file to journal settlements in'
    for name, model in (settings.models or {}).items():
        if model is not None:
            yield from _model_faults(model, under("models", name), settings)
    if settings.defaults is not None:
        yield from _default_faults(settings.defaults.model, settings)


def likely_mistakes(settings: Settings, table: Mapping[str, Any]) -> Iterator[str]:
    """What can be served and is hardly meant: each a sentence that begins with its path. `table`: the text's own."""
    if settings.server is not None:
        yield from _server_doubts(settings.server)
    for name, upstream in (settings.upstreams or {}).items():
        if upstream is not None:
            yield from _upstream_doubts(upstream, under("upstreams", name))
    for name, model in (settings.models or {}).items():
        if model is not None:
            yield from _model_doubts(model, name)
    said = table.get("defaults")
    if isinstance(said, dict) and said.get("model") == Defaults().model not in (settings.models or {}):
        yield f"defaults.model: no model is named {said['model']}: a request that names none gets 404"


def _server_doubts(server: Server) -> Iterator[str]:
    is_bare = (
        server.tls_cert is None and not server.allowed_clients and server.trusted_proxies == Server().trusted_proxies
    )
    if server.listen is not None and is_everywhere(server.listen) and is_bare:
        yield (
            "server.listen: every interface, in plain HTTP, and server.trusted_proxies names no proxy in front: clients' keys"
            " can be read on the way, and a balancer's own address is taken for theirs"
        )
    for index, network in enumerate(server.trusted_proxies or ()):
        if network in EVERYBODY:
            yield f"server.trusted_proxies[{index}]: everybody may say which address they come from"
    if "*" in (server.cors_origins or ()):
        yield "server.cors_origins: every page on the web may send requests with the keys that its visitors give it"


def _upstream_doubts(upstream: Upstream, path: str) -> Iterator[str]:
    url = (upstream.base_url or "").rstrip("/")
    end = next((end for end in ENDPOINTS if url.endswith(end)), None)
    if end is not None:
        yield f"{path}.base_url: the gateway adds the path of an endpoint itself: leave {end} out"
    parts = urlsplit(url)
    wanted = PATHS.get(parts.hostname or "")
    if wanted is not None and not parts.path.startswith(wanted):
        yield f"{path}.base_url: {parts.hostname} has its API at {wanted}"
    for name, value in (upstream.headers or {}).items():
        if isinstance(value, str) and _SECRET_HEADER.search(name) and len(value) >= LEAST_SECRET_CHARS:
            yield f'{under(f"{path}.headers", name)}: a secret in plain text? {{ env = "NAME" }} keeps it out of the file'


def _model_doubts(model: Model, name: str) -> Iterator[str]:
    path = under("models", name)
    if "*" in name:
        yield f"{path}: no pattern is matched: this is one model, whose name has a *"
    for index, route in enumerate(model.upstreams or ()):
        if route is not None and "*" in (route.model or ""):
            yield f"{path}.upstreams[{index}].model: no pattern is matched: the upstream is asked for a name with a *"
    if (
        model.cost_from == "usage.cost"
        and model.output_usd_per_mtok is not None
        and not float(model.output_usd_per_mtok)
    ):
        yield f'{path}.output_usd_per_mtok: with cost_from = "usage.cost" the prices size what is held: 0 holds nothing'
    for where, prices in _prices_of(model, path):
        for key in PRICES:
            usd = getattr(prices, key)
            if usd is not None and 0 < float(usd) < LEAST_USD_PER_MTOK:
                yield f"{where}.{key}: {usd} USD for a million tokens: is it the price of one token?"


def _prices_of(model: Model, path: str) -> Iterator[tuple[str, Prices]]:
    """Every table of prices of a model, with its path."""
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
    admin = server.admin_listen
    if admin is not None:
        if server.listen == admin and not admin.endswith(":0"):
            yield "server.admin_listen: the same as server.listen"
        elif server.admin_token is None and not is_private(admin):
            yield f"server.admin_listen: others can reach {admin}: it needs a server.admin_token"
    if (server.tls_cert is None) != (server.tls_key is None):
        here, missing = ("tls_cert", "tls_key") if server.tls_key is None else ("tls_key", "tls_cert")
        yield f"server.{missing}: needed beside server.{here}"


def _model_faults(model: Model, path: str, settings: Settings) -> Iterator[str]:
    upstreams = settings.upstreams or {}
    for index, route in enumerate(model.upstreams or ()):
        if route is not None and route.upstream is not None and route.upstream not in upstreams:
            told = f"no upstream is named {route.upstream}{nearest(route.upstream, upstreams)}"
            yield f"{path}.upstreams[{index}].upstream: {told}"
    output, window = model.max_output_tokens, model.context_window
    if output is not None and window is not None and output > window:
        yield f"{path}.max_output_tokens: {output} is more than context_window, {window}"
    for name in sorted(STANDARD_TIERS & (model.service_tiers or {}).keys()):
        yield f"{under(f'{path}.service_tiers', name)}: this tier has the model's own prices"


def _default_faults(model: str | None, settings: Settings) -> Iterator[str]:
    """The built-in default may be missing: then a request has to name its model."""
    models = settings.models or {}
    if model is not None and model != Defaults().model and model not in models:
        yield f"defaults.model: no model is named {model}{nearest(model, models)}"
