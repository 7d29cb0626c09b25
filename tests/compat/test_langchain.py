"""LangChain's ChatOpenAI, pointed at the gateway by `base_url` alone."""

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.harness.waiting import wait_until

QUESTION = "Hello there"


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


@pytest.fixture
def chat(caller):
    """Makes a ChatOpenAI as an application would."""

    def chat(**fields):
        usual = {"model": "openai/gpt-4o", "base_url": caller.site.base_url, "api_key": caller.secret, "max_retries": 0}
        return ChatOpenAI(**{**usual, **fields})

    return chat


def test_invoke(chat, caller):
    answer = chat(temperature=0.5).invoke([("system", "Be brief."), ("human", QUESTION)])
    assert QUESTION in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["total_tokens"] > 0
    assert [message["role"] for message in caller.sent["messages"]] == ["system", "user"]


def test_stream(chat):
    whole = chat(seed=7).invoke(QUESTION)
    chunks = list(chat(seed=7, stream_usage=True).stream(QUESTION))
    assert whole.content == "".join(chunk.content for chunk in chunks)
    assert whole.usage_metadata["output_tokens"] == sum(
        chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata
    )


async def test_ainvoke_and_astream(chat):
    whole = await chat(seed=7).ainvoke(QUESTION)
    assert whole.content == "".join([chunk.content async for chunk in chat(seed=7).astream(QUESTION)])


def test_batch(chat):
    answers = chat().batch([f"Number {number}, please" for number in range(5)])
    assert [f"Number {number}, please" in answer.content for number, answer in enumerate(answers)] == [True] * 5


def test_bind_tools(chat):
    model = chat().bind_tools([get_weather])
    question = HumanMessage("Use get_weather for Oslo.")
    answer = model.invoke([question])
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.invoke([question, answer, result]).tool_calls == []


def test_streamed_tool_calls(chat):
    whole = None
    for chunk in chat().bind_tools([get_weather], tool_choice="required").stream("What is it like in Oslo?"):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert (call["name"], list(call["args"])) == ("get_weather", ["city"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    person = chat().with_structured_output(Person, method=method).invoke("Somebody, please")
    assert isinstance(person, Person)


def test_json_mode(chat):
    answer = chat().with_structured_output(None, method="json_mode").invoke("JSON, please")
    assert isinstance(answer, dict)


def test_conversation(chat, caller):
    chat().invoke([HumanMessage("One"), AIMessage("Two"), HumanMessage("Three")])
    assert [message["content"] for message in caller.sent["messages"]] == ["One", "Two", "Three"]


def test_template_and_session_in_extra_body(chat, caller):
    caller.site.put_template(caller.account, name="pirate", system="You are {{ who }}.")
    body = {"template": "pirate", "variables": {"who": "a pirate"}, "session_id": "s-1"}
    chat(extra_body=body).invoke(QUESTION)
    assert [message["content"] for message in caller.sent["messages"]] == ["You are a pirate.", QUESTION]


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "nobody/knows"}, openai.NotFoundError, "model_not_found"),
        ({"api_key": "rsk_unknown"}, openai.AuthenticationError, "unauthorized"),
        ({"temperature": 3}, openai.UnprocessableEntityError, "validation_error"),
        ({"model": "sim/error-500"}, openai.InternalServerError, "upstream_error"),
    ],
    ids=["404", "401", "422", "502"],
)
def test_errors(chat, fields, kind, code):
    with pytest.raises(kind) as caught:
        chat(**fields).invoke(QUESTION)
    assert caught.value.code == code


def test_stream_that_fails_raises(chat):
    with pytest.raises(openai.APIError) as caught:
        list(chat(model="sim/die-mid-stream").stream(QUESTION))
    assert caught.value.code == "upstream_error"


def test_leaving_a_stream_early_frees_the_provider(chat, caller):
    stream = chat(model="sim/slow").stream(QUESTION)
    next(stream)
    stream.close()
    (entry,) = caller.site.received
    wait_until(lambda: entry.ended == "client_closed")
