"""How a simulated provider behaves when a request doesn't ask for anything else."""

from typing import Annotated

from msgspec import Meta, Struct


class SimulatorSettings(Struct, frozen=True, kw_only=True):
    """The pace of a fast reader's model, and whose rules hold.

    `api_key`: the only bearer token let in; None lets everyone in. `openrouter`: `models` and `transforms` are understood, as
    OpenRouter does, instead of being refused, as OpenAI does.
    """

    tokens_per_second: Annotated[float, Meta(gt=0)] = 40.0
    first_token_s: Annotated[float, Meta(ge=0)] = 0.3
    api_key: str | None = None
    openrouter: bool = False
    max_body_bytes: Annotated[int, Meta(ge=1)] = 67_108_864
