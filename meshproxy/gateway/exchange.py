"""The pipeline's types: `ActiveConfig`, and for one request `Call`, `Exchange`, `Downstream` and `Reply`.

A reload builds another `ActiveConfig` and swaps it in whole; a request in flight keeps the one it began with.
"""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from meshproxy.config import Settings
from meshproxy.errors import (
    ErrorResponse,
    GatewayError,
    Source,
    UpstreamError,
    gateway_timeout,
    insufficient_credits,
    rate_limit_exceeded,
    spend_limit_exceeded,
)
from meshproxy.gateway.entry import BodyReservation
from meshproxy.ledger.records import Denial, HoldRequest, UsageSource
from meshproxy.openai.errors import envelope, error_headers
from meshproxy.openai.provider_errors import conceal_secrets, without_secrets
from meshproxy.openai.usage import RefusedNumber, Usage
from meshproxy.policy.catalog import Candidate, Catalog
from meshproxy.policy.pricing import Price
from meshproxy.policy.principal import Principal
from meshproxy.units import format_usd
from meshproxy.upstream.provider import Provider

if TYPE_CHECKING:
    from meshproxy.gateway.admit import Lease
    from meshproxy.gateway.attempts import EarlyHead
    from meshproxy.gateway.health import Attempt
    from meshproxy.gateway.idempotency import Recording
    from meshproxy.gateway.resolve import Plan


SHUTTING_DOWN = "The gateway is shutting down."


class ActiveConfig(Struct, frozen=True):
    """The configuration in force: settings, model catalogue, and a connection pool for each upstream.

    `draining`: the upstreams whose answers are read to the end when a client hangs up.
    """

    generation: int
    settings: Settings
    catalog: Catalog
    providers: Mapping[str, Provider]
    draining: frozenset[str]


Headers = list[tuple[str, str]]


class Call(Struct, frozen=True):
    """One request as the server received it.

    `read_body` takes a function that reserves memory (`BodyReservation.take`), and raises a GatewayError for a body that is too
    large or never arrives. `received_at` and `deadline` are monotonic seconds. `forward`: the client's headers that may
    go to a provider. `trace_id`: W3C Trace Context's, 32 hex digits. `client`: the client's address. `sees_usage`: the
    client reads a stream's usage though it can't request it.
    """

    request_id: str
    authorization: str | None
    read_body: Callable[[Callable[[int], Awaitable[None]]], Awaitable[bytes]]
    received_at: float
    forward: Sequence[tuple[str, str]] = ()
    idempotency_key: str | None = None
    trace_id: str | None = None
    deadline: float = math.inf
    api_version: str | None = None
    client: str | None = None
    sees_usage: bool = False


class Reply(Struct, frozen=True):
    """A whole answer to the client."""

    status: int
    headers: Headers
    body: bytes


class Downstream(Protocol):
    """The client's side of a stream. No method blocks or raises for a client that has gone: its handler is cancelled."""

    def begin(self, headers: Headers) -> None:
        """Send the head of a 200 event stream."""

    def write(self, payload: bytes, frame: bytes | None = None) -> None:
        """Send body bytes; `frame` is the same payload already in chunk framing (RFC 9112, section 7.1), if there is one."""

    def finish(self) -> None:
        """End the body."""

    def congested(self) -> bool:
        """Return whether more bytes wait for this client than should."""

    async def drained(self) -> None:
        """Return when the client has caught up."""


class DownstreamWrapper:
    """A `Downstream` that passes everything on to another: a base for classes that change a part of it."""

    __slots__ = ("_downstream",)

    def __init__(self, downstream: Downstream) -> None:
        self._downstream = downstream

    def begin(self, headers: Headers) -> None:
        """Send the head of a stream."""
        self._downstream.begin(headers)

    def finish(self) -> None:
        """End the body."""
        self._downstream.finish()

    def congested(self) -> bool:
        """Return whether the client's side is congested."""
        return self._downstream.congested()

    async def drained(self) -> None:
        """Return when the client's side has caught up."""
        await self._downstream.drained()


def error_reply(response: ErrorResponse, request_id: str, headers: Sequence[tuple[str, str]] = ()) -> Reply:
    """Build the reply that carries an error response in the envelope."""
    return Reply(
        response.status,
        [("x-request-id", request_id), *error_headers(response), *headers],
        envelope(response, request_id),
    )


def denial_response(denial: Denial) -> ErrorResponse:
    """Return the error response for a denial."""
    if denial.reason == "rate_limit":
        wait = denial.retry_after_s
        if wait is None:
            return rate_limit_exceeded(f"Rate limit reached: no {denial.which} are allowed.", math.inf)
        limit = (
            denial.which if denial.which.endswith((" per day", " parallel requests")) else f"{denial.which} per minute"
        )
        return rate_limit_exceeded(f"Rate limit reached: {limit}. Try again in {wait:.3f} s.", wait)
    needed = format_usd(denial.needed_nusd)
    if denial.reason == "spend_limit":
        budget, spent = format_usd(denial.budget_nusd), format_usd(denial.spent_nusd)
        return spend_limit_exceeded(
            f"The {denial.which} of {budget} USD leaves too little: {spent} USD spent or held, {needed} USD needed."
        )
    available = format_usd(denial.available_nusd)
    return insufficient_credits(
        f"The account has {available} USD available, less than this request may cost: {needed} USD needed."
    )


