"""Draw a history from a seed. Numbers are chosen so that most are short, and that what is rare at random isn't rare here."""

import random
from collections.abc import Callable, Sequence
from typing import Any, get_args

from msgspec.structs import asdict, replace

from simulation.accounts import AccountPlan, KeyPlan, bounded, limited_key
from simulation.history import (
    DIALECTS,
    DROPPED,
    ENDINGS,
    FIRST_BYTE_S,
    FORMS,
    IDLE_S,
    MODELS,
    OPTIONS,
    ORDINARY,
    TEMPLATE,
    TURNS,
    Answer,
    Change,
    ChangeKind,
    Fault,
    FaultKind,
    History,
    Lie,
    Outage,
    Price,
    Request,
    Step,
    WorkerEvent,
    WorkerEventKind,
    first_version,
)
from simulation.invalid import INVALID

MAX_REQUESTS = 8
# dialects that report reasoning which they don't show
REASONING = ("openai", "gemini", "xai", "openrouter", "deepseek")
LIES = tuple(lie for lie in get_args(Lie) if lie != "true")
REROUTED = {  # the upstreams that models may have after a reload
    "plain": (("two",), ("one", "two"), ("two", "one"), ("gone", "one")),
    "pair": (("two", "one"), ("one",), ("two",), ("drained", "one")),
    "drained": (("two",), ("one",), ("drained", "two")),
    "drained-first": (("one",), ("two", "drained")),
    "odd": (("one",),),
}
WITH_DAYS = 0.15
WITH_GROUPS, GROUPED = 0.1, ("dialects", "providers", "clients", "credit", "store", "workers", "mixed")
WITH_INVALID = 0.08  # of all histories have invalid requests
KEPT_BYTES = (None, None, 1_500, 3_000)  # of an answer with an Idempotency-Key; None: the gateway's default


def draw(seed: int) -> History:
    """Return the history of a seed: always the same."""
    rng = random.Random(f"history {seed}")
    profile = rng.choices([name for name, _, _ in PROFILES], [weight for _, weight, _ in PROFILES])[0]
    made = next(make for name, _, make in PROFILES if name == profile)(rng)
    steps = tuple(sorted(made.steps, key=lambda step: step.at_s))
    fast_path = rng.random() > 0.15
    made = replace(made, seed=seed, profile=profile, steps=steps, fast_path=fast_path)
    if profile == "credit" and rng.random() < WITH_DAYS:
        made = replace(_days(rng), seed=seed, profile=profile, fast_path=fast_path)
        steps = tuple(sorted(made.steps, key=lambda step: step.at_s))
    else:
        made = replace(made, **asdict(bounded(rng, profile, len(made.credit), made.keys)))
    if rng.random() < WITH_INVALID:
        steps = tuple(sorted([*steps, *_invalid(rng, made)], key=lambda step: step.at_s))
    made = replace(made, steps=steps)
    return _grouped(rng, made) if profile in GROUPED and rng.random() < WITH_GROUPS else made


def _dialects(rng: random.Random) -> History:
    """Draw whatever a provider may report, in all the shapes."""
    requests: list[Step] = []
    for number in range(rng.randint(2, 5)):
        request = _request(rng, f"q{number}", _any_answer(rng))
        if rng.random() < 0.16:  # a stream, also in a whole answer's place, whose last report isn't what it used
            dialect = rng.choice(("openrouter", "mistral", "xai", "moonshot", "groq"))
            lie: Lie = rng.choice(("early", "zeros_after"))
            streams = rng.random() < 0.4
            lingers_s = rng.choice((0.0, 0.0, 0.0, 40.0))
            old = Answer(dialect, rng.choice((8, 20, 45)), lie=lie, other_shape=not streams, lingers_s=lingers_s)
            request = replace(request, stream=streams, include_usage=False, answers=(old,))
        if request.model == "reasoned":
            dialect = rng.choice(REASONING)
            reasoned = replace(request.answers[0], dialect=dialect, hidden=rng.choice((12, 50)), lie="true")
            request = replace(request, answers=(reasoned,))
        requests.append(request)
    return History(0, "", steps=(*requests, *_looks(rng, 1)))


def _templates(rng: random.Random) -> History:
    """Draw requests with a stored template, which operators edit and drop in between."""
    changes: list[Step] = []
    at_s = 0.0
    for version in range(2, 2 + rng.randint(1, 3)):
        at_s += rng.choice((0.8, 2.0, 4.0))
        what: ChangeKind = "template_dropped" if rng.random() < 0.25 else "template"
        changes.append(Change(round(at_s, 3), what, amount=DROPPED if what == "template_dropped" else version))
    requests: list[Step] = []
    for number in range(rng.randint(3, 6)):
        request = _request(rng, f"q{number}", _any_answer(rng), spread=1.0)
        near = rng.choice(changes).at_s + rng.choice((-0.3, 0.0, 0.9, 1.5, 2.6, 3.0))
        manner = rng.choice(("few", "few", "{{ manner }} or {{ other }}", 'two "quoted"\n', "", None))
        name = "unknown" if rng.random() < 0.06 else TEMPLATE
        moved = replace(request, at_s=round(max(0.0, near), 3), template=name, manner=manner, connection="")
        requests.append(replace(moved, worker=rng.randint(0, 1), prompt_words=min(moved.prompt_words, 40)))
    return History(0, "", workers=rng.randint(1, 2), steps=(*requests, *changes))


