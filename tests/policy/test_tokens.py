import base64
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.policy.tokens import TOKENS_PER_MEDIA, estimate_prompt, least_tokens, likely_tokens, message_bytes, weigh

PICTURE = base64.b64encode(bytes(range(256)) * 400).decode()  # 136,536 characters
DATA = "AAAA" * 1_000_000
HUGE = 8 * 1024 * 1024


def raw(*parts):
    return json.dumps([{"role": "user", "content": list(parts)}]).encode()


@pytest.mark.parametrize(
    ("messages", "others", "count", "expected"),
    [
        (b"[]", (), 0, 1),
        (b'[{"role":"user","content":"hi"}]', (), 1, 11 + 4),
        (b"x" * 300, (), 3, 100 + 12),
        (b"x" * 300, (b"y" * 30, b"z" * 300), 3, 210 + 12),
    ],
)
def test_a_token_per_three_bytes_and_four_a_message(messages, others, count, expected):
    assert estimate_prompt(messages, others, count) == expected


def test_where_there_is_no_media_all_is_text():
    assert estimate_prompt(b"x" * 300, (), 0, media=False) == 100


def test_escaped_text_is_counted_as_text():
    text = "Привет" * 100
    escaped, plain = json.dumps(text).encode(), json.dumps(text, ensure_ascii=False).encode()
    assert (estimate_prompt(escaped, (), 0), estimate_prompt(plain, (), 0)) == (601, 401)
    assert estimate_prompt(b"\\u0416" * 100 + b"x" * 600, (), 0) == 300


def test_escapes_of_much_text_are_found_by_samples():
    text = 'Он сказал: "Hello, world!"\n' * 3000
    escaped, plain = json.dumps(text).encode(), json.dumps(text, ensure_ascii=False).encode()
    letters = len(plain) - len(text) - text.count("\n") - text.count('"')  # two bytes each in UTF-8, six escaped
    exact = (len(escaped) - 3 * letters) / 3
    assert 0.95 < estimate_prompt(escaped, (), 0) / exact < 1.05


