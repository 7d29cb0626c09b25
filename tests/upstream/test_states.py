"""A connection to a provider by its table: each state and event as a transcript, and walks through all of them at random.

A transcript is a state, what happens there (`WAYS` has how a connection came there), and what is heard of it, in words. These are
written down by a transport, a pool, a caller and a sink that stand in for the real ones.
"""

import asyncio
import gc
import socket
import weakref

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import UpstreamError
from meshproxy.upstream.connection import NEXT, Connection, Event, State, Timeouts
from meshproxy.upstream.response import Response
from tests.harness.waiting import SkewedLoop, turns

SIZED = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"
DATA = {
    "half a head": SIZED[:20],
    "head": SIZED,
    "last head": SIZED.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
    "endless head": b"HTTP/1.1 200 OK\r\n\r\n",
    "chunked head": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    "answer": SIZED + b"hello",
    "answer and more": SIZED + b"hello, world",
    "empty answer": SIZED.replace(b"5", b"0"),
    "in br": SIZED.replace(b"\r\n\r\n", b"\r\ncontent-encoding: br\r\n\r\n"),
    "piece": b"hel",
    "body": b"hello",
    "body and more": b"hello, world",
    "chunk": b"5\r\nhello\r\n",
    "last chunk": b"0\r\n\r\n",
    "nonsense": b"SSH-2.0\r\n\r\n",
}


class Transport:
    """What the event loop gives a connection. `unsent`: bytes that the provider hasn't taken."""

    def __init__(self, heard, sock):
        self._heard = heard
        self._sock = sock
        self.unsent = 0
        self.is_open = True
        self.is_reading = True

    def get_extra_info(self, name):
        return self._sock if name == "socket" else None

    def get_write_buffer_size(self):
        return self.unsent

    def is_closing(self):
        return not self.is_open

    def write(self, _data):
        self._heard.append("written")

    def pause_reading(self):
        self.is_reading = False

    def resume_reading(self):
        self.is_reading = True

    def abort(self):
        if self.is_open:
            self._heard.append("abort")
        self.is_open = False


class Sink:
    """The receiver of a body."""

    def __init__(self, heard, act):
        self._heard = heard
        self._act = act  # called with every piece
        self.is_over = False

    def data(self, payload, _frame):
        assert not self.is_over
        self._heard.append(payload.decode())
        self._act()

    def end(self):
        assert not self.is_over
        self.is_over = True
        self._heard.append("end")

    def fail(self, error):
        assert not self.is_over
        self.is_over = True
        self._heard.append(f"fail {error.response.status}")


class Traced(Connection):
    """A connection that keeps its transitions."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.moves = []

    def advance(self, event, error=None):
        before = self.state
        super().advance(event, error)
        # What is told of an exchange's end may have begun the next one: only the move's own state counts.
        self.moves.append((before, event))


class Play:
    """One connection, played with words. `answers` are those to each request: a status, or what the caller was told."""

    def __init__(self, sock):
        self.heard = []
        self.loop = asyncio.get_running_loop()
        heard = self.heard
        self.transport = Transport(heard, sock)
        self.connection = Traced(
            Timeouts(10.0, 20.0, 30.0, 1 << 20), lambda _: heard.append("idle"), lambda _: heard.append("lost")
        )
        self.is_lost = False
        self.pending = None
        self.response = None
        self.sinks = []
        self.act = ""  # what the sink does at its next piece

    async def happens(self, word):
        """Something happens. What can't happen to a connection is left out, as bytes after its end."""
        connection, transport = self.connection, self.transport
        if self.is_lost:
            return
        if word == "connected":
            if connection.state in {State.NEW, State.CLOSED} and transport.is_open:
                connection.connection_made(transport)
        elif word == "send":
            answer = connection.send([b"POST"])
            if answer is not None:
                self.pending = answer
                answer.add_done_callback(self._answered)
        elif word in DATA or word == "eof":
            if self.is_connected and transport.is_open and transport.is_reading:
                connection.eof_received() if word == "eof" else connection.data_received(DATA[word])
        elif word == "give up":
            if self.pending is not None and not self.pending.done():
                self.pending.cancel()
        elif word == "abandon" and self.pending is not None:
            connection.abandon(self.pending)
        elif word in {"pause", "resume", "close"}:
            if self.response is not None:
                getattr(self.response, word)()
        elif word.startswith("then "):
            self.act = word.removeprefix("then ")
        elif word == "late":
            self.loop.skew += 31
        elif word == "stuck":
            transport.unsent = 1
        elif word == "abort":
            connection.abort()
        elif word == "lost" and self.is_connected:
            self.is_lost = True
            transport.is_open = False
            connection.connection_lost(None)
        await turns(4)  # turns in which timers fire and callers go on

    @property
    def is_connected(self):
        return self.connection.state is not State.NEW and not self.is_lost

    def _answered(self, answer):
        if answer.cancelled():
            return
        error = answer.exception()
        if error is not None:
            assert isinstance(error, UpstreamError)
            self.heard.append(f"error {error.response.status}")
            return
        self.response = answer.result()
        assert isinstance(self.response, Response)
        self.heard.append(f"answered {self.response.status}")
        self.sinks.append(Sink(self.heard, self._act))
        self.response.relay(self.sinks[-1])

    def _act(self):
        act, self.act = self.act, ""
        if act:
            getattr(self.response, act)()
        if act == "close":
            self.sinks[-1].is_over = True  # it hears no more, not even of an end that came in the same read


