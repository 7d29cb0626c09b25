"""The data listener's other paths: models, templates, usage and the calling key."""

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import orjson
from aiohttp import web
from msgspec.structs import asdict

from meshproxy.errors import Detail, Fault, Source, forbidden, invalid, model_not_found, template_not_found
from meshproxy.gateway.admission import limits_of
from meshproxy.gateway.authenticate import Authenticator
from meshproxy.gateway.pipeline import Gateway
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import BucketState
from meshproxy.ledger.store import Store
from meshproxy.ledger.usage_report import GROUPS, Row, usage
from meshproxy.money import format_usd, in_usd
from meshproxy.policy.principal import Principal
from meshproxy.policy.template import Template, check_template, to_public
from meshproxy.server.body import read_json_body
from meshproxy.wire.headers import format_reset

MAX_TEMPLATE_BODY_BYTES = 4_194_304  # four times what a template may have; to take 33 MB apart stalls others for 1.5 s
DEFAULT_SPAN = timedelta(days=30)
EPOCH = datetime.fromtimestamp(0, UTC)


class Api:
    """Handlers that answer from the directory and the ledger."""

    def __init__(
        self,
        gateway: Gateway,
        authenticator: Authenticator,
        directory: Directory,
        ledger: Ledger,
        store: Store,
        client_of: Callable[[web.Request], str | None],
    ) -> None:
        self._gateway = gateway
        self._authenticator = authenticator
        self._directory = directory
        self._ledger = ledger
        self._store = store
        self._client_of = client_of
        self._started = int(time.time())

    async def models(self, request: web.Request) -> web.Response:
        """`GET /v1/models`: what this key may use."""
        principal = await self._principal(request)
        ids = [name for name in self._gateway.deployment.catalog.ids if principal.may_use(name)]
        return _json({"object": "list", "data": [self._model(name) for name in ids]})

    async def model(self, request: web.Request) -> web.Response:
        """`GET /v1/models/{id}`"""
        principal = await self._principal(request)
        name = request.match_info["id"]
        if self._gateway.deployment.catalog.model(name) is None or not principal.may_use(name):
            raise Fault(Source.CLIENT, model_not_found(name))
        return _json(self._model(name))

    async def templates(self, request: web.Request) -> web.Response:
        """`GET /v1/templates`: the account's own and the global ones, a bare array."""
        principal = await self._principal(request)
        found = await self._directory.list_templates(principal.account.name)
        return _json([to_public(template) for template in found])

    async def create_template(self, request: web.Request) -> web.Response:
        """`POST /v1/templates`"""
        principal = await self._principal(request)
        fields = check_template(await self._body(request, principal), partial=False)
        now = time.time()
        template = fields.applied_to(
            Template(id=str(uuid.uuid4()), name="", owner=principal.account.name, created_at=now, updated_at=now)
        )
        await self._put(template)
        return _json(to_public(template), status=201)

    async def template(self, request: web.Request) -> web.Response:
        """`GET /v1/templates/{id or name}`"""
        return _json(to_public(await self._found(request, await self._principal(request))))

    async def change_template(self, request: web.Request) -> web.Response:
        """`PATCH /v1/templates/{id or name}`"""
        principal = await self._principal(request)
        template = await self._own(request, principal)
        fields = check_template(await self._body(request, principal), partial=True)
        template = msgspec.structs.replace(fields.applied_to(template), updated_at=time.time())
        await self._put(template)
        return _json(to_public(template))

    async def delete_template(self, request: web.Request) -> web.Response:
        """`DELETE /v1/templates/{id or name}`"""
        await self._directory.delete_template(await self._own(request, await self._principal(request)))
        return web.Response(status=204)

    async def usage(self, request: web.Request) -> web.Response:
        """`GET /v1/usage`: the caller's account, grouped as asked."""
        principal = await self._principal(request)
        query = request.query
        asked = ",".join(query.getall("group_by", [])).split(",")
        group_by = list(dict.fromkeys(name.strip() for name in asked if name.strip()))
        until = _moment(query.get("until"), "until") or datetime.now(UTC)
        since = _moment(query.get("since"), "since") or until - DEFAULT_SPAN
        rows = await usage(
            self._store,
            principal.account.name,
            group_by=group_by,
            session_id=query.get("session_id"),
            since=since,
            until=until,
        )
        return _json(
            {
                "object": "list",
                "account": principal.account.name,
                "since": since.isoformat(),
                "until": until.isoformat(),
                "data": [_row(row, group_by) for row in rows],
            }
        )

    async def key(self, request: web.Request) -> web.Response:
        """`GET /v1/key`: the calling key, its account's credit, its limits and its spend."""
        principal = await self._principal(request)
        key, account = principal.key, principal.account
        limits = limits_of(principal, self._gateway.deployment.settings.defaults)
        balance = await self._ledger.balance(account.name, key.id, key_limits=limits, account_limits=account.limits)
        return _json(
            {
                "id": key.id,
                "object": "key",
                "name": key.name,
                "account": account.name,
                "balance_usd": format_usd(balance.balance_nusd),
                "held_usd": format_usd(balance.held_nusd),
                "available_usd": format_usd(balance.available_nusd),
                "limits": [_limit(bucket) for bucket in balance.buckets],
                "budgets": in_usd(asdict(key.budgets)),
                "spend": in_usd(asdict(balance.spend)),
                "default_model": key.default_model,
                "models": key.models,
                "expires_at": _rfc3339(key.expires_at),
            }
        )

    async def _principal(self, request: web.Request) -> Principal:
        return await self._authenticator.principal(request.headers.get("authorization"), self._client_of(request))

    async def _body(self, request: web.Request, principal: Principal) -> bytes:
        room = self._gateway.bodies.room(principal.account.name)
        try:
            settings = self._gateway.deployment.settings.server
            return await read_json_body(request, settings, room.take, MAX_TEMPLATE_BODY_BYTES)
        finally:
            room.leave()

    def _model(self, name: str) -> dict[str, Any]:
        """OpenAI's model object, and the members that Mesh's SDK needs beside them."""
        entry = self._gateway.deployment.catalog.model(name)
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": name.partition("/")[0],
            "name": name,
            "context_window": entry.context_window if entry is not None else None,
            "is_free": entry is not None and not (entry.price.input or entry.price.output),
        }

    async def _found(self, request: web.Request, principal: Principal) -> Template:
        name = request.match_info["name"]
        template = await self._directory.template(principal.account.name, name)
        if template is None:
            raise Fault(Source.CLIENT, template_not_found(name))
        return template

    async def _own(self, request: web.Request, principal: Principal) -> Template:
        """The template, if it is the caller's to change: global ones are the operators'."""
        template = await self._found(request, principal)
        if template.is_global:
            raise Fault(Source.CLIENT, forbidden("Global templates can't be changed with a key."))
        return template

    async def _put(self, template: Template) -> None:
        if not await self._directory.put_template(template):
            detail = Detail("name_taken", ("body", "name"), f"There is a template `{template.name}` already.")
            raise Fault(Source.CLIENT, invalid(detail.msg, detail, param="name"))


