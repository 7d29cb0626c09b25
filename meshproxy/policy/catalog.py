"""Which provider is asked for a model, in which order, and which of them has served.

Built once for each configuration. A model's routes are tried in order; neighbours that carry a weight are equals, and change
places by it. `models`, the client's fallbacks, is walked here, but for an upstream of kind `openrouter`, which does so itself.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import groupby
from typing import Final
from urllib.parse import urlsplit

from msgspec import Raw, Struct
from msgspec.structs import replace

from meshproxy.config import STANDARD_TIERS, Model, Route, Settings, Upstream
from meshproxy.errors import GatewayError, Source, invalid, model_not_found
from meshproxy.money import parse_usd
from meshproxy.policy.pricing import Price, price_of, service_prices

MAX_COMPARED_CHARS = 64  # of a name that is not known
MAX_COMPARED_MODELS = 512
MAX_ATTEMPTS = 16  # of one request, however many routes and fallbacks it has

# Fields that a provider takes money for beside the tokens, and which kinds of upstream do: OpenRouter's plugins (a web search
# of Exa's is 4 USD for 1,000 results) and xAI's live search (25 USD for 1,000 sources). What a search by OpenAI's or Perplexity's
# `web_search_options` adds is in their report, but for a fee for each request.
EXTRAS: Mapping[str, frozenset[str]] = {
    "plugins": frozenset({"openai", "openrouter"}),
    "search_parameters": frozenset({"openai", "openrouter"}),
    "web_search_options": frozenset({"openrouter"}),
}

NOTHING = frozenset({b"null", b"[]", b"false"})  # a field that asks for nothing
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
    """One provider to ask: `upstream_model` is its own name for `model`, the catalogue's id. `natives` are the fallbacks that
    it walks itself, in order, each with the price that is due if it is the one that serves. Neighbours of one model that have a
    `weight` are equals. `hidden_reasoning`: output is billed that a stream doesn't show. `services` are the prices of service
    tiers by name, `fees` what a request costs beside its tokens if it has a field of that name. `cap_field` is
    the name under which the provider reads a cap on output, `stream_usage` whether it can be asked for the usage of a stream.
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
        """The price of the first of these service tiers that is standard or has one; else the standard price."""
        for tier in tiers:
            if tier in STANDARD_TIERS:
                break
            for name, price in self.services:
                if name == tier:
                    return price
        return self.price

    @property
    def share(self) -> int:
        """Its weight among equals; 1 for one that has none."""
        return self.weight or 1

    @property
    def native_models(self) -> tuple[str, ...]:
        """The `models` to send upstream, in its own names, without the attempt's own model."""
        return tuple(native.upstream_model for native in self.natives)


class Entry(Struct, frozen=True):
    """A model of the catalogue. `groups` are its attempts in order; a group of more than one are equals. `fixed` is the
    order when there are no equals.
    """

    id: str
    context_window: int
    max_output_tokens: int
    price: Price
    groups: tuple[tuple[Candidate, ...], ...]
    fixed: tuple[Candidate, ...] | None

    def walk(self, spin: float) -> tuple[Candidate, ...]:
        """The attempts in the order that `spin`, in [0, 1), gives to equals."""
        if self.fixed is not None:
            return self.fixed
        return tuple(candidate for group in self.groups for candidate in _drawn(group, spin))

    def through(self, upstream: str) -> Candidate | None:
        """The first attempt that goes through this upstream."""
        return next((candidate for group in self.groups for candidate in group if candidate.upstream == upstream), None)


