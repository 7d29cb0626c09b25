"""The configuration of `meshproxy dev`: a simulated provider, and the real ones whose keys the environment has."""

from collections.abc import Mapping
from typing import Any

import msgspec

from meshproxy.config import Settings
from meshproxy.upstream.simulator.behaviour import PREFIX, TRAITS
from meshproxy.upstream.simulator.dialects import DIALECTS

REAL: dict[str, dict[str, Any]] = {
    "openai": {"kind": "openai", "base_url": "https://api.openai.com/v1", "api_key": {"env": "OPENAI_API_KEY"}},
    "openrouter": {
        "kind": "openrouter",
        "base_url": "https://openrouter.ai/api/v1",
        "api_key": {"env": "OPENROUTER_API_KEY"},
    },
}
SIMULATED = "sim/default"
FAMILY_SAMPLES = ("error-400", "error-429", "error-500", "error-503", "tokens-200", "flaky-2", "fail-first-1")

# The providers' list prices in USD per million tokens (input, cached input, output), with the context and the longest
# answer, as published for these models; a deployment writes down its own.
_OPENAI: dict[str, tuple[str, str, str, int, int]] = {
    "openai/gpt-4o": ("2.50", "1.25", "10.00", 128_000, 16_384),
    "openai/gpt-4o-mini": ("0.15", "0.075", "0.60", 128_000, 16_384),
    "openai/gpt-4.1": ("2.00", "0.50", "8.00", 1_047_576, 32_768),
    "openai/gpt-4.1-mini": ("0.40", "0.10", "1.60", 1_047_576, 32_768),
}
_SIMULATED_OPENAI = ("openai/gpt-4o", "openai/gpt-4o-mini")


def dev_settings(*, redis_url: str, simulator_url: str, port: int, env: Mapping[str, str]) -> Settings:
    """Settings for a gateway on `port` and the next; both are free ones if it is 0."""
    real = {name: provider for name, provider in REAL.items() if env.get(provider["api_key"]["env"])}
    # Time-outs are short: whoever tries sim/stall wants to see it end.
    simulator = {"kind": "simulator", "base_url": simulator_url, "first_byte_timeout_s": 10, "idle_timeout_s": 10}
    table = {
        "server": {
            "listen": f"127.0.0.1:{port}",
            "admin_listen": f"127.0.0.1:{port and port + 1}",
            "workers": 1,
            "drain_s": 2,
        },
        "log": {"format": "console"},
        "redis": {"url": redis_url},
        "defaults": {"model": SIMULATED if real else "openai/gpt-4o"},
        "upstreams": {"simulator": simulator, **_dialects(simulator), **real},
        "models": {**_openai_models(list(real)), **_simulated_models()},
    }
    return msgspec.convert(table, Settings)


def _simulated_models() -> dict[str, Any]:
    names = {SIMULATED: f"{PREFIX}plain"} | {PREFIX + name: PREFIX + name for name in (*TRAITS, *FAMILY_SAMPLES)}
    plain = {name: _simulated("simulator", model) for name, model in names.items()}
    for name, dialect in DIALECTS.items():
        own = f"dialect-{name}"
        plain[PREFIX + own] = {**_simulated(own if dialect.upstream else "simulator", PREFIX + own), **dialect.model}
    return plain


def _simulated(upstream: str, model: str) -> dict[str, Any]:
    routes = [{"upstream": upstream, "model": model}]
    return {"upstreams": routes, "input_usd_per_mtok": "1.00", "output_usd_per_mtok": "4.00"}


def _dialects(simulator: dict[str, Any]) -> dict[str, Any]:
    """The simulator once more for each dialect that needs other settings."""
    settings = {name: dialect.upstream for name, dialect in DIALECTS.items() if dialect.upstream}
    return {f"dialect-{name}": {**simulator, **own} for name, own in settings.items()}


def _openai_models(real: list[str]) -> dict[str, Any]:
    """Served by the providers that are there, OpenAI first; some of them by the simulator if none is."""
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
    """OpenRouter names models as we do; the others leave out who made them."""
    return {"upstream": upstream, "model": name if upstream == "openrouter" else name.partition("/")[2]}