ROUTES: tuple[tuple[str, str, Callable[[Api, web.Request], Awaitable[web.Response]]], ...] = (
    ("GET", "/v1/models", Api.models),
    ("GET", "/v1/models/{id:.+}", Api.model),
    ("GET", "/v1/templates", Api.templates),
    ("POST", "/v1/templates", Api.create_template),
    ("GET", "/v1/templates/{name}", Api.template),
    ("PATCH", "/v1/templates/{name}", Api.change_template),
    ("DELETE", "/v1/templates/{name}", Api.delete_template),
    ("GET", "/v1/usage", Api.usage),
    ("GET", "/v1/key", Api.key),
)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


def _moment(text: str | None, name: str) -> datetime | None:
    """A time of RFC 3339, section 5.6."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text.replace(" ", "+"))
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Fault(Source.CLIENT, invalid(f"`{name}` is not an RFC 3339 time.", param=name)) from error
    if moment < EPOCH:
        raise Fault(Source.CLIENT, invalid(f"`{name}` is before 1970.", param=name))
    return moment


def _row(row: Row, group_by: Sequence[str]) -> dict[str, Any]:
    fields = in_usd(asdict(row))
    groups = {name: fields.pop(name) for name in GROUPS}
    return {**{name: groups[name] for name in group_by}, **fields}


def _limit(bucket: BucketState) -> dict[str, Any]:
    fields = asdict(bucket)
    reset = format_reset(fields.pop("reset_s"))
    return {**fields, "reset": reset}


def _rfc3339(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
