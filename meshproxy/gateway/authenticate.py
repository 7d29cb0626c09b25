"""Authenticate: who is calling, by the secret they carry."""

from collections.abc import Callable

from meshproxy.errors import Fault, Problem, Source, forbidden, unauthorized
from meshproxy.ledger.directory import Directory
from meshproxy.policy.principal import Principal
from meshproxy.wire.headers import bearer


class Authenticator:
    """Turns an Authorization header into a Principal, or into a Fault of 401 or 403. `wall_clock` is Unix seconds."""

    def __init__(self, directory: Directory, wall_clock: Callable[[], float]) -> None:
        self._directory = directory
        self._wall_clock = wall_clock

    async def principal(self, authorization: str | None) -> Principal:
        """The caller, who is active and whose key hasn't expired."""
        secret = bearer(authorization)
        if secret is None:
            raise Fault(Source.CLIENT, unauthorized("Send your key as `Authorization: Bearer rsk_...`."))
        principal = await self._directory.principal(secret)
        if principal is None:
            raise Fault(Source.CLIENT, unauthorized("This key is not known."))
        problem = self._objection(principal)
        if problem is not None:
            raise Fault(Source.CLIENT, problem)
        return principal

    def _objection(self, principal: Principal) -> Problem | None:
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
