"""GET /v1/models: what a client may ask for, each fault with what it does."""

from typing import Any

from meshproxy.upstream.simulator.behaviour import FAMILIES, PREFIX, TRAITS
from meshproxy.upstream.simulator.replies import SEEDED_CREATED

PLAIN_MODELS = ("gpt-4o", "gpt-4o-mini")  # any name without sim/ is served as these are


def model_objects() -> list[dict[str, Any]]:
    """The plain ones, and every fault by name; families (`sim/error-STATUS`) as a pattern."""
    names = {PREFIX + name: what for name, what in (TRAITS | FAMILIES).items()}
    return [model_object(name) for name in PLAIN_MODELS] + [model_object(name, what) for name, what in names.items()]


def model_object(model: str, description: str = TRAITS["plain"]) -> dict[str, Any]:
    """OpenAI's model object, and a description, as OpenRouter's has."""
    return {
        "id": model,
        "object": "model",
        "created": SEEDED_CREATED,
        "owned_by": "simulator",
        "description": description,
    }
