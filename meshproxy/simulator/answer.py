"""Answers of the simulated model: fixed sentences, cut into tokens and joined to the requested length.

A token is a word of at most twelve letters with the space before it, or one sign. The tokens of a text, joined, are
that text byte for byte.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from meshproxy.simulator.behaviour import Behaviour
from meshproxy.simulator.dialects import Dialect, fill
from meshproxy.simulator.request import CompletionRequest, Function, Refusal, ToolChoice, value_for

USUAL_TOKENS = 60
MAX_QUOTE = 160

_TOKEN = re.compile(r"\s?\w{1,12}|\s?[^\w\s]|\s")
_ASKED = re.compile(r"\b(\d{1,5}) (?:words|tokens)\b")


def tokenize(text: str) -> list[str]:
    """Cut a text into tokens without losing a character."""
    return _TOKEN.findall(text)


def answer(rng: Random, words: str, tokens: int | None, *, unicode: bool) -> list[str]:
    """Return a friendly reply to `words`: exactly `tokens` long, or as long as they ask ("in 200 words"), or whole
    sentences of about sixty tokens.
    """
    asked = _ASKED.search(words)
    if tokens is None and asked:
        tokens = int(asked[1])
    wanted = USUAL_TOKENS if tokens is None else tokens
    told = tokenize(_opening(rng, words))
    sentences = _sentences(rng, unicode=unicode)
    while len(told) < wanted:
        told += next(sentences)
    return told[:tokens]


def thinking() -> list[str]:
    """Return a reasoning model's thoughts before its answer."""
    return tokenize(_THOUGHTS)


def _opening(rng: Random, words: str) -> str:
    quote = " ".join(words.split())
    if len(quote) > MAX_QUOTE:
        quote = quote[:MAX_QUOTE].rstrip() + "…"
    return rng.choice(_OPENINGS).format(quote=quote) if quote else "Hello! You said nothing, so I will begin."


def _sentences(rng: Random, *, unicode: bool) -> Iterator[list[str]]:
    """Yield all sentences in a shuffled order, then again in another order."""
    sentences = _UNICODE_TOKENS if unicode else _SENTENCE_TOKENS
    while True:
        yield from rng.sample(sentences, len(sentences))


def _cut(*sentences: str) -> list[list[str]]:
    return [tokenize(" " + sentence) for sentence in sentences]


_OPENINGS = ('You said "{quote}", and I am glad you did.', 'You asked about "{quote}"; let me think aloud.')
_THOUGHTS = "The user wants an answer. I have none of my own, so I will tell a short and friendly story instead."
_SENTENCE_TOKENS = _cut(
    "I am a simulated model, so nothing I say costs anything.",
    "Each of these words travels as an event of its own.",
    "Somewhere between us a proxy counts them and passes them on untouched.",
    "A river does not hurry, and yet it arrives at the sea.",
    "If you close the connection now, I will notice and stop.",
    "A good answer is short; a good test is long.",
    "Numbers are honest when two people count them.",
    "Ask me twice with the same seed and I will repeat myself.",
    "Every stream ends; the careful ones say so.",
    "What is held must be settled, said the clerk, and closed the book.",
    "Between the mountains a road winds down to a town of nine bridges.",
    "Rain makes the stones shine like the backs of fish.",
)
_UNICODE_TOKENS = _cut(
    "😀 Grinning, \U0001f469\u200d\U0001f469\u200d\U0001f467 a family of three.",
    "\U0001f3f3\ufe0f\u200d\U0001f308 One flag of four code points.",
    "你好世界。这是一条流。",
    "こんにちは、世界。ストリームです。",
    "안녕하세요, 세계.",
    "مرحبا بالعالم، هذا نص من اليمين إلى اليسار.",
    "שלום עולם.",
    "Zalgo e\u0301\u0327\u0323, a mark alone \u0301, and a joiner \u200d by itself.",
    "Naïve café, Straße, Ærøskøbing, Łódź, İstanbul.",
    "Separators \u2028 and \u2029 are no line ends in an event stream; nor is \x85.",
    "\U0001d578\U0001d586 and 𒀀𒁀 lie beyond the basic plane.",
)


