"""The caller: the records of keys and accounts, changes to them, and which addresses may connect and log in."""

import ipaddress
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from meshproxy.errors import Detail, GatewayError, Source, invalid
from meshproxy.policy.template import check_params

Status = Literal["active", "suspended", "revoked"]


MAX_REQUESTS_PER_DAY = 100_000_000  # a bucket counts a request as 86,400,000 parts: below 2**53 in all


class Limits(Struct, frozen=True, omit_defaults=True):
    """Limits of one key or one account. None: the configuration's default for a key, no limit for an account.

    `burst`: the size of the request bucket, in requests; None: one minute's worth. `max_parallel`: requests that may
    run at the same time.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    burst: int | None = None
    requests_per_day: int | None = None
    max_parallel: int | None = None

    @property
    def request_bucket(self) -> int | None:
        """The size of the bucket of requests per minute; None if these have no limit."""
        if self.requests_per_minute is None or self.burst is None:
            return self.requests_per_minute
        return self.burst


class Budgets(Struct, frozen=True, omit_defaults=True):
    """The most that may be spent, in nano-USD; None: no budget. Days and months are UTC."""

    total_nusd: int | None = None
    daily_nusd: int | None = None
    monthly_nusd: int | None = None


class Account(Struct, frozen=True, omit_defaults=True):
    """An account's record in the directory; its balance is in the ledger. `budgets` apply to all of its keys together."""

    name: str
    status: Status = "active"
    limits: Limits = Limits()
    budgets: Budgets = Budgets()


ACCOUNT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_account_name(name: str) -> None:
    """Raise ValueError unless the name is a valid account name: it appears in key names, paths and logs."""
    if not ACCOUNT_NAME.fullmatch(name):
        raise ValueError(
            f"{name[:80]!r}: an account's name has 1 to 64 letters, digits, `_`, `.` and `-`, and begins with a letter or digit"
        )


class Key(Struct, frozen=True, omit_defaults=True):
    """A key's record in the directory. The secret isn't stored: records are found by its SHA-256.

    `models`: the only models the key may use (None: all). `params`: request fields (temperature, ...) that apply where
    the request doesn't set them. `session`: a budget for each session_id. Times are Unix seconds.
    """

    id: str
    account: str
    created_at: float
    name: str = ""
    hint: str = ""
    status: Status = "active"
    expires_at: float | None = None
    default_model: str | None = None
    models: list[str] | None = None
    params: dict[str, Any] = msgspec.field(default_factory=dict)
    limits: Limits = Limits()
    budgets: Budgets = Budgets()
    session: Budgets = Budgets()
    clamp: bool | None = None


class Principal(Struct, frozen=True):
    """An authenticated caller: its key and its account."""

    key: Key
    account: Account

    def may_use(self, model: str) -> bool:
        """Return whether the key may use this model."""
        return self.key.models is None or model in self.key.models


MAX_NAME = 256
MAX_MODELS = 1000


class Bounds(Struct, frozen=True, kw_only=True):
    """Changes to limits and budgets, by field of `Limits` and `Budgets`. None removes one; `clear` all, first."""

    limits: dict[str, int | None] = {}
    budgets: dict[str, int | None] = {}
    session: dict[str, int | None] = {}
    clear: bool = False

    def limits_after(self, limits: Limits) -> Limits:
        """Return changed limits."""
        return replace(Limits() if self.clear else limits, **self.limits)

    def budgets_after(self, budgets: Budgets) -> Budgets:
        """Return changed budgets."""
        return replace(Budgets() if self.clear else budgets, **self.budgets)


class KeyChange(Struct, frozen=True, kw_only=True):
    """Changes to a key. UNSET leaves a field as it was."""

    name: str | UnsetType = UNSET
    models: list[str] | UnsetType | None = UNSET
    default_model: str | UnsetType | None = UNSET
    expires_at: float | UnsetType | None = UNSET
    params: dict[str, Any] | UnsetType = UNSET
    clamp: bool | UnsetType | None = UNSET
    status: Status | UnsetType = UNSET
    bounds: Bounds = Bounds()

    def applied_to(self, key: Key) -> Key:
        """Return the key with these changes. Raises GatewayError `validation_error` if the result isn't a valid key."""
        fields = ("name", "models", "default_model", "expires_at", "params", "clamp", "status")
        given = {name: value for name in fields if (value := getattr(self, name)) is not UNSET}
        given["limits"] = self.bounds.limits_after(key.limits)
        given["budgets"] = self.bounds.budgets_after(key.budgets)
        given["session"] = replace(Budgets() if self.bounds.clear else key.session, **self.bounds.session)
        changed = replace(key, **given)
        details = list(_key_errors(changed))
        if details:
            raise invalid_fields(details)
        return changed


