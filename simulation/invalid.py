"""Requests that the gateway refuses by itself: what is wrong with each, and the error that it gets (docs/errors.md)."""

import json
from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

MAX_BODY_BYTES: Final = 200_000
UNAUTHORIZED: Final = 401
CHAT: Final = "/v1/chat/completions"


class Invalid(Struct, frozen=True):
    """What is wrong with a request, and its error.

    `fields`: of its body, in the place of its own; None: it lacks the field. `headers` likewise. `cut`: bytes that its body
    lacks at the end. `body`: in its body's place. `param`: what the error names.
    """

    status: int
    code: str
    param: str | None = None
    fields: Mapping[str, Any] = {}
    headers: Mapping[str, str | None] = {}
    method: str = "POST"
    target: str = CHAT
    body: bytes | None = None
    cut: int = 0

    @property
    def names_no_key(self) -> bool:
        """Whether its key isn't looked at, or it has none."""
        return not self.is_logged or self.status == UNAUTHORIZED

    @property
    def is_logged(self) -> bool:
        """Whether it is one of those of which the log has a line: it is for chat completions."""
        return (self.method, self.target) == ("POST", CHAT)


def _field(name: str, value: Any, param: str | None = None) -> Invalid:
    return Invalid(422, "validation_error", param or name, fields={name: value})


INVALID: Final[Mapping[str, Invalid]] = {
    "JSON that ends early": Invalid(422, "validation_error", cut=2),
    "no JSON": Invalid(422, "validation_error", body=b"model=plain&stream=true"),
    "a list": Invalid(422, "validation_error", body=b"[]"),
    "no body": Invalid(422, "validation_error", body=b""),
    "no UTF-8": Invalid(422, "validation_error", body=b'{"model": "\xff"}'),
    "no messages": _field("messages", None),
    "empty messages": _field("messages", []),
    "messages of another type": _field("messages", "Hello."),
    "a message without a role": _field("messages", [{"content": "Hello."}], "messages[0].role"),
    "a temperature in words": _field("temperature", "hot"),
    "a temperature above 2": _field("temperature", 2.5),
    "a cap of 0": _field("max_tokens", 0),
    "no choice": _field("n", 0),
    "a stream in words": _field("stream", "yes"),
    "a long session": _field("session_id", "s" * 257),
    "variables that aren't strings": _field("variables", {"manner": 7}, "variables.manner"),
    "a tool choice of another name": _field("tool_choice", "perhaps"),
    "an unknown transform": _field("transforms", ["middle-in"], "transforms[0]"),
    "an unknown model": Invalid(404, "model_not_found", "model", fields={"model": "plane"}),
    "an unknown fallback": Invalid(404, "model_not_found", "model", fields={"models": ["plane"]}),
    "an unknown template": Invalid(404, "template_not_found", "template", fields={"template": "greetings"}),
    "a body that is too large": Invalid(413, "request_too_large", fields={"metadata": {"note": "-" * MAX_BODY_BYTES}}),
    "no key": Invalid(401, "unauthorized", headers={"authorization": None}),
    "an unknown key": Invalid(401, "unauthorized", headers={"authorization": f"Bearer rsk_{'0' * 32}"}),
    "a key of another scheme": Invalid(401, "unauthorized", headers={"authorization": "Basic cnNrOg=="}),
    "another method": Invalid(405, "method_not_allowed", method="PUT"),
    "a method without a body": Invalid(405, "method_not_allowed", method="DELETE", body=b""),
    "an unknown path": Invalid(404, "not_found", target="/v1/chat/completion"),
    "a path without its version": Invalid(404, "not_found", target="/chat/completions"),
    "text": Invalid(415, "unsupported_media_type", headers={"content-type": "text/plain"}),
    "a compressed body": Invalid(415, "unsupported_media_type", headers={"content-encoding": "gzip"}),
    "an unknown version": Invalid(400, "invalid_api_version", headers={"x-mesh-version": "1999-01"}),
    "an Idempotency-Key that is too long": Invalid(
        422, "validation_error", "idempotency-key", headers={"idempotency-key": "k" * 300}
    ),
}


def spoiled(name: str, headers: Mapping[str, str], body: bytes) -> tuple[str, dict[str, str], bytes]:
    """Return the method and target, the headers and the body of a request with this fault; of a valid one for an empty name."""
    if not name:
        return f"POST {CHAT}", {**headers, "content-length": str(len(body))}, body
    wrong = INVALID[name]
    if wrong.body is not None:
        body = wrong.body
    elif wrong.fields:
        fields = {**json.loads(body), **wrong.fields}
        body = json.dumps({field: value for field, value in fields.items() if value is not None}).encode()
    body = body[: len(body) - wrong.cut]
    sent = {**headers, **wrong.headers, "content-length": str(len(body))}
    return f"{wrong.method} {wrong.target}", {field: value for field, value in sent.items() if value is not None}, body
