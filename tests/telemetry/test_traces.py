"""A gateway's spans, as a collector gets them over a socket."""

import asyncio
import subprocess
import sys

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider

from meshproxy.cli.command_line import main
from meshproxy.config import ConfigError, Settings, Tracing, parse
from meshproxy.telemetry import spans
from meshproxy.telemetry.spans import open_tracer, require_extra

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01", f"00-{TRACE_ID}-{PARENT_ID}-00"
FAULT = "tracing.endpoint: needs the extra otel (in a checkout: pip install '.[otel]')"


class Collector:
    """Takes OTLP over HTTP, while it isn't `stuck`."""

    def __init__(self):
        self.bodies = []
        self.stuck = asyncio.Lock()

    async def take(self, request):
        async with self.stuck:
            self.bodies.append(await request.read())
        return web.Response()

    @property
    def resource(self):
        exported = ExportTraceServiceRequest.FromString(self.bodies[0])
        return _plain(exported.resource_spans[0].resource.attributes)

    @property
    def spans(self):
        requests = map(ExportTraceServiceRequest.FromString, self.bodies)
        return [
            span
            for request in requests
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]


def _plain(attributes):
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}


@pytest.fixture
async def collector(aiohttp_server):
    taking = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", taking.take)
    taking.url = str((await aiohttp_server(app)).make_url("/v1/traces"))
    return taking


@pytest.fixture
def traced(start_mesh, collector, monkeypatch):
    """A gateway that sends its spans to the collector. Asked for them, it sends what it has."""
    providers = []

    class Kept(TracerProvider):
        def __init__(self, **options):
            super().__init__(**options)
            providers.append(self)

    monkeypatch.setattr("opentelemetry.sdk.trace.TracerProvider", Kept)

    async def start(**tracing):
        mesh = await start_mesh(tracing={"endpoint": collector.url, **tracing})

        async def spans():
            await mesh.quiet()
            await asyncio.to_thread(providers[-1].force_flush)
            return collector.spans

        mesh.spans = spans
        return mesh

    return start


async def test_a_span_says_what_a_request_was(traced, collector):
    mesh = await traced()
    caller = await mesh.key()
    answer = await mesh.chat(caller, headers={"traceparent": SAMPLED}, max_tokens=9, temperature=0.5, session_id="s1")
    (span,) = await mesh.spans()
    (line,) = mesh.log.lines
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "openai/gpt-4o",
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.conversation.id": "s1",
        "gen_ai.response.model": "gpt-4o",
        "gen_ai.usage.input_tokens": line["prompt_tokens"],
        "gen_ai.usage.output_tokens": line["completion_tokens"],
        "server.address": "127.0.0.1",
        "server.port": mesh.simulator.port,
        "meshproxy.request_id": answer.headers["x-request-id"],
        "meshproxy.account": caller.account,
        "meshproxy.key_id": caller.key.id,
        "meshproxy.model": "openai/gpt-4o",
        "meshproxy.upstream": "sim",
        "meshproxy.attempts": 1,
        "meshproxy.outcome": "completed",
        "meshproxy.usage_source": "reported",
        "meshproxy.cost_usd": float(line["cost_usd"]),
    }
    assert _plain(span.attributes) == expected
    assert (
        span.name,
        span.kind,
        span.status.code,
    ) == ("chat openai/gpt-4o", Span.SPAN_KIND_SERVER, Status.STATUS_CODE_UNSET)
    assert line["duration_ms"] == pytest.approx((span.end_time_unix_nano - span.start_time_unix_nano) / 1e6, abs=0.01)
    assert collector.resource["service.name"] == "meshproxy"
    assert caller.secret.encode() not in collector.bodies[0]
    assert b"Hello there" not in collector.bodies[0]


async def test_it_is_the_child_of_the_callers_span(traced):
    mesh = await traced(sample=0)
    caller = await mesh.key()
    await mesh.chat(caller, headers={"traceparent": SAMPLED, "tracestate": "vendor=1"})
    (span,) = await mesh.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE_ID, PARENT_ID, "vendor=1")
    assert [dict(entry.headers)["traceparent"] for entry in mesh.received] == [SAMPLED]


async def test_a_caller_who_does_not_sample_decides_too(traced):
    mesh = await traced()
    caller = await mesh.key()
    await mesh.chat(caller, headers={"traceparent": UNSAMPLED})
    assert await mesh.spans() == []


