"""The operations of both APIs: how a path is served, how a body and a query are read, and what OpenAPI 3.1 says of them.

A document is generated from the types that requests are decoded by and from the records shown. A provider's answer is
OpenAI's format, so it is described only as far as the gateway reads it.
"""

import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import GenericAlias
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Meta, Struct, structs
from multidict import MultiMapping

from meshproxy import VERSION
from meshproxy.config.load import nearest
from meshproxy.errors import Detail, GatewayError, Source, invalid
from meshproxy.ledger import records, usage_report
from meshproxy.ledger.usage_report import GROUPS
from meshproxy.openai.errors import MAX_MESSAGE_CHARS, detail_of_body, field_path
from meshproxy.policy import principal, template
from meshproxy.units import MAX_NUSD, NUSD_PER_USD, parse_moment, parse_span, parse_usd

Body = TypeVar("Body", bound=Struct)
Value = TypeVar("Value")

# Schemas of parameters (JSON Schema 2020-12).
TEXT: dict[str, Any] = {"type": "string"}
MOMENT: dict[str, Any] = {"type": "string", "format": "date-time"}


def number(most: int, *, least: int = 1) -> dict[str, Any]:
    """Return the schema of an integer."""
    return {"type": "integer", "minimum": least, "maximum": most}


class Route(NamedTuple):
    """One operation of an API.

    A handler returns a `web.Response`, or what is sent as JSON with the first of `statuses`. `response`: the name of its shape,
    in brackets for a list of them. `query`: the schema of each parameter. `body`: the type that the handler decodes, or the
    name of a schema of `describe`.
    """

    method: str
    path: str
    handler: Callable[[Any, web.Request], Awaitable[Any]]
    response: str
    statuses: tuple[int, ...] = (200,)
    query: Mapping[str, Mapping[str, Any]] = {}
    body: type[Struct] | str | None = None
    needs_body: bool = True

    @property
    def name(self) -> str:
        """The operation's name."""
        return self.handler.__name__

    def add_to(
        self, app: web.Application, handler: Handler, expect: Callable[[web.Request], Awaitable[Any]] | None = None
    ) -> None:
        """Serve the path by `handler`. HEAD is served where GET is."""
        for method in ("GET", "HEAD") if self.method == "GET" else (self.method,):
            app.router.add_route(method, self.path, handler, expect_handler=expect)

    async def answer(self, api: Any, request: web.Request) -> web.Response:
        """Call the handler, and return its response."""
        result = await self.handler(api, request)
        return result if isinstance(result, web.Response) else json_response(result, self.statuses[0])


def json_response(value: Any, status: int = 200) -> web.Response:
    """Make the response that has a value as JSON; 204 has none."""
    if status == 204:
        return web.Response(status=status)
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


MAX_USD = MAX_NUSD // NUSD_PER_USD


class Amount(int):
    """An amount in nano-USD, decoded from a decimal string or a number in USD."""


class Budget(Amount):
    """An amount that isn't negative."""


class Moment(float):
    """Unix seconds, decoded from an RFC 3339 time or from a span from now, such as `30d`."""


class Span(int):
    """Seconds, decoded from a span such as `24h`."""


def _parsed(kind: Any, value: Any) -> Any:
    """Parse a value of a body to one of the types above. Raises ValueError, whose message says the rule."""
    text = value if isinstance(value, str) else repr(value).removesuffix(".0")  # of a number: as the client wrote it
    if issubclass(kind, Amount):
        amount = kind(parse_usd(text))
        if issubclass(kind, Budget) and amount < 0:
            raise ValueError(f"{text} is negative")
        return amount
    return kind(parse_span(text) if kind is Span else parse_moment(text, time.time()))


def _schema_of(kind: type) -> dict[str, Any]:
    """Return the JSON Schema of what `_parsed` takes."""
    if issubclass(kind, Amount):
        sign, least = ("", 0) if issubclass(kind, Budget) else ("-?", -MAX_USD)
        numbers = ({"type": name, "minimum": least, "maximum": MAX_USD} for name in ("integer", "number"))
        return {"anyOf": [{"type": "string", "pattern": rf"\A{sign}[0-9]{{1,12}}(\.[0-9]{{1,9}})?\Z"}, *numbers]}
    return {"type": "string", "pattern": r"\A[0-9]{1,6}[smhdw]\Z"} if kind is Span else TEXT