class Exchange(Struct, eq=False):
    """One request's state on its way through the pipeline. Times are monotonic seconds; 0.0 means not yet.

    - `model`: the catalogue's id of the model that serves, or else was requested; empty before it is known.
    - `is_stream`: a stream was requested; false before it is known.
    - `attempted`: the candidate as it was attempted; `candidate` becomes the provider's own fallback that served.
    - `complete`: the whole answer was received.
    - `deadline`: when an answer must have begun.
    - `detachable`, `detached`: it can go on without its client; its client has gone and it goes on.
    - `failure`: what broke off an answer that had begun.
    - `may_be_billed`: all of the request was sent to a provider, which hasn't failed.
    - `may_have_run`: a provider whose attempt failed may have done the work.
    - `early_head`: a stream's client side before an answer.
    - `price`: the price that decided the cost.
    - `refused_numbers`: the numbers of the provider's report that can't be true.
    - `refused_by`: the bucket, budget or bound that refused the request.
    - `reads_whole`: a body that is no stream is being read, by the deadline.
    - `unanswered`: the hold that was requested, where the request ended before the ledger's answer.
    - `upstream_status`, `upstream_request_id`: of the last provider's response whose head has arrived.
    - `secrets`: our secrets that the current upstream knows.
    - `end_sent`: the client was sent the stream's end: whatever becomes of it then is no end of the request.
    - `unlisted_model`: the model that the provider names as served, if it is none of those requested.
    - `served_tier`: the service tier that the provider names as served.
    """

    call: Call
    hold_id: str
    phase: str = "authenticate"
    principal: Principal | None = None
    model: str = ""
    is_stream: bool = False
    plan: "Plan | None" = None
    lease: "Lease | None" = None
    unanswered: HoldRequest | None = None
    candidate: Candidate | None = None
    attempted: Candidate | None = None
    attempts: int = 0
    secrets: Sequence[str] = ()
    attempt: "Attempt | None" = None
    upstream_status: int = 0
    upstream_request_id: str | None = None
    refused_by: str | None = None
    failure: UpstreamError | None = None
    early_head: "EarlyHead | None" = None
    deadline: float = math.inf
    detachable: bool = False
    detached: bool = False
    complete: bool = False
    may_be_billed: bool = False
    may_have_run: bool = False
    reads_whole: bool = False
    end_sent: bool = False
    recording: "Recording | None" = None
    reservation: BodyReservation | None = None
    status: int = 0
    code: str = ""
    outcome: str = "failed"
    usage: Usage = Usage()
    usage_source: UsageSource = "none"
    refused_numbers: tuple[RefusedNumber, ...] = ()
    cost_nusd: int = 0
    price: Price | None = None
    unlisted_model: str | None = None
    served_tier: str | None = None
    events: int = 0
    sent_at: float = 0.0
    first_event_at: float = 0.0
    last_event_at: float = 0.0
    max_gap_s: float = 0.0
    overhead_s: float = 0.0

    @property
    def account(self) -> str:
        """The account's name; empty before authentication."""
        return self.principal.account.name if self.principal is not None else ""

    @property
    def repeat_may_be_billed(self) -> bool:
        """Whether a provider may have done the work, so that a repeat could be billed a second time."""
        return self.may_be_billed or self.may_have_run

    def too_late(self, *, is_kept: bool = False) -> GatewayError:
        """Return the 504 for a client's deadline that has passed; the source is the client, not the provider.

        `is_kept`: a repeat finds the work that goes on, by its Idempotency-Key, and has nothing done twice.
        """
        message = "The time that the client gives an answer is over."
        may_have_run = self.repeat_may_be_billed and not is_kept
        return GatewayError(Source.CLIENT, gateway_timeout(message, may_have_run=may_have_run))

    def limit_to(self, timeout_s: float) -> None:
        """Give the request its own deadline: `timeout_s` seconds after it was received."""
        self.deadline = min(self.deadline, self.call.received_at + timeout_s)

    def mask_secrets(self, response: ErrorResponse) -> ErrorResponse:
        """Return an error response without our secrets, in case the provider's message repeats one."""
        return without_secrets(response, self.secrets)

    def mark_streaming(self) -> None:
        """Record that the head of a stream was sent to the client, unless the client has gone."""
        self.phase = "stream"
        if not self.detached:  # else it was sent a 504, or nothing
            self.status = 200

    def mark_cut(self, outcome: str) -> None:
        """Record how the request was cut, unless its client has the stream's end. A client that has gone gets no error."""
        if not self.end_sent:
            self.outcome = outcome
            self.code = "" if outcome == "client_disconnected" else self.code

    def mark_sent(self, is_whole: bool) -> None:  # noqa: FBT001 # a callback
        """Record whether all of the request was sent to a provider, which may therefore bill its prompt."""
        self.may_be_billed = is_whole

    def record_failure(self, error: UpstreamError) -> None:
        """Record the error that broke off an answer that had begun."""
        self.may_be_billed = False
        error.response = self.mask_secrets(error.response)
        error.provider_message = conceal_secrets(error.provider_message, self.secrets)
        self.failure = error