def _tenants(rng: random.Random) -> History:
    """Draw keys of two accounts that send one Idempotency-Key with other bodies, and name templates of the same name."""
    keys = (KeyPlan(0), KeyPlan(1), KeyPlan(rng.randint(0, 1)))
    is_templated, order = rng.random() < 0.6, rng.sample(range(3), 3)
    requests: list[Request] = []
    for number in range(rng.randint(2, 4)):
        request = _request(rng, f"q{number}", _any_answer(rng))
        words = min(request.prompt_words, 40)
        request = replace(request, key=order[number % 3], worker=rng.randint(0, 1), prompt_words=words)
        if rng.random() < 0.8:  # of its API key alone: docs/api.md
            request = replace(request, keyed=True, named=f"order {number // 3}")
        if is_templated:
            request = replace(request, template=TEMPLATE, manner="few")
        requests.append(request)
    for at, first in enumerate(requests):
        if first.keyed and not first.text_of and rng.random() < 0.3:
            requests[at] = replace(first, named=f"both {at}")  # a key has one body only
            requests.append(_twin(rng, requests[at], f"q{len(requests)}"))
    for first in [request for request in requests if request.keyed and rng.random() < 0.4]:
        at_s = round(first.at_s + rng.choice((0.0, 0.01, 0.5, 3.0, 9.0)), 3)
        repeat = replace(first, name=f"q{len(requests)}", repeats=first.name, at_s=at_s, connection="")
        requests.append(replace(repeat, worker=rng.randint(0, 1)))
    changes: list[Step] = []
    may = rng.random()
    if may < 0.2:  # a key that expires, and its requests just before and after
        expires_s = rng.choice((0.3, 0.8, 2.0))
        keys = (replace(keys[0], expires_s=expires_s), *keys[1:])
        late = replace(_request(rng, f"q{len(requests)}", _any_answer(rng)), connection="")
        requests.append(replace(late, at_s=round(expires_s + rng.choice((0.0, 0.2, 1.0)), 3)))
    elif may < 0.4:
        models = tuple(sorted(rng.sample(ORDINARY, 6)))
        keys = (replace(keys[0], models=models), *keys[1:])
        late = _request(rng, f"q{len(requests)}", _any_answer(rng), models=models)
        requests.append(replace(late, fallbacks=rng.choice(((), ("pair",), ("fee",)))))
    elif may < 0.6:
        suspends = Change(round(rng.random() * 2, 3), "suspend_account", rng.randint(0, 1))
        changes.append(suspends)
        for key in (0, 1):  # when that must hold, of both accounts
            late = replace(_request(rng, f"q{len(requests)}", _any_answer(rng)), key=key, connection="")
            requests.append(replace(late, at_s=round(suspends.at_s + rng.choice((2.8, 3.5)), 3)))
    if is_templated and rng.random() < 0.5:
        account, is_dropped = rng.randint(0, 1), rng.random() < 0.5
        version = DROPPED if is_dropped else first_version(account) + 1
        what: ChangeKind = "template_dropped" if is_dropped else "template"
        changes.append(Change(round(rng.random(), 3), what, account, amount=version))
    credit, workers, kept = (1_000_000_000, 1_000_000_000), rng.randint(1, 2), rng.choice(KEPT_BYTES)
    return History(0, "", credit=credit, keys=keys, workers=workers, kept_bytes=kept, steps=(*requests, *changes))


def _twin(rng: random.Random, first: Request, name: str) -> Request:
    """Draw a request of another key, of the same account or another one, with a request's body and Idempotency-Key."""
    key = rng.choice([key for key in range(3) if key != first.key])
    at_s = round(first.at_s + rng.choice((0.0, 0.01, 0.5, 3.0, 9.0)), 3)
    twin = replace(first, name=name, key=key, text_of=first.name, at_s=at_s, connection="", worker=rng.randint(0, 1))
    return replace(twin, answers=(*first.answers[1:], _any_answer(rng)))


def _disks(rng: random.Random) -> History:
    """Draw a store that is lost while the disk of the journal fills or fails, and workers that end then, some twice."""
    ends_twice = rng.random() < 0.25  # so that what a journal's second reader wrote is read by a third
    gone_at, gone_s = round(rng.random() * 2, 3), 25.0 if ends_twice else rng.choice((3.0, 8.0, 25.0))
    what: FaultKind = rng.choice(("gone", "gone", "refused", "full"))
    faults: list[Step] = [Fault(gone_at, what, for_s=gone_s)]
    bounded = None if ends_twice else rng.choice((None, None, 1_500, 4_000, 9_000))
    if rng.random() < (0.5 if ends_twice else 1.0 if bounded is None else 0.3):
        disk: FaultKind = "disk_full" if ends_twice else rng.choice(("disk_full", "disk_full", "disk_fails"))
        room = rng.choice((0, 300, 900, 1_500)) if disk == "disk_full" else 0
        begins = max(0.0, gone_at + rng.choice((-1.0, 0.0, 1.0)))
        disk_s = rng.choice((1.0, 3.0) if ends_twice else (1.0, 6.0, gone_s, gone_s + 5))
        faults.append(Fault(round(begins, 3), disk, for_s=disk_s, room=room))
    requests: list[Step] = []
    for number in range(rng.randint(3, 7)):
        answer = replace(_any_answer(rng), delay_s=rng.choice((0.0, 0.1, 1.0)), gap_s=rng.choice((0.0, 0.02, 0.2)))
        if rng.random() < 0.3:
            answer = replace(answer, words=300, per_event=30)
        request = _reading(rng, _request(rng, f"q{number}", answer, spread=2.0), 0.1)
        at_s = rng.choice((request.at_s, gone_at + 0.5 + request.at_s * gone_s / 2.5))
        requests.append(replace(request, at_s=round(at_s, 3), worker=rng.randint(0, 1)))
    workers = rng.randint(1, 2)
    if ends_twice:
        for worker in range(workers):
            if rng.random() < 0.7:
                first: WorkerEventKind = rng.choice(("killed_writing", "killed_writing", "drained"))
                faults.append(WorkerEvent(round(gone_at + rng.choice((0.1, 1.5)), 3), first, worker, 0.0))
            faults.append(WorkerEvent(round(gone_at + gone_s * rng.choice((0.6, 0.8)), 3), "drained", worker, 0.0))
    elif rng.random() < 0.4:
        ends: WorkerEventKind = rng.choice(("killed", "drained"))
        faults.append(
            WorkerEvent(round(gone_at + rng.random() * gone_s, 3), ends, rng.randint(0, 1), rng.choice((0.0, 2.0)))
        )
    return History(
        0,
        "",
        workers=workers,
        local=ends_twice or rng.random() < 0.7,
        journal_bytes=bounded,
        steps=(*requests, *faults),
    )


