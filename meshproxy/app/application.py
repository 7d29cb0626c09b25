"""The gateway as an aiohttp application, and `DataListener`, which serves it on a socket and drains it.

`create_app` is for programs of others: it changes nothing of its host. `serve` uses `application` and `DataListener`.
"""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import partial

import orjson
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from multidict import CIMultiDict

from meshproxy.app.load import read_secrets
from meshproxy.app.worker import Worker, with_redis
from meshproxy.config import ConfigError, Server, Settings
from meshproxy.openai.headers import VERSION_HEADER, cors_headers, preflight_headers
from meshproxy.openai.request import CHAT_PATH
from meshproxy.server.aiohttp_path import PATHS, ConnectionLimits, envelope_errors
from meshproxy.server.api import OPENAPI_PATH, ROUTES, document
from meshproxy.server.chat import WrittenResponse, request_id_of
from meshproxy.server.listener import ProxiedSite, Runner, Site, load_certificate, server_context
from meshproxy.server.routes import Route
from meshproxy.telemetry.families import NONE, OTHER
from meshproxy.telemetry.logs import RequestLog
from meshproxy.upstream.provider import descriptor_bound

HEALTH_PATH = "/health"

UPSTREAM_SHARE = 8  # an eighth of all descriptors is kept for connections to providers, however many clients there are
HANGUP_POLL_S = 0.25  # how often a host program's connection is checked for a hang-up


def create_app(
    settings: Settings, middlewares: Iterable[Middleware] = (), *, secrets: Mapping[str, str] | None = None
) -> web.Application:
    """Make the data listener's application for use in another program.

    Every request passes through `middlewares`, inside the middleware that turns exceptions into the error envelope. The
    chat path writes its answer to the client as it arrives, so a middleware can refuse, replace or change a request,
    but not its answer.

    Redis is connected and closed with the application's startup and cleanup. `secrets`: the API key of each upstream by
    name; by default they are read as the settings say. Raises ConfigError if one can't be read. Log lines are structlog
    events.
    """
    settings, read = read_secrets(settings, need_keys=secrets is None)
    keys = read.upstreams if secrets is None else secrets
    worker = Worker(settings, keys, RequestLog(level=settings.log.level), settings.redis.journal)

    async def lifetime(_: web.Application) -> AsyncIterator[None]:
        async with with_redis(settings) as connectable:
            worker.settings = connectable
            await worker.start()
            yield
            worker.gateway.shut_down()
            worker.gateway.interrupt()
            await worker.stop()

    app = application(worker, partial(_until_hangup, worker.serve_chat), middlewares)
    app.cleanup_ctx.append(lifetime)
    return app


def application(
    worker: Worker, serve_chat: Handler | None = None, middlewares: Iterable[Middleware] = ()
) -> web.Application:
    """Make the application over a worker that is started elsewhere. `serve_chat` replaces its chat handler."""
    app = web.Application(
        middlewares=[_count_requests(worker), _add_cors(worker), envelope_errors, *middlewares],
        client_max_size=worker.settings.server.max_body_bytes,
    )
    app.router.add_post(CHAT_PATH, serve_chat or worker.serve_chat, expect_handler=_ignore_expect)
    for route in ROUTES:
        route.add_to(app, partial(_answer, worker, route), _ignore_expect)
    app.router.add_get(HEALTH_PATH, _health)
    app[PATHS] = (CHAT_PATH, *(route.path for route in ROUTES if "{" not in route.path), HEALTH_PATH, OPENAPI_PATH)
    app.router.add_get(OPENAPI_PATH, partial(_openapi, orjson.dumps(document())))
    return app


def connection_limits(worker: Worker) -> ConnectionLimits:
    """Return how the listener treats invalid requests, where it counts them, and how many connections it accepts."""

    def on_refused(status: int) -> None:
        worker.metrics.requests.labels(OTHER, NONE, str(status), "false").inc()

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ConnectionLimits(
        lambda: worker.settings.server.header_timeout_s,
        on_refused,
        lambda: worker.settings.server.write_timeout_s,
        descriptor_bound(limit) - limit // UPSTREAM_SHARE,
        worker.on_descriptors_exhausted,
        (VERSION_HEADER,),
    )


