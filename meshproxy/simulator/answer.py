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

DEFAULT_TOKENS = 60
MAX_QUOTE = 160

_TOKEN = re.compile(r"\s?\w{1,12}|\s?[^\w\s]|\s")
_LENGTH = re.compile(r"\b(\d{1,5}) (?:words|tokens)\b")


def tokenize(text: str) -> list[str]:
    """Cut a text into tokens without losing a character."""
    return _TOKEN.findall(text)


def answer(rng: Random, words: str, tokens: int | None, *, unicode: bool) -> list[str]:
    """Return the tokens of a reply to `words`.

    Exactly `tokens` long, else as long as the words ask for ("in 200 words"), else whole sentences of about sixty tokens.
    """
    length_words = _LENGTH.search(words)
    if tokens is None and length_words:
        tokens = int(length_words[1])
    length = DEFAULT_TOKENS if tokens is None else tokens
    cut = tokenize(_opening(rng, words))
    sentences = _sentences(rng, unicode=unicode)
    while len(cut) < length:
        cut += next(sentences)
    return cut[:tokens]


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
_REASONING = "The user wants an answer. I have none of my own, so I will tell a short and friendly story instead."
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
PROMPT_TICKS, OUTPUT_TICKS = 10_000, 40_000  # for a token, at `meshproxy dev`'s prices: 1 and 4 USD a million

# How the usage faults change each number of the usage.
USAGE_FAULTS: dict[str, Callable[[int], Any]] = {
    "usage-negative": lambda tokens: -tokens - 1,
    "usage-absurd": lambda tokens: tokens + ABSURD_TOKENS,
    "usage-string": str,
}


class Token(NamedTuple):
    """A token.

    `kind` is its field: "reasoning_content", "content", or the index of the tool call whose arguments it belongs to.
    """

    kind: str | int
    text: str


class Choice(Struct):
    """One of `n` answers: reasoning, then either content or arguments of tool calls. `calls`: an id and a name each."""

    index: int
    tokens: list[Token]
    calls: list[tuple[str, str]]
    finish: str

    def text(self, kind: str | int) -> str:
        """Return the text of all tokens of one kind."""
        return "".join(token.text for token in self.tokens if token.kind == kind)


class ComposedReply(Struct):
    """A whole answer.

    `model`: the requested model. `reasoning_count`: how many of its tokens are reasoning. `report_number`: changes each
    number of the usage as the requested fault says.
    """

    id: str
    created: int
    model: str
    choices: list[Choice]
    reasoning_count: int
    prompt_tokens: int
    cached_tokens: int
    report_number: Callable[[int], Any]
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
        reasoning_count = min(completion_tokens, self.reasoning_count)
        shown, citations = completion_tokens - reasoning_count, self.dialect.citation_tokens
        prompt, cached = self.prompt_tokens, self.cached_tokens
        counts = {
            "prompt": prompt,
            "cached": cached,
            "fresh": prompt - cached,
            "output": completion_tokens,
            "thoughts": reasoning_count,
            "shown": shown,
            "citations": citations,
            "total": prompt + completion_tokens,
            "shown_total": prompt + shown,
            "fresh_total": prompt - cached + completion_tokens,
            "zero": 0,
            "ticks": prompt * PROMPT_TICKS + completion_tokens * OUTPUT_TICKS,
        }
        cost = (prompt * PROMPT_TICKS + completion_tokens * OUTPUT_TICKS) / TICKS_PER_USD
        return {**{name: self.report_number(count) for name, count in counts.items()}, "cost": cost}

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        """Return the dialect's usage object after so many tokens."""
        usage: dict[str, Any] = fill(self.dialect.usage, self.numbers(completion_tokens))
        return usage


def compose(request: CompletionRequest, model: str, behaviour: Behaviour, now: float) -> ComposedReply:
    """Compose the whole answer. `now`: Unix seconds. Raises `Refusal` for a tool or a schema that can't be used."""
    prompt_tokens, dialect = request.prompt_tokens, behaviour.dialect
    choices = [_choice(request, behaviour, index) for index in range(request.n)]
    return ComposedReply(
        id=f"chatcmpl-{_random(request, 'id').getrandbits(116):029x}",
        created=int(now) if request.seed is None else SEEDED_CREATED,
        model=model,
        choices=choices,
        reasoning_count=sum(token.kind == "reasoning_content" for choice in choices for token in choice.tokens),
        prompt_tokens=prompt_tokens,
        cached_tokens=prompt_tokens * 3 // 4 if "cached" in behaviour.traits or dialect.caches_prompt else 0,
        report_number=USAGE_FAULTS.get(behaviour.one_of(USAGE_FAULTS) or "", int),
        dialect=dialect,
    )


