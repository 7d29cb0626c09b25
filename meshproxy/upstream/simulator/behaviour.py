"""Which faults a request asks for: by its model (`sim/split+unicode?tokens=200&tps=100`) or by the header `x-sim-fault`
(`split, unicode, tokens=200`), or by both at once.

Any model whose name doesn't begin with `sim/` is a well-behaved one.
"""

import re
from collections.abc import Iterable
from typing import Annotated
from urllib.parse import parse_qsl

import msgspec
from msgspec import Meta, Struct

from meshproxy.upstream.simulator import refusals

PREFIX = "sim/"
MAX_TOKENS = 32_768

TRAITS: dict[str, str] = {
    "plain": "behaves well, at the settings' pace",
    "fast": "behaves well, without any delay",
    "slow": "one token a second",
    "burst": "every event of the stream in one write",
    "unicode": "emoji, CJK, right-to-left text, lone combining marks",
    "reasoning": "thinks first: delta.reasoning_content and reasoning_tokens",
    "cached": "reports three quarters of the prompt as cached_tokens",
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
    "usage-every": "reports running usage in every chunk, asked or not",
    "split": "cuts the stream at awkward bytes, across chunks and across writes",
    "crlf": "ends lines with CR LF",
    "comments": "': OPENROUTER PROCESSING' between events",
    "ids": "id:, retry: and event: lines, some with no data",
    "bom": "begins the stream with a byte order mark",
    "huge-event": "one event of `bytes` bytes (2 MiB)",
    "gzip": "a gzip body, whatever accept-encoding said",
    "eof-delimited": "HTTP/1.0 style: the connection's end is the body's end",
    "content-length-stream": "a stream with a content-length instead of chunks",
    "wrong-content-type": "the right body as text/html",
}
FAMILIES: dict[str, str] = {
    "error-STATUS": "answers STATUS (400 to 599) with OpenAI's words; 429, 503 and 529 carry retry-after",
    "tokens-N": "exactly N tokens, as the option tokens=N",
    "flaky-N": "every Nth request answers 500",
    "fail-first-N": "the first N requests answer 503",
}
_FAMILY = re.compile(r"(error|tokens|flaky|fail-first)-(\d{1,9})")


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers a request may set. `tps`: tokens per second; `ttft`: seconds to the first; `after`: events before the fault;
    `bytes`: size of the huge event; `tag`: nothing, but it keeps two tests' counts (flaky, fail-first) apart.
    """

    tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    tps: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    ttft: Annotated[float, Meta(ge=0, le=86400)] | None = None
    after: Annotated[int, Meta(ge=0)] = 3
    retry_after: Annotated[float, Meta(ge=0)] = 1
    bytes: Annotated[int, Meta(ge=1, le=67_108_864)] = 2_097_152
    tag: str = ""


class Behaviour(Struct, frozen=True):
    """What this answer will be like. `name` is how it was asked for, and what flaky and fail-first count by."""

    name: str
    traits: frozenset[str]
    options: Options
    status: int | None = None
    flaky: int | None = None
    fail_first: int | None = None

    def one_of(self, traits: Iterable[str]) -> str | None:
        """The first of these that was asked for."""
        return next((trait for trait in traits if trait in self.traits), None)


def read_behaviour(model: str, header: str | None) -> Behaviour:
    """Raises `Refusal`: 404 for an unknown sim/ model, 400 for an unknown header value or a bad option."""
    names, options = _from_model(model)
    more, header_options = _from_header(header or "")
    families = dict(_family(name) for name in (*names, *more) if _FAMILY.fullmatch(name))
    if "tokens" in families:
        options.setdefault("tokens", families["tokens"])
    return Behaviour(
        name=f"{model} {header or ''}",
        traits=frozenset(name for name in (*names, *more) if name in TRAITS),
        options=_options(options | header_options),
        status=families.get("error"),
        flaky=families.get("flaky"),
        fail_first=families.get("fail-first"),
    )


def _from_model(model: str) -> tuple[list[str], dict[str, str | int]]:
    if not model.startswith(PREFIX):
        return [], {}
    names, _, query = model.removeprefix(PREFIX).partition("?")
    listed = names.split("+")
    if not all(_known(name) for name in listed):
        raise refusals.no_such_model(model)
    return listed, dict(parse_qsl(query, keep_blank_values=True))


def _from_header(header: str) -> tuple[list[str], dict[str, str | int]]:
    words = [word.strip().removeprefix(PREFIX) for word in header.split(",") if word.strip()]
    names = [word for word in words if "=" not in word]
    for name in names:
        if not _known(name):
            raise refusals.invalid(f"Unknown x-sim-fault: '{name[:64]}'.", "x-sim-fault")
    return names, {name.strip(): value.strip() for name, _, value in (w.partition("=") for w in words if "=" in w)}


def _known(name: str) -> bool:
    family = _FAMILY.fullmatch(name)
    if family is None:
        return name in TRAITS
    kind, number = family[1], int(family[2])
    return 400 <= number <= 599 if kind == "error" else number >= (0 if kind == "tokens" else 1)


def _family(name: str) -> tuple[str, int]:
    kind, number = name.rsplit("-", 1)
    return kind, int(number)


def _options(named: dict[str, str | int]) -> Options:
    try:
        return msgspec.convert(named, Options, strict=False)
    except msgspec.ValidationError as error:
        raise refusals.invalid(f"Bad simulator option: {error}.", "model") from None
