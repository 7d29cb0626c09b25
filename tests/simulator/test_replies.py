"""What a well-behaved model says, through OpenAI's own SDK."""

import json
from enum import StrEnum

import pytest
from pydantic import BaseModel

HELLO = [{"role": "user", "content": "Hello there"}]
FAST = "sim/fast"


async def test_a_unary_answer_has_openais_shape(sdk):
    raw = await sdk.chat.completions.with_raw_response.create(model=FAST, messages=HELLO)
    body = json.loads(raw.content)
    expected = ["id", "object", "created", "model", "choices", "usage", "service_tier", "system_fingerprint"]
    assert list(body) == expected
    assert (body["object"], body["model"], body["id"].startswith("chatcmpl-")) == ("chat.completion", FAST, True)
    assert list(body["choices"][0]) == ["index", "message", "logprobs", "finish_reason"]
    assert "Hello there" in body["choices"][0]["message"]["content"]
    assert raw.headers["x-request-id"].startswith("req_")


async def test_any_name_without_the_prefix_is_served(sdk):
    answer = await sdk.chat.completions.create(model="gpt-4o", messages=HELLO, extra_headers={"x-sim-fault": "fast"})
    assert (answer.model, answer.choices[0].finish_reason) == ("gpt-4o", "stop")


async def test_usage_counts_a_quarter_of_the_bytes_and_three_a_message(sdk):
    messages = [
        {"role": "system", "content": "12345"},
        {"role": "user", "content": [{"type": "text", "text": "é" * 4}]},
    ]
    answer = await sdk.chat.completions.create(model="sim/fast?tokens=7", messages=messages)
    assert answer.usage.prompt_tokens == (2 + 3) + (2 + 3)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 17)
    assert (
        answer.usage.prompt_tokens_details.cached_tokens,
        answer.usage.completion_tokens_details.reasoning_tokens,
    ) == (0, 0)


