"""Parts of a request for tests that need no sockets: a plan, a lease on a ledger that answers as it is told, a provider's
response and a client's stream that remember what was done to them.
"""

import asyncio
from typing import Any

from meshproxy.config import Model, Route, Settings, Upstream
from meshproxy.errors import ErrorResponse
from meshproxy.gateway.admit import Lease, Renewer
from meshproxy.gateway.exchange import Call, Exchange
from meshproxy.gateway.resolve import Plan, Prompt
from meshproxy.ledger.records import BucketState, Denial, Hold, HoldRequest
from meshproxy.openai.request import decode_chat
from meshproxy.policy.catalog import Candidate, Catalog
from meshproxy.policy.principal import Account, Key, Principal
from meshproxy.telemetry.tasks import Tasks
from tests.harness.waiting import turns

BODY = b'{"messages":[{"role":"user","content":"Hello there"}]}'
STREAM = b'{"stream":true,"messages":[{"role":"user","content":"Hello there"}]}'
PROMPT_TOKENS = 18  # held
BILLED_PROMPT_TOKENS = 9  # where no provider reports them


async def body_of(body: bytes) -> bytes:
    return body


def candidate(**fields: Any) -> Candidate:
    """An attempt at 2.50 and 10.00 USD a million tokens."""
    model = Model(upstreams=[Route(upstream="u", model="m")], input_usd_per_mtok="2.50", output_usd_per_mtok="10.00")
    settings = Settings(upstreams={"u": Upstream(kind="openai", base_url="http://127.0.0.1:1")}, models={"m": model})
    (made,) = Catalog(settings).candidates("m", draw=0)
    return type(made)(**{**{name: getattr(made, name) for name in made.__struct_fields__}, **fields})


def plan(body: bytes = STREAM, **fields: Any) -> Plan:
    """A stream of at most 1,000 tokens, for 2,500 nano-USD a token of prompt and 10,000 one of output."""
    request = decode_chat(body)
    usual: dict[str, Any] = {
        "request": request,
        "model": "m",
        "candidates": (candidate(),),
        "prompt": Prompt(request, None, 2**20),
        "prompt_tokens": PROMPT_TOKENS,
        "output_cap": 1000,
        "output_limit": 1000,
        "holds_whole": not request.stream,
        **fields,
    }
    return Plan(
        prices=[candidate.price for candidate in usual["candidates"]],
        output_tokens=usual["output_cap"] * request.n,
        output_bound=usual["output_limit"] * request.n,
        **usual,
    )


def principal(**fields: Any) -> Principal:
    return Principal(Key(id="k", account="acme", created_at=0, **fields), Account("acme"))


def ask(**fields: Any) -> HoldRequest:
    return HoldRequest(
        **{"hold_id": "h", "account": "acme", "key_id": "k", "amount_nusd": 1, "tokens": 1, "ttl_ms": 1, **fields}
    )


def exchange(of_plan: Plan | None = None) -> Exchange:
    """An exchange that came as far as its attempt."""
    call = Call(request_id="req_1", authorization=None, read_body=lambda _take: body_of(BODY), received_at=0.0)
    made = Exchange(call, "h")
    made.plan = of_plan or plan()
    made.candidate = made.plan.candidates[0]
    made.model, made.is_stream = made.candidate.model, made.plan.request.stream
    return made


class Renewals:
    """A ledger that renews when it is told. `asked`: the totals, in nano-USD, and `tokens`; `anew`: asks for another hold."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.tokens: list[int] = []
        self.anew: list[HoldRequest] = []
        self._answers: list[asyncio.Future[Hold | Denial]] = []

    async def renew(self, hold: Hold, *, amount_nusd: int, tokens: int, enforce_tokens: bool) -> Hold | Denial:
        self.asked.append(amount_nusd)
        self.tokens.append(tokens)
        self._answers.append(asyncio.get_running_loop().create_future())
        return await self._answers[-1]

    async def admit(self, asked: HoldRequest) -> Hold | Denial:
        self.anew.append(asked)
        return await self.renew(
            Hold(asked, 0, 0, ()), amount_nusd=asked.amount_nusd, tokens=asked.tokens, enforce_tokens=False
        )

    async def answer(self, answer: Hold | Denial | Exception | None = None) -> None:
        """Answer the last renewal, well unless otherwise said, and let it be heard."""
        if isinstance(answer, Exception):
            self._answers[-1].set_exception(answer)
        else:
            self._answers[-1].set_result(answer or Hold(ask(), self.asked[-1], 0, ()))
        await turns()


def lease(ledger: Renewals, of_plan: Plan | None = None, *, covered: int = 100, slice_tokens: int = 100) -> Lease:
    renewer = Renewer(ledger, None, Tasks(), enforce_tokens=False)  # type: ignore[arg-type]
    return Lease(Hold(ask(), 1, 0, ()), of_plan or plan(), covered, slice_tokens, renewer, is_local=False)


class Client:
    """A `Downstream` that keeps what it is sent. `full` makes it congested until `drain`."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.frames: list[bytes | None] = []
        self.finished = False
        self.full = False
        self._drained = asyncio.Event()

    @property
    def text(self) -> bytes:
        return b"".join(self.sent)

    def begin(self, headers: list[tuple[str, str]]) -> None:
        raise AssertionError("whoever relays doesn't begin")

    def write(self, payload: bytes, frame: bytes | None = None) -> None:
        assert not self.finished
        self.sent.append(payload)
        self.frames.append(frame)

    def finish(self) -> None:
        assert not self.finished
        self.finished = True

    def congested(self) -> bool:
        return self.full

    async def drained(self) -> None:
        self._drained.clear()
        await self._drained.wait()

    def drain(self) -> None:
        self.full = False
        self._drained.set()


class Provider:
    """A `Response` that says what its test makes it say."""

    def __init__(self) -> None:
        self.sink: Any = None
        self.paused = False
        self.closed = False

    def relay(self, sink: Any) -> None:
        self.sink = sink

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def close(self) -> None:
        self.closed = True


def bucket(**fields: Any) -> BucketState:
    usual: dict[str, Any] = {"scope": "key", "kind": "requests", "limit": 60, "remaining": 59, "reset_s": 1.0}
    return BucketState(**{**usual, **fields})


def response(code: str) -> ErrorResponse:
    return ErrorResponse(402, code, "No more.")
