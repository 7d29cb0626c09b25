"""What the simulated model will say, decided whole before the first byte of it is sent.

With `seed`, the same seed and messages give the same bytes: the content, and the id and `created` with them.
"""

import hashlib
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from meshproxy.upstream.simulator import prose
from meshproxy.upstream.simulator.ask import Ask, Function, ToolChoice
from meshproxy.upstream.simulator.behaviour import Behaviour
from meshproxy.upstream.simulator.dialects import Dialect, fill
from meshproxy.upstream.simulator.refusals import Refusal
from meshproxy.upstream.simulator.schema import value_for

SEEDED_CREATED = 1_735_689_600  # 2025-01-01: with a seed, even the time stands still
MAX_TOTAL_TOKENS = 131_072  # of all choices together: a bound on memory
ABSURD_TOKENS = 10**15
TICKS_PER_USD = 10**10  # xAI's unit of cost
PROMPT_TICKS, OUTPUT_TICKS = 10_000, 40_000  # a token, at the prices that `meshproxy dev` has: 1 and 4 USD a million

# What becomes of each number of the usage.
LIES: dict[str, Callable[[int], Any]] = {
    "usage-negative": lambda tokens: -tokens - 1,
    "usage-absurd": lambda tokens: tokens + ABSURD_TOKENS,
    "usage-string": str,
}


class Token(NamedTuple):
    """`kind`: where it goes: "reasoning_content", "content", or the position of the call whose arguments it is of."""

    kind: str | int
    text: str


class Choice(Struct):
    """One of `n` answers: thoughts, then either content or the arguments of calls. `calls`: an id and a name each."""

    index: int
    tokens: list[Token]
    calls: list[tuple[str, str]]
    finish: str

    def text(self, kind: str | int) -> str:
        """All tokens of one kind."""
        return "".join(token.text for token in self.tokens if token.kind == kind)


class Reply(Struct):
    """A whole answer. `model`: echoed as it was asked for; `thoughts`: how many of the tokens are; `told`: what a number of the
    usage is reported as.
    """

    id: str
    created: int
    model: str
    choices: list[Choice]
    thoughts: int
    prompt_tokens: int
    cached_tokens: int
    told: Callable[[int], Any]
    dialect: Dialect

    @property
    def tokens(self) -> int:
        """completion_tokens: as many as there are deltas with something in them."""
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def steps(self) -> int:
        """Tokens of the longest choice: choices are generated side by side."""
        return max(len(choice.tokens) for choice in self.choices)

    def numbers(self, completion_tokens: int) -> dict[str, Any]:
        """The numbers of a report after so many tokens, under the names that dialects' templates use."""
        thoughts = min(completion_tokens, self.thoughts)
        shown, citations = completion_tokens - thoughts, self.dialect.citation_tokens
        prompt, cached = self.prompt_tokens, self.cached_tokens
        counts = {
            "prompt": prompt,
            "cached": cached,
            "fresh": prompt - cached,
            "output": completion_tokens,
            "thoughts": thoughts,
            "shown": shown,
            "citations": citations,
            "total": prompt + completion_tokens,
            "shown_total": prompt + shown,
            "fresh_total": prompt - cached + completion_tokens,
            "zero": 0,
            "ticks": prompt * PROMPT_TICKS + completion_tokens * OUTPUT_TICKS,
        }
        cost = (prompt * PROMPT_TICKS + completion_tokens * OUTPUT_TICKS) / TICKS_PER_USD
        return {**{name: self.told(count) for name, count in counts.items()}, "cost": cost}

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        """The dialect's usage object after so many tokens."""
        usage: dict[str, Any] = fill(self.dialect.usage, self.numbers(completion_tokens))
        return usage


def compose(ask: Ask, model: str, behaviour: Behaviour, now: float) -> Reply:
    """Decide everything. Raises `Refusal` for a tool or a schema that can't be used. `now`: Unix seconds."""
    prompt_tokens, dialect = ask.prompt_tokens, behaviour.dialect
    choices = [_choice(ask, behaviour, index) for index in range(ask.n)]
    return Reply(
        id=f"chatcmpl-{_random(ask, 'id').getrandbits(116):029x}",
        created=int(now) if ask.seed is None else SEEDED_CREATED,
        model=model,
        choices=choices,
        thoughts=sum(token.kind == "reasoning_content" for choice in choices for token in choice.tokens),
        prompt_tokens=prompt_tokens,
        cached_tokens=prompt_tokens * 3 // 4 if "cached" in behaviour.traits or dialect.caches else 0,
        told=LIES.get(behaviour.one_of(LIES) or "", int),
        dialect=dialect,
    )


def _random(ask: Ask, purpose: object) -> Random:
    if ask.seed is None:
        return Random()  # noqa: S311 - prose, not secrets
    messages = hashlib.sha256(msgspec.json.encode(ask.messages)).hexdigest()
    return Random(f"{ask.seed} {messages} {purpose}")  # noqa: S311


def _choice(ask: Ask, behaviour: Behaviour, index: int) -> Choice:
    rng = _random(ask, index)
    thoughts = prose.thoughts() if "reasoning" in behaviour.traits or behaviour.dialect.thinks else []
    tokens = [Token("reasoning_content", text) for text in thoughts]
    functions = _called(ask)
    for position, function in enumerate(functions):
        tokens += [Token(position, text) for text in _arguments(function, rng)]
    if not functions:
        tokens += [Token("content", text) for text in _until(ask.stop, _content(ask, behaviour, rng))]
    calls = [(f"call_{rng.getrandbits(96):024x}", function.name) for function in functions]
    limit = min(ask.cap(behaviour.dialect.caps) or MAX_TOTAL_TOKENS, max(MAX_TOTAL_TOKENS // ask.n, 1))
    if len(tokens) > limit:
        return Choice(index, tokens[:limit], calls, "length")
    forced = isinstance(ask.tool_choice, ToolChoice)  # OpenAI then finishes with "stop"
    return Choice(index, tokens, calls, "tool_calls" if calls and not forced else "stop")


def _arguments(function: Function, rng: Random) -> list[str]:
    return _json_for(function.parameters or {"type": "object"}, rng, "tools", "invalid_function_parameters")


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


def _called(ask: Ask) -> list[Function]:
    """The functions to call; none means words. A tool's result, as the last message, is always answered with words."""
    functions = [tool.function for tool in ask.tools if tool.function is not None]
    if ask.messages[-1].role == "tool" or ask.tool_choice == "none":
        return []
    if isinstance(ask.tool_choice, ToolChoice):
        return [_named(ask.tool_choice.function.name, functions)]
    mentioned = [function for function in functions if _as_words(function.name) in _as_words(ask.last_words)]
    if ask.tool_choice == "required":
        mentioned = mentioned or functions[:1]
    return mentioned if ask.parallel_tool_calls else mentioned[:1]


def _named(name: str, functions: list[Function]) -> Function:
    for function in functions:
        if function.name == name:
            return function
    raise Refusal(400, f"Tool choice '{name}' not found in 'tools' parameter.", param="tool_choice")


def _as_words(text: str) -> str:
    """get_weather and "get weather" are the same."""
    return text.lower().replace("_", " ")