def test_an_escaped_backslash_begins_no_escape():
    nested = json.dumps(json.dumps("春天" * 50)).encode()
    assert estimate_prompt(nested, (), 0) == -(-len(nested) // 3)


@pytest.mark.parametrize("more", [b"", b"x"])
def test_what_looks_like_escapes_can_at_most_halve_the_estimate(more):
    assert estimate_prompt(b"\\u" * 1500 + more, (), 0) == 500


def url(kind, data):
    return {"type": kind, kind: {"url": data}}


@pytest.mark.parametrize(
    ("part", "least", "most"),
    [
        (url("image_url", f"data:image/png;base64,{DATA}"), 1700, 1800),
        (url("image_url", f"data:image/svg+xml;charset=utf-8;base64,{DATA}"), 1700, 1800),
        (url("image_url", f"DATA:image/PNG;BASE64,{DATA}"), 1700, 1800),
        ({"type": "image_url", "image_url": f"data:image/jpeg;base64,{DATA}"}, 1700, 1800),
        ({"type": "input_image", "image_url": f"data:image/webp;base64,{DATA}"}, 1700, 1800),
        (url("video_url", f"data:video/mp4;base64,{DATA}"), 10_000, 20_000),
        (url("audio_url", f"data:audio/wav;base64,{DATA}"), 5_000, 10_000),
        ({"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}}, 5_000, 10_000),
        ({"type": "file", "file": {"filename": "a.mp4", "file_data": f"data:video/mp4;base64,{DATA}"}}, 10_000, 20_000),
        ({"type": "file", "file": {"file_data": f"data:application/pdf;base64,{DATA}"}}, 240_000, 260_000),
        ({"type": "file", "file": {"file_data": DATA}}, 240_000, 260_000),
        (
            {"type": "file", "file": {"file_data": f"data:application/vnd.ms-excel.12;charset=utf-8;base64,{DATA}"}},
            240_000,
            260_000,
        ),
        ({"type": "file", "file": {"file_data": f"data:text/csv;base64,{DATA}"}}, 900_000, 1_100_000),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": DATA}},
            1700,
            1800,
        ),
        ({"type": "image", "source": {"data": "/9j/" + DATA}}, 1700, 1800),
        ({"type": "document", "source": {"media_type": "application/pdf", "data": DATA}}, 240_000, 260_000),
        ({"inline_data": {"mime_type": "video/mp4", "data": DATA}}, 10_000, 20_000),
        ({"inlineData": {"mimeType": "audio/mp3", "data": DATA}}, 5_000, 10_000),
        ({"type": "whatever", "pictures": [f"data:image/png;base64,{DATA}"] * 2}, 3400, 3500),
        ({"type": "whatever", "it": "iVBORw0KGgo" + DATA}, 1700, 1800),
        ({"type": "whatever", "it": "/9j/" + DATA}, 1700, 1800),
        ({"type": "whatever", "it": "UklGR" + DATA}, 5_000, 10_000),
        ({"type": "whatever", "it": "AAAAIGZ0eXBpc29t" + DATA}, 10_000, 20_000),
        ({"type": "whatever", "songs": [f"data:audio/wav;base64,{DATA}"] * 2}, 15_000, 16_500),
        ({"type": "document", "source": {"media_type": "text/plain", "data": DATA}}, 900_000, 1_100_000),
        (url("image_url", "https://a.example/b.png"), 1700, 1800),
        (url("video_url", "https://a.example/b.mp4"), 1700, 1800),
        (url("image_url", "data:image/png;base64,iVBORw0KGgo="), 1700, 1800),
        ({"type": "image", "source": {"type": "url", "url": "https://a.example/b.png"}}, 1700, 1800),
        ({"type": "file", "file": {"file_id": "file-1"}}, 1700, 1800),
    ],
)
def test_media_of_any_shape_counts_as_what_it_is_to_a_model(part, least, most):
    assert least <= estimate_prompt(raw(part), (), 1) <= most


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n", "\n:\t")])
def test_media_is_found_however_the_json_is_spaced(separators):
    part = url("image_url", f"data:image/png;base64,{PICTURE}")
    assert weigh(json.dumps([part], separators=separators).encode()).media_tokens == TOKENS_PER_MEDIA


def test_media_is_no_text_and_counts_once_whether_it_is_named_or_not():
    inline, named = url("image_url", f"data:image/png;base64,{PICTURE}"), url("image_url", "https://a.example/b.png")
    without = len(raw(inline)) - len(f"data:image/png;base64,{PICTURE}")
    assert weigh(raw(inline)) == (without, TOKENS_PER_MEDIA)
    assert weigh(raw(inline, named)).media_tokens == 2 * TOKENS_PER_MEDIA


def test_a_message_weighs_by_its_text_its_framing_and_its_media():
    message = {"role": "user", "content": [url("image_url", "https://a.example/b.png")]}
    assert message_bytes(message) == len(json.dumps(message, separators=(",", ":"))) + 1 + 3 * (TOKENS_PER_MEDIA + 4)


def test_each_of_very_many_pictures_counts():
    part = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
    assert weigh(raw(*[part] * 20_000)).media_tokens == 20_000 * TOKENS_PER_MEDIA


def test_slashes_may_be_escaped():
    part = raw(url("image_url", "data:image/jpeg;base64,/9j/" + PICTURE)).replace(b"/", b"\\/")
    assert weigh(part).media_tokens == TOKENS_PER_MEDIA


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": f"data:image/png;base64,{PICTURE}"},
        {"type": "text", "text": f'"url": "data:image/png;base64,{PICTURE}"'},
        {"type": "text", "text": f'"image_url":{{"url":"{PICTURE}"}}'},
        {"type": "text", "text": f':\\" {PICTURE}'},
        {"type": "text", "text": PICTURE},
        *(
            {"type": "whatever", key: PICTURE}
            for key in ("content", "reasoning", "reasoning_content", "thinking", "refusal")
        ),
        {"function": {"arguments": PICTURE}},
        {"whatever": "words and words " * 9000},
        {"whatever": "data:text/plain," + "x" * 140_000},
    ],
)
def test_text_cannot_pass_for_media(part):
    assert estimate_prompt(raw(part), (), 1) >= 136_000 // 3


def test_media_in_other_members_is_media_too():
    documents = json.dumps([{"kind": "scan", "bytes": f"data:image/png;base64,{PICTURE}"}]).encode()
    assert 1700 < estimate_prompt(b"[]", [documents], 0) < 1800


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" river" * 20_000, 20_000), ("Привет, мир! " * 1000, 2444), ("\\u0416" * 1000, 0)],
)
def test_what_a_prompt_has_at_least(text, expected):
    assert abs(least_tokens(b'"%b"' % text.encode()) - expected) <= 1


def test_media_has_no_least():
    assert least_tokens(raw(url("image_url", "https://a.example/b.png"))) == 0


@given(st.binary(max_size=5000), st.integers(0, 10))
def test_any_bytes_have_an_estimate(messages, count):
    assert estimate_prompt(messages, (), count) >= 4 * count


