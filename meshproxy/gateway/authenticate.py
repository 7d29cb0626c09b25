"""Authenticate: find the caller by the secret in the request and check the address it comes from."""

from collections.abc import Callable

from meshproxy.errors import (
    ErrorResponse,
    GatewayError,
    Source,
    forbidden,
    invalid_api_version,
    rate_limit_exceeded,
    unauthorized,
)
from meshproxy.ledger.directory import Directory
from meshproxy.openai.headers import API_VERSIONS, bearer
from meshproxy.policy.principal import Access, Principal

NO_KEY = unauthorized("Send your key as `Authorization: Bearer rsk_...`.")
OTHER_KEY = unauthorized(
    "This is not a key of this gateway: its keys begin with `rsk_`. Send one as `Authorization: Bearer rsk_...`."
)
WRONGLY_SENT = unauthorized(
    "The key is not sent as it should be. Send `Authorization: Bearer rsk_...`, and nothing more."
)
UNKNOWN_KEY = unauthorized("This key is not known.")


class Authenticator:
    """Turns an `Authorization` header into a `Principal`.

    It raises a GatewayError: 401 or 403, or 429 for an address with too many failed logins. `wall_clock` is Unix time
    and `clock` monotonic time, in seconds. A reload replaces `access`.
    """

    def __init__(
        self, directory: Directory, access: Access, wall_clock: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self.access = access
        self._directory = directory
        self._wall_clock = wall_clock
        self._clock = clock

    async def principal(self, authorization: str | None, client: str | None) -> Principal:
        """Return the caller, active and with a key that hasn't expired. `client`: its address; None on a unix socket."""
        access = self.access
        if not access.is_open:
            self._check_address(client, access)
        secret = bearer(authorization)
        principal = await self._directory.principal(secret) if secret is not None else None
        if principal is None:
            response = UNKNOWN_KEY if secret is not None else _unreadable(authorization)
        elif (refusal := self._refusal_of(principal)) is None:
            return principal
        else:
            response = refusal
        if response.status == 401:
            access.failed(client, self._clock())
        raise GatewayError(Source.CLIENT, response)

    def _check_address(self, client: str | None, access: Access) -> None:
        """Raise 403 for an address that isn't allowed, 429 for one with too many failed logins."""
        if not access.admits(client):
            raise GatewayError(Source.CLIENT, forbidden("This gateway takes no requests from your address."))
        wait_s = access.wait_s(client, self._clock())
        if wait_s:
            raise GatewayError(Source.CLIENT, rate_limit_exceeded("Too many failed logins from your address.", wait_s))

    def _refusal_of(self, principal: Principal) -> ErrorResponse | None:
        """Return the error response for a key or an account that may not be used; None if both may."""
        key = principal.key
        if key.status == "revoked":
            return unauthorized("This key was revoked.")
        if key.expires_at is not None and key.expires_at <= self._wall_clock():
            return unauthorized("This key has expired.")
        if key.status == "suspended":
            return forbidden("This key is suspended.")
        if principal.account.status != "active":
            return forbidden("This account is suspended.")
        return None


def _unreadable(authorization: str | None) -> ErrorResponse:
    """Return the error response for an `Authorization` header without a key that can be looked up."""
    if not authorization:
        return NO_KEY
    return WRONGLY_SENT if "rsk_" in authorization else OTHER_KEY


def check_version(version: str) -> None:
    """Raise GatewayError `invalid_api_version` if the request relies on a version of Mesh's API that there isn't."""
    if version not in API_VERSIONS:
        raise GatewayError(Source.CLIENT, invalid_api_version(version, API_VERSIONS))