def _random(request: CompletionRequest, purpose: object) -> Random:
    if request.seed is None:
        return Random()  # noqa: S311 - prose, not secrets
    messages = hashlib.sha256(msgspec.json.encode(request.messages)).hexdigest()
    return Random(f"{request.seed} {messages} {purpose}")  # noqa: S311


def _choice(request: CompletionRequest, behaviour: Behaviour, index: int) -> Choice:
    rng = _random(request, index)
    reasoning = tokenize(_REASONING) if "reasoning" in behaviour.traits or behaviour.dialect.reasons else []
    tokens = [Token("reasoning_content", text) for text in reasoning]
    functions = _called_functions(request)
    for position, function in enumerate(functions):
        tokens += [Token(position, text) for text in _arguments(function, rng)]
    if not functions:
        tokens += [Token("content", text) for text in _before_stop(request.stop, _content(request, behaviour, rng))]
    calls = [(f"call_{rng.getrandbits(96):024x}", function.name) for function in functions]
    limit = min(request.cap(behaviour.dialect.cap_fields) or MAX_TOTAL_TOKENS, max(MAX_TOTAL_TOKENS // request.n, 1))
    if len(tokens) > limit:
        return Choice(index, tokens[:limit], calls, "length")
    forced = isinstance(request.tool_choice, ToolChoice)  # OpenAI then finishes with "stop"
    return Choice(index, tokens, calls, "tool_calls" if calls and not forced else "stop")


def _arguments(function: Function, rng: Random) -> list[str]:
    return _schema_json(function.parameters or {"type": "object"}, rng, "tools", "invalid_function_parameters")


def _content(request: CompletionRequest, behaviour: Behaviour, rng: Random) -> list[str]:
    form = request.response_format
    if form.json_schema is not None:
        return _schema_json(form.json_schema.schema or {"type": "object"}, rng, "response_format", "invalid_schema")
    if form.type == "json_object":
        return _as_json({"answer": "This is a simulated answer.", "question": request.last_user_text[:MAX_QUOTE]})
    return answer(rng, request.last_user_text, behaviour.options.tokens, unicode="unicode" in behaviour.traits)


def _schema_json(schema: dict[str, Any], rng: Random, param: str, code: str) -> list[str]:
    try:
        return _as_json(value_for(schema, rng))
    except ValueError as error:
        raise Refusal(400, f"Invalid schema for '{param}': {error}.", param=param, code=code) from error


def _as_json(value: Any) -> list[str]:
    return tokenize(msgspec.json.encode(value).decode())


def _before_stop(stop: str | list[str], tokens: list[str]) -> list[str]:
    """Return the tokens before the first stop sequence, without the sequence itself."""
    text = "".join(tokens)
    starts = [
        text.find(sequence) for sequence in ([stop] if isinstance(stop, str) else stop) if sequence and sequence in text
    ]
    return tokenize(text[: min(starts)]) if starts else tokens


def _called_functions(request: CompletionRequest) -> list[Function]:
    """Return the functions to call; none means a text answer.

    If the last message is a tool's result, the answer is always text.
    """
    functions = [tool.function for tool in request.tools if tool.function is not None]
    if request.messages[-1].role == "tool" or request.tool_choice == "none":
        return []
    if isinstance(request.tool_choice, ToolChoice):
        return [_named(request.tool_choice.function.name, functions)]
    mentioned = [function for function in functions if _as_words(function.name) in _as_words(request.last_user_text)]
    if request.tool_choice == "required":
        mentioned = mentioned or functions[:1]
    return mentioned if request.parallel_tool_calls else mentioned[:1]


def _named(name: str, functions: list[Function]) -> Function:
    for function in functions:
        if function.name == name:
            return function
    raise Refusal(400, f"Tool choice '{name}' not found in 'tools' parameter.", param="tool_choice")


def _as_words(text: str) -> str:
    """Return a function's name as words, so that get_weather and "get weather" are equal."""
    return text.lower().replace("_", " ")
