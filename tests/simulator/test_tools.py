"""When the simulated model calls a tool, and with what."""

import json

import pytest

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASK = [{"role": "user", "content": "Please get_weather for me"}]
HELLO = [{"role": "user", "content": "Hello"}]
MODEL = "sim/fast"


async def names(sdk, messages, **wanted):
    answer = await sdk.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER, CLOCK], **wanted)
    return [call.function.name for call in answer.choices[0].message.tool_calls or []]


@pytest.mark.parametrize(
    "messages, wanted, expected",
    [
        (ASK, {}, ["get_weather"]),
        (HELLO, {}, []),
        (ASK, {"tool_choice": "none"}, []),
        (HELLO, {"tool_choice": "required"}, ["get_weather"]),
        (HELLO, {"tool_choice": {"type": "function", "function": {"name": "clock"}}}, ["clock"]),
        ([{"role": "user", "content": "get weather by the clock"}], {}, ["get_weather", "clock"]),
        ([{"role": "user", "content": "get weather, clock"}], {"parallel_tool_calls": False}, ["get_weather"]),
        ([*ASK, {"role": "tool", "tool_call_id": "call_1", "content": "21"}], {}, []),
    ],
)
async def test_which_tool_is_called(sdk, messages, wanted, expected):
    assert await names(sdk, messages, **wanted) == expected


async def test_arguments_fit_the_tools_schema(sdk):
    answer = await sdk.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER])
    call = answer.choices[0].message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}
    assert arguments["unit"] in {"celsius", "fahrenheit"}
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None)


async def test_a_forced_call_finishes_with_stop_as_openais_does(sdk):
    forced = {"type": "function", "function": {"name": "clock"}}
    answer = await sdk.chat.completions.create(model=MODEL, messages=HELLO, tools=[CLOCK], tool_choice=forced)
    assert answer.choices[0].finish_reason == "stop"


async def test_arguments_are_streamed_in_pieces_that_the_sdk_puts_together(sdk):
    async with sdk.chat.completions.stream(
        model=MODEL, messages=ASK, tools=[WEATHER], stream_options={"include_usage": True}
    ) as stream:
        pieces = [event async for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = await stream.get_final_completion()
    call = final.choices[0].message.tool_calls[0]
    assert set(json.loads(call.function.arguments)) == {"city", "unit"}
    assert (
        call.id.startswith("call_"),
        call.function.name,
        final.choices[0].finish_reason,
    ) == (True, "get_weather", "tool_calls")
    assert len(pieces) == final.usage.completion_tokens + 1


async def test_a_cap_cuts_arguments_short(sdk):
    answer = await sdk.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER], max_tokens=2)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 2)
