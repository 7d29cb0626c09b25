import pytest
from msgspec.structs import replace

from meshproxy.errors import Fault
from meshproxy.gateway.authenticate import Authenticator
from meshproxy.policy.principal import Account, Principal
from tests.gateway.parts import principal

SECRET = "rsk_" + "x" * 43
NOW = 1000.0


class Directory:
    """Knows one secret."""

    def __init__(self, known):
        self.known = known

    async def principal(self, secret):
        return self.known if secret == SECRET else None


async def judged(known, authorization=f"Bearer {SECRET}"):
    try:
        return await Authenticator(Directory(known), lambda: NOW).principal(authorization)
    except Fault as fault:
        return fault.problem.status, fault.problem.code


async def test_an_active_key():
    known = principal()
    assert known is await judged(known)


@pytest.mark.parametrize("authorization", [None, "", "Bearer sk-1", "Bearer rsk_other"])
async def test_whoever_is_not_known(authorization):
    assert (401, "unauthorized") == await judged(principal(), authorization)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"status": "revoked"}, (401, "unauthorized")),
        ({"status": "suspended"}, (403, "forbidden")),
        ({"expires_at": NOW}, (401, "unauthorized")),
        ({"status": "suspended", "expires_at": NOW - 1}, (401, "unauthorized")),
    ],
)
async def test_a_key_that_may_not(changes, expected):
    known = principal()
    assert expected == await judged(Principal(replace(known.key, **changes), known.account))


async def test_a_key_that_expires_later():
    known = principal(expires_at=NOW + 1)
    assert known is await judged(known)


@pytest.mark.parametrize("status", ["suspended", "revoked"])
async def test_an_account_that_may_not(status):
    assert (403, "forbidden") == await judged(Principal(principal().key, Account("acme", status=status)))
