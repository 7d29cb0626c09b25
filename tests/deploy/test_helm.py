"""The Helm chart, linted and rendered by the real helm: it passes Kubernetes' schemas, and its pod is that of the manifests."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from meshproxy.config import parse
from tests.deploy.test_files import DEPLOY, rendered

CHART = DEPLOY / "helm" / "meshproxy"
OPERATOR_KINDS = {"ServiceMonitor", "PrometheusRule"}  # the Prometheus operator's, whose schemas aren't in Kubernetes
EVERYTHING = (
    *("autoscaling.enabled=true", "ingress.enabled=true", "ingress.host=llm.example", "ingress.className=nginx"),
    *("serviceMonitor.enabled=true", "prometheusRule.enabled=true", "ingress.tlsSecret=llm-tls"),
)
ALWAYS = {"ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Service", "ServiceAccount"}


def helm(*arguments):
    """Run helm. Return what it prints; its warnings about the chart's symbolic links go to standard error."""
    program = shutil.which("helm", path=f"{os.environ['PATH']}:{Path.home() / 'go' / 'bin'}")
    if program is None:
        pytest.skip("helm is not installed")
    done = subprocess.run((program, *arguments), check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def template(*values, release="meshproxy", files=()):
    flags = [flag for value in values for flag in ("--set", value)]
    flags += [flag for value in files for flag in ("--set-file", value)]
    text = helm("template", release, str(CHART), "--namespace", "llm", "--kube-version", "1.31.0", *flags)
    return [document for document in yaml.safe_load_all(text) if document is not None]


def of_kind(documents, kind):
    (document,) = (document for document in documents if document["kind"] == kind)
    return document


def pod(documents):
    (workload,) = (document for document in documents if document["kind"] in {"Deployment", "StatefulSet"})
    return workload["spec"]["template"]["spec"]


def test_lint_finds_nothing():
    printed = helm("lint", "--strict", "--kube-version", "1.31.0", str(CHART))
    assert "1 chart(s) linted, 0 chart(s) failed" in printed


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ((), ALWAYS | {"Deployment"}),
        (EVERYTHING, ALWAYS | OPERATOR_KINDS | {"Deployment", "HorizontalPodAutoscaler", "Ingress"}),
        (("journal.persistent=true", "journal.storageClassName=fast"), ALWAYS | {"StatefulSet"}),
        (
            ("networkPolicy.enabled=false", "podDisruptionBudget.enabled=false"),
            ALWAYS - {"NetworkPolicy", "PodDisruptionBudget"} | {"Deployment"},
        ),
    ],
)
def test_what_is_rendered_passes_the_schemas(values, kinds):
    documents = template(*values)
    for document in documents:
        if document["kind"] not in OPERATOR_KINDS:
            kubernetes_validate.validate(document, "1.31", strict=True)
    assert {document["kind"] for document in documents} == kinds


@pytest.mark.parametrize("release", ["meshproxy", "prod", "a-release-whose-name-is-as-long-as-helm-lets-it-be-53"])
def test_a_release_selects_its_own_pods_alone(release):
    documents = template("serviceMonitor.enabled=true", release=release)
    labels = of_kind(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        of_kind(documents, kind)["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")
    ]
    selectors += [document["spec"]["selector"] for document in documents if document["kind"] == "Service"]
    selectors.append(of_kind(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"])
    assert selectors == [labels] * 5
    assert labels["app.kubernetes.io/instance"] == release
    assert max(len(document["metadata"]["name"]) for document in documents) <= 63


def test_the_pod_is_that_of_the_manifests():
    chart, manifests = pod(template()), pod(rendered())
    manifests["volumes"][0]["configMap"]["name"] = "meshproxy"  # Kustomize appends a hash of its content
    chart["topologySpreadConstraints"][0]["labelSelector"] = manifests["topologySpreadConstraints"][0]["labelSelector"]
    (container,) = chart["containers"]
    assert container.pop("imagePullPolicy") == "IfNotPresent"
    assert chart == manifests


def test_the_configuration_is_the_file_that_was_given(tmp_path):
    path = tmp_path / "meshproxy.toml"
    path.write_text(
        text := (DEPLOY / "kubernetes" / "meshproxy.toml").read_text().replace("workers = 2", "workers = 4")
    )
    given = of_kind(template(files=[f"config={path}"]), "ConfigMap")["data"]["meshproxy.toml"]
    assert tomllib.loads(given) == tomllib.loads(text)
    assert parse(of_kind(template(), "ConfigMap")["data"]["meshproxy.toml"]).server.workers == 2


@pytest.mark.parametrize(
    ("reload", "args", "replaced"), [("restart", ["serve"], True), ("watch", ["serve", "--watch"], False)]
)
def test_a_changed_configuration_replaces_the_pods_or_is_reloaded(tmp_path, reload, args, replaced):
    path = tmp_path / "meshproxy.toml"
    path.write_text("[server]\nworkers = 4\n")
    before, after = (
        of_kind(template(f"onConfigChange={reload}", files=files), "Deployment")["spec"]["template"]
        for files in ([], [f"config={path}"])
    )
    assert pod(template(f"onConfigChange={reload}"))["containers"][0]["args"] == args
    assert (before != after) == replaced


def test_an_image_is_named_by_digest_where_one_is_given():
    digest = "sha256:" + "0" * 64
    image = pod(template("image.repository=registry.example/meshproxy", f"image.digest={digest}"))["containers"][0][
        "image"
    ]
    assert image == f"registry.example/meshproxy@{digest}"


def test_the_rules_are_those_of_prometheus():
    rules = [
        document["spec"] for document in template("prometheusRule.enabled=true") if document["kind"] == "PrometheusRule"
    ]
    files = [yaml.safe_load((DEPLOY / "prometheus" / f"{name}.yml").read_text()) for name in ("recording", "alerts")]
    assert rules == files


@pytest.mark.parametrize(
    "value", ["replica=3", "onConfigChange=never", "image.digest=abc", "ingress.enabled=true", "service.port=0"]
)
def test_a_wrong_value_is_refused(value):
    with pytest.raises(AssertionError):
        template(value)


def test_the_manifests_and_the_chart_have_one_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    (image,) = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["images"]
    assert chart["version"] == chart["appVersion"] == image["newTag"]
