import math
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Raw

from meshproxy.config import parse
from meshproxy.errors import GatewayError, Source, model_not_found
from meshproxy.policy.catalog import Candidate, Catalog, may_have_served, model_object, with_fees
from meshproxy.policy.pricing import Price
from meshproxy.units import MAX_EXACT_INT

UPSTREAMS = """
[upstreams.openai]
kind = "openai"
base_url = "https://api.openai.com/v1"
[upstreams.vllm]
kind = "openai"
base_url = "http://vllm:8000/v1"
[upstreams.router]
kind = "openrouter"
base_url = "https://openrouter.ai/api/v1"
[upstreams.router2]
kind = "openrouter"
base_url = "https://openrouter.ai/api/v1"
"""


def catalog(models, more=""):
    """A catalogue of `{id: [(upstream, model), (upstream, model, weight), ...]}`. `more`: lines of the last model."""
    text = UPSTREAMS
    for position, (name, routes) in enumerate(models.items(), start=1):
        tables = [
            f'{{ upstream = "{route[0]}", model = "{route[1]}"' + (f", weight = {route[2]} }}" if route[2:] else " }")
            for route in routes
        ]
        text += (
            f'[models."{name}"]\nupstreams = [{", ".join(tables)}]\n'
            f'input_usd_per_mtok = "{position}"\noutput_usd_per_mtok = "{position}"\n'
        )
    return Catalog(parse(text + more))


def asked(attempts):
    """The attempts, short: where, under which name, with which natives."""
    return [(candidate.upstream, candidate.upstream_model, *candidate.native_models) for candidate in attempts]


A = {"a/one": [("openai", "one"), ("vllm", "one-local")]}
ROUTED = {
    "a/one": [("router", "or/one"), ("vllm", "one")],
    "b/two": [("openai", "two"), ("router", "or/two")],
    "c/three": [("vllm", "three")],
}


@pytest.mark.parametrize("draw", [0.0, 0.999999])
def test_routes_are_tried_in_order(draw):
    assert asked(catalog(A).candidates("a/one", draw=draw)) == [("openai", "one"), ("vllm", "one-local")]


USD = 1_000_000_000


@pytest.mark.parametrize(
    "route, more, expected",
    [
        (("vllm", "o"), "", Candidate("vllm", "openai", "o", "a/one", 128_000, 16_384, Price(*[USD] * 7))),
        (
            ("router", "or/o", 7),
            "context_window = 9\nmax_output_tokens = 8\nreasoning_usd_per_mtok = '2'\nhidden_reasoning = true",
            Candidate(
                upstream="router",
                kind="openrouter",
                upstream_model="or/o",
                model="a/one",
                context_window=9,
                max_output_tokens=8,
                price=Price(USD, USD, USD, USD, 2 * USD, USD, USD),
                weight=7,
                hidden_reasoning=True,
            ),
        ),
    ],
)
def test_an_attempt_knows_all_that_its_model_is(route, more, expected):
    models = catalog({"a/one": [route]}, more)
    entry = models.model("a/one")
    known = (entry.id, entry.context_window, entry.max_output_tokens, entry.price)
    assert (
        models.candidates("a/one", draw=0.0),
        ("a/one", expected.context_window, expected.max_output_tokens, expected.price),
    ) == ((expected,), known)


@pytest.mark.parametrize("weight, expected", [(None, 1), (1, 1), (7, 7)])
def test_a_share_is_the_weight_if_there_is_one(weight, expected):
    candidate = Candidate("openai", "openai", "o", "a/one", 1, 1, Price(*[USD] * 7), weight=weight)
    assert candidate.share == expected


def test_a_models_object_has_the_fields_of_both_families():
    entry = catalog({"openai/gpt": [("openai", "gpt")]}, 'cached_input_usd_per_mtok = "0.5"\n').model("openai/gpt")
    assert model_object(entry, 7) == {
        "id": "openai/gpt",
        "object": "model",
        "created": 7,
        "owned_by": "openai",
        "name": "openai/gpt",
        "brand": "openai",
        "provider": "openai",
        "model_type": "text",
        "context_window": 128_000,
        "context_length": 128_000,
        "max_output_tokens": entry.max_output_tokens,
        "is_free": False,
        "supports_completions_api": True,
        "pricing": {
            "pricing_unit": "tokens",
            "prompt_usd_per_1m": "1.00",
            "completion_usd_per_1m": "1.00",
            "prompt_usd_per_1k": "0.001",
            "completion_usd_per_1k": "0.001",
            "cache_read_input_usd_per_1m": "0.50",
            "cache_write_input_usd_per_1m": "1.00",
            "audio_input_usd_per_1m": "1.00",
            "audio_output_usd_per_1m": "1.00",
        },
    }


