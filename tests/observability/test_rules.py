"""deploy/prometheus by promtool, and that nothing in it names what the gateway doesn't count."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from meshproxy.telemetry.families import BY_NAME

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "prometheus"
CASES = sorted((Path(__file__).parent / "rules").glob("*.yml"))
RUNBOOK = ROOT / "docs" / "operations.md"
OF_PROMETHEUS = {"up", "process_open_fds", "process_max_fds"}
RULES = [
    rule
    for name in ("recording.yml", "alerts.yml")
    for group in yaml.safe_load((DEPLOY / name).read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]


def run(*command):
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def test_the_configuration_is_sound(promtool):
    code, said = run(promtool, "check", "config", DEPLOY / "prometheus.yml")
    assert (code, said.count("rules found")) == (0, 2), said


def test_the_rules_have_no_lint(promtool):
    code, said = run(promtool, "check", "rules", "--lint-fatal", DEPLOY / "recording.yml", DEPLOY / "alerts.yml")
    assert code == 0, said


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(promtool, path):
    code, said = run(promtool, "test", "rules", path)
    assert code == 0, said


def test_every_alert_has_a_case_that_fires_and_one_that_does_not():
    seen = set()
    for path in CASES:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for query in case["promql_expr_test"]:
                name = re.search(r'alertname="(\w+)"', query["expr"])[1]
                seen.add((name, bool(query["exp_samples"])))
    assert {(rule["alert"], fires) for rule in ALERTS for fires in (True, False)} == seen


def test_every_alert_says_what_it_is_and_where_to_read_on():
    for rule in ALERTS:
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook_url"}
        assert notes["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"page", "ticket"}


@pytest.mark.skipif(not RUNBOOK.exists(), reason="the runbook isn't written yet")
def test_every_alert_is_in_the_runbook():
    headings = {re.sub(r"[^\w-]", "", line.strip("# \n").lower()) for line in RUNBOOK.open() if line.startswith("#")}
    assert {rule["alert"].lower() for rule in ALERTS} - headings == set()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_read_what_there_is(rule):
    text = re.sub(r"\{[^}]*\}", "", rule["expr"])
    named = set(re.findall(r"(?<![\w:])(?:meshproxy_\w+|process_\w+|up)\b", text))
    bases = {re.sub(r"_(bucket|count|sum)$", "", name) for name in named}
    assert bases - BY_NAME.keys() - OF_PROMETHEUS == set()
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    assert set(re.findall(r"job:\w+:\w+", text)) - recorded == set()


def test_what_the_rules_call_fast_is_an_edge():
    text = "".join(rule["expr"] for rule in RULES)
    for family, edge in set(re.findall(r'(meshproxy_\w+)_bucket\{le="([\d.]+)"', text)):
        assert float(edge) in BY_NAME[family].edges
