"""Read the usage that a provider reports, in any dialect, and decide which of its numbers are plausible.

The dialects are data: `_KINDS` maps each name that a provider uses to what it counts. `find_report` reads the numbers,
`Report.settled` adds them up. docs/providers.md names the page for each. Counts are bounded by `MAX_COUNT` and the
model's window.
"""

import re
from collections.abc import Collection, Mapping
from decimal import Decimal
from itertools import chain, combinations
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw, Struct
from msgspec.json import Decoder

from meshproxy.errors import UpstreamError, upstream_error
from meshproxy.units import MAX_EXACT_INT

MAX_COUNT: Final = MAX_EXACT_INT
MAX_COST_USD: Final = 1000  # of one request, by the provider's own figure; more is a wrong unit
MAX_COST_DECIMALS: Final = 30
WINDOW_SLACK: Final = 20  # a count may exceed the window by a twentieth: 128k is often 131,072, and 1M 1,048,576
MAX_SHOWN_CHARS: Final = 40
USD_PER_TICK: Final = Decimal("1e-10")  # docs.x.ai/developers/cost-tracking

BOM: Final = b"\xef\xbb\xbf"
_WITHOUT_CONTROLS: Final = bytes(max(byte, 32) for byte in range(256))
HALF_A_PAIR: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_MANY_DIGITS: Final = re.compile(rb"[0-9]{400,}+")  # int() raises ValueError for thousands
_DIGITS: Final = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,16})?", re.ASCII)  # as protobuf writes 64-bit integers in JSON
_HUGE: Final = b"%d" % (MAX_COUNT + 1)


class Usage(Struct, frozen=True):
    """The tokens of one request.

    `cached`, `cache_write` and `audio_prompt` are parts of `prompt`; `reasoning` and `audio_completion` are parts of
    `completion` (OpenAI, "The usage object" of the chat completion reference). `cache_write_1h` is the part of
    `cache_write` that is kept for an hour (Anthropic, "Prompt caching").
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0
    audio_prompt: int = 0
    audio_completion: int = 0
    cache_write_1h: int = 0

    @property
    def total(self) -> int:
        """The tokens of prompt and completion together."""
        return self.prompt + self.completion


class RefusedNumber(NamedTuple):
    """A reported number that can't be true. `reason`: negative, no_number, over_window, cost."""

    reason: str
    name: str
    value: str


# What each member of a usage object counts; a dict is for the members of a nested object.
_PROMPT_DETAILS: Final = {
    "cached_tokens": "cached",
    "cache_write_tokens": "cache_write",  # OpenRouter
    "cache_creation_tokens": "cache_write",  # LiteLLM
    "cache_creation_input_tokens": "cache_write",  # Alibaba's Model Studio
    "cache_creation_token_details": {
        "ephemeral_5m_input_tokens": "cache_write_5m",
        "ephemeral_1h_input_tokens": "cache_write_1h",
    },
    "audio_tokens": "audio_prompt",
    "image_tokens": "image",
    "video_tokens": "video",
}
_COMPLETION_DETAILS: Final = {"reasoning_tokens": "reasoning", "audio_tokens": "audio_completion"}
_KINDS: Final[Mapping[str, Any]] = {
    "prompt_tokens": "prompt",
    "completion_tokens": "completion",
    "total_tokens": "total",
    "input_tokens": "input",  # Anthropic, and OpenAI's Responses
    "output_tokens": "completion",
    "prompt_tokens_details": _PROMPT_DETAILS,
    "prompt_token_details": _PROMPT_DETAILS,  # Mistral
    "input_tokens_details": _PROMPT_DETAILS,
    "completion_tokens_details": _COMPLETION_DETAILS,
    "output_tokens_details": _COMPLETION_DETAILS,
    "cached_tokens": "cached",  # Moonshot, Together
    "prompt_cache_hit_tokens": "cached",  # DeepSeek
    "num_cached_tokens": "cached",  # Mistral
    "cache_read_input_tokens": "cache_read",  # Anthropic, as the next two: not included in input_tokens
    "cache_creation_input_tokens": "cache_creation",
    "cache_creation": {
        "ephemeral_5m_input_tokens": "cache_write_5m",
        "ephemeral_1h_input_tokens": "cache_write_1h",
    },
    "citation_tokens": "citation",  # Perplexity: not included in the prompt or the total
    "reasoning_tokens": "reasoning",  # Perplexity
    "tool_use_prompt_tokens": "tool_use",  # Gemini's, as gateways name it
}


