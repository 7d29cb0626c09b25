"""The faults that a request selects.

By its model (`sim/split+unicode?tokens=200&tps=100`), by the header `x-sim-fault` (`split, unicode, tokens=200`), or by
both. A model whose name doesn't begin with `sim/` has no faults.
"""

import re
from collections.abc import Iterable
from typing import Annotated
from urllib.parse import parse_qsl

import msgspec
from msgspec import Meta, Struct

from meshproxy.simulator.dialects import DIALECTS, PLAIN, Dialect, dialect_name
from meshproxy.simulator.request import Refusal

PREFIX = "sim/"
MAX_TOKENS = 32_768

TRAITS: dict[str, str] = {
    "plain": "no fault, at the settings' pace",
    "fast": "no fault, without any delay",
    "slow": "one token a second",
    "burst": "every event of the stream in one write",
    "unicode": "emoji, CJK, right-to-left text, lone combining marks",
    "reasoning": "reasoning before the answer: delta.reasoning_content and reasoning_tokens",
    "cached": "reports three quarters of the prompt as cached_tokens",
    "error-context": "refuses a prompt as too long, with the dialect's error",
    "error-filter": "refuses a prompt for its content, with the dialect's error",
    "error-quota": "refuses for lack of credit at the provider, with the dialect's error",
    "error-key": "refuses the API key, with the dialect's error",
    "error-html": "502 with an HTML page",
    "not-json": "200 with a body, or events, that are not JSON",
    "empty": "200 with an empty body",
    "redirect": "302 to /_sim/redirected",
    "refuse": "closes the connection without an answer",
    "reset": "resets the connection (RST) after the request",
    "stall-head": "reads the request and never answers",
    "stall": "sends the head, then nothing, forever",
    "stall-mid": "falls silent after `after` events",
    "die-mid-stream": "closes the socket after `after` events, the body unfinished",
    "reset-mid-stream": "resets the connection (RST) after `after` events",
    "error-mid-stream": "an OpenRouter-like error event after `after` events, then the end",
    "end-early": "a clean end after `after` events, without [DONE] or usage",
    "bad-chunk": "breaks the chunked coding after `after` events",
    "no-usage": "never reports usage",
    "usage-negative": "reports negative usage",
    "usage-absurd": "reports usage of 10^15 tokens",
    "usage-string": "reports usage as strings",
    "usage-early": "reports usage in the last choice's finishing chunk, not in one of its own",
    "usage-every": "reports the usage so far in every chunk, requested or not",
    "split": "cuts the stream at awkward bytes, across chunks and across writes",
    "crlf": "ends lines with CR LF",
    "comments": "': OPENROUTER PROCESSING' between events",
    "ids": "id:, retry: and event: lines, some with no data",
    "bom": "begins the stream with a byte order mark",
    "huge-event": "one event of `bytes` bytes (2 MiB)",
    "gzip": "a gzip body, whatever accept-encoding says",
    "eof-delimited": "HTTP/1.0 style: the connection's end is the body's end",
    "content-length-stream": "a stream with a content-length instead of chunks",
    "wrong-content-type": "the right body as text/html",
}
FAMILIES: dict[str, str] = {
    "error-STATUS": "answers STATUS (400 to 599) with OpenAI's error; 429, 503 and 529 have retry-after",
    "tokens-N": "exactly N tokens, like the option tokens=N",
    "flaky-N": "every Nth request answers 500",
    "fail-first-N": "the first N requests answer 503",
}
DIALECT_NAMES = {f"dialect-{name}": dialect.about for name, dialect in DIALECTS.items()}
_FAMILY = re.compile(r"(error)-([45]\d\d)|(tokens)-(\d{1,9})|(flaky|fail-first)-([1-9]\d{0,8})")


class SimulatorSettings(Struct, frozen=True, kw_only=True):
    """The simulator's pace and rules.

    `api_key`: the only accepted bearer token; None accepts all. `openrouter`: `models` and `transforms` are supported,
    as by OpenRouter, and not refused, as by OpenAI.
    """

    tokens_per_second: Annotated[float, Meta(gt=0)] = 40.0
    first_token_s: Annotated[float, Meta(ge=0)] = 0.3
    api_key: str | None = None
    openrouter: bool = False
    max_body_bytes: Annotated[int, Meta(ge=1)] = 67_108_864


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers that a request may set.

    `tps`: tokens per second; `ttft`: seconds to the first token; `after`: events before the fault; `bytes`: size of the
    huge event; `tag`: no effect, but it separates the counts (flaky, fail-first) of two tests.
    """

    tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    tps: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    ttft: Annotated[float, Meta(ge=0, le=86400)] | None = None
    after: Annotated[int, Meta(ge=0)] = 3
    retry_after: Annotated[float, Meta(ge=0)] = 1
    bytes: Annotated[int, Meta(ge=1, le=67_108_864)] = 2_097_152
    tag: str = ""


class Behaviour(Struct, frozen=True):
    """The faults and options of one answer.

    `name` is the requested name; flaky and fail-first count by it. `numbers` are those of the families error, flaky and
    fail-first. `dialect_name` is one of DIALECTS, or "" for OpenAI's.
    """

    name: str
    traits: frozenset[str]
    numbers: dict[str, int]
    options: Options
    dialect_name: str = ""

    @property
    def dialect(self) -> Dialect:
        """Return the provider's dialect."""
        return DIALECTS.get(self.dialect_name, PLAIN)

    def one_of(self, traits: Iterable[str]) -> str | None:
        """Return the first of these names that was requested."""
        return next((trait for trait in traits if trait in self.traits), None)


def read_behaviour(model: str, header: str | None) -> Behaviour:
    """Read the behaviour that a request selects.

    Raises `Refusal`: 404 for an unknown sim/ model, 400 for an unknown header value or a bad option.
    """
    names, options = _from_model(model)
    more, header_options = _from_header(header or "")
    families = [match for match in map(_FAMILY.fullmatch, names + more) if match]
    numbers = {kind: int(number) for kind, number in (filter(None, match.groups()) for match in families)}
    if "tokens" in numbers:
        options = {"tokens": str(numbers["tokens"])} | options
    return Behaviour(
        name=f"{model} {header or ''}",
        traits=frozenset(names + more) & TRAITS.keys(),
        numbers=numbers,
        options=_options(options | header_options),
        dialect_name=dialect_name(names + more),
    )


def _from_model(model: str) -> tuple[list[str], dict[str, str]]:
    if not model.startswith(PREFIX):
        return [], {}
    names, _, query = model.removeprefix(PREFIX).partition("?")
    listed = names.split("+")
    if not all(map(_known, listed)):
        message = f"The model `{model[:128]}` does not exist or you do not have access to it."
        raise Refusal(404, message, code="model_not_found")
    return listed, dict(parse_qsl(query, keep_blank_values=True))


def _from_header(header: str) -> tuple[list[str], dict[str, str]]:
    words = [word.strip().removeprefix(PREFIX) for word in header.split(",") if word.strip()]
    names = [word for word in words if "=" not in word]
    for name in names:
        if not _known(name):
            raise Refusal(400, f"Unknown x-sim-fault: '{name[:64]}'.", param="x-sim-fault")
    return names, dict(word.split("=", 1) for word in words if "=" in word)


def _known(name: str) -> bool:
    return name in TRAITS or name in DIALECT_NAMES or _FAMILY.fullmatch(name) is not None


def _options(named: dict[str, str]) -> Options:
    try:
        return msgspec.convert(named, Options, strict=False)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"Bad simulator option: {error}.", param="model") from None
