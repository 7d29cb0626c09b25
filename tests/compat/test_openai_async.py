"""OpenAI's SDK for Python, asynchronous: what differs from the other is concurrency, cancellation and clean-up."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.harness.waiting import wait_until

HELLO = [{"role": "user", "content": "Hello there"}]


class Answer(BaseModel):
    title: str
    score: float


@pytest.fixture
async def client(caller) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=caller.site.base_url, api_key=caller.secret, max_retries=0) as client:
        yield client


async def test_unary(client):
    completion = await client.chat.completions.create(model="openai/gpt-4o", messages=HELLO)
    assert "Hello there" in completion.choices[0].message.content


async def test_stream(client):
    whole = await client.chat.completions.create(model="sim/unicode", messages=HELLO, seed=7)
    stream = await client.chat.completions.create(model="sim/unicode", messages=HELLO, seed=7, stream=True)
    said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert whole.choices[0].message.content == said


async def test_fifty_streams_at_once_are_not_mixed_up(client):
    async def ask(number: int) -> tuple[str, str]:
        messages = [{"role": "user", "content": f"Number {number}, please"}]
        whole = await client.chat.completions.create(model="openai/gpt-4o", messages=messages, seed=number)
        stream = await client.chat.completions.create(
            model="openai/gpt-4o", messages=messages, seed=number, stream=True
        )
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return whole.choices[0].message.content, said

    answers = await asyncio.gather(*(ask(number) for number in range(50)))
    assert [whole for whole, _ in answers] == [said for _, said in answers]
    assert len({whole for whole, _ in answers}) == 50


async def test_stream_helper_and_structured_output(client):
    async with client.chat.completions.stream(model="openai/gpt-4o", messages=HELLO, response_format=Answer) as stream:
        parsed = (await stream.get_final_completion()).choices[0].message.parsed
    assert isinstance(parsed, Answer)
    completion = await client.chat.completions.parse(model="openai/gpt-4o", messages=HELLO, response_format=Answer)
    assert isinstance(completion.choices[0].message.parsed, Answer)


async def test_models(client):
    ids = [model.id async for model in client.models.list()]
    assert "openai/gpt-4o" in ids
    assert (await client.models.retrieve("openai/gpt-4o")).id == "openai/gpt-4o"


async def test_errors(client):
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="nobody/knows", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_stream_that_fails_raises(client):
    stream = await client.chat.completions.create(model="sim/error-mid-stream", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code == "upstream_error"


async def test_cancelled_task_frees_the_provider(client, caller):
    begun = asyncio.Event()

    async def listen() -> None:
        async for _ in await client.chat.completions.create(model="sim/slow", messages=HELLO, stream=True):
            begun.set()

    task = asyncio.create_task(listen())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    (entry,) = caller.site.received
    await asyncio.to_thread(wait_until, lambda: entry.ended == "client_closed")


async def test_cancelled_before_an_answer_frees_the_provider(client, caller):
    task = asyncio.create_task(client.chat.completions.create(model="sim/stall-head", messages=HELLO))
    await asyncio.to_thread(wait_until, lambda: bool(caller.site.received))
    task.cancel()
    await asyncio.wait([task])
    (entry,) = caller.site.received
    await asyncio.to_thread(wait_until, lambda: entry.ended == "client_closed")
    assert (await asyncio.to_thread(caller.settled)).settled_nusd == 9 * 2_500  # the prompt, which the provider bills
