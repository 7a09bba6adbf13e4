"""The JSON of a tool's argument that a model wrote as plain text, by the tool's JSON schema."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from typing import Any

STRING = frozenset({"string"})
_MAX_LITERAL_CHARS = 1 << 14  # of Python's literals; longer values are JSON or strings


def argument_types(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """Return the JSON types that `schema`, of a tool's arguments, allows the argument `name`.

    An argument that it does not describe is a string.
    """
    properties = schema.get("properties")
    described = properties.get(name) if isinstance(properties, Mapping) else None
    if not isinstance(described, Mapping):
        described = schema.get("additionalProperties")
    return _types(described, schema, set()) or STRING


def _types(described: Any, schema: Mapping[str, Any], followed: set[str]) -> frozenset[str]:
    """Return the types of a part of `schema`; none when it names none.

    followed: the references whose types are found already.
    """
    if not isinstance(described, Mapping):
        return frozenset()
    reference = described.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        if reference in followed:
            return frozenset()
        followed.add(reference)
        target: Any = schema
        for key in reference[2:].split("/"):
            key = key.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, Mapping) else None
        return _types(target, schema, followed)
    names = described.get("type")
    if isinstance(names, str):
        return frozenset({names})
    if isinstance(names, list):
        return frozenset(name for name in names if isinstance(name, str))
    if isinstance(described.get("enum"), list):
        return frozenset().union(*(types_of(value) for value in described["enum"]))
    if "const" in described:
        return types_of(described["const"])
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(described.get(key), list):
            return frozenset().union(
                *(_types(option, schema, followed) for option in described[key])
            )
    if "properties" in described:
        return frozenset({"object"})
    return frozenset({"array"}) if "items" in described else frozenset()


def types_of(value: Any) -> frozenset[str]:
    """Return the names of a JSON value's types."""
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return frozenset({"integer", "number"})
    by_type = {float: "number", str: "string", list: "array", dict: "object"}
    return frozenset({by_type.get(type(value), "null")})


def argument_json(text: str, types: frozenset[str]) -> str:
    """Return the JSON of the value that a model wrote as `text`.

    It is that of JSON, or of a Python literal, if its type is in `types`; else `text` as a string.
    """
    stripped = text.strip()
    found = _json_value(stripped) or _literal_value(stripped)
    if found is not None and "string" not in types_of(found[0]) and types & types_of(found[0]):
        return found[1]
    return json.dumps(text, ensure_ascii=False)


def scalar_json(text: str) -> str | None:
    """Return the JSON of a number, truth value or null of JSON or Python; None for other text."""
    found = _json_value(text) or _literal_value(text)
    if found is None or isinstance(found[0], (str, list, dict)):
        return None
    return found[1]


def _json_value(text: str) -> tuple[Any, str] | None:
    """Return the value of the JSON `text`, and its JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        # The text itself would do, but for its halves of surrogate pairs and very large numbers.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return value, text


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _literal_value(text: str) -> tuple[Any, str] | None:
    """Return the value of the Python literal `text`, and its JSON."""
    if len(text) > _MAX_LITERAL_CHARS:
        return None
    word = {"true": True, "false": False, "null": None, "none": None, "nil": None}
    if text.lower() in word:
        value: Any = word[text.lower()]
        return value, json.dumps(value)
    try:
        value = ast.literal_eval(text)
        if isinstance(value, tuple):
            value = list(value)
        if isinstance(value, float) and not math.isfinite(value):
            return None
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return value, written
