"""What a JSON schema allows, as a list of simple schemas, for grammars of values that are no JSON.

JSON itself follows any schema that llguidance knows. Other ways to write values follow those whose
keywords are listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.text.argument_types import types_of

_MAX_STEPS = 5000  # references and choices that are followed for one tool
_MAX_DEPTH = 16  # of references and choices inside each other
_MAX_APART = 100  # schemas of a oneOf
_CHOICES = ("anyOf", "oneOf", "allOf")
_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
_DEFINITIONS = ("$defs", "definitions")
_STRING = frozenset({"pattern", "minLength", "maxLength"})
_NUMBER = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_ARRAY = frozenset({"items", "minItems", "maxItems"})
_OBJECT = frozenset({"properties", "required", "additionalProperties"})
_SUPPORTED = _STRING | _NUMBER | _ARRAY | _OBJECT | frozenset({"type", "enum", "const", "$ref"})
# They constrain nothing; `format` does so only in JSON.
_NOTES = frozenset(
    [
        "$anchor",
        "$comment",
        "$id",
        "$schema",
        "contentEncoding",
        "contentMediaType",
        "default",
        "deprecated",
        "description",
        "discriminator",
        "example",
        "examples",
        "format",
        "markdownDescription",
        "nullable",
        "readOnly",
        "strict",
        "title",
        "writeOnly",
        "x-guidance",
    ]
)


def unsupported(what: str) -> ApiError:
    """Return the 400 for a schema that calls of this model cannot follow."""
    return invalid(
        "tools",
        f"{what} This model writes arguments in a form of its own, not as JSON, and a grammar of "
        "them cannot keep that: change the schema, or leave out strict and a forced call.",
        "invalid_grammar",
    )


def definitions(root: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of the schema `root` that references in parts of it lead to."""
    return {key: root[key] for key in _DEFINITIONS if key in root}


