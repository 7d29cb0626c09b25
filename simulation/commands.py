"""The commands that the ledger sends most, on fakeredis' data: what fakeredis does with them, in a fifth of the time.

A command is called with the database and its words, and returns the reply. It leaves to fakeredis whatever is unusual in
them by raising Unusual before anything is written: numbers that aren't written plainly, options, absurd sizes.
"""

import itertools
from collections.abc import Callable
from typing import Any, Final

from fakeredis._core._database import Database, Item
from fakeredis._helpers import OK, SimpleError, SimpleString
from fakeredis._msgs import WRONGTYPE_MSG
from fakeredis.model import Hash, XStream, ZSet
from fakeredis.model._stream import StreamEntryKey

Word = bytes | int | float  # a script's number comes as it is
_SPECIAL: Final = frozenset(b"*?[\\")  # characters of a pattern
MOST: Final = 2**53  # a number below has one spelling in Lua and here


class Unusual(Exception):
    """The command has to be run by fakeredis."""


def _number(word: Word) -> int:
    """Read a whole number that is written plainly."""
    if type(word) is int:
        number = word
    elif type(word) is bytes and len(word) < 17 and word.isdigit():
        number = int(word)
        if word[0] == 48 and len(word) > 1:  # a leading zero, which Redis refuses
            raise Unusual
    elif type(word) is bytes and word[:1] == b"-" and word[1:2] not in b"-0":
        return -_number(word[1:])
    else:
        raise Unusual
    if -MOST < number < MOST:
        return number
    raise Unusual


def _text(word: Word) -> bytes:
    return word if isinstance(word, bytes) else b"%.17g" % word


def _value(db: Database, key: Word, kind: Any) -> Any:
    """Return what a key has, None if it is missing or past its time. Raises SimpleError for another type."""
    item = db._dict.get(key)  # type: ignore[arg-type]
    if item is None:
        return None
    if item.expireat is not None and item.expireat < db.time:
        del db._dict[key]  # type: ignore[arg-type]
        return None
    if type(item.value) is not kind:
        raise SimpleError(WRONGTYPE_MSG)
    return item.value


def _fields(db: Database, key: Word) -> dict[bytes, bytes] | None:
    """Return a hash's fields. None of them has a time to live."""
    found = _value(db, key, Hash)
    return None if found is None else found._values


def _made(db: Database, key: Word, value: Any) -> Any:
    item = db._dict[key] = Item(value)  # type: ignore[index]
    return item.value


def get(db: Database, key: Word) -> bytes | None:
    """GET."""
    return _value(db, key, bytes)  # type: ignore[no-any-return]


def hget(db: Database, key: Word, field: Word) -> bytes | None:
    """HGET."""
    fields = _fields(db, key)
    return None if fields is None else fields.get(_text(field))


def hmget(db: Database, key: Word, *names: Word) -> list[bytes | None]:
    """HMGET."""
    fields = _fields(db, key)
    return [None] * len(names) if fields is None else [fields.get(_text(name)) for name in names]


def hgetall(db: Database, key: Word) -> list[bytes]:
    """HGETALL."""
    return list(itertools.chain(*(_fields(db, key) or {}).items()))


def hkeys(db: Database, key: Word) -> list[bytes]:
    """HKEYS."""
    return list(_fields(db, key) or ())


def hlen(db: Database, key: Word) -> int:
    """HLEN."""
    return len(_fields(db, key) or ())


def hexists(db: Database, key: Word, field: Word) -> int:
    """HEXISTS."""
    return int(_text(field) in (_fields(db, key) or ()))


def hset(db: Database, key: Word, *pairs: Word) -> int:
    """HSET."""
    if not pairs or len(pairs) % 2:
        raise Unusual
    fields = _fields(db, key)
    if fields is None:
        fields = _made(db, key, Hash())._values
    before = len(fields)
    for at in range(0, len(pairs), 2):
        fields[_text(pairs[at])] = _text(pairs[at + 1])
    return len(fields) - before


def hincrby(db: Database, key: Word, field: Word, amount: Word) -> int:
    """HINCRBY."""
    added, field = _number(amount), _text(field)
    fields = _fields(db, key)
    total = added if fields is None or field not in fields else _number(fields[field]) + added
    if not -MOST < total < MOST:
        raise Unusual
    if fields is None:
        fields = _made(db, key, Hash())._values
    fields[field] = b"%d" % total
    return total


def hdel(db: Database, key: Word, field: Word, *more: Word) -> int:
    """HDEL."""
    fields = _fields(db, key)
    if not fields:
        return 0
    deleted = sum(fields.pop(_text(name), None) is not None for name in (field, *more))
    if not fields:
        del db._dict[key]  # type: ignore[arg-type]
    return deleted


def zadd(db: Database, key: Word, score: Word, member: Word) -> int:
    """ZADD, of one member and without options."""
    number = float(_number(score))
    found = _value(db, key, ZSet)
    members = _made(db, key, ZSet()) if found is None else found
    before = len(members._bylex)
    members.add(_text(member), number)
    return len(members._bylex) - before


def _removed(db: Database, key: Word, members: ZSet, names: list[bytes]) -> int:
    before = len(members._bylex)
    for name in names:
        members.discard(name)
    if not members._bylex:
        del db._dict[key]  # type: ignore[arg-type]
    return before - len(members._bylex)


def zrem(db: Database, key: Word, *names: Word) -> int:
    """ZREM."""
    members = _value(db, key, ZSet)
    return 0 if members is None else _removed(db, key, members, [_text(name) for name in names])


