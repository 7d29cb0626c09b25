"""Dialects: how providers differ from OpenAI's format, as a table, and the functions that apply it.

A dialect is data: the names of the cap that it reads, the fields that it refuses, and templates of its events, usage
and errors. In a template "$name" stands for a value: a number of the usage (`ComposedReply.numbers`), `$text` or `$so_far` of
an event, or a member of an error. docs/providers.md cites the page for each fact.
"""

import re
from typing import Any, Literal

import msgspec
from msgspec import Struct, field

from meshproxy.simulator.request import Refusal

Json = dict[str, Any]
Kind = Literal["context", "filter", "quota", "key", "field"]

FINGERPRINT = "fp_simulated01"
PADDING = "xQ3JXdhVOWfbZAVaBSo63bbHQ8TGV6IvPV75z"  # OpenAI's obfuscation: random letters
SIGNATURE = "EjQKMgEMOdbHJChLX75QUCJjyYlm" * 100  # Gemini's thought signatures have some thousands of characters
_SAFE = {name: {"filtered": False, "severity": "safe"} for name in ("hate", "self_harm", "sexual", "violence")}
_PROMPT_FILTER = {"prompt_filter_results": [{"prompt_index": 0, "content_filter_results": _SAFE}]}
_PAGE = {"title": "A page", "url": "https://pages.example/one", "date": "2026-01-01", "snippet": "What it says. " * 8}
_NAME = re.compile(r"dialect-([a-z]+)")


class Report(Struct, frozen=True, kw_only=True):
    """Where a stream reports its usage.

    `when`: in an event of its own without choices, in the finishing event of the last choice, or in each event, as a
    running total. `on_request`: only with `stream_options.include_usage`.
    """

    path: tuple[str | int, ...] = ("usage",)
    when: Literal["own", "finish", "each"] = "own"
    on_request: bool = True


class ErrorText(Struct, frozen=True):
    """The text of one kind of refusal. `more`: members in addition to those of the error's template."""

    status: int
    message: Any
    type: str | None = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    more: Json = {}


_FULL_USAGE: Json = {
    "prompt_tokens": "$prompt",
    "completion_tokens": "$output",
    "total_tokens": "$total",
    "prompt_tokens_details": {"cached_tokens": "$cached", "audio_tokens": "$zero"},
    "completion_tokens_details": {
        "reasoning_tokens": "$thoughts",
        "audio_tokens": "$zero",
        "accepted_prediction_tokens": "$zero",
        "rejected_prediction_tokens": "$zero",
    },
}
_PLAIN_USAGE: Json = {"prompt_tokens": "$prompt", "completion_tokens": "$output", "total_tokens": "$total"}
_TOO_LONG = "This model's maximum context length is 8192 tokens. However, your messages resulted in 20007 tokens."
_FILTERED = "The response was filtered due to the prompt triggering the content management policy."
_QUOTA = "You exceeded your current quota, please check your plan and billing details."
_KEY = "Incorrect API key provided: sk-s****fake."
_OPENAI_ERRORS: dict[Kind, ErrorText] = {
    "context": ErrorText(400, _TOO_LONG, code="context_length_exceeded", param="messages"),
    "filter": ErrorText(400, _FILTERED, code="content_filter", param="prompt"),
    "quota": ErrorText(429, _QUOTA, "insufficient_quota", "insufficient_quota"),
    "key": ErrorText(401, _KEY, code="invalid_api_key"),
    "field": ErrorText(400, "Unsupported parameter: '$param'.", code="unsupported_parameter", param="$param"),
}


_OPENAI_ERROR = {"error": {"message": "$message", "type": "$type", "param": "$param", "code": "$code"}}


