from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.config import Model, PriceTier, Route, ServiceTier
from meshproxy.openai.usage import Usage
from meshproxy.policy.pricing import Price, affordable_output, billed_price, cost, hold_amount, price_of, service_prices

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
    assert price_of(model()) == expected


def test_a_part_with_a_price_costs_that():
    own = model(
        cached_input_usd_per_mtok="1.25",
        cache_write_usd_per_mtok="3",
        reasoning_usd_per_mtok="12",
        audio_input_usd_per_mtok="40.0",
        audio_output_usd_per_mtok="80.000000000",
    )
    assert price_of(own) == GPT_4O


def test_an_hour_of_cache_a_fee_tiers_and_a_markup():
    tier = PriceTier(above_prompt_tokens=200_000, input_usd_per_mtok="5", output_usd_per_mtok="15")
    own = model(
        cache_write_1h_usd_per_mtok="5", request_usd="0.01", cost_from="usage.cost", markup="1.05", price_tiers=[tier]
    )
    fee = {"request": 10_000_000, "markup": 1_050_000_000}
    dear = Price(5 * USD, 15 * USD, 5 * USD, 5 * USD, 15 * USD, 5 * USD, 15 * USD, **fee)
    low, high = 2_500_000_000, 10 * USD
    expected = Price(low, high, low, low, high, low, high, 5 * USD, tiers=((200_000, dear),), **fee)
    assert price_of(own) == expected


def test_the_prices_of_a_service_tier():
    tier = PriceTier(above_prompt_tokens=9, input_usd_per_mtok="5", output_usd_per_mtok="15")
    flex = ServiceTier(input_usd_per_mtok="1", output_usd_per_mtok="2", price_tiers=[tier])
    ((name, price),) = service_prices(model(service_tiers={"flex": flex}, request_usd="0.01"))
    assert (name, price.input, price.request, price.for_prompt_of(10).input) == ("flex", USD, 10_000_000, 5 * USD)


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
    assert cost(GPT_4O, usage) == expected


TIERED = Price(1, 2, 1, 1, 2, 1, 2, tiers=((100, Price(*[10] * 7)), (200, Price(*[7] * 7))))


@pytest.mark.parametrize("prompt, expected", [(0, 1), (100, 1), (101, 10), (200, 10), (201, 7), (10**6, 7)])
def test_the_largest_tier_below_the_prompt_counts(prompt, expected):
    assert TIERED.for_prompt_of(prompt).input == expected


def test_a_tier_is_for_the_whole_request():
    tiered = msgspec.structs.replace(GPT_4O, tiers=((1000, Price(*[USD] * 7)),))
    assert cost(tiered, Usage(prompt=1001, completion=100)) == (1001 + 100) * 1000
    assert cost(tiered, Usage(prompt=1000, completion=100)) == 1000 * 2500 + 100 * 10_000


@pytest.mark.parametrize(
    "usage, expected",
    [
        (Usage(prompt=1000, cache_write=500, cache_write_1h=200), 500 * 2500 + 300 * 3000 + 200 * 5000),
        (Usage(prompt=1000, cache_write=500, cache_write_1h=500), 500 * 2500 + 500 * 5000),
    ],
)
def test_what_is_kept_for_an_hour_has_its_own_price(usage, expected):
    assert cost(msgspec.structs.replace(GPT_4O, cache_write_1h=5 * USD), usage) == expected
    assert cost(GPT_4O, Usage(prompt=1000, cache_write=500)) == cost(GPT_4O, usage)


@pytest.mark.parametrize("usage, expected", [(Usage(), 0), (Usage(prompt=1), 2507), (Usage(completion=1), 10_007)])
def test_a_request_that_used_something_costs_its_fee(usage, expected):
    assert cost(msgspec.structs.replace(GPT_4O, request=7), usage) == expected


@pytest.mark.parametrize(
    "markup, told, expected",
    [
        ("1.00", "0.00014", 140_000),
        ("1.05", "0.00014", 147_000),
        ("1.000000001", "0.00014", 140_001),
        ("2", "0.0000000001", 1),
        ("1.05", "0", 0),
        ("1.05", None, 25_000),
    ],
)
def test_the_provider_s_figure_times_the_markup(markup, told, expected):
    price = price_of(model(cost_from="usage.cost", markup=markup, request_usd="0"))
    assert cost(price, Usage(prompt=10), None if told is None else Decimal(told)) == expected


def test_the_provider_s_figure_is_nothing_to_a_model_with_prices():
    assert cost(price_of(model()), Usage(prompt=10), Decimal(5)) == 25_000