def _providers(rng: random.Random) -> History:
    """Draw providers that fail: one, or the first of two, or all."""
    requests = []
    for number in range(rng.randint(2, 5)):
        bad = _bad_answer(rng)
        answers = [bad] if rng.random() < 0.4 else [bad, _any_answer(rng) if rng.random() < 0.7 else _bad_answer(rng)]
        if rng.random() < 0.07:  # two that ask for other waits
            waits = rng.sample((None, 0.4, 3.0, 7.0, 90.0), 2)
            answers = [replace(_any_answer(rng), status=429, error="limit", wait_s=wait_s) for wait_s in waits]
        request = _request(
            rng,
            f"q{number}",
            *answers,
            models=("plain", "pair", "pair", "gone-first", "drained", "drained-first", "thinking"),
        )
        if rng.random() < 0.2:
            request = replace(request, fallbacks=(rng.choice(("fee", "odd", "pair")),))
        if bad.error and rng.random() < 0.15:  # a refusal whose body comes late, or never
            late = replace(bad, pause_s=rng.choice((1.0, 6.0)))
            request = replace(request, answers=(late, *request.answers[1:]), timeout_s=rng.choice((0.5, 2.0)))
        elif request.model == "drained-first" and rng.random() < 0.4:  # its client hangs up on the other one
            slow = replace(_any_answer(rng), words=45, per_event=1, gap_s=0.2, lingers_s=0.0)
            request = _reading(rng, replace(request, answers=(bad, slow)), 1.0)
        requests.append(request)
    return History(0, "", steps=tuple(requests))


def _clients(rng: random.Random) -> History:
    """Draw clients that hang up, read slowly, give up, repeat."""
    requests: list[Request] = []
    for number in range(rng.randint(2, 6)):
        keyed = [request for request in requests if request.keyed and not request.repeats]
        if keyed and rng.random() < 0.5:
            first = rng.choice(keyed)
            late = rng.choice((0.0, 0.01, 0.5, 3.0, 30.0))
            repeat = replace(
                first, name=f"q{number}", repeats=first.name, at_s=first.at_s + late, reads="all", connection=""
            )
            repeat = replace(repeat, worker=rng.randint(0, 1))
            if rng.random() < 0.1:
                requests.append(replace(repeat, other_body=True, prompt_words=repeat.prompt_words + 1))
            else:
                requests.append(_reading(rng, repeat))
            continue
        answer = _any_answer(rng) if rng.random() < 0.8 else _bad_answer(rng)
        keyed_one = rng.random() < 0.5
        if keyed_one and rng.random() < 0.1:  # silence between two pings of a repeat that reads along
            answer = replace(answer, delay_s=16.0)
        request = _reading(rng, replace(_request(rng, f"q{number}", answer), keyed=keyed_one))
        if (
            request.reads == "stalls" and rng.random() < 0.7
        ):  # a stream that goes on without its client waits for nothing
            request = replace(request, stream=True, keyed=True, max_tokens=None)
        requests.append(request)
    workers, kept = rng.randint(1, 2), rng.choice(KEPT_BYTES)
    return History(0, "", workers=workers, kept_bytes=kept, steps=tuple(requests))


def _credit(rng: random.Random) -> History:
    """Draw accounts with little credit, budgets and limits, and requests that race."""
    credit = tuple(
        rng.choice((0, 100_000, 300_000, 500_000, 1_000_000, 3_000_000, 10_000_000, 1_000_000_000))
        for _ in range(rng.randint(1, 2))
    )
    keys = tuple(limited_key(rng, number % len(credit)) for number in range(rng.randint(1, 3)))
    requests: list[Step] = []
    for number in range(rng.randint(3, MAX_REQUESTS)):
        answer = _any_answer(rng)
        if rng.random() < 0.4:
            answer = replace(
                answer,
                words=rng.choice((30, 60, 120, 300)),
                per_event=rng.choice((1, 7, 40, 300)),
                gap_s=rng.choice((0, 0.01, 0.1)),
            )
        elif rng.random() < 0.3:  # ends while its next slice is asked for
            answer = replace(answer, words=rng.choice((12, 20, 30)), per_event=30, gap_s=0.0, lingers_s=0.5, pieces=0)
        request = _request(rng, f"q{number}", answer, spread=rng.choice((0.0, 0.5, 3.0)))
        requests.append(
            replace(
                request,
                key=rng.randrange(len(keys)),
                waits=rng.random() < 0.4,
                session=rng.choice(("", "s1", "s1", "s2")),
            )
        )
    for number, key in enumerate(keys):
        if key.tokens_per_minute is not None and rng.random() < 0.7:  # it uses more tokens than were reserved
            at_s = round(rng.random() * 2, 3)
            for later_s in (0.0, 2.0):
                answer = Answer(words=rng.choice((8, 120, 300)), lie=rng.choice(("true", "none")))
                whole = _request(rng, f"q{len(requests)}", answer, models=("free", "plain"))
                whole = replace(whole, stream=False, include_usage=False, max_tokens=None, timeout_s=None)
                requests.append(replace(whole, at_s=round(at_s + later_s, 3), key=number, connection=""))
    changes = [_change(rng, len(credit), len(keys)) for _ in range(rng.choice((0, 0, 1, 2)))]
    changes += _looks(rng, len(credit))
    for change in changes:
        if change.what in {"suspend", "revoke"}:  # when that must hold
            late = _request(rng, f"q{len(requests)}", _any_answer(rng))
            requests.append(replace(late, at_s=round(change.at_s + rng.choice((2.8, 3.5, 6.0)), 3), key=change.key))
    steps = [*requests, *changes]
    return History(0, "", credit=credit, keys=keys, workers=rng.randint(1, 2), steps=tuple(steps))


def _days(rng: random.Random) -> History:
    """Draw a budget of a day, of a month or in all that is used up, and requests just before and after midnight."""
    budget = {rng.choice(("budget_nusd", "daily_nusd", "monthly_nusd")): rng.choice((400_000, 700_000, 1_500_000))}
    if rng.random() < 0.4:  # and a bucket that is empty at the same time
        budget |= {"requests_per_minute": rng.choice((2, 30)), "burst": 2}
    is_accounts, midnight_s = rng.random() < 0.5, 3.0
    requests: list[Step] = []
    for number in range(rng.randint(5, MAX_REQUESTS)):
        answer = replace(_any_answer(rng), words=rng.choice((8, 20, 45)), gap_s=rng.choice((0.0, 0.02, 0.2)))
        late_s = rng.choice((-1.5, -1.0, -1.0, -0.2, 0.0, 0.3, 1.0, 2.0))
        request = _request(rng, f"q{number}", answer, models=("plain", "pair", "thinking", "drained"))
        moved = replace(request, at_s=round(midnight_s + late_s + rng.random() * 0.3, 3), connection="", timeout_s=None)
        requests.append(replace(moved, key=rng.randint(0, 1), prompt_words=min(moved.prompt_words, 40)))
    return History(
        0,
        "",
        keys=(KeyPlan() if is_accounts else replace(KeyPlan(), **budget), KeyPlan()),
        accounts=(replace(AccountPlan(), **budget),) if is_accounts else (),
        midnight_s=midnight_s,
        ends_month=rng.random() < 0.3,
        workers=rng.randint(1, 2),
        steps=(*requests, *_looks(rng, 1)),
    )