def test_ids_are_whole_with_their_slashes():
    models = catalog(ROUTED)
    assert (models.ids, models.model("b/two").id, models.model("two")) == (["a/one", "b/two", "c/three"], "b/two", None)


@pytest.mark.parametrize("name", ["A/One", "A/ONE", "a/On"])
def test_the_nearest_model_is_found_whatever_its_case(name):
    assert catalog(ROUTED).nearest(name) == "a/one"


@pytest.mark.parametrize("model, fallbacks, missing", [("x/y", (), "x/y"), ("a/one", ("a/one", "x/y"), "x/y")])
def test_an_unknown_model_is_named(model, fallbacks, missing):
    with pytest.raises(GatewayError) as caught:
        catalog(A).candidates(model, fallbacks, draw=0.0)
    assert (caught.value.source, caught.value.response) == (Source.CLIENT, model_not_found(missing))


@pytest.mark.parametrize(
    "draw, expected",
    [
        (0.0, ["w1", "w3"]),
        (0.249, ["w1", "w3"]),
        (0.25, ["w3", "w1"]),
        (0.999999, ["w3", "w1"]),
    ],
)
def test_weights_balance_neighbours(draw, expected):
    models = catalog({"m": [("openai", "first"), ("openai", "w1", 1), ("vllm", "w3", 3), ("vllm", "last")]})
    names = [candidate.upstream_model for candidate in models.candidates("m", draw=draw)]
    assert ["first", *expected, "last"] == names


def test_weighted_routes_apart_are_no_neighbours():
    models = catalog({"m": [("openai", "a", 1), ("openai", "b"), ("vllm", "c", 9)]})
    assert [candidate.upstream_model for candidate in models.candidates("m", draw=0.99)] == ["a", "b", "c"]


def test_the_draw_is_by_weight_at_every_place():
    models = catalog({"m": [("openai", "a", 1), ("openai", "b", 2), ("openai", "c", 3)]})
    orders = Counter(
        "".join(candidate.upstream_model for candidate in models.candidates("m", draw=step / 6000))
        for step in range(6000)
    )
    expected = {"abc": 400, "acb": 600, "bac": 500, "bca": 1500, "cab": 1000, "cba": 2000}
    assert {order: round(count, -2) for order, count in orders.items()} == expected


@pytest.mark.parametrize("draw, expected", [(0.0, "abc"), (0.3, "bca"), (0.7, "cba")])
def test_a_spin_says_the_whole_order(draw, expected):
    models = catalog({"m": [("openai", "a", 1), ("openai", "b", 2), ("openai", "c", 3)]})
    assert "".join(candidate.upstream_model for candidate in models.candidates("m", draw=draw)) == expected


@given(st.lists(st.integers(1, MAX_EXACT_INT), min_size=1, max_size=8), st.floats(0, 1, exclude_max=True))
@example([3, MAX_EXACT_INT, 2**52], math.nextafter(1, 0))
def test_every_route_is_drawn_once_whatever_the_spin(weights, draw):
    models = catalog({"m": [("openai", str(index), weight) for index, weight in enumerate(weights)]})
    drawn = sorted(candidate.upstream_model for candidate in models.candidates("m", draw=draw))
    assert [str(index) for index in range(len(weights))] == drawn


def test_fallbacks_are_walked_after_the_models_own_routes():
    models = catalog({**A, "b/two": [("openai", "two")]})
    expected = [("openai", "one"), ("vllm", "one-local"), ("openai", "two")]
    assert asked(models.candidates("a/one", ("b/two", "a/one", "b/two"), draw=0.0)) == expected


@pytest.mark.parametrize("draw, expected", [(0.0, "abcd"), (0.5, "badc")])
def test_equals_change_places_in_fallbacks_too(draw, expected):
    models = catalog({"m": [("openai", "a", 1), ("vllm", "b", 1)], "n": [("openai", "c", 1), ("vllm", "d", 1)]})
    attempts = models.candidates("m", ("n",), draw=draw)
    assert "".join(candidate.upstream_model for candidate in attempts) == expected


