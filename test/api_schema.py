"""Values for the bodies of an API from its OpenAPI description: such as keep to it, and such as don't quite."""

import re
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

MAX_DEPTH = 5
EXTREMES = [
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    -(2**31),
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    10**40,
    0.5,
    3.0,
    -0.0,
    1e308,
]
TEXTS = [
    "",
    " ",
    "a",
    "grow a clone",
    "植物",
    "\u0000",
    "\x7f",
    "user",
    "text",
    "null",
    "a" * 300,
    "{}",
    "(",
    "[a-z]+",
    "{{",
]
NAMES = ["a", "type", "role", "0", ""]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.sampled_from([*EXTREMES, *TEXTS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


class Values:
    """Strategies for the schemas of one description.

    Args:
        noise: one of so many values is anything at all instead of what the schema says; 0: none is.
    """

    def __init__(self, schemas: Mapping[str, Any], noise: int):
        self._schemas = schemas
        self._noise = noise

    def of(self, schema: Any, depth: int = 0) -> st.SearchStrategy[Any]:
        """Values for a schema. What its `allOf`, `if` and `not` say is left out."""
        return st.deferred(lambda: self._noisy(self._exact(self._resolved(schema), depth)))

    def _resolved(self, schema: Any) -> Any:
        while isinstance(schema, dict) and "$ref" in schema:
            schema = self._schemas[schema["$ref"].rsplit("/", 1)[1]]
        return {} if isinstance(schema, bool) else schema

    def _noisy(self, exact: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        if not self._noise:
            return exact
        return st.integers(1, self._noise).flatmap(lambda number: ANYTHING if number == 1 else exact)

    def _exact(self, schema: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
        if "const" in schema:
            return st.just(schema["const"])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        for name in ("anyOf", "oneOf"):
            if name in schema and "properties" not in schema:
                return st.one_of([self.of(one, depth + 1) for one in schema[name]])
        kind = schema.get("type")
        if isinstance(kind, list):
            return st.one_of([self._exact({**schema, "type": one}, depth) for one in kind])
        if kind == "object" or "properties" in schema:
            return self._object(schema, depth)
        if kind == "array":
            items = self.of(schema.get("items", {}), depth + 1)
            least = schema.get("minItems", 0)
            return st.lists(items, min_size=least, max_size=max(least, min(3, schema.get("maxItems", 3))))
        return self._scalar(kind, schema)

    def _object(self, schema: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        optional = {name: self.of(one, depth + 1) for name, one in properties.items() if name not in required}
        chosen = st.just({})
        if optional and depth < MAX_DEPTH:
            some = st.lists(st.sampled_from(sorted(optional)), unique=True, max_size=4)
            chosen = some.flatmap(lambda names: st.fixed_dictionaries({name: optional[name] for name in names}))
        needed = st.fixed_dictionaries({name: self.of(properties.get(name, {}), depth + 1) for name in required})
        others = st.just({})
        if isinstance(schema.get("additionalProperties"), dict):
            names = st.sampled_from(["1", "17"] if "propertyNames" in schema else ["unheard_of", "another"])
            others = st.dictionaries(names, self.of(schema["additionalProperties"], depth + 1), max_size=1)
        elif self._noise:
            others = st.dictionaries(st.sampled_from(["unheard_of", "another"]), ANYTHING, max_size=1)
        return st.builds(lambda first, second, third: {**first, **second, **third}, others, chosen, needed)

    def _scalar(self, kind: str | None, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        if kind == "string":
            least, most = schema.get("minLength", 0), schema.get("maxLength", 1 << 20)
            return st.sampled_from([text for text in TEXTS if least <= len(text) <= most])
        if kind in ("integer", "number"):
            return self._number(kind, schema)
        if kind == "boolean":
            return st.booleans()
        return st.none() if kind == "null" else ANYTHING

    def _number(self, kind: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        low = schema.get("minimum", schema.get("exclusiveMinimum", -(2**31)))
        high = schema.get("maximum", schema.get("exclusiveMaximum", 2**31 - 1))
        if kind == "integer":
            return st.integers(low, high) | st.sampled_from([low, high])
        return st.floats(low, high, exclude_min="exclusiveMinimum" in schema, exclude_max="exclusiveMaximum" in schema)


def body_schemas(description: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> schema of the JSON body of its POST."""
    return {
        path: operations["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path, operations in description["paths"].items()
        if "requestBody" in operations.get("post", {}) and not re.search("remote_instance", path)
    }
