"""Resolve: from what the client wrote to what a provider is asked: template, model, parameters, sizes."""

import asyncio
from collections.abc import Collection

import msgspec
import orjson
from msgspec.structs import replace

from meshproxy.config import Settings
from meshproxy.errors import Fault, Source, forbidden, invalid, template_not_found
from meshproxy.gateway.call import LARGE_BYTES
from meshproxy.gateway.deployment import Deployment
from meshproxy.ledger.directory import Directory
from meshproxy.policy.catalog import Attempt, priced
from meshproxy.policy.params import merge_params
from meshproxy.policy.pricing import Price, affordable_output, hold_amount
from meshproxy.policy.principal import Principal
from meshproxy.policy.template import Template, render
from meshproxy.policy.tokens import estimate_prompt, has_media
from meshproxy.policy.transforms import middle_out
from meshproxy.value import Value
from meshproxy.wire.chat import ChatRequest, check_members, decode_chat, encode_upstream, members_of, with_params

PAUSE_S_PER_BYTE = 1e-9  # 33 ms for the largest body, and a millisecond for one of a megabyte


class Plan(Value, frozen=True):
    """A request resolved. `prompt_tokens` is an estimate.

    `output_cap` is what one choice is expected to have at most, and `output_limit` what it can have, which is more for a stream
    that is told no cap; `imposed_cap` is the cap that the provider must be told: because the request has none, or because credit
    is short (`clamped`).
    """

    request: ChatRequest
    model: str
    attempts: tuple[Attempt, ...]
    messages: bytes
    prompt_tokens: int
    output_cap: int
    output_limit: int
    imposed_cap: int | None
    clamped: bool = False

    @property
    def prices(self) -> Collection[Price]:
        """What each attempt that may serve charges, in the service tier that was asked for and in the standard one, which a
        provider may serve instead. Each price once.
        """
        attempts, tier = self.attempts, self.request.service_tier
        if len(attempts) == 1 and not attempts[0].natives and tier is None:
            return (attempts[0].price,)
        return {price for served in may_serve(attempts) for price in (served.price, served.price_in(tier))}

    @property
    def output_tokens(self) -> int:
        """What all choices together are expected to have at most."""
        return self.output_cap * self.request.n

    @property
    def output_bound(self) -> int:
        """What all choices together can have."""
        return self.output_limit * self.request.n

    def hold_nusd(self, output_tokens: int) -> int:
        """What the prompt and so many tokens of output can cost at most, in nano-USD, whichever attempt serves."""
        return max([hold_amount(price, self.prompt_tokens, output_tokens) for price in self.prices])

    def clamped_to(self, amount_nusd: int) -> "Plan":
        """The plan with no more output than this amount can pay for, whichever attempt serves."""
        affordable = min(affordable_output(price, self.prompt_tokens, amount_nusd) for price in self.prices)
        cap = max(affordable // self.request.n, 1)
        if cap >= self.output_cap:
            return self
        return replace(self, output_cap=cap, output_limit=cap, imposed_cap=cap, clamped=True)

    def body_for(self, attempt: Attempt) -> bytes:
        """The JSON that this attempt's provider is sent."""
        native = attempt.kind == "openrouter"
        messages = self.messages
        if "middle-out" in self.request.transforms and not native:
            messages = _fit(messages, attempt.context_window - self.output_cap, self.request.message_count)
        return encode_upstream(
            self.request,
            model=attempt.upstream_model,
            messages=messages,
            max_tokens=self.imposed_cap,
            cap_field="max_completion_tokens" if attempt.kind == "openai" else "max_tokens",
            native=native,
            models=attempt.native_models,
        )


async def resolve(body: bytes, principal: Principal, deployment: Deployment, directory: Directory, spin: float) -> Plan:
    """The plan for a request's body; a Fault says what is wrong with it."""
    request = decode_chat(body) if len(body) <= LARGE_BYTES else await _decode_large(body)
    template = await _template(request.template, principal, directory) if request.template is not None else None
    model = _model(request, principal, template, deployment.settings)
    attempts = deployment.catalog.attempts(model, request.models, spin=spin)
    for name in (model, *request.models):
        if not principal.may_use(name):
            raise Fault(Source.CLIENT, forbidden(f"This key may not use the model `{name[:128]}`.", "model"))
    params = merge_params(principal.key.params, template.params if template is not None else None)
    request = with_params(request, params) if params else request
    attempts = priced(attempts, request.service_tier, request.fields)
    messages = _messages(request, template)
    tools = bytes(request.fields.get("tools", b""))
    media = has_media(messages) if template is not None or not request.text_only else False
    credit = deployment.settings.credits
    sizes = [served.max_output_tokens for served in may_serve(attempts)]
    cap = min(request.max_tokens, max(sizes)) if request.max_tokens else min(credit.default_output_tokens, *sizes)
    imposes = request.max_tokens is None and credit.strict and not request.stream
    return Plan(
        request=request,
        model=model,
        attempts=attempts,
        messages=messages,
        prompt_tokens=estimate_prompt(messages, tools, request.message_count, media=media),
        output_cap=cap,
        output_limit=cap if request.max_tokens or imposes else max(sizes),
        imposed_cap=cap if imposes else None,
    )


async def _decode_large(body: bytes) -> ChatRequest:
    """The request in a large body, taken apart in two steps with a pause around each: what others do takes several turns of the
    loop (one for each answer of Redis, for example), and mustn't meet a step in every turn.
    """
    pause_s = len(body) * PAUSE_S_PER_BYTE
    await asyncio.sleep(pause_s)
    members = members_of(body)
    await asyncio.sleep(pause_s)
    request = check_members(members)
    await asyncio.sleep(pause_s)
    return request


def may_serve(attempts: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
    """Every attempt, and the fallbacks that a provider walks itself."""
    natives = [native for attempt in attempts for native in attempt.natives]
    return (*attempts, *natives) if natives else attempts


async def _template(name: str, principal: Principal, directory: Directory) -> Template:
    template = await directory.template(principal.account.name, name)
    if template is None:
        raise Fault(Source.CLIENT, template_not_found(name))
    return template


def _model(request: ChatRequest, principal: Principal, template: Template | None, settings: Settings) -> str:
    """The request's model, else the key's, else the template's, else the configuration's."""
    return (
        request.model
        or principal.key.default_model
        or (template.model if template is not None else None)
        or settings.defaults.model
    )


def _messages(request: ChatRequest, template: Template | None) -> bytes:
    """Rendered messages, then the caller's own bytes."""
    if template is None:
        if request.messages is None:
            raise Fault(
                Source.CLIENT,
                invalid("`messages` is required without a template that supplies them.", param="messages"),
            )
        return request.messages
    rendered = orjson.dumps(render(template, request.variables))
    if request.messages is None:
        if rendered == b"[]":
            raise Fault(
                Source.CLIENT,
                invalid("The template supplies no messages, so `messages` is required.", param="messages"),
            )
        return rendered
    return rendered if rendered == b"[]" else rendered[:-1] + b"," + request.messages.lstrip()[1:]


def _fit(messages: bytes, budget_tokens: int, count: int) -> bytes:
    """The messages after middle-out, or their own bytes when they fit as they are."""
    if estimate_prompt(messages, None, count) <= budget_tokens:
        return messages
    try:
        return msgspec.json.encode(middle_out(msgspec.json.decode(messages), budget_tokens))
    except (msgspec.MsgspecError, RecursionError, OverflowError) as error:
        raise Fault(Source.CLIENT, invalid("`messages` can't be taken apart to fit.", param="messages")) from error
