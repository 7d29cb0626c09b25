"""A client's connection by its table: each state and event as a transcript, and walks through all of them at random.

A transcript is a state, what happens there (`WAYS` has how a connection came there), and what the connection does, in words.
These are written down by a transport and a host that stand in for the event loop's and the listener's.
"""

import asyncio
import math
import weakref

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.server import fast_path
from meshproxy.server.fast_path import MAX_AHEAD_BYTES, NEXT, ClientConnection, Event, State
from tests.harness.waiting import SkewedLoop, turns

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: m\r\ncontent-length: 4\r\n\r\n"
BODY = b"[{}]"
LARGE = HEAD.replace(b": 4", b": 200000")
GET = b"GET /v1/models HTTP/1.1\r\nhost: m\r\n\r\n"
DATA = {
    "half": HEAD[:40],
    "other half": HEAD[40:] + BODY,
    "rest of the head": HEAD[40:],
    "blank": b"\r\n\r\n",
    "head": HEAD,
    "body": BODY,
    "request": HEAD + BODY,
    "two requests": (HEAD + BODY) * 2,
    "request and a half": HEAD + BODY + HEAD[:40],
    "large head": LARGE,
    "large piece": b"x" * (MAX_AHEAD_BYTES + 1),
    "other form": GET,
    "request and other form": HEAD + BODY + GET,
    "flood": (HEAD + BODY) * 1000,
}


class Transport:
    """What the event loop gives a connection. `unsent`: bytes that the client hasn't taken."""

    def __init__(self, did):
        self.did = did
        self.unsent = 0
        self.is_reading = True
        self.is_open = True

    def get_extra_info(self, _name):
        return None

    def get_write_buffer_size(self):
        return self.unsent

    def write(self, data):
        self.did.append(f"write {data.decode()}")

    def pause_reading(self):
        self.is_reading = False

    def resume_reading(self):
        self.is_reading = True

    def set_protocol(self, _protocol):
        """The others' protocol says so itself."""

    def close(self):
        if self.is_open:  # the event loop's do nothing else
            self.did.append("close")
        self.is_open = False

    def abort(self):
        self.is_open = False
        self.did.append("abort")


class Others(asyncio.Protocol):
    """aiohttp's side."""

    def __init__(self, did):
        self._did = did

    def connection_made(self, transport):
        self._did.append("hand over")

    def data_received(self, data):
        """They have all that follows."""


class Host:
    """The listener, and the handler of its requests, which does what `acts` says."""

    def __init__(self, did):
        self.did = did
        self.acts = asyncio.Queue()
        self.there = 0
        self.running = 0

    def header_timeout_s(self):
        return 10.0

    def has_room(self, _descriptor):
        return True

    def joined(self, _connection):
        self.there += 1

    def left(self, _connection):
        self.there -= 1
        self.did.append("leave")

    def others(self, _source):
        return Others(self.did)

    def too_late(self):
        return b"408"

    def handler(self):
        return self

    async def serve(self, connection, _fields):
        self.did.append("serve")
        self.running += 1
        stays = False
        try:
            while (act := await self.acts.get()) == "read":
                self.did.append(f"read {len(await connection.body(5.0))}")
            stays = act == "answer"
        except TimeoutError:
            self.did.append("too slow")
        except asyncio.CancelledError:
            self.did.append("cancelled")
            raise
        finally:
            self.running -= 1
            connection.answered(keep_alive=stays)


class Traced(ClientConnection):
    """A connection that keeps its transitions."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.moves = []

    def advance(self, event):
        before = self.state
        super().advance(event)
        self.moves.append((before, event, self.state))


class Play:
    """One connection, played with words."""

    def __init__(self):
        self.did = []
        self.loop = asyncio.get_running_loop()
        self.host = Host(self.did)
        self.transport = Transport(self.did)
        self.connection = Traced(self.host, self.loop, None)
        self.connection.connection_made(self.transport)
        self.is_lost = False

    @property
    def is_handed_over(self):
        return self.connection.state is State.HANDED_OVER

    async def happens(self, word):
        """Something happens. What can't happen to a connection is left out, as bytes after its end."""
        connection, transport = self.connection, self.transport
        if self.is_lost or self.is_handed_over:
            return
        if word in DATA:
            if transport.is_open and transport.is_reading:
                connection.data_received(DATA[word])
        elif word in {"read", "answer", "answer last"}:
            if self.host.running:
                self.host.acts.put_nowait(word)
        elif word == "congest" and not transport.unsent and self.host.running:
            transport.unsent = 1
            connection.pause_writing()
        elif word == "take" and transport.unsent:
            transport.unsent = 0
            connection.resume_writing()
        elif word == "late":
            self.loop.skew += max(fast_path.KEEPALIVE_S, fast_path.LINGER_S) + 1
            if connection.deadline <= self.loop.time():
                connection.expire()
        elif word in {"force_close", "abort", "interrupt"}:
            getattr(connection, word)()
        elif word == "lost":
            self.is_lost = True
            transport.is_open = False
            connection.connection_lost(None)
        await turns(4)  # turns in which a handler goes on


