"""What no single value can show: names that point nowhere, keys that need each other, things said twice.

A value whose own type is at fault is None here and is passed over: its fault was told already.
"""

from collections.abc import Iterator

from meshproxy.config.addresses import is_private
from meshproxy.config.names import nearest, under
from meshproxy.config.settings import Defaults, Model, Server, Settings


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


def _default_faults(model: str | None, settings: Settings) -> Iterator[str]:
    """The built-in default may be missing: then a request has to name its model."""
    models = settings.models or {}
    if model is not None and model != Defaults().model and model not in models:
        yield f"defaults.model: no model is named {model}{nearest(model, models)}"