def decode_body(text: bytes, kind: type[Body]) -> Body:
    """Decode a body. Raises GatewayError `validation_error` that names what is wrong with it."""
    try:
        return msgspec.json.decode(text, type=kind, dec_hook=_parsed)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        detail = detail_of_body(error, text)
        name = field_path(detail)
        near = nearest(name, kind.__struct_encode_fields__) if detail.type == "extra_forbidden" else ""
        message = f"`{name}`: {detail.msg}{near or '.'}" if name else f"The body can't be used: {detail.msg}."
        raise GatewayError(Source.CLIENT, invalid(message, detail, param=name or None)) from error


def invalid_parameter(name: str, message: str, place: str = "query") -> GatewayError:
    """Build 422 for a parameter; the message continues its name, as in `is not a number`."""
    return GatewayError(Source.CLIENT, invalid(f"`{name}` {message}", param=name, place=place))


def query_number(query: Mapping[str, str], name: str, default: int, *, least: int = 0, most: int) -> int:
    """Return a number of the query. Raises GatewayError `validation_error` if it isn't one from `least` to `most`."""
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and least <= int(text[:9]) <= most):
        raise invalid_parameter(name, f"is a number from {least} to {most}.")
    return int(text[:9])


def one_of(query: Mapping[str, str], name: str, known: Mapping[str, Value], default: str = "") -> Value:
    """Return what a query parameter stands for. Raises GatewayError `validation_error` for an unknown value."""
    value = query.get(name, default).lower()
    if value not in known:
        raise invalid_parameter(name, f"is one of {', '.join(filter(None, known))}.")
    return known[value]


def groups(query: MultiMapping[str]) -> list[str]:
    """Return the names in `group_by`, which may be repeated or a list with commas."""
    names = map(str.strip, ",".join(query.getall("group_by", [])).split(","))
    return list(dict.fromkeys(filter(None, names)))


_PARAMETER = re.compile(r"\{(\w+)(?::[^}]*)?\}")

Usd = Annotated[str, Meta(pattern=r"\A-?[0-9]+\.[0-9]+\Z", description="an exact decimal string in USD")]
Text = Annotated[str, Meta(max_length=MAX_MESSAGE_CHARS)]


class Error(Struct):
    """An error. docs/errors.md lists the codes."""

    message: Text
    type: str
    param: Text | None
    code: str
    request_id: str
    details: list[Detail] = []
    retry_after_seconds: int = 0
    provider_code: Text = ""
    provider_error: dict[str, Any] = {}


class ErrorEnvelope(Struct):
    """The body of every error."""

    error: Error
    request_id: str


def _shape(
    title: str,
    doc: str,
    /,
    *,
    texts: str = "",
    nullable: str = "",
    absent: str = "",
    amounts: str = "",
    counts: str = "",
    **fields: Any,
) -> Any:
    """Make the type of an object. The names of its fields are given by their type; those that are `absent` may be missing."""
    declared: dict[str, Any] = dict.fromkeys(texts.split(), str)
    declared |= dict.fromkeys(nullable.split(), str | None)
    declared |= dict.fromkeys(amounts.split(), Usd)
    declared |= dict.fromkeys(counts.split(), int) | fields
    missing = [(name, str | None, None) for name in absent.split()]
    return msgspec.defstruct(title, [*declared.items(), *missing], namespace={"__doc__": doc}, kw_only=True)


def _shown(record: type[Struct], *without: str) -> dict[str, Any]:
    """Return the fields of a record as it is shown: `without` some, and with amounts in USD (units.in_usd)."""
    amounts = {int: Usd, int | None: Usd | None}
    return {
        field.name.replace("_nusd", "_usd"): amounts[field.type] if field.name.endswith("_nusd") else field.type
        for field in structs.fields(record)
        if field.name not in without
    }


def _listed(kind: Any) -> Any:
    return GenericAlias(list, kind)


