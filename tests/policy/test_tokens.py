import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from meshproxy.policy.tokens import estimate_prompt, has_media

PICTURE = base64.b64encode(bytes(range(256)) * 400).decode()  # 136,536 characters
TEXT = {"type": "text", "text": "What is this?"}


def raw(*parts):
    return json.dumps([{"role": "user", "content": list(parts)}]).encode()


def image(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


@pytest.mark.parametrize(
    "messages, tools, count, expected",
    [
        (b"[]", None, 0, 1),
        (b'[{"role":"user","content":"hi"}]', None, 1, 11 + 4),
        (b"x" * 300, None, 3, 100 + 12),
        (b"x" * 300, b"y" * 30, 3, 110 + 12),
        (b"x" * 300, Raw(b"y" * 30), 3, 110 + 12),
    ],
)
def test_a_token_per_three_bytes_and_four_a_message(messages, tools, count, expected):
    assert expected == estimate_prompt(messages, tools, count)


def test_tools_alone_can_have_media_names():
    assert 100 + 20 + 4 == estimate_prompt(b"x" * 300, b'"image_url"'.ljust(60), 1)


def test_escaped_text_is_counted_as_text():
    text = "Привет" * 100
    escaped, plain = json.dumps(text).encode(), json.dumps(text, ensure_ascii=False).encode()
    assert (601, 401) == (estimate_prompt(escaped, None, 0), estimate_prompt(plain, None, 0))


def test_what_looks_like_escapes_can_at_most_halve_the_estimate():
    assert 500 == estimate_prompt(b"\\u" * 1500, None, 0)


@pytest.mark.parametrize("mime", ["image/png", "image/svg+xml", "image\\/jpeg"])
def test_an_inline_image_is_an_image_not_text(mime):
    message = raw(TEXT, image("DATA")).replace(b"DATA", f"data:{mime};base64,{PICTURE}".encode())
    expected = estimate_prompt(raw(TEXT, image("")), None, 1)
    assert expected == estimate_prompt(message, None, 1)


def test_each_image_is_flat():
    one, two = raw(image("https://a.example/b.png")), raw(*[image("https://a.example/b.png")] * 2)
    assert range(1700, 1800).count(estimate_prompt(one, None, 1)) == 1
    assert range(3400, 3600).count(estimate_prompt(two, None, 1)) == 1


def test_audio_is_flat():
    sound = raw({"type": "input_audio", "input_audio": {"format": "wav", "data": PICTURE}})
    silence = raw({"type": "input_audio", "input_audio": {"format": "wav", "data": ""}})
    assert estimate_prompt(silence, None, 1) == estimate_prompt(sound, None, 1)
    assert range(1700, 1800).count(estimate_prompt(sound, None, 1)) == 1


def test_a_file_is_a_sixteenth():
    data = f"data:application/pdf;base64,{PICTURE}"
    document, empty = ({"type": "file", "file": {"filename": "a.pdf", "file_data": it}} for it in (data, ""))
    expected = estimate_prompt(raw(empty), None, 1) + len(data) // 16
    assert expected == estimate_prompt(raw(document), None, 1)


@pytest.mark.parametrize(
    "text",
    [f"data:image/png;base64,{PICTURE}", f'"url": "data:image/png;base64,{PICTURE}"', f'"image_url": "{PICTURE}"'],
)
def test_text_cannot_pass_for_an_image(text):
    assert estimate_prompt(raw({"type": "text", "text": text}), None, 1) >= len(text) // 3


@pytest.mark.parametrize(
    "part, expected",
    [
        (TEXT, False),
        (image("https://a.example"), True),
        ({"type": "input_audio", "input_audio": {}}, True),
        ({"type": "file", "file": {}}, True),
        ({"type": "text", "text": '"image_url"'}, False),
    ],
)
def test_has_media(part, expected):
    assert expected == has_media(raw(part))


@given(st.binary(max_size=500), st.integers(0, 10))
def test_any_bytes_have_an_estimate(messages, count):
    assert estimate_prompt(messages, None, count) >= len(messages) // 6 + 4 * count - 100


@pytest.mark.parametrize(
    "hostile",
    [
        b'"input_audio":{' * 60_000,
        b'"input_audio":{"data":"x' + b"x" * 900_000,
        b'"image_url"' + b'"url":"data:a' * 70_000,
        b'"image_url"' + b'"url":"data:a;;base64,' * 40_000,
        b'"file""file_data":"' * 50_000,
    ],
)
def test_hostile_bytes_are_searched_in_linear_time(hostile):
    assert estimate_prompt(hostile, None, 1) > 0
