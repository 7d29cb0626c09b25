"""What tokens cost: integers of nano-USD, rounded up once, at the end."""

from meshproxy.config import Model
from meshproxy.money import parse_usd
from meshproxy.value import Value
from meshproxy.wire.usage import Usage

TOKENS_PER_PRICE = 1_000_000  # prices are quoted for a million tokens
MAX_AFFORDABLE_TOKENS = 2**31 - 1  # of a model whose output is free


class Price(Value, frozen=True):
    """A model's prices, each in nano-USD per million tokens."""

    input: int
    output: int
    cached: int
    cache_write: int
    reasoning: int
    audio_input: int
    audio_output: int


def price_of(model: Model) -> Price:
    """The prices of a configured model; a part that has none of its own costs what its whole costs."""
    whole_input, whole_output = parse_usd(model.input_usd_per_mtok), parse_usd(model.output_usd_per_mtok)
    return Price(
        input=whole_input,
        output=whole_output,
        cached=_own(model.cached_input_usd_per_mtok, whole_input),
        cache_write=_own(model.cache_write_usd_per_mtok, whole_input),
        reasoning=_own(model.reasoning_usd_per_mtok, whole_output),
        audio_input=_own(model.audio_input_usd_per_mtok, whole_input),
        audio_output=_own(model.audio_output_usd_per_mtok, whole_output),
    )


def cost(price: Price, usage: Usage) -> int:
    """Nano-USD of a usage. Each part is billed at its own price and taken out of its whole, and no part can be more than what
    the parts before it left, so overlapping parts are never billed twice.
    """
    prompt = _split(
        usage.prompt,
        price.input,
        (usage.cached, price.cached),
        (usage.cache_write, price.cache_write),
        (usage.audio_prompt, price.audio_input),
    )
    completion = _split(
        usage.completion,
        price.output,
        (usage.reasoning, price.reasoning),
        (usage.audio_completion, price.audio_output),
    )
    return _rounded_up(prompt + completion)


def hold_amount(price: Price, prompt_tokens: int, output_tokens: int) -> int:
    """Nano-USD that no usage of at most these tokens can exceed: every token at the dearest price it may turn out to have."""
    return _rounded_up(prompt_tokens * _dearest_prompt(price) + output_tokens * _dearest_output(price))


def affordable_output(price: Price, prompt_tokens: int, amount_nusd: int) -> int:
    """How many tokens of output `hold_amount` lets this amount pay for beside the prompt; 0 if not even that."""
    left = amount_nusd * TOKENS_PER_PRICE - prompt_tokens * _dearest_prompt(price)
    dearest = _dearest_output(price)
    if left < 0:
        return 0
    return left // dearest if dearest else MAX_AFFORDABLE_TOKENS


def _dearest_prompt(price: Price) -> int:
    return max(price.input, price.cached, price.cache_write, price.audio_input)


def _dearest_output(price: Price) -> int:
    return max(price.output, price.reasoning, price.audio_output)


def _own(usd: str | None, whole: int) -> int:
    return whole if usd is None else parse_usd(usd)


def _split(whole: int, price: int, *parts: tuple[int, int]) -> int:
    total = 0
    for tokens, part_price in parts:
        part = min(tokens, whole)
        total += part * part_price
        whole -= part
    return total + whole * price


def _rounded_up(millionths_nusd: int) -> int:
    return -(-millionths_nusd // TOKENS_PER_PRICE)
