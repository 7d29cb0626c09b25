"""Redis in the world: fakeredis' commands and the ledger's real scripts in Lua, behind RESP on the network.

The store is a process of its own. Bytes come in, commands run one at a time, replies go out; its clock is the run's plus
`clock_offset_s`. The Lua interpreter and compiled scripts are kept between runs: a script keeps nothing in it, since
each call makes its functions anew.

Faults: attributes that hold until they are changed (`refusal`, `is_silent`, `delay_s`), acts (`go_down`, `come_back`,
`drop_connections`, `flush_scripts`, `fail_over`, `jump`), and `on_command`, which is asked about each command and returns
a `Fate`.
"""

import asyncio
import copy
import enum
import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import hiredis
import redis
from fakeredis import FakeServer
from fakeredis._command_args_parsing import Float
from fakeredis._commands import COMMANDS_WITH_SUB, Key, Signature
from fakeredis._core._database import CommandItem, Item
from fakeredis._helpers import OK, NoResponse, SimpleError, SimpleString
from fakeredis._msgs import (
    FLAG_DO_NOT_CREATE,
    FLAG_LEAVE_EMPTY_VAL,
    FLAG_SKIP_CONVERT_TO_RESP2,
    NO_MATCHING_SCRIPT_MSG,
    WRONGTYPE_MSG,
)
from fakeredis._socket._fakesocket import FakeSocket
from fakeredis._socket._resp import convert_to_resp2
from fakeredis.commands_mixins.scripting_mixin import LUA_MODULE
from fakeredis.model import Hash, is_write_command
from msgspec import Struct

from simulation.commands import READING, WRITING, Unusual
from simulation.loop import PROCESS, SimLoop
from simulation.network import SimTransport

HOST, PORT = "store", 6379
LAG_S = 1.0  # how far a replica is behind at most
INFO = b"# Memory\r\nmaxmemory:0\r\nmaxmemory_policy:noeviction\r\n# Persistence\r\naof_enabled:1\r\nloading:0\r\n"
PONG = SimpleString(b"PONG")
OOM = "OOM command not allowed when used memory > 'maxmemory'."
READONLY = "READONLY You can't write against a read only replica."
MISCONF = "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk."
# Write commands that Redis takes with its memory full: those without the flag DENYOOM (COMMAND INFO).
FREEING = frozenset({
    "del", "expire", "flushall", "flushdb", "hdel", "persist", "pexpire", "srem", "unlink", "xdel", "xtrim", "zrem",
    "zremrangebyscore",
})  # fmt: skip
UNORDERED = frozenset({"smembers", "sunion", "sinter", "sdiff"})  # whose replies have the order of Python's sets


class Fate(enum.Enum):
    """What becomes of a command."""

    RUN = "run"
    DROP_BEFORE = "connection lost before it ran"
    DROP_AFTER = "connection lost after it ran"
    LOSE_REPLY = "reply lost"  # and with it all that follow on this connection


