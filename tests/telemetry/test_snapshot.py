import asyncio

import msgspec
import pytest

from meshproxy.telemetry.exposition import Exemplar, Family, MergedMetrics, Series, decode, encode, merge
from meshproxy.telemetry.metrics import Metrics

MODEL = "openai/gpt-4o"


def worker(requests=1, in_flight=1, lag=(), generation=1, clock=1):
    """A worker's report; its exemplars are dated by `clock`, in Unix seconds."""
    metrics = Metrics([MODEL], ["openai"])
    metrics.cost.labels(MODEL).inc(requests)
    metrics.in_flight.labels("admit").set(in_flight)
    metrics.config_generation.labels().set(generation)
    metrics.breaker_open.labels("openai").set(generation - 1)
    for value in lag:
        metrics.event_loop_lag.labels().observe_traced(value, f"{int(clock):032x}")
    report = decode(asyncio.run(metrics.snapshot()))
    for series in (series for family in report for series in family.series):
        dated = {bucket: Exemplar(one.trace_id, one.value, clock) for bucket, one in series.exemplars.items()}
        series.exemplars = dated
    return encode(report)


def value(snapshot, name, *labels):
    return next(s for f in snapshot if f.name == f"meshproxy_{name}" for s in f.series if s.labels == labels).value


def histogram(snapshot):
    return next(f for f in snapshot if f.name == "meshproxy_event_loop_lag_seconds").series[0]


def test_roundtrip_with_exemplars():
    snapshot = [
        Family("meshproxy_overhead_seconds", [Series(("true",), 1.5, [1, 0], {0: Exemplar("f" * 32, 1.5, 9.0)})], (1,))
    ]
    assert snapshot == decode(encode(snapshot))


def test_a_family_of_another_version_is_left_out():
    assert decode(encode([Family("meshproxy_of_tomorrow", [Series((), 1)])])) == []


def test_junk_is_a_decode_error():
    with pytest.raises(msgspec.DecodeError):
        decode(b"\x93junk")


def test_merge_adds_counters_and_gauges_and_keeps_least_and_greatest():
    merged = merge([decode(worker(3, 5, generation=1)), decode(worker(4, 6, generation=2))])
    assert (
        value(merged, "cost_usd_total", MODEL),
        value(merged, "in_flight_requests", "admit"),
        value(merged, "config_generation"),
        value(merged, "upstream_breaker_open", "openai"),
    ) == (7, 11, 1, 1)


def test_merge_adds_histograms_and_takes_the_newest_exemplar():
    merged = merge([decode(worker(lag=[0.001], clock=2)), decode(worker(lag=[0.0005, 9], clock=1))])
    found = histogram(merged)
    assert (found.counts, found.value) == ([*[2] * 11, 3], pytest.approx(9.0015))
    assert {bucket: e.trace_id for bucket, e in found.exemplars.items()} == {0: f"{2:032x}", 11: f"{1:032x}"}


def test_merge_changes_nothing_it_was_given():
    first, second = decode(worker(lag=[1])), decode(worker(lag=[1]))
    merge([first, second])
    assert first == decode(encode(first))
    assert histogram(first).counts[-1] == 1


def test_merge_believes_the_first_edges():
    one = [Family("meshproxy_overhead_seconds", [Series(("true",), 1, [1, 0])], (1,))]
    other = [Family("meshproxy_overhead_seconds", [Series(("true",), 1, [1, 0, 0])], (1, 2))]
    assert one == merge([one, other])


def test_fleet_counts_on_when_a_worker_dies_and_another_takes_its_place():
    fleet = MergedMetrics()
    fleet.report(1, worker(3, lag=[1]))
    fleet.report(1, worker(5, lag=[1]))
    fleet.report(2, worker(2))
    fleet.retire(1)
    fleet.retire(1)
    fleet.report(3, worker(1, lag=[1]))
    merged = fleet.merged()
    assert (
        value(merged, "cost_usd_total", MODEL),
        value(merged, "in_flight_requests", "admit"),
        histogram(merged).counts[-1],
    ) == (8, 2, 2)


def test_fleet_of_nobody_is_empty():
    assert MergedMetrics().merged() == []
