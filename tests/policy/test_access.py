import pytest

from meshproxy.policy.principal import MAX_KNOWN, Access, FailedLogins, Networks

ADDRESS = "192.0.2.1"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.255.0.1", True),
        ("11.0.0.1", False),
        ("192.0.2.7", True),
        ("192.0.2.8", False),
        ("2001:db8::1", True),
        ("::1", False),
    ],
)
def test_networks(address, expected):
    assert Networks(["10.0.0.0/8", "192.0.2.7", "2001:db8::/32"]).have(address) is expected


def test_without_networks_there_is_no_list():
    assert (Access().admits(ADDRESS), Access(["10.0.0.0/8"]).admits(ADDRESS)) == (True, False)
    assert Access(["10.0.0.0/8"]).admits(None)


def test_without_rules_all_is_open():
    assert (Access().is_open, Access(["10.0.0.0/8"]).is_open, Access((), 1).is_open) == (True, False, False)


def failures(*at, per_minute=3, address=ADDRESS):
    logins = FailedLogins(per_minute)
    for now in at:
        logins.failed(address, now)
    return logins


def test_one_failure_short_may_try_again():
    assert [failures(0, 0).wait_s(ADDRESS, 0), failures().wait_s(ADDRESS, 0)] == [0.0, 0.0]


def test_too_many_have_to_wait_for_the_first_to_be_forgotten():
    logins = failures(0, 0, 0)
    assert [logins.wait_s(ADDRESS, now) for now in (0, 5, 20, 100)] == [20.0, 15.0, 0.0, 0.0]


def test_failures_are_forgotten_one_by_one():
    logins = failures(0, 0, 0, 40)  # by then a third of a minute's worth was left
    assert logins.wait_s(ADDRESS, 40) == 0.0
    logins.failed(ADDRESS, 40)
    assert logins.wait_s(ADDRESS, 40) == 20.0


def test_others_are_not_to_blame():
    assert failures(0, 0, 0).wait_s("192.0.2.2", 0) == 0.0


def test_who_has_one_address_of_ipv6_has_the_network():
    logins = failures(0, 0, 0, address="2001:db8::1")
    assert [logins.wait_s(address, 0) for address in ("2001:db8::ffff:1", "2001:db8:0:1::1")] == [20.0, 0.0]


def test_a_limit_of_none_counts_nothing():
    assert failures(0, 0, 0, per_minute=0).wait_s(ADDRESS, 0) == 0.0


def test_the_eldest_is_forgotten_when_too_many_are_known():
    logins = failures(0, per_minute=1)
    others = [f"10.{number >> 8}.{number & 255}.1" for number in range(MAX_KNOWN)]
    for other in others:
        logins.failed(other, 0)
    assert [logins.wait_s(address, 0) for address in (ADDRESS, others[0])] == [0.0, 60.0]


def test_sockets_in_the_file_system_are_let_in():
    access = Access(failures_per_minute=1)
    access.failed(None, 0)
    assert access.wait_s(None, 0) == 0.0
