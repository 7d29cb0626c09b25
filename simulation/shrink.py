"""Shrink a failing history: drop steps, put fields back to their usual values, lower numbers, while the same rule is broken."""

from collections.abc import Callable, Iterator
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import fields, replace

from simulation.history import Answer, History, KeyPlan, Request, Step

MAX_PLAYS: Final = 600
KEPT: Final = frozenset(
    {"seed", "profile", "name", "what", "at_s", "repeats", "credit"}
)  # fields that are not simplified
BODY: Final = frozenset(  # that a repeat has to have too
    {"model", "fallbacks", "stream", "include_usage", "n", "max_tokens", "timeout_s", "prompt_words", "session"}
)
LOWEST: Final = {"words": 1, "n": 1, "prompt_words": 1, "after": 0, "workers": 1}


def shrunk(history: History, fails: Callable[[History], bool], most_plays: int = MAX_PLAYS) -> History:
    """Return the smallest history that is found and still fails. `fails` plays one."""
    plays = 0
    found = True
    while found:
        found = False
        for smaller in _smaller(history):
            plays += 1
            if plays > most_plays:
                return history
            if fails(smaller):
                history, found = smaller, True
                break
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
    if history.local:
        yield replace(history, local=False)
    for at, key in enumerate(history.keys):
        if key != KeyPlan(key.account):
            yield replace(history, keys=(*history.keys[:at], KeyPlan(key.account), *history.keys[at + 1 :]))
    for at, step in enumerate(steps):
        for simpler in _simpler_step(step):
            yield replace(history, steps=(*steps[:at], simpler, *steps[at + 1 :]))


def _simpler_step(step: Step) -> Iterator[Step]:
    kept = BODY if isinstance(step, Request) and step.keyed else frozenset()
    yield from _plainer(step, kept)
    if isinstance(step, Request):
        if len(step.answers) > 1:
            yield replace(step, answers=step.answers[:1])
            yield replace(step, answers=step.answers[1:])
        for at, answer in enumerate(step.answers):
            for plainer in (Answer(), *_plainer(answer)):
                if plainer != answer:
                    yield replace(step, answers=(*step.answers[:at], plainer, *step.answers[at + 1 :]))


def _plainer(record: Any, kept: frozenset[str] = frozenset()) -> Iterator[Any]:
    """Yield a record with one field at its default, or at its lowest."""
    assert isinstance(record, Struct)
    for field in fields(record):
        name, value = field.name, getattr(record, field.name)
        if name in KEPT or name in kept or name == "answers":
            continue
        if value != field.default and not callable(field.default) and field.default is not field.default_factory:
            yield replace(record, **{name: field.default})
        elif name in LOWEST and value > LOWEST[name]:
            yield replace(record, **{name: LOWEST[name]})