SEEDED_CREATED = 1_735_689_600  # 2025-01-01: with a seed the time is constant too
MAX_TOTAL_TOKENS = 131_072  # of all choices together: a bound on memory
ABSURD_TOKENS = 10**15
TICKS_PER_USD = 10**10  # xAI's unit of cost
PROMPT_TICKS, OUTPUT_TICKS = (
    10_000,
    40_000,
)  # for a token, at the prices that `meshproxy dev` has: 1 and 4 USD a million

# How the usage faults change each number of the usage.
LIES: dict[str, Callable[[int], Any]] = {
    "usage-negative": lambda tokens: -tokens - 1,
    "usage-absurd": lambda tokens: tokens + ABSURD_TOKENS,
    "usage-string": str,
}


class Token(NamedTuple):
    """A token. `kind` is its field: "reasoning_content", "content", or the index of the tool call whose arguments it
    belongs to.
    """

    kind: str | int
    text: str


class Choice(Struct):
    """One of `n` answers: thoughts, then either content or arguments of tool calls. `calls`: an id and a name each."""

    index: int
    tokens: list[Token]
    calls: list[tuple[str, str]]
    finish: str

    def text(self, kind: str | int) -> str:
        """Return the text of all tokens of one kind."""
        return "".join(token.text for token in self.tokens if token.kind == kind)


class ComposedReply(Struct):
    """A whole answer. `model`: the requested model; `thoughts`: how many of its tokens are thoughts; `told`: how each
    number of the usage is reported.
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
        """Return completion_tokens: the number of deltas with content."""
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def steps(self) -> int:
        """Return the number of tokens of the longest choice: choices are generated in parallel."""
        return max(len(choice.tokens) for choice in self.choices)

    def numbers(self, completion_tokens: int) -> dict[str, Any]:
        """Return the numbers of a usage report after so many tokens, under the names that dialects' templates use."""
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
        """Return the dialect's usage object after so many tokens."""
        usage: dict[str, Any] = fill(self.dialect.usage, self.numbers(completion_tokens))
        return usage


def compose(ask: CompletionRequest, model: str, behaviour: Behaviour, now: float) -> ComposedReply:
    """Compose the whole answer. `now`: Unix seconds. Raises `Refusal` for a tool or a schema that can't be used."""
    prompt_tokens, dialect = ask.prompt_tokens, behaviour.dialect
    choices = [_choice(ask, behaviour, index) for index in range(ask.n)]
    return ComposedReply(
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


def _random(ask: CompletionRequest, purpose: object) -> Random:
    if ask.seed is None:
        return Random()  # noqa: S311 - prose, not secrets
    messages = hashlib.sha256(msgspec.json.encode(ask.messages)).hexdigest()
    return Random(f"{ask.seed} {messages} {purpose}")  # noqa: S311


def _choice(ask: CompletionRequest, behaviour: Behaviour, index: int) -> Choice:
    rng = _random(ask, index)
    thoughts = thinking() if "reasoning" in behaviour.traits or behaviour.dialect.thinks else []
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


def _content(ask: CompletionRequest, behaviour: Behaviour, rng: Random) -> list[str]:
    form = ask.response_format
    if form.json_schema is not None:
        return _json_for(form.json_schema.schema or {"type": "object"}, rng, "response_format", "invalid_schema")
    if form.type == "json_object":
        return _as_json({"answer": "This is a simulated answer.", "question": ask.last_words[:MAX_QUOTE]})
    return answer(rng, ask.last_words, behaviour.options.tokens, unicode="unicode" in behaviour.traits)


def _json_for(schema: dict[str, Any], rng: Random, param: str, code: str) -> list[str]:
    try:
        return _as_json(value_for(schema, rng))
    except ValueError as error:
        raise Refusal(400, f"Invalid schema for '{param}': {error}.", param=param, code=code) from error


def _as_json(value: Any) -> list[str]:
    return tokenize(msgspec.json.encode(value).decode())


def _until(stop: str | list[str], tokens: list[str]) -> list[str]:
    """Return the tokens before the first stop sequence, without the sequence itself."""
    text = "".join(tokens)
    found = [text.find(each) for each in ([stop] if isinstance(stop, str) else stop) if each and each in text]
    return tokenize(text[: min(found)]) if found else tokens


def _called(ask: CompletionRequest) -> list[Function]:
    """Return the functions to call; none means a text answer. If the last message is a tool's result, the answer is
    always text.
    """
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
    """Return a function's name as words, so that get_weather and "get weather" are equal."""
    return text.lower().replace("_", " ")
