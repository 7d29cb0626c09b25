"""`GET /openapi.json`: this API as an OpenAPI 3.1 document, generated from the types that requests are decoded by.

A provider's answer is OpenAI's format, so it is described only as far as the gateway reads it.
"""

import re
from typing import Annotated, Any

import msgspec
import orjson
from aiohttp import web
from msgspec import Meta, Struct

from meshproxy.errors import Detail
from meshproxy.ledger.usage_report import GROUPS, MAX_EVENTS
from meshproxy.openai.errors import MAX_MESSAGE_CHARS
from meshproxy.openai.request import FIELDS
from meshproxy.policy import template
from meshproxy.server.api import MAX_OFFSET, MAX_PAGE, ROUTES, Api
from meshproxy.server.chat import CHAT_PATH
from meshproxy.version import VERSION

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


class Completion(Struct):
    """A provider's answer, unchanged."""

    choices: list[dict[str, Any]]


class Model(Struct):
    """A model that this key may use."""

    id: str
    object: str
    created: int
    owned_by: str
    name: str
    brand: str
    provider: str
    model_type: str
    context_window: int
    context_length: int
    max_output_tokens: int
    is_free: bool
    supports_completions_api: bool
    pricing: dict[str, str]


class Models(Struct):
    """All models that this key may use."""

    object: str
    data: list[Model]


class ModelsPage(Struct):
    """One page of a search."""

    items: list[Model]
    total: int
    limit: int
    offset: int
    brands: list[str]


class Balance(Struct):
    """The account's credit."""

    balance_usd: Usd
    reserved_usd: Usd
    available_usd: Usd


class Template(Struct):
    """A stored prompt template."""

    id: str
    name: str
    owner: str
    is_global: bool
    description: str | None
    system: str | None
    messages: list[dict[str, Any]] | None
    model: str | None
    params: dict[str, Any]
    variables: list[str]
    created_at: str
    updated_at: str


class UsageRow(Struct):
    """The sums of one group."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    audio_prompt_tokens: int
    audio_completion_tokens: int
    cost_usd: Usd
    session_id: str | None = None
    model: str | None = None
    key: str | None = None
    day: str | None = None


class Usage(Struct):
    """The account's usage."""

    object: str
    account: str
    since: str
    until: str
    data: list[UsageRow]


class UsageEvent(Struct):
    """What one request used and cost."""

    request_id: str
    account: str
    key_id: str
    session_id: str | None
    model: str
    attempts: int
    outcome: str
    usage_source: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    audio_prompt_tokens: int
    audio_completion_tokens: int
    cost_usd: Usd
    started_at: str
    settled_at: str


class UsageEvents(Struct):
    """Several settled requests."""

    object: str
    events: list[UsageEvent]


class Limit(Struct):
    """One rate limit and its state."""

    scope: str
    kind: str
    per: str
    limit: int
    remaining: int
    reset: str


class Budgets(Struct):
    """The most that may be spent; null: no budget."""

    total_usd: Usd | None
    daily_usd: Usd | None
    monthly_usd: Usd | None


class Spend(Struct):
    """The amounts spent."""

    day_usd: Usd
    month_usd: Usd
    total_usd: Usd


class Key(Struct):
    """The calling key."""

    id: str
    object: str
    name: str | None
    account: str
    balance_usd: Usd
    held_usd: Usd
    available_usd: Usd
    limits: list[Limit]
    budgets: Budgets
    spend: Spend
    default_model: str | None
    models: list[str] | None
    expires_at: str | None


ANSWERS: dict[Any, tuple[int, Any]] = {
    Api.models: (200, Models),
    Api.free_models: (200, Models),
    Api.paid_models: (200, Models),
    Api.search_models: (200, ModelsPage),
    Api.model: (200, Model),
    Api.templates: (200, list[Template]),
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
REFUSALS = (400, 401, 402, 403, 404, 405, 408, 409, 413, 415, 422, 429, 500, 502, 503, 504)


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
    schemas_json = orjson.dumps({**components, **requests})
    return {
        "openapi": "3.1.0",
        "info": {"title": "meshproxy", "version": VERSION},
        "paths": _paths(shapes),
        "security": [{"key": []}],
        "components": {  # with the anchors of ECMA-262 in its patterns (JSON Schema 2020-12, section 6.4)
            "schemas": orjson.loads(schemas_json.replace(rb"\\A", b"^").replace(rb"\\Z", b"$")),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "bearerFormat": "rsk_..."}},
        },
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
    refusals = {str(status): {"description": "An error", "content": error} for status in REFUSALS}
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
            "parameters": _parameters(path, function),
            "responses": {str(status): {"description": "Success", **content}, **refusals},
        }
        if method in {"POST", "PATCH"}:
            operation["requestBody"] = _body(_BODIES[function])
        paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})[method.lower()] = operation
    return paths


_TEXT: dict[str, Any] = {"type": "string"}
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
        "limit": {"type": "integer", "minimum": 0, "maximum": MAX_PAGE},
        "offset": {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET},
    },
    Api.usage: {
        "group_by": {"type": "array", "items": {"enum": list(GROUPS)}},
        "session_id": _TEXT,
        "since": _MOMENT,
        "until": _MOMENT,
    },
}


def _parameters(path: str, function: Any) -> list[dict[str, Any]]:
    """Describe a path's parameters and those of its query."""
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(path)
    ]
    in_query = [
        {"name": name, "in": "query", "schema": schema, "style": "form", "explode": name == "brand"}
        for name, schema in _QUERIES.get(function, {}).items()
    ]
    return in_path + in_query


def _body(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _summary(function: Any) -> str:
    """Return the first line of a handler's docstring, without its path."""
    first = (function.__doc__ or "").strip().splitlines()[0]
    return first.partition(": ")[2] or first