def test_what_was_billed_is_told_without_what_did_not_count():
    told = price_of(model(cost_from="usage.cost", markup="1.05"))
    assert msgspec.structs.replace(told, markup=None) == billed_price(told, Usage(prompt=10), None)
    assert told == billed_price(told, Usage(prompt=10), Decimal(1))
    assert Price(*[10] * 7) == billed_price(TIERED, Usage(prompt=150), None)
    assert Price(1, 2, 1, 1, 2, 1, 2) == billed_price(TIERED, Usage(prompt=1), None)


@pytest.mark.parametrize(
    "prompt, expected", [(100, 1 * 100 + 2 * 10**6), (150, 10 * 150 + 10 * 10**6), (300, 10 * 300 + 10 * 10**6)]
)
def test_a_hold_is_at_the_dearest_tier_that_the_prompt_may_reach(prompt, expected):
    assert -(-expected // 1_000_000) == hold_amount(TIERED, prompt, 10**6)


def test_a_hold_is_at_each_price_of_the_dearest_tier():
    tiered = msgspec.structs.replace(GPT_4O, tiers=((100, Price(50 * USD, 70 * USD, *[USD] * 5)),))
    assert hold_amount(tiered, 101, 1) == 101 * 50_000 + 80_000


@pytest.mark.parametrize("markup, expected", [("1.10", 10 * 2750 + 3 * 11_000), ("0.50", 10 * 2500 + 3 * 10_000)])
def test_a_hold_is_for_the_markup_too(markup, expected):
    assert hold_amount(price_of(model(cost_from="usage.cost", markup=markup)), 10, 3) == expected


@pytest.mark.parametrize("tokens, expected", [(0, 0), (1, 1), (999_999, 1), (1_000_000, 1), (1_000_001, 2)])
def test_cost_is_rounded_up_once(tokens, expected):
    penny = Price(input=1, output=1, cached=1, cache_write=1, reasoning=1, audio_input=1, audio_output=1)
    assert cost(penny, Usage(prompt=tokens // 2, completion=tokens - tokens // 2)) == expected


amounts = st.integers(0, 10**9)
plain_prices = st.builds(Price, *[st.integers(0, 10**12)] * 7)
prices = st.builds(
    Price,
    *[st.integers(0, 10**12)] * 7,
    cache_write_1h=st.none() | st.integers(0, 10**12),
    request=st.integers(0, 10**9),
    tiers=st.lists(st.tuples(st.integers(1, 10**9), plain_prices), max_size=3).map(
        lambda tiers: tuple(sorted(tiers, key=lambda tier: tier[0]))
    ),
)
usages = st.builds(Usage, *[amounts] * 8)


@given(prices, usages, amounts, amounts)
def test_a_hold_bounds_the_cost_of_any_split(price, usage, more_prompt, more_output):
    assert hold_amount(price, usage.prompt + more_prompt, usage.completion + more_output) >= cost(price, usage)


@given(plain_prices, usages)
def test_cost_is_at_least_the_cheapest_of_every_token(price, usage):
    prompt = usage.prompt * min(price.input, price.cached, price.cache_write, price.audio_input)
    completion = usage.completion * min(price.output, price.reasoning, price.audio_output)
    assert cost(price, usage) * 1_000_000 >= prompt + completion


@given(st.builds(Price, *[st.just(7)] * 7), usages)
def test_one_price_for_all_makes_the_split_immaterial(price, usage):
    assert hold_amount(price, usage.prompt, usage.completion) == cost(price, usage)


def test_hold_amount():
    assert hold_amount(GPT_4O, 1000, 100) == 1000 * 40_000 + 100 * 80_000


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
    assert affordable_output(price, prompt_tokens, amount_nusd) == expected


@given(
    st.builds(Price, *[st.integers(1, 10**12)] * 7),
    st.integers(0, 10**6),
    st.integers(0, 10**15),
    st.integers(0, 10**9),
)
def test_what_is_affordable_can_be_held_and_one_token_more_cannot(price, prompt_tokens, amount_nusd, fee):
    price = msgspec.structs.replace(price, request=fee)
    tokens = affordable_output(price, prompt_tokens, amount_nusd)
    assert tokens == 0 or hold_amount(price, prompt_tokens, tokens) <= amount_nusd
    assert hold_amount(price, prompt_tokens, tokens + 1) > amount_nusd


@pytest.mark.parametrize(
    ("prices", "expected"),
    [
        ({}, True),
        ({"output_usd_per_mtok": "1"}, False),
        ({"reasoning_usd_per_mtok": "1"}, False),
        ({"request_usd": "0.01"}, False),
        ({"cost_from": "usage.cost"}, False),
        ({"price_tiers": [PriceTier(above_prompt_tokens=9, input_usd_per_mtok="1", output_usd_per_mtok="0")]}, False),
    ],
)
def test_a_model_is_free_if_nothing_of_it_costs(prices, expected):
    assert price_of(model(**{"input_usd_per_mtok": "0", "output_usd_per_mtok": "0", **prices})).is_free is expected
