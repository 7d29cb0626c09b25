"""The id of a request: the client's, when it is a valid one, else a new one."""

import random

from aiohttp import web

from meshproxy.wire.headers import request_id as valid_request_id

_KEY = web.RequestKey("request_id", str)


def request_id_of(request: web.BaseRequest) -> str:
    """The request's id, the same at every call."""
    found = request.get(_KEY)
    if found is None:
        found = request[_KEY] = valid_request_id(request.headers.get("x-request-id")) or new_request_id()
    return found


def new_request_id() -> str:
    """An id that no other request has."""
    return f"req_{random.getrandbits(96):024x}"