class Report(Struct, frozen=True):
    """A provider's report on one answer, as sent.

    `counts`: the numbers above zero, by kind. `refused`: what is no count. `cost_usd`: the provider's own figure.
    `service_tier`: the tier that the provider names as served.
    """

    counts: dict[str, int]
    refused: tuple[RefusedNumber, ...] = ()
    cost_usd: Decimal | None = None
    service_tier: str | None = None

    @property
    def counts_output(self) -> bool:
        """Whether the report counts output, so that it covers the text before it."""
        counts = self.counts
        return "completion" in counts or counts.get("total", 0) > counts.get("prompt", 0) + counts.get("input", 0)

    def over(self, older: "Report | None") -> "Report":
        """Return this report with what only an older one of the same answer has: zeros and gaps don't replace numbers."""
        if older is None:
            return self
        return Report(
            older.counts | self.counts,
            self.refused or older.refused,
            older.cost_usd if self.cost_usd is None else self.cost_usd,
            self.service_tier or older.service_tier,
        )

    def settled(self, context_window: int, choices: int = 1) -> tuple[Usage, tuple[RefusedNumber, ...]]:
        """Return the tokens by kind, and the refused numbers. A whole of 0 wasn't reported, or isn't plausible.

        No number may exceed the window; each choice has a window for its output.
        """
        window = context_window + context_window // WINDOW_SLACK
        plain = self._plain(window)
        if plain is not None:
            return plain, ()
        bounds = {"total": window * (1 + choices), "completion": window * choices, "reasoning": window * choices}
        refused = list(self.refused)
        counts = {}
        for kind, count in self.counts.items():
            if count <= bounds.get(kind, window):
                counts[kind] = count
            else:
                refused.append(RefusedNumber("over_window", kind, str(count)))
        return _added_up(counts, window, window * choices, refused), tuple(refused)

    def _plain(self, window: int) -> Usage | None:
        """Return the usage of a report with only prompt, completion and a matching total, as most are; else None."""
        counts = self.counts
        if self.refused or "prompt" not in counts or "completion" not in counts:
            return None
        prompt, completion = counts["prompt"], counts["completion"]
        wholes = 2
        if "total" in counts:
            wholes = 3
            if counts["total"] != prompt + completion:
                return None
        return Usage(prompt, completion) if len(counts) == wholes and prompt <= window >= completion else None


class ProviderAnswer(Struct, frozen=True):
    """The parts of a whole answer that the gateway reads. `error`: some providers send one with a 200 (OpenRouter)."""

    report: Report | None = None
    model: str | None = None
    error: Any = None
    service_tier: str | None = None


class _UsualReply(Struct, gc=False):
    """A whole answer with its usage where OpenAI has it, and without an error; all else is skipped."""

    usage: dict[str, Any]
    model: str | None = None
    service_tier: str | None = None
    error: None = None


_USUAL: Final = Decoder(_UsualReply, float_hook=Decimal)
_MEMBERS: Final = Decoder(dict[str, Raw])
_ANYTHING: Final = Decoder()
_NUMBERS: Final = Decoder(float_hook=Decimal)


def find_report(members: Mapping[str, Raw]) -> Report | None:
    """Return the report in the members of a whole answer or an event; None if there is none.

    It is `usage`, Groq's `x_groq.usage` or Moonshot's `usage` of a choice.
    """
    usage = _decoded(_NUMBERS, members["usage"]) if "usage" in members else None
    if not isinstance(usage, dict):
        usage = _usage_elsewhere(members)
        if usage is None:
            return None
    return _report_of(usage, decode_text(members["service_tier"]) if "service_tier" in members else None)


def _report_of(usage: dict[str, Any], tier: str | None) -> Report:
    """Return the report in a usage object. `tier`: the service tier that is named beside it."""
    counts: dict[str, int] = {}
    refused: list[RefusedNumber] = []
    _collect(usage, _KINDS, counts, refused)
    has_cost = "cost" in usage or "cost_in_usd_ticks" in usage
    cost_usd = _cost_usd(usage, refused) if has_cost else None
    if tier is None and "service_tier" in usage:
        named = usage["service_tier"]
        tier = named if isinstance(named, str) else None
    return Report(counts, tuple(refused), cost_usd, tier)


def decode_answer(body: bytes) -> ProviderAnswer:
    """Decode usage, model and error of a whole answer. Raises UpstreamError if it is no JSON object."""
    try:
        usual = _USUAL.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    else:
        return ProviderAnswer(_report_of(usual.usage, usual.service_tier), usual.model, None, usual.service_tier)
    members = decode_members(body)
    if members is None:
        response = upstream_error("The provider's answer is not a JSON object.", may_have_run=True)
        raise UpstreamError(response, safe_to_repeat=False, unreadable=bool(body.strip()))
    return ProviderAnswer(
        report=find_report(members),
        model=decode_text(members.get("model")),
        error=decode_value(members["error"]) if "error" in members else None,
        service_tier=decode_text(members.get("service_tier")),
    )


