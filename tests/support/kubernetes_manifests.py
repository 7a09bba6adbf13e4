"""llmkit's Kubernetes objects: those of recipes/kubernetes and of `llmkit deploy vllm`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmkit.deploy.gateway_route import RouteTemplate, Traffic, new_route
from llmkit.deploy.pre_scaling import ReplicaSchedule, scaled_object
from llmkit.deploy.vllm_devices import ACCELERATORS, DEVICES
from llmkit.deploy.vllm_on_ray import VllmDeployment, render_deployment

FOLDER = Path(__file__).parents[2] / "recipes" / "kubernetes"
PATCHES = {
    FOLDER / "components/spot/deployment.yaml",
    FOLDER / "components/hub/deployment.yaml",
    FOLDER / "components/mps/deployment.yaml",
    FOLDER / "components/mig/deployment.yaml",
    FOLDER / "next/configmap.yaml",
    FOLDER / "llm-d/deployment.yaml",
}


def objects() -> Iterator[dict[str, Any]]:
    """Every object that has a kind, without kustomize's own files and patches."""
    texts = [path.read_text() for path in sorted(FOLDER.rglob("*.yaml")) if path not in PATCHES]
    for nodes in (1, 2):
        deployment = VllmDeployment("big", "/models/big", 8, nodes, 32_768, 8)
        texts += [render_deployment(deployment, "lws"), render_deployment(deployment, "kserve")]
    for name in ("gaudi3", "trn2", "v6e"):
        deployment = _device_deployment(name)
        texts += [render_deployment(deployment, "lws"), render_deployment(deployment, "kserve")]
    texts.append(new_route(RouteTemplate("chat", "llmkit", 80, 10), Traffic("a", "b", 0.01)))
    texts.append(yaml.safe_dump(_pre_scaled()))
    for text in texts:
        for document in yaml.safe_load_all(text):
            if document and "kustomize" not in document.get("apiVersion", "kustomize"):
                yield document


def _device_deployment(name: str) -> VllmDeployment:
    """vLLM on four chips of an accelerator other than CUDA's."""
    accelerator = ACCELERATORS[name]
    return VllmDeployment(
        f"big-{name}",
        "/models/big",
        4 * accelerator.cores,
        1,
        32_768,
        4,
        device=DEVICES[accelerator.device],
        cores=accelerator.cores,
        node_selector=accelerator.node_selector(4),
        format_environment=(("MODEL_IMPL_TYPE", "vllm"),),
    )


def _pre_scaled() -> dict[str, Any]:
    """What `llmkit plan --pre-scale` writes."""
    recipe = FOLDER / "components/keda/scaledobject.yaml"
    schedule = ReplicaSchedule("day", "Europe/Berlin", (1,) * 8 + (9,) * 12 + (1,) * 4, 5)
    return scaled_object(schedule, yaml.safe_load(recipe.read_text()), recipe.name)


def is_core(document: dict[str, Any]) -> bool:
    """Whether Kubernetes itself defines the object's kind."""
    group = document["apiVersion"].rpartition("/")[0]
    others = ("x-k8s", "inference", "gateway")
    return "." not in group or (
        group.endswith(".k8s.io") and not any(other in group for other in others)
    )


def kind(document: dict[str, Any]) -> str:
    return str(document["kind"])
