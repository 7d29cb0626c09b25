"""What the simulated provider refuses, in OpenAI's words, and what only OpenRouter would understand."""

import json

import openai
import pytest
from aiohttp import ClientSession

from meshproxy.simulator import SimulatorSettings, start

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "clock"}}
CHAT = "/v1/chat/completions"


async def refusal(http, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post(CHAT, data=data, headers=headers) as answer:
        return answer.status, json.loads(await answer.read())["error"]


@pytest.mark.parametrize(
    "fields, param, code",
    [
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
        ({"model": None}, None, None),
        ({"model": 4}, "model", "invalid_type"),
        ({"model": "sim/unheard-of"}, None, "model_not_found"),
        ({"model": "sim/error-200"}, None, "model_not_found"),
        ({"model": "sim/fast?tokens=many"}, "model", None),
        ({"model": "sim/fast?colour=red"}, "model", None),
        ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
        ({"temperature": -1}, "temperature", "decimal_below_min_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_p": 1.1}, "top_p", "decimal_above_max_value"),
        ({"frequency_penalty": -3}, "frequency_penalty", "decimal_below_min_value"),
        ({"n": 129}, "n", "integer_above_max_value"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "invalid_parameter_combination"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"stop": [1]}, "stop[0]", "invalid_type"),
        ({"stop": list("abcde")}, "stop", "array_above_max_length"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "invalid_type"),
        ({"tool_choice": "auto"}, "tool_choice", None),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "invalid_value"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
            None,
        ),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"allOf": [7]}}}},
            "response_format",
            "invalid_schema",
        ),
        ({"template": "greeting"}, "template", "unknown_parameter"),
        ({"variables": {}}, "variables", "unknown_parameter"),
        ({"session_id": "s"}, "session_id", "unknown_parameter"),
        ({"transforms": ["middle-out"]}, "transforms", "unknown_parameter"),
        ({"models": ["gpt-4o"]}, "models", "unknown_parameter"),
    ],
)
async def test_bad_fields_are_refused_as_openai_does(http, fields, param, code):
    status, error = await refusal(http, {"model": "sim/fast", "messages": HELLO, **fields})
    expected = 404 if code == "model_not_found" else 400
    assert (
        status,
        error["type"],
        error["param"],
        error["code"],
    ) == (expected, "invalid_request_error", param, code)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b'{"model":"\xed\xa0\x80"}'],
)
async def test_a_body_that_is_no_json_object(http, body):
    status, error = await refusal(http, body)
    assert (status, error["message"].startswith("We could not parse the JSON body")) == (400, True)


async def test_fields_that_nobody_knows_yet_are_let_through(http):
    async with http.post(CHAT, json={"model": "sim/fast", "messages": HELLO, "from_the_future": [1]}) as answer:
        assert answer.status == 200


async def test_an_unknown_fault_header_is_refused(http):
    status, error = await refusal(http, {"model": "m", "messages": HELLO}, **{"x-sim-fault": "no-such"})
    assert (status, error["param"]) == (400, "x-sim-fault")


async def test_the_sdk_sees_its_own_error_classes(sdk):
    with pytest.raises(openai.BadRequestError):
        await sdk.chat.completions.create(model="sim/fast", messages=HELLO, temperature=3)
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.chat.completions.create(model="sim/unheard-of", messages=HELLO)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "method, path, status, code",
    [("GET", "/v2/x", 404, "unknown_url"), ("GET", CHAT, 405, "method_not_supported")],
)
async def test_paths_and_methods(http, method, path, status, code):
    async with http.request(method, path) as answer:
        error = json.loads(await answer.read())["error"]
    assert (answer.status, error["code"]) == (status, code)


@pytest.fixture
async def strict():
    settings = SimulatorSettings(api_key="sk-right", openrouter=True, max_body_bytes=1000)
    running = await start(settings=settings)
    async with ClientSession(running.base_url.removesuffix("/v1")) as session:
        yield session
    await running.close()


@pytest.mark.parametrize(
    "authorization, code",
    [({}, None), ({"authorization": "Basic x"}, None), ({"authorization": "Bearer sk-wrong"}, "invalid_api_key")],
)
async def test_a_key_is_asked_for_where_there_is_one(strict, authorization, code):
    status, error = await refusal(strict, {}, **authorization)
    assert (status, error["code"]) == (401, code)
    async with strict.get("/v1/models", headers=authorization) as answer:
        assert answer.status == 401


RIGHT = {"authorization": "Bearer sk-right"}


async def test_a_body_that_is_too_large(strict):
    status, error = await refusal(strict, b"x" * 2000, **RIGHT)
    assert (status, error["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    "model, models, served",
    [
        ("sim/error-500", ["sim/refuse", "sim/unheard-of", "sim/fast", "gpt-4o"], "sim/fast"),
        ("sim/fast", ["sim/error-500"], "sim/fast"),
        ("sim/fail-first-1", ["sim/fast"], "sim/fast"),
    ],
)
async def test_openrouter_falls_back_to_the_first_that_serves(strict, model, models, served):
    body = {"model": model, "models": models, "transforms": [], "messages": HELLO}
    async with strict.post(CHAT, json=body, headers=RIGHT) as answer:
        assert (answer.status, (await answer.json())["model"]) == (200, served)


async def test_when_every_model_fails_the_last_one_is_heard(strict):
    status, _ = await refusal(
        strict, {"model": "sim/error-500", "models": ["sim/error-529"], "messages": HELLO}, **RIGHT
    )
    assert status == 529


async def test_templates_are_unknown_to_openrouter_too(strict):
    status, error = await refusal(strict, {"model": "m", "template": "t", "messages": HELLO}, **RIGHT)
    assert (status, error["param"]) == (400, "template")


async def test_openrouter_can_be_asked_for_by_header(http):
    body = {"model": "sim/error-500", "models": ["sim/fast"], "messages": HELLO}
    async with http.post(CHAT, json=body, headers={"x-sim-kind": "openrouter"}) as answer:
        assert answer.status == 200