@pytest.fixture
def play():
    """Run a play on a loop whose time it moves."""
    ours, theirs = socket.socketpair()

    def run(work):
        with asyncio.Runner(loop_factory=SkewedLoop) as runner:
            return runner.run(started(work))

    async def started(work):
        return await work(Play(ours))

    yield run
    ours.close()
    theirs.close()


WAYS = {
    State.NEW: (),
    State.IDLE: ("connected",),
    State.WAITING: ("connected", "send"),
    State.BODY: ("connected", "send", "chunked head"),
    State.LAST_BODY: ("connected", "send", "endless head"),
    State.CLOSED: ("connected", "abort"),
}
FAILED = ["abort", "error 502"]
CUT = ["abort", "fail 502"]
TRANSCRIPTS = [
    (State.NEW, Event.CONNECTED, ["connected"], [], State.IDLE),
    (State.NEW, Event.ABORT, ["abort"], [], State.CLOSED),
    (State.IDLE, Event.SENT, ["send"], ["written"], State.WAITING),
    (State.IDLE, Event.UNASKED, ["answer"], ["abort"], State.CLOSED),
    (State.IDLE, Event.EOF, ["eof"], ["abort"], State.CLOSED),
    (State.IDLE, Event.LATE, ["late"], ["abort"], State.CLOSED),
    (State.IDLE, Event.ABORT, ["abort"], ["abort"], State.CLOSED),
    (State.IDLE, Event.LOST, ["lost"], ["lost"], State.CLOSED),
    (State.WAITING, Event.HEAD, ["half a head", "late head"], ["answered 200"], State.BODY),
    (State.WAITING, Event.HEAD, ["head"], ["answered 200"], State.BODY),
    (State.WAITING, Event.LAST_HEAD, ["last head"], ["answered 200"], State.LAST_BODY),
    (State.WAITING, Event.LAST_HEAD, ["endless head"], ["answered 200"], State.LAST_BODY),
    (State.WAITING, Event.UNASKED, ["give up", "head"], ["abort"], State.CLOSED),
    (State.WAITING, Event.BROKEN, ["nonsense"], FAILED, State.CLOSED),
    (State.WAITING, Event.BROKEN, ["in br"], FAILED, State.CLOSED),
    (State.WAITING, Event.EOF, ["eof"], FAILED, State.CLOSED),
    (State.WAITING, Event.LATE, ["late"], ["abort", "error 504"], State.CLOSED),
    (State.WAITING, Event.ABORT, ["abort"], FAILED, State.CLOSED),
    (State.WAITING, Event.ABORT, ["give up", "abandon"], ["abort"], State.CLOSED),
    (State.WAITING, Event.LOST, ["lost"], ["lost", "error 502"], State.CLOSED),
    (State.BODY, Event.END, ["chunk", "last chunk"], ["hello", "idle", "end"], State.IDLE),
    (State.BODY, Event.DIRTY_END, ["stuck", "last chunk"], ["abort", "end"], State.CLOSED),
    (State.BODY, Event.BROKEN, ["nonsense"], CUT, State.CLOSED),
    (State.BODY, Event.EOF, ["chunk", "eof"], ["hello", *CUT], State.CLOSED),
    (State.BODY, Event.LATE, ["late"], ["abort", "fail 504"], State.CLOSED),
    (State.BODY, Event.ABORT, ["close"], ["abort"], State.CLOSED),
    (State.BODY, Event.LOST, ["lost"], ["fail 502", "lost"], State.CLOSED),
    (State.BODY, Event.END, ["then pause", "end at once"], ["hello", "idle", "end"], State.IDLE),
    (State.BODY, Event.ABORT, ["then close", "end at once"], ["hello", "abort"], State.CLOSED),
    (State.LAST_BODY, Event.END, ["piece", "eof"], ["hel", "abort", "end"], State.CLOSED),
    (State.LAST_BODY, Event.DIRTY_END, ["stuck", "eof"], ["abort", "end"], State.CLOSED),
    (State.LAST_BODY, Event.LATE, ["late"], ["abort", "fail 504"], State.CLOSED),
    (State.LAST_BODY, Event.ABORT, ["close"], ["abort"], State.CLOSED),
    (State.LAST_BODY, Event.LOST, ["lost"], ["fail 502", "lost"], State.CLOSED),
    (State.CLOSED, Event.ABORT, ["abort"], [], State.CLOSED),
    (State.CLOSED, Event.LOST, ["lost"], ["lost"], State.CLOSED),
]
# In LAST_BODY only a body with a length or in chunks can break, or end too soon.
OTHER_WAYS = [
    (["connected", "send", "last chunked head"], Event.BROKEN, ["nonsense"], CUT),
    (["connected", "send", "last chunked head"], Event.EOF, ["eof"], CUT),
]
DATA["end at once"] = DATA["chunk"] + DATA["last chunk"]
DATA["late head"] = SIZED[20:]
DATA["last chunked head"] = DATA["chunked head"].replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("way", "state", "event", "words", "heard", "after"),
    [
        *((WAYS[state], state, *rest) for state, *rest in TRANSCRIPTS),
        *((way, State.LAST_BODY, event, words, heard, State.CLOSED) for way, event, words, heard in OTHER_WAYS),
    ],
)
def test_transcript(play, way, state, event, words, heard, after):
    async def work(played):
        for word in way:
            await played.happens(word)
        begun = len(played.heard)
        assert played.connection.state is state
        for word in words:
            await played.happens(word)
        outcome = played.connection.moves[-1], played.heard[begun:], played.connection.state
        assert not played.transport.is_open or played.transport.is_reading
        await played.happens("lost")
        return outcome

    assert play(work) == ((state, event), heard, after)


