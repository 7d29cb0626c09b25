"""Header values of requests and responses: credentials, ids, and what may pass to and from a provider."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

Headers = list[tuple[str, str]]

MAX_VALUE_CHARS: Final = 1024  # of a header value that is passed on
MAX_RESET_S: Final = 31_536_000.0

# The client's headers that go to a provider: OpenRouter's attribution, W3C trace context, OpenAI's beta switches.
FORWARDED: Final = ("http-referer", "x-title", "traceparent", "tracestate", "openai-beta")

# The provider's headers that go to a client. An allow-list, since providers may send any header (alt-svc,
# clear-site-data, ...). Hop-by-hop headers, cookies, request ids, rate limits and organisations are not on it.
RETURNED: Final = frozenset(
    {
        "content-encoding",
        "content-language",
        "content-type",
        "openai-model",
        "openai-processing-ms",
        "openai-version",
        "x-generation-id",
    }
)

# A provider's own request id, for its support: of OpenAI and most others, Anthropic, Azure, OpenRouter, Mistral and
# AWS.
REQUEST_IDS: Final = frozenset(
    {
        "apim-request-id",
        "mistral-correlation-id",
        "request-id",
        "x-amzn-requestid",
        "x-generation-id",
        "x-request-id",
    }
)

API_VERSIONS: Final = ("2026-08",)  # of Mesh's API, the newest last
VERSION_HEADER: Final = ("x-mesh-version", API_VERSIONS[-1])

# The headers that a page of another origin may read beside those that are always safe (Fetch Standard, 2.2.2).
EXPOSED: Final = (
    "x-request-id, retry-after, retry-after-ms, x-should-retry, idempotent-replayed, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, "
    "x-mesh-model, x-mesh-attempts, x-mesh-cost, x-mesh-max-tokens, x-mesh-version, "
    "x-resolved-model-id, x-mesh-routing-attempts, x-mesh-routing-fallback, x-mesh-routing-model"
)
ALLOWED_HEADERS: Final = "authorization, content-type, idempotency-key, x-request-id, x-mesh-version, x-meshapi-sdk"

# RFC 6750, section 2.1, with our own alphabet for the token.
_BEARER = re.compile(r"(?i:bearer) +(rsk_[A-Za-z0-9_-]{1,124})", re.ASCII)
# W3C Trace Context, section 3.2: version, trace id, parent id, flags. Ids of zeros alone are invalid.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_HEADER_LIST = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z, -]{1,1024}", re.ASCII)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)


def bearer(authorization: str | None) -> str | None:
    """Return the secret in `Bearer rsk_...`; None for anything else. The scheme's case is ignored (RFC 9110, 11.1)."""
    found = _BEARER.fullmatch(authorization or "")
    return found[1] if found else None


def valid_request_id(inbound: str | None) -> str | None:
    """Return a client's request id if it is valid, else None."""
    return inbound if inbound is not None and _REQUEST_ID.fullmatch(inbound) else None


def cors_headers(origin: str | None, allowed: Collection[str]) -> Headers:
    """Return the headers that let a page of `origin` read an answer, if it is allowed (Fetch Standard, 3.2).

    `allowed` lists origins; `*` allows any.
    """
    if origin is None or not allowed or not (origin in allowed or "*" in allowed):
        return []
    return [
        ("access-control-allow-origin", origin),
        ("access-control-expose-headers", EXPOSED),
        ("vary", "origin"),
    ]


def preflight_headers(requested: str | None) -> Headers:
    """Return the headers for a preflight request beside `cors_headers`. `requested`: the headers that the page would send."""
    headers = requested if requested is not None and _HEADER_LIST.fullmatch(requested) else ALLOWED_HEADERS
    return [
        ("access-control-allow-methods", "GET, HEAD, POST, PATCH, DELETE"),
        ("access-control-allow-headers", headers),
        ("access-control-max-age", "7200"),
    ]


def trace_id(traceparent: str | None) -> str | None:
    """Return the trace id of a W3C `traceparent`, 32 hex digits; None if it is missing or malformed."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent is not None else None
    return found[1] if found else None


def client_timeout_s(read_timeout: str | None) -> float:
    """Return the seconds that a client waits for an answer to begin; infinity if unknown.

    OpenAI's Python SDK sends its read timeout in `x-stainless-read-timeout`.
    """
    if read_timeout is None:
        return math.inf
    try:
        seconds = float(read_timeout)
    except ValueError:
        return math.inf
    return seconds if seconds > 0 else math.inf


def format_reset(seconds: float) -> str:
    """Format a wait as OpenAI does, rounded up: `120ms` below a second, `1s`, `6m0s`, `1h0m0s`; `0s` for none."""
    if not seconds > 0:
        return "0s"
    millis = -(-round(min(seconds, MAX_RESET_S) * 1_000_000) // 1000)
    if millis < 1000:
        return f"{millis}ms"
    minutes, rest = divmod(-(-millis // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def forwarded_headers(headers: Mapping[str, str]) -> Headers:
    """Return the client's headers that a provider may see. `headers` finds them by lower-case names."""
    return [(name, headers[name]) for name in FORWARDED if name in headers and _is_plain(headers[name])]


def upstream_request_id(headers: Iterable[tuple[str, str]]) -> str | None:
    """Return the provider's own request id from its response headers (lower-case names)."""
    for name, value in headers:
        if name in REQUEST_IDS and value:
            return value[:128]
    return None


def downstream_headers(headers: Iterable[tuple[str, str]], *, without: Iterable[tuple[str, str]] = ()) -> Headers:
    """Return the provider's headers (lower-case names) that the client may see, except those named in `without`."""
    ours = dict(without)
    shown: Headers = []
    hop_by_hop: set[str] = set()
    for name, value in headers:
        if name in RETURNED and name not in ours and _is_plain(value):
            shown.append((name, value))
        elif name == "connection" and value != "keep-alive":  # it names hop-by-hop headers: RFC 9110, section 7.6.1
            hop_by_hop.update(token.strip().lower() for token in value.split(","))
    return [header for header in shown if header[0] not in hop_by_hop] if hop_by_hop else shown


def _is_plain(value: str) -> bool:
    """Return whether a value is printable ASCII of bounded length, which can't end a header or begin another."""
    return len(value) <= MAX_VALUE_CHARS and value.isascii() and value.isprintable()
