import asyncio
import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from meshproxy.telemetry.exposition import SERIES_PER_TURN, MetricsCollector, decode, merge, render
from meshproxy.telemetry.metrics import Metrics
from tests.harness.waiting import turns

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
TRACE = "0af7651916cd43dd8448eb211c80319c"
MODELS = [f"vendor/model-{number}" for number in range(12)] + ['od"d\\mo\ndel']


@pytest.fixture
def snapshot():
    metrics = Metrics(MODELS, ["openai", "vllm"], version="1.2.3")
    for model in MODELS:
        metrics.requests.labels("/v1/chat/completions", model, "200", "true").inc()
        metrics.request_duration.labels(model, "true").observe_traced(1.5, TRACE)
        metrics.cost.labels(model).inc(2_500_000_001)
    return decode(asyncio.run(metrics.snapshot()))


def text(snapshot, openmetrics):
    rendered, _ = asyncio.run(render(snapshot, OPENMETRICS if openmetrics else ""))
    return rendered.decode()


def parsed(snapshot, openmetrics):
    parse = parse_openmetrics if openmetrics else parse_plain
    return {
        (sample.name, *sorted(sample.labels.items())): sample
        for family in parse(text(snapshot, openmetrics))
        for sample in family.samples
    }


@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_series_is_there_once(snapshot, openmetrics):
    lines = [line for line in text(snapshot, openmetrics).splitlines() if not line.startswith("#")]
    heads = [line for line in text(snapshot, openmetrics).splitlines() if line.startswith("# TYPE")]
    expected = sum((len(family.edges) + 3 if family.edges else 1) * len(family.series) for family in snapshot)
    assert (expected, len(snapshot)) == (len(lines), len(heads))
    assert len(parsed(snapshot, openmetrics)) == expected


@pytest.mark.parametrize("openmetrics", [False, True])
def test_values(snapshot, openmetrics):
    samples = parsed(snapshot, openmetrics)
    odd = ("model", MODELS[-1])
    assert samples["meshproxy_cost_usd_total", odd].value == 2.500000001
    assert samples["meshproxy_build_info", ("version", "1.2.3")].value == 1
    buckets = {
        dict(key[1:])["le"]: sample.value
        for key, sample in samples.items()
        if key[0] == "meshproxy_request_duration_seconds_bucket" and odd in key
    }
    assert (len(buckets), buckets["1.0"], buckets["2.0"], buckets["+Inf"]) == (17 + 1, 0, 1, 1)


def test_exemplars_are_for_openmetrics_alone(snapshot):
    line = f'meshproxy_request_duration_seconds_bucket{{le="2.0",model="{MODELS[0]}",stream="true"}} 1'
    assert f'{line}.0 # {{trace_id="{TRACE}"}} 1.5 ' in text(snapshot, openmetrics=True)
    assert TRACE not in text(snapshot, openmetrics=False)


def test_openmetrics_ends_once_with_its_mark(snapshot):
    assert text(snapshot, openmetrics=True).endswith("\n# EOF\n")
    assert text(snapshot, openmetrics=True).count("# EOF") == 1


async def test_render_lets_the_loop_run_meanwhile():
    metrics = Metrics(MODELS)
    for model in MODELS:
        metrics.request_duration.labels(model, "true").observe(1.5)
    found = decode(await metrics.snapshot())
    counted = 0

    async def count():
        nonlocal counted
        while True:
            counted += 1
            await turns(1)

    counting = asyncio.create_task(count())
    await render(found, "")
    counting.cancel()
    assert counted >= sum(-(-len(family.series) // SERIES_PER_TURN) for family in found)


async def test_a_family_in_several_parts_has_one_head():
    metrics = Metrics(MODELS)
    for model in MODELS:
        metrics.cost.labels(model).inc()
    rendered, _ = await render(decode(await metrics.snapshot()), OPENMETRICS)
    assert rendered.count(b"# TYPE meshproxy_cost_usd counter") == 1
    assert rendered.count(b"\nmeshproxy_cost_usd_total{") == len(MODELS) > SERIES_PER_TURN


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("text/plain;version=0.0.4", "text/plain"),
        ("application/openmetrics-text", "application/openmetrics-text"),
        (
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
            "application/openmetrics-text",
        ),
    ],
)
async def test_the_format_is_what_accept_asks_for(accept, expected):
    _, content_type = await render([], accept)
    assert content_type.startswith(expected + ";")


def test_another_registry_can_have_the_merged_families(snapshot):
    registry = CollectorRegistry()
    registry.register(MetricsCollector(lambda: snapshot))
    assert registry.get_sample_value("meshproxy_build_info", {"version": "1.2.3"}) == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is Debian's prometheus package")
def test_promtool_finds_nothing_to_say(snapshot):
    merged = merge([snapshot, snapshot])
    found = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text(merged, openmetrics=False),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
