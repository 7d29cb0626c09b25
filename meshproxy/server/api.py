"""The data listener's other paths: models, templates, usage and the calling key."""

import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any

import msgspec
import orjson
from aiohttp import web
from msgspec import Meta, Struct
from msgspec.structs import asdict
from multidict import MultiMapping

from meshproxy.errors import (
    Detail,
    GatewayError,
    Source,
    forbidden,
    invalid,
    model_not_found,
    not_found,
    template_not_found,
)
from meshproxy.gateway.admit import limits_of
from meshproxy.gateway.entry import MAX_LOCK_USERS, Authenticator, check_version
from meshproxy.gateway.pipeline import Gateway
from meshproxy.ledger import usage_report
from meshproxy.ledger.directory import Directory
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.records import BucketState
from meshproxy.ledger.store import Store
from meshproxy.ledger.usage_report import GROUPS, HOURS_KEPT, MAX_EVENTS, UsageEvent, shown_row
from meshproxy.openai.headers import format_reset
from meshproxy.openai.request import CHAT_PATH, FIELDS
from meshproxy.policy.catalog import model_object
from meshproxy.policy.principal import Limits, Principal
from meshproxy.policy.template import Template, check_template, to_public
from meshproxy.server.chat import ChatHandler, read_json_body, request_id_of
from meshproxy.server.routes import (
    MOMENT,
    TEXT,
    Route,
    decode_body,
    describe,
    groups,
    invalid_parameter,
    number,
    one_of,
    query_number,
)
from meshproxy.units import format_usd, in_usd, rfc3339

MAX_TEMPLATE_BODY_BYTES = 4_194_304  # four times a template's bound; decoding 33 MB would stall others for 1.5 s
DEFAULT_SPAN = timedelta(days=30)
DEFAULT_PAGE = 50  # models on a page of a search
MAX_PAGE = 500
DEFAULT_EVENTS = 200
MAX_OFFSET = 1_000_000
LIST_VISITS = 20.0  # visits that a list of templates counts for: up to 32 MB of JSON
VISIT_SPAN = timedelta(days=1)  # a report counts one visit per such span, as each hour takes a command
EPOCH = datetime.fromtimestamp(0, UTC)

_GIVEN_ONCE = ("free", "provider", "q", "sort", "order", "limit", "offset", "session_id", "since", "until")
_FREE = {"": None, "true": True, "1": True, "false": False, "0": False}  # in any case: Python clients send "True"
_ORDERS = {"asc": False, "desc": True}
_SORTS = {name: name for name in ("id", "name", "brand", "context_length")}


class EventsRequest(Struct):
    """The body of `POST /v1/usage/events`."""

    request_ids: Annotated[list[str], Meta(max_length=MAX_EVENTS)] | None = None
    since: Annotated[str, Meta(extra_json_schema={"format": "date-time"})] | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_EVENTS)] | None = None


