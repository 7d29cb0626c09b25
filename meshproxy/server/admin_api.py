"""`/admin/v1/...` on the admin listener: the commands' operations over HTTP, by the same `Administration`.

It requires the admin token.

A browser that has the token sends it with requests from any page, so a change requested by another origin is refused.
"""

import asyncio
import time
from collections.abc import Mapping
from functools import cache, partial
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType, field

from meshproxy.config.load import nearest
from meshproxy.errors import GatewayError, Source, forbidden, request_timeout, unsupported_media_type
from meshproxy.ledger.administration import MAX_NOTE, MAX_REF, Administration
from meshproxy.ledger.usage_report import GROUPS
from meshproxy.policy import principal
from meshproxy.policy.principal import Bounds, KeyChange, Status
from meshproxy.policy.template import check_template
from meshproxy.server.chat import request_id_of
from meshproxy.server.routes import (
    MOMENT,
    TEXT,
    Amount,
    Body,
    Budget,
    Moment,
    Route,
    Span,
    decode_body,
    describe,
    groups,
    invalid_parameter,
    json_response,
    number,
    query_number,
)
from meshproxy.units import MAX_EXACT_INT, parse_moment

ROOT = "/admin/v1"
OPENAPI_PATH = f"{ROOT}/openapi.json"
MAX_PAGE = 1000
BODY_TIMEOUT_S = 30.0
REPEATABLE = "group_by"
SAFE = frozenset({"GET", "HEAD"})  # RFC 9110, 9.2.1
SAME_SITE = frozenset({"same-origin", "none"})  # Fetch Metadata, 2.4: from the page itself, or typed by the user

Whole = Annotated[int, Meta(ge=1, le=MAX_EXACT_INT)]
Daily = Annotated[int, Meta(ge=1, le=principal.MAX_REQUESTS_PER_DAY)]
Models = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=principal.MAX_MODELS)]


class LimitsBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits, as they are shown; null removes one."""

    requests_per_minute: Whole | UnsetType | None = UNSET
    tokens_per_minute: Whole | UnsetType | None = UNSET
    burst: Whole | UnsetType | None = UNSET
    requests_per_day: Daily | UnsetType | None = UNSET
    max_parallel: Whole | UnsetType | None = UNSET


class BudgetsBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Budgets in USD, as they are shown; null removes one."""

    total_nusd: Budget | UnsetType | None = field(default=UNSET, name="total_usd")
    daily_nusd: Budget | UnsetType | None = field(default=UNSET, name="daily_usd")
    monthly_nusd: Budget | UnsetType | None = field(default=UNSET, name="monthly_usd")


