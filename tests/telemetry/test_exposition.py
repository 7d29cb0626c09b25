import asyncio
import shutil
import subprocess

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from meshproxy.telemetry import exposition
from meshproxy.telemetry.metrics import Metrics
from meshproxy.telemetry.snapshot import decode, merge

TRACE = "0af7651916cd43dd8448eb211c80319c"
MODELS = [f"vendor/model-{number}" for number in range(12)] + ['od"d\\mo\ndel']


@pytest.fixture
def snapshot():
    metrics = Metrics(MODELS, ["openai", "vllm"], version="1.2.3", clock=lambda: 1700000000.25)
    for model in MODELS:
        metrics.requests.labels("/v1/chat/completions", model, "200", "true").inc()
        metrics.request_duration.labels(model, "true").observe_traced(1.5, TRACE)
        metrics.cost.labels(model).inc(2_500_000_001)
    return decode(metrics.snapshot())


def text(snapshot, openmetrics):
    return "".join(exposition.lines(snapshot, openmetrics=openmetrics))


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
    assert expected == len(parsed(snapshot, openmetrics))


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
    assert f'{line}.0 # {{trace_id="{TRACE}"}} 1.5 1700000000.25' in text(snapshot, openmetrics=True).splitlines()
    assert TRACE not in text(snapshot, openmetrics=False)


def test_openmetrics_ends_once_with_its_mark(snapshot):
    assert text(snapshot, openmetrics=True).endswith("\n# EOF\n")
    assert text(snapshot, openmetrics=True).count("# EOF") == 1


async def test_render_lets_the_loop_run_meanwhile(snapshot):
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    rendered = await exposition.render(snapshot, openmetrics=False)
    counting.cancel()
    assert rendered.decode() == text(snapshot, openmetrics=False)
    assert turns >= rendered.count(b"\n") // exposition.LINES_PER_TURN > 1


@pytest.mark.parametrize(
    "accept, expected",
    [
        ("", False),
        ("*/*", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1", True),
        ("text/plain, Application/OpenMetrics-Text; version=1.0.0", True),
        ("application/openmetrics-text;q=0, text/plain", False),
    ],
)
def test_wants_openmetrics(accept, expected):
    assert expected == exposition.wants_openmetrics(accept)


def test_content_types():
    assert exposition.content_type(openmetrics=False) == "text/plain; version=0.0.4; charset=utf-8"
    assert exposition.content_type(openmetrics=True) == "application/openmetrics-text; version=1.0.0; charset=utf-8"


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
