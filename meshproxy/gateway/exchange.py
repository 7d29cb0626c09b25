"""The record of one request from arrival to log line: each phase writes down what it learned, the last one reads it all."""

import math
from collections.abc import Sequence

from meshproxy.errors import Problem, UpstreamFault
from meshproxy.gateway.bounds import Room
from meshproxy.gateway.call import Call
from meshproxy.gateway.first_event import Opening
from meshproxy.gateway.health import Trial
from meshproxy.gateway.idempotent import Recording
from meshproxy.gateway.lease import Lease
from meshproxy.gateway.resolve import Plan
from meshproxy.ledger.records import UsageSource
from meshproxy.policy.catalog import Attempt
from meshproxy.policy.pricing import Price
from meshproxy.policy.principal import Principal
from meshproxy.upstream.response import Response
from meshproxy.wire.replies import concealed, without_secrets
from meshproxy.wire.usage import Refusal, Usage


class Exchange:
    """One request. Times are monotonic seconds, 0.0 while they haven't come. `detachable`: it can go on without its client;
    `detached`: its client has gone, and it goes on; `complete`: the whole answer was got; `secrets`: what the upstream at
    work knows of ours; `response`: the last provider's, whose head has come; `refused_by`: the bucket, budget or bound that
    refused it; `failure`: what broke off an answer that had begun; `is_at_work`: a provider was sent all of the
    request and hasn't failed; `opening`: a stream's client before an answer;
    `deadline`: when an answer must have begun; `refused`: the numbers of its report that can't be true; `price`: what
    counted in the cost; `asked`: the attempt as it was made, where
    `attempt` is by now the fallback of the provider's own that served;
    `unlisted_model`: what the provider says it served, which is none of those that it was asked for.
    """

    phase = "authenticate"
    principal: Principal | None = None
    plan: Plan | None = None
    lease: Lease | None = None
    attempt: Attempt | None = None
    asked: Attempt | None = None
    attempts = 0
    secrets: Sequence[str] = ()
    trial: Trial | None = None
    response: Response | None = None
    refused_by: str | None = None
    failure: UpstreamFault | None = None
    opening: Opening | None = None
    deadline = math.inf
    detachable = False
    detached = False
    complete = False
    is_at_work = False
    recording: Recording | None = None
    room: Room | None = None
    status = 0
    code = ""
    outcome = "failed"
    usage = Usage()
    usage_source: UsageSource = "none"
    refused: tuple[Refusal, ...] = ()
    cost_nusd = 0
    price: Price | None = None
    unlisted_model: str | None = None
    events = 0
    sent_at = 0.0
    first_event_at = 0.0
    last_event_at = 0.0
    max_gap_s = 0.0
    overhead_s = 0.0

    def __init__(self, call: Call, hold_id: str) -> None:
        self.call = call
        self.hold_id = hold_id

    def keep_within(self, timeout_s: float) -> None:
        """Give the request a deadline of its own, so many seconds after it came."""
        self.deadline = min(self.deadline, self.call.received_at + timeout_s)

    def told(self, problem: Problem) -> Problem:
        """Return a problem as the client may hear of it: without our keys, should the provider's words repeat one."""
        return without_secrets(problem, self.secrets)

    def sent(self) -> None:
        """Note that a provider was sent all of the request, and so may bill its prompt."""
        self.is_at_work = True

    def failed(self, fault: UpstreamFault) -> None:
        """Note what broke off an answer that had begun."""
        self.is_at_work = False
        fault.problem = self.told(fault.problem)
        fault.words = concealed(fault.words, self.secrets)
        self.failure = fault

    @property
    def account(self) -> str:
        """The account's name; empty before it is known."""
        return self.principal.account.name if self.principal is not None else ""

    @property
    def model(self) -> str:
        """The catalogue id of the model that serves, or was asked for; empty before it is known."""
        if self.attempt is not None:
            return self.attempt.model
        return self.plan.model if self.plan is not None else ""
