"""What the simulated model will say, decided whole before the first byte of it is sent.

With `seed`, the same seed and messages give the same bytes: the content, and the id and `created` with them.
"""

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec
from msgspec import Struct

from meshproxy.upstream.simulator import prose, refusals
from meshproxy.upstream.simulator.ask import Ask
from meshproxy.upstream.simulator.behaviour import Behaviour
from meshproxy.upstream.simulator.schema import value_for
from meshproxy.upstream.simulator.tools import Call, calls_for, is_forced

FINGERPRINT = "fp_simulated01"
SEEDED_CREATED = 1_735_689_600  # 2025-01-01: with a seed, even the time stands still
MAX_TOTAL_TOKENS = 131_072  # of all choices together: a bound on memory

Usage = dict[str, Any]


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
    """A whole answer. `model`: echoed as it was asked for."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    prompt_tokens: int
    cached_tokens: int

    @property
    def tokens(self) -> int:
        """completion_tokens: as many as there are deltas with something in them."""
        return sum(choice.tokens for choice in self.choices)

    @property
    def steps(self) -> int:
        """Tokens of the longest choice: choices are generated side by side."""
        return max(choice.tokens for choice in self.choices)

    def usage(self, completion_tokens: int | None = None) -> Usage:
        """OpenAI's usage object, for the whole or for a part of the answer."""
        completion = self.tokens if completion_tokens is None else completion_tokens
        reasoning = min(completion, sum(len(choice.thoughts) for choice in self.choices))
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


def compose(ask: Ask, model: str, behaviour: Behaviour, now: float) -> Reply:
    """Decide everything. Raises `Refusal` for a tool or a schema that can't be used. `now`: Unix seconds."""
    identity = _random(ask, "id")
    prompt_tokens = ask.prompt_tokens
    return Reply(
        id=f"chatcmpl-{identity.getrandbits(116):029x}",
        created=int(now) if ask.seed is None else SEEDED_CREATED,
        model=model,
        choices=[_choice(ask, behaviour, index) for index in range(ask.n)],
        prompt_tokens=prompt_tokens,
        cached_tokens=prompt_tokens * 3 // 4 if "cached" in behaviour.traits else 0,
    )


def _random(ask: Ask, purpose: object) -> Random:
    if ask.seed is None:
        return Random()  # noqa: S311 - prose, not secrets
    messages = hashlib.sha256(msgspec.json.encode(ask.messages)).hexdigest()
    return Random(f"{ask.seed} {messages} {purpose}")  # noqa: S311


def _choice(ask: Ask, behaviour: Behaviour, index: int) -> Choice:
    rng = _random(ask, index)
    thoughts = prose.thoughts(rng) if "reasoning" in behaviour.traits else []
    calls = calls_for(ask, rng)
    content = [] if calls else _until(ask.stop, _content(ask, behaviour, rng))
    choice = Choice(index, thoughts, content, calls, "stop")
    if calls and not is_forced(ask):
        choice.finish = "tool_calls"
    limit = min(ask.max_tokens or MAX_TOTAL_TOKENS, max(MAX_TOTAL_TOKENS // ask.n, 1))
    if choice.tokens > limit:
        _cut(choice, limit)
    return choice


def _content(ask: Ask, behaviour: Behaviour, rng: Random) -> list[str]:
    match ask.response_format["type"]:
        case "json_object":
            value: Any = {"answer": "This is a simulated answer.", "question": ask.last_words[: prose.MAX_QUOTE]}
        case "json_schema":
            value = _structured(ask.response_format["json_schema"].get("schema") or {"type": "object"}, rng)
        case _:
            return prose.answer(rng, ask.last_words, behaviour.options.tokens, unicode="unicode" in behaviour.traits)
    return prose.tokenize(msgspec.json.encode(value).decode())


def _structured(schema: Any, rng: Random) -> Any:
    try:
        return value_for(schema, rng)
    except ValueError as error:
        message = f"Invalid schema for response_format: {error}."
        raise refusals.invalid(message, "response_format", "invalid_schema") from error


def _until(stops: Sequence[str], tokens: list[str]) -> list[str]:
    """The tokens before the first stop sequence; the stop itself is not said."""
    text = "".join(tokens) if any(stops) else ""
    found = [at for at in (text.find(stop) for stop in stops if stop) if at >= 0]
    return prose.tokenize(text[: min(found)]) if found else tokens


def _cut(choice: Choice, limit: int) -> None:
    """Let the choice say `limit` tokens and no more."""
    left = limit
    for spoken in (choice.thoughts, choice.content, *(call.arguments for call in choice.calls)):
        del spoken[left:]
        left -= len(spoken)
    choice.calls = [call for call in choice.calls if call.arguments]
    choice.finish = "length"
