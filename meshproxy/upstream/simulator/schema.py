"""JSON values that fit a JSON Schema: for structured output and for the arguments of tools.

Understood: type (also a list of types), enum, const, properties, required, items, prefixItems, anyOf, oneOf, allOf, $ref within
the document ($defs, definitions, "#"), the usual bounds, and common formats. Not understood: pattern, not, if/then/else,
patternProperties; a schema that depends on them may get a value that doesn't fit.
"""

from collections.abc import Mapping
from math import floor, inf, isinf
from random import Random
from typing import Any

MAX_DEPTH = 6  # past it, only what is required
MAX_VALUES = 2_000  # a bound on the size of what is made: past it, as past the depth
HARD_DEPTH = 40  # a schema that requires itself has no finite value; null ends it
HARD_VALUES = 20_000  # nor is a long array of long arrays worth its memory

FORMATS = {
    "date": "2025-03-14",
    "date-time": "2025-03-14T15:09:26Z",
    "time": "15:09:26Z",
    "duration": "P3D",
    "email": "ada@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "9b2f7c1e-4d3a-4b6e-8f10-2a5c6d7e8f90",
}
WORDS = ("Paris", "a pear tree", "the old harbour", "nine bridges")

Schema = Mapping[str, Any]


def value_for(schema: Schema, rng: Random) -> Any:
    """A value for the schema. Raises `ValueError` for what is no schema."""
    try:
        return _Sampler(schema, rng).value(schema, 0)
    except (TypeError, AttributeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not a JSON Schema: {error}") from error


class _Sampler:
    def __init__(self, root: Schema, rng: Random) -> None:
        self._root = root
        self._rng = rng
        self._made = 0

    def value(self, schema: Any, depth: int) -> Any:
        self._made += 1
        if not isinstance(schema, Mapping) or depth > HARD_DEPTH or self._made > HARD_VALUES:
            return None
        schema = self._resolved(schema)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return self._rng.choice(schema["enum"])
        match self._type(schema):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "string":
                return self._string(schema)
            case "integer":
                return int(self._number(schema, step=1))
            case "number":
                return self._number(schema, step=None)
            case "boolean":
                return self._rng.random() < 0.5
            case _:
                return None

    def _sparing(self, depth: int) -> bool:
        return depth > MAX_DEPTH or self._made > MAX_VALUES

    def _resolved(self, schema: Schema) -> Schema:
        """Follow references, merge allOf, pick a branch of anyOf and oneOf."""
        for _ in range(HARD_DEPTH):
            if isinstance(schema.get("$ref"), str):
                schema = _without(schema, "$ref") | self._referred(schema["$ref"])
            elif schema.get("allOf"):
                schema = self._merged(schema)
            elif branches := schema.get("anyOf") or schema.get("oneOf"):
                schema = _without(schema, "anyOf", "oneOf") | dict(self._rng.choice(branches))
            else:
                break
        return schema

    def _referred(self, reference: str) -> dict[str, Any]:
        found: Any = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            step = part.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, Mapping) else None
        return dict(found) if isinstance(found, Mapping) else {"type": "null"}

    def _merged(self, schema: Schema) -> dict[str, Any]:
        merged = _without(schema, "allOf")
        for part in map(self._resolved, schema["allOf"]):
            properties = {**merged.get("properties", {}), **part.get("properties", {})}
            required = [*merged.get("required", []), *part.get("required", [])]
            merged |= {**part, "properties": properties, "required": required}
        return merged

    def _type(self, schema: Schema) -> Any:
        named = schema.get("type")
        if isinstance(named, list) and named:
            return self._rng.choice(named)
        if named is None:
            return "object" if "properties" in schema else "array" if "items" in schema else "string"
        return named

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        required = schema.get("required", [])
        properties = schema.get("properties", {})
        if not all(isinstance(name, str) for name in required):
            raise TypeError("required is not a list of strings")
        if not isinstance(properties, Mapping):
            raise TypeError("properties is not an object")
        wanted = [name for name in properties if name in required or not self._sparing(depth)]
        made = {name: self.value(properties[name], depth + 1) for name in wanted}
        return made | {name: "" for name in required if name not in made}

    def _array(self, schema: Schema, depth: int) -> list[Any]:
        least = int(schema.get("minItems", 0))
        count = least if self._sparing(depth) else min(max(least, 2), int(schema.get("maxItems", MAX_VALUES)))
        made = [self.value(item, depth + 1) for item in schema.get("prefixItems", [])]
        items = schema.get("items", {"type": "string"})
        while len(made) < min(count, MAX_VALUES) and items is not False:
            made.append(self.value(items, depth + 1))
        return made

    def _number(self, schema: Schema, *, step: float | None) -> float:
        low, high = schema.get("minimum", -inf), schema.get("maximum", inf)
        above, below = schema.get("exclusiveMinimum", -inf), schema.get("exclusiveMaximum", inf)
        least, most = max(low, above), min(high, below)
        value: float = self._rng.randint(1, 40)
        if not least < value < most:
            value = most - 1 if isinf(least) else least + 1 if isinf(most) else (least + most) / 2
        step = schema.get("multipleOf", step)
        if step is None:
            return value
        multiples = [(floor(value / step) + more) * step for more in (0, 1)]
        return next((each for each in multiples if low <= each <= high and above < each < below), multiples[0])

    def _string(self, schema: Schema) -> str:
        if schema.get("format") in FORMATS:
            return FORMATS[schema["format"]]
        least, most = int(schema.get("minLength", 0)), int(schema.get("maxLength", MAX_VALUES))
        return self._rng.choice(WORDS).ljust(min(least, MAX_VALUES), ".")[:most]


def _without(schema: Schema, *names: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name not in names}
