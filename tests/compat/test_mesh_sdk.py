"""Mesh's own SDK (`meshapi` on PyPI), for those who come from the hosted API: its base URL has no /v1."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import pytest

from meshproxy.policy.principal import Limits

meshapi = pytest.importorskip("meshapi", reason="meshapi is not installed")

from meshapi import (  # noqa: E402 - after the skip
    ChatCompletionParams,
    ChatMessage,
    CreateTemplateParams,
    MeshAPI,
    MeshAPIError,
    ModelSearchParams,
    Tool,
    UpdateTemplateParams,
)


def ask(words: Any = "Hello there", **fields: Any) -> ChatCompletionParams:
    return ChatCompletionParams(
        **{"model": "openai/gpt-4o", "messages": [ChatMessage(role="user", content=words)], **fields}
    )


@pytest.fixture
def client(caller) -> Iterator[MeshAPI]:
    base_url = caller.site.base_url.removesuffix("/v1")
    with MeshAPI(base_url=base_url, token=caller.secret, max_retries=0) as client:
        yield client


def test_unary(client):
    reply = client.chat.completions.create(ask(temperature=0.2, max_tokens=5))
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 5)


def test_stream(client):
    """Of plain words: meshapi 0.1.11 takes a raw U+2028 or U+0085 within an event for the end of a line, and drops the event."""
    whole = client.chat.completions.create(ask(seed=7))
    chunks = list(client.chat.completions.stream(ask(seed=7)))
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert whole.choices[0].message.content == "".join(texts)


def test_a_stream_tells_its_usage_and_cost(client):
    chunks = list(client.chat.completions.stream(ask()))
    assert (chunks[-1].usage.completion_tokens > 0, Decimal(chunks[-1].cost) > 0) == (True, True)


def test_templates_from_birth_to_deletion(client, caller):
    made = client.templates.create(
        CreateTemplateParams(name="support", system="You help {{ who }}.", params={"temperature": 0.2})
    )
    assert (made.owner, made.is_global, made.variables) == (caller.account, False, ["who"])
    changed = client.templates.update(made.id, UpdateTemplateParams(system="You help {{ whom }}."))
    assert ["whom"] == changed.variables == client.templates.get("support").variables
    assert [made.id] == [template.id for template in client.templates.list()]
    client.chat.completions.create(ask(template="support", variables={"whom": "Ada"}, session_id="s-1"))
    assert caller.sent["messages"][0]["content"] == "You help Ada."
    client.templates.delete(made.id)
    assert client.templates.list() == []


def test_template_with_a_name_alone(client):
    made = client.templates.create(CreateTemplateParams(name="bare"))
    assert (made.name, made.system, made.variables) == ("bare", None, [])
    assert client.templates.get(made.id).name == "bare"


def test_tools_and_their_result(client):
    tool = Tool.model_validate({"type": "function", "function": {"name": "get_weather", "parameters": {}}})
    question = "Use get_weather for Oslo."
    message = client.chat.completions.create(ask(question, tools=[tool])).choices[0].message
    (call,) = message.tool_calls
    result = ChatMessage(role="tool", tool_call_id=call.id, content="rain")
    asked = ChatMessage(role="assistant", tool_calls=message.tool_calls)
    history = [ChatMessage(role="user", content=question), asked, result]
    assert client.chat.completions.create(ask(messages=history)).choices[0].finish_reason == "stop"


def test_streamed_tool_call(client):
    tool = Tool.model_validate({"type": "function", "function": {"name": "get_weather", "parameters": {}}})
    chunks = list(
        client.chat.completions.stream(ask("Use get_weather for Oslo.", tools=[tool], tool_choice="required"))
    )
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert "get_weather" in str(calls[0])


def test_multimodal_input(client, caller):
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
    ]
    reply = client.chat.completions.create(ask(parts))
    assert "What is this?" in reply.choices[0].message.content
    assert parts[1]["image_url"]["url"] == caller.sent["messages"][0]["content"][1]["image_url"]["url"]


def test_models_tell_their_context_and_prices(client):
    model = {model.id: model for model in client.models.list()}["openai/gpt-4o"]
    assert (model.context_length, model.is_free) == (128_000, False)
    assert Decimal(model.pricing.prompt_usd_per_1m) == Decimal("2.50")
    assert Decimal(model.pricing.completion_usd_per_1m) == Decimal("10.00")
    assert client.models.get("openai/gpt-4o") == model


def test_free_and_paid_models_are_two_halves(client):
    free, paid = client.models.free(), client.models.paid()
    assert (
        [model.id for model in free],
        {model.is_free for model in free},
        {model.is_free for model in paid},
    ) == (["free"], {True}, {False})
    assert {model.id for model in client.models.list()} == {model.id for model in [*free, *paid]}


def test_search_for_models(client):
    page = client.models.search(ModelSearchParams(q="gpt", limit=1, offset=0))
    assert (page.total, page.limit, page.offset, [model.id for model in page.items]) == (1, 1, 0, ["openai/gpt-4o"])


def test_429_tells_a_whole_number_of_seconds(caller):
    limited = caller.site.key(limits=Limits(requests_per_minute=40, burst=1))
    base_url = caller.site.base_url.removesuffix("/v1")
    with MeshAPI(base_url=base_url, token=limited.secret, max_retries=0) as client:
        client.chat.completions.create(ask())
        with pytest.raises(MeshAPIError) as caught:
            client.chat.completions.create(ask())
    assert (
        caught.value.status,
        type(caught.value.retry_after_seconds),
        caught.value.retry_after_seconds,
    ) == (429, int, 2)
    limited.settled()


def test_balance_while_a_stream_runs(client, caller):
    """`reserved_usd` is what the stream holds, and `available_usd` the rest."""
    stream = client.chat.completions.stream(ask(model="sim/slow"))
    next(stream)
    headers = {"authorization": f"Bearer {caller.secret}"}
    told = httpx.get(f"{caller.site.base_url}/balance", headers=headers).json()
    balance, reserved, available = (Decimal(told[f"{name}_usd"]) for name in ("balance", "reserved", "available"))
    stream.close()
    assert reserved > 0
    assert balance - reserved == available


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "nobody/knows"}, 404, "model_not_found"),
        ({"template": "nobody-knows"}, 404, "template_not_found"),
        ({"temperature": 3}, 422, "validation_error"),
        ({"model": "sim/error-500"}, 502, "upstream_error"),
        ({"model": "late"}, 504, "gateway_timeout"),
    ],
    ids=["model", "template", "field", "provider", "time-out"],
)
def test_errors(client, fields, status, code):
    with pytest.raises(MeshAPIError) as caught:
        client.chat.completions.create(ask(**fields))
    error = caught.value
    assert (error.status, error.error_code) == (status, code)
    assert error.request_id.startswith("req_")
    assert (status == 422) == bool(error.details)


def test_no_credit(caller):
    poor = caller.site.key(credit="0")
    with (
        MeshAPI(base_url=caller.site.base_url.removesuffix("/v1"), token=poor.secret) as client,
        pytest.raises(MeshAPIError) as caught,
    ):
        client.chat.completions.create(ask())
    assert (caught.value.status, caught.value.error_code) == (402, "insufficient_credits")


def test_stream_that_fails_raises(client):
    with pytest.raises(MeshAPIError) as caught:
        list(client.chat.completions.stream(ask(model="sim/die-mid-stream")))
    assert caught.value.error_code == "upstream_error"