def decode_members(text: bytes | Raw) -> dict[str, Raw] | None:
    """Decode the members of a provider's JSON object, as their own bytes where possible; None for anything else."""
    members = _decoded(_MEMBERS, text)
    return members if isinstance(members, dict) else None


def decode_value(raw: bytes | Raw | None) -> Any:
    """Decode a provider's JSON value; None for anything else."""
    return None if raw is None else _decoded(_ANYTHING, raw)


def decode_text(raw: bytes | Raw | None) -> str | None:
    """Decode a provider's JSON string; None for anything else."""
    value = None if raw is None else _decoded(_ANYTHING, raw)
    return value if isinstance(value, str) else None


def _decoded(decoder: Decoder[Any], text: bytes | Raw) -> Any:
    """Decode a value, or return None. Text that isn't valid JSON (RFC 8259) is repaired first."""
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if decoder is _MEMBERS and isinstance(error, msgspec.ValidationError):
            return None  # JSON, but no object
    repaired = _repaired(bytes(text))
    try:
        return decoder.decode(repaired)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return decoder.decode(_MANY_DIGITS.sub(_HUGE, repaired))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _repaired(text: bytes) -> bytes:
    """Repair text that is nearly JSON.

    A byte order mark is removed, NaN and Infinity become null, half a surrogate pair and bytes that aren't UTF-8 become
    U+FFFD, and control characters become spaces. Strings that look like these change too; that does no harm, since the
    result isn't passed on.
    """
    text = text.removeprefix(BOM).translate(_WITHOUT_CONTROLS)
    if not text.isascii():
        text = text.decode("utf-8", "replace").encode()
    for word in (b"NaN", b"-Infinity", b"Infinity"):
        text = text.replace(word, b"null")
    if b"\\ud" in text or b"\\uD" in text:
        text = HALF_A_PAIR.sub(rb"\\ufffd", text)
    return text


def _usage_elsewhere(members: Mapping[str, Raw]) -> dict[str, Any] | None:
    """Return the usage object from an unusual place."""
    if "x_groq" in members:
        usage = _member(_decoded(_NUMBERS, members["x_groq"]), "usage")
        if isinstance(usage, dict):
            return usage
    if "choices" in members and b'"usage"' in bytes(members["choices"]):
        choices = _decoded(_NUMBERS, members["choices"])
        for choice in choices if isinstance(choices, list) else ():
            usage = _member(choice, "usage")
            if isinstance(usage, dict):
                return usage
    return None


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _collect(
    values: dict[str, Any], kinds: Mapping[str, Any], counts: dict[str, int], refused: list[RefusedNumber]
) -> None:
    """Collect the numbers above zero. Where two names of one kind differ, the larger counts."""
    for name, value in values.items():
        if not value or name not in kinds:
            continue
        kind = kinds[name]
        if type(kind) is not str:
            if isinstance(value, dict):
                _collect(value, kind, counts, refused)
            continue
        count = value if type(value) is int and 0 < value < MAX_COUNT else _count(_number(value))
        if count == 0:
            continue
        if count is None:
            reason = "negative" if isinstance(value, int | Decimal) and value < 0 else "no_number"
            refused.append(RefusedNumber(reason, name, _short(value)))
        elif kind not in counts or count > counts[kind]:
            counts[kind] = count


def _number(value: Any) -> Any:
    """Return the number that a string of digits spells; any other value as it is."""
    return Decimal(value) if type(value) is str and _DIGITS.fullmatch(value) else value


def _count(value: Any) -> int | None:
    """Return an unusually large count, or one written as a whole float; None for what is no count."""
    if type(value) not in {int, Decimal} or value < 0:
        return None
    if value >= MAX_COUNT:
        return MAX_COUNT
    whole = int(value)
    return whole if whole == value else None


def _cost_usd(usage: dict[str, Any], refused: list[RefusedNumber]) -> Decimal | None:
    """Return the provider's own cost figure in USD; None if it gives none or it can't be true.

    It is xAI's `cost_in_usd_ticks`; OpenRouter's `cost`, plus the upstream's own bill where that goes to the operator
    (`is_byok`); or Perplexity's `cost.total_cost`.
    """
    ticks = usage.get("cost_in_usd_ticks")
    if ticks is not None:
        return _usd(ticks, "cost_in_usd_ticks", refused, USD_PER_TICK)
    named = usage.get("cost")
    cost = _usd(_member(named, "total_cost") if isinstance(named, dict) else named, "cost", refused)
    upstream = _member(usage.get("cost_details"), "upstream_inference_cost") if usage.get("is_byok") is True else None
    if cost is None or upstream is None:
        return cost
    return cost + (_usd(upstream, "upstream_inference_cost", refused) or 0)