class Api:
    """The handlers, which answer from the directory and the ledger."""

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

    async def models(self, request: web.Request) -> Any:
        """`GET /v1/models`: the models this key may use; `free=`, `provider=`. A bare array for Mesh's SDKs."""
        return await self._model_list(request, free=one_of(request.query, "free", _FREE))

    async def free_models(self, request: web.Request) -> Any:
        """`GET /v1/models/free`: the models that cost nothing."""
        return await self._model_list(request, free=True)

    async def paid_models(self, request: web.Request) -> Any:
        """`GET /v1/models/paid`: the models that cost something."""
        return await self._model_list(request, free=False)

    async def search_models(self, request: web.Request) -> dict[str, Any]:
        """`GET /v1/models/search`: `q=` in id or name, `free=`, `brand=`, `sort=`, `order=`, `limit=`, `offset=`."""
        principal = await self._principal(request)
        query = request.query
        _refuse_repeats(query)
        text = query.get("q", "").strip().lower()
        brands = query.getall("brand", [])
        models = [
            model
            for model in self._models(principal, free=one_of(query, "free", _FREE))
            if text in model["id"].lower() and (not brands or model["brand"] in brands)
        ]
        sort, reverse = one_of(query, "sort", _SORTS, "id"), one_of(query, "order", _ORDERS, "asc")
        models.sort(key=lambda model: (model[sort], model["id"]), reverse=reverse)
        limit = query_number(query, "limit", DEFAULT_PAGE, most=MAX_PAGE)
        offset = query_number(query, "offset", 0, most=MAX_OFFSET)
        return {
            "items": models[offset : offset + limit],
            "total": len(models),
            "limit": limit,
            "offset": offset,
            "brands": sorted({model["brand"] for model in models}),
        }

    async def model(self, request: web.Request) -> dict[str, Any]:
        """`GET /v1/models/{id}`: one model that this key may use."""
        principal = await self._principal(request)
        name = request.match_info["id"]
        catalog = self._gateway.active.catalog
        entry = catalog.model(name)
        if entry is None or not principal.may_use(name):
            raise GatewayError(Source.CLIENT, model_not_found(name, catalog.nearest(name, principal.key.models)))
        return model_object(entry, self._started)

    async def templates(self, request: web.Request) -> web.Response:
        """`GET /v1/templates`: the account's own templates and the global ones, as a bare array."""
        principal = await self._principal(request)
        account = principal.account.name
        self._gateway.path_limiter.count(account, LIST_VISITS)
        async with self._gateway.locks.hold(account, MAX_LOCK_USERS):
            shown = [orjson.dumps(to_public(template)) async for template in self._directory.templates.list(account)]
            response = web.Response(body=b"[%b]" % b",".join(shown), content_type="application/json")
            shown.clear()
            response.headers["x-request-id"] = request_id_of(request)
            await response.prepare(request)
            await response.write_eof()  # within the turn: what a client doesn't read stays in memory
        return response

    async def create_template(self, request: web.Request) -> dict[str, Any]:
        """`POST /v1/templates`: create a template of the account."""
        principal = await self._principal(request)
        fields = check_template(await self._body(request, principal), partial=False)
        now = time.time()
        template = fields.applied_to(
            Template(id=str(uuid.uuid4()), name="", owner=principal.account.name, created_at=now, updated_at=now)
        )
        # the script reads all templates of the owner
        self._gateway.path_limiter.count(template.owner or "", LIST_VISITS)
        if not await self._directory.templates.put(template):
            raise _name_taken(f"There is a template `{template.name}` already.")
        return to_public(template)

    async def template(self, request: web.Request) -> dict[str, Any]:
        """`GET /v1/templates/{id or name}`: the account's own template, else the global one."""
        return to_public(await self._template(request, await self._principal(request)))

    async def change_template(self, request: web.Request) -> dict[str, Any]:
        """`PATCH /v1/templates/{id or name}`: change the given fields of the account's own template."""
        principal = await self._principal(request)
        template = await self._own_template(request, principal)
        fields = check_template(await self._body(request, principal), partial=True)
        try:
            changed = await self._directory.templates.change(
                template, lambda current: msgspec.structs.replace(fields.applied_to(current), updated_at=time.time())
            )
        except ValueError as error:
            raise _name_taken(str(error)) from error
        if changed is None:
            raise GatewayError(Source.CLIENT, template_not_found(template.name))
        return to_public(changed)

    async def delete_template(self, request: web.Request) -> None:
        """`DELETE /v1/templates/{id or name}`: delete the account's own template."""
        await self._directory.templates.delete(await self._own_template(request, await self._principal(request)))

    async def usage(self, request: web.Request) -> dict[str, Any]:
        """`GET /v1/usage`: the caller's account, grouped by `group_by=`."""
        principal = await self._principal(request)
        query = request.query
        _refuse_repeats(query)
        group_by = groups(query)
        until = _moment(query.get("until"), "until") or datetime.now(UTC)
        since = _moment(query.get("since"), "since") or until - DEFAULT_SPAN
        account = principal.account.name
        self._gateway.path_limiter.count(account, min(max(0.0, (until - since) / VISIT_SPAN), HOURS_KEPT / VISIT_SPAN))
        async with self._gateway.locks.hold(account, MAX_LOCK_USERS):
            rows = await usage_report.usage(
                self._store,
                account,
                group_by=group_by,
                session_id=query.get("session_id"),
                since=since,
                until=until,
                now=datetime.now(UTC),
            )
        return {
            "object": "list",
            "account": principal.account.name,
            "since": since.isoformat(),
            "until": until.isoformat(),
            "data": [shown_row(row, group_by) for row in rows],
        }

    async def event(self, request: web.Request) -> dict[str, Any]:
        """`GET /v1/usage/events/{request_id}`: usage and cost of one of the account's requests, once it is settled."""
        principal = await self._principal(request)
        request_id = request.match_info["request_id"]
        settled = await usage_report.events(self._store, principal.account.name, [request_id], datetime.now(UTC))
        if not settled:
            raise GatewayError(Source.CLIENT, not_found(f"No request `{request_id[:128]}` of this account is settled."))
        return _public_event(settled[0])

    async def events(self, request: web.Request) -> dict[str, Any]:
        """`POST /v1/usage/events`: those of `request_ids` in their order, or the latest since `since`, newest first."""
        principal = await self._principal(request)
        body = decode_body(await self._body(request, principal), EventsRequest)
        name, now = principal.account.name, datetime.now(UTC)
        if body.request_ids is not None:
            settled = await usage_report.events(self._store, name, body.request_ids, now)
        else:
            since = _moment(body.since, "since", place="body") or now - DEFAULT_SPAN
            settled = await usage_report.latest_usage_events(self._store, name, since, body.limit or DEFAULT_EVENTS)
        return {"object": "list", "events": [_public_event(event) for event in settled]}

    async def key(self, request: web.Request) -> dict[str, Any]:
        """`GET /v1/key`: the calling key, its account's credit, its limits and its spend."""
        principal = await self._principal(request)
        key, account = principal.key, principal.account
        limits = limits_of(principal, self._gateway.active.settings.defaults)
        balance = await self._ledger.balance(account.name, key.id, key_limits=limits, account_limits=account.limits)
        return {
            "id": key.id,
            "object": "key",
            "name": key.name,
            "account": account.name,
            "balance_usd": format_usd(balance.balance_nusd),
            "held_usd": format_usd(balance.held_nusd),
            "available_usd": format_usd(balance.available_nusd),
            "limits": [
                *map(_limit, balance.buckets),
                *_parallel("key", limits, balance.key_running),
                *_parallel("account", account.limits, balance.account_running),
            ],
            "budgets": in_usd(asdict(key.budgets)),
            "spend": in_usd(asdict(balance.spend)),
            "default_model": key.default_model,
            "models": key.models,
            "expires_at": rfc3339(key.expires_at, "milliseconds"),
        }

    async def balance(self, request: web.Request) -> dict[str, Any]:
        """`GET /v1/balance`: the account's credit, with Mesh's field names."""
        principal = await self._principal(request)
        balance = await self._ledger.balance(principal.account.name, principal.key.id)
        return {
            "balance_usd": format_usd(balance.balance_nusd),
            "reserved_usd": format_usd(balance.held_nusd),
            "available_usd": format_usd(balance.available_nusd),
        }

    async def _principal(self, request: web.Request) -> Principal:
        principal = await self._authenticator.principal(request.headers.get("authorization"), self._client_of(request))
        self._gateway.path_limiter.count(principal.account.name)
        if (version := request.headers.get("x-mesh-version")) is not None:
            check_version(version)
        return principal

    async def _body(self, request: web.Request, principal: Principal) -> bytes:
        room = self._gateway.bodies.reserve(principal.account.name)
        try:
            settings = self._gateway.active.settings.server
            return await read_json_body(request, settings, room.take, MAX_TEMPLATE_BODY_BYTES)
        finally:
            room.release()

    async def _model_list(self, request: web.Request, *, free: bool | None) -> Any:
        """Return OpenAI's list, or with a bare array for Mesh's SDKs (X-MeshAPI-SDK)."""
        _refuse_repeats(request.query)
        models = self._models(await self._principal(request), free=free)
        if (provider := request.query.get("provider")) is not None:
            models = [model for model in models if model["provider"] == provider]
        return models if "x-meshapi-sdk" in request.headers else {"object": "list", "data": models}

    def _models(self, principal: Principal, *, free: bool | None = None) -> list[dict[str, Any]]:
        """List the models that the key may use, in the catalogue's order. `free` filters by whether they are."""
        catalog = self._gateway.active.catalog
        entries = [catalog.model(name) for name in catalog.ids if principal.may_use(name)]
        models = [model_object(entry, self._started) for entry in entries if entry is not None]
        return models if free is None else [model for model in models if model["is_free"] is free]

    async def _template(self, request: web.Request, principal: Principal) -> Template:
        name = request.match_info["name"]
        template = await self._directory.templates.find(principal.account.name, name)
        if template is None:
            raise GatewayError(Source.CLIENT, template_not_found(name))
        return template

    async def _own_template(self, request: web.Request, principal: Principal) -> Template:
        """Return a template that the caller may change. Raises 403 for a global one, which only operators change."""
        template = await self._template(request, principal)
        if template.is_global:
            raise GatewayError(Source.CLIENT, forbidden("Global templates can't be changed with a key."))
        return template


