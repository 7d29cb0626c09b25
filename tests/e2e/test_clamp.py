"""Credit that is short of what a request may cost: refused, or where clamping is asked for, capped to what there is."""

import openai
import pytest

from tests.conftest import HELLO

CREDIT = "0.0002"  # the prompt's hold of some 20 tokens at 2,500 nano-USD, and some 15 tokens of output at 10,000


async def test_without_clamping_it_is_refused(mesh):
    caller = await mesh.key(credit=CREDIT)
    answer = await mesh.chat(caller, model="sim/plain", max_tokens=500)
    assert (402, "insufficient_credits") == (answer.status, answer.code)
    assert "x-mesh-max-tokens" not in answer.headers


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_the_cap_is_lowered_to_what_the_account_can_pay_and_told(mesh, field):
    caller = await mesh.key(credit=CREDIT, clamp=True)
    answer = await mesh.chat(caller, model="sim/plain", **{field: 500})
    cap = int(answer.headers["x-mesh-max-tokens"])
    assert 200 == answer.status
    assert 0 < cap < 500
    assert cap == mesh.sent[field]
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
    assert cap == mesh.sent["max_tokens"]
    assert 0 < cap < 20
    assert (await mesh.balance(caller)).available_nusd >= 0


async def test_what_can_be_paid_in_full_is_left_as_it_is(mesh):
    caller = await mesh.key(clamp=True)
    answer = await mesh.chat(caller, model="sim/plain", max_tokens=500)
    assert (200, 500) == (answer.status, mesh.sent["max_tokens"])
    assert "x-mesh-max-tokens" not in answer.headers


async def test_who_cant_pay_for_the_prompt_is_refused_all_the_same(mesh):
    caller = await mesh.key(credit="0.00001", clamp=True)
    with pytest.raises(openai.APIStatusError) as caught:
        await mesh.sdk(caller).chat.completions.create(model="sim/plain", messages=HELLO)
    assert (402, "insufficient_credits") == (caught.value.status_code, caught.value.code)


async def test_the_configuration_clamps_for_keys_that_dont_say(start_mesh):
    mesh = await start_mesh(credits={"clamp": True})
    willing, unwilling = await mesh.key(credit=CREDIT), await mesh.key(credit=CREDIT, clamp=False)
    assert 200 == (await mesh.chat(willing, model="sim/plain", max_tokens=500)).status
    assert 402 == (await mesh.chat(unwilling, model="sim/plain", max_tokens=500)).status
