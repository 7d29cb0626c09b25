"""`/admin/v1/...` on the admin listener: the commands' operations over HTTP, by the same `Administration`.

It requires the admin token.

A browser that has the token sends it with requests from any page, so a change requested by another origin is refused.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from meshproxy.config.load import nearest
from meshproxy.errors import GatewayError, Source, forbidden, invalid, request_timeout, unsupported_media_type
from meshproxy.ledger.administration import MAX_NOTE, MAX_REF, Administration
from meshproxy.ledger.directory import ACCOUNT_NAME, ACCOUNT_NAME_RULE
from meshproxy.openai.errors import detail_of, field_path
from meshproxy.policy.principal import (
    MAX_LIMIT,
    MAX_MODELS,
    MAX_NAME,
    MAX_REQUESTS_PER_DAY,
    Bounds,
    KeyChange,
    Limits,
    Status,
)
from meshproxy.policy.template import check_template, to_public
from meshproxy.server.api import invalid_parameter, json_response, query_number
from meshproxy.server.chat import request_id_of
from meshproxy.units import MAX_NUSD, NUSD_PER_USD, parse_moment, parse_span, parse_usd

ROOT = "/admin/v1"
OPENAPI_PATH = f"{ROOT}/openapi.json"
MAX_PAGE = 1000
MAX_AUDIT = 1000
BODY_TIMEOUT_S = 30.0
SAFE = frozenset({"GET", "HEAD"})  # RFC 9110, 9.2.1
SAME_SITE = frozenset({"same-origin", "none"})  # Fetch Metadata, 2.4: from the page itself, or typed by the user

Whole = Annotated[int, Meta(ge=1, le=MAX_LIMIT)]
Daily = Annotated[int, Meta(ge=1, le=MAX_REQUESTS_PER_DAY)]
MAX_USD = MAX_NUSD // NUSD_PER_USD
# A decimal string, or a number that is parsed from its text (money.parse_usd).
Usd = (
    Annotated[
        str, Meta(pattern=r"\A-?[0-9]{1,12}(\.[0-9]{1,9})?\Z", description="a decimal amount in USD, such as 25.00")
    ]
    | Annotated[int, Meta(ge=-MAX_USD, le=MAX_USD)]
    | Annotated[float, Meta(ge=-MAX_USD, le=MAX_USD)]
)
Budget = (
    Annotated[str, Meta(pattern=r"\A[0-9]{1,12}(\.[0-9]{1,9})?\Z", description="a decimal amount in USD from 0 on")]
    | Annotated[int, Meta(ge=0, le=MAX_USD)]
    | Annotated[float, Meta(ge=0, le=MAX_USD)]
)
Models = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=MAX_MODELS)]
Body = TypeVar("Body", bound=Struct)


class LimitsBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits, as they are shown; null removes one."""

    requests_per_minute: Whole | UnsetType | None = UNSET
    tokens_per_minute: Whole | UnsetType | None = UNSET
    burst: Whole | UnsetType | None = UNSET
    requests_per_day: Daily | UnsetType | None = UNSET
    max_parallel: Whole | UnsetType | None = UNSET


class BudgetsBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Budgets in USD, as they are shown; null removes one."""

    total_usd: Budget | UnsetType | None = UNSET
    daily_usd: Budget | UnsetType | None = UNSET
    monthly_usd: Budget | UnsetType | None = UNSET

    def amounts(self, name: str) -> dict[str, int | None]:
        """Return the amounts in nano-USD. Raises GatewayError `validation_error` that names the field."""
        return _budgets(
            total_nusd=(f"{name}.total_usd", self.total_usd),
            daily_nusd=(f"{name}.daily_usd", self.daily_usd),
            monthly_nusd=(f"{name}.monthly_usd", self.monthly_usd),
        )


class BoundsBody(LimitsBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits and budgets in USD, each as a field of its own or in the objects that show them; null removes one."""

    budget_usd: Budget | UnsetType | None = UNSET
    budget_daily_usd: Budget | UnsetType | None = UNSET
    budget_monthly_usd: Budget | UnsetType | None = UNSET
    limits: LimitsBody = LimitsBody()
    budgets: BudgetsBody = BudgetsBody()

    def bounds(self) -> Bounds:
        """Convert to `Bounds`. Raises GatewayError `validation_error` for an invalid budget."""
        return Bounds(
            limits=_limits(self.limits) | _limits(self),
            budgets=self.budgets.amounts("budgets")
            | _budgets(
                total_nusd=("budget_usd", self.budget_usd),
                daily_nusd=("budget_daily_usd", self.budget_daily_usd),
                monthly_nusd=("budget_monthly_usd", self.budget_monthly_usd),
            ),
        )


