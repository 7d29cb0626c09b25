"""The cost of a request, in integer nano-USD, rounded up once at the end.

It is computed from token prices, which may depend on the prompt's size and the service tier, and a fee for each
request; or from the provider's own figure times a markup.
"""

import math
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

from msgspec import Struct
from msgspec.structs import replace

from meshproxy.config import Model, Prices, PriceTier
from meshproxy.openai.usage import Usage
from meshproxy.units import parse_usd

TOKENS_PER_PRICE = 1_000_000  # prices are quoted for a million tokens
MAX_AFFORDABLE_TOKENS = 2**31 - 1  # of a model whose output is free
WHOLE_MARKUP = 1_000_000_000  # a markup of 1.00, in billionths


class Price(Struct, frozen=True, omit_defaults=True):
    """A model's prices, in nano-USD per million tokens.

    `cache_write_1h`: for a cache entry kept for an hour; None: as `cache_write`. `request`: a fee for each request, in
    nano-USD. `tiers`: the prices of larger prompts, as (above this many prompt tokens, price), ascending. `markup`, in
    billionths: bill the provider's own figure times this; None: bill these prices.
    """

    input: int
    output: int
    cached: int
    cache_write: int
    reasoning: int
    audio_input: int
    audio_output: int
    cache_write_1h: int | None = None
    request: int = 0
    tiers: tuple[tuple[int, "Price"], ...] = ()
    markup: int | None = None

    def for_prompt_of(self, prompt_tokens: int) -> "Price":
        """Return the price of a whole request whose prompt has this many tokens."""
        found = self
        for above, price in self.tiers:
            if prompt_tokens > above:
                found = price
        return found

    @property
    def is_free(self) -> bool:
        """Return whether no request costs anything, whatever it uses. The provider's own figure may be anything."""
        parts = (self.input, self.output, self.cached, self.cache_write, self.reasoning, self.audio_input)
        more = (self.audio_output, self.cache_write_1h, self.request, self.markup)
        return not any((*parts, *more)) and all(price.is_free for _, price in self.tiers)

    def with_fee(self, fee_nusd: int) -> "Price":
        """Return the price with a higher fee for each request."""
        tiers = tuple((above, price.with_fee(fee_nusd)) for above, price in self.tiers)
        return replace(self, request=self.request + fee_nusd, tiers=tiers)


def price_of(model: Model) -> Price:
    """Return the price of a configured model."""
    return _price(model, model, model.price_tiers)


def service_prices(model: Model) -> tuple[tuple[str, Price], ...]:
    """Return the prices of a configured model's service tiers, by name."""
    return tuple((name, _price(model, tier, tier.price_tiers)) for name, tier in model.service_tiers.items())


def cost(price: Price, usage: Usage, reported_usd: Decimal | None = None) -> int:
    """Return the cost of a usage in nano-USD, or of `reported_usd`, the provider's own figure, where that is billed.

    Each part (cached, reasoning, ...) is billed at its own price and subtracted from its whole. No part can exceed what
    the parts before it left, so overlapping parts are never billed twice. A request that used nothing costs nothing.
    """
    if price.markup is not None and reported_usd is not None:
        return math.ceil(Fraction(reported_usd) * price.markup)
    price = price.for_prompt_of(usage.prompt) if price.tiers else price
    write_1h = usage.cache_write_1h
    prompt_parts = (
        (usage.cached, price.cached),
        (write_1h, price.cache_write if price.cache_write_1h is None else price.cache_write_1h),
        (usage.cache_write - write_1h, price.cache_write),
        (usage.audio_prompt, price.audio_input),
    )
    completion_parts = ((usage.reasoning, price.reasoning), (usage.audio_completion, price.audio_output))
    total = 0  # in millionths of a nano-USD
    for whole, whole_price, parts in (
        (usage.prompt, price.input, prompt_parts),
        (usage.completion, price.output, completion_parts),
    ):
        left = whole
        for tokens, part_price in parts:
            if tokens > 0:
                part = min(tokens, left)
                total += part * part_price
                left -= part
        total += left * whole_price
    fee = price.request if usage.prompt or usage.completion else 0
    return fee - (-total // TOKENS_PER_PRICE)  # rounded up


def billed_price(price: Price, usage: Usage, reported_usd: Decimal | None) -> Price:
    """Return the price that a cost was computed from, for its record: one tier, and the markup only if it applied."""
    applied = price.for_prompt_of(usage.prompt) if price.tiers else price
    if applied.tiers or (applied.markup is not None and reported_usd is None):
        applied = replace(applied, tiers=(), markup=None if reported_usd is None else applied.markup)
    return applied


def hold_amount(price: Price, prompt_tokens: int, output_tokens: int) -> int:
    """Return the nano-USD that no usage of at most these tokens can exceed: every token at its highest possible price."""
    prompt, output = _dearest(price, prompt_tokens)
    return price.request - (-(prompt_tokens * prompt + output_tokens * output) // TOKENS_PER_PRICE)  # rounded up


def affordable_output(price: Price, prompt_tokens: int, amount_nusd: int) -> int:
    """Return the output tokens that `amount_nusd` can hold beside the prompt; 0 if it can't hold the prompt."""
    prompt, output = _dearest(price, prompt_tokens)
    left = (amount_nusd - price.request) * TOKENS_PER_PRICE - prompt_tokens * prompt
    if left < 0:
        return 0
    return left // output if output else MAX_AFFORDABLE_TOKENS


def _price(model: Model, prices: Prices, tiers: Iterable[PriceTier]) -> Price:
    """Build a price; a part without a price of its own costs what its whole costs."""
    whole_input, whole_output = parse_usd(prices.input_usd_per_mtok), parse_usd(prices.output_usd_per_mtok)
    write_1h = prices.cache_write_1h_usd_per_mtok
    return Price(
        input=whole_input,
        output=whole_output,
        cached=_price_or(prices.cached_input_usd_per_mtok, whole_input),
        cache_write=_price_or(prices.cache_write_usd_per_mtok, whole_input),
        reasoning=_price_or(prices.reasoning_usd_per_mtok, whole_output),
        audio_input=_price_or(prices.audio_input_usd_per_mtok, whole_input),
        audio_output=_price_or(prices.audio_output_usd_per_mtok, whole_output),
        cache_write_1h=None if write_1h is None else parse_usd(write_1h),
        request=parse_usd(model.request_usd),
        tiers=tuple((tier.above_prompt_tokens, _price(model, tier, ())) for tier in tiers),
        markup=parse_usd(model.markup) if model.cost_from == "usage.cost" else None,
    )


def _dearest(price: Price, prompt_tokens: int) -> tuple[int, int]:
    """Return the highest price of a prompt token and of an output token, for a prompt of at most `prompt_tokens`."""
    prompt = max(price.input, price.cached, price.cache_write, price.cache_write_1h or 0, price.audio_input)
    output = max(price.output, price.reasoning, price.audio_output)
    for above, tier in price.tiers:
        if prompt_tokens > above:
            of_tier = _dearest(tier, prompt_tokens)
            prompt, output = max(prompt, of_tier[0]), max(output, of_tier[1])
    if price.markup is not None and price.markup > WHOLE_MARKUP:
        return -(-prompt * price.markup // WHOLE_MARKUP), -(-output * price.markup // WHOLE_MARKUP)
    return prompt, output


def _price_or(usd: str | None, whole: int) -> int:
    return whole if usd is None else parse_usd(usd)
