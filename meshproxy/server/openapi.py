"""Both APIs as OpenAPI 3.1 documents, generated from the types that requests are decoded by and from the records shown.

`document` describes the data listener's API (`GET /openapi.json`), `admin_document` the admin API. A provider's answer is
OpenAI's format, so it is described only as far as the gateway reads it.
"""

import re
from collections.abc import Iterable
from types import GenericAlias
from typing import Annotated, Any, Literal

import msgspec
import orjson
from aiohttp import web
from msgspec import Meta, Struct, structs

from meshproxy import VERSION
from meshproxy.errors import Detail
from meshproxy.ledger import records, usage_report
from meshproxy.ledger.directory import ACCOUNT_NAME
from meshproxy.ledger.usage_report import GROUPS, MAX_EVENTS
from meshproxy.openai.errors import MAX_MESSAGE_CHARS
from meshproxy.openai.request import CHAT_PATH, FIELDS
from meshproxy.policy import principal, template
from meshproxy.server import admin_api
from meshproxy.server.admin_api import AdminApi
from meshproxy.server.api import MAX_OFFSET, MAX_PAGE, ROUTES, Api

PATH = "/openapi.json"

Usd = Annotated[str, Meta(pattern=r"\A-?[0-9]+\.[0-9]+\Z", description="an exact decimal string in USD")]
Text = Annotated[str, Meta(max_length=MAX_MESSAGE_CHARS)]
_PARAMETER = re.compile(r"\{(\w+)(?::[^}]*)?\}")


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


def _struct(title: str, doc: str, /, **fields: Any) -> Any:
    """Make the type of an object whose fields are required, except those with None as a value: they may be missing."""
    declared = [(field, kind) if kind is not None else (field, str | None, None) for field, kind in fields.items()]
    return msgspec.defstruct(title, declared, namespace={"__doc__": doc})


def _shown(record: type[Struct], *without: str) -> dict[str, Any]:
    """Return the fields of a record as it is shown: `without` some, and with amounts in USD (money.in_usd)."""
    fields = {field.name: field.type for field in structs.fields(record) if field.name not in without}
    amounts = {int: Usd, int | None: Usd | None}
    return {
        name.replace("_nusd", "_usd"): amounts[kind] if name.endswith("_nusd") else kind
        for name, kind in fields.items()
    }


# Fields of an event that no client sees.
_INTERNAL = ("upstream", "upstream_status", "hold", "price", "started_ms", "settled_ms")

Model = _struct(
    "Model",
    "A model that this key may use.",
    **dict.fromkeys(("id", "object", "owned_by", "name", "brand", "provider", "model_type"), str),
    **dict.fromkeys(("created", "context_window", "context_length", "max_output_tokens"), int),
    **dict.fromkeys(("is_free", "supports_completions_api"), bool),
    pricing=dict[str, str],
)
Template = _struct(
    "Template",
    "A stored prompt template.",
    **dict.fromkeys(("id", "name", "owner", "created_at", "updated_at"), str),
    **dict.fromkeys(("description", "system", "model"), str | None),
    is_global=bool,
    messages=list[dict[str, Any]] | None,
    params=dict[str, Any],
    variables=list[str],
)
Completion = _struct("Completion", "A provider's answer, unchanged.", choices=list[dict[str, Any]])
Models = _struct("Models", "All models that this key may use.", object=str, data=GenericAlias(list, Model))
_COUNTS = dict.fromkeys(("total", "limit", "offset"), int)
ModelsPage = _struct(
    "ModelsPage", "One page of a search.", items=GenericAlias(list, Model), brands=list[str], **_COUNTS
)
Balance = _struct("Balance", "The account's credit.", balance_usd=Usd, reserved_usd=Usd, available_usd=Usd)
UsageRow = _struct(
    "UsageRow", "The sums of one group.", **_shown(usage_report.UsageRow, *GROUPS), **dict.fromkeys(GROUPS)
)
Usage = _struct(
    "Usage", "The account's usage.", object=str, account=str, since=str, until=str, data=GenericAlias(list, UsageRow)
)
UsageEvent = _struct(
    "UsageEvent",
    "What one request used and cost.",
    **_shown(usage_report.UsageEvent, *_INTERNAL),
    started_at=str,
    settled_at=str,
)
UsageEvents = _struct("UsageEvents", "Several settled requests.", object=str, events=GenericAlias(list, UsageEvent))
Limit = _struct(
    "Limit",
    "One limit and its state; that of parallel requests has no period and no reset.",
    scope=records.Scope,
    kind=Literal["requests", "tokens", "parallel"],
    limit=int,
    remaining=int,
    per=records.Period | None,
    reset=str | None,
)
Budgets = _struct("Budgets", "The most that may be spent; null: no budget.", **_shown(principal.Budgets))
Spend = _struct("Spend", "The amounts spent.", **_shown(records.Spend))
Key = _struct(
    "Key",
    "The calling key.",
    id=str,
    object=str,
    name=str | None,
    account=str,
    balance_usd=Usd,
    held_usd=Usd,
    available_usd=Usd,
    limits=GenericAlias(list, Limit),
    budgets=Budgets,
    spend=Spend,
    default_model=str | None,
    models=list[str] | None,
    expires_at=str | None,
)


