"""Credit that is short of what a request may cost: refused, or where clamping is asked for, capped to what there is."""

import asyncio
import json

import openai
import pytest

from tests.harness.clients import HELLO

CREDIT = "0.0002"  # the prompt's hold of some 20 tokens at 2,500 nano-USD, and some 15 tokens of output at 10,000


async def test_without_clamping_it_is_refused(mesh):
    caller = await mesh.key(credit=CREDIT)
    answer = await mesh.chat(caller, model="sim/plain", max_tokens=500)
    assert (answer.status, answer.code) == (402, "insufficient_credits")
    assert "x-mesh-max-tokens" not in answer.headers


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_the_cap_is_lowered_to_what_the_account_can_pay_and_told(mesh, field):
    caller = await mesh.key(credit=CREDIT, clamp=True)
    answer = await mesh.chat(caller, model="sim/plain", **{field: 500})
    cap = int(answer.headers["x-mesh-max-tokens"])
    assert answer.status == 200
    assert 0 < cap < 500
    assert mesh.sent["max_tokens"] == cap
    balance = await mesh.balance(caller)
    assert balance.available_nusd >= 0
    assert balance.settled_nusd > 0


async def test_a_stream_is_cut_to_what_the_account_can_pay(mesh):
    caller = await mesh.key(credit=CREDIT, clamp=True)
    stream = await mesh.sdk(caller).chat.completions.with_raw_response.create(
        model="sim/plain", messages=HELLO, max_tokens=500, stream=True
    )
    cap = int(stream.headers["x-mesh-max-tokens"])
    chunks = [chunk async for chunk in stream.parse()]
    assert chunks[-1].choices[0].finish_reason is not None
    assert mesh.sent["max_tokens"] == cap
    assert 0 < cap < 20
    assert (await mesh.balance(caller)).available_nusd >= 0


async def test_what_can_be_paid_in_full_is_left_as_it_is(mesh):
    caller = await mesh.key(clamp=True)
    answer = await mesh.chat(caller, model="sim/plain", max_tokens=500)
    assert (answer.status, mesh.sent["max_tokens"]) == (200, 500)
    assert "x-mesh-max-tokens" not in answer.headers


async def test_who_cant_pay_for_the_prompt_is_refused_all_the_same(mesh):
    caller = await mesh.key(credit="0.00001", clamp=True)
    with pytest.raises(openai.APIStatusError) as caught:
        await mesh.sdk(caller).chat.completions.create(model="sim/plain", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (402, "insufficient_credits")


async def test_the_configuration_clamps_for_keys_that_dont_say(start_mesh):
    mesh = await start_mesh(credits={"clamp": True})
    willing, unwilling = await mesh.key(credit=CREDIT), await mesh.key(credit=CREDIT, clamp=False)
    assert (await mesh.chat(willing, model="sim/plain", max_tokens=500)).status == 200
    assert (await mesh.chat(unwilling, model="sim/plain", max_tokens=500)).status == 402


async def test_without_a_cap_a_short_account_gets_one_and_is_told(mesh):
    caller = await mesh.key(credit="0.01")
    answer = await mesh.chat(caller, model="sim/plain")
    assert (answer.status, int(answer.headers["x-mesh-max-tokens"])) == (200, 495)
    assert mesh.sent["max_tokens"] == 495
    assert (await mesh.balance(caller)).available_nusd >= 0


async def test_an_account_that_can_barely_pay_is_told_the_models_own_cap(mesh):
    caller = await mesh.key(credit="0.20")
    answer = await mesh.chat(caller, model="sim/plain")
    assert answer.headers["x-mesh-max-tokens"] == "16384"
    assert mesh.sent["max_tokens"] == 16384


async def test_a_cap_above_the_models_own_is_lowered_where_credit_is_short(mesh):
    rich, poor = await mesh.key(), await mesh.key(credit="0.30")
    assert "x-mesh-max-tokens" not in (await mesh.chat(rich, model="sim/plain", max_tokens=100_000)).headers
    answer = await mesh.chat(poor, model="sim/plain", max_tokens=100_000)
    assert answer.headers["x-mesh-max-tokens"] == "16384"
    assert [json.loads(entry.raw_body)["max_tokens"] for entry in mesh.received] == [100_000, 16_384]


async def test_a_stream_with_hidden_reasoning_is_held_whole(mesh):
    caller = await mesh.key(credit="0.01")
    stream = await mesh.stream(caller, model="sim/plain", reasoning={"exclude": True})
    assert (stream.status, stream.headers["x-mesh-max-tokens"]) == (200, "494")
    assert mesh.sent["max_tokens"] == 494


async def test_an_account_has_room_for_many_whole_answers_at_once(mesh):
    caller = await mesh.key(credit="5.00")
    answers = await asyncio.gather(*(mesh.chat(caller, model="sim/plain") for _ in range(10)))
    assert [answer.status for answer in answers] == [200] * 10
    assert [answer for answer in answers if "x-mesh-max-tokens" in answer.headers] == []


async def test_caps_of_two_names_overdraw_nothing(mesh):
    caller = await mesh.key(credit="0.01")
    caps = {"max_completion_tokens": 1, "max_tokens": 16_384}
    answers = await asyncio.gather(*(mesh.chat(caller, model="sim/plain", **caps) for _ in range(50)))
    assert {answer.status for answer in answers} == {200}
    assert {json.loads(entry.raw_body)["max_tokens"] for entry in mesh.received} == {1}
    assert (await mesh.balance(caller)).available_nusd >= 0
