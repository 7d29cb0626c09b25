"""Every stream is fed whole, in two parts split at every offset, and byte by byte: output and findings are the same."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshproxy.errors import UpstreamError, upstream_error
from meshproxy.openai.event_stream import DONE, MAX_PLAIN_BYTES, PING, StreamScanner
from meshproxy.openai.output import text_tokens
from meshproxy.openai.usage import Usage

HELLO = b'data: {"model":"gpt-4o","choices":[{"index":0,"delta":{"content":"Hello"},"finish_reason":null}]}\n\n'
WORLD = b'data: {"model":"gpt-4o","choices":[{"index":0,"delta":{"content":" world"},"finish_reason":null}]}\n\n'
STOP = b'data: {"model":"gpt-4o","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"model":"gpt-4o-2024","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}\n\n'
NOTHING = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":0}}\n\n'
HELLO_AND_USAGE = HELLO.replace(b'"model"', b'"usage":{"prompt_tokens":9,"completion_tokens":1},"model"')
FAILED = b'data: {"error":{"message":"Overloaded","code":529}}\n\n'
REPORTED = Usage(prompt=9, completion=2)


def seen(scanner: StreamScanner) -> dict[str, Any]:
    return {
        "events": scanner.events,
        "tokens": scanner.tokens,
        "usage": scanner.report and scanner.report.settled(1000)[0],
        "model": scanner.reported_model,
        "done": scanner.done,
        "outdated": scanner.outdated,
        "error": scanner.error,
        "complete": scanner.complete,
    }


def run(parts: list[bytes], *, hide_usage: bool = True) -> tuple[bytes, dict[str, Any]]:
    scanner = StreamScanner(hide_usage=hide_usage)
    out = b"".join([scanner.feed(part) for part in parts]) + scanner.finish()
    return out, seen(scanner)


def everywhere(stream: bytes, *, hide_usage: bool = True) -> tuple[bytes, dict[str, Any]]:
    """Output and findings of a stream, after seeing that they are the same however it is cut."""
    whole = run([stream], hide_usage=hide_usage)
    for offset in range(len(stream) + 1):
        assert run([stream[:offset], stream[offset:]], hide_usage=hide_usage) == whole
    assert run([part for byte in stream for part in (bytes([byte]), b"")], hide_usage=hide_usage) == whole
    return whole


def output(stream: bytes, *, hide_usage: bool = True) -> bytes:
    return everywhere(stream, hide_usage=hide_usage)[0]


def findings(stream: bytes, *, hide_usage: bool = True) -> dict[str, Any]:
    return everywhere(stream, hide_usage=hide_usage)[1]


class TestWhatGoesOut:
    def test_a_stream_of_openai_s(self):
        out, found = everywhere(HELLO + WORLD + STOP + USAGE + DONE)
        assert out == HELLO + WORLD + STOP
        assert found == {
            "events": 4,
            "tokens": 2,
            "usage": REPORTED,
            "model": "gpt-4o-2024",
            "done": True,
            "outdated": False,
            "error": None,
            "complete": True,
        }

    @pytest.mark.parametrize("payload", [HELLO, HELLO + WORLD, HELLO + PING + WORLD, PING, HELLO + USAGE])
    def test_whole_events_go_out_as_the_very_bytes_object(self, payload: bytes):
        scanner = StreamScanner(hide_usage=False)
        assert payload is scanner.feed(payload)
        assert payload is scanner.feed(payload)

    def test_an_event_goes_out_with_its_last_byte(self):
        scanner = StreamScanner(hide_usage=True)
        assert [scanner.feed(bytes([byte])) for byte in HELLO] == [b""] * (len(HELLO) - 1) + [HELLO]

    def test_the_whole_part_of_a_payload_goes_out_at_once(self):
        scanner = StreamScanner(hide_usage=True)
        assert scanner.feed(HELLO + WORLD[:20]) == HELLO
        assert scanner.feed(WORLD[20:]) == WORLD

    def test_after_a_split_event_the_bytes_object_is_kept_again(self):
        scanner = StreamScanner(hide_usage=True)
        scanner.feed(HELLO[:20])
        scanner.feed(HELLO[20:])
        assert WORLD is scanner.feed(WORLD)

    @pytest.mark.parametrize(
        ("stream", "expected"),
        [
            (b"", b""),
            (b"\n\n\n", b""),
            (b"data: {}\n\n\n\n", b"data: {}\n\n"),
            (b"\ndata: {}\n\n", b"data: {}\n\n"),
            (b"\n\ndata: {}\n\n", b"data: {}\n\n"),
            (b"data:{}\n\n", b"data:{}\n\n"),
            (b"data: {\ndata: }\n\n", b"data: {\ndata: }\n\n"),
            (b"data: not JSON\n\n", b"data: not JSON\n\n"),
            (b": comment\n\n", b": comment\n\n"),
            (b":\n\n", b":\n\n"),
            (b": a\ndata: {}\n: b\n\n", b": a\ndata: {}\n: b\n\n"),
            (b"id: 1\ndata: {}\nretry: 5\n\n", b"data: {}\n\n"),
            (b"id\ndata: {}\n\n", b"data: {}\n\n"),
            (b"id: 1\n\n", b""),
            (b"retry: 5\n\n", b""),
            (b"event: ping\n\n", b""),
            (b"event: ping\n: comment\n\n", b": comment\n\n"),
            (b"event: delta\ndata: {}\n\n", b"event: delta\ndata: {}\n\n"),
            (b"data: {}\nevent: delta\n\n", b"data: {}\nevent: delta\n\n"),
            (b"event: ping\ndata:\n\n", b""),
            (b"data\n\n", b""),
            (b"data:  \n\n", b""),
            (b"what: {}\n\n", b""),
            (b" data: {}\n\n", b""),
            (b"\xef\xbb\xbfdata: {}\n\n", b"data: {}\n\n"),
            (b"\xef\xbb\xbf: c\n\ndata: {}\n\n", b": c\n\ndata: {}\n\n"),
            (b": c\n\n\xef\xbb\xbfdata: {}\n\n", b": c\n\n"),
            (b"\xef\xbb\xbf", b""),
            (b"\xef\xbbdata: {}\n\n", b""),
            (b"data: {}\n\n\xef\xbb\xbfdata: {}\n\n", b"data: {}\n\n"),
        ],
    )
    def test_lines(self, stream: bytes, expected: bytes):
        assert output(stream) == expected

    @pytest.mark.parametrize("end", [b"\r\n", b"\r"])
    def test_line_ends_become_lf(self, end: bytes):
        stream = b": c\n\nevent: delta\n" + HELLO + STOP
        assert stream == output((stream + DONE).replace(b"\n", end))

    def test_mixed_line_ends(self):
        assert output(b"data: {}\r\n\ndata: {}\n\r\ndata: {}\r\r\n\r\ndata: {}\n\r") == b"data: {}\n\n" * 4

    @pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r", b"\r\r", b"\n\r"])
    def test_nothing_waits_for_an_lf_after_cr(self, end: bytes):
        scanner = StreamScanner(hide_usage=True)
        assert scanner.feed(b"data: {}" + end) == b"data: {}\n\n"
        assert scanner.feed(b"\ndata: {}" + end) == b"data: {}\n\n"

    def test_cr_inside_a_line_of_data(self):
        assert output(b'data: {"a":1,\rdata: "b":2}\n\n') == b'data: {"a":1,\ndata: "b":2}\n\n'


class TestUsage:
    def test_usage_only_goes_to_whoever_asked(self):
        assert output(HELLO + USAGE, hide_usage=False) == HELLO + USAGE
        assert output(HELLO + USAGE, hide_usage=True) == HELLO

    @pytest.mark.parametrize("end", [b"\n", b"\r\n"])
    def test_usage_beside_content_is_left_there(self, end: bytes):
        event = b'data: {"model":"m","choices":[{"delta":{}}],"usage":{"prompt_tokens":9,"completion_tokens":2}}\n\n'
        out, found = everywhere(event.replace(b"\n", end))
        assert (out, found["usage"], found["model"]) == (event, REPORTED, "m")

    @pytest.mark.parametrize("null", [b'"usage":null', b'"usage": null'])
    def test_null_usage_on_every_event_costs_nothing(self, null: bytes):
        event = HELLO.replace(b'"choices"', null + b',"choices"')
        scanner = StreamScanner(hide_usage=True)
        assert event is scanner.feed(event)
        assert scanner.report is None

    def test_a_null_of_the_same_name_hides_no_usage(self):
        event = USAGE.replace(b'"choices"', b'"x":{"usage":null},"choices"').replace(b"}}", b'},"y":{"usage":null}}')
        assert (output(event), findings(event)["usage"]) == (b"", REPORTED)

    def test_null_usage_beside_another_is_no_usage(self):
        event = b'data: {"choices":[],"x":{"usage":{}},"usage":null}\n\n'
        assert (output(event), findings(event)["usage"]) == (event, None)

    def test_the_model_that_usage_came_with_is_the_model(self):
        unnamed = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3}}\n\n'
        found = findings(HELLO + USAGE + unnamed)
        assert (found["usage"], found["model"]) == (Usage(9, 3), "gpt-4o-2024")

    def test_text_about_usage_is_no_usage(self):
        event = b'data: {"choices":[{"delta":{"content":"\\"usage\\": {\\"error\\""}}]}\n\n'
        assert (output(event), findings(event)["usage"]) == (event, None)

    def test_the_last_usage_that_can_be_true_counts(self):
        events = [
            b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":%d}}\n\n' % n for n in (1, 2, -3)
        ]
        assert findings(b"".join(events))["usage"] == REPORTED

    def test_usage_that_can_t_be_true_is_held_back_too(self):
        event = b'data: {"choices":[],"usage":{"prompt_tokens":-1,"completion_tokens":0}}\n\n'
        assert (output(event), findings(event)["usage"]) == (b"", Usage())

    def test_an_event_without_choices_or_usage_passes(self):
        event = b'data: {"choices":[],"prompt_filter_results":[],"usage":null}\n\n'
        assert event == output(event)

    def test_broken_json_passes_as_it_is(self):
        event = b'data: {"usage": {,"error"}\n\n'
        assert event == output(event)

    @pytest.mark.parametrize(
        ("events", "expected"),
        [
            ([HELLO, USAGE], False),
            ([USAGE, HELLO], True),
            ([HELLO, USAGE, STOP], False),
            ([HELLO, USAGE, WORLD, USAGE], False),
            ([HELLO, USAGE, NOTHING], False),
            ([NOTHING, HELLO], True),
            ([HELLO_AND_USAGE], False),
            ([HELLO_AND_USAGE, WORLD], True),
            ([HELLO, WORLD], False),
        ],
    )
    def test_a_report_before_the_last_text_is_outdated(self, events: list[bytes], expected: bool):
        assert findings(b"".join(events))["outdated"] is expected

    def test_counting_makes_no_report_outdated(self):
        scanner = StreamScanner(hide_usage=True)
        scanner.feed(HELLO * 9 + USAGE)
        assert (scanner.tokens, scanner.outdated) == (9, False)
        scanner.feed(HELLO)
        assert (scanner.tokens, scanner.outdated) == (10, True)


class TestErrors:
    @pytest.mark.parametrize(
        ("event", "expected"),
        [
            (FAILED, {"message": "Overloaded", "code": 529}),
            (b'data: {"error":"Overloaded"}\n\n', {"message": "Overloaded"}),
            (b'data: {"choices":[{"finish_reason":"error"}],"error":{"code":1}}\n\n', {"code": 1}),
            (b'data: {"object":"error","message":"x"}\n\n', {"object": "error", "message": "x"}),
            (b'event: error\ndata: {"message":"x"}\n\n', {"message": "x"}),
            (b'event: error\ndata: {"error":{"code":1}}\n\n', {"code": 1}),
            (b"event: error\ndata: went wrong\n\n", {"message": "went wrong"}),
            (b"event: error\ndata: {}\n\n", {"message": "{}"}),
            (b"event: error\ndata: went\ndata:  wrong\n\n", {"message": "went\n wrong"}),
            (b"event: error\ndata: \xff\n\n", {"message": "\ufffd"}),
        ],
    )
    def test_an_error_and_what_follows_stay_here(self, event: bytes, expected: dict[str, Any]):
        out, found = everywhere(HELLO + event + WORLD + DONE)
        assert (out, found["error"], found["done"], found["events"]) == (HELLO, expected, False, 2)

    @pytest.mark.parametrize("value", [b"null", b'""', b"{}", b"false"])
    def test_no_error(self, value: bytes):
        event = HELLO.replace(b'"choices"', b'"error":' + value + b',"choices"')
        assert (output(event), findings(event)["error"]) == (event, None)

    def test_usage_of_an_error_event_counts(self):
        event = b'data: {"error":{"code":1},"usage":{"prompt_tokens":9,"completion_tokens":2}}\n\n'
        assert findings(event)["usage"] == REPORTED


class TestTheEnd:
    @pytest.mark.parametrize(
        "done",
        [
            b"data: [DONE]\n\n",
            b"data:[DONE]\n\n",
            b"data: [DONE] \n\n",
            b"data: [DONE], bye\n\n",
            b": c\ndata: [DONE]\n\n",
        ],
    )
    def test_done_is_swallowed_and_the_rest_dropped(self, done: bytes):
        out, found = everywhere(HELLO + done + WORLD + USAGE)
        assert (out, found["done"], found["complete"], found["events"], found["usage"]) == (HELLO, True, True, 1, None)

    def test_the_blank_line_may_be_missing(self):
        assert output(HELLO + STOP[:-2]) == HELLO + STOP
        assert output(HELLO + STOP[:-1]) == HELLO + STOP
        assert findings(HELLO + b"data: [DONE]")["done"]
        assert findings(HELLO + b"data: [DONE], bye")["done"]
        assert findings(HELLO + USAGE[:-2])["usage"] == REPORTED

    @pytest.mark.parametrize("rest", [STOP[:-5], b"data: {", b": comment", b"event: x", b"da", b"data: text"])
    def test_a_cut_event_is_dropped(self, rest: bytes):
        assert output(HELLO + rest) == HELLO

    @pytest.mark.parametrize(
        ("stream", "expected"),
        [
            (HELLO, False),
            (HELLO + STOP, True),
            (HELLO + STOP.replace(b'":"stop', b'" : "stop'), True),
            (HELLO + STOP.replace(b'"finish', b'"native_finish'), False),
            (HELLO + STOP + USAGE, True),
            (HELLO + DONE, True),
            (HELLO + STOP[:-8], False),
            (HELLO + b"event: x\n" + STOP, True),
            (HELLO + STOP + HELLO * 3, True),
            (STOP + HELLO * 4, True),
            (HELLO + STOP.replace(b'":"stop', b'":"'), False),
        ],
    )
    def test_complete(self, stream: bytes, expected: bool):
        assert run([stream])[1]["complete"] is expected

    @pytest.mark.parametrize(
        ("indexes", "expected"), [([], 0), ([0], 1), ([0, 0, 0], 1), ([0, 1], 2), ([2, 0, 1, 1], 3), (range(200), 128)]
    )
    def test_the_choices_that_have_ended_are_counted(self, indexes: Sequence[int], expected: int):
        ends = [STOP.replace(b'"index":0', b'"index":%d' % index) for index in indexes]
        for payloads in (ends, [HELLO + b"".join(ends) + HELLO]):
            scanner = StreamScanner(hide_usage=True)
            for payload in payloads:
                scanner.feed(payload)
            assert scanner.ended_choices == expected

    def test_a_large_last_event_is_looked_at_too(self):
        event = STOP.replace(b'"delta":{}', b'"delta":{"content":"' + b"x" * MAX_PLAIN_BYTES + b'"}')
        assert run([event])[1]["complete"]
        assert not run([event.replace(b'"stop"', b"null")])[1]["complete"]

    def test_two_choices_in_an_event_hide_no_finish_of_another(self):
        two = HELLO[:-4] + b"," + HELLO[HELLO.index(b"[") + 1 :]
        assert two.count(b'"finish_reason":null') == 2
        assert run([two + STOP])[1]["complete"]
        assert not run([two + HELLO])[1]["complete"]

    def test_nothing_is_left_after_the_end(self):
        scanner = StreamScanner(hide_usage=True)
        scanner.feed(STOP[:-1])
        assert (scanner.finish(), scanner.finish()) == (STOP, b"")

    def test_the_model_of_a_stream_without_usage(self):
        assert findings(HELLO + HELLO.replace(b"gpt-4o", b"gpt-4o-mini"))["model"] == "gpt-4o"
        assert findings(b"data: x\n\n")["model"] is None


TIERED = HELLO.replace(b'"model"', b'"service_tier":"flex","model"')
UNTIERED = HELLO.replace(b'"model"', b'"service_tier":null,"model"')


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (HELLO + WORLD, None),
        (TIERED, "flex"),
        (UNTIERED + HELLO + TIERED, "flex"),
        (HELLO + TIERED + TIERED.replace(b"flex", b"default") + STOP, "flex"),
        (HELLO.replace(b"Hello", rb"a \"service_tier\":\"flex\"") + WORLD, None),
        (USAGE.replace(b'"model"', b'"service_tier":"flex","model"'), "flex"),
    ],
)
def test_the_first_service_tier_that_is_named(stream: bytes, expected: str | None):
    for offset in range(len(stream)):
        scanner = StreamScanner(hide_usage=True, reads_tier=True)
        scanner.feed(stream[:offset])
        scanner.feed(stream[offset:])
        assert scanner.service_tier == expected


def chunk(delta: Any, **members: Any) -> bytes:
    """An event with this delta, and with more members beside `choices` or, by the name `choice`, in its choice."""
    choice = {"index": 0, "delta": delta, "finish_reason": None, **members.pop("choice", {})}
    return b"data: " + json.dumps({"id": "c", "model": "m", "choices": [choice], **members}).encode() + b"\n\n"


def content(*texts: str, **members: Any) -> list[bytes]:
    return [chunk({"content": text}, **members) for text in texts]


WORDS = (" the", " river", " is", " old", ",", " and", " nobody", " knows", " its", " age")
LOGPROBS = {
    "choice": {"logprobs": {"content": [{"token": " w", "logprob": -0.3, "bytes": [32], "top_logprobs": []}] * 20}}
}
FILTERED = {"choice": {"content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}}}
SENTENCE = (
    " In spring the river rises over the lower meadow, and the farmers move their fences to the road."  # 20 tokens
)
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": ""}}


def arguments(text: str) -> bytes:
    return chunk({"tool_calls": [{"index": 0, "function": {"arguments": text}}]})


class TestTokens:
    @pytest.mark.parametrize(
        ("events", "low", "high"),
        [
            pytest.param(content(*WORDS * 3), 30, 30, id="words"),
            pytest.param([chunk({"role": "assistant", "content": ""}), *content(*WORDS)], 10, 10, id="role event"),
            pytest.param(content(*WORDS, **FILTERED), 10, 10, id="Azure's filter results"),
            pytest.param(content(*WORDS, **LOGPROBS), 10, 10, id="logprobs"),
            pytest.param(
                [chunk({"content": word}, obfuscation="x" * (at % 7)) for at, word in enumerate(WORDS)],
                10,
                10,
                id="padding",
            ),
            pytest.param(
                [
                    chunk(
                        {"content": word},
                        choice={"message": {"content": "".join(WORDS[: at + 1])}},
                        citations=["u" * 99],
                    )
                    for at, word in enumerate(WORDS)
                ],
                *(10, 10),
                id="Perplexity's cumulative message",
            ),
            pytest.param(
                [
                    chunk(
                        {
                            "content": "",
                            "reasoning": word,
                            "reasoning_details": [{"type": "reasoning.text", "text": word}],
                        }
                    )
                    for word in WORDS
                ],
                *(10, 10),
                id="OpenRouter's reasoning_details",
            ),
            pytest.param(
                [chunk({"reasoning_content": word, "reasoning": word}) for word in WORDS], 10, 10, id="both names"
            ),
            *(
                pytest.param(
                    [
                        chunk({"content": "", "reasoning_details": [{"type": kind, member: word, "data": "g" * 99}]})
                        for word in WORDS
                    ],
                    *(10, 10),
                    id=f"details alone: {kind}",
                )
                for kind, member in (("reasoning.text", "text"), ("reasoning.summary", "summary"))
            ),
            pytest.param([chunk({"thinking": word}) for word in WORDS], 10, 10, id="thinking"),
            pytest.param([chunk({}, choice={"text": word}) for word in WORDS], 10, 10, id="text"),
            pytest.param([chunk({"content": word}, choice={"text": word}) for word in WORDS], 10, 10, id="text beside"),
            pytest.param(
                [chunk({}, choice={"message": {"content": "".join(WORDS[: at + 1])}}) for at in range(10)],
                *(10, 10),
                id="cumulative message alone",
            ),
            pytest.param([chunk({}, choice={"message": {"content": SENTENCE}})], 18, 24, id="whole message alone"),
            pytest.param(
                [*content(*WORDS), chunk({"content": ""}, choice={"message": {"content": SENTENCE}})],
                *(10, 10),
                id="whole message at the end",
            ),
            pytest.param([chunk({"refusal": word}) for word in WORDS], 10, 10, id="refusal"),
            pytest.param(
                [
                    chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": word}]}]})
                    for word in WORDS
                ],
                *(10, 10),
                id="Mistral's parts",
            ),
            pytest.param(
                [chunk({"tool_calls": [CALL]}), *map(arguments, ('{"', "place", '":"', "x", '"}'))], 6, 8, id="tool"
            ),
            pytest.param(
                [chunk({"function_call": {"name": "f", "arguments": word}}) for word in WORDS], 10, 20, id="function"
            ),
            pytest.param(
                [chunk({"tool_calls": [{**CALL, "extra_content": {"google": {"thought_signature": "Cq1Z" * 1000}}}]})],
                *(1, 3),
                id="Gemini's thought signature",
            ),
            pytest.param([chunk({"images": [{"image_url": {"url": "iVBORw0K" * 9999}}]})], 0, 0, id="image"),
            pytest.param(content(SENTENCE * 100), 1700, 2500, id="all in one event"),
            pytest.param(content(*[SENTENCE] * 80), 1400, 2000, id="equal events"),
            pytest.param(content(*SENTENCE * 10), 180, 260, id="a character an event"),
            pytest.param(content(*["春天的河水", "漫过低处的草地，"] * 10), 100, 180, id="Chinese"),
            pytest.param(content(*[" река"] * 10), 10, 10, id="escaped Cyrillic"),
            pytest.param(content(*['say "', "yes", '"\n', "or", "\\"] * 4), 20, 20, id="quotes"),
            pytest.param([event.replace(b'": ', b'":') for event in content(*WORDS)], 10, 10, id="without spaces"),
        ],
    )
    def test_what_the_deltas_say_is_counted(self, events: list[bytes], low: int, high: int):
        assert low <= run(events)[1]["tokens"] <= high
        assert run(events) == run([b"".join(events)])

    def test_a_choice_of_an_event_is_a_piece(self):
        event = b'data: {"choices":[{"delta":{"content":" a"}},{"delta":{"content":" b"}}]}\n\n'
        assert findings(event * 5)["tokens"] == 10

    @pytest.mark.parametrize(("audio_format", "expected"), [("pcm16", 100), (None, 100), ("wav", 100), ("mp3", 300)])
    def test_audio_counts_by_its_duration(self, audio_format: str | None, expected: int):
        scanner = StreamScanner(hide_usage=True, audio_format=audio_format)
        for _ in range(25):
            scanner.feed(chunk({"audio": {"id": "a", "data": "A" * 12_800}}))
        assert scanner.tokens == scanner.audio_tokens == expected

    @pytest.mark.parametrize("chars", [64, 400, 1281, 6400])
    def test_audio_in_small_events_counts_as_in_large_ones(self, chars: int):
        scanner = StreamScanner(hide_usage=True, audio_format="pcm16")
        for _ in range(320_000 // chars):
            scanner.feed(chunk({"audio": {"id": "a", "data": "A" * chars}}))
        assert 99 <= scanner.tokens == scanner.audio_tokens <= 100

    @pytest.mark.parametrize("junk", [b'"logprob":NaN', b'"x":"\\ud83d"'])
    def test_text_beside_what_is_no_json_counts(self, junk: bytes):
        event = HELLO.replace(b'"index":0', b'"index":0,' + junk)
        assert (output(event * 3), findings(event * 3)["tokens"]) == (event * 3, 3)

    def test_half_an_emoji_counts(self):
        assert findings(HELLO.replace(b"Hello", b"\\ud83d"))["tokens"] == 1

    def test_comments_and_usage_are_no_tokens(self):
        for hide_usage in (True, False):
            found = findings(HELLO + PING + USAGE, hide_usage=hide_usage)
            assert (found["tokens"], found["events"]) == (1, 2)

    def test_nothing_is_counted_before_somebody_asks(self):
        scanner = StreamScanner(hide_usage=True)
        for _ in range(3):
            scanner.feed(HELLO)
        assert scanner.most == 15
        assert (scanner.tokens, scanner.most) == (3, 3)

    def test_asking_on_the_way_changes_little(self):
        scanner = StreamScanner(hide_usage=True)
        asked = [scanner.tokens for word in WORDS if scanner.feed(content(word)[0])]
        assert asked == list(range(1, 11))

    def test_a_long_text_is_sampled(self):
        assert 0.9 < text_tokens(SENTENCE * 5000) / (text_tokens(SENTENCE) * 5000) < 1.1


@given(
    st.lists(st.sampled_from([*WORDS, SENTENCE, "", '"', "\\", "\n", "é", "春", "🚀", "x" * 50]), max_size=60),
    st.integers(1, 9),
)
def test_bursts_count_as_events_alone(texts: list[str], width: int):
    events = content(*texts)
    bursts = [b"".join(events[at : at + width]) for at in range(0, len(events), width)]
    assert run(events) == run(bursts)


LIMIT = 200_000


class TestBounds:
    LARGEST = b'data: {"x":"' + b"y" * (LIMIT - 16) + b'"}\n\n'

    @pytest.mark.parametrize("head", [b"", HELLO])
    @pytest.mark.parametrize("cut", [0, 1, 1000, LIMIT - 1])
    def test_the_largest_event(self, head: bytes, cut: int):
        assert head + self.LARGEST == run([head + self.LARGEST[:cut], self.LARGEST[cut:]])[0]

    @pytest.mark.parametrize("cut", [0, 1, 1000, LIMIT])
    def test_an_event_too_large_is_a_fault(self, cut: int):
        event = self.LARGEST.replace(b"y", b"yz", 1)
        scanner = StreamScanner(hide_usage=True, max_event_bytes=LIMIT)
        with pytest.raises(UpstreamError) as caught:
            [scanner.feed(part) for part in (event[:cut], event[cut:])]
        response = upstream_error(f"The provider sent an event of more than {LIMIT} bytes.", may_have_run=True)
        assert (caught.value.response, caught.value.safe_to_repeat) == (response, False)
        assert (scanner.feed(HELLO), scanner.finish()) == (b"", b"")

    @pytest.mark.parametrize("end", [b"", b"\n"])
    def test_an_event_that_never_ends_is_a_fault_before_it_does(self, end: bytes):
        scanner = StreamScanner(hide_usage=True, max_event_bytes=LIMIT)
        assert scanner.feed(self.LARGEST[:-2] + b"xx") == b""
        with pytest.raises(UpstreamError):
            scanner.feed(b"x" + end)

    def test_nothing_is_held_of_what_follows_an_error(self):
        scanner = StreamScanner(hide_usage=True, max_event_bytes=LIMIT)
        assert [scanner.feed(part) for part in (FAILED, *[b"x" * 500_000] * 3)] == [b""] * 4

    def test_a_large_event_in_one_byte_steps_takes_no_long_time(self):
        event = b'data: {"x":"' + b"y" * 200_000 + b'"}\n\n'
        assert event == run([bytes([byte]) for byte in event])[0]


def reference(stream: bytes) -> tuple[bytes, int, Usage | None, bool, Any]:
    """The scanner's contract, written as simply as can be, for streams that lack nothing at their end."""
    text = re.sub(rb"\r\n?", b"\n", stream).lstrip(b"\n").removeprefix(b"\xef\xbb\xbf")
    out, events, usage = [], 0, None
    for block in text.split(b"\n\n")[:-1]:
        lines = [line for line in block.split(b"\n") if re.match(rb"data(:|$)|event(:|$)|:", line)]
        values = [re.sub(rb"^data:? ?", b"", line) for line in lines if line.startswith(b"data")]
        data = b"\n".join(values).strip()
        if not data:
            lines = [line for line in lines if line.startswith(b":")]
        elif data.startswith(b"[DONE]"):
            return b"".join(out), events, usage, True, None
        else:
            events += 1
            try:
                value = json.loads(data)
            except ValueError:
                value = None
            if isinstance(value, dict) and value.get("error"):
                return b"".join(out), events, usage, False, value["error"]
            if isinstance(value, dict) and value.get("usage"):
                usage = Usage(prompt=value["usage"]["prompt_tokens"], completion=value["usage"]["completion_tokens"])
                lines = lines if value.get("choices") else []
        if lines:
            out.append(b"\n".join(lines) + b"\n\n")
    return b"".join(out), events, usage, False, None