_FREE_QUERY: dict[str, Any] = {"enum": ["true", "false", "1", "0", ""]}
_USAGE_QUERY = {
    "group_by": {"type": "array", "items": {"enum": list(GROUPS)}},
    "session_id": TEXT,
    "since": MOMENT,
    "until": MOMENT,
}
_SEARCH_QUERY = {
    "q": TEXT,
    "free": _FREE_QUERY,
    "brand": {"type": "array", "items": TEXT},
    "sort": {"enum": list(_SORTS)},
    "order": {"enum": list(_ORDERS)},
    "limit": number(MAX_PAGE, least=0),
    "offset": number(MAX_OFFSET, least=0),
}
ROUTES = (
    Route("GET", "/v1/models", Api.models, "Models", query={"free": _FREE_QUERY, "provider": TEXT}),
    Route("GET", "/v1/models/free", Api.free_models, "Models", query={"provider": TEXT}),
    Route("GET", "/v1/models/paid", Api.paid_models, "Models", query={"provider": TEXT}),
    Route("GET", "/v1/models/search", Api.search_models, "ModelsPage", query=_SEARCH_QUERY),
    Route("GET", "/v1/models/{id:.+}", Api.model, "Model"),
    Route("GET", "/v1/templates", Api.templates, "[Template]"),
    Route("POST", "/v1/templates", Api.create_template, "Template", (201,), body="TemplateRequest"),
    Route("GET", "/v1/templates/{name}", Api.template, "Template"),
    Route("PATCH", "/v1/templates/{name}", Api.change_template, "Template", body="TemplateChange"),
    Route("DELETE", "/v1/templates/{name}", Api.delete_template, "", (204,)),
    Route("GET", "/v1/usage", Api.usage, "Usage", query=_USAGE_QUERY),
    Route("GET", "/v1/usage/events/{request_id}", Api.event, "UsageEvent"),
    Route("POST", "/v1/usage/events", Api.events, "UsageEvents", body=EventsRequest),
    Route("GET", "/v1/key", Api.key, "Key"),
    Route("GET", "/v1/balance", Api.balance, "Balance"),
)
OPENAPI_PATH = "/openapi.json"
REFUSALS = (400, 401, 402, 403, 404, 405, 408, 409, 413, 414, 415, 422, 429, 431, 500, 502, 503, 504)


