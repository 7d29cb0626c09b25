import json

from meshproxy.errors import overloaded
from meshproxy.gateway.exchange import error_reply


def test_a_refusal_is_the_envelope_and_its_headers():
    reply = error_reply(overloaded("Full.", 1.5), "req_1", [("x-more", "1")])
    expected = {
        "x-request-id": "req_1",
        "content-type": "application/json",
        "retry-after": "2",
        "retry-after-ms": "1500",
        "x-more": "1",
    }
    assert (reply.status, dict(reply.headers)) == (503, expected)
    assert ((told := json.loads(reply.body))["error"]["code"], told["request_id"]) == ("overloaded", "req_1")