class _Lua:
    """One interpreter for all runs. `client` is whose script runs."""

    def __init__(self) -> None:
        self.runtime = LUA_MODULE.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        self.compiled: dict[bytes, Any] = {}
        self.client: Client | None = None
        self.runtime.eval(b"""function(call)
            redis = {call = call, error_reply = function(text) return {err = text} end,
                     status_reply = function(text) return {ok = text} end,
                     pcall = function(...)
                        local ok, found = pcall(call, ...)
                        return ok and found or {err = tostring(found)}
                     end}
            end""")(self._call)
        self._run = self.runtime.eval(b"""function(chunk, keys, argv)
            KEYS = keys; ARGV = argv
            local result = chunk()
            if type(result) ~= 'table' or result.err ~= nil or result.ok ~= nil then return -1, result end
            local size = 0
            while result[size + 1] ~= nil do size = size + 1 end
            return size, unpack(result, 1, size)
            end""")

    def _call(self, command: bytes, *args: Any) -> Any:
        """Run a script's command, and return what Lua gets."""
        client = self.client
        assert client is not None
        quick = READING.get(command) or (WRITING.get(command) if client.store.refusal is None else None)
        if quick is None:
            return client.called(command, args)
        try:
            result = quick(client._db, *args)
        except Unusual:
            return client.called(command, args)
        kind = type(result)
        if kind is bytes or kind is int:
            return result
        if kind is list and result and type(result[0]) is not list:
            return self.runtime.table_from([False if item is None else item for item in result])
        return client._convert_redis_result(self.runtime, result)

    def run(self, client: "Client", sha: bytes, script: bytes, keys: Any, args: Any) -> Any:
        """Run a script for a client, and return its reply (Redis, "Lua to Redis type conversion")."""
        chunk = self.compiled.get(sha)
        if chunk is None:
            chunk = self.compiled[sha] = self.runtime.compile(script)
        table = self.runtime.table_from
        self.client = client
        try:
            result = self._run(chunk, table(keys), table(args))
        except (SimpleError, LUA_MODULE.LuaError):
            self.runtime.execute(b"collectgarbage()")  # Lua keeps the exception, and with it the run
            raise
        finally:
            self.client = None  # kept, it would keep its run
        if type(result) is not tuple:
            return []
        if result[0] < 0:
            return _from_lua(result[1])
        return [item if type(item) is bytes or type(item) is int else _from_lua(item) for item in result[1:]]


_lua: list[_Lua] = []  # made with the first script: a process has one