def _usd(value: Any, name: str, refused: list[RefusedNumber], unit: Decimal = Decimal(1)) -> Decimal | None:
    """Return an amount in USD; None if there is none, or if it can't be true, which is added to `refused`."""
    if value is None:
        return None
    value = _number(value)
    if type(value) in {int, Decimal} and 0 <= value <= MAX_COST_USD / unit:
        amount: Decimal = value * unit
        exponent = amount.as_tuple().exponent
        if isinstance(exponent, int) and exponent >= -MAX_COST_DECIMALS:
            return amount
    refused.append(RefusedNumber("cost", name, _short(value)))
    return None


def _added_up(counts: dict[str, int], window: int, most_output: int, refused: list[RefusedNumber]) -> Usage:
    """Return the usage of counts within their bounds.

    Parts that a dialect counts beside their whole are added to it. Those are the parts that explain by how much
    `total_tokens` exceeds prompt and completion (xAI's reasoning), a part larger than its whole (Anthropic's cache),
    and what a dialect always counts so. The total's remainder is output (Gemini's thoughts), or the whole that wasn't
    reported.
    """
    count = counts.get
    prompt, completion, total = max(count("prompt", 0), count("input", 0)), count("completion", 0), count("total", 0)
    cached = max(count("cached", 0), count("cache_read", 0))
    write_1h = count("cache_write_1h", 0)
    write = max(count("cache_write", 0), count("cache_creation", 0), count("cache_write_5m", 0) + write_1h)
    reasoning, citation = count("reasoning", 0), count("citation", 0)

    by_anthropic = ("cache_read" in counts or "cache_creation" in counts) and ("prompt" not in counts or not total)
    in_prompt = count("image", 0) + count("video", 0) + count("tool_use", 0)
    parts = {"reasoning": reasoning, "cache": cached + write, "citation": citation, "prompt": in_prompt}
    beside = _explained(total - prompt - completion, parts)
    if cached + write and ("cache" in beside or by_anthropic or cached + write > prompt):
        if prompt + cached + write <= window:
            prompt += cached + write
        elif cached + write > prompt:
            refused.append(RefusedNumber("over_window", "cached", str(cached + write)))
            cached = write = 0
    if reasoning and ("reasoning" in beside or citation or reasoning > completion):
        if completion + reasoning <= most_output:
            completion += reasoning
        elif reasoning > completion:
            refused.append(RefusedNumber("over_window", "reasoning", str(reasoning)))
            reasoning = 0
    more_prompt = citation + in_prompt * ("prompt" in beside)
    if prompt + more_prompt <= window:
        prompt += more_prompt
    else:
        refused.append(RefusedNumber("over_window", "citation" if citation else "prompt", str(more_prompt)))

    rest = total - prompt - completion
    if rest > 0 and prompt and completion + rest <= most_output:
        reasoning += rest if completion and not reasoning else 0
        completion += rest
    elif rest > 0 and completion and not prompt and rest <= window:
        prompt = rest
    audio_prompt, audio_completion = count("audio_prompt", 0), count("audio_completion", 0)
    return Usage(
        prompt=prompt,
        completion=completion,
        cached=cached,
        cache_write=write,
        reasoning=reasoning,
        audio_prompt=audio_prompt if audio_prompt <= prompt else 0,
        audio_completion=audio_completion if audio_completion <= completion else 0,
        cache_write_1h=min(write_1h, write),
    )


def _explained(gap: int, sizes: Mapping[str, int]) -> Collection[str]:
    """Return the parts whose sum is exactly the gap between a total and its wholes; none if no choice of parts is."""
    if gap > 0:
        parts = [part for part in sizes.items() if part[1]]
        for chosen in chain.from_iterable(combinations(parts, length) for length in range(1, len(parts) + 1)):
            if sum(size for _, size in chosen) == gap:
                return [name for name, _ in chosen]
    return ()


def _short(value: Any) -> str:
    """Return a value of any size, shortened for the log."""
    if isinstance(value, dict | list):
        return type(value).__name__
    return str(max(min(value, MAX_COUNT), -MAX_COUNT) if type(value) is int else value)[:MAX_SHOWN_CHARS]
