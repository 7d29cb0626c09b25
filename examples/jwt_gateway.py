"""A program of one's own around the gateway: callers show a JSON Web Token (RFC 7519), and their team's key is used for them.

    export JWT_SECRET=...  TEAM_KEYS='{"research": "rsk_..."}'
    python examples/jwt_gateway.py meshproxy.toml 8080

A token is signed with HS256 (RFC 7515, RFC 7518 section 3.2), and has `team` and `exp` among its claims.
"""

# ruff: noqa: INP001 - a program, not a package

import base64
import hashlib
import hmac
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

import meshproxy


def claims_of(token: str, secret: bytes, now: float) -> dict[str, Any]:
    """Return the claims of a token that is signed with `secret` and hasn't expired; ValueError for any other."""
    signed, _, signature = token.rpartition(".")
    head, _, payload = signed.partition(".")
    if _decoded(head).get("alg") != "HS256":
        raise ValueError("the token's algorithm isn't HS256")
    if not hmac.compare_digest(hmac.digest(secret, signed.encode(), hashlib.sha256), _bytes(signature)):
        raise ValueError("the token's signature is wrong")
    claims = _decoded(payload)
    if claims.get("exp", 0) < now:
        raise ValueError("the token has expired")
    return claims


def with_team_keys(secret: bytes, keys: Mapping[str, str]) -> Middleware:
    """Make a middleware that takes the token for the key of its team."""

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise web.HTTPUnauthorized(reason="A token is needed: Authorization: Bearer ...")
        try:
            team = claims_of(token, secret, time.time()).get("team")
        except (ValueError, AttributeError) as error:
            raise web.HTTPUnauthorized(reason="The token can't be accepted.") from error
        if team not in keys:
            raise web.HTTPForbidden(reason="The token's team has no key.")
        headers = request.headers.copy()
        headers["authorization"] = f"Bearer {keys[team]}"
        return await handler(request.clone(headers=headers))

    return authenticate


def _bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _decoded(text: str) -> dict[str, Any]:
    return json.loads(_bytes(text))


def main() -> None:
    """Serve the configuration of the first argument at the port of the second."""
    settings = meshproxy.parse(Path(sys.argv[1]).read_text(encoding="utf-8"))
    middleware = with_team_keys(os.environ["JWT_SECRET"].encode(), json.loads(os.environ["TEAM_KEYS"]))
    app = meshproxy.create_app(settings, [middleware])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None)


if __name__ == "__main__":
    main()
