"""An edge proxy for LLM traffic: keys, rate limits, prepaid credit, and streams relayed untouched.

Library use: `meshproxy.create_app(meshproxy.parse(text))` is an aiohttp application.
"""

from typing import TYPE_CHECKING, Any

from meshproxy.config import Settings, parse

if TYPE_CHECKING:
    from meshproxy.app.application import create_app

__all__ = ["Settings", "create_app", "parse"]


def __getattr__(name: str) -> Any:
    """`create_app` is imported when it is asked for, so that the commands start without what they don't use."""
    if name == "create_app":
        from meshproxy.app.application import create_app  # noqa: PLC0415

        return create_app
    raise AttributeError(f"module 'meshproxy' has no attribute {name!r}")
