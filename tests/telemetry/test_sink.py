import io
import os
import subprocess
import sys
import threading

import pytest

from meshproxy.telemetry import logs
from meshproxy.telemetry.logs import LineSink, redact

SECRET = b"rsk_0123456789abcdef"
PROVIDER = b"sk-proj-0123456789_abcdef"


class Stream(io.BytesIO):
    """Tells of every write, and can be made to stand still or break."""

    def __init__(self):
        super().__init__()
        self.written = threading.Event()
        self.open = threading.Event()
        self.taken = threading.Event()
        self.open.set()
        self.broken = False

    def write(self, data):
        self.taken.set()
        self.open.wait(5)
        if self.broken:
            raise BrokenPipeError
        count = super().write(data)
        self.written.set()
        return count


@pytest.fixture
def stream():
    return Stream()


@pytest.fixture
def sink(stream):
    sink = LineSink(stream, lambda count: b"dropped %d\n" % count)
    yield sink
    stream.open.set()
    sink.close()


def test_lines_are_written_in_order_and_close_writes_the_rest(sink, stream):
    for number in range(1000):
        sink.write(b"%d\n" % number)
    sink.close()
    assert b"".join(b"%d\n" % number for number in range(1000)) == stream.getvalue()


def test_the_thread_writes_without_being_asked(sink, stream):
    sink.write(b"one\n")
    assert stream.written.wait(5)
    assert stream.getvalue() == b"one\n"


@pytest.mark.parametrize("line, urgent", [(b"x" * logs.FLUSH_BYTES, False), (b"x", True)])
def test_a_full_buffer_and_an_urgent_line_go_at_once(stream, monkeypatch, line, urgent):
    monkeypatch.setattr(logs, "FLUSH_INTERVAL_S", 60)
    sink = LineSink(stream, lambda _: b"")
    sink.write(line, urgent=urgent)
    assert stream.written.wait(5)
    sink.close()


def test_a_line_after_close_is_written(sink, stream):
    sink.close()
    sink.write(b"late\n")
    assert stream.getvalue() == b"late\n"


def test_a_stuck_reader_never_blocks_the_writer_and_the_loss_is_told(sink, stream, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BUFFERED_BYTES", 10)
    stream.open.clear()
    sink.write(b"first\n", urgent=True)
    assert stream.taken.wait(5)  # the thread has it in its hands, and stands still
    for _ in range(3):
        sink.write(b"more.\n")
    stream.open.set()
    sink.close()
    assert stream.getvalue() == b"first\nmore.\ndropped 2\n"


def test_a_reader_that_is_gone_stops_nobody(sink, stream):
    stream.broken = True
    sink.write(b"lost\n")
    sink.flush()
    stream.broken = False
    sink.write(b"kept\n")
    sink.close()
    assert stream.getvalue() == b"kept\ndropped 1\n"


def test_lines_are_written_at_exit():
    program = (
        "import sys\nfrom meshproxy.telemetry.logs import LineSink\n"
        "LineSink(sys.stdout.buffer, lambda n: b'').write(b'last words\\n')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=dict(os.environ))
    assert (found.stdout, found.stderr) == (b"last words\n", b"")


@pytest.mark.parametrize("secret", [SECRET, PROVIDER, b"sk-or-v1-00112233445566778899"])
@pytest.mark.parametrize(
    "around",
    [
        b'{"key":"%s"}',
        b"Bearer %s",
        b"a line\\n%s",  # as JSON escapes them
        b"tab\\t%s and more",
        b"\\u000b%s",
        b"\x1b[35m%s\x1b[0m",  # as the console paints them
        b"key=%s&x=1",
        b"(%s)",
        b"\xc3\xa9%s",
    ],
)
def test_secrets_are_taken_out(around, secret):
    assert around.replace(b"%s", b"[redacted]") == redact(around.replace(b"%s", secret))


def test_our_own_secret_is_taken_out_wherever_it_stands():
    assert redact(b"x" + SECRET) == b"x[redacted]"


def test_any_bearer_is_taken_out():
    assert redact(b"authorization: Bearer gsk.abc/def+123==") == b"authorization: Bearer [redacted]"


@pytest.mark.parametrize(
    "line", [b"task-settle-0123456789", b"disk-full-everywhere", b"ask-me-anything", b"a bearer of news"]
)
def test_words_are_left_alone(line):
    assert line == redact(line)


def test_a_line_after_close_is_dropped_where_the_reader_stands_still(stream, monkeypatch):
    monkeypatch.setattr(logs, "CLOSE_TIMEOUT_S", 0.01)
    stream.open.clear()
    sink = LineSink(stream, lambda _: b"")
    sink.write(b"one\n", urgent=True)
    sink.close()
    sink.write(b"two\n")
    assert stream.getvalue() == b""
    stream.open.set()


STUCK = """
import os, sys
from meshproxy.telemetry.logs import LineSink
sink = LineSink(sys.stderr.buffer, lambda _: b"")
if sys.argv[1] == "ours":
    sink.write(b"x" * 1_000_000, urgent=True)
else:
    os.set_blocking(2, False)
    os.write(2, b"x" * 1_000_000)
    os.set_blocking(2, True)
print("written", flush=True)
sys.stdin.readline()
sink.close()
sink.write(b"stopped")
sink.write(b"stopped")
"""


@pytest.mark.parametrize("who", ["ours", "another process's"])
def test_a_process_ends_though_the_reader_of_stderr_stands_still(who):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", STUCK, who], **pipes) as process:
        process.stdout.readline()
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(10) == 0


NOT_BLOCKING = """
import os, sys
from meshproxy.telemetry.logs import LineSink
os.set_blocking(2, False)
sink = LineSink(sys.stderr.buffer, lambda _: b"")
for number in range(10_000):
    sink.write(b"%099d\\n" % number, urgent=True)
print("written", flush=True)
sys.stdin.readline()
sink.close()
"""


def test_a_stream_that_does_not_block_loses_nothing():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", NOT_BLOCKING], **pipes) as process:
        process.stdout.readline()  # far more is written by then than the pipe takes
        _, err = process.communicate(b"\n", timeout=10)
    assert [int(line) for line in err.splitlines()] == list(range(10_000))