async def test_a_stream_says_the_role_then_one_token_a_chunk_then_why_it_ended(sdk):
    stream = await sdk.chat.completions.create(model="sim/fast?tokens=4", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    first, *middle, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert len([chunk for chunk in middle if chunk.choices[0].delta.content]) == 4
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert {chunk.usage for chunk in chunks} == {None}
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1


async def test_chunks_are_openais_to_the_member(http):
    body = {"model": "sim/fast?tokens=1", "messages": HELLO, "stream": True}
    async with http.post("/v1/chat/completions", json=body) as answer:
        events = (await answer.read()).split(b"\n\n")
    assert (answer.headers["content-type"], events[-2:]) == ("text/event-stream; charset=utf-8", [b"data: [DONE]", b""])
    _, content, finish = (json.loads(event.removeprefix(b"data: ")) for event in events[:-2])
    expected = ["id", "object", "created", "model", "service_tier", "system_fingerprint", "choices"]
    assert list(content) == expected
    delta = {"content": content["choices"][0]["delta"]["content"]}
    assert content["choices"] == [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]
    assert finish["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]


async def test_usage_comes_in_a_chunk_of_its_own_when_asked_and_is_null_elsewhere(http):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with http.post(
        "/v1/chat/completions", json={"model": "sim/tokens-3+fast", "messages": HELLO, **options}
    ) as answer:
        events = [json.loads(e.removeprefix(b"data: ")) for e in (await answer.read()).split(b"\n\n")[:-2]]
    *others, usage = events
    assert {event["usage"] for event in others} == {None}
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)


async def test_n_answers_are_generated_side_by_side(sdk):
    stream = await sdk.chat.completions.create(
        model="sim/fast?tokens=3", messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    told = [chunk.choices[0].index for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert told == [0, 1, 0, 1, 0, 1]
    assert chunks[-1].usage.completion_tokens == 6


@pytest.mark.parametrize("cap", ["max_tokens", "max_completion_tokens"])
async def test_a_cap_ends_with_length(sdk, cap):
    answer = await sdk.chat.completions.create(model=FAST, messages=HELLO, **{cap: 5})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)


@pytest.mark.parametrize(
    "model, words, expected",
    [("sim/fast+tokens-200", "hi", 200), ("sim/fast?tokens=0", "hi", 0), (FAST, "Tell me in 31 words.", 31)],
)
async def test_the_length_can_be_asked_for(sdk, model, words, expected):
    messages = [{"role": "user", "content": words}]
    answer = await sdk.chat.completions.create(model=model, messages=messages)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", expected)


async def test_stop_ends_before_the_stop_sequence(sdk):
    whole = await sdk.chat.completions.create(model=FAST, messages=HELLO, seed=1)
    stopped = await sdk.chat.completions.create(model=FAST, messages=HELLO, seed=1, stop=["there"])
    expected = whole.choices[0].message.content.partition("there")[0]
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == (expected, "stop")


async def test_the_same_seed_and_messages_give_the_same_bytes(sdk):
    async def ask(seed, words="Hello"):
        messages = [{"role": "user", "content": words}]
        return (await sdk.chat.completions.with_raw_response.create(model=FAST, messages=messages, seed=seed)).content

    assert await ask(7) == await ask(7)
    assert len({await ask(7), await ask(8), await ask(7, "Goodbye")}) == 3


async def test_a_stream_and_a_unary_answer_with_one_seed_say_the_same(sdk):
    stream = await sdk.chat.completions.create(model=FAST, messages=HELLO, seed=3, stream=True)
    streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    unary = await sdk.chat.completions.create(model=FAST, messages=HELLO, seed=3)
    assert unary.choices[0].message.content == streamed


async def test_logprobs_name_every_token(sdk):
    answer = await sdk.chat.completions.create(model="sim/fast?tokens=3", messages=HELLO, logprobs=True)
    told = answer.choices[0].logprobs.content
    assert answer.choices[0].message.content == "".join(token.token for token in told)
    stream = await sdk.chat.completions.create(model="sim/fast?tokens=3", messages=HELLO, logprobs=True, stream=True)
    chunks = [chunk async for chunk in stream]
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices[0].logprobs) == 3


async def test_reasoning_comes_first_and_is_counted(sdk):
    answer = await sdk.chat.completions.create(model="sim/fast+reasoning?tokens=2", messages=HELLO)
    reasoning = answer.usage.completion_tokens_details.reasoning_tokens
    assert reasoning + 2 == answer.usage.completion_tokens
    assert answer.choices[0].message.reasoning_content
    stream = await sdk.chat.completions.create(model="sim/fast+reasoning?tokens=2", messages=HELLO, stream=True)
    deltas = [chunk.choices[0].delta.model_dump(exclude_none=True) async for chunk in stream]
    assert [deltas[0], set(deltas[1])] == [{"role": "assistant"}, {"reasoning_content"}]
    assert [set(delta) for delta in deltas[-3:]] == [{"content"}, {"content"}, set()]


async def test_cached_tokens_are_reported(sdk):
    answer = await sdk.chat.completions.create(model="sim/fast+cached", messages=HELLO)
    assert answer.usage.prompt_tokens * 3 // 4 == answer.usage.prompt_tokens_details.cached_tokens


async def test_unicode_arrives_whole(sdk):
    model = "sim/fast+unicode?tokens=400"
    unary = await sdk.chat.completions.create(model=model, messages=HELLO, seed=1)
    stream = await sdk.chat.completions.create(model=model + "&tag=x", messages=HELLO, seed=1, stream=True)
    streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert unary.choices[0].message.content == streamed
    assert {"😀", "\u0301", "界", "\u2028"} <= set(streamed)


class Unit(StrEnum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


class Place(BaseModel):
    city: str
    population: int | None
    unit: Unit


class Trip(BaseModel):
    title: str
    days: int
    places: list[Place]
    return_by: float


async def test_structured_output_fits_the_schema(sdk):
    answer = await sdk.chat.completions.parse(model=FAST, messages=HELLO, response_format=Trip)
    assert isinstance(answer.choices[0].message.parsed, Trip)


async def test_json_mode_answers_json(sdk):
    answer = await sdk.chat.completions.create(
        model=FAST, messages=HELLO, response_format={"type": "json_object"}, stream=False
    )
    assert json.loads(answer.choices[0].message.content)["question"] == "Hello there"
