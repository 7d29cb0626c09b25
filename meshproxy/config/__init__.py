"""The typed settings, and how they are decoded from TOML text.

The package is pure: the caller passes in the text, the environment and a function that reads secret files, so a
configuration can be checked anywhere. All faults of a text are found at once, each with its path and, for an unknown
key, the nearest known name.
"""

from meshproxy.config.load import ConfigError, Decoded, decode, parse
from meshproxy.config.secrets import SecretReader, Secrets, resolved
from meshproxy.config.settings import (
    STANDARD_TIERS,
    Buckets,
    Credits,
    Defaults,
    Idempotency,
    Log,
    Metrics,
    Model,
    Prices,
    PriceTier,
    RateLimits,
    Redis,
    Route,
    Secret,
    Server,
    ServiceTier,
    Settings,
    Stream,
    Tracing,
    Upstream,
    split_address,
)

__all__ = [
    "STANDARD_TIERS",
    "Buckets",
    "ConfigError",
    "Credits",
    "Decoded",
    "Defaults",
    "Idempotency",
    "Log",
    "Metrics",
    "Model",
    "PriceTier",
    "Prices",
    "RateLimits",
    "Redis",
    "Route",
    "Secret",
    "SecretReader",
    "Secrets",
    "Server",
    "ServiceTier",
    "Settings",
    "Stream",
    "Tracing",
    "Upstream",
    "decode",
    "parse",
    "resolved",
    "split_address",
]
