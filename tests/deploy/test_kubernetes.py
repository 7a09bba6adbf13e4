"""recipes/kubernetes: valid by Kubernetes' own schemas, and true of the server that they start."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from support.kubernetes_manifests import FOLDER, is_core, kind, objects
from support.server_process import LlmkitServer

from llmkit.cli.serve import serve_options

API_KEYS = ("secret",)
SERVER: dict[str, Any] = {"open_metrics": True}
BUILDS = (
    "",
    "llm-d",
    *(f"components/{one.name}" for one in sorted((FOLDER / "components").iterdir())),
)


@pytest.mark.parametrize("document", [one for one in objects() if is_core(one)], ids=kind)
def test_manifests_follow_kubernetes_schemas(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_wrong_manifest_fails_the_schema() -> None:
    (document,) = (one for one in objects() if kind(one) == "HorizontalPodAutoscaler")
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
    made = subprocess.run(
        ["kubectl", "kustomize", folder / part], capture_output=True, text=True, check=True
    )
    return list(yaml.safe_load_all(made.stdout))


def arguments(deployment: dict[str, Any]) -> list[str]:
    args: list[str] = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return args


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
@pytest.mark.parametrize("part", BUILDS)
def test_manifests_build_with_kustomize(part: str, tmp_path: Path) -> None:
    made = build(part, tmp_path)
    for document in made:
        if is_core(document):
            kubernetes_validate.validate(
                document, kubernetes_validate.latest_version(), strict=True
            )
    (deployment,) = (
        one for one in made if one["kind"] == "Deployment" and one["metadata"]["name"] == "llmkit"
    )
    pod = deployment["spec"]["template"]["spec"]
    drain = next(
        float(one.partition("=")[2])
        for one in arguments(deployment)
        if one.startswith("--drain-timeout=")
    )
    stop = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert stop + drain < pod["terminationGracePeriodSeconds"]
    names = {one["metadata"]["name"] for one in made if one["kind"] == "PersistentVolumeClaim"}
    claims = {
        one["persistentVolumeClaim"]["claimName"]
        for one in pod["volumes"]
        if "persistentVolumeClaim" in one
    }
    assert claims == names


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_manifests_share_a_gpu_by_mps_or_mig(tmp_path: Path) -> None:
    mps = build("components/mps", tmp_path / "mps")
    (config,) = (one for one in mps if one["metadata"]["name"] == "llmkit-gpu-sharing")
    (name,) = config["data"]
    assert yaml.safe_load(config["data"][name])["sharing"]["mps"]["resources"] == [
        {"name": "nvidia.com/gpu", "replicas": 4}
    ]
    (deployment,) = (one for one in mps if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/device-plugin.config": name}
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert "/dev/shm" not in mounts.values(), "the device plugin mounts MPS' own there"
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    mig = build("components/mig", tmp_path / "mig")
    (deployment,) = (one for one in mig if one["kind"] == "Deployment")
    limits = deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "32Gi", "nvidia.com/mig-1g.18gb": "1"}


def test_manifest_arguments_are_accepted_by_serve(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    found = 0
    for path in FOLDER.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            if not document or not (args := re.findall(r"args': (\[[^\]]*\])", str(document))):
                continue
            words = [
                one.replace("/etc/llmkit/keys", str(tmp_path / "keys"))
                for one in yaml.safe_load(args[0])
            ]
            assert words[0] == "serve"
            options = serve_options("model", "name", words[2:], None)
            assert options.host == "0.0.0.0" and options.drain_timeout >= 90
            found += 1
    assert found == 4


def test_manifest_probes_and_metrics_exist_in_the_server(server: LlmkitServer) -> None:
    text = "".join(path.read_text() for path in FOLDER.rglob("*.yaml"))
    with server.client() as client:
        del client.headers["authorization"]  # probes send no key
        for path in set(re.findall(r"path: (/[a-z0-9/]*(?:ready|health|live)[a-z0-9/]*)", text)):
            assert client.get(path).status_code == 200, path
        metrics = client.get("/metrics")
        assert metrics.status_code == 200
        assert client.get("/v1/models").status_code == 401
    exported = set(re.findall(r"^# TYPE (\S+)", metrics.text, re.MULTILINE))
    used = set(re.findall(r"llmkit:[a-z_]+", text))
    assert len(used) >= 4 and used <= exported
