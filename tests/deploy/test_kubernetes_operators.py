"""Objects of operators, checked with models of their definitions.

The models come from PyPI, or from data/operators.yaml for operators that PyPI has no models of.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import operator
import re
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource
from support.kubernetes_manifests import is_core, kind, objects
from support.operator_definitions import DOCUMENTS, compare

SOURCES, OURS = DOCUMENTS
OBJECTS = [one for one in objects() if not is_core(one)]
FREE = re.compile(
    r"(annotations|labels|matchLabels|nodeSelector|requests|limits|rayStartParams"
    r"|triggers\.\d+\.metadata)$"
)
Key = tuple[str, str]  # apiVersion and kind


def strict(schema: Any) -> Any:
    """A schema under which an unknown field is wrong."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(one) for name, one in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made = {name: one for name, one in made.items() if name not in ("anyOf", "type", "pattern")}
    return made


@functools.cache
def kubernetes() -> Any:
    """Kubernetes' own definitions, in which an unknown field is wrong."""
    version = kubernetes_validate.latest_version()
    return schema_contents(
        f"kubernetes-json-schema/v{version}-local-strict/_definitions.json", version
    )


@functools.cache
def kserve(name: str) -> Any:
    """The schema of a type of KServe's SDK. Its source is parsed: an import needs more packages."""
    if name.startswith("list["):
        return {"type": "array", "items": kserve(name[5:-1])}
    if name.startswith("dict(str, "):
        return {"type": "object", "additionalProperties": kserve(name[10:-1])}
    if scalar := {"str": "string", "int": "integer", "bool": "boolean", "float": "number"}.get(
        name
    ):
        return {"type": scalar}
    for group in ("io.k8s.api.core.v1", "io.k8s.apimachinery.pkg.apis.meta.v1"):
        if f"{group}.{name.removeprefix('V1')}" in kubernetes()["$defs"]:
            return {"$ref": f"{kubernetes()['$id']}#/$defs/{group}.{name.removeprefix('V1')}"}
    spec = importlib.util.find_spec("kserve")
    assert spec and spec.submodule_search_locations, "pip install --no-deps kserve"
    models = Path(spec.submodule_search_locations[0], "models").glob("*.py")
    source = next(
        (one.read_text() for one in models if one.stem.replace("_", "") == name.lower()), None
    )
    if source is None:
        return False  # not described: who uses such a field has to find its description
    types, names = (
        literal_eval(one)
        for one in re.findall(r" (?:openapi_types|attribute_map) = (\{.*?\})", source, re.S)
    )
    always = [
        names[one]
        for one in re.findall(r"^        self\.(\w+) = \1$", source, re.M)
        if one in names
    ]
    return {
        "properties": {names[one]: kserve(types[one]) for one in types},
        "type": "object",
        "required": always,
    }


@functools.cache
def schemas() -> dict[Key, Any]:
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

    found: dict[Key, Any] = {
        ("keda.sh/v1alpha1", "ScaledObject"): ScaledObject.model_json_schema(),
        ("monitoring.coreos.com/v1", "ServiceMonitor"): ServiceMonitor.model_json_schema(),
        ("serving.kserve.io/v1alpha1", "ServingRuntime"): kserve("V1alpha1ServingRuntime"),
        ("serving.kserve.io/v1beta1", "InferenceService"): kserve("V1beta1InferenceService"),
    }
    for version, kinds in OURS.items():
        for name, schema in kinds.items():
            common = {"apiVersion": {"const": version}, "kind": {"const": name}}
            if "spec" in schema["properties"]:
                common["metadata"] = kserve("V1ObjectMeta")
            found[version, name] = schema | {"properties": schema["properties"] | common}
    return {key: strict(schema) for key, schema in found.items()}


def validator(document: dict[str, Any]) -> Any:
    registry: Any = Resource.from_contents(kubernetes()) @ Registry()
    schema = schemas()[document["apiVersion"], document["kind"]]
    return jsonschema.Draft202012Validator(schema, registry=registry)


def test_operator_descriptions_each_have_an_object() -> None:
    assert set(schemas()) == {(one["apiVersion"], one["kind"]) for one in OBJECTS}


@pytest.mark.parametrize("document", OBJECTS, ids=kind)
def test_operator_objects_match_their_descriptions(document: dict[str, Any]) -> None:
    validator(document).validate(document)


def spots(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something in a document."""
    for key in (
        node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    ):
        yield (*path, key)
        yield from spots(node[key], (*path, key))


@pytest.mark.parametrize("document", OBJECTS, ids=kind)
def test_operator_object_with_a_wrong_field_or_type_is_refused(document: dict[str, Any]) -> None:
    check = validator(document)
    for *path, last in spots(document):
        wrong = copy.deepcopy(document)
        parent = functools.reduce(operator.getitem, path, wrong)
        value = parent[last]
        parent[last] = [[]]
        assert not check.is_valid(wrong), (path, last)
        if isinstance(last, str) and not FREE.search(".".join(map(str, path))):
            del parent[last]
            parent[f"{last}x"] = value
            assert not check.is_valid(wrong), (path, f"{last}x")


def definition(version: str, kinds: dict[str, Any]) -> str:
    """Descriptions in the form of CustomResourceDefinitions."""
    group, _, name = version.rpartition("/")
    return yaml.safe_dump_all(
        {
            "kind": "CustomResourceDefinition",
            "spec": {
                "group": group,
                "names": {"kind": kind_name},
                "versions": [{"name": name, "schema": {"openAPIV3Schema": resolved(schema)}}],
            },
        }
        for kind_name, schema in kinds.items()
    )


def resolved(schema: Any) -> Any:
    """A schema with an object in the place of each reference to Kubernetes' own."""
    if isinstance(schema, list):
        return [resolved(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {"type": "object"} if "$ref" in schema else {k: resolved(v) for k, v in schema.items()}


def test_operator_descriptions_name_their_sources() -> None:
    without_definition = {"llm-d.ai/v1alpha1"}  # a file, which no cluster stores
    assert set(SOURCES) == set(OURS) - without_definition
    for sources in SOURCES.values():
        for source in sources:
            assert set(source) == {"project", "version", "file", "sha256"}
            assert re.fullmatch(r"v[0-9.]+", source["version"])
            assert re.fullmatch(r"[0-9a-f]{64}", source["sha256"])


def test_operator_descriptions_are_compared_with_definitions(tmp_path: Path) -> None:
    for version in SOURCES:
        (tmp_path / f"{version.replace('/', '_')}.yaml").write_text(
            definition(version, OURS[version])
        )
    assert compare(tmp_path) == []
    wrong = resolved(OURS["leaderworkerset.x-k8s.io/v1"])
    spec = wrong["LeaderWorkerSet"]["properties"]["spec"]
    spec["properties"]["replicas"]["maximum"] = 10
    spec["properties"]["template"] = spec["properties"].pop("leaderWorkerTemplate")
    path = tmp_path / "leaderworkerset.x-k8s.io_v1.yaml"
    path.write_text(definition("leaderworkerset.x-k8s.io/v1", wrong))
    differences = compare(tmp_path)
    assert differences == [
        "leaderworkerset.x-k8s.io/v1 LeaderWorkerSet.spec.replicas: maximum",
        "leaderworkerset.x-k8s.io/v1 LeaderWorkerSet.spec.leaderWorkerTemplate: unknown",
    ]
    path.unlink()
    assert compare(tmp_path) == ["leaderworkerset.x-k8s.io/v1 LeaderWorkerSet: no definition"]
