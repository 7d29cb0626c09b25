"""The admin listener's application: metrics, probes, the status page and the admin API.

No request here needs a client's key.

Without a token it answers only requests whose Host is an IP address, `localhost` or a configured name. So it refuses a
web page whose own name resolves to this address (DNS rebinding). With a token, everything except the probes requires
it: `Authorization: Bearer TOKEN`, or Basic with any user and the token as password, which browsers ask for.
"""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from importlib.resources import files
from typing import Any, Protocol, TypedDict

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from meshproxy.errors import GatewayError, Source, forbidden, internal_error, unauthorized
from meshproxy.ledger.administration import Administration
from meshproxy.server.admin_api import add_routes
from meshproxy.server.aiohttp_path import envelope_errors, error_response
from meshproxy.server.chat import request_id_of
from meshproxy.server.client_address import address
from meshproxy.server.routes import json_response
from meshproxy.telemetry.exposition import Summary

PROBES = frozenset({"/healthz", "/readyz"})

_CHALLENGES = ("Bearer", 'Basic realm="meshproxy admin", charset="UTF-8"')
_PORT = re.compile(r":[0-9]*\Z")
_IP = re.compile(r"\[[0-9a-f:.]+\]|[0-9.]+")
_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)

_log = structlog.get_logger("meshproxy.server")


class WorkerStatus(TypedDict):
    """One worker process."""

    pid: int
    state: str  # "running", "starting", "draining"
    uptime_s: float
    restarts: int


class Status(Summary):
    """The body of GET /status: the summary of the metrics, and the state of the process."""

    version: str
    uptime_s: float
    not_ready: list[str]  # reasons; empty: ready
    max_in_flight: int
    ledger_state: str  # "up", "down", or "local" (redis.on_failure)
    workers: list[WorkerStatus]
    history: list[dict[str, Any]]  # the last hour: at (Unix seconds), requests by kind, p50 and p99 of the request time
    failures: list[dict[str, Any]]  # the latest requests that failed, newest first
    last_errors: dict[str, dict[str, Any]]  # of each upstream
    refused: list[dict[str, Any]]  # refusals of the last minute by account and limit, most first


class AdminState(Protocol):
    """The source of the admin listener's answers."""

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """Return the exposition of all workers and its Content-Type (telemetry.exposition.render)."""

    async def ready(self) -> list[str]:
        """Return why no traffic should come here, each a few words such as `draining`; empty: ready."""

    async def status(self) -> Status:
        """Return what the status page shows, ready for JSON."""


def create_admin(
    state: AdminState, token: str | None = None, hosts: Iterable[str] = (), administration: Administration | None = None
) -> web.Application:
    """Make the admin listener's application.

    `hosts`: names, besides `localhost`, that it answers to without a token. `administration`: what the admin API works on; the
    API exists only with a token.
    """
    middlewares: list[Middleware] = [envelope_errors, _envelope_bugs]
    middlewares.append(
        _require_token(token) if token is not None else _require_host({"localhost", *map(str.lower, hosts)})
    )
    admin = web.Application(middlewares=middlewares)
    pages = _Pages(state)
    admin.router.add_get("/", pages.page)
    admin.router.add_get("/status", pages.status)
    admin.router.add_get("/metrics", pages.metrics)
    admin.router.add_get("/healthz", pages.healthz)
    admin.router.add_get("/readyz", pages.readyz)
    if administration is not None and token is not None:
        add_routes(admin, administration)
    return admin


class _Pages:
    """The handlers of the pages and probes."""

    def __init__(self, state: AdminState) -> None:
        self._state = state
        self._html = files("meshproxy.server").joinpath("status.html").read_bytes()
        self._policy = _content_security_policy(self._html)

    async def page(self, _request: web.Request) -> web.Response:
        headers = {
            "content-security-policy": self._policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return web.Response(body=self._html, content_type="text/html", charset="utf-8", headers=headers)

    async def status(self, _request: web.Request) -> web.Response:
        return _no_store(await self._state.status())

    async def metrics(self, request: web.Request) -> web.Response:
        text, content_type = await self._state.metrics(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=text, headers={hdrs.CONTENT_TYPE: content_type})

    async def healthz(self, _request: web.Request) -> web.Response:
        return _no_store({"status": "ok"})

    async def readyz(self, _request: web.Request) -> web.Response:
        reasons = await self._state.ready()
        if reasons:
            return _no_store({"status": "unready", "reasons": reasons}, status=503)
        return _no_store({"status": "ready"})


def _no_store(body: Mapping[str, object], status: int = 200) -> web.Response:
    response = json_response(body, status)
    response.headers["cache-control"] = "no-store"
    return response


def _content_security_policy(html: bytes) -> str:
    """Allow only the page's own script and style, by their hashes (CSP Level 3, 6.7.3), and requests to its origin."""
    allowed = {"script": "'none'", "style": "'none'"}
    for kind, text in _INLINE.findall(html):
        allowed[kind.decode()] = f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@web.middleware
async def _envelope_bugs(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer an unexpected exception in the envelope, with 500."""
    try:
        return await handler(request)
    except (web.HTTPException, GatewayError):
        raise
    except Exception:  # noqa: BLE001 - logged, and answered in JSON
        request_id = request_id_of(request)
        _log.exception("admin_failed", path=request.path, request_id=request_id)
        return error_response(internal_error(), request_id)


def _require_token(token: str) -> Middleware:
    """Make the middleware that requires the token, except for the probes."""
    expected = token.encode()

    @web.middleware
    async def require_token(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path in PROBES or hmac.compare_digest(_token_of(request), expected):
            return await handler(request)
        refusal = error_response(unauthorized("The admin token is missing or wrong."), request_id_of(request))
        del refusal.headers[hdrs.WWW_AUTHENTICATE]
        for challenge in _CHALLENGES:
            refusal.headers.add(hdrs.WWW_AUTHENTICATE, challenge)
        return refusal

    return require_token


def _require_host(names: Collection[str]) -> Middleware:
    """Make the middleware that refuses a Host that is neither an IP address nor one of `names`."""

    @web.middleware
    async def require_host(request: web.Request, handler: Handler) -> web.StreamResponse:
        hosts = request.headers.getall(hdrs.HOST, [])  # none in HTTP/1.0, which no browser uses
        if not request.raw_path.startswith("/"):
            hosts = [request.host]  # of an absolute target, in the place of `Host` (RFC 9112, section 3.2.2)
        for host in hosts:
            name = _PORT.sub("", host).lower()
            if name not in names and (_IP.fullmatch(name) is None or address(name) is None):
                raise GatewayError(Source.CLIENT, forbidden("This Host is not one of server.admin_hosts."))
        return await handler(request)

    return require_host


def _token_of(request: web.Request) -> bytes:
    """Return the token of a request's Authorization header, b"" if there is none."""
    scheme, _, credentials = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip().encode("utf-8", "surrogateescape")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