Budgets = _shape("Budgets", "The most that may be spent; null: no budget.", **_shown(principal.Budgets))
Spend = _shape("Spend", "The amounts spent.", **_shown(records.Spend))
Limits = _shape("Limits", "The most that is allowed; null: no limit.", **_shown(principal.Limits))
Limit = _shape(
    "Limit",
    "One limit and its state; that of parallel requests has no period and no reset.",
    scope=records.Scope,
    kind=Literal["requests", "tokens", "parallel"],
    counts="limit remaining",
    per=records.Period | None,
    nullable="reset",
)
Model = _shape(
    "Model",
    "A model that this key may use.",
    texts="id object owned_by name brand provider model_type",
    counts="created context_window context_length max_output_tokens",
    is_free=bool,
    supports_completions_api=bool,
    pricing=dict[str, str],
)
UsageRow = _shape(
    "UsageRow", "The sums of one group.", absent=" ".join(GROUPS), **_shown(usage_report.UsageRow, *GROUPS)
)
UsageEvent = _shape(
    "UsageEvent",
    "What one request used and cost.",
    texts="started_at settled_at",
    **_shown(usage_report.UsageEvent, "upstream", "upstream_status", "hold", "price", "started_ms", "settled_ms"),
)
_BOUNDS: dict[str, Any] = {"status": str, "limits": Limits, "budgets": Budgets}
_KEY: dict[str, Any] = {
    **_BOUNDS,
    "texts": "id account name hint created_at",
    "models": list[str] | None,
    "params": dict[str, Any],
    "clamp": bool | None,
    "session_budgets": Budgets,
}
_CREDIT = "balance_usd held_usd available_usd granted_usd settled_usd"
# What operations answer with, by the name that a `Route` has for it.
_SHAPES = (
    ErrorEnvelope,
    _shape("Completion", "A provider's answer, unchanged.", choices=list[dict[str, Any]]),
    Model,
    _shape("Models", "All models that this key may use.", texts="object", data=_listed(Model)),
    _shape("ModelsPage", "One page of a search.", items=_listed(Model), brands=list[str], counts="total limit offset"),
    _shape(
        "Template",
        "A stored prompt template.",
        texts="id name owner created_at updated_at",
        nullable="description system model",
        is_global=bool,
        messages=list[dict[str, Any]] | None,
        params=dict[str, Any],
        variables=list[str],
    ),
    _shape("Usage", "The account's usage.", texts="object account since until", data=_listed(UsageRow)),
    UsageEvent,
    _shape("UsageEvents", "Several settled requests.", texts="object", events=_listed(UsageEvent)),
    _shape("Balance", "The account's credit.", amounts="balance_usd reserved_usd available_usd"),
    _shape(
        "Key",
        "The calling key.",
        texts="id object account",
        nullable="name default_model expires_at",
        amounts="balance_usd held_usd available_usd",
        limits=_listed(Limit),
        budgets=Budgets,
        spend=Spend,
        models=list[str] | None,
    ),
    _shape("SpentKey", "A key and its use.", **_KEY, nullable="expires_at default_model last_used_at", spend=Spend),
    _shape("ChangedKey", "A key.", **_KEY, nullable="expires_at default_model"),
    _shape(
        "NewSecret",
        "A key with its secret.",
        **_KEY,
        nullable="expires_at default_model",
        key=str,
        absent="old_key_works_until",
    ),
    _shape("Account", "An account.", account=str, amounts=_CREDIT, **_BOUNDS, spend=Spend),
    _shape("OneAccount", "One account.", account=str, amounts=_CREDIT, **_BOUNDS, spend=Spend, counts="running keys"),
    _shape("AccountBounds", "What an account may do.", account=str, **_BOUNDS),
    _shape("DeletedAccount", "What was deleted.", account=str, deleted=bool, records=int),
    _shape("Granted", "The credit after a grant.", account=str, amounts=f"{_CREDIT} granted_now_usd"),
    _shape("Grant", "A grant.", amounts="amount_usd balance_usd", texts="note ref actor granted_at"),
    _shape(
        "AccountUsage",
        "The sums of one group of one account.",
        account=str,
        absent=" ".join(GROUPS),
        **_shown(usage_report.UsageRow, *GROUPS),
    ),
    _shape(
        "Request",
        "What one request used and cost.",
        texts="started_at settled_at",
        **{**_shown(usage_report.UsageEvent, "started_ms", "settled_ms"), "price": dict[str, Any], "duration_ms": int},
    ),
    _shape("Change", "A change, and who made it.", texts="at actor action target account", detail=dict[str, Any]),
    _shape("DeletedTemplate", "What was deleted.", texts="id name", deleted=bool),
    _shape("Document", "An OpenAPI document.", openapi=str),
)