class AccountPatch(BoundsBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Changes to an account. Fields that are left out stay."""

    status: Literal["active", "suspended"] | UnsetType = UNSET


class KeyBody(BoundsBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of a key; null removes one. `expires_at`: an RFC 3339 time, or a span such as `30d`."""

    name: Annotated[str, Meta(max_length=MAX_NAME)] | UnsetType | None = UNSET
    models: Models | UnsetType | None = UNSET
    default_model: str | UnsetType | None = UNSET
    expires_at: str | UnsetType | None = UNSET
    params: dict[str, Any] | UnsetType | None = UNSET
    clamp: bool | UnsetType | None = UNSET
    session_budget_usd: Budget | UnsetType | None = UNSET
    session_budgets: BudgetsBody = BudgetsBody()

    def change(self, status: Status | UnsetType = UNSET) -> KeyChange:
        """Convert to `KeyChange`. Raises GatewayError `validation_error` for an invalid time or amount."""
        bounds = self.bounds()
        session = self.session_budgets.amounts("session_budgets")
        session |= _budgets(total_nusd=("session_budget_usd", self.session_budget_usd))
        return KeyChange(
            name="" if self.name is None else self.name,
            models=self.models,
            default_model=self.default_model,
            expires_at=_moment("expires_at", self.expires_at) if isinstance(self.expires_at, str) else self.expires_at,
            params={} if self.params is None else self.params,
            clamp=self.clamp,
            status=status,
            bounds=replace(bounds, session=session),
        )


class NewKey(KeyBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new key. Its account is created if there is none."""

    account: Annotated[str, Meta(pattern=rf"\A{ACCOUNT_NAME}\Z", description=ACCOUNT_NAME_RULE)]


class KeyPatch(KeyBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Changes to a key. Fields that are left out stay."""

    status: Status | UnsetType = UNSET


class Rotation(Struct, frozen=True, forbid_unknown_fields=True):
    """How long the old secret still works, such as `24h`. Without it, the old secret stops working at once."""

    grace: Annotated[str, Meta(pattern=r"\A[0-9]{1,6}[smhdw]\Z", description="a duration such as 24h")] | None = None


class NewGrant(Struct, frozen=True, forbid_unknown_fields=True):
    """Credit in USD (negative: taken back), applied once for each `ref`."""

    amount_usd: Usd
    ref: Annotated[str, Meta(pattern=r"\S", max_length=MAX_REF, description="a text that isn't empty")] | None = None
    note: Annotated[str, Meta(max_length=MAX_NOTE)] | None = None


class AdminApi:
    """The handlers. Each answers with what the corresponding command prints with --json."""

    def __init__(self, administration: Administration, openapi: bytes) -> None:
        self._administration = administration
        self._openapi = openapi

    async def keys(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/keys`: keys, oldest first, with spend and last use; `account=`, `limit=`, `after=` an id."""
        limit, after = _page(request)
        return _listed(
            request, await self._administration.keys(request.query.get("account"), limit=limit, after=after), limit
        )

    async def create_key(self, request: web.Request) -> web.Response:
        """`POST /admin/v1/keys`: create a key; only this answer contains the secret, as `key`."""
        body = await _read(request, NewKey)
        change = body.change()
        if isinstance(change.expires_at, float) and change.expires_at <= time.time():
            raise invalid_parameter("expires_at", "is not in the future.", "body")
        return json_response(await self._at(request).create_key(body.account, change), 201)

    async def key(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/keys/{id}`: a key without its secret."""
        return json_response(await self._at(request).key(request.match_info["id"]))

    async def change_key(self, request: web.Request) -> web.Response:
        """`PATCH /admin/v1/keys/{id}`: change the given fields only."""
        body = await _read(request, KeyPatch)
        return json_response(await self._at(request).change_key(request.match_info["id"], body.change(body.status)))

    async def revoke_key(self, request: web.Request) -> web.Response:
        """`DELETE /admin/v1/keys/{id}`: revoke a key for good; its record stays."""
        return json_response(await self._at(request).set_key_status(request.match_info["id"], "revoked"))

    async def rotate_key(self, request: web.Request) -> web.Response:
        """`POST /admin/v1/keys/{id}/rotate`: give a key a new secret, which only this answer contains."""
        body = await _read(request, Rotation, optional=True)
        try:
            grace_s = parse_span(body.grace) if body.grace else 0
        except ValueError as error:
            raise invalid_parameter("grace", f"is invalid: {error}.", "body") from error
        return json_response(await self._at(request).rotate_key(request.match_info["id"], grace_s))

    async def accounts(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/accounts`: accounts by name with credit, limits and spend; `limit=`, `after=` a name."""
        limit, after = _page(request)
        return _listed(request, await self._administration.accounts(limit=limit, after=after), limit, "account")

    async def account(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/accounts/{name}`: an account with credit, limits, budgets and spend."""
        return json_response(await self._administration.account(request.match_info["name"]))

    async def change_account(self, request: web.Request) -> web.Response:
        """`PATCH /admin/v1/accounts/{name}`: change its limits, budgets or status."""
        body = await _read(request, AccountPatch)
        return json_response(
            await self._at(request).account_limits(request.match_info["name"], body.bounds(), body.status)
        )

    async def delete_account(self, request: web.Request) -> web.Response:
        """`DELETE /admin/v1/accounts/{name}`: delete an account and everything stored for it."""
        return json_response(await self._at(request).delete_account(request.match_info["name"]))

    async def grants(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/accounts/{name}/grants`: its grants, newest first."""
        return json_response(await self._administration.grants(request.match_info["name"]))

    async def grant(self, request: web.Request) -> web.Response:
        """`POST /admin/v1/accounts/{name}/grants`: add credit; a repeated `ref` changes nothing and is answered 200."""
        body = await _read(request, NewGrant)
        amount_nusd = _amount("amount_usd", body.amount_usd)
        granted = await self._at(request).grant(request.match_info["name"], amount_nusd, body.note or "", body.ref)
        return json_response(granted, 200 if granted["granted_now_usd"] == "0.00" else 201)

    async def usage(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/usage`: requests, tokens, cost; `account=`, `group_by=`, `session_id=`, `since=`, `until=`."""
        query = request.query
        words = [word.strip() for word in ",".join(query.getall("group_by", [])).split(",") if word.strip()]
        since, until = (_moment(name, query[name], -1) if name in query else None for name in ("since", "until"))
        rows = await self._administration.usage(
            query.get("account"), group_by=words, session_id=query.get("session_id"), since=since, until=until
        )
        return json_response(rows)

    async def request(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/requests/{request_id}`: one settled request."""
        return json_response(await self._administration.request(request.match_info["request_id"]))

    async def audit(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/audit`: the latest changes, newest first; `limit=`."""
        return json_response(
            await self._administration.audit(query_number(request.query, "limit", MAX_AUDIT, least=1, most=MAX_AUDIT))
        )

    async def templates(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/templates`: all templates; with `account=`, those that the account can use."""
        return json_response(await self._administration.templates(request.query.get("account")))

    async def put_template(self, request: web.Request) -> web.Response:
        """`POST /admin/v1/templates`: create or replace a global template, or with `account=` one of that account."""
        fields = check_template(await _body(request), partial=False)
        name = fields.name if isinstance(fields.name, str) else ""
        return json_response(await self._at(request).put_template(request.query.get("account"), name, fields), 201)

    async def template(self, request: web.Request) -> web.Response:
        """`GET /admin/v1/templates/{name}`: a template by name or id; with `account=`, as that account finds it."""
        return json_response(
            to_public(await self._administration.template(request.query.get("account"), request.match_info["name"]))
        )

    async def delete_template(self, request: web.Request) -> web.Response:
        """`DELETE /admin/v1/templates/{name}`: delete a global template, or with `account=` one of that account."""
        return json_response(
            await self._at(request).delete_template(request.query.get("account"), request.match_info["name"])
        )

    async def openapi(self, _request: web.Request) -> web.Response:
        """`GET /admin/v1/openapi.json`: this API as an OpenAPI 3.1 document."""
        return web.Response(body=self._openapi, content_type="application/json")

    def _at(self, request: web.Request) -> Administration:
        """Return the administration with this client as actor."""
        return self._administration.acting_as(f"admin:{request.remote}" if request.remote else "admin", whole_ids=True)


Handler = Callable[[AdminApi, web.Request], Awaitable[web.Response]]

ROUTES: tuple[tuple[str, str, Handler, type[Struct] | None], ...] = (
    ("GET", f"{ROOT}/keys", AdminApi.keys, None),
    ("POST", f"{ROOT}/keys", AdminApi.create_key, NewKey),
    ("GET", f"{ROOT}/keys/{{id}}", AdminApi.key, None),
    ("PATCH", f"{ROOT}/keys/{{id}}", AdminApi.change_key, KeyPatch),
    ("DELETE", f"{ROOT}/keys/{{id}}", AdminApi.revoke_key, None),
    ("POST", f"{ROOT}/keys/{{id}}/rotate", AdminApi.rotate_key, Rotation),
    ("GET", f"{ROOT}/accounts", AdminApi.accounts, None),
    ("GET", f"{ROOT}/accounts/{{name}}", AdminApi.account, None),
    ("PATCH", f"{ROOT}/accounts/{{name}}", AdminApi.change_account, AccountPatch),
    ("DELETE", f"{ROOT}/accounts/{{name}}", AdminApi.delete_account, None),
    ("GET", f"{ROOT}/accounts/{{name}}/grants", AdminApi.grants, None),
    ("POST", f"{ROOT}/accounts/{{name}}/grants", AdminApi.grant, NewGrant),
    ("GET", f"{ROOT}/usage", AdminApi.usage, None),
    ("GET", f"{ROOT}/requests/{{request_id}}", AdminApi.request, None),
    ("GET", f"{ROOT}/audit", AdminApi.audit, None),
    ("GET", f"{ROOT}/templates", AdminApi.templates, None),
    ("POST", f"{ROOT}/templates", AdminApi.put_template, None),
    ("GET", f"{ROOT}/templates/{{name}}", AdminApi.template, None),
    ("DELETE", f"{ROOT}/templates/{{name}}", AdminApi.delete_template, None),
    ("GET", OPENAPI_PATH, AdminApi.openapi, None),
)


def add_routes(app: web.Application, administration: Administration, openapi: bytes) -> None:
    """Add every path to the admin listener's application. `openapi`: the document that describes them."""
    api = AdminApi(administration, openapi)
    for method, path, function, _ in ROUTES:
        for one in SAFE if method == "GET" else (method,):
            app.router.add_route(one, path, _bound(api, function))


# The parameters of each handler's query; it takes no others, as a mistyped `account` would show all accounts' usage.
QUERIES: Mapping[Handler, tuple[str, ...]] = {
    AdminApi.keys: ("account", "limit", "after"),
    AdminApi.accounts: ("limit", "after"),
    AdminApi.usage: ("account", "group_by", "session_id", "since", "until"),
    AdminApi.audit: ("limit",),
    AdminApi.templates: ("account",),
    AdminApi.put_template: ("account",),
    AdminApi.template: ("account",),
    AdminApi.delete_template: ("account",),
}
REPEATABLE = "group_by"


def _check_query(request: web.Request, names: Sequence[str]) -> None:
    """Raise GatewayError `validation_error` for a parameter that the path doesn't take, or that is repeated."""
    for name in request.query:
        if name not in names:
            raise invalid_parameter(name[:80], f"is no parameter of this path{nearest(name, names) or '.'}")
        if name != REPEATABLE and len(request.query.getall(name)) > 1:
            raise invalid_parameter(name, "is given more than once.")


def _bound(api: AdminApi, function: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Bind a handler to the API. It adds the request's id, forbids caching, and refuses other origins' changes."""
    names = QUERIES.get(function, ())

    async def handler(request: web.Request) -> web.Response:
        if request.method not in SAFE:
            _refuse_other_origins(request)
        _check_query(request, names)
        response = await function(api, request)
        response.headers["cache-control"] = "no-store"
        response.headers["x-request-id"] = request_id_of(request)
        return response

    return handler


def _refuse_other_origins(request: web.Request) -> None:
    """Raise GatewayError `forbidden` for a change that another origin's page made a browser send."""
    site = request.headers.get("sec-fetch-site", "none")
    origin = request.headers.get("origin")
    if site not in SAME_SITE or (origin is not None and urlsplit(origin).netloc != request.host):
        raise GatewayError(Source.CLIENT, forbidden("A page of another origin may not change anything here."))


async def _read(request: web.Request, kind: type[Body], *, optional: bool = False) -> Body:
    """Decode a body. Raises GatewayError `validation_error` that names what is wrong with it."""
    text = await _body(request)
    try:
        return msgspec.json.decode(b"{}" if optional and not text else text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        detail = detail_of(error, ("body",))
        if detail.type == "string_pattern_mismatch":
            detail = replace(detail, msg=f"Expected {_description(msgspec.json.schema(kind), str(error))}")
        name = field_path(detail)
        near = nearest(name, kind.__struct_fields__) if detail.type == "extra_forbidden" else ""
        message = f"`{name}`: {detail.msg}{near or '.'}" if name else f"The body can't be used: {detail.msg}."
        raise GatewayError(Source.CLIENT, invalid(message, detail, param=name or None)) from error


def _description(schema: Any, message: str) -> str:
    """Return the description, in a schema, of the pattern that a decoding error's message quotes."""
    if isinstance(schema, dict) and repr(schema.get("pattern")) in message:
        return str(schema["description"])
    children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    return next(filter(None, (_description(child, message) for child in children)), "")


async def _body(request: web.Request) -> bytes:
    """Read a body within BODY_TIMEOUT_S."""
    if request.body_exists and request.content_type != "application/json":
        raise GatewayError(Source.CLIENT, unsupported_media_type("Send the body as `content-type: application/json`."))
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError as error:
        raise GatewayError(
            Source.CLIENT, request_timeout(f"The body didn't arrive within {BODY_TIMEOUT_S:g} s.")
        ) from error


def _page(request: web.Request) -> tuple[int, str]:
    return query_number(request.query, "limit", MAX_PAGE, least=1, most=MAX_PAGE), request.query.get("after", "")


def _listed(request: web.Request, rows: list[dict[str, Any]], limit: int, name: str = "id") -> web.Response:
    """Answer with a page; its `Link` header (RFC 8288) has the next page's address if there may be one."""
    response = json_response(rows)
    if len(rows) == limit:
        following = request.rel_url.update_query(limit=str(limit), after=rows[-1][name])
        response.headers["link"] = f'<{following}>; rel="next"'
    return response


def _limits(body: LimitsBody) -> dict[str, int | None]:
    values = {name: getattr(body, name) for name in Limits.__struct_fields__}
    return {name: value for name, value in values.items() if value is not UNSET}


def _budgets(**given: tuple[str, Usd | UnsetType | None]) -> dict[str, int | None]:
    budgets: dict[str, int | None] = {}
    for field, (name, amount) in given.items():
        if amount is None:
            budgets[field] = None
        elif not isinstance(amount, UnsetType):
            budgets[field] = _amount(name, amount)
    return budgets


def _amount(name: str, amount: Usd) -> int:
    """Parse an amount to nano-USD. A float is parsed from its shortest text, which is what the client wrote."""
    try:
        return parse_usd(amount if isinstance(amount, str) else repr(amount).removesuffix(".0"))
    except ValueError as error:
        raise invalid_parameter(name, f"is invalid: {error}.", "body") from error


def _moment(name: str, text: str, direction: int = 1) -> float:
    try:
        moment = parse_moment(text.replace(" ", "+"), time.time(), direction)
        if not 0 <= moment < 253_402_300_800:  # the year 10000
            raise ValueError(f"{text!r} is not between 1970 and 9999")
    except (ValueError, OverflowError) as error:
        raise invalid_parameter(name, f"is invalid: {error}.", "body" if direction > 0 else "query") from error
    return moment