PIECES = st.sampled_from(
    [
        *(b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b"\xef\xbb\xbf", b" ", b":", b"x"),
        *(b"data", b"data:", b"data: ", b": c", b"event: delta\n", b"id: 7\n", b"retry: 1\r\n", b"event:\r"),
        *(HELLO, WORLD, STOP, USAGE, FAILED, DONE, PING, HELLO[:-1], WORLD[:30], WORLD[30:], b"data: {}\n\n"),
        *(b'data: {"usage":null}\n\n', HELLO.replace(b"\n", b"\r\n"), USAGE.replace(b"\n", b"\r")),
    ]
)


@given(st.lists(PIECES, max_size=12), st.lists(st.integers(0, 600), max_size=8))
@example([HELLO, HELLO, b"data:", HELLO, HELLO], [len(HELLO)])  # a usual shape behind the beginning of a line
@example([HELLO, HELLO, b"\xef\xbb\xbf", HELLO], [len(HELLO)])
def test_any_stream_cut_anywhere_comes_out_as_the_reference_says(pieces: list[bytes], cuts: list[int]):
    stream = b"".join(pieces)
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    parts = [stream[start:end] for start, end in itertools.pairwise(edges)]
    scanner = StreamScanner(hide_usage=True, max_event_bytes=LIMIT)
    out = b"".join([scanner.feed(part) for part in parts])
    usage = scanner.report and scanner.report.settled(1000)[0]
    assert reference(stream) == (out, scanner.events, usage, scanner.done, scanner.error)
    assert run([stream]) == run(parts) == run([bytes([byte]) for byte in stream])


@given(st.lists(PIECES, max_size=12))
def test_pieces_are_the_parts_too(pieces: list[bytes]):
    assert run([b"".join(pieces)]) == run(pieces)


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes_come_out_as_whole_events_in_lf(parts: list[bytes]):
    out, found = run(parts)
    assert b"\r" not in out
    assert out == b"" or out.endswith(b"\n\n")
    assert run([b"".join(parts)]) == (out, found)
