import re
import tomllib
from pathlib import Path

import pytest

from meshproxy.config import Buckets
from meshproxy.telemetry.families import BY_NAME, CLOSED, OWN

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "config.example.toml"
SOURCE = "".join(path.read_text() for path in sorted((ROOT / "meshproxy").rglob("*.py")))
PROMISED = """
build_info version
requests_total route model code stream
request_duration_seconds model stream
time_to_first_token_seconds model
time_per_output_token_seconds model
stream_max_gap_seconds model
overhead_seconds stream
tokens_total model type
cost_usd_total model
rate_limited_total limit
credit_rejections_total reason
in_flight_requests phase
upstream_requests_total upstream code
upstream_time_to_first_token_seconds upstream
upstream_request_duration_seconds upstream
upstream_breaker_open upstream
upstream_state upstream state
account_requests_total account code
account_cost_usd_total account
account_balance_usd account
account_budget_spent_ratio account budget
client_disconnects_total phase
ledger_op_duration_seconds op
ledger_errors_total kind
settlements_total outcome usage_source
event_loop_lag_seconds
config_generation
config_last_reload_successful
"""


@pytest.mark.parametrize("line", PROMISED.split("\n")[1:-1])
def test_a_promised_family_has_the_promised_labels(line):
    name, *labels = line.split()
    assert tuple(labels) == BY_NAME[f"meshproxy_{name}"].labels


def test_every_label_is_closed():
    of_the_configuration = {"model", "upstream", "version", "account"}
    assert {label for definition in OWN for label in definition.labels} - CLOSED.keys() - of_the_configuration == set()


def test_edges_rise_and_cover_what_was_asked():
    for definition in OWN:
        assert list(definition.edges) == sorted(set(definition.edges))
        assert (definition.kind == "histogram") == bool(definition.edges)
    spans = {
        name: (BY_NAME[f"meshproxy_{name}_seconds"].edges[0], BY_NAME[f"meshproxy_{name}_seconds"].edges[-1])
        for name in ("time_to_first_token", "request_duration", "time_per_output_token", "overhead")
    }
    assert spans == {
        "time_to_first_token": (0.01, 120),
        "request_duration": (0.05, 600),
        "time_per_output_token": (0.001, 2.5),
        "overhead": (0.0001, 1),
    }


def test_the_example_shows_every_histogram_as_it_is():
    text = EXAMPLE.read_text().partition("\n[metrics.buckets]\n")[2].partition("\n\n")[0]
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# meshproxy_")]
    shown = tomllib.loads("\n".join(lines))
    assert {d.name: list(d.edges) for d in OWN if d.kind == "histogram"} == shown


def test_the_configuration_names_every_histogram():
    assert {definition.name for definition in OWN if definition.kind == "histogram"} == {*Buckets.__struct_fields__}


def test_what_the_ledger_is_asked_has_a_label():
    commands = set(re.findall(r'execute\(\s*"([A-Z]+)"', SOURCE))
    scripts = set(re.findall(r'load\("(\w+)"', SOURCE))
    assert {"admit", "settle"} < scripts
    assert (commands | scripts) - CLOSED["op"] == set()


def test_every_background_task_has_a_label():
    names = set(re.findall(r'(?:spawn|supervise)\("([a-z-]+)"', SOURCE))
    assert names - {"worker-keeper"} == CLOSED["task"]  # the supervisor's, which has a log and no counters


def test_every_outcome_has_a_label():
    assigned = set(re.findall(r'outcome = "(\w+)"', SOURCE))
    assert assigned - CLOSED["outcome"] == {"replayed"}  # which settles nothing