def play(work, *arguments):
    """Run a coroutine on a loop whose time a test moves; nothing is left running on it."""
    with asyncio.Runner(loop_factory=SkewedLoop) as runner:
        return runner.run(work(*arguments))


WAYS = {  # how a connection comes into each state
    State.IDLE: (),
    State.HEAD: ("half",),
    State.RECEIVING: ("head",),
    State.ANSWERING: ("request",),
    State.SKIPPING: ("head", "answer"),
    State.LINGERING: ("head", "answer last"),
    State.HELD: ("request", "congest", "answer"),
    State.HANDED_OVER: ("other form",),
    State.CLOSED: ("request", "force_close"),
}
ENDS = [
    (state, event, word, did, State.CLOSED)
    for state, cancelled in (
        (State.IDLE, []),
        (State.HEAD, []),
        (State.RECEIVING, ["cancelled"]),
        (State.ANSWERING, ["cancelled"]),
        (State.SKIPPING, []),
        (State.LINGERING, []),
        (State.HELD, []),
    )
    for event, word, did in (
        (Event.CLOSE, "force_close", ["close"]),
        (Event.LOST, "lost", ["leave", *cancelled]),
    )
]
TRANSCRIPTS = [
    (State.IDLE, Event.HEAD_BEGUN, "half", [], State.HEAD),
    (State.IDLE, Event.REQUEST_BEGUN, "head", ["serve"], State.RECEIVING),
    (State.IDLE, Event.REQUEST, "request", ["serve"], State.ANSWERING),
    (State.IDLE, Event.OTHER_FORM, "other form", ["leave", "hand over"], State.HANDED_OVER),
    (State.IDLE, Event.LATE, "late", ["close"], State.CLOSED),
    (State.HEAD, Event.HEAD_BEGUN, "half of the rest", [], State.HEAD),
    (State.HEAD, Event.REQUEST_BEGUN, "rest of the head", ["serve"], State.RECEIVING),
    (State.HEAD, Event.REQUEST, "other half", ["serve"], State.ANSWERING),
    (State.HEAD, Event.OTHER_FORM, "blank", ["leave", "hand over"], State.HANDED_OVER),
    (State.HEAD, Event.LATE, "late", ["write 408", "close"], State.CLOSED),
    (State.RECEIVING, Event.BODY_END, "body", [], State.ANSWERING),
    (State.RECEIVING, Event.ANSWERED, "answer", [], State.SKIPPING),
    (State.RECEIVING, Event.ANSWERED_LAST, "answer last", [], State.LINGERING),
    (State.ANSWERING, Event.ANSWERED, "answer", [], State.IDLE),  # by HELD: the client isn't behind
    (State.ANSWERING, Event.ANSWERED_LAST, "answer last", ["close"], State.CLOSED),
    (State.SKIPPING, Event.BODY_END, "body", [], State.IDLE),
    (State.SKIPPING, Event.LATE, "late", ["close"], State.CLOSED),
    (State.LINGERING, Event.BODY_END, "body", ["close"], State.CLOSED),
    (State.LINGERING, Event.LATE, "late", ["close"], State.CLOSED),
    (State.HELD, Event.TAKEN, "take", [], State.IDLE),
    (State.CLOSED, Event.ANSWERED, "answer", [], State.CLOSED),
    (State.CLOSED, Event.ANSWERED_LAST, "answer last", [], State.CLOSED),
    (State.CLOSED, Event.CLOSE, "abort", ["abort"], State.CLOSED),
    (State.CLOSED, Event.LOST, "lost", ["leave", "cancelled"], State.CLOSED),
    *ENDS,
]
DATA["half of the rest"] = HEAD[40:50]


@pytest.mark.parametrize(("state", "event", "word", "did", "after"), TRANSCRIPTS)
def test_transcript(state, event, word, did, after):
    async def work():
        played = Play()
        for step in WAYS[state]:
            await played.happens(step)
        begun, moves = len(played.did), len(played.connection.moves)
        assert played.connection.state is state
        await played.happens(word)
        outcome = played.connection.moves[moves][:2], played.did[begun:], played.connection.state
        await played.happens("lost")
        return outcome

    assert play(work) == ((state, event), did, after)