def describe(
    title: str,
    routes: Sequence[Route],
    refusals: Sequence[int],
    security: Mapping[str, Mapping[str, str]],
    *,
    bodies: Mapping[str, Mapping[str, Any]] = {},
    links: Mapping[str, Mapping[str, tuple[str, str]]] = {},
) -> dict[str, Any]:
    """Build an API's document.

    `refusals`: the statuses of errors. `security`: one scheme, by its name. `bodies`: types of the fields of further bodies, by
    the body's name. `links`: by operation, the operations that take what its answer has, each with the answer's field and the
    path's parameter.
    """
    bodies = {**bodies, "TemplateRequest": template.FIELDS}
    named = {route.response.strip("[]") for route in routes}
    shapes = [kind for kind in _SHAPES if kind is ErrorEnvelope or kind.__name__ in named]
    structs = [*shapes, *(route.body for route in routes if isinstance(route.body, type))]
    schemas, components = msgspec.json.schema_components(
        [*structs, *(kind for fields in bodies.values() for kind in fields.values())],
        schema_hook=_schema_of,
        ref_template="#/components/schemas/{name}",
    )
    of_fields = iter(schemas[len(structs) :])
    for name, fields in bodies.items():
        components[name] = {"type": "object", "properties": {field: next(of_fields) for field in fields}}
    change = {**components["TemplateRequest"], "additionalProperties": False}
    components |= {"TemplateChange": change, "TemplateRequest": {**change, "required": ["name"]}}
    paths: dict[str, Any] = {}
    for route in routes:
        operation = _operation(route, refusals, links.get(route.name, {}))
        paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": VERSION},
        "paths": paths,
        "security": [{name: []} for name in security],
        "components": {"schemas": _in_ecma(components), "securitySchemes": security},
    }


def _in_ecma(schemas: dict[str, Any]) -> Any:
    """Return schemas with the anchors of ECMA-262 in their patterns (JSON Schema 2020-12, section 6.4)."""
    return orjson.loads(orjson.dumps(schemas).replace(rb"\\A", b"^").replace(rb"\\Z", b"$"))


def _content(name: str) -> dict[str, Any]:
    """Describe a body by the name of its schema, in brackets for a list; nothing for no name."""
    schema: dict[str, Any] = {"$ref": f"#/components/schemas/{name.strip('[]')}"}
    if name.startswith("["):
        schema = {"type": "array", "items": schema}
    return {"content": {"application/json": {"schema": schema}}} if name else {}


def _operation(route: Route, refusals: Sequence[int], links: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Describe one operation."""
    success: dict[str, Any] = {"description": "Success", **_content(route.response)}
    if links:
        success["links"] = {
            name: {"operationId": name, "parameters": {f"path.{parameter}": f"$response.body#/{field}"}}
            for name, (field, parameter) in links.items()
        }
    refusal = {"description": "An error", **_content("ErrorEnvelope")}
    summary = (route.handler.__doc__ or "").strip().splitlines()[0]
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(route.path)
    ]
    parameters += (
        {"name": name, "in": "query", "schema": schema, "style": "form", "explode": name == "brand"}
        for name, schema in route.query.items()
    )
    body = route.body if isinstance(route.body, str | None) else route.body.__name__
    return {
        "summary": summary.partition(": ")[2] or summary,
        "operationId": route.name,
        "parameters": parameters,
        "responses": {str(status): success for status in route.statuses}
        | {str(status): refusal for status in refusals},
        **({"requestBody": {"required": route.needs_body, **_content(body)}} if body is not None else {}),
    }
