"""Padded streams: what is said is the same, and the sizes on the wire tell nothing of it."""

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.server.chat import MAX_PADDED_BYTES, PADDING_STEP_BYTES, PaddedStream
from tests.harness.clients import HELLO
from tests.hostile.corpus import request

SEED = 7


class Written:
    """A `Downstream` that keeps what is written."""

    def __init__(self):
        self.writes = []

    def write(self, payload, frame=None):
        assert frame is None
        self.writes.append(payload)


async def test_a_padded_stream_says_the_same(start_mesh):
    mesh, padded = await start_mesh(), await start_mesh(stream={"padding": True})
    caller = await mesh.key()
    padded.callers.append(caller)
    asked = {"model": "sim/unicode", "seed": SEED}
    plain, filled = await mesh.stream(caller, **asked), await padded.stream(caller, **asked)
    assert plain.text == filled.text
    assert filled.events[-1] == "[DONE]"
    assert len(plain.events) == len(filled.events)
    chunks = await padded.sdk(caller).chat.completions.create(
        model="sim/unicode", messages=HELLO, stream=True, seed=SEED
    )
    assert plain.text == "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


async def test_the_sizes_of_its_chunks_differ_only_where_the_largest_grows(start_mesh):
    mesh = await start_mesh(stream={"padding": True})
    caller = await mesh.key()
    body = b'{"model": "sim/unicode", "messages": [{"role": "user", "content": "hi"}], "stream": true}'
    asked = request(b"Connection: close", b"Content-Length: %d" % len(body), body=body)
    answer = await mesh.raw(asked.replace(b"KEY", caller.secret.encode()))
    sizes = [size for size in _chunk_sizes(answer.partition(b"\r\n\r\n")[2]) if size]
    single = [size for size in sizes if size <= MAX_PADDED_BYTES]  # of the others, many events came at once
    assert single == sorted(single)
    assert [size for size in sizes if size % (PADDING_STEP_BYTES if size in single else MAX_PADDED_BYTES)] == []


async def test_a_replay_is_padded_as_the_answer_was_and_its_record_is_not(start_mesh):
    mesh = await start_mesh(stream={"padding": True})
    caller = await mesh.key()
    headers = {"idempotency-key": "once"}
    first = await mesh.chat(caller, headers=headers, stream=True)
    again = await mesh.chat(caller, headers=headers, stream=True)
    assert first.events == again.events
    assert b": ..." in again.body
    keys = [key for key in await mesh.worker.store.execute("KEYS", "*") if await _is_list(mesh, key)]
    kept = [part for key in keys for part in await mesh.worker.store.execute("LRANGE", key, 0, -1)]
    assert [part for part in kept if b": ..." in part] == []


@given(st.lists(st.binary(min_size=1, max_size=5000), min_size=1))
def test_every_write_is_filled_up_and_begins_with_what_was_to_be_said(payloads):
    written = Written()
    stream = PaddedStream(written)
    for payload in payloads:
        stream.write(payload, b"frame")
    level = 0
    for payload, got in zip(payloads, written.writes, strict=True):
        assert got.startswith(payload)
        comment = got[len(payload) :]
        assert comment.startswith(b": ")
        assert comment.endswith(b"\n\n")
        assert comment[2:-2].strip(b".") == b""
        if len(got) > MAX_PADDED_BYTES:
            assert len(got) % MAX_PADDED_BYTES == 0
        else:
            assert len(got) % PADDING_STEP_BYTES == 0
            assert len(got) >= level
            level = len(got)


async def _is_list(mesh, key):
    return await mesh.worker.store.execute("TYPE", key) == b"list"


def _chunk_sizes(body):
    while body:
        line, _, body = body.partition(b"\r\n")
        yield int(line, 16)
        body = body[int(line, 16) + 2 :]
