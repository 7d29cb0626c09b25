import asyncio
import random
import time

import pytest

from meshproxy.ledger.ledger import LIMITS
from meshproxy.telemetry.exposition import decode
from meshproxy.telemetry.metrics import Metrics

CHAT = "/v1/chat/completions"
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def metrics():
    return Metrics(["openai/gpt-4o"], ["openai"], version="1.2.3")


def series(metrics, name):
    return {
        s.labels: s
        for family in decode(asyncio.run(metrics.snapshot()))
        if family.name == f"meshproxy_{name}"
        for s in family.series
    }


def values(metrics, name):
    return {labels: s.value for labels, s in series(metrics, name).items()}


def test_counter(metrics):
    child = metrics.requests.labels(CHAT, "openai/gpt-4o", "200", "true")
    child.inc()
    child.inc(2)
    assert values(metrics, "requests_total") == {(CHAT, "openai/gpt-4o", "200", "true"): 3}


def test_a_child_is_bound_once(metrics):
    assert metrics.cost.labels("openai/gpt-4o") is metrics.cost.labels("openai/gpt-4o")


def test_gauge(metrics):
    child = metrics.in_flight.labels("admit")
    child.inc(5)
    child.dec()
    metrics.config_generation.labels().set(7)
    metrics.config_last_reload_successful.labels().set(True)
    assert values(metrics, "in_flight_requests")["admit",] == 4
    assert values(metrics, "config_generation") == {(): 7}
    assert values(metrics, "config_last_reload_successful") == {(): 1}


def test_histogram_counts_an_edge_into_its_own_bucket(metrics):
    for value in (0.05, 0.050001, 0.3, 600, 601):
        metrics.request_duration.labels("openai/gpt-4o", "false").observe(value)
    (found,) = series(metrics, "request_duration_seconds").values()
    assert found.counts == [1, 2, 2, *[3] * 13, 4, 5]
    assert pytest.approx(1201.400001) == found.value


def test_pending_observations_count_as_single_ones_do(metrics):
    one_by_one = metrics.request_duration.labels("openai/gpt-4o", "true")
    at_once = metrics.request_duration.labels("openai/gpt-4o", "false")
    for value in (600.5, 0.05, -1.0, 0.3, 600, 0.05, 0.050001, 0.3):
        one_by_one.observe(value)
        metrics.pending += (at_once, value)
    found = series(metrics, "request_duration_seconds")
    expected, counted = (found["openai/gpt-4o", stream] for stream in ("true", "false"))
    assert (counted.counts, counted.value) == (expected.counts, pytest.approx(expected.value))


def test_pending_amounts_are_counted_once_however_often_they_are_read(metrics):
    child = metrics.cost.labels("openai/gpt-4o")
    for _ in range(2):
        metrics.pending += (child, 1_000_000_000, child, 500_000_000)
    for _ in range(2):
        sample = metrics.registry.get_sample_value("meshproxy_cost_usd_total", {"model": "openai/gpt-4o"})
        assert sample == 3_000_000_000
    assert metrics.pending == []


def test_histogram_keeps_the_last_trace_of_a_bucket(metrics):
    child = metrics.time_to_first_token.labels("openai/gpt-4o")
    child.observe_traced(0.011, "f" * 32)
    child.observe_traced(0.012, TRACE)
    (found,) = series(metrics, "time_to_first_token_seconds").values()
    assert [(bucket, one.trace_id, one.value) for bucket, one in found.exemplars.items()] == [(1, TRACE, 0.012)]
    assert pytest.approx(time.time(), abs=60) == found.exemplars[1].at


def test_a_gauge_with_a_function_is_read_at_each_snapshot(metrics):
    kept = [1, 2]
    metrics.journal_pending.labels().set_function(lambda: len(kept))
    metrics.ledger_connected.labels().set_function(lambda: float(bool(kept)))
    assert (values(metrics, "journal_pending"), values(metrics, "ledger_connected")) == ({(): 2}, {(): 1})
    kept.clear()
    assert (values(metrics, "journal_pending"), values(metrics, "ledger_connected")) == ({(): 0}, {(): 0})


@pytest.mark.parametrize("trace_id", ["", "F" * 32, "f" * 33, 'a"} evil\n', "f" * 31 + "\n"])
def test_histogram_ignores_what_is_no_trace_id(metrics, trace_id):
    metrics.time_to_first_token.labels("openai/gpt-4o").observe_traced(0.011, trace_id)
    (found,) = series(metrics, "time_to_first_token_seconds").values()
    assert (found.exemplars, found.counts[-1]) == ({}, 1)


def test_what_is_not_in_the_configuration_is_other(metrics):
    metrics.requests.labels("/etc/passwd", "evil", "999", "perhaps").inc()
    metrics.upstream_requests.labels("evil", "777").inc()
    assert values(metrics, "requests_total") == {("other", "other", "other", "other"): 1}
    assert values(metrics, "upstream_requests_total") == {("other", "other"): 1}


def test_a_request_without_a_model_is_none(metrics):
    metrics.requests.labels("/v1/models", "none", "200", "false").inc()
    assert values(metrics, "requests_total") == {("/v1/models", "none", "200", "false"): 1}


def test_a_forgotten_label_is_a_bug(metrics):
    with pytest.raises(ValueError):
        metrics.requests.labels(CHAT, "openai/gpt-4o")


def test_hostile_labels_grow_nothing(metrics):
    rng = random.Random(7)
    families = [family for family in vars(metrics).values() if hasattr(family, "definition")]
    junk = ["other", "none", "", "\n", "x" * 9]
    for family in families:
        family.labels(*junk[:1] * len(family.definition.labels))
    before = {family.definition.name: len(family) for family in families}
    for _ in range(100_000):
        family = rng.choice(families)
        family.labels(*(rng.randbytes(8).hex() for _ in family.definition.labels))
    assert {family.definition.name: len(family) for family in families} == before


def test_small_families_start_at_zero(metrics):
    assert {limit.replace(" ", "_") for limit in LIMITS} == {
        limit for (limit,) in values(metrics, "rate_limited_total")
    }
    assert values(metrics, "upstream_breaker_open") == {("openai",): 0}
    assert values(metrics, "build_info") == {("1.2.3",): 1}


def test_reconfigure_admits_new_names_and_keeps_the_old(metrics):
    old = metrics.cost.labels("openai/gpt-4o")
    metrics.reconfigure(["new/model"], ["vllm"])
    old.inc(1)
    metrics.cost.labels("new/model").inc(2)
    assert values(metrics, "cost_usd_total") == {("openai/gpt-4o",): 1, ("new/model",): 2}
    assert values(metrics, "upstream_breaker_open") == {("openai",): 0, ("vllm",): 0}


def test_edges_can_be_chosen():
    edges = {"meshproxy_overhead_seconds": [2, 1], "meshproxy_event_loop_lag_seconds": None}
    metrics = Metrics(edges=edges)
    metrics.overhead.labels("true").observe(1.5)
    assert series(metrics, "overhead_seconds")["true",].counts == [0, 1, 1]
