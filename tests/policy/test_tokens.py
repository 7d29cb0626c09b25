import base64
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from meshproxy.policy.tokens import estimate_prompt, has_media

PICTURE = base64.b64encode(bytes(range(256)) * 400).decode()  # 136,536 characters
BASE64 = string.ascii_letters.encode() + b"0123456789+/-_\\/=="
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
    assert 300 == estimate_prompt(b"\\u0416" * 100 + b"x" * 600, None, 0)


@pytest.mark.parametrize("more", [b"", b"x"])
def test_what_looks_like_escapes_can_at_most_halve_the_estimate(more):
    assert 500 == estimate_prompt(b"\\u" * 1500 + more, None, 0)


IMAGE = b'{"type":"image_url","image_url"%b{"url"%b"%b"}}'
SOUND = b'{"input_audio"%b{"format":"wav","data"%b"%b"}}'
FILE = b'{"file"%b{"filename":"a.pdf","file_data"%b"%b"}}'


@pytest.mark.parametrize("colon", [b":", b" : ", b"\n:\t\r "])
@pytest.mark.parametrize(
    "part, data, expected",
    [
        (IMAGE, b"data:image/png;base64,", 1700),
        (IMAGE, b"data:image/png;base64," + BASE64, 1700),
        (IMAGE, b"data:image\\/svg+xml;base64," + BASE64, 1700),
        (IMAGE, b"data:image/x-a.b" + b";" * 64 + b";base64," + BASE64, 1700),
        (SOUND, BASE64, 1700),
        (SOUND, b"", 1700),
        (b'{"input_audio"%b{"data"%b"%b"}}', BASE64, 1700),
        (FILE, BASE64, len(BASE64) // 16),
        (FILE, b"data:application/pdf;base64," + BASE64, (28 + len(BASE64)) // 16),
        (FILE, b"data:a\\/x-c+d.e;base64," + BASE64, (24 + len(BASE64)) // 16),
    ],
)
def test_media_counts_as_what_it_is_and_not_as_the_text_of_its_base64(part, data, expected, colon):
    one, empty = part % (colon, colon, data), part % (colon, colon, b"")
    assert expected + estimate_prompt(empty, None, 5, media=False) == estimate_prompt(one, None, 5)
    assert 2 * expected + estimate_prompt(empty * 2, None, 0, media=False) == estimate_prompt(one * 2, None, 0)


@pytest.mark.parametrize(
    "text, images",
    [
        (IMAGE % (b":", b":", b"https://a.example/b.png"), 1),
        (IMAGE % (b":", b":", b"data:;base64," + BASE64), 1),
        (IMAGE % (b":", b":", b"data:image/png;base64," + BASE64 + b"!"), 1),
        (IMAGE % (b":", b":", b"data:image/png" + b";" * 65 + b";base64," + BASE64), 1),
        (b'{"image_url":{"x-url":"data:image/png;base64,%b"}}' % BASE64, 1),
        (b'{"x-image_url":{}}', 0),
        (SOUND % (b":", b":", BASE64 + b"!"), 0),
        (b'{"x-input_audio":{"data":"%b"}}' % BASE64, 0),
        (b'{"input_audio":{"x-data":"%b"}}' % BASE64, 0),
        (b'{"input_audio":{"a":{},"data":"%b"}}' % BASE64, 0),
        (b'{"file":{"x-file_data":"%b"}}' % BASE64, 0),
        (b'{"file":{"file_data":"data:;base64,%b"}}' % BASE64, 0),
    ],
)
def test_what_is_not_inline_media_counts_as_text(text, images):
    expected = 1700 * images + estimate_prompt(text, None, 1, media=False)
    assert expected == estimate_prompt(text, None, 1, media=True)


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
