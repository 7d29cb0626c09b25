import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.config import Model, Route
from meshproxy.policy.pricing import Price, affordable_output, cost, hold_amount, price_of
from meshproxy.wire.usage import Usage

USD = 1_000_000_000
GPT_4O = Price(
    input=2_500_000_000,
    output=10_000_000_000,
    cached=1_250_000_000,
    cache_write=3_000_000_000,
    reasoning=12_000_000_000,
    audio_input=40_000_000_000,
    audio_output=80_000_000_000,
)


def model(**prices):
    defaults = {"input_usd_per_mtok": "2.50", "output_usd_per_mtok": "10"}
    return Model(upstreams=[Route(upstream="a", model="b")], **{**defaults, **prices})


def test_a_part_without_a_price_costs_what_its_whole_costs():
    expected = Price(
        input=2_500_000_000,
        output=10_000_000_000,
        cached=2_500_000_000,
        cache_write=2_500_000_000,
        reasoning=10_000_000_000,
        audio_input=2_500_000_000,
        audio_output=10_000_000_000,
    )
    assert expected == price_of(model())


def test_a_part_with_a_price_costs_that():
    own = model(
        cached_input_usd_per_mtok="1.25",
        cache_write_usd_per_mtok="3",
        reasoning_usd_per_mtok="12",
        audio_input_usd_per_mtok="40.0",
        audio_output_usd_per_mtok="80.000000000",
    )
    assert GPT_4O == price_of(own)


def test_the_smallest_price_is_a_nanodollar_for_a_million_tokens():
    assert price_of(model(input_usd_per_mtok="0.000000001")).input == 1


@pytest.mark.parametrize(
    "usage, expected",
    [
        (Usage(), 0),
        (Usage(prompt=1_000_000), 2_500_000_000),
        (Usage(completion=1_000_000), 10_000_000_000),
        (Usage(prompt=1), 2500),
        (Usage(prompt=1000, completion=100), 3_500_000),
        (Usage(prompt=1000, cached=400), 600 * 2500 + 400 * 1250),
        (Usage(prompt=1000, cached=1000), 1000 * 1250),
        (Usage(prompt=1000, cached=400, cache_write=500), 100 * 2500 + 400 * 1250 + 500 * 3000),
        (Usage(prompt=1000, audio_prompt=10), 990 * 2500 + 10 * 40_000),
        (Usage(completion=100, reasoning=60), 40 * 10_000 + 60 * 12_000),
        (Usage(completion=100, audio_completion=60), 40 * 10_000 + 60 * 80_000),
        (Usage(prompt=100, cached=80, audio_prompt=80), 80 * 1250 + 20 * 40_000),
        (Usage(prompt=100, cached=100, cache_write=100, audio_prompt=100), 100 * 1250),
    ],
)
def test_cost(usage, expected):
    assert expected == cost(GPT_4O, usage)


@pytest.mark.parametrize("tokens, expected", [(0, 0), (1, 1), (999_999, 1), (1_000_000, 1), (1_000_001, 2)])
def test_cost_is_rounded_up_once(tokens, expected):
    penny = Price(input=1, output=1, cached=1, cache_write=1, reasoning=1, audio_input=1, audio_output=1)
    assert expected == cost(penny, Usage(prompt=tokens // 2, completion=tokens - tokens // 2))


amounts = st.integers(0, 10**9)
prices = st.builds(Price, *[st.integers(0, 10**12)] * 7)
usages = st.builds(Usage, *[amounts] * 8)


@given(prices, usages, amounts, amounts)
def test_a_hold_bounds_the_cost_of_any_split(price, usage, more_prompt, more_output):
    assert hold_amount(price, usage.prompt + more_prompt, usage.completion + more_output) >= cost(price, usage)


@given(prices, usages)
def test_cost_is_at_least_the_cheapest_of_every_token(price, usage):
    prompt = usage.prompt * min(price.input, price.cached, price.cache_write, price.audio_input)
    completion = usage.completion * min(price.output, price.reasoning, price.audio_output)
    assert cost(price, usage) * 1_000_000 >= prompt + completion


@given(st.builds(Price, *[st.just(7)] * 7), usages)
def test_one_price_for_all_makes_the_split_immaterial(price, usage):
    assert hold_amount(price, usage.prompt, usage.completion) == cost(price, usage)


def test_hold_amount():
    assert 1000 * 40_000 + 100 * 80_000 == hold_amount(GPT_4O, 1000, 100)


FREE_OUTPUT = Price(input=1, output=0, cached=1, cache_write=1, reasoning=0, audio_input=1, audio_output=0)


@pytest.mark.parametrize(
    "price, prompt_tokens, amount_nusd, expected",
    [
        (GPT_4O, 0, 0, 0),
        (GPT_4O, 10, 399_999, 0),
        (GPT_4O, 10, 400_000, 0),
        (GPT_4O, 10, 479_999, 0),
        (GPT_4O, 10, 480_000, 1),
        (GPT_4O, 10, 640_001, 3),
        (FREE_OUTPUT, 1_000_001, 1, 0),
        (FREE_OUTPUT, 1_000_000, 1, 2_147_483_647),
    ],
)
def test_affordable_output(price, prompt_tokens, amount_nusd, expected):
    assert expected == affordable_output(price, prompt_tokens, amount_nusd)


@given(st.builds(Price, *[st.integers(1, 10**12)] * 7), st.integers(0, 10**6), st.integers(0, 10**15))
def test_what_is_affordable_can_be_held_and_one_token_more_cannot(price, prompt_tokens, amount_nusd):
    tokens = affordable_output(price, prompt_tokens, amount_nusd)
    assert tokens == 0 or hold_amount(price, prompt_tokens, tokens) <= amount_nusd
    assert hold_amount(price, prompt_tokens, tokens + 1) > amount_nusd