class Client(FakeSocket):
    """fakeredis' state of a connection; one for all of a store, since none has a state. `execute` runs one command."""

    store: "Store"
    is_dirty = False  # whether the running script has written

    def __init__(self, server: FakeServer) -> None:
        super().__init__(server, 0, client_class=redis.Redis)
        self.replies: list[Any] = []

    def clear(self) -> None:
        """Forget all data and scripts, and the store."""
        self._server.dbs.clear()
        self._server.script_cache.clear()
        self._db = self._server.dbs[0]
        del self.store

    def put_response(self, msg: Any) -> None:
        """Keep a reply."""
        self.replies.append(msg)

    def _decode_result(self, result: Any) -> Any:
        """Keep the reply's type, from which it is encoded."""
        return result

    def execute(self, fields: list[bytes]) -> Any:
        """Run one command. INFO is ours: fakeredis has none. What the gateway sends often takes a shorter way."""
        name = fields[0].upper()
        if name == b"INFO":
            return INFO
        if name == b"PING":
            return PONG
        if name == b"CLIENT" and fields[1:2] == [b"SETNAME"]:
            return OK
        db = self._db
        db.time = time.time()
        try:
            with self._server.lock:
                if name == b"EVALSHA":
                    return self._run_script(fields[1], int(fields[2]), fields[3:])
                if name == b"EVAL":
                    return self.eval(fields[1], int(fields[2]), *fields[3:])
                quick = READING.get(name) or (WRITING.get(name) if self.store.refusal is None else None)
                if quick is not None:
                    with suppress(Unusual):
                        return quick(db, *fields[1:])
                shorter = _SHORTER.get(name)
                if shorter is not None:
                    result, sig = self._ran(shorter, fields[1:])
                    self.is_dirty = False
                    return result if FLAG_SKIP_CONVERT_TO_RESP2 in sig.flags else convert_to_resp2(result)
        except SimpleError as error:
            return error
        self._process_command(fields)
        return self.replies.pop() if self.replies else None

    def _run_command(self, func: Any, sig: Signature, args: list[Any], from_script: bool) -> Any:  # noqa: FBT001 - as there
        refusal = self.store.refusal
        if refusal is not None and is_write_command(sig.name.encode()):
            is_taken = refusal == OOM and (sig.name in FREEING or self.is_dirty)
            if not is_taken:
                return SimpleError(refusal)
        return super()._run_command(func, sig, args, from_script)

    def eval(self, script: bytes, numkeys: int, *keys_and_args: bytes) -> Any:
        """Run a script, and keep it for EVALSHA."""
        sha = _sha_of(script)
        self._server.script_cache[sha] = script
        return self._run_script(sha, numkeys, keys_and_args)

    def _run_script(self, sha: bytes, numkeys: int, keys_and_args: Sequence[bytes]) -> Any:
        script = self._server.script_cache.get(sha)
        if script is None:
            raise SimpleError(NO_MATCHING_SCRIPT_MSG)
        if not _lua:
            _lua.append(_Lua())
        self.is_dirty = False
        self._script_resp = 2
        try:
            result = _lua[0].run(self, sha, script, keys_and_args[:numkeys], keys_and_args[numkeys:])
        except LUA_MODULE.LuaError as error:
            raise SimpleError(f"ERR {error} script: {sha.decode()}") from error
        finally:
            self._script_resp = None
            self.is_dirty = False
        return result

    def called(self, command: bytes, args: tuple[Any, ...]) -> Any:
        """Run a script's command, and return what Lua gets. It is fakeredis' _run_command without pub/sub and RESP3."""
        name = _lower(command)
        if name in COMMANDS_WITH_SUB and args:
            name, args = f"{name} {args[0].decode().lower()}", args[1:]
        result, sig = self._ran(name, [arg if type(arg) is bytes else b"%.17g" % arg for arg in args])
        kind = type(result)
        if kind is bytes or kind is int:
            return result
        if kind is list and _PLAIN.issuperset(map(type, result)) and name not in UNORDERED:
            return _lua[0].runtime.table_from([False if item is None else item for item in result])
        if FLAG_SKIP_CONVERT_TO_RESP2 not in sig.flags:
            result = convert_to_resp2(result)
        return self._convert_redis_result(_lua[0].runtime, _ordered(name, result))

    def _ran(self, name: str, words: list[Any]) -> tuple[Any, Signature]:
        """Run a command, and return its result and how its arguments were read. Raises SimpleError."""
        known = _commands.get(name)
        if known is None:
            _, sig = self._name_to_func(name)
            known = _commands[name] = (sig, is_write_command(sig.name.encode()))
        sig, is_write = known
        if is_write:
            refusal = self.store.refusal
            if refusal is not None and not (refusal == OOM and (name in FREEING or self.is_dirty)):
                raise SimpleError(refusal)
            self.is_dirty = True
        shape = _shapes.get((name, len(words)))
        if shape is None:
            shape = _shapes[name, len(words)] = _shape(sig, len(words), self.version, words)
        ready = shape.applied(words, self._db)
        if len(ready) == 1:
            result = ready[0]
        else:
            result = getattr(self, sig.func_name)(*ready[0])
            for item in ready[1]:
                if item.is_modified:
                    _write_back(item, removes_empty=shape.removes_empty)
        return result, sig


class _Shape(NamedTuple):
    """How so many arguments of a command are read: fakeredis' Signature.apply, with what doesn't depend on values done once."""

    keys: list[tuple[int, Any]]  # by place: its type, where a key may be missing
    decoders: list[tuple[int, Any]]
    removes_empty: bool
    creates: bool

    def applied(self, words: list[Any], db: Any) -> tuple[Any, ...]:
        """Return a short answer for a key that is missing, or the arguments and the items of the keys."""
        for place, decode in self.decoders:
            words[place] = decode(words[place])
        stored, now, found = db._dict, db.time, []
        for place, key in self.keys:
            item = stored.get(words[place])
            if item is not None and item.expireat is not None and item.expireat < now:
                del stored[words[place]]
                item = None
            if item is None and key.missing_return is not Key.UNSPECIFIED:
                return (key.missing_return,)
            found.append(item)
        items = []
        for (place, key), item in zip(self.keys, found, strict=True):
            kind = key.type_
            if kind is not None and item is not None and type(item.value) is not kind:
                raise SimpleError(WRONGTYPE_MSG)
            is_made = self.creates and item is None and kind is not None and kind is not bytes
            words[place] = CommandItem(words[place], db, item, default=kind() if is_made else None)
            items.append(words[place])
        return words, items


