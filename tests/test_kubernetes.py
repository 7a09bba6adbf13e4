"""recipes/kubernetes: valid by Kubernetes' own schemas, and true of the server that they start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from serving import ServerProcess
from tiny import tiny_checkpoint

from llmkit.cli.serve import serve_options
from llmkit.deploy.vllm import HandOver, written

FOLDER = Path(__file__).parents[1] / "recipes" / "kubernetes"
BUILDS = ("", "llm-d", *(f"components/{one.name}" for one in sorted((FOLDER / "components").iterdir())))
CRDS = os.environ.get("LLMKIT_CRDS")  # a folder of CustomResourceDefinitions, of the operators' releases
PATCHES = {
    FOLDER / "components/spot/deployment.yaml",
    FOLDER / "components/hub/deployment.yaml",
    FOLDER / "llm-d/deployment.yaml",
}


def objects() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Everything that has a kind, but for kustomize's own files and patches."""
    for path in sorted(FOLDER.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()) if path not in PATCHES else ():
            if document and "kustomize" not in document.get("apiVersion", "kustomize"):
                yield path, document


def is_core(document: dict[str, Any]) -> bool:
    group = document["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and "x-k8s" not in group and "inference" not in group)


def named(document: dict[str, Any]) -> str:
    return f"{document['kind']}"


@pytest.mark.parametrize("document", [one for _, one in objects() if is_core(one)], ids=named)
def test_objects_follow_kubernetes_own_schemas(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_a_wrong_object_does_not() -> None:
    (document,) = (one for path, one in objects() if path.name == "hpa.yaml")
    document["spec"]["maxReplica"] = document["spec"].pop("maxReplicas")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def build(part: str, tmp_path: Path) -> list[dict[str, Any]]:
    folder = shutil.copytree(FOLDER, tmp_path / "kubernetes")
    if part.startswith("components/"):
        (folder / "kustomization.yaml").write_text(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
            f"resources: [base]\ncomponents: [{part}]\n"
        )
        part = ""
    made = subprocess.run(["kubectl", "kustomize", folder / part], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(made.stdout))


def arguments(deployment: dict[str, Any]) -> list[str]:
    args: list[str] = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return args


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
@pytest.mark.parametrize("part", BUILDS)
def test_kustomize_builds_it(part: str, tmp_path: Path) -> None:
    made = build(part, tmp_path)
    for document in made:
        if is_core(document):
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    (deployment,) = (one for one in made if one["kind"] == "Deployment" and one["metadata"]["name"] == "llmkit")
    pod = deployment["spec"]["template"]["spec"]
    drain = next(float(one.partition("=")[2]) for one in arguments(deployment) if one.startswith("--drain-timeout="))
    stop = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert stop + drain < pod["terminationGracePeriodSeconds"]
    names = {one["metadata"]["name"] for one in made if one["kind"] == "PersistentVolumeClaim"}
    claims = {one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"] if "persistentVolumeClaim" in one}
    assert claims == names


def test_serve_takes_the_arguments(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    found = 0
    for path in FOLDER.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            if not document or not (args := re.findall(r"args': (\[[^\]]*\])", str(document))):
                continue
            words = [one.replace("/etc/llmkit/keys", str(tmp_path / "keys")) for one in yaml.safe_load(args[0])]
            assert words[0] == "serve"
            options = serve_options("model", "name", words[2:], None)
            assert options.host == "0.0.0.0" and options.drain_timeout >= 90
            found += 1
    assert found == 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("kubernetes")
    keys = folder / "keys"
    keys.write_text("secret\n")
    model = tiny_checkpoint(folder / "model")
    server = ServerProcess(folder / "log", model, "secret", api_key_file=str(keys), open_metrics=True).wait_ready()
    yield server
    server.stop()


def test_probes_and_metrics_are_the_servers(server: ServerProcess) -> None:
    text = "".join(path.read_text() for path in FOLDER.rglob("*.yaml"))
    with server.client() as client:
        del client.headers["authorization"]  # probes send no key
        for path in set(re.findall(r"path: (/[a-z0-9/]*(?:ready|health|live)[a-z0-9/]*)", text)):
            assert client.get(path).status_code == 200, path
        metrics = client.get("/metrics")
        assert metrics.status_code == 200
        assert client.get("/v1/models").status_code == 401
    there = set(re.findall(r"^# TYPE (\S+)", metrics.text, re.MULTILINE))
    wanted = set(re.findall(r"llmkit:[a-z_]+", text))
    assert len(wanted) >= 4 and wanted <= there


def strict(schema: Any) -> Any:
    """A schema of a CustomResourceDefinition under which an unknown field is wrong."""
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


@pytest.mark.scale
@pytest.mark.skipif(not CRDS, reason="LLMKIT_CRDS names no folder of CustomResourceDefinitions")
def test_objects_of_operators_follow_their_definitions() -> None:
    definitions = {}
    for path in Path(str(CRDS)).glob("*.yaml"):
        for one in filter(None, yaml.safe_load_all(path.read_text())):
            for version in one["spec"]["versions"]:
                key = f"{one['spec']['group']}/{version['name']}", one["spec"]["names"]["kind"]
                definitions[key] = strict(version["schema"]["openAPIV3Schema"])
    two_nodes = HandOver("big", "/models/big", 8, 2, 32_768, 8)
    ours = [one for form in ("lws", "kserve") for one in yaml.safe_load_all(written(two_nodes, form))]  # type: ignore[arg-type]
    checked = set()
    for document in [*(one for _, one in objects()), *ours]:
        key = document["apiVersion"], document["kind"]
        if key not in definitions:
            assert is_core(document) or document["kind"] == "EndpointPickerConfig", f"no definition of {key}"
            continue
        definitions[key]["properties"] |= {"metadata": {"type": "object"}, "apiVersion": {}, "kind": {}}
        jsonschema.validate(document, definitions[key])
        checked.add(document["kind"])
    assert checked == {
        "InferencePool", "InferenceService", "LLMInferenceService", "LeaderWorkerSet", "ScaledObject", "ServiceMonitor",
        "ServingRuntime",
    }  # fmt: skip