class Dialect(Struct, frozen=True, kw_only=True):
    """One provider's format.

    `accepted_fields`: the only fields that it accepts; `refused_fields`: fields that it refuses. `reasons`: its answers
    begin with reasoning, which `shows_reasoning` includes in them. `preamble`: bytes before the first event of a stream,
    and before a whole answer. `upstream`, `model`: the settings that a gateway needs for it.
    """

    about: str
    cap_fields: tuple[str, ...] = ("max_completion_tokens", "max_tokens")
    accepted_fields: frozenset[str] | None = None
    refused_fields: tuple[str, ...] = ()
    reasons: bool = False
    shows_reasoning: bool = True
    caches_prompt: bool = False
    citation_tokens: int = 0
    tokens_per_event: int = 1
    usage: Json = field(default_factory=lambda: _FULL_USAGE)
    reports: tuple[Report, ...] = (Report(),)
    common: Json = field(default_factory=lambda: {"service_tier": "default", "system_fingerprint": FINGERPRINT})
    first: tuple[Json, ...] = ()
    preamble: tuple[str, str] = ("", "")
    event: Json = {}
    choice: Json = {}
    delta: Json = {}
    reasoning: Json = field(default_factory=lambda: {"reasoning_content": "$text"})
    finish_event: Json = {}
    finish_delta: Json = {}
    whole: Json = {}
    error: Any = field(default_factory=lambda: _OPENAI_ERROR)
    errors: dict[Kind, ErrorText] = {}
    upstream: Json = {}
    model: Json = {}

    def check(self, given: frozenset[str]) -> None:
        """Raise the `Refusal` of the first field that this provider doesn't accept."""
        accepted = self.accepted_fields
        unknown = given.intersection(self.refused_fields) if accepted is None else given - accepted
        if unknown:
            raise self.refusal("field", param=min(unknown))

    def refusal(self, kind: Kind, param: str | None = None) -> Refusal:
        """Return the provider's refusal for one kind of bad request."""
        error = self.errors.get(kind) or _OPENAI_ERRORS[kind]
        values = {"param": param}
        message, param = fill(error.message, values), fill(error.param, values)
        refusal = Refusal(error.status, message, type=error.type, param=param, code=error.code)
        refusal.more = error.more
        return refusal

    def error_body(self, refusal: Refusal) -> bytes:
        """Return a refusal in the provider's format."""
        body = fill(self.error, {**refusal.error, "status": refusal.status})
        if refusal.more and isinstance(body.get("error"), dict):
            body["error"] |= refusal.more
        return msgspec.json.encode(body)


def fill(template: Any, values: Json) -> Any:
    """Return a template with each "$name" replaced: by the value itself, or by its text within a longer text."""
    if isinstance(template, str):
        if template.startswith("$") and template[1:] in values:
            return values[template[1:]]
        return re.sub(r"\$([a-z_]+)", lambda slot: str(values.get(slot[1], slot[0])), template)
    if isinstance(template, dict):
        return {name: fill(member, values) for name, member in template.items()}
    return [fill(item, values) for item in template] if isinstance(template, list | tuple) else template


def set_at(chunk: Json, path: tuple[str | int, ...], value: Any) -> None:
    """Set a value at a path. Skip a choice's member if there are no choices."""
    *way, last = path
    place: Any = chunk
    for step in way:
        if isinstance(step, int):
            if not place:
                return
            place = place[step]
        else:
            place = place.setdefault(step, {})
    place[last] = value


def dialect_name(names: list[str]) -> str:
    """Return the dialect among the names of a behaviour, or ""."""
    return next((match[1] for match in map(_NAME.fullmatch, names) if match and match[1] in DIALECTS), "")


PLAIN = Dialect(about="OpenAI's")

_XAI_USAGE: Json = {
    **_PLAIN_USAGE,
    "completion_tokens": "$shown",
    "prompt_tokens_details": {"cached_tokens": "$cached", "text_tokens": "$prompt", "image_tokens": "$zero"},
    "completion_tokens_details": {"reasoning_tokens": "$thoughts", "audio_tokens": "$zero"},
    "num_sources_used": "$zero",
    "cost_in_usd_ticks": "$ticks",
}
_OPENROUTER_USAGE: Json = {
    **_FULL_USAGE,
    "cost": "$cost",
    "is_byok": False,
    "cost_details": {"upstream_inference_cost": None},
}
_PERPLEXITY_USAGE: Json = {
    "prompt_tokens": "$prompt",
    "completion_tokens": "$shown",
    "total_tokens": "$shown_total",
    "search_context_size": "low",
    "citation_tokens": "$citations",
    "num_search_queries": 3,
    "reasoning_tokens": "$thoughts",
}
_MISTRAL_NAMES = (
    "model messages temperature top_p max_tokens stream stop random_seed tools tool_choice response_format presence_penalty"
    " frequency_penalty n safe_prompt parallel_tool_calls prediction prompt_mode reasoning_effort metadata"
)
_MISTRAL_EXTRA_FIELD = {
    "detail": [{"type": "extra_forbidden", "loc": ["body", "$param"], "msg": "Extra inputs are not permitted"}]
}
_TIMINGS: Json = {"timings": {"prompt_n": 8, "prompt_ms": 31.2, "predicted_n": 60, "predicted_ms": 610.5}}
_FLAT_ERROR: Json = {"object": "error", "message": "$message", "type": "$type", "param": None, "code": "$code"}