def _count_requests(worker: Worker) -> Middleware:
    """Make the middleware that counts requests other than chat completions, which the gateway counts."""

    @web.middleware
    async def count_request(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else OTHER
        if route != CHAT_PATH or request.method != "POST":
            worker.metrics.requests.labels(route, NONE, str(response.status), "false").inc()
        return response

    return count_request


async def _until_hangup(serve: Handler, request: web.Request) -> web.StreamResponse:
    """Answer, and cancel the handler when its client has hung up, as aiohttp's `handler_cancellation` does.

    Without this, a host program's runner may let a stream go on to be paid for that no client reads.
    """
    serving = asyncio.ensure_future(serve(request))
    try:
        while not serving.done() and request.transport is not None:
            await asyncio.wait([serving], timeout=HANGUP_POLL_S)
    finally:
        if not serving.done():
            serving.cancel()
            await asyncio.wait([serving])  # wait for its settlement
    if serving.cancelled():
        raise ConnectionResetError("the client has hung up")
    return serving.result()


def _add_cors(worker: Worker) -> Middleware:
    """Make the middleware that adds the API's version and CORS headers, and answers preflight requests."""

    @web.middleware
    async def add_cors(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = cors_headers(request.headers.get("origin"), worker.settings.server.cors_origins)
        if headers and request.method == "OPTIONS" and "access-control-request-method" in request.headers:
            names = request.headers.get("access-control-request-headers")
            sent = [*headers, *preflight_headers(names), VERSION_HEADER, ("x-request-id", request_id_of(request))]
            return web.Response(status=204, headers=CIMultiDict(sent))
        response = await handler(request)
        if not isinstance(response, WrittenResponse):
            response.headers.extend([*headers, VERSION_HEADER])
        return response

    return add_cors


async def _health(_request: web.Request) -> web.Response:
    """Answer that the listener is up. Readiness is reported by the admin listener."""
    return web.json_response({"status": "ok"})


async def _openapi(document: bytes, _request: web.Request) -> web.Response:
    """Answer with the API's description, for which no key is needed."""
    return web.Response(body=document, content_type="application/json")


async def _ignore_expect(_request: web.Request) -> None:
    """Do nothing on `Expect: 100-continue`: 100 Continue is sent when the body is read."""


async def _answer(worker: Worker, route: Route, request: web.Request) -> web.StreamResponse:
    """Answer with the worker's API, which exists only once the worker has started."""
    return await route.answer(worker.api, request)


LINGER_S = 0.1  # how long the last accepted connection gets to send its request
POLL_S = 0.02  # how often a drain checks whether it is done; an event would cost every request
FINAL_SEND_S = 2.0  # how long the last errors and terminal events get to be sent

_log = structlog.get_logger("meshproxy.app")


class DataListener:
    """Serves one socket with one worker."""

    def __init__(self, worker: Worker, sock: socket.socket) -> None:
        self._worker = worker
        self._sock = sock
        self._tls = server_context(worker.settings.server)
        chat = (lambda: worker.chat) if worker.settings.server.fast_path else None
        self._limits = connection_limits(worker)
        self._runner = Runner(application(worker), chat, self._limits, worker.loops)

    async def start(self) -> None:
        """Accept connections."""
        await self._runner.setup()
        server = self._runner.server
        assert server is not None  # noqa: S101 - made by setup()
        worker = self._worker
        if self._worker.settings.server.proxy_protocol:
            self._site: Site = ProxiedSite(
                self._sock,
                server,
                self._tls,
                lambda: worker.chat.trusted_proxies,
                worker.loops,
                self._limits.has_room,
            )
        else:
            self._site = Site(self._sock, server, self._tls)
        await self._site.start()

    def reload(self, server: Server) -> None:
        """Use another certificate from now on. It was checked before; if it can't be loaded now, the old one stays."""
        if self._tls is None:
            return
        try:
            load_certificate(self._tls, server)
        except ConfigError as error:
            _log.error("certificate_not_loaded", faults=error.faults)

    async def drain(self, interrupt: asyncio.Event) -> None:
        """Stop serving gracefully, on SIGTERM.

        First become not ready, and accept connections until the balancer has noticed. Then let running requests end,
        for at most drain_s. Then end the rest. Answers say `Connection: close` from the beginning, so that clients
        without a balancer's health checks come back through the balancer. `interrupt` skips all waits.
        """
        worker, server = self._worker, self._worker.settings.server
        _log.info("draining", in_flight=worker.recorder.in_flight)
        worker.stopping = worker.gateway.draining = self._runner.closing = True
        await wait_for_event(interrupt, server.drain_grace_s)
        await self._site.stop()
        if self._runner.connected():
            await wait_for_event(interrupt, LINGER_S)
        worker.chat.closes_idle = True
        self._runner.close_idle()
        await _wait_until(self._is_done, server.drain_s, interrupt)
        await self._end()

    async def _end(self) -> None:
        """End streams with a terminal event and whole answers with an error, and give them time to be sent."""
        left = self._worker.recorder.in_flight
        if left:
            _log.warning("drain_cut_short", in_flight=left)
        self._worker.gateway.shut_down()
        await _wait_until(lambda: not self._worker.live.relays, FINAL_SEND_S)
        self._runner.interrupt()
        self._worker.gateway.interrupt()
        await _wait_until(self._is_done, FINAL_SEND_S)

    async def close(self) -> None:
        """Close every connection."""
        await self._runner.cleanup()

    def _is_done(self) -> bool:
        return not self._worker.recorder.in_flight and not self._runner.busy()


async def wait_for_event(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for the event, at most `timeout_s`."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


async def _wait_until(condition: Callable[[], bool], timeout_s: float, interrupt: asyncio.Event | None = None) -> None:
    """Wait until the condition holds or `interrupt` is set, at most `timeout_s`."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout_s
    while not condition() and clock() < deadline and not (interrupt is not None and interrupt.is_set()):  # noqa: ASYNC110 - see POLL_S
        await asyncio.sleep(POLL_S)
