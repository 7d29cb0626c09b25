"""The model catalogue: which candidates may serve a model, in which order, and which of them has served.

Built once for each configuration. A model's routes are tried in order; neighbours with a weight are equals, whose order
is drawn by weight. The client's fallbacks (`models`) are walked here, except by an upstream of kind `openrouter`, which
walks them itself. A request has at most `MAX_ATTEMPTS` candidates.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from itertools import groupby
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from msgspec import Raw, Struct
from msgspec.structs import replace

from meshproxy.config import STANDARD_TIERS, Model, Route, Settings, Upstream
from meshproxy.errors import GatewayError, Source, invalid, model_not_found
from meshproxy.policy.pricing import Price, price_of, service_prices
from meshproxy.units import format_usd, parse_usd

MAX_COMPARED_CHARS = 64  # of an unknown name, when the nearest is looked for
MAX_COMPARED_MODELS = 512
MAX_ATTEMPTS = 16  # candidates of one request, however many routes and fallbacks it has

# Fields that a provider charges for beside tokens, and the kinds of upstream that do: OpenRouter's plugins (an Exa web
# search is 4 USD for 1,000 results) and xAI's live search (25 USD for 1,000 sources). The tokens of a search by
# OpenAI's or Perplexity's `web_search_options` are in their usage reports, but a fee for each request isn't.
CHARGED_FIELDS: Mapping[str, frozenset[str]] = {
    "plugins": frozenset({"openai", "openrouter"}),
    "search_parameters": frozenset({"openai", "openrouter"}),
    "web_search_options": frozenset({"openrouter"}),
}

EMPTY_VALUES = frozenset({b"null", b"[]", b"false"})  # values by which a field asks for nothing
# Hosts whose reasoning models refuse `max_tokens` (OpenAI, API reference, "Create chat completion"; Azure OpenAI, "Reasoning
# models"). All others read `max_tokens`: llama.cpp and Ollama ignore the newer name (ggml-org/llama.cpp#13700; Ollama, "OpenAI
# compatibility"), Mistral refuses it (BerriAI/litellm#9583), vLLM and OpenRouter take both.
_NEWER_CAP_HOSTS: Final = (
    "api.openai.com",
    ".openai.azure.com",
    ".cognitiveservices.azure.com",
    ".services.ai.azure.com",
)

# gpt-4o-2024-08-06, claude-3-5-sonnet-20241022, gpt-4-0613: providers answer with the dated name of what they serve
_DATED = re.compile(r"-(?:\d{4}-\d{2}-\d{2}|\d{8}|\d{4})", re.ASCII)


class Candidate(Struct, frozen=True):
    """One upstream and model to try: `upstream_model` is the upstream's name for `model`, the catalogue's id.

    - `natives`: the fallbacks that the provider walks itself, in order, each with the price due if it serves.
    - `weight`: neighbours of one model that have a weight are equals.
    - `hidden_reasoning`: a stream doesn't show all of the output that is billed.
    - `services`: the prices of service tiers, by name.
    - `fees`: what a request costs in nano-USD beside its tokens, by the name of the field that causes it.
    - `cap_field`: the name under which the provider reads a cap on output.
    - `stream_usage`: whether the provider accepts a request for a stream's usage.
    """

    upstream: str
    kind: str
    upstream_model: str
    model: str
    context_window: int
    max_output_tokens: int
    price: Price
    natives: tuple["Candidate", ...] = ()
    weight: int | None = None
    hidden_reasoning: bool = False
    cap_field: str = "max_tokens"
    stream_usage: bool = True
    services: tuple[tuple[str, Price], ...] = ()
    fees: tuple[tuple[str, int], ...] = ()

    def price_in(self, *tiers: str | None) -> Price:
        """Return the price of the first of these service tiers that is standard or priced; else the standard price."""
        for tier in tiers:
            if tier in STANDARD_TIERS:
                break
            for name, price in self.services:
                if name == tier:
                    return price
        return self.price

    @property
    def share(self) -> int:
        """The weight among equals; 1 without one."""
        return self.weight or 1

    @property
    def native_models(self) -> tuple[str, ...]:
        """The `models` to send upstream, by its own names, without the candidate's own model."""
        return tuple(native.upstream_model for native in self.natives)


class CatalogEntry(Struct, frozen=True):
    """A model of the catalogue.

    `groups` are its candidates in order; those of one group are equals. `fixed` is the order where no group has more
    than one.
    """

    id: str
    context_window: int
    max_output_tokens: int
    price: Price
    groups: tuple[tuple[Candidate, ...], ...]
    fixed: tuple[Candidate, ...] | None

    def walk(self, draw: float) -> tuple[Candidate, ...]:
        """Return the candidates in order; `draw`, a random number in [0, 1), decides among equals."""
        if self.fixed is not None:
            return self.fixed
        return tuple(candidate for group in self.groups for candidate in _drawn(group, draw))

    def candidate_at(self, upstream: str) -> Candidate | None:
        """Return the first candidate of this upstream."""
        return next((candidate for group in self.groups for candidate in group if candidate.upstream == upstream), None)


