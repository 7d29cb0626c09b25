"""The files of deploy/, each judged by the program that reads it, or by its schema."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

from meshproxy.config import parse
from tests.deploy.conftest import ROOT, tell
from tests.deploy.test_balancers import haproxy_config, nginx_config
from tests.harness.process import program

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
UNIT = DEPLOY / "systemd" / "meshproxy.service"
BIN = Path(sys.executable).parent
MANIFESTS = sorted(path for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml")
EXPOSURE = 1.5  # of 10; systemd-analyze calls less than 2 OK


def run(*command, env=None):
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=30, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Instance:
    def __init__(self, port):
        self.listen, self.admin = f"127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"


INSTANCES = [Instance(18080), Instance(28080)]


def test_haproxy_accepts_its_configuration_without_a_warning(tmp_path):
    haproxy = program("haproxy")
    path = tmp_path / "haproxy.cfg"
    path.write_text(haproxy_config(INSTANCES, 18000))
    told = run(haproxy, "-c", "-f", str(path))
    assert ("Configuration file is valid" in told, "WARNING" in told) == (True, False), told


def test_nginx_accepts_its_configuration(tmp_path):
    nginx = program("nginx")
    path = tmp_path / "nginx.conf"
    path.write_text(nginx_config(INSTANCES, 18000, tmp_path))
    told = run(nginx, "-t", "-e", "stderr", "-p", str(tmp_path), "-c", str(path))
    assert ("test is successful" in told, "[warn]" in told) == (True, False), told


@pytest.fixture
def unit(tmp_path):
    """The unit, with the meshproxy of these tests in the place of the one that will be installed."""
    path = tmp_path / "meshproxy.service"
    path.write_text(UNIT.read_text().replace("/opt/meshproxy/bin", str(BIN)))
    return path


def test_systemd_accepts_the_unit_without_a_word(unit):
    assert run(program("systemd-analyze"), "verify", str(unit)) == ""


def test_the_unit_is_hardened(unit):
    told = run(program("systemd-analyze"), "security", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}", str(unit))
    score = float(re.search(r"exposure level for meshproxy.service: ([0-9.]+)", told)[1])
    tell(f"exposure {score} of 10")
    assert score <= EXPOSURE


def test_the_unit_waits_for_the_drain():
    times = dict(re.findall(r"^(TimeoutStopSec|TimeoutStartSec)=(\d+)$", UNIT.read_text(), re.MULTILINE))
    assert int(times["TimeoutStopSec"]) >= parse("").server.drain_s + 60


def test_a_reload_of_the_unit_is_a_signal_and_needs_no_credential():
    lines = UNIT.read_text().splitlines()
    assert [line for line in lines if line.startswith("ExecReload=")] == ["ExecReload=/bin/kill -HUP $MAINPID"]
    assert [line for line in lines if line.startswith("LoadCredential")] == []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_as_its_schema_says(path):
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == "ServiceMonitor":  # of the Prometheus operator, whose schema isn't in Kubernetes
            assert document.keys() == {"apiVersion", "kind", "metadata", "spec"}
            continue
        kind = document["kind"]
        if kind in {"Deployment", "Service"}:  # kustomize writes the selector
            document["spec"].setdefault("selector", {"matchLabels": {}} if kind == "Deployment" else {})
        kubernetes_validate.validate(document, "1.31", strict=True)


def rendered():
    """What `kubectl apply -k` would send."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    return list(yaml.safe_load_all(run(kubectl, "kustomize", str(KUBERNETES))))


def test_kustomize_renders_what_the_schemas_accept():
    documents = rendered()
    for document in documents:
        if document["kind"] != "ServiceMonitor":
            kubernetes_validate.validate(document, "1.31", strict=True)
    kinds = {document["kind"] for document in documents}
    assert kinds == {
        *("ConfigMap", "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget", "Service"),
        *("ServiceAccount", "ServiceMonitor"),
    }


