"""The API keeps to its own description, whatever is made up from it."""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from meshproxy.policy.principal import Limits
from meshproxy.server.api import ROUTES
from meshproxy.server.openapi import PATH, document
from tests.harness.mesh import model

FREE = Limits(1_000_000, 1_000_000_000, 1_000_000)
EXAMPLES = os.environ.get("MESHPROXY_EXAMPLES", "10")
PATIENCE_S = 900


async def test_every_path_is_described_and_the_description_needs_no_key(mesh):
    answer = await mesh.request("GET", PATH)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert document() == answer.json
    described = {(method.upper(), path) for path, methods in answer.json["paths"].items() for method in methods}
    routes = {(method, path.replace(":.+", "")) for method, path, _ in ROUTES}
    assert {("POST", "/v1/chat/completions"), *routes} == described


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/v1/models", {"free", "provider"}),
        ("/v1/models/free", {"provider"}),
        ("/v1/models/paid", {"provider"}),
        ("/v1/models/search", {"q", "free", "brand", "sort", "order", "limit", "offset"}),
        ("/v1/usage", {"group_by", "session_id", "since", "until"}),
        ("/v1/key", set()),
    ],
)
def test_the_parameters_of_a_query_are_described(path, names):
    described = document()["paths"][path]["get"]["parameters"]
    assert {each["name"] for each in described if each["in"] == "query"} == names


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
async def test_what_is_made_up_from_the_description_is_answered_as_it_says(alone, mesh, tmp_path):
    gateway = await alone(models={"openai/gpt-4o": model("sim", "sim/fast?tokens=2")})
    caller = await mesh.key(credit="100000", limits=FREE)
    program = Path(sys.executable).parent / "schemathesis"
    process = await asyncio.create_subprocess_exec(
        program,
        "run",
        f"http://127.0.0.1:{gateway.port}{PATH}",
        f"--header=authorization: Bearer {caller.secret}",
        f"--max-examples={EXAMPLES}",
        "--checks=all",
        "--exclude-checks=ignored_auth,unsupported_method,positive_data_acceptance",
        "--seed=1",
        "--suppress-health-check=all",
        "--no-color",
        "--generation-database=none",
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(PATIENCE_S):
        told, _ = await process.communicate()
    assert process.returncode == 0, told.decode()
