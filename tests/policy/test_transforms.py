import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.policy.tokens import CUT, Scale, estimate_prompt, fitted, message_bytes, middle_out


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def letters(message):
    """A count that a reader can do: the characters of the text."""
    content = message["content"] or ""
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)


LETTERS = Scale(letters, len)
SYSTEM = say("system", "ssss")
TALK = [say("user", text) for text in ("aaaa", "bbbb", "cccc", "dddd", "eeee")]
A, B, C, D, E = TALK


@pytest.mark.parametrize(
    "budget, expected",
    [
        (100, TALK),
        (20, TALK),
        (19, [A, B, D, E]),
        (16, [A, B, D, E]),
        (15, [A, D, E]),
        (12, [A, D, E]),
        (11, [A, E]),
        (8, [A, E]),
    ],
)
def test_messages_go_from_the_middle_outwards(budget, expected):
    assert fitted(TALK, budget, LETTERS) == expected


def test_of_two_in_the_middle_the_earlier_goes_first():
    talk = [say("user", letter) for letter in "abcdef"]
    results = [fitted(talk, budget, LETTERS) for budget in (5, 4, 3, 2)]
    assert ["".join(message["content"] for message in left) for left in results] == ["abdef", "abef", "aef", "af"]


def test_system_messages_stay_wherever_they_are():
    developer = say("developer", "vvvv")
    assert fitted([SYSTEM, A, B, developer, C, D, E], 16, LETTERS) == [SYSTEM, A, developer, E]


def test_a_call_and_its_answers_go_together():
    call = say("assistant", None, tool_calls=[{"id": "1"}, {"id": "2"}])
    answers = [say("tool", "1111", tool_call_id="1"), say("function", "2222", name="f")]
    assert fitted([A, B, call, *answers, E], 16, LETTERS) == [A, call, *answers, E]
    assert fitted([A, call, *answers, D, E], 16, LETTERS) == [A, D, E]
    assert fitted([A, call, *answers, E], 15, LETTERS) == [A, E]
    assert fitted([A, B, C, call, *answers], 12, LETTERS) == [A, call, *answers]


@pytest.mark.parametrize(
    "budget, kept", [(15, "01232345"), (11, "0145"), (10, "015"), (9, "05"), (8, "0"), (7, ""), (1, "")]
)
def test_a_text_that_is_too_long_loses_its_middle(budget, kept):
    half = len(kept) - len(kept) // 2
    expected = say("user", kept[:half] + CUT + kept[half:])
    assert fitted([say("user", "0123456789012345")], budget, LETTERS) == [expected]


LONG, CUT_LONG = "x" * 100, "x" * 10 + CUT + "x" * 9


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["ssss", "aaaa", LONG], ["ssss", "aaaa", CUT_LONG]),
        ([LONG, "y" * 50], [CUT_LONG, "y" * 50]),
        (["y" * 50, LONG], ["y" * 50, CUT_LONG]),
    ],
)
def test_the_longest_text_is_cut_first(texts, expected):
    budget = sum(map(len, expected))
    cut = fitted([say("system", text) for text in texts], budget, LETTERS)
    parts = [{"type": "text", "text": text} for text in texts]
    (message,) = fitted([say("user", parts)], budget, LETTERS)
    assert [[each["content"] for each in cut], [part["text"] for part in message["content"]]] == [expected, expected]


def test_when_the_longest_has_nothing_left_the_next_is_cut():
    assert [say("system", CUT), say("system", "y" + CUT)] == fitted(
        [say("system", "x" * 100), say("system", "y" * 50)], 1 + 2 * len(CUT), LETTERS
    )


def test_the_texts_of_parts_are_cut_and_the_rest_stays():
    picture = {"type": "image_url", "image_url": {"url": "https://a.example"}}
    short, long = {"type": "text", "text": "ab"}, {"type": "text", "text": "x" * 100}
    (message,) = fitted([say("user", [picture, short, long])], 2 + 4 + len(CUT), LETTERS)
    assert say("user", [picture, short, {"type": "text", "text": "xx" + CUT + "xx"}]) == message


@pytest.mark.parametrize(
    "content",
    [
        "",
        "1234567",
        None,
        7,
        [{"type": "image_url", "image_url": {"url": "https://a.example"}}],
        ["odd", {"text": None}, {}],
    ],
)
def test_what_cannot_be_cut_stays(content):
    assert [say("user", content)] == middle_out([say("user", content)], 1)


def test_the_input_is_left_as_it_was():
    message = say("user", [{"type": "text", "text": "x" * 100}])
    fitted([message], 20, LETTERS)
    assert say("user", [{"type": "text", "text": "x" * 100}]) == message


def test_nothing_comes_of_nothing():
    assert middle_out([], 10) == []


texts = st.one_of(
    st.none(),
    st.text(max_size=300),
    st.lists(st.builds(lambda text: {"type": "text", "text": text}, st.text(max_size=300)), max_size=3),
)
talks = st.lists(st.builds(say, st.sampled_from(["system", "user", "assistant", "tool"]), texts), max_size=12)


@given(talks, st.integers(0, 600))
def test_it_fits_unless_nothing_is_left_to_cut(messages, budget):
    result = middle_out(messages, budget)
    widest = "\U00010000" * len(CUT)  # a text no longer than the mark of a cut stays whole, whatever its letters
    floor = sum(message_bytes(say("x" * 12, [{"type": "text", "text": widest}] * 3)) // 3 + 1 for _ in result)
    assert estimate_prompt(msgspec.json.encode(result), (), len(result)) <= max(budget, floor) + 1


@given(talks, st.integers(0, 600))
def test_roles_keep_their_order_and_nothing_is_added(messages, budget):
    roles = iter([message["role"] for message in messages])
    assert all(message["role"] in roles for message in middle_out(messages, budget))


@given(talks, st.integers(0, 600))
def test_first_last_and_system_are_there(messages, budget):
    result = [message["role"] for message in middle_out(messages, budget)]
    roles = [message["role"] for message in messages]
    assert (roles.count("system"), roles[:1], roles[-1:]) == (result.count("system"), result[:1], result[-1:])


def test_ten_thousand_messages():
    messages = [say("user", f"message {number}") for number in range(10_000)]
    result = middle_out(messages, 1000)
    assert (messages[0], messages[-1]) == (result[0], result[-1])
    assert 900 < estimate_prompt(msgspec.json.encode(result), (), len(result)) <= 1000


@pytest.mark.parametrize(
    "messages",
    [
        [say("user", [{"type": "text", "text": "wort " * 8} for _ in range(40_000)])],
        [say("user", [{"type": "text", "text": "ж" * 800_000}, {"type": "text", "text": "x" * 800_000}])],
        [say("system", "word " * 20) for _ in range(10_000)],
    ],
    ids=["parts", "long texts", "messages"],
)
def test_the_time_it_takes_is_linear(messages):
    started = time.process_time()
    result = middle_out(messages, 20_000)
    assert time.process_time() - started < 5  # some 0.3 s on a slow machine; it was minutes
    assert estimate_prompt(msgspec.json.encode(result), (), len(result)) < 700_000
