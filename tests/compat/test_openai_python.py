"""OpenAI's SDK for Python, as an application developer uses it: only the base URL and the key are ours."""

import json
import time
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from meshproxy.policy.principal import Limits
from meshproxy.units import parse_usd
from tests.harness.waiting import wait_until

HELLO = [{"role": "user", "content": "Hello there"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ASK_WEATHER = [{"role": "user", "content": "Use get_weather for Oslo."}]


class Person(BaseModel):
    name: str
    age: int
    tags: list[str]


@pytest.fixture
def client(caller) -> Iterator[OpenAI]:
    """Without retries, so that each test sees the first answer."""
    with OpenAI(base_url=caller.site.base_url, api_key=caller.secret, max_retries=0) as client:
        yield client


def test_unary(client, caller):
    completion = client.chat.completions.create(model="openai/gpt-4o", messages=HELLO, seed=7)
    (choice,) = completion.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert "Hello there" in choice.message.content
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens * 2_500 + usage.completion_tokens * 10_000 == caller.settled().settled_nusd


def test_many_choices(client):
    completion = client.chat.completions.create(model="openai/gpt-4o", messages=HELLO, n=3, max_completion_tokens=5)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert [choice.finish_reason for choice in completion.choices] == ["length"] * 3


def test_stream_says_what_the_whole_answer_says(client):
    whole = client.chat.completions.create(model="sim/unicode", messages=HELLO, seed=7)
    stream = client.chat.completions.create(model="sim/unicode", messages=HELLO, seed=7, stream=True)
    chunks = list(stream)
    assert whole.choices[0].message.content == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert {whole.id} == {chunk.id for chunk in chunks}
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_usage_chunk_is_hidden_unless_asked_for(client, caller):
    stream = client.chat.completions.create(model="openai/gpt-4o", messages=HELLO, stream=True)
    assert [chunk for chunk in stream if chunk.usage is not None or not chunk.choices] == []
    assert caller.sent["stream_options"] == {"include_usage": True}
    assert caller.settled().settled_nusd > 0


def test_usage_chunk_when_asked_for(client):
    stream = client.chat.completions.create(
        model="openai/gpt-4o", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert last.choices == []
    assert last.usage.completion_tokens == sum(1 for chunk in chunks if chunk.choices[0].delta.content)


@pytest.mark.parametrize("model", ["sim/comments", "sim/ids", "sim/split", "sim/crlf"])
def test_what_providers_do_to_streams_is_no_trouble_here(client, model):
    whole = client.chat.completions.create(model=model, messages=HELLO, seed=7)
    stream = client.chat.completions.create(model=model, messages=HELLO, seed=7, stream=True)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert whole.choices[0].message.content == said


def test_stream_helper(client):
    with client.chat.completions.stream(model="openai/gpt-4o", messages=HELLO, seed=7) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert final.choices[0].message.content == deltas


def test_tools(client, caller):
    completion = client.chat.completions.create(
        model="openai/gpt-4o", messages=ASK_WEATHER, tools=[WEATHER], parallel_tool_calls=False
    )
    (choice,) = completion.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert list(json.loads(call.function.arguments)) == ["city"]
    assert caller.sent["tools"] == [WEATHER]


def test_tool_result_goes_back(client):
    completion = client.chat.completions.create(model="openai/gpt-4o", messages=ASK_WEATHER, tools=[WEATHER])
    (choice,) = completion.choices
    (call,) = choice.message.tool_calls
    answered = client.chat.completions.create(
        model="openai/gpt-4o",
        messages=[*ASK_WEATHER, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "4 °C, rain"}],
        tools=[WEATHER],
    )
    assert answered.choices[0].finish_reason == "stop"


def test_streamed_tool_calls_by_hand(client):
    stream = client.chat.completions.create(
        model="openai/gpt-4o", messages=ASK_WEATHER, tools=[WEATHER], tool_choice="required", stream=True
    )
    calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.function.name for call in calls if call.function.name] == ["get_weather"]
    assert list(json.loads("".join(call.function.arguments or "" for call in calls))) == ["city"]


def test_streamed_tool_calls_by_helper(client):
    with client.chat.completions.stream(model="openai/gpt-4o", messages=ASK_WEATHER, tools=[WEATHER]) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert [call.function.arguments] == [event.arguments for event in done]
    assert call.function.parsed_arguments == json.loads(call.function.arguments)


def test_structured_output(client, caller):
    completion = client.chat.completions.parse(model="openai/gpt-4o", messages=HELLO, response_format=Person)
    assert isinstance(completion.choices[0].message.parsed, Person)
    assert caller.sent["response_format"]["json_schema"]["name"] == "Person"


def test_streamed_structured_output(client):
    with client.chat.completions.stream(model="openai/gpt-4o", messages=HELLO, response_format=Person) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Person)


