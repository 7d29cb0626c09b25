"""The simulator's application: its routes, the handling of a chat completion, and the record of what it received."""

import contextlib
import hmac
import time
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import count
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
    BROKEN,
    CLIENT_CLOSED,
    COMPLETED,
    FAILING_FAULTS,
    JSON,
    REDIRECTED,
    REPLACING_FAULTS,
    UNFINISHED_FAULTS,
    AnswerWriter,
    Delivery,
    ReceivedRequest,
    apply_fault,
    pace_of,
)
from meshproxy.simulator.dialects import PLAIN as OPENAI
from meshproxy.simulator.dialects import Kind
from meshproxy.simulator.request import CompletionRequest, Refusal, decode_request, requested_error

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


REFUSAL_FAULTS: dict[str, Kind] = {
    "error-context": "context",
    "error-filter": "filter",
    "error-quota": "quota",
    "error-key": "key",
}

MAX_REQUESTS = 1_000  # records kept; the oldest are dropped first
MAX_BODY_BYTES = 1_048_576  # of one body; a longer one is cut
MAX_KEPT_BYTES = 67_108_864  # of all bodies together
MAX_COUNTED = 1_000  # counted names of flaky and fail-first behaviours
TOTALS = ("requests", "streams", COMPLETED, CLIENT_CLOSED, BROKEN, "tokens")


class RequestHistory:
    """The last requests, totals since they were cleared, and how often each flaky behaviour was requested."""

    def __init__(self) -> None:
        self.requests: deque[ReceivedRequest] = deque()
        self.open_requests = 0
        self.open_streams = 0
        self._numbers = count()
        self.clear()

    def clear(self) -> None:
        """Delete all records except those of open requests."""
        self.requests.clear()
        self.totals = dict.fromkeys(TOTALS, 0)
        self._counted: dict[str, int] = {}
        self._kept_bytes = 0

    def open(self, request: web.Request, body: bytes) -> ReceivedRequest:
        """Record a request that has arrived."""
        record = ReceivedRequest(
            number=next(self._numbers),
            method=request.method,
            path=request.path_qs,
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.raw_headers],
            raw_body=body[:MAX_BODY_BYTES],
        )
        self._keep(record)
        self.totals["requests"] += 1
        self.open_requests += 1
        return record

    def streams(self, record: ReceivedRequest) -> None:
        """Record that the request's answer is a stream."""
        record.stream = True
        self.totals["streams"] += 1
        self.open_streams += 1

    def close(self, record: ReceivedRequest, ended: str) -> None:
        """Record how a request ended."""
        record.ended = ended
        self.open_requests -= 1
        self.open_streams -= record.stream
        self.totals["tokens"] += record.tokens
        self.totals[ended] += 1

    def count(self, name: str) -> int:
        """Count this name once more and return its count."""
        counted = self._counted.pop(name, 0) + 1
        if len(self._counted) >= MAX_COUNTED:
            del self._counted[next(iter(self._counted))]
        self._counted[name] = counted
        return counted

    def _keep(self, record: ReceivedRequest) -> None:
        self._kept_bytes += len(record.raw_body)
        self.requests.append(record)
        while len(self.requests) > MAX_REQUESTS or self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= len(self.requests.popleft().raw_body)