DIALECTS: dict[str, Dialect] = {
    "openai": Dialect(about="OpenAI's, with obfuscation in each event", event={"obfuscation": "$padding"}),
    "azure": Dialect(
        about="Azure OpenAI's: content filter results on each event, and before the first",
        first=({"choices": [], "created": 0, "id": "", "model": "", "object": "", **_PROMPT_FILTER},),
        common={"system_fingerprint": FINGERPRINT},
        choice={"content_filter_results": _SAFE},
        whole=_PROMPT_FILTER,
        errors={
            "filter": ErrorText(
                400,
                _FILTERED,
                None,
                "content_filter",
                "prompt",
                {"status": 400, "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": _SAFE}},
            ),
            "key": ErrorText(401, "Access denied due to invalid subscription key or wrong API endpoint.", None, "401"),
        },
    ),
    "openrouter": Dialect(
        about="OpenRouter's: thoughts twice, usage with its cost unasked, errors with a number",
        reasons=True,
        reasoning={
            "content": "",
            "reasoning": "$text",
            "reasoning_details": [
                {"type": "reasoning.text", "text": "$text", "format": "anthropic-claude-v1", "index": 0}
            ],
        },
        common={"provider": "Simulated"},
        delta={"role": "assistant"},
        choice={"native_finish_reason": None},
        usage=_OPENROUTER_USAGE,
        reports=(Report(on_request=False),),
        preamble=(": OPENROUTER PROCESSING\n\n", ""),
        error={"error": {"code": "$status", "message": "$message"}},
        errors={
            "filter": ErrorText(
                403,
                "Your chosen model requires moderation and your input was flagged",
                more={"metadata": {"reasons": ["violence"], "flagged_input": "hi", "provider_name": "Simulated"}},
            ),
            "quota": ErrorText(402, "This request requires more credits, or fewer max_tokens."),
            "key": ErrorText(401, "User not found."),
        },
    ),
    "anthropic": Dialect(
        about="Anthropic's, as gateways translate it: the cached prompt beside prompt_tokens",
        caches_prompt=True,
        usage={
            **_PLAIN_USAGE,
            "prompt_tokens": "$fresh",
            "total_tokens": "$fresh_total",
            "prompt_tokens_details": {"cached_tokens": "$cached"},
            "completion_tokens_details": None,
        },
        common={},
        error={"error": {"type": "$type", "message": "$message"}},
        errors={
            "context": ErrorText(400, "input length and `max_tokens` exceed context limit: 143653 + 64000 > 200000"),
            "quota": ErrorText(400, "Your credit balance is too low to access the Anthropic API."),
            "key": ErrorText(401, "invalid x-api-key", "authentication_error"),
        },
    ),
    "gemini": Dialect(
        about="Gemini's: thoughts only in total_tokens, a dozen tokens an event, running usage, errors in a list",
        reasons=True,
        shows_reasoning=False,
        tokens_per_event=12,
        usage={**_PLAIN_USAGE, "completion_tokens": "$shown"},
        reports=(Report(when="each"),),
        common={},
        delta={"role": "assistant"},
        finish_delta={"extra_content": {"google": {"thought_signature": SIGNATURE}}},
        error=[{"error": {"code": "$status", "message": "$message", "status": "$code"}}],
        errors={
            "context": ErrorText(
                400, "The input token count (1200000) exceeds the maximum (1048576).", code="INVALID_ARGUMENT"
            ),
            "quota": ErrorText(429, "You exceeded your current quota.", code="RESOURCE_EXHAUSTED"),
            "key": ErrorText(400, "API key not valid. Please pass a valid API key.", code="INVALID_ARGUMENT"),
        },
        model={"hidden_reasoning": True},
    ),
    "xai": Dialect(
        about="xAI's: reasoning_tokens beside completion_tokens, the cost in ticks, errors of two strings",
        reasons=True,
        shows_reasoning=False,
        usage=_XAI_USAGE,
        reports=(Report(when="finish", on_request=False),),
        common={"system_fingerprint": FINGERPRINT},
        error={"code": "$type", "error": "$message"},
        errors={
            "context": ErrorText(400, _TOO_LONG, "Client specified an invalid argument"),
            "filter": ErrorText(403, "Content violates usage guidelines.", "The caller does not have permission"),
            "quota": ErrorText(
                429, "Your team has either used all available credits or reached its limit.", "Resource exhausted"
            ),
            "key": ErrorText(400, "Incorrect API key provided: xa***ke.", "Client specified an invalid argument"),
        },
        model={"hidden_reasoning": True},
    ),
    "mistral": Dialect(
        about="Mistral's: any field that it doesn't know is a 422, stream_options and max_completion_tokens among them",
        cap_fields=("max_tokens",),
        accepted_fields=frozenset(_MISTRAL_NAMES.split()),
        usage=_PLAIN_USAGE,
        reports=(Report(when="finish", on_request=False),),
        common={},
        error=_FLAT_ERROR,
        errors={
            "context": ErrorText(
                400, "Prompt contains 66385 tokens, too large for model with 32768 maximum context length"
            ),
            "quota": ErrorText(402, "Payment required", "subscription_error"),
            "key": ErrorText(401, "Unauthorized", "unauthorized"),
            "field": ErrorText(422, _MISTRAL_EXTRA_FIELD),
        },
        upstream={"stream_usage": False},
    ),
    "groq": Dialect(
        about="Groq's: usage in x_groq of the last chunk; logprobs and logit_bias are refused",
        refused_fields=("logprobs", "top_logprobs", "logit_bias"),
        usage={**_PLAIN_USAGE, "queue_time": 0.01, "prompt_time": 0.002, "completion_time": 0.1, "total_time": 0.102},
        reports=(Report(), Report(path=("x_groq", "usage"), when="finish", on_request=False)),
        common={"system_fingerprint": FINGERPRINT},
        reasoning={"reasoning": "$text"},
        errors={"field": ErrorText(400, "property '$param' is unsupported", param="$param")},
    ),
    "deepseek": Dialect(
        about="DeepSeek's: hits and misses of the cache, comments and empty lines while one waits",
        cap_fields=("max_tokens",),
        reasons=True,
        caches_prompt=True,
        usage={**_FULL_USAGE, "prompt_cache_hit_tokens": "$cached", "prompt_cache_miss_tokens": "$fresh"},
        common={"system_fingerprint": FINGERPRINT},
        preamble=(": keep-alive\n\n", "\n\n"),
        errors={"quota": ErrorText(402, "Insufficient Balance", "unknown_error", "invalid_request_error")},
    ),
    "perplexity": Dialect(
        about="Perplexity's: the message so far and the search results in each event, citations beside the usage",
        cap_fields=("max_tokens",),
        citation_tokens=300,
        usage=_PERPLEXITY_USAGE,
        reports=(Report(when="each", on_request=False),),
        common={},
        event={"citations": ["https://pages.example/one"] * 8, "search_results": [_PAGE] * 8},
        choice={"message": {"role": "assistant", "content": "$so_far"}},
    ),
    "moonshot": Dialect(
        about="Moonshot's: usage in the last choice",
        cap_fields=("max_tokens",),
        usage={**_PLAIN_USAGE, "cached_tokens": "$cached"},
        reports=(Report(path=("choices", 0, "usage"), when="finish", on_request=False),),
        common={"system_fingerprint": FINGERPRINT},
        errors={
            "quota": ErrorText(
                429, "Your account is suspended, please check your plan.", "exceeded_current_quota_error"
            )
        },
    ),
    "vllm": Dialect(
        about="vLLM's with continuous usage: in each event what there is so far; flat errors",
        usage={**_PLAIN_USAGE, "prompt_tokens_details": None},
        reports=(Report(when="each"), Report()),
        common={"prompt_logprobs": None},
        choice={"stop_reason": None},
        error={**_FLAT_ERROR, "code": "$status"},
        errors={
            kind: msgspec.structs.replace(errors, type="BadRequestError") for kind, errors in _OPENAI_ERRORS.items()
        },
    ),
    "ollama": Dialect(
        about="Ollama's: max_completion_tokens is ignored, thoughts come as reasoning",
        cap_fields=("max_tokens",),
        reasons=True,
        reasoning={"content": "", "reasoning": "$text"},
        delta={"role": "assistant"},
        usage=_PLAIN_USAGE,
        common={"system_fingerprint": "fp_ollama"},
        error={"error": {"message": "$message", "type": "$type", "param": None, "code": None}},
    ),
    "llamacpp": Dialect(
        about="llama.cpp's: max_tokens alone, as before 2026; timings beside the usage",
        cap_fields=("max_tokens",),
        usage=_PLAIN_USAGE,
        common={"system_fingerprint": "b6000-simulated"},
        finish_event=_TIMINGS,
        whole=_TIMINGS,
        error={"error": {"code": "$status", "message": "$message", "type": "$type"}},
        errors={
            "context": ErrorText(
                400,
                "the request exceeds the available context size, try increasing it",
                "exceed_context_size_error",
                more={"n_prompt_tokens": 13392, "n_ctx": 8192},
            ),
            "key": ErrorText(401, "Invalid API Key", "authentication_error"),
        },
    ),
    "tgi": Dialect(
        about="Text Generation Inference's: an error is a text and a type",
        cap_fields=("max_tokens",),
        usage=_PLAIN_USAGE,
        common={"system_fingerprint": "3.0.0-simulated"},
        error={"error": "$message", "error_type": "$type"},
        errors={
            "context": ErrorText(422, "Input validation error: `inputs` must have less than 4096 tokens.", "validation")
        },
    ),
}
