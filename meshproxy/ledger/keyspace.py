"""Names of everything in Redis. What belongs to an account carries its name as hash tag, so that each script's keys share
a slot of Redis Cluster.
"""

import hashlib

PREFIX = "mesh:"
MAX_SESSION_BYTES = 64  # of a session's name in a key; four times a name's 256 characters would be a KiB


class AccountKeys:
    """The keys of one account.

    Hashes: `credit` (balance, held, granted, settled: nano-USD), `held` (what each key and session with a budget holds:
    `key:ID`, `session:NAME`), `holds` (hold id to its packed record), `abandoned` (holds released at their deadline, kept for a
    late settlement), `bucket` (the account's buckets), `keys` (key id to the digest its record is stored under), `templates` (id
    to record, JSON), `template_names` (name to id), `spend` (the account's, by day and month), `grant_refs` (ref to amount).
    Sorted set: `deadlines` (hold id by deadline in ms: of a hold, its release; of an abandoned one, when it is forgotten).
    Streams: `usage` (one event a settlement), `grants` (one entry a grant). String: `record` (the account's, JSON).

    `books` are the eight keys that every script with holds begins with (hold.lua).
    """

    def __init__(self, account: str) -> None:
        root = f"{PREFIX}{{{account}}}:"
        self.root = root
        self.account = account
        self.credit = root + "credit"
        self.held = root + "held"
        self.holds = root + "holds"
        self.deadlines = root + "deadlines"
        self.abandoned = root + "abandoned"
        self.usage = root + "usage"
        self.bucket = root + "bucket"
        self.spend = root + "spend"
        self.grants = root + "grants"
        self.grant_refs = root + "grant-refs"
        self.record = root + "record"
        self.keys = root + "keys"
        self.templates = root + "templates"
        self.template_names = root + "template-names"
        self.books = (
            *(self.credit, self.held, self.holds, self.deadlines, self.abandoned, self.usage),
            *(self.bucket, self.spend),
        )

    def unheld(self, hold_id: str) -> str:
        """String: marks the settlement of a request that was admitted without Redis, so that it is charged once."""
        return f"{self.root}unheld:{hold_id}"

    def key_bucket(self, key_id: str) -> str:
        """Hash: one key's buckets."""
        return f"{self.root}bucket:{key_id}"

    def key_spend(self, key_id: str) -> str:
        """Hash: what a key spent and holds: total, by day, by month."""
        return f"{self.root}spend:{key_id}"

    def key_books(self, key_id: str) -> tuple[str, str, str]:
        """One key's buckets, spend, and running requests (a sorted set: hold id by deadline in ms)."""
        root = self.root
        return f"{root}bucket:{key_id}", f"{root}spend:{key_id}", f"{root}running:{key_id}"

    def requests(self, day: str) -> str:
        """Hash: request id to its event in `usage`, of the requests that began on a day, `2026-11-24`."""
        return f"{self.root}requests:{day}"

    def session_spend(self, session: str) -> str:
        """Hash: what a session spent and holds: total, by day, by month. A long name is told by its SHA-256."""
        name = session.encode(errors="surrogatepass")
        short = session if len(name) <= MAX_SESSION_BYTES else f"sha256:{hashlib.sha256(name).hexdigest()}"
        return f"{self.root}session:{short}"

    def hour(self, hour: str) -> str:
        """Hash: the aggregates of one hour, `2026-11-24T09`."""
        return f"{self.root}hour:{hour}"

    def refused(self, hour: str) -> str:
        """Hash: how many requests were refused in each minute of an hour, `2026-11-24T09`."""
        return f"{self.root}refused:{hour}"

    def replay(self, key_id: str, digest: str) -> str:
        """Hash: one Idempotency-Key of a key, by its SHA-256: who owns it and how far the answer is."""
        return f"{self.root}replay:{key_id}:{digest}"

    @property
    def replays(self) -> str:
        """Sorted set: the owners of its Idempotency-Keys, by when their records end (Unix ms)."""
        return f"{self.root}replays"

    @property
    def replay_sizes(self) -> str:
        """Hash: the bytes of the answers that are kept for replay, by owner, and their `total`."""
        return f"{self.root}replay-sizes"

    def replay_parts(self, owner: str) -> str:
        """List: the answer that a request got, for replay."""
        return f"{self.root}replay-parts:{owner}"


GLOBAL = "*"  # the owner of global templates: no account may have this name
ACCOUNTS = PREFIX + "accounts"  # set: every account's name
AUDIT = PREFIX + "audit"  # stream: every change to accounts, keys and credit
KEY_IDS = PREFIX + "key-ids"  # hash: key id to the digest its record is stored under


def key_record(digest: str) -> str:
    """String: a key's directory record, JSON, by the SHA-256 (hex) of its secret."""
    return f"{PREFIX}key:{digest}"