class Simulator:
    """One simulated provider: its settings and its records."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self.history = RequestHistory()
        self._settings = settings

    def application(self) -> web.Application:
        """Build the application. Run it with `handler_cancellation=True`, so that hang-ups are noticed at once."""
        app = web.Application(middlewares=[_openai_errors], client_max_size=self._settings.max_body_bytes)
        for prefix in ("/v1", ""):
            app.router.add_post(f"{prefix}/chat/completions", self.chat)
            app.router.add_get(f"{prefix}/models", self.models)
            app.router.add_get(f"{prefix}/models/{{id:.+}}", self.model)
        app.router.add_get("/healthz", self.health)
        app.router.add_get("/_sim/requests", self.requests)
        app.router.add_delete("/_sim/requests", self.clear_requests)
        app.router.add_get("/_sim/stats", self.stats)
        app.router.add_route("*", REDIRECTED, self.redirected)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer POST /v1/chat/completions."""
        body = await request.read()
        record = self.history.open(request, body)
        ended = CLIENT_CLOSED
        writer = AnswerWriter(request, (*PROVIDER_HEADERS, ("x-request-id", f"req_{record.number:016x}")))
        try:
            ended = await self._answer(request, body, writer, record)
        except ConnectionError:
            pass  # the client is gone: no answer can be sent
        finally:
            record.status = writer.status
            self.history.close(record, ended)
        return writer.response()

    async def models(self, request: web.Request) -> web.Response:
        """Answer GET /v1/models: two models without faults, and every fault with its description.

        A family is listed as a pattern.
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
        return web.json_response({"requests": [record.as_json() for record in self.history.requests]})

    async def clear_requests(self, _request: web.Request) -> web.Response:
        """Answer DELETE /_sim/requests."""
        self.history.clear()
        return web.Response(status=204)

    async def stats(self, _request: web.Request) -> web.Response:
        """Answer GET /_sim/stats."""
        history = self.history
        open_now = {"open_requests": history.open_requests, "open_streams": history.open_streams}
        return web.json_response({**open_now, "totals": history.totals})

    async def redirected(self, request: web.Request) -> web.Response:
        """Record a client that followed a redirect. A gateway must never do so."""
        self.history.close(self.history.open(request, await request.read()), COMPLETED)
        return web.json_response({"redirected": True})

    async def _answer(self, request: web.Request, body: bytes, writer: AnswerWriter, record: ReceivedRequest) -> str:
        """Answer, and return how the request ended."""
        dialect = OPENAI
        try:
            self._authenticate(request)
            openrouter = self._settings.openrouter or request.headers.get(KIND_HEADER) == "openrouter"
            completion = decode_request(body, openrouter=openrouter)
            record.model = completion.model
            if completion.stream:
                self.history.streams(record)
            fault = request.headers.get(FAULT_HEADER)
            dialect = read_behaviour(completion.model, fault).dialect
            model, behaviour = self._choose(completion, fault)
            behaviour.dialect.check(completion.given)
            return await self._reply(writer, completion, model, behaviour, record)
        except Refusal as refusal:
            await writer.answer(refusal.status, [JSON, *refusal.headers], dialect.error_body(refusal))
            return COMPLETED

    async def _reply(
        self,
        writer: AnswerWriter,
        completion: CompletionRequest,
        model: str,
        behaviour: Behaviour,
        record: ReceivedRequest,
    ) -> str:
        fault = behaviour.one_of(REPLACING_FAULTS)
        if fault:
            await apply_fault(fault, writer, stream=completion.stream)
        else:
            reply = compose(completion, model, behaviour, time.time())
            await Delivery(writer, reply, completion, behaviour, pace_of(behaviour, self._settings), record).run()
        return BROKEN if behaviour.one_of(UNFINISHED_FAULTS) else COMPLETED

    def _choose(self, completion: CompletionRequest, header: str | None) -> tuple[str, Behaviour]:
        """Return the model that serves: the first that doesn't fail, else the last.

        Only OpenRouter's requests have several.
        """
        *others, last = (completion.model, *completion.models)
        for model in others:
            with contextlib.suppress(Refusal):
                behaviour = self._behaviour(model, header)
                if not behaviour.one_of(FAILING_FAULTS):
                    return model, behaviour
        return last, self._behaviour(last, header)

    def _behaviour(self, model: str, header: str | None) -> Behaviour:
        behaviour = read_behaviour(model, header)
        raise_requested_error(behaviour, self.history)
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


def raise_requested_error(behaviour: Behaviour, history: RequestHistory) -> None:
    """Raise the requested `Refusal`: always, every Nth time, or the first N times."""
    numbers, retry_after_s = behaviour.numbers, behaviour.options.retry_after
    if refused := behaviour.one_of(REFUSAL_FAULTS):
        raise behaviour.dialect.refusal(REFUSAL_FAULTS[refused])
    if "error" in numbers:
        raise requested_error(numbers["error"], retry_after_s)
    if not numbers.keys() & {"flaky", "fail-first"}:
        return
    count = history.count(behaviour.name)
    if "flaky" in numbers and count % numbers["flaky"] == 0:
        raise requested_error(500, retry_after_s)
    if count <= numbers.get("fail-first", 0):
        raise requested_error(503, retry_after_s)


def _model(name: str) -> dict[str, Any]:
    """Return OpenAI's model object, with a description as OpenRouter's has."""
    about = {"created": SEEDED_CREATED, "owned_by": "simulator", "description": MODELS.get(name, PLAIN)}
    return {"id": name, "object": "model", **about}


@web.middleware
async def _openai_errors(
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

    def __init__(self, runner: web.AppRunner, host: str, history: RequestHistory) -> None:
        self._runner = runner
        self.host = host
        self.port: int = runner.addresses[0][1]
        self.history = history

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
    return Running(runner, host, simulator.history)
