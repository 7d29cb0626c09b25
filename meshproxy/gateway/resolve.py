"""Resolve: turn the client's request into a plan: template, model, parameters, candidates and sizes."""

import asyncio
from collections.abc import Sequence

import msgspec
import orjson
from msgspec import Struct
from msgspec.structs import replace

from meshproxy.config import Credits
from meshproxy.errors import ErrorResponse, GatewayError, Source, forbidden, invalid, template_not_found
from meshproxy.gateway.entry import LARGE_BYTES, SMALL_BYTES
from meshproxy.gateway.exchange import ActiveConfig
from meshproxy.ledger.directory import Directory
from meshproxy.openai.output import hides_reasoning
from meshproxy.openai.request import (
    MAX_TOKENS,
    STEERING,
    ChatRequest,
    decode_chat,
    encode_upstream,
    members_of,
    request_of,
    with_params,
)
from meshproxy.policy.catalog import Candidate, large_enough, with_fees
from meshproxy.policy.pricing import Price, affordable_output, hold_amount
from meshproxy.policy.principal import Principal
from meshproxy.policy.template import Template, measure, merge_params, render
from meshproxy.policy.tokens import BYTES_PER_TOKEN, estimate_prompt, least_tokens, likely_tokens, middle_out, weigh

PAUSE_S_PER_BYTE = 1e-9  # 1 ms a megabyte: 33 ms for the largest body by default


class Prompt:
    """The messages of a request: a template's, then the caller's own bytes.

    A template is measured here, but rendered only when an attempt needs it: a request that isn't admitted builds
    nothing large. `count` is the number of messages, `tokens` their estimate, `template_bytes` the size of the
    template's part as JSON.
    """

    __slots__ = ("_fitted", "_messages", "_request", "_template", "count", "template_bytes", "tokens")

    def __init__(self, request: ChatRequest, template: Template | None, limit_bytes: int) -> None:
        """Measure the messages.

        Raises the client's GatewayError: 413 if the rendered template and the caller's messages exceed `limit_bytes`,
        422 if the template lacks a variable or there are no messages at all.
        """
        self._request = request
        self._template = template
        self._messages = request.messages if template is None else None
        self._fitted: dict[int, bytes] = {}
        self.count = request.message_count
        self.template_bytes = 0
        own = request.messages or b""
        self.tokens = estimate_prompt(own, (), self.count, media=not request.text_only)
        if template is not None:
            self._measure(template, limit_bytes - len(own))
        if not self.count:
            supplier = "The template supplies no messages, so" if template is not None else "Without a template"
            raise GatewayError(Source.CLIENT, invalid(f"{supplier} `messages` is required.", param="messages"))

    def _measure(self, template: Template, limit_bytes: int) -> None:
        plain, longer_bytes = measure(template, self._request.variables)
        self.template_bytes = len(plain) + longer_bytes
        if self.template_bytes > limit_bytes:
            message = f"The template `{template.name}` with these variables makes a prompt larger than the limit."
            raise GatewayError(Source.CLIENT, ErrorResponse(413, "request_too_large", message, "variables"))
        self.count += template.message_count
        self.tokens += estimate_prompt(plain, (), template.message_count) + max(longer_bytes, 0) // BYTES_PER_TOKEN

    @property
    def messages(self) -> bytes:
        """The array of messages as JSON. A template is rendered once."""
        if self._messages is None:
            self._messages = self._rendered()
        return self._messages

    @property
    def size(self) -> int:
        """The bytes of the array as JSON, rendered or not."""
        return len(self._request.messages or b"") + self.template_bytes

    def fitted(self, budget_tokens: int) -> bytes:
        """Return the messages after middle-out, or unchanged where they fit. Computed once for each budget."""
        if self.tokens <= budget_tokens:
            return self.messages
        if budget_tokens not in self._fitted:
            self._fitted[budget_tokens] = _fit(self.messages, budget_tokens)
        return self._fitted[budget_tokens]

    def _rendered(self) -> bytes:
        own = self._request.messages
        rendered = b"[]" if self._template is None else orjson.dumps(render(self._template, self._request.variables))
        if rendered == b"[]":
            return own or rendered
        return rendered if own is None else rendered[:-1] + b"," + own.lstrip()[1:]