class BoundsBody(LimitsBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits and budgets in USD, each as a field of its own or in the objects that show them; null removes one."""

    total_nusd: Budget | UnsetType | None = field(default=UNSET, name="budget_usd")
    daily_nusd: Budget | UnsetType | None = field(default=UNSET, name="budget_daily_usd")
    monthly_nusd: Budget | UnsetType | None = field(default=UNSET, name="budget_monthly_usd")
    limits: LimitsBody = LimitsBody()
    budgets: BudgetsBody = BudgetsBody()

    def bounds(self, session: Mapping[str, int | None] = {}) -> Bounds:
        """Convert to `Bounds`, with these budgets of sessions."""
        return Bounds(
            limits=_given(self.limits, LimitsBody) | _given(self, LimitsBody),
            budgets=_given(self.budgets, BudgetsBody) | _given(self, BudgetsBody),
            session=dict(session),
        )


class AccountPatch(BoundsBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Changes to an account. Fields that are left out stay."""

    status: Literal["active", "suspended"] | UnsetType = UNSET


class KeyBody(BoundsBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of a key; null removes one. `expires_at`: an RFC 3339 time, or a span such as `30d`."""

    name: Annotated[str, Meta(max_length=principal.MAX_NAME)] | UnsetType | None = UNSET
    models: Models | UnsetType | None = UNSET
    default_model: str | UnsetType | None = UNSET
    expires_at: Moment | UnsetType | None = UNSET
    params: dict[str, Any] | UnsetType | None = UNSET
    clamp: bool | UnsetType | None = UNSET
    session_budget_nusd: Budget | UnsetType | None = field(default=UNSET, name="session_budget_usd")
    session_budgets: BudgetsBody = BudgetsBody()

    def change(self, status: Status | UnsetType = UNSET) -> KeyChange:
        """Convert to `KeyChange`."""
        session = _given(self.session_budgets, BudgetsBody)
        if (total_nusd := self.session_budget_nusd) is not UNSET:
            session["total_nusd"] = None if total_nusd is None else int(total_nusd)
        return KeyChange(
            name="" if self.name is None else self.name,
            expires_at=float(self.expires_at) if isinstance(self.expires_at, float) else self.expires_at,
            params={} if self.params is None else self.params,
            status=status,
            bounds=self.bounds(session),
            **{field: getattr(self, field) for field in ("models", "default_model", "clamp")},
        )


class NewKey(KeyBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new key. Its account is created if there is none."""

    account: Annotated[str, Meta(extra_json_schema={"pattern": rf"\A{principal.ACCOUNT_NAME.pattern}\Z"})]


class KeyPatch(KeyBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Changes to a key. Fields that are left out stay."""

    status: Status | UnsetType = UNSET


class Rotation(Struct, frozen=True, forbid_unknown_fields=True):
    """How long the old secret still works, such as `24h`. Without it, the old secret stops working at once."""

    grace: Span | None = None


class NewGrant(Struct, frozen=True, forbid_unknown_fields=True):
    """Credit in USD (negative: taken back), applied once for each `ref`."""

    amount_usd: Amount
    ref: Annotated[str, Meta(max_length=MAX_REF, extra_json_schema={"pattern": r"\S"})] | None = None
    note: Annotated[str, Meta(max_length=MAX_NOTE)] | None = None


def _given(body: Struct, kind: type[Struct]) -> dict[str, int | None]:
    """Return those of `kind`'s fields that a body has, None for those that it removes."""
    values = {name: getattr(body, name) for name in kind.__struct_fields__}
    return {name: None if value is None else int(value) for name, value in values.items() if value is not UNSET}


class AdminApi:
    """The handlers of one request. Each returns what the corresponding command prints with --json."""

    def __init__(self, administration: Administration) -> None:
        self._administration = administration

    async def keys(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/keys`: keys, oldest first, with spend and last use; `account=`, `limit=`, `after=` an id."""
        limit, after = _page(request)
        keys = await self._administration.keys(request.query.get("account"), limit=limit, after=after)
        return _listed(request, keys, limit)

    async def create_key(self, request: web.Request) -> Any:
        """`POST /admin/v1/keys`: create a key; only this answer contains the secret, as `key`."""
        body = await _read(request, NewKey)
        if isinstance(body.expires_at, float) and body.expires_at <= time.time():
            raise invalid_parameter("expires_at", "is not in the future.", "body")
        return await self._administration.create_key(body.account, body.change())

    async def key(self, request: web.Request) -> Any:
        """`GET /admin/v1/keys/{id}`: a key without its secret."""
        return await self._administration.key(request.match_info["id"])

    async def change_key(self, request: web.Request) -> Any:
        """`PATCH /admin/v1/keys/{id}`: change the given fields only."""
        body = await _read(request, KeyPatch)
        return await self._administration.change_key(request.match_info["id"], body.change(body.status))

    async def revoke_key(self, request: web.Request) -> Any:
        """`DELETE /admin/v1/keys/{id}`: revoke a key for good; its record stays."""
        return await self._administration.set_key_status(request.match_info["id"], "revoked")

    async def rotate_key(self, request: web.Request) -> Any:
        """`POST /admin/v1/keys/{id}/rotate`: give a key a new secret, which only this answer contains."""
        body = await _read(request, Rotation, optional=True)
        return await self._administration.rotate_key(request.match_info["id"], int(body.grace or 0))

    async def accounts(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/accounts`: accounts by name with credit, limits and spend; `limit=`, `after=` a name."""
        limit, after = _page(request)
        return _listed(request, await self._administration.accounts(limit=limit, after=after), limit, "account")

    async def account(self, request: web.Request) -> Any:
        """`GET /admin/v1/accounts/{name}`: an account with credit, limits, budgets and spend."""
        return await self._administration.account(request.match_info["name"])

    async def change_account(self, request: web.Request) -> Any:
        """`PATCH /admin/v1/accounts/{name}`: change its limits, budgets or status."""
        body = await _read(request, AccountPatch)
        return await self._administration.account_limits(request.match_info["name"], body.bounds(), body.status)

    async def delete_account(self, request: web.Request) -> Any:
        """`DELETE /admin/v1/accounts/{name}`: delete an account and everything stored for it."""
        return await self._administration.delete_account(request.match_info["name"])

    async def grants(self, request: web.Request) -> Any:
        """`GET /admin/v1/accounts/{name}/grants`: its grants, newest first."""
        return await self._administration.grants(request.match_info["name"])

    async def grant(self, request: web.Request) -> web.Response:
        """`POST /admin/v1/accounts/{name}/grants`: add credit; a repeated `ref` changes nothing and is answered 200."""
        body = await _read(request, NewGrant)
        name = request.match_info["name"]
        granted = await self._administration.grant(name, int(body.amount_usd), body.note or "", body.ref)
        return json_response(granted, 200 if granted["granted_now_usd"] == "0.00" else 201)

    async def usage(self, request: web.Request) -> Any:
        """`GET /admin/v1/usage`: requests, tokens, cost; `account=`, `group_by=`, `session_id=`, `since=`, `until=`."""
        query = request.query
        since, until = (_past(name, query[name]) if name in query else None for name in ("since", "until"))
        return await self._administration.usage(
            query.get("account"), group_by=groups(query), session_id=query.get("session_id"), since=since, until=until
        )

    async def request(self, request: web.Request) -> Any:
        """`GET /admin/v1/requests/{request_id}`: one settled request."""
        return await self._administration.request(request.match_info["request_id"])

    async def audit(self, request: web.Request) -> Any:
        """`GET /admin/v1/audit`: the latest changes, newest first; `limit=`."""
        return await self._administration.audit(_page(request)[0])

    async def templates(self, request: web.Request) -> Any:
        """`GET /admin/v1/templates`: all templates; with `account=`, those that the account can use."""
        return await self._administration.templates(request.query.get("account"))

    async def put_template(self, request: web.Request) -> Any:
        """`POST /admin/v1/templates`: create or replace a global template, or with `account=` one of that account."""
        fields = check_template(await _body(request), partial=False)
        name = fields.name if isinstance(fields.name, str) else ""
        return await self._administration.put_template(request.query.get("account"), name, fields)

    async def template(self, request: web.Request) -> Any:
        """`GET /admin/v1/templates/{name}`: a template by name or id; with `account=`, as that account finds it."""
        account, name = request.query.get("account"), request.match_info["name"]
        return await self._administration.template(account, name)

    async def delete_template(self, request: web.Request) -> Any:
        """`DELETE /admin/v1/templates/{name}`: delete a global template, or with `account=` one of that account."""
        return await self._administration.delete_template(request.query.get("account"), request.match_info["name"])

    async def openapi(self, _request: web.Request) -> Any:
        """`GET /admin/v1/openapi.json`: this API as an OpenAPI 3.1 document."""
        return document()


_ACCOUNT = {"account": {"type": "string", "pattern": f"^{principal.ACCOUNT_NAME.pattern}$"}}
_PAGE = {"limit": number(MAX_PAGE), "after": TEXT}
_PAST: dict[str, Any] = {"anyOf": [MOMENT, {"type": "string", "pattern": "^[0-9]{1,4}[smhdw]$"}]}
_USAGE: dict[str, Any] = {
    **_ACCOUNT,
    "group_by": {"type": "array", "items": {"enum": [*GROUPS, "session"]}},
    "session_id": TEXT,
    "since": _PAST,
    "until": _PAST,
}
# A path takes no other parameters than these, as a mistyped `account` would show all accounts' usage.
ROUTES = (
    Route("GET", f"{ROOT}/keys", AdminApi.keys, "[SpentKey]", query={**_ACCOUNT, **_PAGE}),
    Route("POST", f"{ROOT}/keys", AdminApi.create_key, "NewSecret", (201,), body=NewKey),
    Route("GET", f"{ROOT}/keys/{{id}}", AdminApi.key, "SpentKey"),
    Route("PATCH", f"{ROOT}/keys/{{id}}", AdminApi.change_key, "ChangedKey", body=KeyPatch),
    Route("DELETE", f"{ROOT}/keys/{{id}}", AdminApi.revoke_key, "ChangedKey"),
    Route("POST", f"{ROOT}/keys/{{id}}/rotate", AdminApi.rotate_key, "NewSecret", body=Rotation, needs_body=False),
    Route("GET", f"{ROOT}/accounts", AdminApi.accounts, "[Account]", query=_PAGE),
    Route("GET", f"{ROOT}/accounts/{{name}}", AdminApi.account, "OneAccount"),
    Route("PATCH", f"{ROOT}/accounts/{{name}}", AdminApi.change_account, "AccountBounds", body=AccountPatch),
    Route("DELETE", f"{ROOT}/accounts/{{name}}", AdminApi.delete_account, "DeletedAccount"),
    Route("GET", f"{ROOT}/accounts/{{name}}/grants", AdminApi.grants, "[Grant]"),
    Route("POST", f"{ROOT}/accounts/{{name}}/grants", AdminApi.grant, "Granted", (200, 201), body=NewGrant),
    Route("GET", f"{ROOT}/usage", AdminApi.usage, "[AccountUsage]", query=_USAGE),
    Route("GET", f"{ROOT}/requests/{{request_id}}", AdminApi.request, "Request"),
    Route("GET", f"{ROOT}/audit", AdminApi.audit, "[Change]", query={"limit": number(MAX_PAGE)}),
    Route("GET", f"{ROOT}/templates", AdminApi.templates, "[Template]", query=_ACCOUNT),
    Route("POST", f"{ROOT}/templates", AdminApi.put_template, "Template", (201,), _ACCOUNT, "TemplateRequest"),
    Route("GET", f"{ROOT}/templates/{{name}}", AdminApi.template, "Template", query=_ACCOUNT),
    Route("DELETE", f"{ROOT}/templates/{{name}}", AdminApi.delete_template, "DeletedTemplate", query=_ACCOUNT),
    Route("GET", OPENAPI_PATH, AdminApi.openapi, "Document"),
)


# By operation, those that take what its answer has: a field of it, as a parameter of their path.
_ID, _NAME = ("id", "id"), ("account", "name")
LINKS = {
    "create_key": {
        "key": _ID,
        "change_key": _ID,
        "rotate_key": _ID,
        "account": _NAME,
        "change_account": _NAME,
        "grant": _NAME,
    },
    "rotate_key": {"revoke_key": _ID},
    "grant": {"grants": _NAME, "delete_account": _NAME},
    "put_template": dict.fromkeys(("template", "delete_template"), ("id", "name")),
}
REFUSALS = (400, 401, 403, 404, 405, 408, 409, 413, 414, 415, 422, 431, 500, 503)


@cache
def document() -> dict[str, Any]:
    """Build the OpenAPI document of this API, once in a process."""
    token = {"token": {"type": "http", "scheme": "bearer"}}
    return describe("meshproxy admin", ROUTES, REFUSALS, token, links=LINKS)


def add_routes(app: web.Application, administration: Administration) -> None:
    """Add every path to the admin listener's application."""
    for route in ROUTES:
        route.add_to(app, partial(_answer, administration, route))


async def _answer(administration: Administration, route: Route, request: web.Request) -> web.Response:
    """Answer with the request's id, forbidding caching. Refuses other origins' changes, and unknown parameters."""
    if request.method not in SAFE:
        _refuse_other_origins(request)
    for name in request.query:
        if name not in route.query:
            raise invalid_parameter(name[:80], f"is no parameter of this path{nearest(name, route.query) or '.'}")
        if name != REPEATABLE and len(request.query.getall(name)) > 1:
            raise invalid_parameter(name, "is given more than once.")
    actor = f"admin:{request.remote}" if request.remote else "admin"
    response = await route.answer(AdminApi(administration.acting_as(actor, whole_ids=True)), request)
    response.headers["cache-control"] = "no-store"
    response.headers["x-request-id"] = request_id_of(request)
    return response


def _refuse_other_origins(request: web.Request) -> None:
    """Raise GatewayError `forbidden` for a change that another origin's page made a browser send."""
    site = request.headers.get("sec-fetch-site", "none")
    origin = request.headers.get("origin")
    if site not in SAME_SITE or (origin is not None and urlsplit(origin).netloc != request.host):
        raise GatewayError(Source.CLIENT, forbidden("A page of another origin may not change anything here."))


async def _read(request: web.Request, kind: type[Body], *, optional: bool = False) -> Body:
    """Decode a body, which may be empty if it is `optional`."""
    text = await _body(request)
    return decode_body(b"{}" if optional and not text else text, kind)


async def _body(request: web.Request) -> bytes:
    """Read a body within BODY_TIMEOUT_S."""
    if request.body_exists and request.content_type != "application/json":
        raise GatewayError(Source.CLIENT, unsupported_media_type("Send the body as `content-type: application/json`."))
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError as error:
        late = request_timeout(f"The body didn't arrive within {BODY_TIMEOUT_S:g} s.")
        raise GatewayError(Source.CLIENT, late) from error


def _page(request: web.Request) -> tuple[int, str]:
    return query_number(request.query, "limit", MAX_PAGE, least=1, most=MAX_PAGE), request.query.get("after", "")


def _listed(request: web.Request, rows: list[dict[str, Any]], limit: int, name: str = "id") -> web.Response:
    """Answer with a page; its `Link` header (RFC 8288) has the next page's address if there may be one."""
    response = json_response(rows)
    if len(rows) == limit:
        following = request.rel_url.update_query(limit=str(limit), after=rows[-1][name])
        response.headers["link"] = f'<{following}>; rel="next"'
    return response


def _past(name: str, text: str) -> float:
    """Return the Unix seconds of a query's time, or of a span before now."""
    try:
        return parse_moment(text.replace(" ", "+"), time.time(), -1)  # a `+` that wasn't escaped
    except ValueError as error:
        raise invalid_parameter(name, f"is invalid: {error}.") from error