def model_object(entry: CatalogEntry, created: int) -> dict[str, Any]:
    """Make a model's object with OpenAI's fields (API reference, "The model object") and Mesh's (ModelInfo)."""
    price = entry.price
    brand = entry.id.partition("/")[0]
    return {
        "id": entry.id,
        "object": "model",
        "created": created,
        "owned_by": brand,
        "name": entry.id,
        "brand": brand,
        "provider": brand,
        "model_type": "text",
        "context_window": entry.context_window,
        "context_length": entry.context_window,
        "max_output_tokens": entry.max_output_tokens,
        "is_free": price.is_free,
        "supports_completions_api": True,
        "pricing": {
            "pricing_unit": "tokens",
            "prompt_usd_per_1m": format_usd(price.input),
            "completion_usd_per_1m": format_usd(price.output),
            "prompt_usd_per_1k": _per_thousand(price.input),
            "completion_usd_per_1k": _per_thousand(price.output),
            "cache_read_input_usd_per_1m": format_usd(price.cached),
            "cache_write_input_usd_per_1m": format_usd(price.cache_write),
            "audio_input_usd_per_1m": format_usd(price.audio_input),
            "audio_output_usd_per_1m": format_usd(price.audio_output),
        },
    }


def _per_thousand(nusd_per_mtok: int) -> str:
    """Convert a price per million tokens to one per thousand, exactly."""
    return f"{Decimal(nusd_per_mtok).scaleb(-12).normalize():f}"


class Catalog:
    """The models of one configuration."""

    def __init__(self, settings: Settings) -> None:
        self._entries = {name: _entry(name, model, settings) for name, model in settings.models.items()}

    @property
    def ids(self) -> list[str]:
        """Every model's id, in the configuration's order."""
        return list(self._entries)

    def model(self, name: str) -> CatalogEntry | None:
        """Return one model, or None if it isn't configured."""
        return self._entries.get(name)

    def nearest(self, name: str, allowed: Sequence[str] | None = None) -> str | None:
        """Return the model id most similar to this name, whatever its case; None if none is similar.

        `allowed`: those that the key may use; None: all.
        """
        known = self.ids if allowed is None else [each for each in allowed if each in self._entries]
        ids = {each.casefold(): each for each in known[:MAX_COMPARED_MODELS]}
        found = get_close_matches(name[:MAX_COMPARED_CHARS].casefold(), ids, n=1)
        return ids[found[0]] if found else None

    def candidates(
        self, model: str, fallbacks: Sequence[str] = (), *, draw: float, allowed: Sequence[str] | None = None
    ) -> tuple[Candidate, ...]:
        """Return the candidates to try, in order; at most MAX_ATTEMPTS. `draw`, random in [0, 1), decides among equals.

        Raises GatewayError `model_not_found` if `model` or a fallback isn't in the catalogue; it names the nearest of
        those that are `allowed`.
        """
        if not fallbacks:
            entry = self._entries.get(model) or self._known(model, allowed)
            return (entry.fixed or entry.walk(draw))[:MAX_ATTEMPTS]
        return _with_fallbacks([self._known(name, allowed) for name in dict.fromkeys((model, *fallbacks))], draw)

    def _known(self, name: str, allowed: Sequence[str] | None) -> CatalogEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise GatewayError(Source.CLIENT, model_not_found(name, self.nearest(name, allowed)))
        return entry


def large_enough(candidates: tuple[Candidate, ...], tokens: int) -> tuple[Candidate, ...]:
    """Return the candidates whose context window has room for at least `tokens`.

    If none has, all are returned, so that the client gets the first one's refusal. A provider that walks fallbacks
    itself is always kept.
    """
    fitting = tuple(
        candidate for candidate in candidates if candidate.context_window >= tokens or candidate.kind == "openrouter"
    )
    return fitting or candidates


def may_have_served(candidate: Candidate, reported_model: str | None) -> tuple[Candidate, ...]:
    """Return the candidates that may have served, of which the dearest is billed.

    That is the native fallback that the reply's `model` names, exactly or with a date; all that were requested if it
    names none of them; the candidate itself if the reply has no `model`.
    """
    if not candidate.natives or reported_model is None:
        return (candidate,)
    candidates = (candidate, *candidate.natives)
    exact = (candidate for candidate in candidates if reported_model == candidate.upstream_model)
    dated = (candidate for candidate in candidates if _is_dated(reported_model, candidate.upstream_model))
    found = next(exact, None) or next(dated, None)
    return candidates if found is None else (found,)


def with_fees(candidates: tuple[Candidate, ...], tier: str | None, fields: Mapping[str, Raw]) -> tuple[Candidate, ...]:
    """Return the candidates with the fees of a request that has these fields.

    Raises the client's GatewayError, 422, if `service_tier` or a field changes the price and a model that may serve has
    no price for it. A provider whose own cost figure is billed is exempt.
    """
    if tier in STANDARD_TIERS:
        tier = None
    extras = CHARGED_FIELDS.keys() & fields.keys()
    if tier is None and not extras:
        for candidate in candidates:
            if candidate.fees or candidate.natives:
                break
        else:
            return candidates
    present = {name for name, value in fields.items() if bytes(value) not in EMPTY_VALUES}
    return tuple(_with_fees(candidate, tier, present) for candidate in candidates)