ANSWERS: dict[Any, tuple[int, Any]] = {
    Api.models: (200, Models),
    Api.free_models: (200, Models),
    Api.paid_models: (200, Models),
    Api.search_models: (200, ModelsPage),
    Api.model: (200, Model),
    Api.templates: (200, GenericAlias(list, Template)),
    Api.create_template: (201, Template),
    Api.template: (200, Template),
    Api.change_template: (200, Template),
    Api.delete_template: (204, None),
    Api.usage: (200, Usage),
    Api.event: (200, UsageEvent),
    Api.events: (200, UsageEvents),
    Api.key: (200, Key),
    Api.balance: (200, Balance),
}
_BODIES: dict[Any, str] = {
    Api.create_template: "TemplateRequest",
    Api.change_template: "TemplateChange",
    Api.events: "EventsRequest",
}
REFUSALS = (400, 401, 402, 403, 404, 405, 408, 409, 413, 415, 422, 429, 431, 500, 502, 503, 504)


def document() -> dict[str, Any]:
    """Build the document."""
    answers = [Completion, ErrorEnvelope, *(kind for _, kind in ANSWERS.values() if kind is not None)]
    of_chat = {name: kind if name == "messages" else kind | None for name, kind in FIELDS.items()}  # null: absent
    kinds = [*answers, *of_chat.values(), *template.FIELDS.values()]
    found, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas = iter(found)
    shapes = {str(kind): next(schemas) for kind in answers}
    of_chat, of_template = ({name: next(schemas) for name in fields} for fields in (of_chat, template.FIELDS))
    change = {"type": "object", "properties": of_template, "additionalProperties": False}
    requests = {
        "ChatRequest": {"type": "object", "properties": of_chat},
        "TemplateRequest": {**change, "required": ["name"]},
        "TemplateChange": change,
        "EventsRequest": {
            "type": "object",
            "properties": {
                "request_ids": {"type": ["array", "null"], "items": {"type": "string"}, "maxItems": MAX_EVENTS},
                "since": {"type": ["string", "null"], "format": "date-time"},
                "limit": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_EVENTS},
            },
        },
    }
    key = {"type": "http", "scheme": "bearer", "bearerFormat": "rsk_..."}
    return _document("meshproxy", _paths(shapes), _in_ecma({**components, **requests}), {"key": key})


def _in_ecma(schemas: dict[str, Any]) -> Any:
    """Return schemas with the anchors of ECMA-262 in their patterns (JSON Schema 2020-12, section 6.4)."""
    return orjson.loads(orjson.dumps(schemas).replace(rb"\\A", b"^").replace(rb"\\Z", b"$"))


