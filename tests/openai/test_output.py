"""What an answer without a report is taken for. Of events, tests/wire/test_sse.py has the cases."""

import json
from typing import Any

import pytest

from meshproxy.openai.output import answer_tokens, audio_format, text_tokens

SENTENCE = " In spring the river rises over the lower meadow, and the farmers move their fences to the road."


def message(value: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": value}]}).encode()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (message({"content": " word" * 75}), 75),
        (message({"content": " a", "refusal": None}), 1),
        (message({"content": [{"type": "text", "text": " a"}, {"type": "thinking", "thinking": " b"}, 7, None]}), 2),
        (message({"content": "", "reasoning_content": " a b"}), 2),
        (message({"reasoning": " a b", "reasoning_details": [{"text": " a b"}]}), 2),
        (message({"tool_calls": [{"id": "call_1", "function": {"name": "find", "arguments": " a b"}}, "odd"]}), 3),
        (message({"tool_calls": [{"custom": {"name": "find", "input": " a b"}}]}), 3),
        (message({"function_call": {"name": "find", "arguments": {"a": "b"}}}), 7),
        (message({"images": [{"image_url": {"url": "iVBORw0K" * 9999}}]}), 0),
        (message({"audio": {"data": "A" * 32_000, "transcript": " a b"}}), 12),
        (b'{"choices":[{"message":{"content":" a"}},{"message":{"content":" c"}},{"index":2},"odd"]}', 2),
        (b'{"choices":[{"message":{"content":" a\\ud83d"},"logprobs":NaN}]}', 2),
        (b'{"choices":[{"message":"text"}]}', 0),
        (b'{"choices":[{"delta":{"content":" a"}}]}', 0),
        (b'{"choices":null}', 0),
        (b'{"choices":"\xff"}', 0),
        (b"[]", 0),
        (b"\xff", 0),
    ],
)
def test_what_a_model_wrote_is_counted(body: bytes, expected: int):
    assert answer_tokens(body, None)[0] == expected


def test_how_much_of_it_is_audio_is_told():
    assert answer_tokens(message({"audio": {"data": "A" * 32_000, "transcript": " a b"}}), "pcm16") == (12, 10)


def test_deep_nesting_ends():
    assert answer_tokens(message({"content": json.loads("[" * 200 + "]" * 200)}), None) == (0, 0)


def test_a_long_text_is_sampled():
    assert 0.9 < text_tokens(SENTENCE * 5000) / (text_tokens(SENTENCE) * 5000) < 1.1


# By o200k_base: the numbers that a tokenizer gave.
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        pytest.param(SENTENCE * 10, 200, id="English"),
        pytest.param("春天的河水漫过低处的草地，农民把篱笆移到路边。六月水又退了。" * 10, 310, id="Chinese"),
        pytest.param(
            "春になると川の水が低い牧草地にあふれ、農民たちは柵を道のそばに移します。" * 10, 320, id="Japanese"
        ),
        pytest.param(
            " Весной река заливает нижний луг, и крестьяне переносят заборы к дороге." * 10, 250, id="Russian"
        ),
        pytest.param(
            " Im Frühling steigt der Fluss über die untere Wiese, und die Bauern versetzen ihre Zäune." * 10,
            240,
            id="German",
        ),
        pytest.param(
            " في الربيع يرتفع النهر فوق المرج السفلي، وينقل المزارعون أسوارهم إلى الطريق." * 10, 240, id="Arabic"
        ),
        pytest.param(
            "def level(river, at):\n    for gauge in river.gauges:\n        return gauge.read()\n" * 10, 210, id="code"
        ),
        pytest.param('{"place": "harbour", "level": 3.25, "tags": ["tide", "low"]}\n' * 10, 250, id="JSON"),
        pytest.param(
            "ენობრივი მოდელები ქმნიან ტექსტს სიტყვა-სიტყვით და ყოველი მოთხოვნა რამდენიმე თეთრი ღირს.", 27, id="Georgian"
        ),
        pytest.param(
            "Լեզվական մոդելները տեքստը ստեղծում են բառ առ բառ, և յուրաքանչյուր հարցում արժե մի քանի լումա։",
            31,
            id="Armenian",
        ),
        pytest.param("భాషా నమూనాలు ఒక్కో పదం చొప్పున వచనాన్ని సృష్టిస్తాయి, ప్రతి అభ్యర్థనకు కొన్ని పైసలు ఖర్చవుతాయి.", 39, id="Telugu"),
        pytest.param("ဘာသာစကားမော်ဒယ်များသည် စာသားကို တစ်လုံးချင်း ထုတ်လုပ်ပြီး တောင်းဆိုမှုတိုင်းတွင် ကုန်ကျစရိတ်ရှိသည်။", 42, id="Burmese"),
        pytest.param("គំរូភាសាបង្កើតអត្ថបទម្តងមួយពាក្យ ហើយសំណើនីមួយៗមានតម្លៃពីរបីសេន។", 43, id="Khmer"),
        pytest.param("🌊 The tide is out 🐚! " * 10, 101, id="emoji"),
        pytest.param("9bFlIkpYt5HfavHYMD5hzcS7hsPRxCcQPDRMQYnrLx571dR" * 10, 310, id="base64"),
    ],
)
def test_texts_come_near_a_tokenizer(text: str, tokens: int):
    assert 0.7 < text_tokens(text) / tokens < 1.5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"audio": b'{"voice":"alloy","format":"mp3"}'}, "mp3"),
        ({"audio": b"null"}, None),
        ({"audio": b'{"format":7}'}, None),
    ],
)
def test_the_format_of_audio_is_read(fields: dict[str, bytes], expected: str | None):
    assert audio_format(fields) == expected