def _with_fees(candidate: Candidate, tier: str | None, fields: set[str]) -> Candidate:
    """Return one candidate with the fees of these fields, its native fallbacks included."""
    if candidate.price.markup is None:
        if tier is not None and not any(name == tier for name, _ in candidate.services):
            raise _unpriced(
                "service_tier", f"The model `{candidate.model}` has no price for the service tier `{tier[:64]}`."
            )
        for name in sorted(CHARGED_FIELDS.keys() & fields):
            if candidate.kind in CHARGED_FIELDS[name] and not any(name == field for field, _ in candidate.fees):
                raise _unpriced(name, f"The model `{candidate.model}` has no price for `{name}`.")
    fee = sum(amount for name, amount in candidate.fees if name in fields)
    natives = tuple(_with_fees(native, tier, fields) for native in candidate.natives)
    if not fee and natives == candidate.natives:
        return candidate
    services = tuple((name, price.with_fee(fee)) for name, price in candidate.services)
    return replace(candidate, price=candidate.price.with_fee(fee), services=services, natives=natives)


def _unpriced(param: str, message: str) -> GatewayError:
    return GatewayError(Source.CLIENT, invalid(message, param=param))


def _is_dated(reported: str, name: str) -> bool:
    return reported.startswith(name) and _DATED.fullmatch(reported, len(name)) is not None


def _entry(name: str, model: Model, settings: Settings) -> CatalogEntry:
    price = price_of(model)
    services = service_prices(model)
    fees = tuple((field, parse_usd(usd)) for field, usd in model.field_usd.items())

    def candidate(route: Route) -> Candidate:
        upstream = settings.upstreams[route.upstream]
        return Candidate(
            upstream=route.upstream,
            kind=upstream.kind,
            upstream_model=route.model,
            model=name,
            context_window=model.context_window,
            max_output_tokens=model.max_output_tokens,
            price=price,
            weight=route.weight,
            hidden_reasoning=model.hidden_reasoning,
            services=services,
            fees=fees,
            cap_field=upstream.cap_field or _cap_field(upstream),
            stream_usage=upstream.stream_usage,
        )

    groups = tuple(tuple(map(candidate, group)) for group in groups_of_equals(model.upstreams))
    fixed = None if any(len(group) > 1 for group in groups) else tuple(group[0] for group in groups)
    return CatalogEntry(name, model.context_window, model.max_output_tokens, price, groups, fixed)


def _cap_field(upstream: Upstream) -> str:
    """Return the name under which a provider reads its cap, by its host."""
    host = urlsplit(upstream.base_url).hostname or ""
    return "max_completion_tokens" if host.endswith(_NEWER_CAP_HOSTS) else "max_tokens"


Weighted = TypeVar("Weighted", Route, Candidate)


def groups_of_equals(
    items: Iterable[Weighted], model: Callable[[Weighted], str] = lambda _: ""
) -> Iterable[list[Weighted]]:
    """Yield weighted neighbours of one model together, every other item alone."""
    for (_, is_weighted), neighbours in groupby(items, key=lambda item: (model(item), item.weight is not None)):
        if is_weighted:
            yield list(neighbours)
        else:
            yield from ([item] for item in neighbours)


def _drawn(group: Iterable[Candidate], draw: float) -> Iterable[Candidate]:
    """Yield the group in an order drawn by weight, without replacement.

    One random number is enough: its remainder after the first choice is uniform again and makes the second. (Weights
    that sum to more than 2**53 are rounded, so the last draw may overshoot.)
    """
    rest = list(group)
    while len(rest) > 1:
        point = draw * sum(candidate.share for candidate in rest)
        index = 0
        while index < len(rest) - 1 and point >= rest[index].share:
            point -= rest[index].share
            index += 1
        chosen = rest.pop(index)
        draw = point / chosen.share
        yield chosen
    yield rest[0]


def _with_fallbacks(entries: Sequence[CatalogEntry], draw: float) -> tuple[Candidate, ...]:
    """Return the candidates of each entry in turn.

    An openrouter upstream is tried once for all that it serves: its first candidate carries the later entries' models,
    and their own candidates there are left out.
    """
    candidates: list[Candidate] = []
    covered: set[tuple[str, str]] = set()
    for position, entry in enumerate(entries):
        for candidate in entry.walk(draw):
            if (candidate.upstream, candidate.model) in covered:
                continue
            natives = _natives(candidate, entries[position + 1 :])
            covered.update((native.upstream, native.model) for native in natives)
            candidates.append(replace(candidate, natives=natives) if natives else candidate)
    return tuple(candidates[:MAX_ATTEMPTS])


def _natives(candidate: Candidate, later: Iterable[CatalogEntry]) -> tuple[Candidate, ...]:
    """Return the later entries that this candidate's provider can walk itself."""
    if candidate.kind != "openrouter":
        return ()
    return tuple(native for entry in later if (native := entry.candidate_at(candidate.upstream)) is not None)
