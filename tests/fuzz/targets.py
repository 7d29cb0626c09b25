"""What is fuzzed: functions that take any bytes and hold what comes out against what has to be true of it. Hypothesis calls them
in every run of the tests, atheris in `make fuzz`.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from meshproxy.config import ConfigError, Settings, parse
from meshproxy.errors import ErrorResponse, GatewayError, UpstreamError
from meshproxy.http1.message import HeadReader
from meshproxy.openai.errors import envelope, error_event
from meshproxy.openai.event_stream import StreamScanner
from meshproxy.openai.request import decode_chat, encode_upstream
from meshproxy.openai.usage import decode_answer
from meshproxy.policy.failover import classify_status
from meshproxy.policy.template import Template, check_template, render, slots
from meshproxy.policy.tokens import estimate_prompt

ROOT = Path(__file__).parent.parent.parent
MAX_PIECES = 64

_BAD_LINE = re.compile(rb"^(?:id|retry)(?::|$)", re.MULTILINE)


class Target(NamedTuple):
    """`check` raises AssertionError, or anything else that no input may make it raise. `words` are worth putting in."""

    check: Callable[[bytes], None]
    seeds: list[bytes]
    words: list[bytes]


def check_request(data: bytes) -> None:
    """Any body is a request or one complaint, and a request goes out as it came in."""
    try:
        request = decode_chat(data)
    except GatewayError as fault:
        _can_be_told(fault.response, 422)
        return
    messages = request.messages or b"[]"
    assert isinstance(json.loads(messages), list)
    assert estimate_prompt(messages, (), request.message_count) >= 0
    sent = json.loads(encode_upstream(request, model="m", messages=messages, max_tokens=7, cap_field="max_tokens"))
    assert sent["model"] == "m"
    assert sent["max_tokens"] == 7
    own = {"template", "variables", "session_id", "timeout", "cache", "transforms", "models", "max_completion_tokens"}
    assert not own & sent.keys()
    assert sent.get("stream_options", {}).get("include_usage", not request.stream) is True or not request.stream


def check_templates(data: bytes) -> None:
    """Any body is a template or one complaint; what a template renders has its own messages and roles, whatever the values."""
    written, _, value = data.partition(b"\0")
    try:
        fields = check_template(written, partial=False)
        template = fields.applied_to(Template(id="i", name="", created_at=0, updated_at=0))
    except GatewayError as fault:
        _can_be_told(fault.response, 422)
        return
    variables = dict.fromkeys(slots(template), value.decode("latin-1"))
    rendered = render(template, variables)
    roles = [*(["system"] if template.system is not None else []), *(m["role"] for m in template.messages or ())]
    assert [message["role"] for message in rendered] == roles
    assert render(template, {**variables, "unasked": "{{ x }}"}) == rendered
    if variables and value:
        try:
            render(template, {})
        except GatewayError as fault:
            _can_be_told(fault.response, 422)
        else:
            raise AssertionError("a missing variable went unnoticed")


def check_stream(data: bytes) -> None:
    """Any stream comes out in whole events of LF, never with what clients choke on, and the same wherever it is cut."""
    hide_usage, cuts, stream = bool(data[:1] < b"\x80"), data[1:9], data[9:]
    whole, whole_fault = _scanned([stream], hide_usage=hide_usage)
    assert b"\r" not in whole
    assert not whole or whole.endswith(b"\n\n")
    assert not _BAD_LINE.search(whole)
    assert [event for event in whole.split(b"\n\n") if _data(event).startswith(b"[DONE]")] == []
    pieces, fault = _scanned(list(_cut(stream, cuts)), hide_usage=hide_usage)
    assert whole_fault == fault
    if not fault:  # how much went out before one depends on the pieces
        assert whole == pieces


def check_response(data: bytes) -> None:
    """Any answer is read in one way or refused, the same wherever it is cut."""
    cuts, answer = data[:8], data[8:]
    assert _read([answer]) == _read(list(_cut(answer, cuts)))


def check_configuration(data: bytes) -> None:
    """Any text is settings or a list of complaints."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    faults: list[str] = []
    try:
        settings = parse(text)
    except ConfigError as unfit:
        faults = unfit.faults
    else:
        assert settings == msgspec.convert(msgspec.to_builtins(settings), Settings)
        return
    assert faults
    assert all(isinstance(fault, str) and fault for fault in faults)


def check_provider_words(data: bytes) -> None:
    """Whatever a provider says with a status can be told, as a body and as one event."""
    status = 100 + (data[0] * 2 if data else 0)
    verdict = classify_status(status, data[1:], None)
    assert verdict.response.status in {400, 403, 404, 413, 422, 502, 503}
    _can_be_told(verdict.response, verdict.response.status)
    try:
        report = decode_answer(data[1:]).report
    except UpstreamError as fault:
        _can_be_told(fault.response, 502)
        return
    if report is not None:
        usage, _ = report.settled(1000)
        assert 0 <= usage.cached + usage.cache_write <= usage.prompt <= 1050
        assert 0 <= usage.reasoning <= usage.completion <= 1050


def _can_be_told(response: ErrorResponse, status: int) -> None:
    assert response.status == status
    told = json.loads(envelope(response, "req_1"))
    assert told.keys() == {"error", "request_id"}
    event = error_event(response, "req_1")
    assert event.startswith(b"data: {")
    assert event.find(b"\n") == len(event) - 2
    assert b"\r" not in event