class Catalog:
    """The models of one configuration."""

    def __init__(self, settings: Settings) -> None:
        self._entries = {name: _entry(name, model, settings) for name, model in settings.models.items()}

    @property
    def ids(self) -> list[str]:
        """Every model's id, as configured."""
        return list(self._entries)

    def model(self, name: str) -> Entry | None:
        """One model, or None if there is no such."""
        return self._entries.get(name)

    def nearest(self, name: str) -> str | None:
        """Return the model whose name is most like this one; None if none is like it."""
        found = get_close_matches(name[:MAX_COMPARED_CHARS], self.ids[:MAX_COMPARED_MODELS], n=1)
        return found[0] if found else None

    def attempts(self, model: str, fallbacks: Sequence[str] = (), *, spin: float) -> tuple[Candidate, ...]:
        """Whom to ask, in order; at most MAX_ATTEMPTS. `spin` in [0, 1) decides among equals.

        GatewayError `model_not_found` if `model` or a fallback isn't in the catalogue.
        """
        entry = self._known(model)
        if not fallbacks:
            return entry.walk(spin)[:MAX_ATTEMPTS]
        return _with_fallbacks([self._known(name) for name in dict.fromkeys((model, *fallbacks))], spin)

    def _known(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise GatewayError(Source.CLIENT, model_not_found(name, self.nearest(name)))
        return entry


def large_enough(attempts: tuple[Candidate, ...], tokens: int) -> tuple[Candidate, ...]:
    """The attempts whose model's window has room for at least so many tokens; all of them if none has, so that the first is
    asked and its refusal told. A provider that walks fallbacks itself is asked in any case.
    """
    fitting = tuple(
        candidate for candidate in attempts if candidate.context_window >= tokens or candidate.kind == "openrouter"
    )
    return fitting or attempts


def may_have_served(candidate: Candidate, reported_model: str | None) -> tuple[Candidate, ...]:
    """What has served, and is billed: the native fallback that the reply's `model` names, exactly or with a date. All that were
    asked, where it names none of them; the attempt itself, where there is no `model`.
    """
    if not candidate.natives or reported_model is None:
        return (candidate,)
    candidates = (candidate, *candidate.natives)
    exact = (candidate for candidate in candidates if reported_model == candidate.upstream_model)
    dated = (candidate for candidate in candidates if _is_dated(reported_model, candidate.upstream_model))
    found = next(exact, None) or next(dated, None)
    return candidates if found is None else (found,)


def priced(attempts: tuple[Candidate, ...], tier: str | None, fields: Mapping[str, Raw]) -> tuple[Candidate, ...]:
    """The attempts with the fees of a request that has these fields.

    GatewayError of the client, 422: `service_tier` or a field changes the price, and a model that may serve has none for it. A
    provider that tells what it has charged may be asked for anything.
    """
    if tier in STANDARD_TIERS:
        tier = None
    extras = EXTRAS.keys() & fields.keys()
    if tier is None and not extras:
        for candidate in attempts:
            if candidate.fees or candidate.natives:
                break
        else:
            return attempts
    present = {name for name, value in fields.items() if bytes(value) not in NOTHING}
    return tuple(_priced(candidate, tier, present) for candidate in attempts)


def _priced(candidate: Candidate, tier: str | None, fields: set[str]) -> Candidate:
    if candidate.price.markup is None:
        if tier is not None and not any(name == tier for name, _ in candidate.services):
            raise _unpriced(
                "service_tier", f"The model `{candidate.model}` has no price for the service tier `{tier[:64]}`."
            )
        for name in sorted(EXTRAS.keys() & fields):
            if candidate.kind in EXTRAS[name] and not any(name == field for field, _ in candidate.fees):
                raise _unpriced(name, f"The model `{candidate.model}` has no price for `{name}`.")
    fee = sum(amount for name, amount in candidate.fees if name in fields)
    natives = tuple(_priced(native, tier, fields) for native in candidate.natives)
    if not fee and natives == candidate.natives:
        return candidate
    services = tuple((name, price.with_fee(fee)) for name, price in candidate.services)
    return replace(candidate, price=candidate.price.with_fee(fee), services=services, natives=natives)


def _unpriced(param: str, message: str) -> GatewayError:
    return GatewayError(Source.CLIENT, invalid(message, param=param))


def _is_dated(reported: str, name: str) -> bool:
    return reported.startswith(name) and _DATED.fullmatch(reported, len(name)) is not None


def _entry(name: str, model: Model, settings: Settings) -> Entry:
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

    groups = tuple(tuple(map(candidate, group)) for group in _groups(model.upstreams))
    fixed = None if any(len(group) > 1 for group in groups) else tuple(group[0] for group in groups)
    return Entry(name, model.context_window, model.max_output_tokens, price, groups, fixed)


def _cap_field(upstream: Upstream) -> str:
    """The name under which a provider that the configuration doesn't describe reads its cap."""
    host = urlsplit(upstream.base_url).hostname or ""
    return "max_completion_tokens" if host.endswith(_NEWER_CAP_HOSTS) else "max_tokens"


def _groups(routes: Iterable[Route]) -> Iterable[list[Route]]:
    """Weighted neighbours together, every other route alone."""
    for weighted, neighbours in groupby(routes, key=lambda route: route.weight is not None):
        if weighted:
            yield list(neighbours)
        else:
            yield from ([route] for route in neighbours)


def _drawn(group: Iterable[Candidate], spin: float) -> Iterable[Candidate]:
    """The group in an order drawn by weight without replacement. One random number is enough: what it says beyond the choice
    of the first is uniform again, and chooses the second. (Weights past 2**53 in all are rounded: the last may be overshot.)
    """
    rest = list(group)
    while len(rest) > 1:
        point = spin * sum(candidate.share for candidate in rest)
        index = 0
        while index < len(rest) - 1 and point >= rest[index].share:
            point -= rest[index].share
            index += 1
        chosen = rest.pop(index)
        spin = point / chosen.share
        yield chosen
    yield rest[0]


def _with_fallbacks(entries: Sequence[Entry], spin: float) -> tuple[Candidate, ...]:
    """The attempts of each entry in turn. An openrouter upstream is asked once for all that it serves: the first attempt there
    carries the later entries' models, and their own attempts there are left out.
    """
    attempts: list[Candidate] = []
    covered: set[tuple[str, str]] = set()
    for position, entry in enumerate(entries):
        for candidate in entry.walk(spin):
            if (candidate.upstream, candidate.model) in covered:
                continue
            natives = _natives(candidate, entries[position + 1 :])
            covered.update((native.upstream, native.model) for native in natives)
            attempts.append(replace(candidate, natives=natives) if natives else candidate)
    return tuple(attempts[:MAX_ATTEMPTS])


def _natives(candidate: Candidate, later: Iterable[Entry]) -> tuple[Candidate, ...]:
    if candidate.kind != "openrouter":
        return ()
    return tuple(native for entry in later if (native := entry.through(candidate.upstream)) is not None)
