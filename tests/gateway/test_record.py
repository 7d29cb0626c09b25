from pathlib import Path

import pytest
import structlog
from msgspec.structs import replace

from meshproxy.config import Model, Route, Settings, Upstream
from meshproxy.errors import Phase, UpstreamError, upstream_error
from meshproxy.gateway.record import MAX_REFUSED, REFUSED_S, Recorder, Refusals
from meshproxy.ledger.records import Denial
from meshproxy.openai.usage import RefusedNumber, Usage
from meshproxy.telemetry.exposition import decode, render
from meshproxy.telemetry.metrics import MAX_PENDING, Metrics
from tests.gateway.parts import Renewals, exchange, lease, plan, principal

SETTINGS = Settings(
    upstreams={"u": Upstream(kind="openai", base_url="http://127.0.0.1:1")},
    models={
        "m": Model(upstreams=[Route(upstream="u", model="m")], input_usd_per_mtok="2.50", output_usd_per_mtok="10.00")
    },
)


class Log:
    def __init__(self):
        self.lines = []

    def write(self, fields):
        self.lines.append(fields)


class Recorded:
    """A recorder, its metrics and its log."""

    def __init__(self):
        self.metrics = Metrics(SETTINGS.models, SETTINGS.upstreams, version="1")
        self.log = Log()
        self.recorder = Recorder(self.metrics, self.log, lambda: 10.0)

    async def value(self, sample):
        text = (await render(decode(await self.metrics.snapshot()), ""))[0].decode()
        (line,) = [line for line in text.splitlines() if line.startswith(f"meshproxy_{sample} ")]
        return float(line.split()[-1])


@pytest.fixture
def recorded():
    return Recorded()


def finished():
    made = exchange(plan())
    made.principal = principal()
    made.lease = lease(Renewals())
    made.status, made.outcome = 200, "completed"
    made.usage, made.usage_source, made.cost_nusd = Usage(10, 21), "reported", 235_000
    made.sent_at, made.first_event_at, made.last_event_at, made.max_gap_s = 1.0, 2.0, 4.0, 0.5
    made.attempts = 1
    return made


async def test_a_request_that_ended(recorded):
    made = finished()
    recorded.recorder.begin(made)
    made.mark_streaming()
    assert (recorded.recorder.in_flight, await recorded.value('in_flight_requests{phase="stream"}')) == (1, 1.0)
    recorded.recorder.end(made)
    assert (recorded.recorder.in_flight, await recorded.value('in_flight_requests{phase="stream"}')) == (0, 0.0)
    labels = 'code="200",model="m",route="/v1/chat/completions",stream="true"'
    expected = {
        f"requests_total{{{labels}}}": 1,
        'tokens_total{model="m",type="prompt"}': 10,
        'tokens_total{model="m",type="completion"}': 21,
        'cost_usd_total{model="m"}': 0.000235,
        'settlements_total{outcome="completed",usage_source="reported"}': 1,
        'time_to_first_token_seconds_sum{model="m"}': 2.0,
        'time_per_output_token_seconds_sum{model="m"}': 0.1,
        'stream_max_gap_seconds_sum{model="m"}': 0.5,
    }
    assert {sample: pytest.approx(await recorded.value(sample)) for sample in expected} == expected


async def test_what_is_pending_is_bounded(recorded):
    for _ in range(1000):
        recorded.recorder.end(finished())
        assert len(recorded.metrics.pending) < MAX_PENDING
    assert await recorded.value('settlements_total{outcome="completed",usage_source="reported"}') == 1000


async def test_the_log_line(recorded):
    made = finished()
    recorded.recorder.begin(made)
    recorded.recorder.end(made)
    expected = {
        "request_id": "req_1",
        "key_id": "k",
        "account": "acme",
        "model": "m",
        "upstream": "u",
        "attempts": 1,
        "status": 200,
        "code": None,
        "stream": True,
        "outcome": "completed",
        "prompt_tokens": 10,
        "completion_tokens": 21,
        "cost_usd": "0.000235",
        "usage_source": "reported",
        "ttft_ms": 2000.0,
        "duration_ms": 10_000.0,
    }
    (line,) = recorded.log.lines
    assert {name: line[name] for name in expected} == expected


# The tables of docs/operations.md.

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
TYPES = {"string": str, "integer": int, "number": float, "boolean": bool}
OF_EVERY_LINE = {"timestamp", "level", "event", "logger"}


def documented(heading):
    """The fields that a table documents: whether each may be null, and its type."""
    section = OPERATIONS.read_text(encoding="utf-8").split(f"### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {
        name.strip(" `"): (null != "never", TYPES[kind.split(",")[0].split(" ")[0]])
        for names, kind, null, _ in rows
        for name in names.split(",")
    }


def assert_documented(heading, lines):
    fields = documented(heading)
    for line in lines:
        assert [*line] == [name for name in fields if name not in OF_EVERY_LINE]
    shown = {name: {None if line[name] is None else type(line[name]) for line in lines} for name in lines[0]}
    may_be_null, kinds = ({name: fields[name][at] for name in shown} for at in (0, 1))
    assert {name: None in values for name, values in shown.items()} == may_be_null
    assert {name: values - {None} for name, values in shown.items()} == {name: {kinds[name]} for name in shown}