def test_openrouter_gets_the_fallbacks_it_serves_in_its_own_names():
    attempts = catalog(ROUTED).candidates("a/one", ("b/two", "c/three"), draw=0.0)
    assert asked(attempts) == [("router", "or/one", "or/two"), ("vllm", "one"), ("openai", "two"), ("vllm", "three")]


def test_openrouter_is_asked_for_what_comes_after_it_alone():
    attempts = catalog(ROUTED).candidates("c/three", ("b/two", "a/one"), draw=0.0)
    assert asked(attempts) == [("vllm", "three"), ("openai", "two"), ("router", "or/two", "or/one"), ("vllm", "one")]


def test_two_openrouter_upstreams_are_asked_each():
    models = catalog({"a": [("router", "a"), ("router2", "a")], "b": [("router", "b"), ("router2", "b")]})
    assert asked(models.candidates("a", ("b",), draw=0.0)) == [("router", "a", "b"), ("router2", "a", "b")]


def test_without_fallbacks_nothing_is_native():
    assert asked(catalog(ROUTED).candidates("a/one", draw=0.0)) == [("router", "or/one"), ("vllm", "one")]


def test_attempts_have_a_maximum():
    models = catalog({"a": [("openai", str(index)) for index in range(12)], "b": [("vllm", "b")] * 20})
    counts = [len(models.candidates(*names, draw=0.0)) for names in [("a",), ("b",), ("a", ("b",))]]
    assert counts == [12, 16, 16]


@pytest.mark.parametrize(
    "reported, expected",
    [
        ("or/one", ["a/one"]),
        ("or/two", ["b/two"]),
        ("or/two-2024-08-06", ["b/two"]),
        ("or/two-20240806", ["b/two"]),
        ("or/two-0806", ["b/two"]),
        ("or/one-2024-08-06", ["a/one"]),
        ("or/two-mini", ["a/one", "b/two"]),
        ("or/two-2024-08-06-x", ["a/one", "b/two"]),
        ("or/two-\u0662\u0660\u0662\u0664", ["a/one", "b/two"]),
        ("b/two", ["a/one", "b/two"]),
        ("", ["a/one", "b/two"]),
        (None, ["a/one"]),
    ],
)
def test_the_served_model_is_billed_and_any_where_it_has_another_name(reported, expected):
    candidate = catalog(ROUTED).candidates("a/one", ("b/two",), draw=0.0)[0]
    assert [candidate.model for candidate in may_have_served(candidate, reported)] == expected


def test_the_served_models_price_is_its_own():
    candidate = catalog(ROUTED).candidates("a/one", ("b/two",), draw=0.0)[0]
    assert [candidate.price.input for candidate in may_have_served(candidate, "or/two")] == [2_000_000_000]


def test_an_exact_name_goes_before_a_dated_one():
    models = catalog({"a": [("router", "gpt-4")], "b": [("router", "gpt-4-1106")]})
    candidate = models.candidates("a", ("b",), draw=0.0)[0]
    named = [may_have_served(candidate, name)[0].model for name in ("gpt-4-1106", "gpt-4-0613")]
    assert named == ["b", "a"]


def test_a_provider_without_fallbacks_cannot_choose_the_price():
    candidate = catalog(ROUTED).candidates("c/three", ("a/one",), draw=0.0)[0]
    assert may_have_served(candidate, "or/one") == (candidate,)


FLEX = '[models.m.service_tiers.flex]\ninput_usd_per_mtok = "7"\noutput_usd_per_mtok = "8"\n'
FEES = 'field_usd = { plugins = "0.02", web_search_options = "0.01" }\n'
TOLD = 'cost_from = "usage.cost"\n'


def offered(upstream, more, tier=None, **fields):
    attempts = catalog({"m": [(upstream, "x")]}, more).candidates("m", draw=0.0)
    (candidate,) = with_fees(attempts, tier, {name: Raw(value) for name, value in fields.items()})
    return candidate


@pytest.mark.parametrize("tier", [None, "auto", "default"])
def test_a_tier_without_a_price_of_its_own_is_free_of_it(tier):
    assert offered("openai", FLEX, tier).price_in(tier).input == 1_000_000_000