def _write_back(item: CommandItem, *, removes_empty: bool) -> None:
    """Store what a command changed: fakeredis' CommandItem.writeback, without clients that watch or wait for a key."""
    stored, value = item.db._dict, item.value
    if not item._modified or item.key not in item.db:
        item.writeback(remove_empty_val=removes_empty)
    elif type(value) is not bytes and (value is None or (removes_empty and not value)):
        del stored[item.key]
    else:
        stored[item.key].value, stored[item.key].expireat = value, item.expireat
        item.db.schedule_expiry(item.key, item.expireat)


def _shape(sig: Signature, count: int, version: Any, words: list[bytes]) -> _Shape:
    """Return the shape of a command with so many arguments. Raises SimpleError if it takes another number."""
    sig.check_arity(words, version)
    repeats = [sig.repeat[place % len(sig.repeat)] for place in range(count - len(sig.fixed))]
    kinds = list(enumerate([*sig.fixed, *repeats]))
    return _Shape(
        keys=[(place, kind) for place, kind in kinds if isinstance(kind, Key)],
        decoders=[(place, kind.decode) for place, kind in kinds if not isinstance(kind, Key) and kind is not bytes],
        removes_empty=FLAG_LEAVE_EMPTY_VAL not in sig.flags,
        creates=FLAG_DO_NOT_CREATE not in sig.flags,
    )


@cache
def _lower(command: bytes) -> str:
    return command.decode().lower()


# Commands that neither block nor depend on a connection's state, by the name that fakeredis has for them.
_SHORTER = {name.upper().encode(): name for name in ("sadd", "smembers", "lrange", "zcount")}
_PLAIN = frozenset((bytes, int, type(None)))  # what needs no conversion in a list
_commands: dict[str, tuple[Signature, bool]] = {}  # by name: how its arguments are read, and whether it writes
_shapes: dict[tuple[str, int], _Shape] = {}  # by name and number of arguments: scripts have few


def _from_lua(result: Any) -> Any:
    """Return a script's result as a reply (Redis, "Lua to Redis type conversion")."""
    if type(result) is bytes:
        return result
    if isinstance(result, bool):
        return 1 if result else None
    if isinstance(result, (int, float)):
        return int(result)
    if result is None:
        return None
    if (text := result[b"err"]) is not None:
        raise SimpleError(text.decode())
    if (text := result[b"ok"]) is not None:
        return SimpleString(text)
    items: list[Any] = []
    while (item := result[len(items) + 1]) is not None:
        items.append(_from_lua(item))
    return items


def _ordered(name: str, reply: Any) -> Any:
    return sorted(reply) if name in UNORDERED and isinstance(reply, list) else reply


def encode(reply: Any) -> bytes:
    """Encode a reply as RESP2."""
    if type(reply) is bytes:
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, (list, tuple)):
        return b"*%d\r\n%b" % (len(reply), b"".join(map(encode, reply)))
    if isinstance(reply, SimpleString):
        return b"+%b\r\n" % reply.value
    if isinstance(reply, SimpleError):
        return b"-%b\r\n" % reply.value.replace("\r", " ").replace("\n", " ").encode()
    if isinstance(reply, float):
        return encode(Float.encode(reply, humanfriendly=False))
    if isinstance(reply, str):
        return encode(reply.encode())
    if isinstance(reply, dict):
        return encode([each for pair in reply.items() for each in pair])
    raise TypeError(f"a reply of type {type(reply).__name__}")


_spare: list[Client] = []  # with their servers, of runs before