def test_a_passed_deadline_of_a_closed_connection_changes_nothing():
    async def work():
        played = Play()
        await played.happens("force_close")
        played.connection.expire()
        return played.did, played.connection.moves[-1]

    assert play(work) == (["close"], (State.CLOSED, Event.LATE, State.CLOSED))


def test_each_pair_of_the_table_has_a_transcript():
    played = {(state, event) for state, event, *_ in TRANSCRIPTS} | {(State.CLOSED, Event.LATE)}
    assert played == {(state, event) for state, row in NEXT.items() for event in row}


@pytest.mark.parametrize(
    ("state", "event"), [(state, event) for state in State for event in Event if event not in NEXT[state]]
)
def test_an_event_that_the_table_does_not_have_closes(state, event):
    async def work():
        played = Play()
        for step in WAYS[state]:
            await played.happens(step)
        begun = len(played.did)
        played.connection.advance(event)
        outcome = played.connection.state, played.connection.deadline, played.did[begun:]
        await played.happens("lost")
        return outcome

    is_closed_before = state is State.CLOSED or event is Event.LOST
    assert play(work) == (State.CLOSED, math.inf, [] if is_closed_before else ["close"])


def test_a_handler_that_ends_after_its_client_has_gone_begins_no_other_request():
    async def work():
        played = Play()
        for step in ("two requests", "force_close", "answer", "lost"):
            await played.happens(step)
        return played.did

    assert play(work) == ["serve", "close", "leave"]


def test_a_part_of_a_body_is_never_the_body():
    """Of a connection that is being closed while its handler begins to read."""

    async def work():
        played = Play()
        for step in ("large head", "large piece", "abort", "read", "lost"):
            await played.happens(step)
        return played.did

    assert play(work) == ["serve", "abort", "leave", "cancelled"]


def test_a_client_that_sends_far_ahead_is_read_again_once_the_rest_is_small():
    async def work():
        played = Play()
        looks = []
        for step in ("request", "flood", *["answer"] * 1000):
            await played.happens(step)
            looks.append(played.transport.is_reading)
        await played.happens("lost")
        return looks

    asked = (len(DATA["flood"]) - MAX_AHEAD_BYTES) // len(
        HEAD + BODY
    ) + 1  # requests that are begun until the rest is small
    assert play(work) == [True, False, *[False] * (asked - 1), *[True] * (1001 - asked)]


def test_a_body_that_is_not_wanted_yet_is_not_read_without_bound():
    async def work():
        played = Play()
        looks = []
        for step in ("large head", "large piece", "read"):
            await played.happens(step)
            looks.append(played.transport.is_reading)
        await played.happens("lost")
        return looks

    assert play(work) == [True, False, True]


BEGINNINGS = ("half", "head", "request", "two requests", "request and a half", "large head", "flood")
ENDINGS = ("answer last", "other form", "request and other form", "late", "force_close", "abort", "interrupt", "lost")
RESTS = ("half of the rest", "rest of the head", "other half")
WAITS_FOR_BYTES = (State.IDLE, State.HEAD, State.SKIPPING, State.LINGERING)


def usual_words(played):
    """What may happen now, but for what ends a connection."""
    words = []
    if played.transport.is_open and played.transport.is_reading:
        state = played.connection.state
        in_body = state in {State.RECEIVING, State.SKIPPING, State.LINGERING}
        words += ("body", "body", "body", "large piece") if in_body else RESTS if state is State.HEAD else BEGINNINGS
    if played.host.running:
        words += ("read", "answer", "answer", "congest")
    if played.transport.unsent:
        words += ("take", "take")
    return words or ENDINGS


@hypothesis.settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2**16)), min_size=10, max_size=100))
def test_a_random_walk_stays_in_the_table_and_leaves_nothing(steps):
    async def work():
        played = Play()
        connection = played.connection
        for kind, number in steps:
            words = ENDINGS if kind == 7 else usual_words(played)
            await played.happens(words[number % len(words)])
            state = connection.state
            if state in WAITS_FOR_BYTES:
                assert played.transport.is_reading
                assert connection.deadline < math.inf
            else:
                assert connection.deadline == math.inf
        if not played.is_handed_over:
            await played.happens("lost")
            assert connection.state is State.CLOSED
        assert [move for move in connection.moves if move[1] not in NEXT[move[0]]] == []
        assert [move for move in connection.moves if NEXT[move[0]][move[1]] is not move[2]] == []
        assert (played.host.there, played.host.running) == (0, 0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        gone = weakref.ref(connection)
        del connection, played
        await turns(1)
        assert gone() is None

    play(work)
