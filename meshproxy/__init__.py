"""An edge proxy for LLM traffic: keys, rate limits, prepaid credit, and streams relayed untouched.

Library use: `meshproxy.create_app(meshproxy.parse(text))` is an aiohttp application.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshproxy.app.application import create_app
    from meshproxy.config import Settings, parse

__all__ = ["Settings", "create_app", "parse"]

VERSION = "0.1.0"  # pyproject.toml reads it here


def __getattr__(name: str) -> Any:
    """Import an exported name at its first use.

    So a command loads only what it needs, and `serve` can handle signals before anything else (__main__.py).
    """
    if name not in __all__:
        raise AttributeError(f"module 'meshproxy' has no attribute {name!r}")
    module = "meshproxy.app.application" if name == "create_app" else "meshproxy.config"
    return getattr(importlib.import_module(module), name)
