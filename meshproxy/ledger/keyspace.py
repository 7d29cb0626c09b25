"""Names of everything in Redis. What belongs to an account carries its name as hash tag, so that each script's keys share
a slot of Redis Cluster.
"""

PREFIX = "mesh:"


class AccountKeys:
    """The keys of one account."""

    __slots__ = ("_root", "account")

    def __init__(self, account: str) -> None:
        self.account = account
        self._root = f"{PREFIX}{{{account}}}:"

    @property
    def credit(self) -> str:
        """Hash: balance, held, granted, settled (nano-USD)."""
        return self._root + "credit"

    @property
    def held(self) -> str:
        """Hash: what each key and session with a budget holds (nano-USD): `key:ID`, `session:NAME`."""
        return self._root + "held"

    @property
    def holds(self) -> str:
        """Hash: hold id to its packed record."""
        return self._root + "holds"

    @property
    def deadlines(self) -> str:
        """Sorted set: hold id by deadline (ms): of a hold, its release; of an abandoned one, when it is forgotten."""
        return self._root + "deadlines"

    @property
    def abandoned(self) -> str:
        """Hash: holds released at their deadline, kept for a late settlement."""
        return self._root + "abandoned"

    def unheld(self, hold_id: str) -> str:
        """String: marks the settlement of a request that was admitted without Redis, so that it is charged once."""
        return f"{self._root}unheld:{hold_id}"

    @property
    def bucket(self) -> str:
        """Hash: the account's buckets."""
        return self._root + "bucket"

    def key_bucket(self, key_id: str) -> str:
        """Hash: one key's buckets."""
        return f"{self._root}bucket:{key_id}"

    def key_spend(self, key_id: str) -> str:
        """Hash: what a key spent and holds: total, by day, by month."""
        return f"{self._root}spend:{key_id}"

    def session_spend(self, session: str) -> str:
        """Hash: what a session spent and holds: total, by day, by month."""
        return f"{self._root}session:{session}"

    @property
    def usage(self) -> str:
        """Stream: one event a settlement."""
        return self._root + "usage"

    def hour(self, hour: str) -> str:
        """Hash: the aggregates of one hour, `2026-11-24T09`."""
        return f"{self._root}hour:{hour}"

    def replay(self, key_id: str, digest: str) -> str:
        """Hash: one Idempotency-Key of a key, by its SHA-256: who owns it and how far the answer is."""
        return f"{self._root}replay:{key_id}:{digest}"

    def replay_parts(self, owner: str) -> str:
        """List: the answer that a request got, for replay."""
        return f"{self._root}replay-parts:{owner}"

    @property
    def record(self) -> str:
        """String: the account's directory record, JSON."""
        return self._root + "record"

    @property
    def keys(self) -> str:
        """Hash: key id to the digest its record is stored under."""
        return self._root + "keys"

    @property
    def templates(self) -> str:
        """Hash: template id to its record, JSON."""
        return self._root + "templates"

    @property
    def template_names(self) -> str:
        """Hash: template name to id."""
        return self._root + "template-names"


GLOBAL = "*"  # the owner of global templates: no account may have this name
ACCOUNTS = PREFIX + "accounts"  # set: every account's name
KEY_IDS = PREFIX + "key-ids"  # hash: key id to the digest its record is stored under


def key_record(digest: str) -> str:
    """String: a key's directory record, JSON, by the SHA-256 (hex) of its secret."""
    return f"{PREFIX}key:{digest}"
