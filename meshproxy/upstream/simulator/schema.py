"""JSON values that fit a JSON Schema: for structured output and for the arguments of tools.

Understood: type (also a list of types), enum, const, default, properties, required, items, prefixItems, anyOf, oneOf, allOf,
$ref within the document ($defs, definitions, "#"), the usual bounds, and common formats. Not understood: pattern, not,
if/then/else, patternProperties; a schema that depends on them may get a value that doesn't fit.
"""

import math
from collections.abc import Mapping
from random import Random
from typing import Any

from meshproxy.upstream.simulator.plausible import ANYTHING, FORMATS, NUMBERS, STRINGS

MAX_DEPTH = 6  # past it, only what is required
MAX_VALUES = 2_000  # a bound on the size of what is made: past it, as past the depth
HARD_DEPTH = 40  # a schema that requires itself has no finite value; null ends it
HARD_VALUES = 20_000  # nor is a long array of long arrays worth its memory

Schema = Mapping[str, Any]


def value_for(schema: Schema, rng: Random) -> Any:
    """A value for the schema, plausible by the names of its properties. Raises `ValueError` for what is no schema."""
    try:
        return _Sampler(schema, rng).value(schema, "", 0)
    except (TypeError, AttributeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not a JSON Schema: {error}") from error


class _Sampler:
    def __init__(self, root: Schema, rng: Random) -> None:
        self._root = root
        self._rng = rng
        self._made = 0

    def value(self, schema: Any, name: str, depth: int) -> Any:
        self._made += 1
        if not isinstance(schema, Mapping) or depth > HARD_DEPTH or self._made > HARD_VALUES:
            return None
        schema = self._resolved(schema)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return self._rng.choice(schema["enum"])
        match self._type(schema, sparing=self._sparing(depth)):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, name, depth)
            case "string":
                return self._string(schema, name)
            case "integer":
                return int(self._number(schema, name, whole=True))
            case "number":
                return self._number(schema, name, whole=False)
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
                schema = _without(schema, "anyOf", "oneOf") | self._branch(branches)
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
        for part in schema["allOf"]:
            resolved = self._resolved(part)
            properties = {**merged.get("properties", {}), **resolved.get("properties", {})}
            required = [*merged.get("required", []), *resolved.get("required", [])]
            merged |= {**resolved, "properties": properties, "required": required}
        return merged

    def _branch(self, branches: list[Any]) -> dict[str, Any]:
        """The first branch, or null where that is one of them and enough has been made."""
        nulls = [branch for branch in branches if isinstance(branch, Mapping) and branch.get("type") == "null"]
        full = self._made > MAX_VALUES // 4
        picked = nulls[0] if nulls and (full or self._rng.random() < 0.2) else branches[0]
        return dict(picked) if isinstance(picked, Mapping) else {}

    @staticmethod
    def _type(schema: Schema, *, sparing: bool) -> str:
        named = schema.get("type")
        if isinstance(named, list) and named:
            return "null" if sparing and "null" in named else str(named[0])
        if isinstance(named, str):
            return named
        if "properties" in schema:
            return "object"
        return "array" if "items" in schema else "string"

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        required = schema.get("required", [])
        properties = schema.get("properties", {})
        if not all(isinstance(name, str) for name in required):
            raise TypeError("required is not a list of strings")
        wanted = [name for name in properties if name in required or not self._sparing(depth)]
        made = {name: self.value(properties[name], name, depth + 1) for name in wanted}
        return made | {name: "" for name in required if name not in made}

    def _array(self, schema: Schema, name: str, depth: int) -> list[Any]:
        fixed = schema.get("prefixItems", [])
        least = int(schema.get("minItems", 0))
        count = least if self._sparing(depth) else min(max(least, 2), int(schema.get("maxItems", max(least, 2))))
        made = [self.value(item, name, depth + 1) for item in fixed]
        items = schema.get("items", {"type": "string"})
        while len(made) < min(count, MAX_VALUES) and items is not False:
            made.append(self.value(items, name.removesuffix("s"), depth + 1))
        return made

    def _number(self, schema: Schema, name: str, *, whole: bool) -> float:
        likely = next((value for hint, value in NUMBERS.items() if hint in name.lower()), self._rng.randint(1, 40))
        bounds = _Bounds(schema)
        step = schema.get("multipleOf") or (1 if whole else None)
        return bounds.nearest(likely) if step is None else bounds.nearest_multiple(likely, step)

    def _string(self, schema: Schema, name: str) -> str:
        formatted = FORMATS.get(schema.get("format", ""))
        if formatted is not None:
            return formatted
        hinted = next((values for hint, values in STRINGS.items() if hint in name.lower()), ANYTHING)
        value = self._rng.choice(hinted)
        least, most = int(schema.get("minLength", 0)), int(schema.get("maxLength", MAX_VALUES))
        return value.ljust(min(least, MAX_VALUES), ".")[:most]


def _without(schema: Schema, *names: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name not in names}


class _Bounds:
    """The least and the most a number may be; `above` and `below` are themselves out."""

    def __init__(self, schema: Schema) -> None:
        self.low: float = schema.get("minimum", -math.inf)
        self.high: float = schema.get("maximum", math.inf)
        self.above: float = schema.get("exclusiveMinimum", -math.inf)
        self.below: float = schema.get("exclusiveMaximum", math.inf)

    def hold(self, value: float) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def nearest(self, value: float) -> float:
        low, high = max(self.low, self.above), min(self.high, self.below)
        if self.hold(value):
            return value
        if math.isinf(low):
            return high if self.hold(high) else high - 1
        if math.isinf(high):
            return low if self.hold(low) else low + 1
        return (low + high) / 2

    def nearest_multiple(self, value: float, step: float) -> float:
        near = math.floor(self.nearest(value) / step)
        return next((count * step for count in (near, near + 1, near - 1) if self.hold(count * step)), near * step)
