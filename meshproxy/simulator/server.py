"""The simulator's application: its routes, and the handling of a chat completion."""

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

# Headers that OpenAI sends with an answer, and that a gateway must not pass on.
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
    """One simulated provider: its settings and its records."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self.journal = ExchangeLog()
        self._settings = settings

    def application(self) -> web.Application:
        """Build the application. Run it with `handler_cancellation=True`, so that hang-ups are noticed at once."""
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
        """Answer POST /v1/chat/completions."""
        body = await request.read()
        entry = self.journal.open(request, body)
        ended = CLIENT_CLOSED
        line = Line(request, (*PROVIDER_HEADERS, ("x-request-id", f"req_{entry.number:016x}")))
        try:
            ended = await self._answer(request, body, line, entry)
        except ConnectionError:
            pass  # the client is gone: no answer can be sent
        finally:
            entry.status = line.status
            self.journal.close(entry, ended)
        return line.written()

    async def models(self, request: web.Request) -> web.Response:
        """Answer GET /v1/models: two models without faults, and every fault with its description. A family is listed as
        a pattern.
        """
        self._authenticate(request)
        return web.json_response({"object": "list", "data": [_model(name) for name in MODELS]})

    async def model(self, request: web.Request) -> web.Response:
        """Answer GET /v1/models/{id}."""
        self._authenticate(request)
        read_behaviour(request.match_info["id"], None)
        return web.json_response(_model(request.match_info["id"]))

    async def health(self, _request: web.Request) -> web.Response:
        """Answer GET /healthz."""
        return web.json_response({"status": "ok"})

    async def requests(self, _request: web.Request) -> web.Response:
        """Answer GET /_sim/requests: the received requests, oldest first."""
        return web.json_response({"requests": [entry.told() for entry in self.journal.entries]})

    async def forget(self, _request: web.Request) -> web.Response:
        """Answer DELETE /_sim/requests."""
        self.journal.clear()
        return web.Response(status=204)

    async def stats(self, _request: web.Request) -> web.Response:
        """Answer GET /_sim/stats."""
        journal = self.journal
        open_now = {"open_requests": journal.open_requests, "open_streams": journal.open_streams}
        return web.json_response({**open_now, "totals": journal.totals})

    async def redirected(self, request: web.Request) -> web.Response:
        """Record a client that followed a redirect. A gateway must never do so."""
        self.journal.close(self.journal.open(request, await request.read()), COMPLETED)
        return web.json_response({"redirected": True})

    async def _answer(self, request: web.Request, body: bytes, line: Line, entry: Entry) -> str:
        """Answer, and return how the request ended."""
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
        """Return the model that serves: the first that doesn't fail, else the last. Only OpenRouter's requests have
        several.
        """
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
            shown = f"{token[:4]}****{token[-4:]}" if len(token) > 12 else "****"  # OpenAI shows this much of a key
            raise Refusal(401, f"Incorrect API key provided: {shown}.", code="invalid_api_key")


def _model(name: str) -> dict[str, Any]:
    """Return OpenAI's model object, with a description as OpenRouter's has."""
    about = {"created": SEEDED_CREATED, "owned_by": "simulator", "description": MODELS.get(name, PLAIN)}
    return {"id": name, "object": "model", **about}


@web.middleware
async def _tell_as_openai(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer with OpenAI's error object where aiohttp would answer in plain text."""
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


CLOSE_S = 0.1  # time for open streams to end before they are cut
BACKLOG = 1024


class Running:
    """A simulator that listens. `base_url` is the base URL for an OpenAI client."""

    def __init__(self, runner: web.AppRunner, host: str, journal: ExchangeLog) -> None:
        self._runner = runner
        self.host = host
        self.port: int = runner.addresses[0][1]
        self.journal = journal

    @property
    def base_url(self) -> str:
        """Return the base URL, with /v1 as OpenAI's has."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    async def close(self) -> None:
        """Stop listening and close open connections."""
        await self._runner.cleanup()


async def start(host: str = "127.0.0.1", port: int = 0, settings: SimulatorSettings | None = None) -> Running:
    """Listen on `port`; 0 means any free port. Raises `OSError` if it can't listen."""
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