class Plan(Struct, frozen=True):
    """A resolved request. `prompt_tokens` is an estimate.

    `prices` are those of each candidate that may serve. `output_cap` is the most that one choice is expected to have,
    which token buckets reserve; `output_limit` is the most it can have; `output_tokens` and `output_bound` are the same
    for all choices together. `imposed_cap` is the cap sent to the provider in place of the request's, because credit is
    short (`clamped`). `holds_whole`: the billed output can't be counted while it streams, so all of it is held from the
    start. That is so for a whole answer, and for a stream with hidden reasoning.
    """

    request: ChatRequest
    model: str
    candidates: tuple[Candidate, ...]
    prompt: Prompt
    prompt_tokens: int
    prices: Sequence[Price]
    output_cap: int
    output_limit: int
    output_tokens: int
    output_bound: int
    imposed_cap: int | None = None
    clamped: bool = False
    holds_whole: bool = False

    def hold_nusd(self, output_tokens: int) -> int:
        """Return the most that the prompt and `output_tokens` can cost, in nano-USD, whichever candidate serves."""
        most_nusd = 0
        for price in self.prices:
            most_nusd = max(most_nusd, hold_amount(price, self.prompt_tokens, output_tokens))
        return most_nusd

    def likely_prompt_tokens(self) -> int:
        """Return the prompt tokens to bill where no provider reports them. Media is estimated as for the hold.

        The result is more accurate than the held estimate, and slower to compute.
        """
        messages, others = self.prompt.messages, others_of(self.request)
        if any(weigh(json).media_tokens for json in (messages, *others)):
            return self.prompt_tokens
        served = [served for candidate in self.candidates for served in (candidate, *candidate.natives)]
        return min(
            likely_tokens(messages, others, self.prompt.count), max(candidate.context_window for candidate in served)
        )

    def clamped_to(self, amount_nusd: int) -> "Plan":
        """Return the plan with no more output than `amount_nusd` can pay for, whichever candidate serves."""
        affordable = min(affordable_output(price, self.prompt_tokens, amount_nusd) for price in self.prices)
        cap = max(affordable // self.request.n, 1)
        return self if cap >= self.output_limit else self.capped_at(cap)

    def capped_at(self, cap: int) -> "Plan":
        """Return the plan with the gateway's own cap on each choice."""
        output_cap, n = min(self.output_cap, cap), self.request.n
        return replace(
            self,
            output_cap=output_cap,
            output_limit=cap,
            output_tokens=output_cap * n,
            output_bound=cap * n,
            imposed_cap=cap,
            clamped=True,
        )

    def is_slow_to_build(self, candidate: Candidate) -> bool:
        """Return whether `body_for` may take several milliseconds: for middle-out over much text, or a large template."""
        prompt = self.prompt
        is_cut = "middle-out" in self.request.transforms and candidate.kind != "openrouter"
        return prompt.template_bytes > LARGE_BYTES or (is_cut and prompt.size > SMALL_BYTES)

    def body_for(self, candidate: Candidate) -> bytes:
        """Return the JSON body to send to this candidate's provider."""
        native = candidate.kind == "openrouter"
        if "middle-out" in self.request.transforms and not native:
            room_tokens = candidate.context_window - min(self.output_cap, candidate.max_output_tokens)
            messages = self.prompt.fitted(room_tokens)
        else:
            messages = self.prompt.messages
        return encode_upstream(
            self.request,
            model=candidate.upstream_model,
            messages=messages,
            max_tokens=self.imposed_cap,
            cap_field=candidate.cap_field,
            stream_usage=candidate.stream_usage,
            native=native,
            models=candidate.native_models if candidate.natives else (),
        )


async def resolve(body: bytes, principal: Principal, active: ActiveConfig, directory: Directory, draw: float) -> Plan:
    """Return the plan for a request's body. Raises a GatewayError that says what is wrong with the request.

    `draw` is a random number in [0, 1) that decides among equal routes.
    """
    request = decode_chat(body) if len(body) <= LARGE_BYTES else await _decode_large(body)
    key, settings = principal.key, active.settings
    template = await _template(request.template, principal, directory) if request.template is not None else None
    model = request.model or key.default_model or (template and template.model) or settings.defaults.model
    candidates = active.catalog.candidates(model, request.models, draw=draw, allowed=key.models)
    for name in (model, *request.models) if key.models is not None else ():
        if not principal.may_use(name):
            raise GatewayError(Source.CLIENT, forbidden(f"This key may not use the model `{name[:128]}`.", "model"))
    if template is not None or key.params:
        params = merge_params(key.params, template.params if template is not None else None)
        request = with_params(request, params) if params else request
    candidates = with_fees(candidates, request.service_tier, request.fields)
    prompt = Prompt(request, template, settings.server.max_body_bytes)
    others = others_of(request) if not request.fields.keys() <= STEERING else []
    tokens = prompt.tokens + (estimate_prompt(b"", others, 0) if others else 0)
    if request.models and "middle-out" not in request.transforms:
        candidates = large_enough(candidates, least_tokens(request.messages or b""))
    return _plan(request, model, candidates, prompt, tokens, settings.credits)


def others_of(request: ChatRequest) -> list[bytes]:
    """Return the JSON of what counts towards the prompt beside the messages: tools, schemas, and every unknown field."""
    return [bytes(raw) for name, raw in request.fields.items() if name not in STEERING]


def _plan(
    request: ChatRequest, model: str, candidates: tuple[Candidate, ...], prompt: Prompt, tokens: int, credit: Credits
) -> Plan:
    """Compute a request's sizes.

    A request's cap may exceed a model's `max_output_tokens`, but not its context window. No prompt is billed for more
    than the window, since a larger one is refused. A provider may serve the standard service tier in place of the
    requested one, so both prices count.
    """
    largest = window = 0
    smallest, hidden, tier = MAX_TOKENS, False, request.service_tier
    prices: list[Price] = []
    for candidate in candidates:
        for served in (candidate, *candidate.natives):
            largest, window = max(largest, served.max_output_tokens), max(window, served.context_window)
            smallest, hidden = min(smallest, served.max_output_tokens), hidden or served.hidden_reasoning
            if served.price not in prices:
                prices.append(served.price)
            if tier is not None:
                prices.append(served.price_in(tier))
    if request.max_tokens is None:
        expected = min(credit.default_output_tokens, smallest)
        limit = largest
    else:
        expected = min(request.max_tokens, largest)
        limit = min(request.max_tokens, window)
    return Plan(
        request=request,
        model=model,
        candidates=candidates,
        prompt=prompt,
        prompt_tokens=min(tokens, window),
        prices=prices,
        output_cap=expected,
        output_limit=limit,
        output_tokens=expected * request.n,
        output_bound=limit * request.n,
        holds_whole=not request.stream or hidden or hides_reasoning(request.fields),
    )


async def _decode_large(body: bytes) -> ChatRequest:
    """Decode a large body in two steps with a pause around each.

    Another request needs several turns of the event loop (one for each answer of Redis, for example), and must not wait
    for a step in every one.
    """
    pause_s = len(body) * PAUSE_S_PER_BYTE
    await asyncio.sleep(pause_s)
    members = members_of(body)
    await asyncio.sleep(pause_s)
    request = request_of(members, body)
    await asyncio.sleep(pause_s)
    return request


async def _template(name: str, principal: Principal, directory: Directory) -> Template:
    """Return the named template. Raises the client's GatewayError 404 if there is none."""
    template = await directory.templates.find(principal.account.name, name)
    if template is None:
        raise GatewayError(Source.CLIENT, template_not_found(name))
    return template


def _fit(messages: bytes, budget_tokens: int) -> bytes:
    """Return the messages after middle-out."""
    try:
        return msgspec.json.encode(middle_out(msgspec.json.decode(messages), budget_tokens))
    except (msgspec.MsgspecError, RecursionError, OverflowError) as error:
        raise GatewayError(
            Source.CLIENT, invalid("`messages` can't be taken apart to fit.", param="messages")
        ) from error