@cache
def document() -> dict[str, Any]:
    """Build the OpenAPI document of the data listener, once in a process. It contains only what docs/ publish."""
    chat = Route("POST", CHAT_PATH, ChatHandler.__call__, "Completion", body="ChatRequest")
    of_chat = {name: kind if name == "messages" else kind | None for name, kind in FIELDS.items()}  # null: absent
    key = {"key": {"type": "http", "scheme": "bearer", "bearerFormat": "rsk_..."}}
    described = describe("meshproxy", [chat, *ROUTES], REFUSALS, key, bodies={"ChatRequest": of_chat})
    operation = described["paths"][CHAT_PATH]["post"]
    operation |= {"operationId": "chat", "summary": "A chat completion, whole or as a stream"}
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": TEXT}
    return described


def _public_event(event: UsageEvent) -> dict[str, Any]:
    """Return an event as a client sees it: without the upstream and its prices."""
    fields = in_usd(asdict(event))
    started, settled = (rfc3339(fields.pop(name) / 1000, "milliseconds") for name in ("started_ms", "settled_ms"))
    for name in ("upstream", "upstream_status", "price", "hold"):
        del fields[name]
    return {**fields, "started_at": started, "settled_at": settled}


def _name_taken(message: str) -> GatewayError:
    detail = Detail("name_taken", ("body", "name"), message)
    return GatewayError(Source.CLIENT, invalid(message, detail, param="name"))


def _refuse_repeats(query: MultiMapping[str]) -> None:
    """Raise GatewayError `validation_error` for a parameter with one value that is given more than once."""
    for name in _GIVEN_ONCE:
        if len(query.getall(name, [])) > 1:
            raise invalid_parameter(name, "is given more than once.")


def _moment(text: str | None, name: str, place: str = "query") -> datetime | None:
    """Parse an RFC 3339 time (section 5.6)."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text.replace(" ", "+"))
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise invalid_parameter(name, "is not an RFC 3339 time.", place) from error
    if moment < EPOCH:
        raise invalid_parameter(name, "is before 1970.", place)
    return moment


def _limit(bucket: BucketState) -> dict[str, Any]:
    fields = asdict(bucket)
    reset_s = fields.pop("reset_s")
    return {**fields, "reset": format_reset(reset_s)}


def _parallel(scope: str, limits: Limits, running: int) -> Iterator[dict[str, Any]]:
    """Yield the limit on requests that run at the same time, if there is one. It has no period and no reset."""
    if (most := limits.max_parallel) is not None:
        remaining = max(0, most - running)
        yield {"scope": scope, "kind": "parallel", "limit": most, "remaining": remaining, "per": None, "reset": None}