@pytest.mark.parametrize(("sample", "count"), [(0, 0), (1, 1)])
async def test_a_trace_that_begins_here_is_sampled(traced, sample, count):
    mesh = await traced(sample=sample)
    caller = await mesh.key()
    await mesh.chat(caller, headers={"traceparent": "00-nonsense"})
    assert [b""] * count == [span.parent_span_id for span in await mesh.spans()]


async def test_a_stream(traced):
    mesh = await traced()
    caller = await mesh.key()
    await mesh.stream(caller)
    (span,) = await mesh.spans()
    facts = _plain(span.attributes)
    assert (facts["gen_ai.request.stream"], facts["meshproxy.outcome"]) == (True, "completed")
    assert 0 < facts["gen_ai.response.time_to_first_chunk"] < 10


async def test_a_refusal_is_the_clients_error(traced):
    mesh = await traced()
    await mesh.request("POST", "/v1/chat/completions", json={}, headers={"authorization": "Bearer rsk_nobodys"})
    (span,) = await mesh.spans()
    facts = _plain(span.attributes)
    assert (facts["error.type"], facts["http.response.status_code"]) == ("unauthorized", 401)
    assert (span.name, span.status.code) == ("chat", Status.STATUS_CODE_UNSET)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_providers_failure_is_an_error_of_the_span(traced, stream):
    mesh = await traced()
    caller = await mesh.key()
    await mesh.chat(caller, model="sim/die-mid-stream" if stream else "sim/error-500", stream=stream)
    (span,) = await mesh.spans()
    facts = _plain(span.attributes)
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert facts["error.type"] == span.status.message == mesh.log.lines[0]["code"]


async def test_what_waits_is_sent_at_the_end(collector):
    tracer = open_tracer(Tracing(endpoint=collector.url), "1")
    tracer.span("chat", seconds=1.0, context={}, describe=dict, error="")
    await tracer.close()
    assert [span.name for span in collector.spans] == ["chat"]


async def test_a_stuck_collector_holds_nobody_up(collector, monkeypatch):
    monkeypatch.setattr(spans, "FLUSH_S", 0.05)
    tracer = open_tracer(Tracing(endpoint=collector.url), "1")
    tracer.span("chat", seconds=1.0, context={}, describe=dict, error="")
    async with collector.stuck, asyncio.timeout(2):
        await tracer.close()
        assert collector.bodies == []


async def test_a_collector_that_is_away_touches_no_request_and_is_told_once(traced, caplog, monkeypatch):
    monkeypatch.setattr(spans, "EXPORT_TIMEOUT_S", 0.05)  # no second tries
    mesh = await traced(endpoint="http://127.0.0.1:1/v1/traces")
    caller = await mesh.key()
    for _ in range(3):
        assert (await mesh.chat(caller)).status == 200
        await mesh.spans()
    (record,) = [record for record in caplog.records if record.name.startswith("opentelemetry")]
    assert "span" in record.getMessage()


def test_off_it_imports_nothing():
    """redis-py imports OpenTelemetry's metrics where they are installed; what makes spans and sends them is ours alone."""
    code = "import sys, meshproxy.app.worker, meshproxy.cli.command_line; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.proto")
    assert [name for name in run.stdout.split() if name.startswith(ours)] == []


def test_off_it_is_nothing():
    assert None is open_tracer(Settings().tracing, "1")


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"])
def test_without_the_extra_a_configuration_that_needs_it_is_unfit(monkeypatch, tmp_path, capsys, missing):
    monkeypatch.delitem(sys.modules, "opentelemetry.sdk.trace")
    monkeypatch.setitem(sys.modules, missing, None)
    require_extra(Tracing())
    with pytest.raises(ConfigError) as caught:
        open_tracer(Tracing(endpoint="http://127.0.0.1:4318/v1/traces"), "1")
    assert caught.value.faults == [FAULT]
    path = tmp_path / "meshproxy.toml"
    path.write_text('[tracing]\nendpoint = "http://127.0.0.1:4318/v1/traces"\n')
    for command in ("check", "serve"):
        assert main([command, "--config", str(path)]) == 78
        assert capsys.readouterr().err == f"{FAULT} ({path}:2)\n"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            'endpoint = "collector:4317"',
            "tracing.endpoint: expected an http or https URL without user, query and fragment",
        ),
        ('endpoint = "http://collector:0/"', "tracing.endpoint: there is no port 0"),
        ("sample = 1.5", "tracing.sample: expected float <= 1.0"),
    ],
)
def test_what_is_no_such_setting_is_told(line, fault):
    with pytest.raises(ConfigError) as caught:
        parse(f"[tracing]\n{line}\n")
    assert caught.value.faults == [fault]