class Store:
    """The server. `on_command` decides each command's fate, from its words."""

    def __init__(self, loop: SimLoop) -> None:
        self.loop = loop
        self.process = loop.process("store")
        self.process.is_deferring = False
        self.client = _spare.pop() if _spare else Client(FakeServer(version=(7,)))
        self.client.store = self
        self.refusal: str | None = None  # the error that every write gets
        self.is_silent = False  # whether commands wait, unanswered
        self.delay_s = 0.0  # before each command runs
        self.clock_offset_s = 0.0
        self.keeps_replica = False  # whether fail_over() has something to go back to
        self.on_command: Callable[[list[bytes]], Fate] = lambda _: Fate.RUN
        self.commands = 0
        self.connections: dict[int, Connection] = {}
        self._listening: Any = None
        self._replica: deque[tuple[float, dict[bytes, Any]]] = deque()

    async def start(self) -> None:
        """Listen at HOST:PORT."""
        self._listening = await self.loop.create_server(lambda: Connection(self), HOST, PORT)

    # Faults.

    def put_away(self) -> None:
        """Keep the server without its data for the next run. The store can't be used afterwards."""
        self.client.clear()
        _spare.append(self.client)

    def go_down(self) -> None:
        """Refuse connections, and lose those there are."""
        self.loop.trace("store: down")
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        self.drop_connections()

    def come_back(self) -> None:
        """Accept connections again, with all data and no script."""
        self.loop.trace("store: back")
        self.flush_scripts()
        self.is_silent = False
        if self._listening is None:
            self.loop.start(self.process, self.start(), "listen")

    def drop_connections(self) -> None:
        """Reset every connection."""
        self.loop.trace("store: drops %d connections", len(self.connections))
        for connection in list(self.connections.values()):
            connection.drop()

    def flush_scripts(self) -> None:
        """Forget all scripts, as SCRIPT FLUSH or a restart does."""
        self.loop.trace("store: scripts flushed")
        self.client._server.script_cache.clear()

    def jump(self, seconds: float) -> None:
        """Move the clock."""
        self.loop.trace("store: clock jumps %+.3f s", seconds)
        self.clock_offset_s += seconds

    def fail_over(self) -> None:
        """Have a replica take over that lacks what was written in the last second. Needs `keeps_replica` from before."""
        self.drop_connections()
        self.flush_scripts()
        until = self.loop.now - LAG_S
        found = next((data for at, data in self._replica if at > until), None)
        if found is not None:
            self.client._db._dict = found
        self.loop.trace("store: failed over, %s", "nothing is lost" if found is None else "the last second is lost")
        self._replica.clear()

    def _replicate(self) -> None:
        """Keep what the data were before this moment's write, at most ten times a second."""
        now = self.loop.now
        if not self._replica or now - self._replica[-1][0] >= LAG_S / 10:
            self._replica.append((now, _copied(self.client._db._dict)))
            while self._replica[0][0] <= now - LAG_S:
                self._replica.popleft()

    # Commands.

    def run(self, client: Client, fields: list[bytes]) -> Any:
        """Run one command now."""
        self.commands += 1
        if self.keeps_replica:
            self._replicate()
        process = PROCESS.get()
        before, process.skew_s = process.skew_s, self.clock_offset_s
        try:
            reply = client.execute(fields)
        finally:
            process.skew_s = before
        return _ordered(fields[0].decode().lower(), reply)

    def peek(self, key: str) -> dict[bytes, bytes]:
        """Return the fields of a hash without a command: for judges that look after every script."""
        item = self.client._db._dict.get(key.encode())
        return {} if item is None else item.value._values

    def ask(self, *words: bytes | str | int) -> Any:
        """Run a command from outside the network, for judges."""
        reply = self.run(self.client, [word if isinstance(word, bytes) else str(word).encode() for word in words])
        if isinstance(reply, SimpleError):
            raise ValueError(reply.value)  # noqa: TRY004 - an error of the store's
        return reply


def _copied(data: dict[bytes, Any]) -> dict[bytes, Any]:
    """Copy a database's keys and values, hashes faster than `deepcopy` does."""
    made = {}
    for key, item in data.items():
        value: Any = item.value
        if type(value) is Hash:
            value = Hash()
            value._values = item.value._values.copy()
        elif type(value) is not bytes:
            value = copy.deepcopy(value)
        made[key] = Item(value)
        made[key].expireat = item.expireat
    return made


