import asyncio

from meshproxy.telemetry.exposition import TOP_MODELS, decode, summarize
from meshproxy.telemetry.metrics import Metrics

CHAT = "/v1/chat/completions"


def summary(metrics):
    return summarize(decode(asyncio.run(metrics.snapshot())))


def test_nothing_counted_yet():
    found = summary(Metrics(["m"], ["up"]))
    assert found["requests"] == {"total": 0, "client_errors": 0, "server_errors": 0, "unpaid": 0, "limited": 0}
    assert (found["models"], sum(found["request_duration"]["counts"])) == ([], 0)
    (upstream,) = found["upstreams"]
    counted = [upstream[name] for name in ("name", "requests", "errors", "breaker_open", "state")]
    assert (counted, sum(upstream["first_token"]["counts"])) == (["up", 0, 0, False, "serving"], 0)
    assert len(found["request_duration"]["edges"]) + 1 == len(found["request_duration"]["counts"])


def test_an_empty_snapshot():
    assert summarize([])["in_flight"]["admit"] == 0


def test_requests_in_flight_and_config():
    metrics = Metrics(["m"], [])
    for code, count in (("200", 5), ("429", 2), ("404", 1), ("502", 1)):
        metrics.requests.labels(CHAT, "m", code, "true").inc(count)
    metrics.in_flight.labels("stream").set(3)
    metrics.config_generation.labels().set(4)
    metrics.config_last_reload_successful.labels().set(True)
    found = summary(metrics)
    assert found["requests"] == {"total": 9, "client_errors": 3, "server_errors": 1, "unpaid": 0, "limited": 2}
    assert found["in_flight"] == {"authenticate": 0, "resolve": 0, "admit": 0, "attempt": 0, "stream": 3, "settle": 0}
    assert found["config"] == {"generation": 4, "last_reload_successful": True}


def test_upstream_errors():
    metrics = Metrics([], ["a", "b"])
    for code in ("200", "400", "404", "429", "500", "timeout", "connect_error", "cancelled"):
        metrics.upstream_requests.labels("a", code).inc()
    metrics.breaker_open.labels("b").set(1)
    metrics.upstream_state.labels("a", "ejected").set(1)
    metrics.upstream_first_token.labels("a").observe(0.03)
    found = summary(metrics)["upstreams"]
    counted = [[each[name] for name in ("name", "requests", "errors", "breaker_open", "state")] for each in found]
    assert counted == [["a", 8, 4, False, "ejected"], ["b", 0, 0, True, "serving"]]
    assert [sum(each["first_token"]["counts"]) for each in found] == [1, 0]


def test_the_top_models():
    names = [f"m{number:02}" for number in range(TOP_MODELS + 5)]
    metrics = Metrics(names, [])
    for rank, name in enumerate(names):
        metrics.requests.labels(CHAT, name, "200", "false").inc(rank + 1)
    metrics.requests.labels(CHAT, "none", "401", "false").inc(999)
    for kind, amount in (("prompt", 10), ("completion", 5), ("cached", 8), ("reasoning", 4)):
        metrics.tokens.labels(names[-1], kind).inc(amount)
    metrics.cost.labels(names[-1]).inc(12_345_678_901)
    found = summary(metrics)["models"]
    assert names[: -TOP_MODELS - 1 : -1] == [model["model"] for model in found]
    assert found[0] == {"model": names[-1], "requests": TOP_MODELS + 5, "tokens": 15, "cost_usd": "12.345679"}


def test_distributions_are_added_up_over_labels():
    metrics = Metrics(["m"], [])
    metrics.request_duration.labels("m", "true").observe(0.06)
    metrics.request_duration.labels("m", "false").observe(0.07)
    metrics.ledger_op_duration.labels("admit").observe(0.001)
    metrics.ledger_errors.labels("timeout").inc(2)
    metrics.ledger_errors.labels("noscript").inc(3)  # no trouble: the script is sent and runs
    metrics.ledger_errors.labels("disconnected").inc(4)  # these have no duration
    found = summary(metrics)
    assert found["request_duration"]["counts"][1] == 2
    assert (found["ledger"]["ops"], found["ledger"]["errors"]) == (5, 6)
