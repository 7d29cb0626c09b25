"""An edge proxy for LLM traffic: keys, rate limits, prepaid credit, and streams relayed untouched.

Library use: `meshproxy.create_app(meshproxy.parse(text))` is an aiohttp application.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshproxy.app.application import create_app
    from meshproxy.config import Settings, parse

__all__ = ["Settings", "create_app", "parse"]


def __getattr__(name: str) -> Any:
    """Import what the package exports when it is asked for: the commands start without what they don't use, and `serve` can take
    care of its signals first (__main__.py).
    """
    if name not in __all__:
        raise AttributeError(f"module 'meshproxy' has no attribute {name!r}")
    room = "meshproxy.app.application" if name == "create_app" else "meshproxy.config"
    return getattr(importlib.import_module(room), name)