@pytest.mark.parametrize(
    "hostile",
    [
        b'"',
        b'{"a":"b"},',
        b'"source":',
        b'"input_audio":{"data":"x',
        b'"image_url""url":"data:a;;base64,',
        b':"' + b"A" * 1024 + b'",',
        b'"a"' + b" " * 100 + b':"' + b"A" * 1030 + b'"',
        b'"data:' + b"," * 1030,
        b"A",
        b" ",
        b"\\",
    ],
)
def test_hostile_bytes_are_weighed_in_linear_time(hostile):
    started = time.process_time()
    weigh(hostile * (HUGE // len(hostile)))
    assert time.process_time() - started < 2  # some 0.2 s on a slow machine


def said(*texts, ascii_only=False, spaced=False):
    separators = (", ", ": ") if spaced else (",", ":")
    messages = [{"role": "user", "content": text} for text in texts]
    return json.dumps(messages, ensure_ascii=ascii_only, separators=separators).encode()


ENGLISH = "The harbour was quiet that morning, and the boats lay still on the water. "  # 16 tokens
RUSSIAN = "Привет, как дела? "  # 5 tokens, and 1 between two of them


@pytest.mark.parametrize(
    ("messages", "count", "truth"),
    [
        (said("hi"), 1, 8),
        (said("hi", spaced=True), 1, 8),
        (said(*["hi"] * 100), 100, 503),
        (said(*["hi"] * 100, spaced=True), 100, 503),
        (said(" river" * 20_000), 1, 20_007),
        (said(ENGLISH * 500), 1, 8007),
        (said(RUSSIAN * 500), 1, 3007),
        (said(RUSSIAN * 500, ascii_only=True), 1, 3007),
        (said("\tif x:\n\t\ty\n" * 200), 1, 1207),
        (said("a\\b\\c\r\n" * 100), 1, 507),
        (said('say "yes" and "no"\n' * 100), 1, 807),
        (said("a" + "\n" * 40 + "b"), 1, 10),
    ],
)
def test_what_is_billed_without_a_report_is_near_the_truth(messages, count, truth):
    assert 0.7 <= likely_tokens(messages, (), count) / truth <= 1.5


CALL = {"id": "call_x7Qb2", "type": "function", "function": {"name": "look_up", "arguments": '{"river": "Ob"}'}}
QUESTION = {"role": "user", "content": "How deep is it in summer?"}  # 7 tokens, and 4 for its frame
MESSAGES = {  # beside a prompt's own 3 tokens
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "How deep"}, {"type": "text", "text": " is it?"}]}],
        9,
    ),
    "role last": ([{"content": "How deep is it in summer?", "role": "user"}] * 3, 33),
    "a name": ([{"role": "user", "name": "ann", "content": "How deep is it in summer?"}] * 3, 36),
    "a call and its result": (
        [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_x7Qb2", "content": '{"depth_m": 2.0}'},
        ]
        * 3,
        3 * (11 + 12 + 13),
    ),
    "two calls": ([{"role": "assistant", "tool_calls": [CALL, CALL]}, QUESTION], 4 + 2 * 8 + 11),
    "a cached part": (
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "How deep is it?", "cache_control": {"type": "ephemeral"}}],
            }
        ],
        9,
    ),
    "text like a frame": ([{"role": "user", "content": '{"role": "user", "content": "hi"}'}], 16),
    "text with brackets": ([{"role": "user", "content": "a[1], b[2]}"}], 12),
}


@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize(("messages", "truth"), MESSAGES.values(), ids=MESSAGES.keys())
def test_what_frames_messages_is_no_text(messages, truth, spaced):
    raw = json.dumps(messages, separators=None if spaced else (",", ":")).encode()
    assert 0.8 <= likely_tokens(raw, (), len(messages)) / (truth + 3) <= 1.4


def test_tools_are_billed_too():
    tools = json.dumps([{"name": "look_up", "description": " stone" * 90_000}]).encode()
    assert 0.95 <= likely_tokens(said("hi"), [tools], 1) / 90_040 <= 1.05


def test_text_is_not_hidden_between_samples():
    """Spaces where four samples of 16 KiB were once taken, at the ends and between."""
    text = bytearray(b"The quick brown fox jumps over the lazy dog. " * 22_222)
    for at in range(4):
        start = at * (len(text) - 16_384) // 3
        text[start : start + 16_384] = b" " * 16_384
    truth = 10 * len(text) // 45
    assert 0.8 < likely_tokens(bytes(text), (), 1) / truth < 1.1


@pytest.mark.parametrize("edge", ["The quick brown fox jumps over the lazy dog. ", "0.5137,"])
def test_a_text_whose_ends_differ_from_its_middle_is_estimated_by_all_of_it(edge):
    middle = "| cell      | cell      |\n" * 10_000
    ends = edge * (20_000 // len(edge))
    parts = [json.dumps(part).encode() for part in (ends, middle, ends)]
    apart = sum(likely_tokens(part[at : at + 60_000], (), 0) for part in parts for at in range(0, len(part), 60_000))
    assert 0.9 < likely_tokens(b"".join(parts), (), 0) / apart < 1.1


@pytest.mark.parametrize("size", [HUGE, 65_000])
@pytest.mark.parametrize(
    "hostile", ["\\u0416", '"}],', '{"role":"user","content":"', " ", '{"role"', "[", '"role":"a', '"name":', '"name" ']
)
def test_any_size_is_sampled_in_the_same_time(hostile, size):
    started = time.process_time()
    likely_tokens((hostile * (size // len(hostile))).encode(), (), 1)
    assert time.process_time() - started < 1  # some 0.02 s on a slow machine
