"""The judge of a provider's bytes: the forms of an event stream, and waits that are dates."""

import json

import pytest

from simulation.client import data_of
from simulation.history import FORMS, Answer
from simulation.provider import BOM, Call, Making
from tests.simulation.judged import LINE, MARKER, REQUEST, STREAM, STREAMED, broken_by, denied

TWO = LINE.replace(', "choices"', ',\n"choices"')
LOST = {"answers_are_not_lost"}


@pytest.mark.parametrize(
    ("event", "data"),
    [
        ("data: one", "one"),
        ("data:one", "one"),
        ("data:  one", " one"),
        ("data: one\ndata:two", "one\ntwo"),
        ("event: chunk\ndata: one\nid: 3", "one"),
        ("data:", ""),
        (": data: one", None),
        ("datum: one", None),
    ],
)
def test_an_event_s_data_is_that_of_all_its_lines(event, data):
    assert data_of(event) == data


def lines_of(body):
    """Return the data of a stream's events, as a browser reads them (WHATWG HTML, 9.2.6)."""
    text = body.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    *events, rest = text.split("\n\n")
    assert rest == ""
    data = map(data_of, events)
    return [each for each in data if each is not None]


@pytest.mark.parametrize("form", ["", *FORMS])
def test_a_stream_says_the_same_in_every_form(form):
    body = {"model": "up-plain", "messages": [{"role": "user", "content": MARKER}], "stream": True}
    call = Call(MARKER, "one", 0, 0.0, Answer(words=3, comments=1, form=form), body, {}, lines=[])
    sent = b"".join(event.data for event in Making(call).events())
    assert lines_of(sent) == [*call.lines, "[DONE]"]
    assert [json.loads(line)["choices"][0]["delta"].get("content") for line in call.lines] == [
        " the",
        " river",
        " is",
        None,
    ]
    is_in = {"bom": sent.startswith(BOM), "bare": b"data: " not in sent, "crlf": b"\r\n" in sent}
    is_in |= {"cr": b"\r" in sent and b"\n" not in sent, "lines": any("\n" in line for line in call.lines)}
    assert {name for name, found in is_in.items() if found} == set(form.split("+")) - {""}


def sent_as(line, got):
    """Let the provider have sent an event with this data, and the client have got it in these bytes."""

    def change(case):
        case.call.lines = [line]
        case.sight.payload = STREAM.replace(f"data: {LINE}".encode(), got)
        case.sight.times = [(11.0, len(case.sight.payload))]

    return change


def in_two(prefix="data: "):
    return "\n".join(f"{prefix}{part}" for part in TWO.split("\n")).encode()


@pytest.mark.parametrize(
    ("line", "got", "broken"),
    [
        pytest.param(LINE, f"data:{LINE}".encode(), set(), id="without a space"),
        pytest.param(TWO, in_two(), set(), id="in two lines"),
        pytest.param(TWO, in_two("data:"), set(), id="in two lines without a space"),
        pytest.param(TWO, f"data: {LINE}".encode(), LOST, id="in one line instead of two"),
        pytest.param(LINE, b"\xef\xbb\xbf" + f"data: {LINE}".encode(), LOST, id="with a byte order mark"),
        pytest.param(TWO, in_two().split(b"\n")[0], LOST, id="without its second line"),
    ],
)
def test_an_event_is_passed_on_in_its_form(line, got, broken):
    assert broken_by(sent_as(line, got), STREAMED) & LOST == broken


def dated(wait_s, told_s, pause_s=0.0):
    """Let a provider have told a date so many seconds later, and the client have been told a wait."""

    def change(case):
        answer = Answer(status=429, error="limit", wait_s=7.0, dated=True, pause_s=pause_s)
        denied(answer, status=503, code="provider_not_available")(case)
        case.record.calls[-1].dated_wait_s = wait_s
        case.sight.headers |= {"retry-after": "7", "retry-after-ms": f"{told_s * 1000:g}"}
        case.sight.payload = case.sight.payload.replace(b'"retry_after_seconds": 1', b'"retry_after_seconds": 7')

    return change


@pytest.mark.parametrize(
    ("wait_s", "told_s", "pause_s", "is_right"),
    [
        (6.5, 6.5, 0.0, True),
        (6.5, 6.501, 0.0, True),
        (6.5, 6.502, 0.0, False),
        (6.5, 6.2, 0.0, True),
        (6.5, 6.199, 0.0, False),
        (6.9, 6.199, 0.5, True),
    ],
)
def test_a_wait_that_is_a_date_is_as_long_as_until_then(wait_s, told_s, pause_s, is_right):
    assert ("waits_are_told" not in broken_by(dated(wait_s, told_s, pause_s), REQUEST)) == is_right
