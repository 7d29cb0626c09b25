import re

import pytest
from aiohttp.test_utils import make_mocked_request

from meshproxy.server.chat import request_id_of


@pytest.mark.parametrize("given", ["a", "A-z_09", "x" * 128])
def test_a_valid_one_is_kept(given):
    assert given == request_id_of(make_mocked_request("GET", "/", headers={"x-request-id": given}))


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "a/b", "é", "a\n"])
def test_else_it_is_made(given):
    request = make_mocked_request("GET", "/", headers={} if given is None else {"x-request-id": given})
    made = request_id_of(request)
    assert re.fullmatch(r"req_[0-9a-f]{24}", made)
    assert request_id_of(request) == made


def test_no_two_are_the_same():
    assert len({request_id_of(make_mocked_request("GET", "/")) for _ in range(100)}) == 100
