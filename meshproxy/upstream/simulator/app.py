"""The simulator's application: its routes, and a chat completion's way from its body to its end."""

import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import hdrs, web

from meshproxy.upstream.simulator import inspection, refusals
from meshproxy.upstream.simulator.ask import Ask, decode_ask
from meshproxy.upstream.simulator.behaviour import Behaviour, read_behaviour
from meshproxy.upstream.simulator.delivery import Delivery, pace_of
from meshproxy.upstream.simulator.faults import BREAKING, fails_outright, instead_of_reply, refuse_on_demand
from meshproxy.upstream.simulator.journal import BROKEN, CLIENT_CLOSED, COMPLETED, Entry, Journal
from meshproxy.upstream.simulator.line import JSON, Headers, Line
from meshproxy.upstream.simulator.models import model_object, model_objects
from meshproxy.upstream.simulator.refusals import Refusal
from meshproxy.upstream.simulator.replies import compose
from meshproxy.upstream.simulator.settings import SimulatorSettings

FAULT_HEADER = "x-sim-fault"
KIND_HEADER = "x-sim-kind"
JOURNAL: web.AppKey[Journal] = web.AppKey("simulator_journal", Journal)

# What OpenAI sends beside an answer, for a gateway to keep to itself.
PROVIDER_HEADERS: Headers = (
    ("server", "meshproxy-simulator"),
    ("openai-version", "2020-10-01"),
    ("openai-organization", "org-simulated"),
    ("openai-processing-ms", "1"),
    ("x-ratelimit-limit-requests", "10000"),
    ("x-ratelimit-remaining-requests", "9999"),
    ("x-ratelimit-reset-requests", "6ms"),
    ("set-cookie", "__cf_bm=simulated; path=/; HttpOnly"),
)


def create_simulator(
    settings: SimulatorSettings | None = None, *, clock: Callable[[], float] = time.time
) -> web.Application:
    """The application. Run it with `handler_cancellation=True`, so that a hang-up is noticed at once. `clock`: Unix seconds."""
    settings = settings or SimulatorSettings()
    simulator = Simulator(settings, clock)
    app = web.Application(middlewares=[_tell_as_openai], client_max_size=settings.max_body_bytes)
    app[JOURNAL] = simulator.journal
    for prefix in ("/v1", ""):
        app.router.add_post(f"{prefix}/chat/completions", simulator.chat)
        app.router.add_get(f"{prefix}/models", simulator.models)
        app.router.add_get(f"{prefix}/models/{{id:.+}}", simulator.model)
    app.router.add_get("/healthz", _healthz)
    inspection.add_routes(app.router, simulator.journal)
    return app


class Simulator:
    """One provider: its settings and what it remembers."""

    def __init__(self, settings: SimulatorSettings, clock: Callable[[], float]) -> None:
        self.journal = Journal()
        self._settings = settings
        self._clock = clock

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
        """GET /v1/models"""
        self._authenticate(request)
        return _json({"object": "list", "data": model_objects()})

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}"""
        self._authenticate(request)
        read_behaviour(request.match_info["id"], None)
        return _json(model_object(request.match_info["id"]))

    async def _answer(self, request: web.Request, body: bytes, line: Line, entry: Entry) -> str:
        """Answer, and say how it ended."""
        try:
            self._authenticate(request)
            ask = decode_ask(body, openrouter=self._is_openrouter(request))
            entry.model = ask.model
            if ask.stream:
                self.journal.streams(entry)
            model, behaviour = self._choose(ask, request.headers.get(FAULT_HEADER))
            return await self._reply(line, ask, model, behaviour, entry)
        except Refusal as refusal:
            await line.answer(refusal.status, [JSON, *refusal.headers], refusal.body())
            return COMPLETED

    async def _reply(self, line: Line, ask: Ask, model: str, behaviour: Behaviour, entry: Entry) -> str:
        fault = instead_of_reply(behaviour)
        if fault is not None:
            await fault(line, ask)
        else:
            reply = compose(ask, model, behaviour, self._clock())
            await Delivery(line, reply, ask, behaviour, pace_of(behaviour, self._settings), entry).run()
        return BROKEN if behaviour.one_of(BREAKING) else COMPLETED

    def _choose(self, ask: Ask, header: str | None) -> tuple[str, Behaviour]:
        """The model that serves: the first that doesn't fail, or else the last. Only OpenRouter's requests have several."""
        *others, last = (ask.model, *ask.models)
        for model in others:
            with contextlib.suppress(Refusal):
                behaviour = self._behaviour(model, header)
                if not fails_outright(behaviour):
                    return model, behaviour
        return last, self._behaviour(last, header)

    def _behaviour(self, model: str, header: str | None) -> Behaviour:
        behaviour = read_behaviour(model, header)
        refuse_on_demand(behaviour, self.journal)
        return behaviour

    def _is_openrouter(self, request: web.Request) -> bool:
        return self._settings.openrouter or request.headers.get(KIND_HEADER) == "openrouter"

    def _authenticate(self, request: web.Request) -> None:
        if self._settings.api_key is None:
            return
        scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() != "bearer":
            raise refusals.bad_key(None)
        if not hmac.compare_digest(token.encode(errors="replace"), self._settings.api_key.encode()):
            raise refusals.bad_key(token)


@web.middleware
async def _tell_as_openai(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Whatever aiohttp would refuse in plain text is refused in OpenAI's words."""
    try:
        return await handler(request)
    except Refusal as refusal:
        return _refused(refusal)
    except web.HTTPNotFound:
        return _refused(refusals.unknown_url(request.method, request.path))
    except web.HTTPMethodNotAllowed:
        return _refused(refusals.wrong_method(request.method, request.path))
    except web.HTTPRequestEntityTooLarge:
        return _refused(refusals.too_large(request.client_max_size))


async def _healthz(_request: web.Request) -> web.Response:
    return _json({"status": "ok"})


def _refused(refusal: Refusal) -> web.Response:
    return web.Response(status=refusal.status, body=refusal.body(), content_type="application/json")


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
