import pytest
from msgspec.structs import replace

from meshproxy.errors import GatewayError
from meshproxy.gateway.entry import Authenticator
from meshproxy.policy.principal import Access, Account, Principal
from tests.gateway.parts import principal

SECRET = "rsk_" + "x" * 43
NOW = 1000.0


class Directory:
    """Knows one secret."""

    def __init__(self, known):
        self.known = known

    async def principal(self, secret):
        return self.known if secret == SECRET else None


async def judged(known, authorization=f"Bearer {SECRET}", *, client="192.0.2.1", access=None):
    authenticator = Authenticator(Directory(known), access or Access(), lambda: NOW, lambda: 5.0)
    try:
        return await authenticator.principal(authorization, client)
    except GatewayError as error:
        return error.response.status, error.response.code


async def test_an_active_key():
    known = principal()
    assert known is await judged(known)


@pytest.mark.parametrize("authorization", [None, "", "Bearer sk-1", "Bearer rsk_other"])
async def test_whoever_is_not_known(authorization):
    assert await judged(principal(), authorization) == (401, "unauthorized")


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
    assert await judged(Principal(replace(known.key, **changes), known.account)) == expected


async def test_a_key_that_expires_later():
    known = principal(expires_at=NOW + 1)
    assert known is await judged(known)


@pytest.mark.parametrize("status", ["suspended", "revoked"])
async def test_an_account_that_may_not(status):
    assert await judged(Principal(principal().key, Account("acme", status=status))) == (403, "forbidden")


async def test_an_address_that_is_not_on_the_list():
    known, access = principal(), Access(["10.0.0.0/8"])
    assert await judged(known, access=access) == (403, "forbidden")
    assert known is await judged(known, client="10.1.2.3", access=access)
    assert known is await judged(known, client=None, access=access)


async def test_an_address_that_failed_too_often_waits_even_with_a_key():
    known, access = principal(), Access(failures_per_minute=2)
    tries = [await judged(known, authorization, access=access) for authorization in ("Bearer rsk_other", None)]
    assert tries == [(401, "unauthorized")] * 2
    assert await judged(known, access=access) == (429, "rate_limit_exceeded")
    assert known is await judged(known, client="192.0.2.2", access=access)


async def test_a_suspended_key_is_no_failed_login():
    access = Access(failures_per_minute=1)
    known = principal(status="suspended")
    assert [await judged(known, access=access) for _ in range(2)] == [(403, "forbidden")] * 2