def test_reasoning_is_passed_on(client):
    completion = client.chat.completions.create(model="sim/reasoning", messages=HELLO, reasoning_effort="low")
    assert completion.choices[0].message.reasoning_content
    assert completion.usage.completion_tokens_details.reasoning_tokens > 0


def test_raw_response_has_our_headers(client):
    raw = client.chat.completions.with_raw_response.create(
        model="falls-over", messages=HELLO, extra_headers={"x-request-id": "mine-1"}
    )
    assert "mine-1" == raw.request_id == raw.parse()._request_id  # noqa: SLF001 - public, OpenAI's README says
    assert (raw.headers["x-mesh-model"], raw.headers["x-mesh-attempts"]) == ("falls-over", "2")
    assert float(raw.headers["x-mesh-cost"]) > 0
    assert tuple(raw.headers[f"x-ratelimit-{what}-requests"] for what in ("limit", "remaining")) == ("600", "599")
    assert {
        name.split("-")[2] for name in raw.headers if name.startswith("x-ratelimit-") and name.endswith("-tokens")
    } == {"limit", "remaining", "reset"}


def test_streaming_response(client):
    with client.chat.completions.with_streaming_response.create(
        model="openai/gpt-4o", messages=HELLO, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert lines[-1] == "data: [DONE]"
    assert response.request_id


def test_models(client):
    ids = [model.id for model in client.models.list()]
    assert {"openai/gpt-4o", "vendor/family/model:free"} <= set(ids)


@pytest.mark.parametrize("name", ["openai/gpt-4o", "vendor/family/model:free", "gone"])
def test_model_by_a_name_with_slashes(client, name):
    assert ((model := client.models.retrieve(name)).id, model.object) == (name, "model")


def test_template_and_session_in_extra_body(client, caller):
    caller.site.put_template(
        caller.account, name="greeter", messages=[{"role": "user", "content": "Greet {{ name }}."}], model="sim/unicode"
    )
    completion = client.chat.completions.create(
        model=None,
        messages=[],
        extra_body={
            "template": "greeter",
            "variables": {"name": "Ada"},
            "session_id": "s-1",
            "transforms": ["middle-out"],
        },
    )
    assert completion.model == "sim/unicode"
    assert {
        "model": "sim/unicode",
        "messages": [{"role": "user", "content": "Greet Ada."}],
    }.items() <= caller.sent.items()
    assert not {"template", "variables", "session_id", "transforms", "models"} & caller.sent.keys()
    caller.settled()
    usage = client.get("/usage", cast_to=object, options={"params": {"group_by": "session_id"}})
    assert [row["session_id"] for row in usage["data"]] == ["s-1"]


def test_fallback_models_in_extra_body(client):
    raw = client.chat.completions.with_raw_response.create(
        model="gone", messages=HELLO, extra_body={"models": ["openai/gpt-4o"]}
    )
    assert (raw.headers["x-mesh-model"], raw.headers["x-mesh-attempts"]) == ("openai/gpt-4o", "2")


ERRORS = [
    ({"model": "nobody/knows"}, openai.NotFoundError, 404, "model_not_found"),
    ({"extra_body": {"template": "nobody-knows"}}, openai.NotFoundError, 404, "template_not_found"),
    ({"temperature": 3}, openai.UnprocessableEntityError, 422, "validation_error"),
    ({"messages": []}, openai.UnprocessableEntityError, 422, "validation_error"),
    ({"model": "sim/error-400"}, openai.BadRequestError, 400, "provider_refused"),
    ({"user": "u" * 1_048_576}, openai.APIStatusError, 413, "request_too_large"),
    ({"extra_headers": {"content-type": "text/plain"}}, openai.APIStatusError, 415, "unsupported_media_type"),
    ({"model": "sim/error-500"}, openai.InternalServerError, 502, "upstream_error"),
    ({"model": "gone"}, openai.InternalServerError, 502, "upstream_error"),
    ({"model": "sim/error-429"}, openai.InternalServerError, 503, "provider_not_available"),
    ({"model": "late"}, openai.InternalServerError, 504, "gateway_timeout"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize(
    ("fields", "kind", "status", "code"), ERRORS, ids=[f"{e[2]}-{i}" for i, e in enumerate(ERRORS)]
)
def test_errors(client, caller, fields, kind, status, code, stream):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "openai/gpt-4o", "messages": HELLO, "stream": stream, **fields})
    error = caught.value
    assert (type(error), error.status_code, error.code) == (kind, status, code)
    assert error.request_id == error.response.headers["x-request-id"] == error.body["request_id"]
    assert error.body["message"] in str(error)
    assert caller.settled().settled_nusd == 0


def test_error_tells_the_field(client):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model="openai/gpt-4o", messages=HELLO, temperature=3, top_p=2)
    error = caught.value
    assert (error.param, error.type) == ("temperature", "invalid_request_error")
    assert [detail["loc"] for detail in error.body["details"]] == [["body", "temperature"], ["body", "top_p"]]