def invalid_fields(details: Sequence[Detail]) -> GatewayError:
    """Build the client's 422 for invalid fields; its message is the first one's."""
    first = details[0]
    param = str(first.loc[-1])
    return GatewayError(Source.CLIENT, invalid(f"`{param}`: {first.msg}.", *details, param=param))


def _key_errors(key: Key) -> Iterable[Detail]:
    """Yield what is invalid about a key."""
    if len(key.name) > MAX_NAME:
        yield Detail("string_too_long", ("body", "name"), f"At most {MAX_NAME} characters")
    if key.models is not None and not (key.models and all(key.models) and len(key.models) <= MAX_MODELS):
        yield Detail("value_error", ("body", "models"), f"1 to {MAX_MODELS} names, or null for all models")
    if key.default_model is not None and key.models is not None and key.default_model not in key.models:
        yield Detail("value_error", ("body", "default_model"), f"{key.default_model[:128]} is not among the models")
    if key.limits.requests_per_day is not None and key.limits.requests_per_day > MAX_REQUESTS_PER_DAY:
        yield Detail("value_error", ("body", "requests_per_day"), f"At most {MAX_REQUESTS_PER_DAY}")
    yield from check_params(key.params, ("body", "params"))


MAX_KNOWN = 4096  # addresses of which results or failures are kept; beyond that the oldest are dropped
SITE_BITS = 64  # of IPv6: the least that one customer of a network gets (RFC 6177)


class Networks:
    """A set of IP networks."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self.have = lru_cache(MAX_KNOWN)(self._have)

    def __bool__(self) -> bool:
        return bool(self._networks)

    def _have(self, address: str) -> bool:
        found = ipaddress.ip_address(address)
        return any(found in network for network in self._networks)


class FailedLogins:
    """Counts failed logins by address, in a leaky bucket that drains `per_minute` failures a minute. 0: don't count."""

    def __init__(self, per_minute: int) -> None:
        self._most = per_minute
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (failures, counted at) by site

    def wait_s(self, address: str, now: float) -> float:
        """Return the seconds until this address may try again; 0.0 if it may now."""
        if not self._levels:
            return 0.0
        excess = self._level(_site(address), now) - self._most + 1
        return max(0.0, excess * 60 / self._most)

    def failed(self, address: str, now: float) -> None:
        """Count a failed login."""
        if self._most:
            site = _site(address)
            self._levels[site] = (self._level(site, now) + 1, now)
            self._levels.move_to_end(site)
            if len(self._levels) > MAX_KNOWN:
                self._levels.popitem(last=False)

    def _level(self, site: str, now: float) -> float:
        level, at = self._levels.get(site, (0.0, now))
        return max(0.0, level - (now - at) * self._most / 60)


class Access:
    """One configuration's rules about client addresses.

    The address None is a client on a unix socket, which file permissions admit.
    """

    def __init__(self, allowed: Iterable[str] = (), failures_per_minute: int = 0) -> None:
        self._allowed = Networks(allowed)
        self._failed_logins = FailedLogins(failures_per_minute)
        self.is_open = not (self._allowed or failures_per_minute)  # no rule applies to any address

    def admits(self, address: str | None) -> bool:
        """Return whether the address is in the list of allowed networks, or there is no list."""
        return not self._allowed or address is None or self._allowed.have(address)

    def wait_s(self, address: str | None, now: float) -> float:
        """Return the seconds until the address may try to log in; 0.0 if it may now."""
        return 0.0 if address is None else self._failed_logins.wait_s(address, now)

    def failed(self, address: str | None, now: float) -> None:
        """Count a failed login of the address."""
        if address is not None:
            self._failed_logins.failed(address, now)


def _site(address: str) -> str:
    """Return the address, or an IPv6 address's network: its customer controls all addresses in it."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network((address, SITE_BITS), strict=False).network_address)