def _store(rng: random.Random) -> History:
    """Draw a store that fails under ordinary requests."""
    if rng.random() < 0.45:
        return _alone(rng)
    requests: list[Step] = [
        _reading(rng, _request(rng, f"q{number}", _any_answer(rng), spread=2.0), 0.15)
        for number in range(rng.randint(2, 6))
    ]
    faults = [_fault(rng) for _ in range(rng.randint(1, 2))]
    workers, local = rng.randint(1, 2), rng.random() < 0.3
    key = KeyPlan()
    if local and rng.random() < 0.5:  # shares of a key's limits, at workers that have seen it
        key = limited_key(rng, 0)
        faults[0] = Fault(round(0.5 + rng.random(), 3), "gone", for_s=rng.choice((3.0, 8.0)))
        more = [_request(rng, f"m{number}", _any_answer(rng), spread=6.0) for number in range(rng.randint(2, 6))]
        requests += [replace(request, worker=rng.randint(0, 1)) for request in more]
    steps = [*requests, *faults]
    return History(0, "", keys=(key,), workers=workers, local=local, steps=tuple(steps))


def _alone(rng: random.Random) -> History:
    """Draw requests of one account that workers admit without the store: near its allowance, or near its key's limits.

    Then a worker is killed, and its successor finds the journal while the store still refuses writes, or the store is lost
    once more when all has been charged.
    """
    near = rng.choice(("allowance", "allowance", "slots", "slots", "requests", "tokens"))
    what: FaultKind = rng.choice(("refused", "refused", "full", "gone"))
    workers, lost_at, lost_s = rng.choice((1, 1, 2)), 2.0, rng.choice((8.0, 15.0))
    key = KeyPlan(
        requests_per_minute=rng.choice((4, 6)) if near == "requests" else None,
        burst=rng.choice((None, 2)) if near == "requests" else None,
        tokens_per_minute=rng.choice((300, 1_000)) if near == "tokens" else None,
        max_parallel=rng.choice((1, 2, 2, 4)) if near == "slots" else None,
    )
    times = [0.1 * worker for worker in range(workers)]  # so that each has seen the key
    times += [lost_at + 0.2 + rng.choice((0.0, 0.3, 1.5, 3.0)) * rng.random() for _ in range(rng.randint(4, 7))]
    steps: list[Step] = [Fault(lost_at, what, for_s=lost_s)]
    if near == "slots" or rng.random() < 0.3:
        times += [lost_at + rng.choice((5.5, 7.0)) for _ in range(rng.randint(1, 3))]  # when the others are over
    elif rng.random() < 0.7:
        killed_at, until_s = lost_at + 3.3 + rng.random(), rng.choice((0.0, 0.3))
        steps.append(WorkerEvent(round(killed_at, 3), "killed", 0, until_s))
        times += [killed_at + until_s + 0.4 + rng.random() for _ in range(rng.randint(3, 5))]
    else:
        back_s = 6.0
        if (
            workers == 2 and rng.random() < 0.5
        ):  # before each of two has reported again to a store that has forgotten them
            lost_s, back_s = 18.0, rng.choice((2.8, 4.0))
            steps = [Fault(lost_at, what, for_s=lost_s)]
        again_at = lost_at + lost_s + back_s
        steps.append(Fault(again_at, what, for_s=5.0))
        times += [again_at + 0.2 + rng.random() * 2 for _ in range(rng.randint(3, 5))]
    lasts_s = (1.2, 2.0, 3.0) if near == "slots" else (0.0, 0.0, 0.5)
    for number, at_s in enumerate(times):
        answer = Answer(words=rng.choice((60, 150, 200, 300)), per_event=30, delay_s=rng.choice(lasts_s))
        stream = rng.random() < 0.5
        request = Request(f"q{number}", round(at_s, 3), model="plain", stream=stream, answers=(answer,))
        most = rng.choice((100, 200, None)) if near in {"allowance", "tokens"} else 20
        is_first = number < workers
        worker = number if is_first else rng.choice((0, 0, 0, 1))
        steps.append(replace(request, max_tokens=most, worker=worker, key=0 if is_first else rng.choice((0, 0, 0, 1))))
    # the other key has no limits, and is seen before as well
    steps += [Request(f"o{worker}", 0.4 + 0.1 * worker, key=1, worker=worker) for worker in range(workers)]
    return History(0, "", keys=(key, KeyPlan()), workers=workers, local=True, steps=tuple(steps))


def _workers(rng: random.Random) -> History:
    """Draw workers that are killed, drained or reloaded in the middle."""
    if rng.random() < 0.2:
        return _slots(rng)
    if rng.random() < 0.25:
        return _moves(rng)
    requests: list[Step] = []
    for number in range(rng.randint(2, 6)):
        answer = replace(_any_answer(rng), gap_s=rng.choice((0.0, 0.05, 0.3)), delay_s=rng.choice((0.0, 0.1, 1.0)))
        request = _request(rng, f"q{number}", answer, spread=3.0)
        requests.append(replace(_reading(rng, request, 0.15), keyed=rng.random() < 0.25, worker=rng.randint(0, 1)))
    events = [_worker_event(rng) for _ in range(rng.randint(1, 2))]
    for drain in [event for event in events if event.what == "drained"]:
        requests += _across(rng, drain, f"d{len(requests)}") if rng.random() < 0.6 else []
    changed = [change for event in events for change in (*event.prices, *event.routes)]
    changed += [("pair", ()) for event in events for _ in event.places]
    for name, _ in changed:  # when the new price, or the new upstreams, must hold
        late = _request(rng, f"q{len(requests)}", _any_answer(rng), models=(name,))
        requests.append(replace(late, at_s=5.0 + len(requests), worker=rng.randint(0, 1)))
    return History(0, "", workers=2, steps=(*requests, *events))