@pytest.mark.parametrize("secret", ["sk-not-ours", "rsk_unknown"])
def test_wrong_key(caller, secret):
    with (
        OpenAI(base_url=caller.site.base_url, api_key=secret, max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert (caught.value.status_code, caught.value.code) == (401, "unauthorized")


def test_model_not_for_this_key(caller):
    other = caller.site.key(models=["gone"])
    with (
        OpenAI(base_url=caller.site.base_url, api_key=other.secret, max_retries=0) as client,
        pytest.raises(openai.PermissionDeniedError) as caught,
    ):
        client.chat.completions.create(model="openai/gpt-4o", messages=HELLO)
    assert caught.value.code == "forbidden"


def test_no_credit_is_not_retried(caller):
    poor = caller.site.key(credit="0")
    with (
        OpenAI(base_url=caller.site.base_url, api_key=poor.secret) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.chat.completions.create(model="openai/gpt-4o", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (402, "insufficient_credits")
    assert caught.value.request.headers["x-stainless-retry-count"] == "0"


def test_rate_limit(caller):
    limited = caller.site.key(limits=Limits(requests_per_minute=1, burst=1))
    with OpenAI(base_url=caller.site.base_url, api_key=limited.secret, max_retries=0) as client:
        client.chat.completions.create(model="openai/gpt-4o", messages=HELLO)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="openai/gpt-4o", messages=HELLO)
    error = caught.value
    assert error.code == "rate_limit_exceeded"
    exact_s = int(error.response.headers["retry-after-ms"]) / 1000
    assert 59 < exact_s <= 60 == error.body["retry_after_seconds"] == int(error.response.headers["retry-after"])
    limited.settled()


def test_rate_limit_is_waited_for_exactly_as_told(caller, monkeypatch):
    """600 a minute, one at once: a tenth of a second, which the SDK wouldn't guess (it begins at half a second)."""
    limited = caller.site.key(limits=Limits(requests_per_minute=600, burst=1))
    waits, sleep = [], time.sleep  # noqa: TID251 - the SDK's
    with OpenAI(base_url=caller.site.base_url, api_key=limited.secret, max_retries=2) as client:
        client.chat.completions.create(model="openai/gpt-4o", messages=HELLO)
        monkeypatch.setattr(time, "sleep", lambda seconds: (waits.append(seconds), sleep(seconds)))
        raw = client.chat.completions.with_raw_response.create(model="openai/gpt-4o", messages=HELLO)
        monkeypatch.undo()
    assert 1 == raw.retries_taken == len(waits)
    assert 0 < waits[0] <= 0.1
    limited.settled()


def test_retry_where_nothing_was_done(client):
    """503 from a provider that took no work on: the SDK's own retry gets the answer."""
    raw = client.with_options(max_retries=1).chat.completions.with_raw_response.create(
        model="sim/fail-first-1", messages=HELLO
    )
    assert raw.retries_taken == 1


def test_no_retry_where_it_would_pay_twice(client, caller):
    """A 5xx after a provider may have worked says x-should-retry: false, and the SDK obeys."""
    with pytest.raises(openai.InternalServerError) as caught:
        client.with_options(max_retries=3).chat.completions.create(model="late", messages=HELLO)
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(caller.site.received) == 1


def test_idempotency_key_answers_twice_and_charges_once(client, caller):
    def ask(words: str):
        return client.chat.completions.with_raw_response.create(
            model="openai/gpt-4o",
            messages=[{"role": "user", "content": words}],
            extra_headers={"idempotency-key": "once"},
        )

    first, again = ask("Hello"), ask("Hello")
    assert first.content == again.content
    assert tuple(raw.headers.get("idempotent-replayed") for raw in (first, again)) == (None, "true")
    with pytest.raises(openai.ConflictError) as caught:
        ask("Something else")
    assert caught.value.code == "idempotency_conflict"
    assert len(caller.site.received) == 1


def test_with_an_idempotency_key_the_sdk_asks_until_the_answer_is_there(client, caller):
    raw = client.with_options(timeout=1.5, max_retries=2).chat.completions.with_raw_response.create(
        model="begins-late", messages=HELLO, extra_headers={"idempotency-key": "impatient"}
    )
    assert (raw.retries_taken > 0, raw.headers["idempotent-replayed"]) == (True, "true")
    assert len(caller.site.received) == 1
    assert parse_usd(raw.headers["x-mesh-cost"]) == caller.settled().settled_nusd


def test_repeats_of_a_running_request_keep_their_own_timeout(client, caller):
    """The provider needs two seconds. Who gives it 0.2 is told so each time, until the answer is there, which is charged once."""

    def ask() -> int:
        try:
            client.chat.completions.create(
                model="begins-late",
                messages=HELLO,
                extra_body={"timeout": 0.2},
                extra_headers={"idempotency-key": "patient"},
            )
        except openai.InternalServerError as error:
            return error.status_code
        return 200

    assert [ask(), ask()] == [504, 504]
    wait_until(lambda: ask() == 200)
    assert len(caller.site.received) == 1


@pytest.mark.parametrize("model", ["sim/error-mid-stream", "sim/die-mid-stream"])
def test_stream_that_fails_raises(client, model):
    stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert (type(caught.value), caught.value.code) == (openai.APIError, "upstream_error")
    assert stream.response.headers["x-request-id"] == caught.value.body["request_id"]


def test_closing_a_stream_frees_the_provider(client, caller):
    stream = client.chat.completions.create(model="sim/slow", messages=HELLO, stream=True)
    next(iter(stream))
    stream.close()
    (entry,) = caller.site.received
    wait_until(lambda: entry.ended == "client_closed")
    assert entry.tokens < 5


def test_client_that_runs_out_of_patience(client, caller):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(model="sim/stall", messages=HELLO)
    (entry,) = caller.site.received
    wait_until(lambda: entry.ended == "client_closed")
