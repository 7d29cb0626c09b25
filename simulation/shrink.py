"""Shrink a failing history: drop steps, put fields back to their usual values, lower numbers, while the same rule is broken."""

from collections.abc import Callable, Container, Iterator
from itertools import islice
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import fields, replace

from simulation.accounts import AccountPlan, KeyPlan
from simulation.history import Answer, History, Request, Step

MAX_PLAYS: Final = 600
KEPT: Final = frozenset({"seed", "profile", "name", "what", "at_s", "repeats", "other_body", "credit"})
# What makes a request a repeat, and its body: it has to be that of all requests with its Idempotency-Key.
SHARED: Final = frozenset({
    *("key", "keyed", "named", "model", "fallbacks", "stream", "include_usage", "n", "max_tokens", "timeout_s", "prompt_words"),
    *("session", "tier", "template", "manner", "options", "turns", "ending", "in_parts", "escaped"),
})  # fmt: skip
LOWEST: Final = {"words": 1, "n": 1, "prompt_words": 1, "after": 0.0, "workers": 1}


def shrunk(history: History, fails: Callable[[History], bool], most_plays: int = MAX_PLAYS) -> History:
    """Return the smallest history that is found and still fails. `fails` plays one."""
    plays = 0
    found = True
    while found:
        found, at = False, 0  # what comes before `at` was tried in vain, if of a larger history
        while (smaller := next(islice(_smaller(history), at, None), None)) is not None:
            plays += 1
            if plays > most_plays:
                return history
            if fails(smaller):
                history, found = smaller, True
            else:
                at += 1
    return history


def _smaller(history: History) -> Iterator[History]:
    """Yield histories that are one thing simpler, the largest cuts first."""
    steps = history.steps
    half = len(steps) // 2
    if half > 1:
        yield replace(history, steps=steps[:half])
        yield replace(history, steps=steps[half:])
    for at in range(len(steps)):
        yield replace(history, steps=steps[:at] + steps[at + 1 :])
    if history.workers > 1:
        yield replace(history, workers=1)
    usual_ones: dict[str, Any] = {"local": False, "fast_path": True, "journal_bytes": None, "kept_bytes": None}
    usual_ones |= {"midnight_s": None, "ends_month": False, "accounts": ()}
    for name, usual in usual_ones.items():
        if getattr(history, name) != usual:
            yield replace(history, **{name: usual})
    last = len(history.keys) - 1
    if last and all(getattr(step, "key", 0) != last for step in steps):
        yield replace(history, keys=history.keys[:last])
    last = len(history.credit) - 1
    if last and all(getattr(each, "account", 0) != last for each in (*history.keys, *steps)):
        yield replace(history, credit=history.credit[:last])
    for at, plan in enumerate(history.accounts):
        for plainer in (AccountPlan(), *_plainer(plan)) if plan != AccountPlan() else ():
            yield replace(history, accounts=(*history.accounts[:at], plainer, *history.accounts[at + 1 :]))
    for at, key in enumerate(history.keys):
        if key != KeyPlan(key.account):
            yield replace(history, keys=(*history.keys[:at], KeyPlan(key.account), *history.keys[at + 1 :]))
    for at, step in enumerate(steps):
        group = (
            [] if not isinstance(step, Request) else [other for other in history.requests if _key(other) == _key(step)]
        )
        for simpler in _simpler_step(step, is_alone=len(group) < 2):
            yield replace(history, steps=_put(steps, at, simpler))


def _key(request: Request) -> str:
    """Return what the requests with one Idempotency-Key have in common: the name of the first."""
    return request.repeats or request.name


def _put(steps: tuple[Step, ...], at: int, simpler: Step) -> tuple[Step, ...]:
    """Put a simpler step in a step's place, and what they share in all requests with its Idempotency-Key."""
    step = steps[at]
    put = [*steps[:at], simpler, *steps[at + 1 :]]
    if isinstance(step, Request) and isinstance(simpler, Request):
        shared = {name: getattr(simpler, name) for name in SHARED if getattr(simpler, name) != getattr(step, name)}
        words = simpler.prompt_words - simpler.other_body  # another body has a word more
        for index, other in enumerate(put):
            if shared and index != at and isinstance(other, Request) and _key(other) == _key(step):
                put[index] = replace(other, **(shared | {"prompt_words": words + other.other_body}))
    return tuple(put)


def _simpler_step(step: Step, *, is_alone: bool) -> Iterator[Step]:
    if isinstance(step, Request) and is_alone:
        words = min(step.prompt_words, Request("").prompt_words)
        plain = Request(step.name, at_s=step.at_s, prompt_words=words, answers=tuple(map(_plain, step.answers[:1])))
        if plain != step:
            yield plain
    kept = {"keyed"} if not is_alone else set()
    if isinstance(step, Request) and step.other_body:
        kept.add("prompt_words")  # it follows that of the others
    yield from _plainer(step, kept)
    if isinstance(step, Request):
        if len(step.answers) > 1:
            yield replace(step, answers=step.answers[:1])
            yield replace(step, answers=step.answers[1:])
        for at, answer in enumerate(step.answers):
            for plainer in (_plain(answer), *_plainer(answer)):
                if plainer != answer:
                    yield replace(step, answers=(*step.answers[:at], plainer, *step.answers[at + 1 :]))


def _plain(answer: Answer) -> Answer:
    """Return the usual answer, if not with more words."""
    return Answer(words=min(answer.words, Answer().words))


def _plainer(record: Any, kept: Container[str] = ()) -> Iterator[Any]:
    """Yield a record with one field at its default, or at its lowest."""
    assert isinstance(record, Struct)
    for field in fields(record):
        name, value = field.name, getattr(record, field.name)
        if name in KEPT or name in kept or name == "answers":
            continue
        if name in LOWEST and value > LOWEST[name]:
            yield replace(record, **{name: LOWEST[name]})
        if name in LOWEST and value <= field.default:
            continue  # a larger number isn't plainer
        if value != field.default and not callable(field.default) and field.default is not field.default_factory:
            yield replace(record, **{name: field.default})
