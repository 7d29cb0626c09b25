"""Mesh's own SDK (`meshapi` on PyPI), for those who come from the hosted API: its base URL has no /v1."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

meshapi = pytest.importorskip("meshapi", reason="meshapi is not installed")

from meshapi import (  # noqa: E402 - after the skip
    ChatCompletionParams,
    ChatMessage,
    CreateTemplateParams,
    MeshAPI,
    MeshAPIError,
    UpdateTemplateParams,
)


def ask(words: str = "Hello there", **fields: Any) -> ChatCompletionParams:
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
    assert ("length", 5) == (reply.choices[0].finish_reason, reply.usage.completion_tokens)


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
    assert (caller.account, False, ["who"]) == (made.owner, made.is_global, made.variables)
    changed = client.templates.update(made.id, UpdateTemplateParams(system="You help {{ whom }}."))
    assert ["whom"] == changed.variables == client.templates.get("support").variables
    assert [made.id] == [template.id for template in client.templates.list()]
    client.chat.completions.create(ask(template="support", variables={"whom": "Ada"}, session_id="s-1"))
    assert "You help Ada." == caller.sent["messages"][0]["content"]
    client.templates.delete(made.id)
    assert [] == client.templates.list()


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
    assert (status, code) == (error.status, error.error_code)
    assert error.request_id.startswith("req_")
    assert (status == 422) == bool(error.details)


def test_no_credit(caller):
    poor = caller.site.key(credit="0")
    with (
        MeshAPI(base_url=caller.site.base_url.removesuffix("/v1"), token=poor.secret) as client,
        pytest.raises(MeshAPIError) as caught,
    ):
        client.chat.completions.create(ask())
    assert (402, "insufficient_credits") == (caught.value.status, caught.value.error_code)


def test_stream_that_fails_raises(client):
    with pytest.raises(MeshAPIError) as caught:
        list(client.chat.completions.stream(ask(model="sim/die-mid-stream")))
    assert "upstream_error" == caught.value.error_code