async def test_every_field_of_the_log_line_is_documented(recorded):
    whole, anonymous = finished(), exchange()
    whole.call = replace(whole.call, client="192.0.2.1", trace_id="0" * 32)
    whole.upstream_status, whole.upstream_request_id = 200, "req_up"
    whole.refused_by, whole.code = "credit", "insufficient_credits"
    anonymous.plan = anonymous.candidate = None
    anonymous.model = ""
    for made in (whole, anonymous):
        recorded.recorder.begin(made)
        recorded.recorder.end(made)
    assert_documented("The fields of a request's line", recorded.log.lines)


async def test_every_field_of_a_failed_attempt_is_documented(recorded):
    answered, silent = finished(), finished()
    answered.upstream_status, answered.upstream_request_id = 500, "req_up"
    error = upstream_error("The provider failed.", may_have_run=False)
    with structlog.testing.capture_logs() as lines:
        for made, message in ((answered, "Out of order."), (silent, None)):
            failure = UpstreamError(error, safe_to_repeat=True, phase=Phase.HEAD, provider_message=message)
            recorded.recorder.attempt_failed(made, made.candidate, failure)
    fields = [{name: value for name, value in line.items() if name not in {"event", "log_level"}} for line in lines]
    assert_documented("The fields of `attempt_failed`", fields)


async def test_what_was_refused_of_a_report(recorded):
    made = finished()
    made.refused_numbers = (
        RefusedNumber("over_window", "prompt", "1000000000"),
        RefusedNumber("negative", "cached_tokens", "-1"),
        RefusedNumber("negative", "audio_tokens", "-2"),
    )
    recorded.recorder.begin(made)
    with structlog.testing.capture_logs() as lines:
        recorded.recorder.end(made)
    told = {"event": "usage_refused", "log_level": "warning", "upstream": "u", "model": "m", "request_id": "req_1"}
    assert lines == [
        {**told, "reason": "over_window", "numbers": {"prompt": "1000000000"}},
        {**told, "reason": "negative", "numbers": {"cached_tokens": "-1", "audio_tokens": "-2"}},
    ]
    assert await recorded.value('usage_refused_total{reason="negative",upstream="u"}') == 1


async def test_a_request_that_was_nobodys(recorded):
    made = exchange()
    made.plan = made.candidate = None
    made.model, made.is_stream = "", False
    made.status, made.code = 401, "unauthorized"
    recorded.recorder.begin(made)
    recorded.recorder.end(made)
    labels = 'code="401",model="none",route="/v1/chat/completions",stream="false"'
    assert await recorded.value(f"requests_total{{{labels}}}") == 1
    assert tuple(recorded.log.lines[0][name] for name in ("key_id", "model", "code")) == (None, None, "unauthorized")


@pytest.mark.parametrize(
    ("denied", "sample"),
    [
        (Denial("rate_limit", "key requests", 0), 'rate_limited_total{limit="key_requests"}'),
        (Denial("insufficient_credits", "credit", 0), 'credit_rejections_total{reason="insufficient_credits"}'),
        (Denial("spend_limit", "key daily budget", 0), 'credit_rejections_total{reason="spend_limit"}'),
    ],
)
async def test_a_denial(recorded, denied, sample):
    recorded.recorder.count_denial(denied)
    assert await recorded.value(sample) == 1


async def test_a_client_that_hung_up(recorded):
    made = finished()
    made.outcome = "client_disconnected"
    recorded.recorder.begin(made)
    made.mark_streaming()
    recorded.recorder.end(made)
    assert await recorded.value('client_disconnects_total{phase="stream"}') == 1


async def test_an_attempt(recorded):
    recorded.recorder.attempted("u", "502")
    assert await recorded.value('upstream_requests_total{code="502",upstream="u"}') == 1


async def test_an_upstream_s_latency_by_model_and_a_failure_by_its_cause(recorded):
    whole, failed = finished(), finished()
    whole.is_stream, whole.first_event_at, whole.complete = False, 0.0, True
    failed.code, failed.status = "upstream_error", 502
    for made in (whole, failed):
        recorded.recorder.begin(made)
        recorded.recorder.end(made)
    expected = {
        'upstream_latency_seconds_sum{model="m",stream="false",upstream="u"}': 9.0,
        'upstream_latency_seconds_sum{model="m",stream="true",upstream="u"}': 1.0,
        'failures_total{cause="upstream_error",model="m"}': 1,
    }
    assert {sample: await recorded.value(sample) for sample in expected} == expected


def test_refusals_of_the_last_minute_are_counted_by_account_and_limit():
    times = [0.0]
    refusals = Refusals(lambda: times[0])
    for number in range(MAX_REFUSED + 1):
        refusals.note(f"a{number}", "key_requests", f"r{number}")
    refusals.note("a1", "key_requests", "again")
    found = {each.account: (each.lately, each.request_id) for each in refusals.lately()}
    assert (len(found), "a0" in found, found["a1"]) == (MAX_REFUSED, False, (2, "again"))
    times[0] = 3 * REFUSED_S
    assert refusals.lately() == []