def _slots(rng: random.Random) -> History:
    """Draw requests of several seconds that fill a key's slots, a worker that is killed with them, and later requests."""
    most, killed_at = rng.choice((1, 1, 2)), round(1.0 + rng.random() * 2, 3)
    lates = [0.5, *sorted(rng.choice((3.0, 10.0, 19.0, 22.5, 24.0, 40.0)) for _ in range(2))]  # beside HOLD_TTL_S
    requests: list[Step] = []
    for number in range(most + rng.randint(0, 1) + len(lates)):
        early = number - len(lates)
        at_s = round(rng.random() * 0.5 if early >= 0 else killed_at + lates[number], 3)
        words, lasts_s = rng.choice((8, 20)), rng.choice((3.0, 6.0, 12.0)) if early >= 0 else rng.choice((0.0, 3.0))
        answer = replace(_any_answer(rng), words=words, per_event=1, gap_s=round(lasts_s / words, 3), pieces=0)
        request = replace(_request(rng, f"q{number}", answer), at_s=at_s, connection="", timeout_s=None)
        requests.append(replace(request, max_tokens=None, worker=rng.choice((0, 0, 0, 1)), waits=rng.random() < 0.3))
    killed = WorkerEvent(killed_at, "killed", 0, rng.choice((0.0, 0.5, 25.0)))
    return History(0, "", keys=(KeyPlan(max_parallel=most),), workers=2, steps=(*requests, killed))


def _moves(rng: random.Random) -> History:
    """Draw reloads that change upstreams, requests that run meanwhile, also for other attempts, and requests afterwards."""
    events = [
        replace(_moved(rng, WorkerEvent(0.0, "reloaded")), at_s=at_s)
        for at_s in rng.sample((1.0, 1.5, 4.5), rng.randint(1, 2))
    ]
    requests: list[Step] = []
    for number in range(rng.randint(4, 8)):
        answers = [replace(_any_answer(rng), gap_s=rng.choice((0.0, 0.05, 0.3)), delay_s=rng.choice((0.0, 0.1, 1.0)))]
        if rng.random() < 0.4:
            slow_s = rng.choice((0.1, 1.0, 3.0))
            answers.insert(0, Answer(status=rng.choice((500, 429)), error="failed", delay_s=slow_s))
        models = ("pair", "pair", "plain", "drained", "drained-first", "odd")
        request = replace(_request(rng, f"q{number}", *answers, models=models), timeout_s=None)
        at_s = max(0.0, rng.choice(events).at_s + rng.choice((-1.0, -0.3, -0.05, 0.3, 2.3, 3.0)) + rng.random() * 0.2)
        request = replace(_reading(rng, request, 0.15), at_s=round(at_s, 3), worker=rng.randint(0, 1))
        requests.append(replace(request, keyed=rng.random() < 0.2))
    return History(0, "", workers=rng.randint(1, 2), steps=(*requests, *events))


def _across(rng: random.Random, drain: WorkerEvent, name: str) -> list[Step]:
    """Draw requests that run when their worker is drained: until it is over, or for longer than it waits."""
    requests: list[Step] = []
    for number in range(rng.randint(2, 4)):
        lasts_s = rng.choice((6.0, 12.0, 16.0, 18.0, 24.0, 45.0))
        words = rng.choice((4, 20))
        is_late = lasts_s < FIRST_BYTE_S and rng.random() < 0.5
        answer = replace(
            _any_answer(rng), words=words, per_event=1, pieces=0, gzip=False, other_shape=False, pause_s=0.0
        )
        answer = replace(
            answer, delay_s=lasts_s if is_late else 0.0, gap_s=0.0 if is_late else round(lasts_s / words, 3)
        )
        request = replace(_request(rng, f"{name}{number}", answer), timeout_s=None, max_tokens=None, connection="")
        request = replace(_reading(rng, request, 0.1), keyed=rng.random() < 0.2, worker=drain.worker)
        if rng.random() < 0.35:  # read on without its client, which is gone by then
            request = replace(request, keyed=True, reads="leaves", after=0.05)
        elif request.reads == "all" and rng.random() < 0.4:  # on a connection that its client would keep
            request = replace(request, connection=f"{name}s{number}")
        requests.append(replace(request, at_s=round(max(0.0, drain.at_s - rng.choice((0.2, 1.0, 3.0))), 3)))
    if rng.random() < 0.5:  # on a connection that is idle by then, and used once more
        for number, late_s in enumerate((-1.5, rng.choice((0.4, 1.0, 5.0)))):
            request = replace(_request(rng, f"{name}k{number}", Answer()), connection=f"{name}k", worker=drain.worker)
            requests.append(replace(request, at_s=round(max(0.0, drain.at_s + late_s), 3), timeout_s=None))
    return requests


def _mixed(rng: random.Random) -> History:
    """Draw a little of everything."""
    parts = [make(rng) for make in rng.sample(MIXED, 2)]
    first = max(parts, key=lambda part: len(part.keys))
    steps: list[Step] = []
    for part in parts:
        for step in part.steps:
            if isinstance(step, Request):
                of = f"{step.repeats}{'ab'[parts.index(part)]}" if step.repeats else ""
                moved = replace(step, name=f"{step.name}{'ab'[parts.index(part)]}", repeats=of)
                steps.append(replace(moved, key=min(step.key, len(first.keys) - 1)))
            elif not isinstance(step, Change) or part is first:
                steps.append(step)
    return replace(
        first,
        workers=max(part.workers for part in parts),
        local=any(part.local for part in parts),
        journal_bytes=next((part.journal_bytes for part in parts if part.journal_bytes is not None), None),
        kept_bytes=next((part.kept_bytes for part in parts if part.kept_bytes is not None), None),
        steps=tuple(steps),
    )