class Connection(asyncio.Protocol):
    """One client's connection to the store."""

    transport: SimTransport

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reader = hiredis.Reader()
        self._waiting: deque[list[bytes]] = deque()
        self._is_mute = False
        self._is_running = False

    def connection_made(self, transport: Any) -> None:
        """Keep the transport."""
        self.transport = transport
        self._store.connections[id(self)] = self

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client."""
        self._store.connections.pop(id(self), None)
        self._waiting.clear()

    def drop(self) -> None:
        """Reset the connection."""
        self.transport.get_extra_info("socket").end.lingers = False
        self.transport.abort()
        self._waiting.clear()

    def data_received(self, data: bytes) -> None:
        """Queue the commands in it."""
        self._reader.feed(data)
        while (fields := self._reader.gets()) is not False:
            self._waiting.append(fields)
        self._continue()

    def _continue(self) -> None:
        store = self._store
        if self._is_running or not self._waiting:
            return
        if store.is_silent:
            self._is_running = True
            store.loop.call_later(0.05, self._again)
        elif store.delay_s:
            self._is_running = True
            store.loop.call_later(store.delay_s, self._go)
        else:
            self._go()

    def _again(self) -> None:
        self._is_running = False
        self._continue()

    def _go(self) -> None:
        """Run what waits."""
        self._is_running = False
        store = self._store
        replies = []
        while self._waiting:
            fields = self._waiting.popleft()
            fate = store.on_command(fields)
            if fate is not Fate.RUN:
                store.loop.trace("store: %s: %s", _Told(fields), fate.value)
            if fate is Fate.DROP_BEFORE:
                self.drop()
                return
            reply = store.run(store.client, fields)
            if fate is Fate.DROP_AFTER:
                self.drop()
                return
            self._is_mute = self._is_mute or fate is Fate.LOSE_REPLY
            store.loop.trace("store: %s = %s", _Told(fields), _Short(reply))
            if not isinstance(reply, NoResponse):
                replies.append(encode(reply))
        if replies and not self._is_mute:
            self.transport.write(b"".join(replies))


_names: dict[bytes, str] = {}  # of scripts by SHA-1, for the transcript
_hashed: list[tuple[bytes, bytes]] = []  # the last script and its SHA-1: several ask for it


def _sha_of(script: bytes) -> bytes:
    """Return a script's SHA-1 in hex."""
    if not _hashed or _hashed[0][0] is not script:
        _hashed[:] = [(script, hashlib.sha1(script, usedforsecurity=False).hexdigest().encode())]
    return _hashed[0][1]


def name_scripts(named: dict[bytes, str]) -> None:
    """Know the scripts' names."""
    _names.update(named)


def script_of(fields: list[bytes]) -> str:
    """Return the name of the script that a command runs."""
    sha = _sha_of(fields[1]) if fields[0].upper() == b"EVAL" else fields[1]
    return _names.get(sha, sha[:8].decode())


class _Told(Struct):
    """A command in the transcript, which most runs need not have as text."""

    fields: list[bytes]

    def __str__(self) -> str:
        fields = self.fields
        word = fields[0].decode(errors="replace").upper()
        if word in {"EVALSHA", "EVAL"}:
            count = int(fields[2])
            name = script_of(fields)
            first = fields[3 + count].decode(errors="replace") if len(fields) > 3 + count else ""
            return f"{name}{'' if word == 'EVALSHA' else ' (text)'} {first}"
        return " ".join([word, *(each[:60].decode(errors="replace") for each in fields[1:3])])


class _Short(Struct):
    """A reply in the transcript."""

    reply: Any

    def __str__(self) -> str:
        reply = self.reply
        if isinstance(reply, (SimpleError, SimpleString)):
            reply = reply.value
        text = repr(reply)
        return text if len(text) <= 100 else f"{text[:100]}..."
