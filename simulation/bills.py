"""What a request should cost: a model of the contract, from its provider's bill and what its client saw."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from simulation.client import Sight
from simulation.history import (
    FIRST_BYTE_S,
    IDLE_S,
    LEASE_TOKENS,
    OPTIONS,
    STORE_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    Model,
    Price,
)
from simulation.provider import TOKENS_OF_A_MESSAGE, Call, prompt_tokens
from simulation.record import HOP_S, LATENCY_S, RECOVERY_S, Trouble, View, cut_short

_COST: Final = re.compile(r',"cost":"[0-9.]+"(?=\}$)')
FEWEST, MOST = 8, 14  # tenths of the true tokens, what an estimate may be (docs/api.md: 0.8 to 1.4)
MOST_LINES: Final = 1_024  # of streams, that are parsed once
TIMER_S: Final = 0.01  # that a deadline by the gateway's clock may be before that by its client's
BYTES_A_TOKEN: Final = 3  # of a prompt, by the estimate that is held (docs/api.md)
BYTES_OVER_AN_ESCAPE: Final = 3  # that an escape of 4 hex digits has beyond the character
SAMPLED_BYTES: Final = 8_192  # of longer JSON, in which escapes are looked for
TOKENS_OF_FRAMES: Final = 12  # that this estimate may add for messages and fields
TOOL_NAME_TOKENS: Final = 3  # of the name of a function, which the provider's words don't count and an estimate does
CREDIT_S: Final = 10.0  # that a stream waits for credit without the store (docs/ledger.md)
STORE_FAULTS: Final = frozenset({"gone", "failover", "refused", "slow", "full", "lost_reply", "clock"})


class Cost(NamedTuple):
    """The least and the most that a charge may be, in nano-USD."""

    least: int
    most: int

    def holds(self, charge: int) -> bool:
        """Whether a charge is one of these."""
        return self.least <= charge <= self.most


NOTHING: Final = Cost(0, 0)


def whole_cost(call: Call, model: Model) -> Cost:
    """Return what an answer costs that arrived whole: its bill, or an estimate of what nothing reported."""
    bill = call.bill
    if model.from_usage_cost and bill.cost_nusd is not None and not call.outdated:
        return Cost(bill.cost_nusd, bill.cost_nusd)
    return _cost(call, model.price, call.shown, call.shown, reported=call.reported)


def part_cost(call: Call, model: Model, seen: int) -> Cost:
    """Return what an answer costs that was cut: its prompt, and the text that had been sent, of which the client saw some."""
    least = _cost(call, model.price, seen, seen, reported=False).least
    return Cost(least, _cost(call, model.price, call.shown_begun, call.shown_begun, reported=False).most)


def _cost(call: Call, price: Price, fewest: int, most: int, *, reported: bool) -> Cost:
    choices = max(1, call.body.get("n") or 1)
    prompts = estimates(prompt_tokens(call.body), prompt_tokens(call.body))
    named = TOOL_NAME_TOKENS * choices if call.answer.kind == "tool" else 0
    outputs = tuple(min([each, *caps(call)]) for each in estimates(fewest, most, named))
    cached = (call.bill.cached, 0)
    if reported and "prompt" in call.is_true:
        prompts = (call.bill.prompt, call.bill.prompt)
        cached = (call.bill.cached, call.bill.cached)
    if reported and "completion" in call.is_true:
        outputs = (call.bill.completion, call.bill.completion)
    elif reported and call.bill.completion:  # a report that is older than the last text
        outputs = (outputs[0], max(outputs[1], call.bill.completion))
    is_known = reported and "completion" in call.is_true
    reasoning = (call.bill.reasoning if reported else 0, call.bill.reasoning if is_known else 0)
    least = price.cost(prompts[0], min(cached[0], prompts[0]), outputs[0], min(reasoning[0], outputs[0]))
    return Cost(least, price.cost(prompts[1], min(cached[1], prompts[1]), outputs[1], reasoning[1]))


def least_held(body: Mapping[str, Any]) -> int:
    """Return the fewest tokens that a call's prompt is held for: by its bytes, without the escapes of characters.

    In long JSON these are counted by samples, so that each may stand for as many as samples are in it.
    """
    others = [body[name] for name, (_, tokens) in OPTIONS.items() if tokens and name in body]
    tokens = 0
    for each in (body.get("messages", []), *others):
        size, escaped = len(json.dumps(each, ensure_ascii=False).encode()), json.dumps(each)
        if len(escaped) > SAMPLED_BYTES:
            size -= escaped.count("\\u") * BYTES_OVER_AN_ESCAPE * (len(escaped) // SAMPLED_BYTES)
        tokens += size // BYTES_A_TOKEN
    return tokens


def most_held_for(body: Mapping[str, Any]) -> int:
    """Return the most tokens that a call's prompt is held for: by its bytes, with the escapes of characters."""
    messages, others = body["messages"], [body[name] for name in OPTIONS if name in body]
    frames = TOKENS_OF_FRAMES + TOKENS_OF_A_MESSAGE * (len(messages) - 1) + len(others)
    return sum(len(json.dumps(each)) // BYTES_A_TOKEN for each in (messages, *others)) + frames


def estimates(fewest: int, most: int, more: int = 0) -> tuple[int, int]:
    """Return the least and the most that an estimate may be of so many tokens, and of `more` that only estimates count."""
    return fewest * FEWEST // 10, -(-most * MOST // 10) + more


def caps(call: Call) -> list[int]:
    """Return the cap on all choices of a call, if it has one: no estimate of output exceeds it (docs/ledger.md)."""
    choices = max(1, call.body.get("n") or 1)
    return [call.body[name] * choices for name in ("max_tokens", "max_completion_tokens") if name in call.body]


def allowed_charges(view: View, sight: Sight) -> list[Cost]:
    """Return what may be charged for a request, by the bills of its calls and what its client saw."""
    calls = view.own_calls(sight)
    costs: list[Cost] = []
    request = sight.request
    is_replay = "idempotent-replayed" in sight.headers
    events, group = view.settled.get(sight.request_id, ()), view.group(sight)
    if not calls or is_replay:
        return [NOTHING]
    if any(int(event["waived_nusd"] or 0) and view.charge(other) for event in events for other in group):
        costs.append(NOTHING)
    call = calls[-1]
    goes_on = runs_on(view, sight)
    timed_out = sight.status == 504 or sight.error.get("code") == "gateway_timeout"
    if sight.ended in {"whole", "left"} and sight.status >= 400 and not (timed_out and goes_on):
        return [NOTHING]
    may_fail = not call.answer.is_good or has_passed_deadline(sight)
    if sight.ended == "left" and may_fail and not (sight.payload or request.stream or goes_on):
        costs.append(NOTHING)  # it left in the head, which may be an error's
    if sight.ended == "left" and not sight.status and (has_passed_deadline(sight) or cut_short(view, sight)):
        costs.append(NOTHING)  # in the head of the 504, or of the 503 of a worker that ends
    if sight.ended == "unconnected" or is_lost(view, sight):
        costs.append(NOTHING)
    seen = seen_tokens(sight)
    for call in calls:
        for model in view.models(sight, _model_of(view, sight, call)):
            for price in _prices(call, model, sight, seen):
                priced = replace(model, price=price)
                costs += _charges_of(view, sight, call, priced, seen, goes_on=goes_on, timed_out=timed_out)
    bound = bound_without_credit(view, sight)
    return (
        costs if bound is None else [Cost(min(cost.least, bound.least), min(cost.most, bound.most)) for cost in costs]
    )


def bound_without_credit(view: View, sight: Sight) -> Cost | None:
    """Return what bounds the cost of a stream that ended for lack of credit: its hold and a slice. None if it didn't end so.

    The bound is one of tokens: it is less than the hold and a slice by what was held for more prompt than there was.
    """
    if view.history.local and view.feels(sight):  # an instance's allowance
        return None
    bounds = []
    for event in view.settled.get(sight.request_id, ()):
        if event["hold"] == "none" or event["outcome"] != "insufficient_credits":
            continue
        prices = [each for model in view.models(sight, event["model"]) for price in model.prices for each in price.all]
        slices = [price.of_output(LEASE_TOKENS * sight.request.n) for price in prices]
        bodies = [call.body for call in view.own_calls(sight)]
        prompt = int(event["prompt_tokens"])
        fewest = min((least_held(body) for body in bodies), default=0)
        more_prompt = max(0, prompt - fewest)  # citations, and an estimate too low
        less_prompt = max(0, max(map(most_held_for, bodies), default=TOKENS_OF_FRAMES) - prompt)
        more_nusd, less_nusd = (
            max(-(-tokens * price.input // 1_000_000) for price in prices) for tokens in (more_prompt, less_prompt)
        )
        most = _at_served(view, sight, event) + max(slices) + more_nusd
        outputs = [price.output for price in prices]  # it may be held for at the dearest, and served at the cheapest
        least = int(event["held_nusd"]) * min(outputs) // max(*outputs, 1)
        bounds.append(Cost(least + min(slices) - less_nusd, most))
    return Cost(min(bound.least for bound in bounds), max(bound.most for bound in bounds)) if bounds else None


def _at_served(view: View, sight: Sight, event: dict[str, str]) -> int:
    """Return what the tokens that a hold covers cost, at most, in the service tier that served if that is dearer.

    Or in the tier of prices that the prompt has reached by a report, and not by the estimate for which it was held.
    """
    held, prompt = int(event["held_nusd"]), int(event["prompt_tokens"])
    costs = held
    for call in view.own_calls(sight):
        for model in view.models(sight, event["model"]):
            asked, served = model.price_in(sight.request.tier), model.price_in(call.tier, sight.request.tier)
            reached = [(above, price) for above, price in served.tiers if above < prompt]
            if reached and (served != asked or least_held(call.body) <= reached[-1][0]):
                served = reached[-1][1]
            for before, after in ((asked.input, served.input), (asked.output, served.output)):
                costs = max(costs, -(-held * after // before)) if before else costs
    return costs


def has_passed_deadline(sight: Sight) -> bool:
    """Whether a request took as long as its own `timeout`."""
    timeout_s = sight.request.timeout_s
    return timeout_s is not None and sight.ended_at - sight.began_at >= timeout_s - TIMER_S


def runs_on(view: View, sight: Sight) -> bool:
    """Whether a request goes on without its client: by its Idempotency-Key, or an upstream that is read to the end."""
    return sight.request.keyed or any(call.upstream == "drained" for call in view.own_calls(sight)[-1:])


def ran_short(view: View, sight: Sight) -> bool:
    """Whether the account or a budget had less left than what was made may cost, while a request ran on without its client.

    Where a renewal asks for a slice that is then not used, a budget is short by that much earlier.
    """
    if (sight.ended == "whole" and sight.status != 504) or not view.own_calls(sight):
        return False
    call = view.own_calls(sight)[-1]
    account, models = view.key(sight), view.models(sight, _model_of(view, sight, call))
    left = [
        sample.balance - sample.held
        for sample in view.record.samples
        if sample.account == account and sight.began_at <= sample.at <= (call.ended_at or math.inf) + LATENCY_S
    ]
    most = max(
        _cost(call, price, call.made, call.made, reported=False).most for model in models for price in model.prices
    )
    slice_nusd = max(price.of_output(LEASE_TOKENS * sight.request.n) for model in models for price in model.prices)
    left_of_budgets = [
        budget
        - sum(
            int(event["held_nusd"])
            for other in view.record.sights
            if other is not sight and view.is_of(scope, sight, other)
            for event in view.settled.get(other.request_id, ())
        )
        for scope, _, budget in view.budgets(sight)
    ]
    return (bool(left) and min(left) < most) or any(each < most + slice_nusd for each in left_of_budgets)


def _prices(call: Call, model: Model, sight: Sight, seen: int) -> set[Price]:
    """Return what tokens may cost: in the service tier that the answer names, if the gateway has read it, else as requested.

    Every event names it; Anthropic's reports do, and they alone.
    """
    named, asked = model.price_in(call.tier, sight.request.tier), model.price_in(sight.request.tier)
    has_read_it = ended_well = sight.ended == "whole" and sight.status == 200 and not sight.error
    if call.answer.dialect == "anthropic":
        has_read_it = ended_well and call.reported and bool(call.is_true)
    elif seen:
        has_read_it = True
    return {named} if has_read_it else {named, asked}


def over_at(view: View, sight: Sight) -> float:
    """Return when a request and its calls were over."""
    ended = [call.ended_at or math.inf for call in view.own_calls(sight)] if runs_on(view, sight) else []
    return max([sight.ended_at, *ended])


def is_lost(view: View, sight: Sight) -> bool:
    """Whether a settlement may be lost: its worker was killed with it, or the store failed over right after it.

    Or it was sent again because of another fault, and the store had lost its hold by then.
    """
    over, workers, calls = over_at(view, sight), view.workers(sight), view.own_calls(sight)
    admitted_by = min([sight.ended_at, *(call.at for call in calls)])
    since = min([over, *(call.ended_at for call in calls[-1:] if call.ended_at)])  # of a client that reads slowly
    for failover in view.record.troubles:
        settled_by, is_late = over + LATENCY_S, False
        for other in sorted(view.record.troubles, key=lambda each: each.start):
            if other is not failover and other.start <= settled_by and other.worker in workers:
                settled_by, is_late = max(settled_by, other.end), is_late or other.end >= since
        unnoticed = failover.start <= since <= failover.start + HOP_S  # sent on a connection that was lost already
        repeated = is_late or unnoticed  # and what is sent again without a hold is charged only if no reply was lost
        if failover.loses(since, settled_by) or (repeated and failover.loses(sight.began_at, admitted_by)):
            return True
    return died_unsettled(view, sight)


def died_unsettled(view: View, sight: Sight) -> bool:
    """Whether a request's worker was killed before the store or its disk had taken the settlement."""
    over, workers = over_at(view, sight), view.workers(sight)
    troubles = [trouble for trouble in view.record.troubles if trouble.worker in workers]
    deaths = [trouble.start for trouble in troubles if trouble.what == "killed" and trouble.start >= sight.began_at]
    disks = [
        (each.start, _mended_at(each)) for each in troubles if each.what.startswith("disk") and _mended_at(each) >= over
    ]
    outages = [each for each in troubles if each.what in STORE_FAULTS and each.end >= over]
    waits_s = CREDIT_S if sight.request.stream and sight.ended == "left" else 0.0  # of a stream without its client
    settled_by = over + waits_s + 2 * STORE_TIMEOUT_S + LATENCY_S
    return any(
        death <= over + LATENCY_S
        or (death <= settled_by and any(outage.start <= death for outage in outages))
        or (outages and any(start <= death <= mended_at for start, mended_at in disks))
        for death in deaths
    )


def _mended_at(trouble: Trouble) -> float:
    """Return when a disk has taken what it had refused."""
    return trouble.end - RECOVERY_S + LATENCY_S * 2


def _charges_of(
    view: View, sight: Sight, call: Call, model: Model, seen: int, *, goes_on: bool, timed_out: bool
) -> Iterator[Cost]:
    """Return what may be charged if this call served."""
    whole, part = whole_cost(call, model), part_cost(call, model, seen)
    ended_well = sight.ended == "whole" and sight.status == 200 and not sight.error
    if call.ended == "error":
        if not ended_well:
            yield NOTHING
        if sight.ended in {"left", "closed"}:  # before the gateway had the error
            yield Cost(0, part.most)
        return
    if ended_well:
        if call.complete or call.answer.end == "no_done":
            yield whole
            if not call.shown and not (call.is_true and call.reported):
                yield NOTHING  # an answer without text and without a report: nobody knows what it cost
        return
    if timed_out and goes_on and not call.complete:
        yield NOTHING
    final = call.reported and not call.outdated
    if call.complete or final:
        yield whole
    # the provider had the prompt, unless it was left for something else: for its silence, by a drain, for lack of credit
    silent_s, most_s = silence(call)
    is_silent = call.answer.is_silent and (goes_on or silent_s >= most_s - HOP_S)
    is_early = call.ended_at < min(sight.ended_at - HOP_S, sight.began_at + WRITE_TIMEOUT_S)
    is_ours = is_silent or is_early or view.feels(sight, "drained")
    hung_up = sight.ended == "left" and call.ended == "closed" and not call.reported and not is_ours
    nothing_known = not call.shown_begun and not (call.is_true and call.reported) and not hung_up
    if nothing_known or ((call.ended == "cut" or is_silent) and not call.shown_sent):
        yield NOTHING
    if final and model.from_usage_cost:
        yield _cost(call, model.price, call.shown, call.shown, reported=True)
    cut_by_gateway = sight.error.get("code") in {
        "insufficient_credits",
        "spend_limit_exceeded",
        "rate_limit_exceeded",
        "overloaded",
        "ledger_unavailable",
    }
    if not (goes_on and call.complete) or view.feels(sight) or cut_by_gateway or ran_short(view, sight):
        yield part if seen or not sight.error else Cost(0, part.most)
    if call.reported and "completion" not in call.is_true:  # a report in the middle
        yield Cost(part.least, max(part.most, _cost(call, model.price, seen, call.shown_begun, reported=True).most))
    if call.reported and "prompt" in call.is_true:  # running reports, which no cap bounds
        told = model.price.cost(call.bill.prompt, call.bill.cached, call.shown_begun)
        yield Cost(min(part.least, whole.least), max(part.most, told))


def silence(call: Call) -> tuple[float, float]:
    """Return for how long a provider had been silent when the gateway left it, and for how long it may be."""
    since, most_s = (call.last_at, IDLE_S) if call.head_sent else (call.at, FIRST_BYTE_S)
    return (call.ended_at or math.inf) - since, most_s


def _model_of(view: View, sight: Sight, call: Call) -> str:
    """Return the name of the model that a call was for: the request's own, or the fallback whose turn it was."""
    named = sight.headers.get("x-mesh-model")
    ids = [str(event["model"]) for event in view.settled.get(sight.request_id, ()) if event["model"]]
    wanted = str(call.body.get("model", ""))
    for name in (wanted.removeprefix("up-"), *ids, named, sight.request.model):
        if name and name in view.record.prices[0][1]:
            return name
    return sight.request.model


def seen_tokens(sight: Sight) -> int:
    """How many tokens of text a client saw, in whole events."""
    if not sight.is_stream:
        return 0
    return sum(_tokens(line) for line in sight.data)


def _tokens(line: str) -> int:
    text = text_of(line)
    return text.count(" ") + text.count(",")


@lru_cache(MOST_LINES)
def text_of(line: str) -> str:
    """Return the text of an event's or an answer's choices, once each."""
    try:
        told = json.loads(line.removeprefix("\ufeff"))
    except ValueError:
        return ""
    texts = []
    for choice in (told.get("choices") or []) if isinstance(told, dict) else []:
        delta = choice.get("delta") or choice.get("message") or {}
        texts.append(str(delta.get("content") or ""))
        texts += [str(delta[name]) for name in ("reasoning_content", "reasoning", "refusal") if delta.get(name)][:1]
        texts += [str(call.get("function", {}).get("arguments", "")) for call in delta.get("tool_calls") or []]
    return "".join(texts)


def told_cost(sight: Sight) -> int | None:
    """Return what an answer says that it cost, in nano-USD."""
    if not sight.is_stream:
        told = sight.headers.get("x-mesh-cost")
        return None if told is None else nusd(told)
    comments = re.findall(rb"^: x-mesh-cost=([0-9.]+)$", sight.payload, re.MULTILINE)
    if comments:
        return nusd(comments[-1].decode())
    for line in reversed(sight.data):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("cost"), str):
            return nusd(event["cost"])
        usage = event.get("usage") if isinstance(event, dict) else None
        if isinstance(usage, dict) and isinstance(usage.get("cost"), str):
            return nusd(usage["cost"])
    return None


def nusd(text: str) -> int:
    """Nano-USD of a decimal string."""
    whole, _, fraction = text.partition(".")
    sign = -1 if whole.startswith("-") else 1
    return int(whole) * 1_000_000_000 + sign * int(fraction.ljust(9, "0") or 0)


def without_cost(line: str) -> str:
    """Return the data of an event without the cost that the gateway adds to one with the usage."""
    return _COST.sub("", line)


@lru_cache(MOST_LINES)
def is_usage_only(line: str) -> bool:
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return isinstance(event, dict) and not event.get("choices") and bool(event.get("usage"))