def _document(title: str, paths: dict[str, Any], schemas: Any, security: dict[str, Any]) -> dict[str, Any]:
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": VERSION},
        "paths": paths,
        "security": [{name: []} for name in security],
        "components": {"schemas": schemas, "securitySchemes": security},
    }


def handler() -> Any:
    """Make the handler of `PATH`. It requires no key: the document contains only what is documented publicly."""
    body = orjson.dumps(document())

    async def openapi(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    return openapi


def _paths(shapes: dict[str, Any]) -> dict[str, Any]:
    """Describe every path of the data listener."""
    error = {"application/json": {"schema": shapes[str(ErrorEnvelope)]}}
    refusals = _responses(REFUSALS, "An error", error)
    completion = {
        "application/json": {"schema": shapes[str(Completion)]},
        "text/event-stream": {"schema": {"type": "string"}},
    }
    paths: dict[str, Any] = {
        CHAT_PATH: {
            "post": {
                "summary": "A chat completion, whole or as a stream",
                "operationId": "chat",
                "requestBody": _body("ChatRequest"),
                "responses": {"200": {"description": "The completion", "content": completion}, **refusals},
            }
        }
    }
    for method, path, function in ROUTES:
        status, kind = ANSWERS[function]
        content = {} if kind is None else {"content": {"application/json": {"schema": shapes[str(kind)]}}}
        operation = {
            "summary": _summary(function),
            "operationId": function.__name__,
            "parameters": _parameters(path, _QUERIES.get(function, {})),
            "responses": {str(status): {"description": "Success", **content}, **refusals},
        }
        if method in {"POST", "PATCH"}:
            operation["requestBody"] = _body(_BODIES[function])
        paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})[method.lower()] = operation
    return paths


_TEXT: dict[str, Any] = {"type": "string"}


def _number(most: int, least: int = 1) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


_MOMENT: dict[str, Any] = {"type": "string", "format": "date-time"}
_FREE: dict[str, Any] = {"enum": ["true", "false", "1", "0", ""]}
_QUERIES: dict[Any, dict[str, dict[str, Any]]] = {
    Api.models: {"free": _FREE, "provider": _TEXT},
    Api.free_models: {"provider": _TEXT},
    Api.paid_models: {"provider": _TEXT},
    Api.search_models: {
        "q": _TEXT,
        "free": _FREE,
        "brand": {"type": "array", "items": _TEXT},
        "sort": {"enum": ["id", "name", "brand", "context_length"]},
        "order": {"enum": ["asc", "desc"]},
        "limit": _number(MAX_PAGE, least=0),
        "offset": _number(MAX_OFFSET, least=0),
    },
    Api.usage: {
        "group_by": {"type": "array", "items": {"enum": list(GROUPS)}},
        "session_id": _TEXT,
        "since": _MOMENT,
        "until": _MOMENT,
    },
}


def _parameters(path: str, query: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Describe a path's parameters and those of its query, whose schemas are given by name."""
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(path)
    ]
    in_query = [
        {"name": name, "in": "query", "schema": schema, "style": "form", "explode": name == "brand"}
        for name, schema in query.items()
    ]
    return in_path + in_query


def _responses(statuses: Iterable[int], description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {str(status): {"description": description, "content": content} for status in statuses}


def _body(name: str, *, required: bool = True) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"required": required, "content": {"application/json": {"schema": schema}}}


def _summary(function: Any) -> str:
    """Return the first line of a handler's docstring, without its path."""
    first = (function.__doc__ or "").strip().splitlines()[0]
    return first.partition(": ")[2] or first


