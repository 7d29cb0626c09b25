"""What the simulated model will say, decided whole before the first byte of it is sent.

With `seed`, the same seed and messages give the same bytes: the content, and the id and `created` with them.
"""

import hashlib
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from msgspec import Struct

from meshproxy.upstream.simulator import prose
from meshproxy.upstream.simulator.ask import Ask, Function, ToolChoice
from meshproxy.upstream.simulator.behaviour import Behaviour
from meshproxy.upstream.simulator.refusals import Refusal
from meshproxy.upstream.simulator.schema import value_for
from meshproxy.upstream.simulator.tools import called

FINGERPRINT = "fp_simulated01"
SEEDED_CREATED = 1_735_689_600  # 2025-01-01: with a seed, even the time stands still
MAX_TOTAL_TOKENS = 131_072  # of all choices together: a bound on memory
ABSURD_TOKENS = 10**15

# What becomes of each number of the usage.
LIES: dict[str, Callable[[int], Any]] = {
    "usage-negative": lambda tokens: -tokens - 1,
    "usage-absurd": lambda tokens: tokens + ABSURD_TOKENS,
    "usage-string": str,
}


class Call(Struct):
    """A call of one tool. `arguments`: JSON, cut into tokens."""

    id: str
    name: str
    arguments: list[str]


class Choice(Struct):
    """One of `n` answers, as tokens: thoughts first, then either content or calls."""

    index: int
    thoughts: list[str]
    content: list[str]
    calls: list[Call]
    finish: str

    @property
    def tokens(self) -> int:
        """What the choice adds to completion_tokens."""
        return len(self.thoughts) + len(self.content) + sum(len(call.arguments) for call in self.calls)


class Reply(Struct):
    """A whole answer. `model`: echoed as it was asked for; `told`: what a number of the usage is reported as."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    prompt_tokens: int
    cached_tokens: int
    told: Callable[[int], Any]

    @property
    def tokens(self) -> int:
        """completion_tokens: as many as there are deltas with something in them."""
        return sum(choice.tokens for choice in self.choices)

    @property
    def steps(self) -> int:
        """Tokens of the longest choice: choices are generated side by side."""
        return max(choice.tokens for choice in self.choices)

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        """OpenAI's usage object after so many tokens."""
        told = self.told
        reasoning = min(completion_tokens, sum(len(choice.thoughts) for choice in self.choices))
        return {
            "prompt_tokens": told(self.prompt_tokens),
            "completion_tokens": told(completion_tokens),
            "total_tokens": told(self.prompt_tokens + completion_tokens),
            "prompt_tokens_details": {"cached_tokens": told(self.cached_tokens), "audio_tokens": told(0)},
            "completion_tokens_details": {
                "reasoning_tokens": told(reasoning),
                "audio_tokens": told(0),
                "accepted_prediction_tokens": told(0),
                "rejected_prediction_tokens": told(0),
            },
        }


def compose(ask: Ask, model: str, behaviour: Behaviour, now: float) -> Reply:
    """Decide everything. Raises `Refusal` for a tool or a schema that can't be used. `now`: Unix seconds."""
    prompt_tokens = ask.prompt_tokens
    return Reply(
        id=f"chatcmpl-{_random(ask, 'id').getrandbits(116):029x}",
        created=int(now) if ask.seed is None else SEEDED_CREATED,
        model=model,
        choices=[_choice(ask, behaviour, index) for index in range(ask.n)],
        prompt_tokens=prompt_tokens,
        cached_tokens=prompt_tokens * 3 // 4 if "cached" in behaviour.traits else 0,
        told=LIES.get(behaviour.one_of(LIES) or "", int),
    )


def _random(ask: Ask, purpose: object) -> Random:
    if ask.seed is None:
        return Random()  # noqa: S311 - prose, not secrets
    messages = hashlib.sha256(msgspec.json.encode(ask.messages)).hexdigest()
    return Random(f"{ask.seed} {messages} {purpose}")  # noqa: S311


def _choice(ask: Ask, behaviour: Behaviour, index: int) -> Choice:
    rng = _random(ask, index)
    thoughts = prose.thoughts(rng) if "reasoning" in behaviour.traits else []
    calls = [_call(function, rng) for function in called(ask)]
    content = [] if calls else _until(ask.stop, _content(ask, behaviour, rng))
    forced = isinstance(ask.tool_choice, ToolChoice)  # OpenAI then finishes with "stop"
    choice = Choice(index, thoughts, content, calls, "tool_calls" if calls and not forced else "stop")
    wanted = ask.max_completion_tokens or ask.max_tokens or MAX_TOTAL_TOKENS
    _cut(choice, min(wanted, max(MAX_TOTAL_TOKENS // ask.n, 1)))
    return choice


def _call(function: Function, rng: Random) -> Call:
    arguments = _json_for(function.parameters or {"type": "object"}, rng, "tools", "invalid_function_parameters")
    return Call(f"call_{rng.getrandbits(96):024x}", function.name, arguments)


def _content(ask: Ask, behaviour: Behaviour, rng: Random) -> list[str]:
    form = ask.response_format
    if form.json_schema is not None:
        return _json_for(form.json_schema.schema or {"type": "object"}, rng, "response_format", "invalid_schema")
    if form.type == "json_object":
        return _as_json({"answer": "This is a simulated answer.", "question": ask.last_words[: prose.MAX_QUOTE]})
    return prose.answer(rng, ask.last_words, behaviour.options.tokens, unicode="unicode" in behaviour.traits)


def _json_for(schema: dict[str, Any], rng: Random, param: str, code: str) -> list[str]:
    try:
        return _as_json(value_for(schema, rng))
    except ValueError as error:
        raise Refusal(400, f"Invalid schema for '{param}': {error}.", param=param, code=code) from error


def _as_json(value: Any) -> list[str]:
    return prose.tokenize(msgspec.json.encode(value).decode())


def _until(stop: str | list[str], tokens: list[str]) -> list[str]:
    """The tokens before the first stop sequence; the stop itself is not said."""
    text = "".join(tokens)
    found = [text.find(each) for each in ([stop] if isinstance(stop, str) else stop) if each and each in text]
    return prose.tokenize(text[: min(found)]) if found else tokens


def _cut(choice: Choice, limit: int) -> None:
    """Let the choice say `limit` tokens and no more."""
    if choice.tokens <= limit:
        return
    left = limit
    for spoken in (choice.thoughts, choice.content, *(call.arguments for call in choice.calls)):
        del spoken[left:]
        left -= len(spoken)
    choice.calls = [call for call in choice.calls if call.arguments]
    choice.finish = "length"