def _breakers(rng: random.Random) -> History:
    """Draw an upstream that fails until its breaker opens, for its accounts or for one, and longer, and that mends.

    Where a model has another upstream, its requests come at once: after three failures in a row that one is asked first.
    """
    model = rng.choice(("plain", "plain", "pair", "drained-first"))
    failed = rng.choice(
        (
            *(Answer(status=500, error="failed"), Answer(status=529, error="busy"), Answer(end="resets", at=0.0)),
            *(Answer(status=500, error="failed"), Answer(status=529, error="busy"), Answer(status=429, error="limit")),
            Answer(status=401, error="key"),
        )
    )
    gap_s = rng.choice((0.1, 0.3)) if model == "plain" else 0.005
    accounts = rng.choice(((0,), (0, 1)))
    count = rng.choice((9, 10, 10, 11))
    delay_s = rng.choice((0.05, 1.5, 1.5)) if model == "plain" else 1.0
    opened_at = round(count * gap_s + delay_s + 0.4, 3)
    outage_s = rng.choice((opened_at, opened_at + 8.0, opened_at + 25.0))
    later = [
        0.0,
        rng.choice((0.3, 1.0, 2.0)),
        8.0,
        8.7,
        12.0,
        rng.choice((18.0, 24.5)),
        25.5,
        25.6,
    ]  # some during probes
    later = [opened_at + late for late in later]
    requests: list[Step] = []
    for number, at_s in enumerate([*(number * gap_s for number in range(count)), *later]):
        answer = replace(
            _any_answer(rng),
            delay_s=rng.choice((0.0, 0.5, 0.5)),
            words=rng.choice((3, 8)),
            gap_s=0.0,
            pause_s=0.0,
            lie="true",
        )
        request = replace(_request(rng, f"q{number}", answer, models=(model,)), timeout_s=None, connection="", tier="")
        is_later = number >= count
        key = rng.choice((0, 0, 0, 0, 0, 1)) if is_later else accounts[number % len(accounts)]
        worker = rng.choice((0, 0, 0, 0, 0, 1)) if is_later else 0
        moved = replace(request, at_s=round(at_s, 3), key=key, worker=worker, waits=is_later, prompt_words=6, n=1)
        requests.append(moved)
    routes = MODELS[model].routes[: rng.choice((1, 1, 2))]
    outages = [Outage(0.0, route, outage_s, replace(failed, delay_s=delay_s)) for route in routes]
    keys = (KeyPlan(0), KeyPlan(1))
    credit = (1_000_000_000, 1_000_000_000)
    return History(0, "", credit=credit, keys=keys, workers=rng.choice((1, 1, 2)), steps=(*outages, *requests))


def _long(rng: random.Random) -> History:
    """Draw requests that last longer than a hold lives, or begin just before the store is lost, and repeats of them.

    The store is lost meanwhile, or not. In `local` mode the account may have little credit: its allowance counts.
    """
    lost_at, lost_s = round(0.9 + rng.random(), 3), rng.choice((0.3, 3.0, 24.0, 24.0, 30.0))
    back_at = lost_at + lost_s
    what: FaultKind | None = rng.choice((None, "gone", "gone", "refused", "slow", "failover", "failover"))
    faults: list[Step] = (
        [] if what is None else [Fault(lost_at, what, for_s=lost_s, delay_s=1.4 if what == "slow" else 0)]
    )
    if rng.random() < 0.4:
        late = back_at + rng.choice((0.0, 0.3, 1.0))  # while the journal is replayed, or holds are taken anew
        faults.append(Fault(round(late, 3), "lost_reply", count=rng.choice((2, 4, 8))))
    local = rng.random() < 0.4
    requests: list[Step] = []
    for number in range(rng.randint(1, 3)):
        request = _request(
            rng, f"q{number}", _outlasting(rng, lost_s), models=("plain", "pair", "told", "fee", "thinking")
        )
        at_s = max(0.0, lost_at - rng.choice((0.05, 0.4, 0.8, 1.5)))
        first = replace(request, at_s=round(at_s, 3), keyed=rng.random() < 0.6, timeout_s=None, connection="")
        requests.append(first)
        if (
            rng.random() < 0.6
        ):  # when the store has forgotten the first one, and the holds past their deadline are released
            again_at = round(back_at + rng.choice((0.2, 0.6, 2.7, 5.0)), 3)
            repeats = first.name if first.keyed else ""
            answers = (*first.answers, _any_answer(rng)) if first.keyed else (_any_answer(rng),)
            requests[-1] = first = replace(
                first, answers=(*first.answers, answers[-1]) if first.keyed else first.answers
            )
            requests.append(replace(first, name=f"r{number}", at_s=again_at, repeats=repeats, answers=answers))
    for number in range(rng.choice((0, 1, 4)) if lost_s >= 3 else 0):
        answer = Answer(words=300, per_event=30, gap_s=rng.choice((0.0, 0.1)))
        request = _request(rng, f"d{number}", answer, models=("plain", "pair"))
        requests.append(
            replace(request, at_s=round(lost_at + 1 + number * min(lost_s / 8, 3), 3), max_tokens=None, timeout_s=None)
        )
    return History(
        0,
        "",
        credit=(rng.choice((0, 1_000_000, 1_000_000_000)) if local else 1_000_000_000,),
        workers=rng.randint(1, 2),
        local=local,
        steps=(*requests, *faults),
    )


MIXED = [_dialects, _providers, _clients, _credit, _store, _workers, _templates, _disks]
PROFILES: Sequence[tuple[str, int, Callable[[random.Random], History]]] = (
    ("dialects", 3, _dialects),
    ("providers", 4, _providers),
    ("clients", 4, _clients),
    ("credit", 4, _credit),
    ("store", 4, _store),
    ("workers", 3, _workers),
    ("mixed", 3, _mixed),
    ("breakers", 1, _breakers),
    ("templates", 2, _templates),
    ("tenants", 2, _tenants),
    ("disks", 3, _disks),
    ("long", 3, _long),
)


def _request(
    rng: random.Random, name: str, *answers: Answer, models: Sequence[str] = ORDINARY, spread: float = 1.0
) -> Request:
    """Draw an ordinary request, that reads all."""
    stream = rng.random() < 0.6
    model = rng.choice(models)
    tier = ""
    if model == "served":
        tier = rng.choice(("", "auto", "default", "flex", "flex", "priority", "priority", "scale"))
    elif rng.random() < 0.03:
        tier = rng.choice(("auto", "flex"))
    first, *later = answers
    if rng.random() < 0.02 and stream != first.other_shape and first.is_good:  # a stream that is over for its events
        answers = (replace(first, lingers_s=40.0), *later)
    return Request(
        name,
        **_beside(rng),
        at_s=round(rng.random() * spread, 3),
        model=model,
        tier=tier,
        stream=stream,
        include_usage=stream and rng.random() < 0.4,
        n=2 if rng.random() < 0.1 else 1,
        max_tokens=rng.choice((None, None, 1, 5, 20, 200)),
        timeout_s=rng.choice((0.5, 2.0, 10.0)) if rng.random() < 0.1 else None,
        prompt_words=20_000 if rng.random() < 0.01 else rng.choice((1, 6, 6, 40, 400)),
        sends_in=rng.choice((1, 1, 1, 2, 7)),
        connection=rng.choice(("", "", "c1", "c2")),
        answers=answers,
    )


