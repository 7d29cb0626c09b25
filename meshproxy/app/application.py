"""The gateway as an aiohttp application: for `serve`, and for whoever wants it in a program of their own."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from meshproxy.app.load import filled
from meshproxy.app.worker import Worker, with_redis
from meshproxy.config import Settings
from meshproxy.server import openapi
from meshproxy.server.api import ROUTES, Api
from meshproxy.server.chat import CHAT_PATH
from meshproxy.server.envelope import envelope_errors
from meshproxy.server.general import Strictness
from meshproxy.telemetry import logs
from meshproxy.telemetry.families import NONE, OTHER
from meshproxy.telemetry.logs import RequestLog


def create_app(settings: Settings, secrets: Mapping[str, str] | None = None) -> web.Application:
    """The data listener's application. Redis is connected to, and closed, with the application's own start and end.

    `secrets`: the API key of each upstream by name; by default they are read as the settings say. Raises config.Unfit if one
    can't be had.
    """
    sink = logs.configure(settings.log.level, settings.log.format, sys.stderr.buffer)
    request_log = RequestLog(sink, settings.log.level, settings.log.format)
    settings, found = filled(settings, need_keys=secrets is None)
    keys = found.upstreams if secrets is None else secrets
    worker = Worker(settings, keys, request_log, settings.redis.journal)

    async def lifetime(_: web.Application) -> AsyncIterator[None]:
        async with with_redis(settings) as standing:
            worker.settings = standing
            await worker.start()
            yield
            worker.gateway.shut_down()
            await worker.stop()

    app = application(worker)
    app.cleanup_ctx.append(lifetime)
    return app


def application(worker: Worker) -> web.Application:
    """Every path over a worker that somebody else starts and stops."""
    app = web.Application(
        middlewares=[_counting(worker), envelope_errors], client_max_size=worker.settings.server.max_body_bytes
    )
    app.router.add_post(CHAT_PATH, worker.serve_chat, expect_handler=_not_yet)
    for method, path, function in ROUTES:
        app.router.add_route(method, path, partial(_answer, worker, function), expect_handler=_not_yet)
    app.router.add_get(openapi.PATH, openapi.handler())
    return app


def strictness(worker: Worker) -> Strictness:
    """How the listener treats what isn't a request, and where that is counted."""

    def on_refused(status: int) -> None:
        worker.metrics.requests.labels(OTHER, NONE, str(status), "false").inc()

    return Strictness(
        lambda: worker.settings.server.header_timeout_s, on_refused, lambda: worker.settings.server.write_timeout_s
    )


def _counting(worker: Worker) -> Middleware:
    """Counts what is answered beside the main job, which counts itself."""

    @web.middleware
    async def counting(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else OTHER
        if route != CHAT_PATH or request.method != "POST":
            worker.metrics.requests.labels(route, NONE, str(response.status), "false").inc()
        return response

    return counting


async def _not_yet(_request: web.Request) -> None:
    """100 Continue is sent when the body is wanted."""


async def _answer(
    worker: Worker, function: Callable[[Api, web.Request], Awaitable[web.Response]], request: web.Request
) -> web.StreamResponse:
    """Answer with a worker that has started since its routes were laid."""
    return await function(worker.api, request)
