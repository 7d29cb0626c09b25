import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.openai.events import as_stream, as_whole, begins_plainly, form_of

CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USED = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
MORE = {**USED, "completion_tokens": 5, "total_tokens": 12}
ZEROS = dict.fromkeys(USED, 0)


def stream(*events, end="data: [DONE]\n\n"):
    return ("".join(f"data: {json.dumps(event)}\n\n" for event in events) + end).encode()


def delta(index=0, finish_reason=None, **members):
    return {**CHUNK, "choices": [{"index": index, "delta": members, "finish_reason": finish_reason}]}


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [
        (b"", None),
        (b" \n", None),
        (b"\xef", None),
        (b"\xef\xbb", None),
        (b"\xef\xbb\xbf", None),
        (b"\xef{", "other"),
        (b"da", None),
        (b"data: {", "stream"),
        (b"\xef\xbb\xbfdata:", "stream"),
        (b": PROCESSING", "stream"),
        (b"event: x", "stream"),
        (b"\n\nretry: 1", "stream"),
        (b" {", "json"),
        (b"\xef\xbb\xbf{", "json"),
        (b"<html>", "other"),
        (b"database", "other"),
        (b"[1]", "other"),
    ],
)
def test_the_first_bytes_tell_the_form(beginning, expected):
    assert form_of(beginning) == expected


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [
        (b'data: {"choices":[]}\n\n', True),
        (b'data: {"choices":[]}\n\ndata: {"error":{}}\n\n', True),
        (b'data: {"choices":[]}\n', False),
        (b'data: {"error":{}}\n\n', False),
        (b'data: {"usage":{}}\n\n', False),
        (b': comment\n\ndata: {"choices":[]}\n\n', False),
        (b"data: [DONE]\n\n", False),
        (b'{"choices":[]}', False),
        (b"", False),
    ],
)
def test_a_stream_may_begin_with_a_whole_plain_event(beginning, expected):
    assert begins_plainly(beginning) == expected


def test_a_whole_answer_as_a_stream():
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "tide", "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    whole = {**CHUNK, "object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 3}}
    events = as_stream(json.dumps(whole).encode()).decode().removesuffix("\n\n").split("\n\n")
    streamed = {**message, "tool_calls": [{"index": 0, **call}]}
    first = {"index": 0, "finish_reason": "stop", "logprobs": None, "delta": streamed}
    assert [json.loads(event.removeprefix("data: ")) for event in events[:-1]] == [
        {**CHUNK, "choices": [first]},
        {**CHUNK, "choices": [], "usage": {"total_tokens": 3}},
    ]
    assert events[-1] == "data: [DONE]"


def test_a_stream_as_a_whole_answer():
    body = stream(
        delta(role="assistant", content=""),
        delta(reasoning_content="hm"),
        delta(content="high "),
        delta(content="tide"),
        delta(tool_calls=[{"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ":1}"}}]),
        delta(finish_reason="tool_calls"),
        {**CHUNK, "choices": [], "usage": {"total_tokens": 3}},
    )
    whole, error, is_complete, _, is_outdated = as_whole(body)
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    message = {"role": "assistant", "content": "high tide", "reasoning_content": "hm", "tool_calls": [call]}
    assert json.loads(whole) == {
        **CHUNK,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
        "usage": {"total_tokens": 3},
    }
    assert (error, is_complete, is_outdated) == (None, True, False)


@pytest.mark.parametrize(
    ("events", "usage", "is_outdated"),
    [
        ([delta(content="a"), {"usage": USED}, {"usage": ZEROS}], USED, False),
        ([{"usage": USED}, delta(content="a"), {"usage": MORE}], MORE, False),
        ([delta(content="a"), {"usage": USED}, delta(content="b")], USED, True),
        ([delta(content="a"), {"usage": USED}, delta(reasoning="b"), {"usage": ZEROS}], USED, True),
        ([delta(content="a"), {"usage": USED}, delta(finish_reason="stop")], USED, False),
        ([delta(content="a"), {"x_groq": {"usage": USED}}, {"usage": ZEROS}], USED, False),
    ],
)
def test_a_whole_answer_has_the_last_report_that_counts(events, usage, is_outdated):
    whole = as_whole(stream(*events))
    assert (whole.report.settled(1000)[0].total, whole.is_outdated) == (usage["total_tokens"], is_outdated)


def test_zeros_of_a_later_event_replace_no_number_in_the_answer():
    whole = as_whole(stream(delta(content="a"), {"usage": USED}, {"usage": ZEROS}))
    assert json.loads(whole.body)["usage"] == USED


def test_choices_side_by_side():
    body = stream(delta(1, content="b"), delta(0, content="a"), delta(1, "stop"), delta(0, "stop"))
    choices = json.loads(as_whole(body)[0])["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [(0, "a"), (1, "b")]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends(line_end):
    body = stream(delta(content="a"), delta(content="b")).replace(b"\n", line_end.encode())
    assert json.loads(as_whole(body)[0])["choices"][0]["message"]["content"] == "ab"


def test_a_stream_that_broke_off_is_not_whole():
    assert not as_whole(stream(delta(content="a"), end="")).is_complete


@pytest.mark.parametrize(
    "event",
    [b'data: {"error":{"message":"no"}}', b"event: error\ndata: no", b'event: error\ndata: {"message":"no"}'],
)
def test_a_stream_with_an_error_in_it(event):
    body = stream(delta(content="a"), end="") + event + b"\n\n" + stream(delta(finish_reason="stop"))
    assert as_whole(body).error == {"message": "no"}


@given(st.binary(max_size=300))
def test_any_bytes(body):
    as_whole(body)
    as_stream(body)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_any_deltas(value):
    as_whole(stream({**CHUNK, "choices": value}, {**CHUNK, "choices": [{"delta": value}, {"delta": {"a": value}}]}))
    as_whole(stream(*[{**CHUNK, "choices": [{"delta": {"a": value}, "logprobs": value}]}] * 2))


def test_many_deltas_take_a_time_that_is_linear():
    whole = as_whole(stream(*[delta(content="x" * 10)] * 20_000))
    assert len(json.loads(whole.body)["choices"][0]["message"]["content"]) == 200_000
