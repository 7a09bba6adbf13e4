"""Kubernetes objects that llmkit comes with: those of recipes/kubernetes and those that `llmkit deploy vllm` writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmkit.deploy.vllm import HandOver, written

FOLDER = Path(__file__).parents[1] / "recipes" / "kubernetes"
PATCHES = {
    FOLDER / "components/spot/deployment.yaml",
    FOLDER / "components/hub/deployment.yaml",
    FOLDER / "llm-d/deployment.yaml",
}


def objects() -> Iterator[dict[str, Any]]:
    """Everything that has a kind, but for kustomize's own files and patches."""
    texts = [path.read_text() for path in sorted(FOLDER.rglob("*.yaml")) if path not in PATCHES]
    for nodes in (1, 2):
        hand_over = HandOver("big", "/models/big", 8, nodes, 32_768, 8)
        texts += [written(hand_over, "lws"), written(hand_over, "kserve")]
    for text in texts:
        for document in yaml.safe_load_all(text):
            if document and "kustomize" not in document.get("apiVersion", "kustomize"):
                yield document


def is_core(document: dict[str, Any]) -> bool:
    """Whether Kubernetes itself defines it."""
    group = document["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and "x-k8s" not in group and "inference" not in group)


def kind(document: dict[str, Any]) -> str:
    return str(document["kind"])