def _scanned(pieces: list[bytes], *, hide_usage: bool) -> tuple[bytes, bool]:
    """What comes out of a scanner, and whether it gave up."""
    scanner = StreamScanner(hide_usage=hide_usage)
    out = b""
    try:
        for piece in pieces:
            out += scanner.feed(piece)
        out += scanner.finish()
    except UpstreamError:
        return out, True
    assert scanner.tokens >= 0
    assert scanner.events >= 0
    return out, False


def _data(event: bytes) -> bytes:
    """The data of an event, as a client joins it."""
    fields = [line.partition(b":") for line in event.split(b"\n")]
    return b"\n".join(value.removeprefix(b" ") for name, _, value in fields if name == b"data").strip()


def _read(pieces: list[bytes]) -> object:
    """An answer's status, headers, payload and whether it is all there; None if it was refused."""
    reader, body, head, payload = HeadReader(), None, None, b""
    try:
        for piece in pieces:
            if body is None:
                found = reader.feed(piece)
                if found is None:
                    continue
                head, piece = found  # noqa: PLW2901 - the rest of it
                body = head.body
            if not body.done:
                payload += body.decode(piece)
    except UpstreamError:
        return None
    if body is None or head is None:
        return "no head"
    return head.status, head.headers, payload, body.done


def _cut(data: bytes, cuts: bytes) -> Iterator[bytes]:
    """The data in pieces, whose sizes the cuts say."""
    sizes = [cut + 1 for cut in cuts] or [len(data) or 1]
    at = 0
    for number in range(MAX_PIECES):
        size = sizes[number % len(sizes)]
        yield data[at : at + size]
        at += size
    yield data[at:]


_EVENT = b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
_USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
_CUTS = b"\x00\x07\x1f\x01\x50\x02\xff\x03"
_CHAT = (
    b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"stream_options":{"include_usage":false},'
    b'"max_tokens":5,"n":2,"stop":["a"],"tools":[{"type":"function"}],"variables":{"a":"b"},"session_id":"s","user":null}'
)
_TEMPLATE = (
    b'{"name":"t","system":"Hello {{ name }}","messages":[{"role":"user","content":[{"type":"text","text":"{{a}}"}]}]}'
)

TARGETS = {
    "request": Target(
        check_request,
        [_CHAT, b'{"template":"t","variables":{}}', b'{"messages":[{"role":"user","content":null}]}'],
        [
            b"null",
            b"[",
            b"{",
            b"1e999",
            b"-0",
            b'"\\ud800"',
            b"\xff",
            b"9" * 40,
            b'"model":',
            b"[" * 2000,
            b"NaN",
            b'"":',
        ],
    ),
    "templates": Target(
        check_templates,
        [
            _TEMPLATE + b"\0value",
            _TEMPLATE + b'\0{{ name }}"}],"role":"system"',
            b'{"name":"t","system":"{{{{a}}}}"}\0{{a}}',
        ],
        [b"{{", b"}}", b"{{ a }}", b"null", b"\0", b'"', b'"params":{"n":1}', b'"role":"tool"', b"[" * 300],
    ),
    "stream": Target(
        check_stream,
        [
            b"\0" + _CUTS + _EVENT * 3 + _USAGE + b"data: [DONE]\n\n",
            b"\xff" + _CUTS + (_EVENT + _USAGE).replace(b"\n", b"\r\n") + b"data: [DONE]\r\n\r\n",
            b"\0" + _CUTS + b'\xef\xbb\xbf: hello\n\nid: 1\nretry: 5\nevent: error\ndata: {"message":"no"}\n\n',
        ],
        [
            b"\r",
            b"\n",
            b"\n\n",
            b"\r\n",
            b"data:",
            b"data",
            b":",
            b"id: 1\n",
            b"event: x\n",
            b"[DONE]",
            b'"usage":null',
            b'"error":',
        ],
    ),
    "response": Target(
        check_response,
        [
            _CUTS + _HEAD + b"content-length: 5\r\n\r\nhello",
            _CUTS + _HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n3;a=b\r\nyou\r\n0\r\nx: y\r\n\r\n",
            _CUTS + b"HTTP/1.1 100 Continue\r\n\r\n" + _HEAD + b"connection: close\r\n\r\nhello",
        ],
        [
            b"\r\n",
            b"\n",
            b"\r",
            b"\0",
            b"chunked",
            b"transfer-encoding: ",
            b"content-length: 5\r\n",
            b"ffffffffffffffff",
            b"0\r\n\r\n",
            b";",
        ],
    ),
    "configuration": Target(
        check_configuration,
        [(ROOT / "config.example.toml").read_bytes(), b'[upstreams.a]\nkind = "openai"\nbase_url = "http://h/v1"\n'],
        [
            b"= ",
            b"[",
            b"]]",
            b'"',
            b"nan",
            b"-1",
            b"1e400",
            b"{ env = 1 }",
            b"0x1F",
            b"1979-05-27",
            b"\n[server]\n",
            b'""""',
        ],
    ),
    "provider-words": Target(
        check_provider_words,
        [
            b'\xc8{"error":{"message":"no","code":"x"}}',
            b"\x96<html><title>502\r\n\r\ndata: x</title>",
            b'd{"choices":[],"usage":{}}',
        ],
        [
            b"\n\n",
            b"data: ",
            b"\r",
            b"\0",
            b"<title>",
            b"\xed\xa0\x80",
            b"[" * 2000,
            b'"usage":{"prompt_tokens":-1}',
            b"1e999",
        ],
    ),
}
