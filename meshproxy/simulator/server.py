"""The simulator's application: its routes, and a chat completion's way from its body to its end."""

import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import hdrs, web

from meshproxy.simulator.answer import SEEDED_CREATED, compose
from meshproxy.simulator.behaviour import (
    DIALECT_NAMES,
    FAMILIES,
    PREFIX,
    TRAITS,
    Behaviour,
    SimulatorSettings,
    read_behaviour,
)
from meshproxy.simulator.delivery import (
    BREAKING,
    INSTEAD,
    JSON,
    OUTRIGHT,
    REDIRECTED,
    Delivery,
    Line,
    misbehave,
    pace_of,
    refuse_on_demand,
)
from meshproxy.simulator.dialects import PLAIN as OPENAI
from meshproxy.simulator.journal import BROKEN, CLIENT_CLOSED, COMPLETED, Entry, ExchangeLog
from meshproxy.simulator.request import CompletionRequest, Refusal, decode_request

FAULT_HEADER = "x-sim-fault"
KIND_HEADER = "x-sim-kind"
PLAIN = TRAITS["plain"]
MODELS = {"gpt-4o": PLAIN, "gpt-4o-mini": PLAIN} | {
    PREFIX + name: what for name, what in (TRAITS | FAMILIES | DIALECT_NAMES).items()
}

# What OpenAI sends beside an answer, for a gateway to keep to itself.
PROVIDER_HEADERS = (
    ("server", "meshproxy-simulator"),
    ("openai-version", "2020-10-01"),
    ("openai-organization", "org-simulated"),
    ("openai-processing-ms", "1"),
    ("x-ratelimit-limit-requests", "10000"),
    ("x-ratelimit-remaining-requests", "9999"),
    ("x-ratelimit-reset-requests", "6ms"),
    ("set-cookie", "__cf_bm=simulated; path=/; HttpOnly"),
)


class Simulator:
    """One provider: its settings and what it remembers."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self.journal = ExchangeLog()
        self._settings = settings

    def application(self) -> web.Application:
        """Run it with `handler_cancellation=True`, so that a hang-up is noticed at once."""
        app = web.Application(middlewares=[_tell_as_openai], client_max_size=self._settings.max_body_bytes)
        for prefix in ("/v1", ""):
            app.router.add_post(f"{prefix}/chat/completions", self.chat)
            app.router.add_get(f"{prefix}/models", self.models)
            app.router.add_get(f"{prefix}/models/{{id:.+}}", self.model)
        app.router.add_get("/healthz", self.health)
        app.router.add_get("/_sim/requests", self.requests)
        app.router.add_delete("/_sim/requests", self.forget)
        app.router.add_get("/_sim/stats", self.stats)
        app.router.add_route("*", REDIRECTED, self.redirected)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions"""
        body = await request.read()
        entry = self.journal.open(request, body)
        ended = CLIENT_CLOSED
        line = Line(request, (*PROVIDER_HEADERS, ("x-request-id", f"req_{entry.number:016x}")))
        try:
            ended = await self._answer(request, body, line, entry)
        except ConnectionError:
            pass  # the client is gone, and has been told nothing more
        finally:
            entry.status = line.status
            self.journal.close(entry, ended)
        return line.written()

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models: two plain ones, and every fault by name with what it does; families as a pattern."""
        self._authenticate(request)
        return web.json_response({"object": "list", "data": [_model(name) for name in MODELS]})

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}"""
        self._authenticate(request)
        read_behaviour(request.match_info["id"], None)
        return web.json_response(_model(request.match_info["id"]))

    async def health(self, _request: web.Request) -> web.Response:
        """GET /healthz"""
        return web.json_response({"status": "ok"})

    async def requests(self, _request: web.Request) -> web.Response:
        """GET /_sim/requests: what was received, oldest first, for tests in any language to ask."""
        return web.json_response({"requests": [entry.told() for entry in self.journal.entries]})

    async def forget(self, _request: web.Request) -> web.Response:
        """DELETE /_sim/requests"""
        self.journal.clear()
        return web.Response(status=204)

    async def stats(self, _request: web.Request) -> web.Response:
        """GET /_sim/stats"""
        journal = self.journal
        open_now = {"open_requests": journal.open_requests, "open_streams": journal.open_streams}
        return web.json_response({**open_now, "totals": journal.totals})

    async def redirected(self, request: web.Request) -> web.Response:
        """Nobody should come here: a gateway never follows a redirect. Whoever does is noted."""
        self.journal.close(self.journal.open(request, await request.read()), COMPLETED)
        return web.json_response({"redirected": True})

    async def _answer(self, request: web.Request, body: bytes, line: Line, entry: Entry) -> str:
        """Answer, and say how it ended."""
        dialect = OPENAI
        try:
            self._authenticate(request)
            openrouter = self._settings.openrouter or request.headers.get(KIND_HEADER) == "openrouter"
            ask = decode_request(body, openrouter=openrouter)
            entry.model = ask.model
            if ask.stream:
                self.journal.streams(entry)
            fault = request.headers.get(FAULT_HEADER)
            dialect = read_behaviour(ask.model, fault).dialect
            model, behaviour = self._choose(ask, fault)
            behaviour.dialect.check(ask.given)
            return await self._reply(line, ask, model, behaviour, entry)
        except Refusal as refusal:
            await line.answer(refusal.status, [JSON, *refusal.headers], dialect.error_body(refusal))
            return COMPLETED

    async def _reply(self, line: Line, ask: CompletionRequest, model: str, behaviour: Behaviour, entry: Entry) -> str:
        fault = behaviour.one_of(INSTEAD)
        if fault:
            await misbehave(fault, line, stream=ask.stream)
        else:
            reply = compose(ask, model, behaviour, time.time())
            await Delivery(line, reply, ask, behaviour, pace_of(behaviour, self._settings), entry).run()
        return BROKEN if behaviour.one_of(BREAKING) else COMPLETED

    def _choose(self, ask: CompletionRequest, header: str | None) -> tuple[str, Behaviour]:
        """The model that serves: the first that doesn't fail, or else the last. Only OpenRouter's requests have several."""
        *others, last = (ask.model, *ask.models)
        for model in others:
            with contextlib.suppress(Refusal):
                behaviour = self._behaviour(model, header)
                if not behaviour.one_of(OUTRIGHT):
                    return model, behaviour
        return last, self._behaviour(last, header)

    def _behaviour(self, model: str, header: str | None) -> Behaviour:
        behaviour = read_behaviour(model, header)
        refuse_on_demand(behaviour, self.journal)
        return behaviour

    def _authenticate(self, request: web.Request) -> None:
        if self._settings.api_key is None:
            return
        scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() != "bearer":
            raise Refusal(401, "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY`.")
        if not hmac.compare_digest(token.encode(errors="replace"), self._settings.api_key.encode()):
            shown = f"{token[:4]}****{token[-4:]}" if len(token) > 12 else "****"  # as much of it as OpenAI shows
            raise Refusal(401, f"Incorrect API key provided: {shown}.", code="invalid_api_key")