@pytest.mark.parametrize(
    ("event", "hear"),
    [
        (Event.CONNECTED, lambda played: played.connection.connection_made(played.transport)),
        (Event.UNASKED, lambda played: played.connection.data_received(b"x")),
        (Event.EOF, lambda played: played.connection.eof_received()),
        (Event.LATE, lambda played: played.connection.advance(Event.LATE)),
    ],
)
def test_what_the_loop_still_delivers_to_a_closed_connection_changes_nothing(play, event, hear):
    async def work(played):
        await played.happens("connected")
        await played.happens("abort")
        hear(played)
        await played.happens("lost")
        return played.heard, played.connection.moves[-2]

    assert play(work) == (["abort", "lost"], (State.CLOSED, event))


def test_a_dial_that_was_given_up_makes_no_idle_connection(play):
    async def work(played):
        await played.happens("abort")
        await played.happens("connected")
        return played.heard, played.connection.state

    assert play(work) == (["abort"], State.CLOSED)


def test_each_pair_of_the_table_has_a_transcript():
    played = {(state, event) for state, event, *_ in TRANSCRIPTS}
    played |= {(State.LAST_BODY, event) for _, event, *_ in OTHER_WAYS}
    played |= {(State.CLOSED, event) for event in (Event.CONNECTED, Event.UNASKED, Event.EOF, Event.LATE)}
    assert played == {(state, event) for state, row in NEXT.items() for event in row}


@pytest.mark.parametrize(
    ("state", "event"), [(state, event) for state in State for event in Event if event not in NEXT[state]]
)
def test_an_event_that_the_table_does_not_have_closes_and_tells(play, state, event):
    async def work(played):
        for word in WAYS[state]:
            await played.happens(word)
        begun = len(played.heard)
        played.connection.advance(event)
        await played.happens("nothing")
        outcome = played.connection.state, played.heard[begun:]
        await played.happens("lost")
        return outcome

    told = {State.IDLE: ["abort"], State.WAITING: FAILED, State.BODY: CUT, State.LAST_BODY: CUT}
    heard = told.get(state, [])
    assert play(work) == (State.CLOSED, heard)


def usual_words(played):
    """What may happen now, but for what ends a connection."""
    state = played.connection.state
    if state in {State.NEW, State.CLOSED}:
        return ("connected",)
    if state is State.IDLE:
        return ("send",)
    if state is State.WAITING:
        return (*(word for word in DATA if word.endswith("head")), "answer", "answer", "empty answer")
    return ("piece", "body", "chunk", "chunk", "last chunk", "pause", "resume", "resume", "then pause", "then close")


ENDINGS = (
    *("answer and more", "body and more", "in br", "nonsense", "eof", "give up"),
    *("abandon", "close", "late", "stuck", "abort", "lost"),
)


@hypothesis.settings(
    max_examples=300, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)  # the fixture's socket is only looked at
@given(steps=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2**16)), min_size=10, max_size=60))
def test_a_random_walk_stays_in_the_table_and_leaves_nothing(play, steps):
    async def work(played):
        connection = played.connection
        for kind, number in steps:
            words = ENDINGS if kind == 7 else usual_words(played)
            await played.happens(words[number % len(words)])
            assert connection.state is not State.IDLE or played.transport.is_reading
        if connection.state is State.NEW:
            await played.happens("connected")
        await played.happens("lost")
        assert connection.state is State.CLOSED
        assert [move for move in connection.moves if move[1] not in NEXT[move[0]]] == []
        assert played.heard.count("lost") == 1
        assert played.pending is None or played.pending.done()
        assert all(sink.is_over for sink in played.sinks[:-1])
        assert asyncio.all_tasks() == {asyncio.current_task()}
        gone = weakref.ref(connection)
        del connection
        played.connection = played.pending = played.response = None
        await turns(1)
        gc.collect(0)  # an error's traceback may hold it in a circle
        assert gone() is None

    gc.disable()  # what is made here stays in generation 0, and a look at the others would take long
    try:
        play(work)
    finally:
        gc.enable()