def without_notes(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of `schema` that constrain values."""
    return {key: value for key, value in schema.items() if key not in _NOTES | {*_DEFINITIONS}}


def resolve(reference: Any, root: Mapping[str, Any]) -> Any:
    """Return the part of the schema `root` that `reference` names. Raises ApiError."""
    target: Any = root
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise unsupported(f"The schema of a tool has the $ref {str(reference)!r:.100}.")
    for key in filter(None, reference[1:].split("/")):
        key = key.replace("~1", "/").replace("~0", "~")
        target = target.get(key) if isinstance(target, Mapping) else None
    if not isinstance(target, (Mapping, bool)):
        raise invalid(
            "tools", f"The $ref {reference!r:.100} leads to no schema.", "invalid_grammar"
        )
    return target


def options_of(
    schema: Any, root: Mapping[str, Any], steps: list[None] | None = None, depth: int = 0
) -> list[dict[str, Any]]:
    """Return simple schemas of which a value follows one.

    A simple schema is {"const": value}, {}, or has one "type" and keywords of it; an object's has
    "properties" and an array's may have "items", which are not simple.
    steps: counts the work for one tool. Raises ApiError for keywords that only JSON can follow.
    """
    steps = [] if steps is None else steps
    steps.append(None)
    if len(steps) > _MAX_STEPS:
        raise unsupported("The schema of a tool has too many choices.")
    if depth > _MAX_DEPTH:
        raise unsupported(f"The schema of a tool has over {_MAX_DEPTH} choices inside each other.")
    if schema is True:
        return [{}]
    if schema is False:
        return []
    if not isinstance(schema, Mapping):
        raise invalid("tools", "A schema must be an object.", "invalid_grammar")
    schema = without_notes(schema)
    choices = [key for key in _CHOICES if key in schema]
    for key, value in schema.items():
        if key not in _SUPPORTED and key not in _CHOICES and (value or key == "not"):
            raise unsupported(f"The schema of a tool has the keyword {key!r:.100}.")
    if "$ref" in schema:
        target = resolve(schema.pop("$ref"), root)
        return _both(target, schema, root, steps, depth)
    if choices:
        parts = schema.pop(choices[0])
        if not isinstance(parts, list):
            raise invalid("tools", f"{choices[0]} must be a list.", "invalid_grammar")
        if choices[0] == "allOf":
            if len(parts) != 1:
                raise unsupported("The schema of a tool has allOf with more than one schema.")
            return _both(parts[0], schema, root, steps, depth)
        found = [_both(part, schema, root, steps, depth) for part in parts]
        if choices[0] == "oneOf":
            _check_apart(found)
        return [option for options in found for option in options]
    return _simple(schema)


def _both(
    part: Any,
    beside: Mapping[str, Any],
    root: Mapping[str, Any],
    steps: list[None],
    depth: int,
) -> list[dict[str, Any]]:
    """Return what follows `part` and the keywords `beside` it."""
    if not beside or not isinstance(part, Mapping):
        return options_of(part, root, steps, depth + 1)
    if "$ref" in part:
        target = resolve(part["$ref"], root)
        part = {key: value for key, value in part.items() if key != "$ref"}
        part = {**target, **part} if isinstance(target, Mapping) else part
    for key, value in beside.items():
        if part.get(key, value) != value:
            raise unsupported(f"The schema of a tool has {key!r:.100} beside a choice or $ref.")
    return options_of({**beside, **part}, root, steps, depth + 1)


def _simple(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options of a schema without references and choices."""
    names = schema.get("type")
    types = [names] if isinstance(names, str) else names
    if types is not None and not (
        isinstance(types, list) and all(isinstance(t, str) and t in _TYPES for t in types)
    ):
        raise invalid("tools", f"{str(names)!r:.100} is not a type.", "invalid_grammar")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list):
            raise invalid("tools", "enum must be a list.", "invalid_grammar")
        return [{"const": value} for value in values if types is None or types_of(value) & {*types}]
    if types is None:
        found = [name for name, keywords in _KEYWORDS.items() if keywords & schema.keys()]
        if not found:
            return [{}]
        if found not in (["object"], ["array"]):
            raise unsupported("The schema of a tool has keywords of a type and no type.")
        types = found
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise invalid("tools", "properties or required is wrong.", "invalid_grammar")
    if not all(isinstance(name, str) for name in required):
        raise invalid("tools", "required must be a list of names.", "invalid_grammar")
    return [
        {"type": name} | {key: schema[key] for key in sorted(_KEYWORDS[name] & schema.keys())}
        for name in types
    ]


_KEYWORDS: dict[str, frozenset[str]] = {
    "string": _STRING,
    "integer": _NUMBER,
    "number": _NUMBER,
    "boolean": frozenset(),
    "null": frozenset(),
    "array": _ARRAY,
    "object": _OBJECT,
}


def _check_apart(found: list[list[dict[str, Any]]]) -> None:
    """Raise ApiError if a value may follow more than one of the schemas of a oneOf."""
    if sum(map(len, found)) > _MAX_APART:
        raise unsupported(f"The schema of a tool has a oneOf of over {_MAX_APART} schemas.")
    for index, first in enumerate(found):
        for second in found[index + 1 :]:
            if not all(_are_apart(a, b) for a in first for b in second):
                raise unsupported("The schema of a tool has a oneOf whose schemas overlap.")


def _are_apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether no value follows two simple schemas; False when that is not clear."""
    if "const" in first and "const" in second:
        return bool(first["const"] != second["const"])
    if not (first and second) or _option_types(first) & _option_types(second):
        return _tags_differ(first, second)
    return True


def _option_types(option: Mapping[str, Any]) -> frozenset[str]:
    if "const" in option:
        return types_of(option["const"])
    name = option["type"]
    return frozenset({"integer", "number"} if name in ("integer", "number") else {name})


def _tags_differ(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether a property that both objects must have has other values in each."""
    for name in {*first.get("required", ())} & {*second.get("required", ())}:
        values = [_constants(option.get("properties", {}).get(name)) for option in (first, second)]
        if all(values) and not any(value in values[1] for value in values[0]):
            return True
    return False


def _constants(schema: Any) -> list[Any]:
    """Return the only values that a property's schema allows; []: not known."""
    if not isinstance(schema, Mapping):
        return []
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else []