def _model(name: str) -> dict[str, Any]:
    """OpenAI's model object, and a description, as OpenRouter's has."""
    about = {"created": SEEDED_CREATED, "owned_by": "simulator", "description": MODELS.get(name, PLAIN)}
    return {"id": name, "object": "model", **about}


@web.middleware
async def _tell_as_openai(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Whatever aiohttp would refuse in plain text is refused in OpenAI's words."""
    called = f"{request.method} {request.path[:256]}"
    try:
        return await handler(request)
    except Refusal as error:
        refusal = error
    except web.HTTPNotFound:
        refusal = Refusal(404, f"Unknown request URL: {called}. Please check it for typos.", code="unknown_url")
    except web.HTTPMethodNotAllowed:
        refusal = Refusal(405, f"Not allowed: {called}.", code="method_not_supported")
    except web.HTTPRequestEntityTooLarge:
        message = f"The request body is larger than {request.client_max_size} bytes."
        refusal = Refusal(413, message, code="request_too_large")
    return web.Response(status=refusal.status, body=refusal.body(), content_type="application/json")


CLOSE_S = 0.1  # what open streams get before they are cut
BACKLOG = 1024


class Running:
    """A simulator that listens. `base_url` is what an OpenAI client is given."""

    def __init__(self, runner: web.AppRunner, host: str, journal: ExchangeLog) -> None:
        self._runner = runner
        self.host = host
        self.port: int = runner.addresses[0][1]
        self.journal = journal

    @property
    def base_url(self) -> str:
        """With the /v1 that OpenAI's own has."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    async def close(self) -> None:
        """Stop listening and cut what is open."""
        await self._runner.cleanup()


async def start(host: str = "127.0.0.1", port: int = 0, settings: SimulatorSettings | None = None) -> Running:
    """Listen, on any free port if it is 0. Raises `OSError` where that can't be done."""
    simulator = Simulator(settings or SimulatorSettings())
    runner = web.AppRunner(
        simulator.application(), handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_S
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=BACKLOG).start()
    except BaseException:
        await runner.cleanup()
        raise
    return Running(runner, host, simulator.journal)