def _up_to(db: Database, key: Word, low: Word, high: Word) -> tuple[ZSet | None, list[bytes]]:
    """Return a sorted set, and its members with a score from -inf up to a bound."""
    if low != b"-inf":
        raise Unusual
    bound, members = _number(high), _value(db, key, ZSet)
    scores = members._byscore if members is not None else ()
    return members, [member for _, member in itertools.takewhile(lambda each: each[0] <= bound, scores)]


def zrangebyscore(
    db: Database, key: Word, low: Word, high: Word, limit: Word, offset: Word, count: Word
) -> list[bytes]:
    """ZRANGEBYSCORE with LIMIT, from the beginning."""
    if limit != b"LIMIT" or offset != 0 or type(count) is not int or count < 0:
        raise Unusual
    return _up_to(db, key, low, high)[1][:count]


def zremrangebyscore(db: Database, key: Word, low: Word, high: Word) -> int:
    """ZREMRANGEBYSCORE."""
    members, names = _up_to(db, key, low, high)
    return 0 if members is None else _removed(db, key, members, names)


def zcard(db: Database, key: Word) -> int:
    """ZCARD."""
    members = _value(db, key, ZSet)
    return 0 if members is None else len(members._bylex)


def _live(db: Database, key: Word) -> Item | None:
    item = db._dict.get(key)  # type: ignore[arg-type]
    if item is not None and item.expireat is not None and item.expireat < db.time:
        del db._dict[key]  # type: ignore[arg-type]
        return None
    return item


def exists(db: Database, *keys: Word) -> int:
    """EXISTS."""
    return sum(_live(db, key) is not None for key in keys)


def pttl(db: Database, key: Word) -> int:
    """PTTL."""
    item = _live(db, key)
    if item is None:
        return -2
    return -1 if item.expireat is None else round((item.expireat - db.time) * 1000)


def _expire(db: Database, key: Word, at: float) -> int:
    item = _live(db, key)
    if item is None:
        return 0
    item.expireat = at  # type: ignore[assignment]  # fakeredis has the type of its default
    db.schedule_expiry(key, at)  # type: ignore[arg-type]
    return 1


def pexpire(db: Database, key: Word, lasts_ms: Word) -> int:
    """PEXPIRE."""
    return _expire(db, key, db.time + _number(lasts_ms) / 1000)


def expire(db: Database, key: Word, lasts_s: Word) -> int:
    """EXPIRE."""
    return _expire(db, key, db.time + _number(lasts_s))


def xadd(db: Database, key: Word, *words: Word) -> bytes:
    """XADD with `*`. A stream that is longer than MAXLEN is left as it is: fakeredis' nodes, by which it trims, cost most."""
    if words[:2] == (b"MAXLEN", b"~"):
        _number(words[2])
        words = words[3:]
    if words[:1] != (b"*",) or len(words) < 3 or not len(words) % 2:
        raise Unusual
    found = _value(db, key, XStream)
    stream = _made(db, key, XStream()) if found is None else found
    entry = stream.next_id(None)
    if entry is None:
        raise Unusual
    stream._ids.append(entry)
    stream._values_dict[entry] = [_text(word) for word in words[1:]]
    stream._entries_added += 1
    stream._last_id = entry
    return entry.encode()  # type: ignore[no-any-return]


def xrange(db: Database, key: Word, first: bytes, last: bytes, *options: Word) -> list[Any]:
    """XRANGE of all entries or of one."""
    if options or (first != last and (first, last) != (b"-", b"+")):
        raise Unusual
    stream = _value(db, key, XStream)
    if stream is None:
        return []
    if first != last:
        return [[entry.encode(), stream._values_dict[entry]] for entry in stream._ids]
    at_ms, _, number = first.partition(b"-")
    if not (at_ms.isdigit() and number.isdigit()):
        raise Unusual
    one = StreamEntryKey(int(at_ms), int(number))
    return [[one.encode(), stream._values_dict[one]]] if one in stream._values_dict else []


def set_(db: Database, key: Word, value: Word, *options: Word) -> SimpleString | None:
    """SET, for good and perhaps with NX."""
    if options not in {(), (b"NX",)}:
        raise Unusual
    item = _live(db, key)
    if item is None:
        _made(db, key, _text(value))
    elif options:
        return None
    else:
        item.value, item.expireat = _text(value), None
    return OK


def keys(db: Database, pattern: bytes) -> list[bytes]:
    """KEYS of a prefix."""
    prefix = pattern[:-1]
    if pattern[-1:] != b"*" or not _SPECIAL.isdisjoint(prefix):
        raise Unusual
    db._remove_expired()
    return [key for key in db._dict if key.startswith(prefix)]


def time(db: Database) -> list[bytes]:
    """TIME."""
    now_us = round(db.time * 1_000_000)
    return [b"%d" % (now_us // 1_000_000), b"%d" % (now_us % 1_000_000)]


READING: Final[dict[bytes, Callable[..., Any]]] = {
    function.__name__.upper().encode(): function
    for function in (
        *(get, keys, xrange, hget, hmget, hgetall, hkeys, hlen, hexists),
        *(zrangebyscore, zcard, exists, pttl, time),
    )
}
WRITING: Final[dict[bytes, Callable[..., Any]]] = {
    function.__name__.upper().rstrip("_").encode(): function
    for function in (set_, hset, hincrby, hdel, zadd, zrem, zremrangebyscore, pexpire, expire, xadd)
}
