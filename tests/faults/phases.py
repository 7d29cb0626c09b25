"""The phases of a request on each leg: where in the bytes a fault strikes."""

from meshproxy.ledger.records import key_record
from meshproxy.ledger.store import Script
from tests.harness.clients import length_in
from tests.harness.proxy import GatewayError, Position

HEAD_END = b"\r\n\r\n"
WAITING = "waiting for the answer"  # struck when the provider has the request, wherever the bytes are
THEN = "as soon as that has struck"  # of a second fault
IDLE = "idle in the pool"  # struck before the request
SCRIPTS = {name: Script.load(name) for name in ("admit", "renew", "settle")}
MARKS = {"look-up": key_record("").encode()} | {name: script.sha.encode() for name, script in SCRIPTS.items()}


def behind_head(more: int) -> Position:
    """So many bytes behind a head."""

    def at(seen: bytes) -> int | None:
        head, found, _ = seen.partition(HEAD_END)
        return len(head + found) + more if found else None

    return at


def whole_request(seen: bytes) -> int | None:
    """Behind a body of a length that is told."""
    head, found, _ = seen.partition(HEAD_END)
    return len(head + found) + length_in(head) if found else None


def in_the_middle(seen: bytes) -> int | None:
    """In the third event of a stream, or in a body."""
    if b"text/event-stream" not in seen:
        return behind_head(100)(seen)
    events = seen.split(b"data: ", 3)
    return len(seen) - len(events[3]) + 12 if len(events) == 4 else None


def at_the_end(seen: bytes) -> int | None:
    """Behind a stream's [DONE] and before the end of its coding, or before the last byte of a body."""
    if b"text/event-stream" not in seen:
        end = whole_request(seen)
        return None if end is None else end - 1
    before, found, _ = seen.partition(b"[DONE]\n\n")
    return len(before + found) if found else None


def call(command: str, mode: str) -> GatewayError:
    """In the call of a script, or of what else has a mark, ten bytes into that: it never runs."""

    def at(seen: bytes) -> int | None:
        before, found, _ = seen.partition(MARKS[command])
        return len(before) + 10 if found else None

    return GatewayError(mode, "target", at)


def reply(command: str, mode: str, at: int) -> GatewayError:
    """In the reply to a command, which has run."""
    return GatewayError(mode, "caller", lambda _: at, after=MARKS[command])


HTTP = {
    "connected": GatewayError,
    "in the request's head": lambda mode: GatewayError(mode, "target", lambda _: 40),
    "in the request's body": lambda mode: GatewayError(mode, "target", behind_head(10)),
    "behind the request": lambda mode: GatewayError(mode, "target", whole_request),
    "before the answer": lambda mode: GatewayError(mode, "caller", lambda _: 0),
    "in the answer's head": lambda mode: GatewayError(mode, "caller", lambda _: 40),
    "behind the answer's head": lambda mode: GatewayError(mode, "caller", behind_head(0)),
    "in the answer's body": lambda mode: GatewayError(mode, "caller", in_the_middle),
    "at the answer's end": lambda mode: GatewayError(mode, "caller", at_the_end),
}
REDIS = {"connected": lambda mode: GatewayError(mode, lasting=True)} | {
    f"{command}, {place}": fault
    for command in MARKS
    for place, fault in {
        "in the call": lambda mode, command=command: call(command, mode),
        "before the reply": lambda mode, command=command: reply(command, mode, 0),
        "in the reply": lambda mode, command=command: reply(command, mode, 3),
    }.items()
}
HANDSHAKE = {
    "in the client's hello": lambda mode: GatewayError(mode, "target", lambda _: 40),
    "before the server's hello": lambda mode: GatewayError(mode, "caller", lambda _: 0),
    "in the server's hello": lambda mode: GatewayError(mode, "caller", lambda _: 40),
}
TLS = ("before the answer", "in the answer's head", "in the answer's body", "at the answer's end")
PHASES = {
    "client": {**HTTP, WAITING: None},
    "upstream": {IDLE: None, **HTTP},
    "handshake": HANDSHAKE,
    "TLS": {IDLE: None} | {phase: HTTP[phase] for phase in TLS},
    "Redis": REDIS,
}