def test_everything_selects_the_same_pods():
    documents = rendered()
    by_kind = {document["kind"]: document for document in documents}
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [by_kind[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    selectors += [document["spec"]["selector"] for document in documents if document["kind"] == "Service"]
    selectors.append(by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"])
    assert [labels] * 5 == selectors
    monitor = by_kind["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    services = [document for document in documents if document["kind"] == "Service"]
    assert [s["metadata"]["name"] for s in services if monitor.items() <= s["metadata"]["labels"].items()] == [
        "meshproxy-admin"
    ]


def test_the_network_policy_has_the_ports_that_are_used_and_redis_is_still_another_s_pod():
    (policy,) = (document for document in rendered() if document["kind"] == "NetworkPolicy")
    ingress = [[port["port"] for port in rule["ports"]] for rule in policy["spec"]["ingress"]]
    egress = [[port["port"] for port in rule["ports"]] for rule in policy["spec"]["egress"]]
    assert (ingress, egress) == ([["http"], ["admin"]], [[53, 53], [6379], [443]])
    (redis,) = policy["spec"]["egress"][1]["to"]
    assert redis["podSelector"].keys() == {"matchExpressions"}


def test_secrets_are_files_of_the_secret_and_none_is_in_the_config_map():
    settings = parse((KUBERNETES / "meshproxy.toml").read_text())
    secrets = [settings.server.admin_token, settings.redis.password]
    secrets += [upstream.api_key for upstream in settings.upstreams.values()]
    told = (KUBERNETES / "kustomization.yaml").read_text()
    files = [Path(secret.file) for secret in secrets]
    assert [Path("/run/secrets/meshproxy")] * 3 == [path.parent for path in files]
    assert [path.name for path in files if f"--from-file={path.name}" not in told] == []


@pytest.mark.parametrize(
    ("name", "extras"), [("requirements.lock", ("otel",)), ("requirements-dev.lock", ("otel", "dev"))]
)
def test_a_lock_has_all_that_the_project_asks_for_by_hash_and_names_no_host(name, extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [line for extra in extras for line in project["project"]["optional-dependencies"][extra]]
    entries = re.findall(r"^([^\s#].*?) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", lock(name), re.MULTILINE)
    assert lock(name) == "".join(f"{line} \\\n{hashes}" for line, hashes in entries)
    versions = versions_in(name)
    unmet = [
        line
        for line in wanted
        for requirement in [Requirement(line)]
        if requirement.name not in versions or versions[requirement.name] not in requirement.specifier
    ]
    assert unmet == [], "make lock"


def test_the_image_has_the_versions_that_are_tested():
    assert versions_in("requirements.lock").items() <= versions_in("requirements-dev.lock").items()


def lock(name):
    return (DEPLOY / name).read_text()


def versions_in(name):
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", lock(name), re.MULTILINE))


def test_a_pod_has_the_time_to_drain():
    (pod,) = (
        doc["spec"]["template"]["spec"] for doc in yaml.safe_load_all((KUBERNETES / "deployment.yaml").read_text())
    )
    server = parse((KUBERNETES / "meshproxy.toml").read_text()).server
    (container,) = pod["containers"]
    pre_stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pre_stop_s + server.drain_grace_s + server.drain_s + 30
    assert container["resources"]["requests"]["cpu"] == f"{server.workers}"


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.toml")), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_a_configuration_is_fit(path):
    settings = parse(path.read_text())
    assert settings.defaults.model in settings.models
    assert settings.server.drain_grace_s > 0


def test_hadolint_accepts_the_dockerfile():
    assert run(str(BIN / "hadolint"), str(DEPLOY / "Dockerfile")) == ""


def test_the_image_has_what_it_copies_and_runs_as_nobody():
    lines = dockerfile().splitlines()
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    sent = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == sent
    final = lines[max(index for index, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert "USER 10001:10001" in final
    assert 'ENTRYPOINT ["meshproxy"]' in final
    assert any(line.startswith("HEALTHCHECK ") and line.endswith('CMD ["meshproxy", "healthcheck"]') for line in final)


def test_compose_mounts_what_there_is():
    site = yaml.safe_load(compose())
    mounts = [volume.split(":")[0] for service in site["services"].values() for volume in service.get("volumes", ())]
    assert [
        path for path in mounts if path.startswith(".") and not (DEPLOY / "compose" / path).resolve().exists()
    ] == []
    named = {path for path in mounts if not path.startswith(".")}
    assert set(site["volumes"]) == named
    assert set(site["services"]) == {
        "meshproxy-1",
        "meshproxy-2",
        "provider",
        "haproxy",
        "valkey",
        "prometheus",
        "grafana",
    }
    for name in ("meshproxy-1", "meshproxy-2"):
        service = site["services"][name]
        assert (service["read_only"], service["cap_drop"], service["stop_grace_period"]) == (True, ["ALL"], "11m")


def test_compose_s_prometheus_accepts_its_configuration(tmp_path):
    promtool = program("promtool")
    shutil.copy(DEPLOY / "compose" / "prometheus.yml", tmp_path)
    for name in ("recording.yml", "alerts.yml"):
        shutil.copy(DEPLOY / "prometheus" / name, tmp_path)
    text = (tmp_path / "prometheus.yml").read_text().replace("/run/secrets/admin-token", str(tmp_path / "token"))
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "token").write_text("x")
    run(promtool, "check", "config", str(tmp_path / "prometheus.yml"))


def test_no_file_names_a_registry_s_host():
    named = [
        (path.name, image)
        for path in DEPLOY.rglob("*")
        if path.is_file()
        for image in re.findall(r"^\s*(?:image:|FROM)\s+(\S+)", path.read_text(), re.MULTILINE)
        if "." in image.partition("/")[0].partition(":")[0]
    ]
    assert named == []


def test_every_image_has_a_version():
    images = re.findall(r"^\s*(?:image:|ARG PYTHON=)\s*(\S+)", compose() + dockerfile(), re.MULTILINE)
    assert [image for image in images if not re.search(r":[0-9v]", image) and image != "meshproxy"] == []


def compose():
    return (DEPLOY / "compose" / "compose.yaml").read_text()


def dockerfile():
    return (DEPLOY / "Dockerfile").read_text()


def test_every_alert_has_its_page():
    alerts = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    wanted = set(re.findall(r"runbook_url: docs/operations.md#(\S+)", alerts))
    names = {name.lower() for name in re.findall(r"alert: (\S+)", alerts)}
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert names == wanted
    assert wanted - {heading.lower() for heading in headings} == set()