def _beside(rng: random.Random) -> dict[str, Any]:
    """Draw what one request in three has beside what decides over its answer."""
    if rng.random() > 0.33:
        return {}
    return {
        "options": tuple(name for name in OPTIONS if rng.random() < 0.2),
        "turns": tuple(rng.choices(list(TURNS), k=rng.choice((0, 0, 1, 1, 2, 4)))),
        "ending": rng.choice(("", *ENDINGS)),
        "in_parts": rng.random() < 0.3,
        "escaped": rng.random() < 0.5,
    }


def _invalid(rng: random.Random, history: History) -> list[Request]:
    """Draw invalid requests among those of a history, with a valid one on the connection of each."""
    lasts_s = min(max(step.at_s for step in history.steps), 5.0)
    requests: list[Request] = []
    for number in range(rng.randint(1, 3)):
        key, worker, at_s = rng.randrange(len(history.keys)), rng.randint(0, 1), rng.random() * lasts_s
        first = _request(rng, f"qi{number}", _any_answer(rng))
        first = replace(first, invalid=rng.choice(list(INVALID)), keyed=rng.random() < 0.2, at_s=round(at_s, 3))
        then = _request(rng, f"qj{number}", _any_answer(rng))
        then = replace(then, at_s=round(at_s + rng.choice((0.0, 0.05, 1.0)), 3))
        requests += [replace(each, key=key, worker=worker, connection=f"i{number}") for each in (first, then)]
        if rng.random() < 0.2:
            requests[-2] = _reading(rng, requests[-2])
    return requests


def _grouped(rng: random.Random, history: History) -> History:
    """Return a history most of whose requests are for a model with a group of equals, and of few sessions."""
    first, second = rng.sample([f"s{number}" for number in range(6)], 2)
    sessions = ("", first, first, second)
    steps: list[Step] = []
    drawn: dict[str, tuple[str, str]] = {}  # by what all with one Idempotency-Key have in common
    for step in history.steps:
        if isinstance(step, Request) and step.model != "served" and not step.tier:
            model = rng.choice((step.model, "shared", "shared", "skewed"))
            found = drawn.setdefault(step.repeats or step.text_of or step.name, (model, rng.choice(sessions)))
            steps.append(replace(step, model=found[0], session=found[1]))
        else:
            steps.append(step)
    lasts_s = max(step.at_s for step in history.steps)
    for number in range(rng.randint(1, 4)):
        request = _request(rng, f"qg{number}", _any_answer(rng), models=("shared", "shared", "skewed"))
        at_s, session = round(rng.random() * lasts_s, 3), rng.choice(sessions)
        steps.append(replace(request, at_s=at_s, session=session, worker=rng.randint(0, 1), tier=""))
    return replace(history, steps=tuple(sorted(steps, key=lambda step: step.at_s)))


def _reading(rng: random.Random, request: Request, share: float = 0.7) -> Request:
    """Return the request of a client that may not read all of its answer."""
    if rng.random() > share:
        return request
    reads = rng.choice(("hangs_up", "hangs_up", "half_closes", "leaves", "slowly", "stalls"))
    after = {"leaves": (0.0, 0.02, 0.3, 1.0, 6.0), "slowly": (50, 2000), "stalls": (0, 500, 2000)}.get(
        reads, (0, 1, 200, 700, 1500, 4000)
    )
    if reads in {"slowly", "stalls"}:  # of more than buffers take, in some
        words, bulk = rng.choice(((30, 0), (300, 0), (45, 6_000)))
        longer = [replace(answer, words=max(answer.words, words), bulk=bulk) for answer in request.answers]
        request = replace(request, answers=tuple(longer))
    if reads == "stalls":  # what the provider takes isn't the client's time
        answers = tuple(replace(answer, gap_s=min(answer.gap_s, 0.02)) for answer in request.answers)
        if rng.random() < 0.3:  # of several times as much
            answers = tuple(replace(answer, words=45, per_event=1, bulk=20_000, gap_s=0.0) for answer in answers)
        request = replace(request, answers=answers)
    return replace(request, reads=reads, after=rng.choice(after), connection="")


def _any_answer(rng: random.Random) -> Answer:
    """Draw a good answer, in any shape."""
    dialect = rng.choice(DIALECTS)
    answer = Answer(
        dialect=dialect,
        words=rng.choice((1, 3, 8, 20, 45)),
        per_event=rng.choice((1, 1, 1, 4, 30)),
        hidden=rng.choice((0, 0, 12, 50)) if dialect in REASONING else 0,
        cached=rng.choice((0, 0, 4, 5)),
        gap_s=rng.choice((0.0, 0.0, 0.02, 0.2)),
        delay_s=rng.choice((0.0, 0.0, 0.1, 1.0, 7.0)) if rng.random() < 0.5 else 0.0,
        kind=rng.choice(("text", "text", "text", "reasoning", "tool", "refusal")),
        pieces=rng.choice((0, 0, 0, 1, 13, 200)),
        comments=rng.choice((0, 0, 0, 1, 3)),
        tier=rng.choice(("", "asked", "default", "flex", "priority")) if rng.random() < 0.4 else "",
        pause_s=rng.choice((0.3, 3.0, 6.0)) if rng.random() < 0.05 else 0.0,
    )
    if rng.random() < 0.05:
        answer = replace(answer, lingers_s=rng.choice((0.01, 0.5, 3.0)))
    if rng.random() < 0.03:  # pings, and then a head without a body
        answer = replace(answer, delay_s=rng.choice((6.0, 7.0, 8.5)), pause_s=6.0)
    if rng.random() < 0.35:
        answer = replace(answer, lie=rng.choice(LIES))
    if rng.random() < 0.3:
        oddity = rng.choice(("close", "length", "gzip", "type", "no type", "shape", "end"))
        if oddity in {"close", "length"}:
            answer = replace(answer, framing=oddity)
        elif oddity == "gzip":
            answer = replace(answer, gzip=True)
        elif oddity in {"type", "no type"}:
            answer = replace(answer, content_type="text/plain" if oddity == "type" else None)
        elif oddity == "shape":
            answer = replace(answer, other_shape=True)
        else:
            answer = replace(answer, end=rng.choice(("done_twice", "late_error")))
    if rng.random() < 0.1:
        answer = replace(answer, heeds_cap=False)
    if rng.random() < 0.08:
        pieces = rng.choice((answer.pieces, 0, 1, -1, -3))  # the end of a line may come alone
        answer = replace(answer, form=rng.choice(FORMS), pieces=pieces)
    return answer