@pytest.mark.parametrize(
    "asked, told, expected",
    [
        ("flex", None, 7),
        ("flex", "flex", 7),
        ("flex", "default", 1),
        ("flex", "standard", 1),
        ("flex", "another", 7),
        (None, "flex", 7),
        ("auto", "flex", 7),
        (None, "default", 1),
        (None, "another", 1),
    ],
)
def test_the_tier_that_was_served_is_billed_else_the_one_that_was_asked_for(asked, told, expected):
    assert offered("openai", FLEX, asked).price_in(told, asked).input == expected * 1_000_000_000


@pytest.mark.parametrize(
    "upstream, more, tier, fields, param",
    [
        ("openai", "", "priority", {}, "service_tier"),
        ("openai", FLEX, "priority", {}, "service_tier"),
        ("router", "", None, {"plugins": b'[{"id":"web"}]'}, "plugins"),
        ("openai", "", None, {"plugins": b'[{"id":"web"}]'}, "plugins"),
        ("openai", "", None, {"search_parameters": b"{}"}, "search_parameters"),
        ("router", "", None, {"web_search_options": b"{}"}, "web_search_options"),
    ],
)
def test_what_changes_the_price_and_has_none_is_refused(upstream, more, tier, fields, param):
    with pytest.raises(GatewayError) as caught:
        offered(upstream, more, tier, **fields)
    response = caught.value.response
    assert (response.status, response.code, response.param) == (422, "validation_error", param)


@pytest.mark.parametrize(
    "upstream, more, tier, fields, fee_nusd",
    [
        ("router", FEES, None, {"plugins": b"[{}]"}, 20_000_000),
        ("router", FEES, None, {"plugins": b"[{}]", "web_search_options": b"{}"}, 30_000_000),
        ("router", FEES, None, {"plugins": b"null"}, 0),
        ("router", "", None, {"plugins": b"[]"}, 0),
        ("openai", "", None, {"web_search_options": b"{}"}, 0),
        ("openai", FEES, None, {"web_search_options": b"{}"}, 10_000_000),
        ("openai", FEES + FLEX, "flex", {"web_search_options": b"{}"}, 10_000_000),
        ("openai", 'request_usd = "1"\n' + FEES, None, {"plugins": b"[{}]"}, 1_020_000_000),
        ("router", TOLD, "priority", {"plugins": b"[{}]"}, 0),
    ],
)
def test_a_fee_is_of_the_fields_that_a_request_has(upstream, more, tier, fields, fee_nusd):
    assert offered(upstream, more, tier, **fields).price_in(tier).request == fee_nusd


def test_every_model_that_may_serve_needs_a_price():
    models = catalog({"a": [("router", "a")], "m": [("router", "m")]}, FEES)
    asked_for = {"plugins": Raw(b"[{}]")}
    with pytest.raises(GatewayError):
        with_fees(models.candidates("m", ("a",), draw=0.0), None, asked_for)
    (alone,) = with_fees(models.candidates("m", draw=0.0), None, asked_for)
    assert alone.price.request == 20_000_000


def test_natives_have_their_own_fees():
    models = catalog({"a": [("router", "a")], "m": [("router", "m")]}, FEES)
    (candidate,) = with_fees(models.candidates("a", ("m",), draw=0.0), None, {"web_search_options": Raw(b"null")})
    assert models.candidates("a", ("m",), draw=0.0)[0] == candidate


@pytest.mark.parametrize(
    ("base_url", "line", "expected"),
    [
        ("https://api.openai.com/v1", "", "max_completion_tokens"),
        ("https://x.openai.azure.com/openai/v1", "", "max_completion_tokens"),
        ("https://x.services.ai.azure.com/openai/v1", "", "max_completion_tokens"),
        ("https://api.mistral.ai/v1", "", "max_tokens"),
        ("http://localhost:11434/v1", "", "max_tokens"),
        ("https://notapi.openai.com.example/v1", "", "max_tokens"),
        ("https://api.openai.com/v1", 'cap_field = "max_tokens"', "max_tokens"),
        ("https://api.mistral.ai/v1", 'cap_field = "max_completion_tokens"', "max_completion_tokens"),
    ],
)
def test_the_name_of_the_cap_follows_the_provider(base_url, line, expected):
    text = f"""
[upstreams.u]
kind = "openai"
base_url = "{base_url}"
{line}
[models.m]
upstreams = [{{ upstream = "u", model = "m" }}]
input_usd_per_mtok = "1"
output_usd_per_mtok = "1"
"""
    (candidate,) = Catalog(parse(text)).candidates("m", draw=0)
    assert candidate.cap_field == expected
