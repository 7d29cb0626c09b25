"""Whatever a client sends is answered in one way, or refused and the connection closed: never two."""

import json

import pytest

from meshproxy.telemetry.families import NONE, OTHER
from tests.harness.clients import answers_in
from tests.hostile.corpus import CASES, CHAT, END


@pytest.mark.parametrize("name", CASES)
async def test_it_is_read_in_one_way(mesh, name):
    data, statuses = CASES[name]
    caller = await mesh.key()
    answers = answers_in(await mesh.raw(data.replace(b"KEY", caller.secret.encode()) + END))
    assert tuple(status for status, _, _ in answers) == statuses
    served = statuses.count(200)
    assert len(mesh.received) == served
    assert len(await mesh.settlements(caller)) == served
    assert len([line for line in mesh.log.lines if line["status"] == 200]) == served
    _, headers, _ = answers[-1]
    assert headers["connection"] == "close"
    if statuses[-1] in MESSAGES:
        assert_refused(mesh, answers[-1])


MESSAGES = {  # by status: the code, and how the message begins
    400: ("bad_request", "This is not a valid HTTP request: "),
    414: ("uri_too_long", "The request's target is too long: "),
    431: ("request_head_too_large", "The request's head is too large: "),
}


def assert_refused(mesh, answer):
    status, headers, body = answer
    told = json.loads(body)
    code, message = MESSAGES[status]
    assert (headers["content-type"], told["error"]["code"]) == ("application/json", code)
    assert headers["x-request-id"] == told["request_id"] == told["error"]["request_id"]
    assert told["error"]["message"].startswith(message)
    assert counted(mesh, status) == 1


def counted(mesh, status):
    """How many requests were counted with this status: as invalid HTTP, or as a chat request whose body is invalid."""
    mesh.worker.metrics.count_pending()
    families = [
        mesh.worker.metrics.requests.labels(route, NONE, str(status), "false") for route in (OTHER, CHAT.decode())
    ]
    return sum(sample.value for family in families for sample in family.collect()[0].samples[:1])