def _outlasting(rng: random.Random, lasts_s: float) -> Answer:
    """Draw a good answer that takes longer than so many seconds: before its head, before its body, and between events."""
    more_s = lasts_s + rng.choice((1.0, 3.0, 9.0))
    delay_s = min(more_s * rng.choice((0.0, 0.6)), FIRST_BYTE_S - 3)
    pause_s = min(more_s - delay_s, IDLE_S - 3) * rng.choice((1.0, 1.0, 0.0))
    words = rng.choice((8, 20, 45))
    if rng.random() < 0.35:  # a steady stream, whose next slice is asked for again and again
        delay_s, pause_s, words = 0.0, 0.0, rng.choice((45, 90))
    left_s = max(more_s - delay_s - pause_s, 0.5)
    return replace(
        _any_answer(rng),
        words=words,
        per_event=1,
        delay_s=round(delay_s, 3),
        pause_s=round(pause_s, 3),
        gap_s=round(left_s / words, 3),
        lie=rng.choice(("true", "true", "none", "early")),
        pieces=0,
        gzip=False,
        other_shape=False,
    )


def _bad_answer(rng: random.Random) -> Answer:
    """Draw an answer that fails."""
    answer = replace(_any_answer(rng), framing="chunked", gzip=False, end="whole", other_shape=False, content_type="")
    if rng.random() < 0.1:  # a head that comes too late, or a pause in the body that is too long
        late = rng.choice(("delay_s", "pause_s", "gap_s"))
        seconds = (FIRST_BYTE_S if late == "delay_s" else IDLE_S) + rng.choice((0.5, 3.0))
        return replace(answer, **{late: seconds}, words=min(answer.words, 8))
    if rng.random() < 0.45:
        status, error = rng.choice(
            (
                (500, "failed"),
                (503, "busy"),
                (529, "busy"),
                (429, "limit"),
                (429, "quota"),
                (401, "key"),
                (403, "permission"),
                (404, "model"),
                (400, "context"),
                (400, "parameter"),
                (413, "large"),
                (422, "parameter"),
                (402, "credit"),
                (400, "balance"),
                (400, "bad_key"),
                (403, "flagged"),
                (404, "endpoint"),
                (200, "failed"),
                (200, "page"),
                (200, "empty"),
            )
        )
        wait_s = rng.choice((None, 1.0, 7.0, 90.0)) if status in {429, 503, 529} else None
        dated = wait_s is not None and wait_s > 1 and rng.random() < 0.3
        return replace(answer, status=status, error=error, wait_s=wait_s, dated=dated)
    end = rng.choice(("resets", "resets", "closes", "closes", "stalls", "error_event", "no_done", "ends_early"))
    return replace(
        answer, end=end, at=rng.choice((0.0, 0.001, 0.05, 0.3, 0.5, 0.8, 0.95, 0.999, round(rng.random(), 3)))
    )


def _change(rng: random.Random, accounts: int, keys: int) -> Change:
    what: ChangeKind = rng.choice(("grant", "grant", "grant_twice", "requests_per_minute", "suspend", "revoke"))
    amount = {"grant": 2_000_000, "grant_twice": 3_000_000, "requests_per_minute": rng.choice((1, 30))}.get(what, 0)
    return Change(round(rng.random() * 5, 3), what, rng.randrange(accounts), rng.randrange(keys), amount)


def _looks(rng: random.Random, accounts: int) -> list[Change]:
    """Draw readings of an account by one of its keys."""
    count = rng.choice((0, 0, 1, 2))
    return [Change(round(rng.random() * 3, 3), "look", account, 0) for account in range(accounts) for _ in range(count)]


def _fault(rng: random.Random) -> Fault:
    at_s = round(rng.random() * 3, 3)
    what: FaultKind = rng.choice(
        ("lost_reply", "lost_reply", "refused", "slow", "gone", "gone", "failover", "flush", "clock", "full")
    )
    return Fault(
        at_s,
        what,
        for_s=rng.choice((0.05, 1.0, 5.0, 30.0)) if what in {"refused", "slow", "gone", "failover", "full"} else 0.0,
        delay_s={"slow": rng.choice((0.1, 1.5, 3.0)), "clock": rng.choice((-30.0, -1.0, 2.0, 40.0))}.get(what, 0.0),
        count=rng.choice((1, 1, 2, 5)) if what == "lost_reply" else 1,
    )


def _worker_event(rng: random.Random) -> WorkerEvent:
    what: WorkerEventKind = rng.choice(("killed", "killed", "drained", "reloaded", "reloaded", "bad_reload"))
    prices: tuple[tuple[str, Price], ...] = ()
    if what == "reloaded":
        name = rng.choice(("plain", "pair", "drained"))
        prices = ((name, Price(rng.choice((1, 4)) * 1_000_000_000, rng.choice((2, 30)) * 1_000_000_000)),)
    event = WorkerEvent(round(rng.random() * 4, 3), what, rng.randint(0, 1), rng.choice((0.0, 0.5, 25.0)), prices)
    return event if what != "reloaded" or rng.random() < 0.4 else _moved(rng, event)


def _moved(rng: random.Random, event: WorkerEvent) -> WorkerEvent:
    """Return a reload that changes the upstreams of models, and their addresses."""
    routes = tuple((name, rng.choice(REROUTED[name])) for name in REROUTED if rng.random() < 0.5)
    places = tuple((name, rng.choice(("", "new", "other"))) for name in ("one", "two", "drained") if rng.random() < 0.4)
    return replace(event, prices=event.prices if rng.random() < 0.3 else (), routes=routes, places=places)