_KEY: dict[str, Any] = {
    **dict.fromkeys(("id", "account", "name", "hint", "status", "created_at"), str),
    **dict.fromkeys(("expires_at", "default_model"), str | None),
    "models": list[str] | None,
    "params": dict[str, Any],
    "clamp": bool | None,
    "limits": _struct("Limits", "The most that is allowed; null: no limit.", **_shown(principal.Limits)),
    "budgets": Budgets,
    "session_budgets": Budgets,
}
_CREDIT: dict[str, Any] = {
    "account": str,
    **dict.fromkeys(("balance_usd", "held_usd", "available_usd", "granted_usd", "settled_usd"), Usd),
}
_BOUNDS = {"status": str, "limits": _KEY["limits"], "budgets": Budgets}
_SPENT_KEY = _struct("SpentKey", "A key and its use.", **_KEY, spend=Spend, last_used_at=str | None)
_CHANGED_KEY = _struct("ChangedKey", "A key.", **_KEY)
_NEW_SECRET = _struct("NewSecret", "A key with its secret.", key=str, **_KEY, old_key_works_until=None)
_ACCOUNT = _struct("Account", "An account.", **_CREDIT, **_BOUNDS, spend=Spend)
_GRANT = {"amount_usd": Usd, "balance_usd": Usd, **dict.fromkeys(("note", "ref", "actor", "granted_at"), str)}
_AUDIT = {**dict.fromkeys(("at", "actor", "action", "target", "account"), str), "detail": dict[str, Any]}
_ADMIN_USAGE = {"account": str, **_shown(usage_report.UsageRow, *GROUPS), **dict.fromkeys(GROUPS)}
_ADMIN_EVENT: dict[str, Any] = {
    **_shown(usage_report.UsageEvent, "price", "started_ms", "settled_ms"),
    "price": dict[str, Any],
    "started_at": str,
    "settled_at": str,
    "duration_ms": int,
}


def _list(title: str, doc: str, fields: dict[str, Any]) -> Any:
    return GenericAlias(list, _struct(title, doc, **fields))


ADMIN_ANSWERS: dict[Any, Any] = {
    AdminApi.keys: GenericAlias(list, _SPENT_KEY),
    AdminApi.create_key: _NEW_SECRET,
    AdminApi.key: _SPENT_KEY,
    AdminApi.change_key: _CHANGED_KEY,
    AdminApi.revoke_key: _CHANGED_KEY,
    AdminApi.rotate_key: _NEW_SECRET,
    AdminApi.accounts: GenericAlias(list, _ACCOUNT),
    AdminApi.account: _struct("OneAccount", "One account.", **_CREDIT, **_BOUNDS, spend=Spend, running=int, keys=int),
    AdminApi.change_account: _struct("AccountBounds", "What an account may do.", account=str, **_BOUNDS),
    AdminApi.delete_account: _struct("DeletedAccount", "What was deleted.", account=str, deleted=bool, records=int),
    AdminApi.grants: _list("Grant", "A grant.", _GRANT),
    AdminApi.grant: _struct("Granted", "The credit after a grant.", **_CREDIT, granted_now_usd=Usd),
    AdminApi.usage: _list("AccountUsage", "The sums of one group of one account.", _ADMIN_USAGE),
    AdminApi.request: _struct("Request", "What one request used and cost.", **_ADMIN_EVENT),
    AdminApi.audit: _list("Change", "A change, and who made it.", _AUDIT),
    AdminApi.templates: GenericAlias(list, Template),
    AdminApi.put_template: Template,
    AdminApi.template: Template,
    AdminApi.delete_template: _struct("DeletedTemplate", "What was deleted.", id=str, name=str, deleted=bool),
    AdminApi.openapi: dict[str, Any],
}
_ADMIN_STATUSES = {AdminApi.create_key: (201,), AdminApi.put_template: (201,), AdminApi.grant: (200, 201)}
_NAME: dict[str, Any] = {"type": "string", "pattern": f"^{ACCOUNT_NAME}$"}
_TIME = {"anyOf": [_MOMENT, {"type": "string", "pattern": "^[0-9]{1,4}[smhdw]$"}]}
_ACCOUNT_QUERY = {"account": _NAME}
_ADMIN_QUERIES: dict[Any, dict[str, dict[str, Any]]] = {
    AdminApi.keys: {**_ACCOUNT_QUERY, "limit": _number(admin_api.MAX_PAGE), "after": _TEXT},
    AdminApi.accounts: {"limit": _number(admin_api.MAX_PAGE), "after": _TEXT},
    AdminApi.usage: {
        **_ACCOUNT_QUERY,
        "group_by": {"type": "array", "items": {"enum": [*GROUPS, "session"]}},
        "session_id": _TEXT,
        "since": _TIME,
        "until": _TIME,
    },
    AdminApi.audit: {"limit": _number(admin_api.MAX_AUDIT)},
    AdminApi.templates: _ACCOUNT_QUERY,
    AdminApi.put_template: _ACCOUNT_QUERY,
    AdminApi.template: _ACCOUNT_QUERY,
    AdminApi.delete_template: _ACCOUNT_QUERY,
}
# Operations that take what an answer has: from the operation, the field of its answer, and the path's parameter.
_ADMIN_LINKS = {
    AdminApi.create_key: (
        *((function, "id", "id") for function in (AdminApi.key, AdminApi.change_key, AdminApi.rotate_key)),
        *((function, "account", "name") for function in (AdminApi.account, AdminApi.change_account, AdminApi.grant)),
    ),
    AdminApi.grant: tuple((function, "account", "name") for function in (AdminApi.grants, AdminApi.delete_account)),
    AdminApi.rotate_key: ((AdminApi.revoke_key, "id", "id"),),
    AdminApi.put_template: tuple(
        (function, "id", "name") for function in (AdminApi.template, AdminApi.delete_template)
    ),
}
ADMIN_REFUSALS = (400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 431, 500, 503)


def admin_document() -> dict[str, Any]:
    """Build the admin API's document, from the types that its handlers decode and from the records that they show."""
    requests = [kind for *_, kind in admin_api.ROUTES if kind is not None]
    answers = [ErrorEnvelope, *ADMIN_ANSWERS.values()]
    kinds = [*answers, *template.FIELDS.values(), *requests]
    found, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas = iter(found)
    shapes = {str(kind): next(schemas) for kind in answers}
    of_template = {name: next(schemas) for name in template.FIELDS}
    body = {"type": "object", "properties": of_template, "additionalProperties": False, "required": ["name"]}
    paths: dict[str, Any] = {}
    for method, path, function, kind in admin_api.ROUTES:
        paths.setdefault(path, {})[method.lower()] = _admin_operation(path, function, kind, shapes)
    token = {"token": {"type": "http", "scheme": "bearer"}}
    return _document("meshproxy admin", paths, _in_ecma({**components, "TemplateRequest": body}), token)


def _admin_operation(path: str, function: Any, kind: type[Struct] | None, shapes: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"application/json": {"schema": shapes[str(ADMIN_ANSWERS[function])]}}
    refusal = {"application/json": {"schema": shapes[str(ErrorEnvelope)]}}
    success: dict[str, Any] = {"description": "Success", "content": answer}
    if function in _ADMIN_LINKS:
        success["links"] = {
            to.__name__: {"operationId": to.__name__, "parameters": {f"path.{name}": f"$response.body#/{field}"}}
            for to, field, name in _ADMIN_LINKS[function]
        }
    operation: dict[str, Any] = {
        "summary": _summary(function),
        "operationId": function.__name__,
        "parameters": _parameters(path, _ADMIN_QUERIES.get(function, {})),
        "responses": {
            **{str(status): success for status in _ADMIN_STATUSES.get(function, (200,))},
            **_responses(ADMIN_REFUSALS, "An error", refusal),
        },
    }
    if kind is not None:
        operation["requestBody"] = _body(kind.__name__, required=kind is not admin_api.Rotation)
    elif function is AdminApi.put_template:
        operation["requestBody"] = _body("TemplateRequest")
    return operation
