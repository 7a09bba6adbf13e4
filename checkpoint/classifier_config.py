"""What a checkpoint says about the labels that it gives to texts or to pairs of texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from llmkit.checkpoint.model_files import ModelFiles

# From the logits of labels to their scores. "classify": the softmax of several labels, the sigmoid
# of one.
Activation = Literal["classify", "sigmoid", "none"]

_ENDING = "ForSequenceClassification"
_PROBLEM_TYPES: dict[str, Activation] = {
    "regression": "none",
    "multi_label_classification": "sigmoid",
}
# The activations that sentence-transformers writes for rerankers, by the last part of their name.
_RERANKER_ACTIVATIONS: dict[str, Activation] = {
    "Identity": "none",
    "Sigmoid": "sigmoid",
    "Softmax": "classify",
}


@dataclass(frozen=True)
class ClassifierConfig:
    """The labels of a model, and how their logits become scores."""

    labels: tuple[str, ...] = ()  # of its classification head; (): the model generates text
    activation: Activation = "classify"  # of /classify
    # Of a pair's score; "" and others: the name of an activation that llmkit does not support.
    score_activation: str = "classify"
    # The tokens whose logits after the prompt say "no" and "yes" of a pair; (): there are none. A
    # model that generates text scores pairs with them (Qwen3-Reranker).
    label_tokens: tuple[str, ...] = ()

    @property
    def all_labels(self) -> tuple[str, ...]:
        """The labels of the head, or the tokens that stand for labels."""
        return self.labels or self.label_tokens

    def with_label_tokens(self, tokens: tuple[str, ...]) -> ClassifierConfig:
        """The config with these tokens as labels, unless there are none or the model has a head."""
        return replace(self, label_tokens=tokens) if tokens and not self.labels else self


def read_classifier_config(files: ModelFiles) -> ClassifierConfig:
    """The facts of a checkpoint's config.json."""
    config = files.config
    architectures = config.get("architectures") or [""]
    is_classifier = str(architectures[0]).endswith(_ENDING)
    tokens = config.get("classifier_from_token")
    label_tokens: tuple[str, ...] = ()
    if isinstance(tokens, list) and len(tokens) == 2:
        label_tokens = (str(tokens[0]), str(tokens[1]))
    return ClassifierConfig(
        labels=_labels(config) if is_classifier else (),
        activation=_PROBLEM_TYPES.get(str(config.get("problem_type")), "classify"),
        score_activation=_score_activation(config),
        label_tokens=() if is_classifier else label_tokens,
    )


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """The names of the labels, in the order of the head's rows."""
    names = config.get("id2label")
    if isinstance(names, dict):
        return tuple(str(names.get(str(index), index)) for index in range(len(names)))
    count = config.get("num_labels")
    return tuple(f"LABEL_{index}" for index in range(count if isinstance(count, int) else 2))


def _score_activation(config: dict[str, Any]) -> str:
    described = config.get("sentence_transformers")
    name = described.get("activation_fn") if isinstance(described, dict) else None
    name = name or config.get("sbert_ce_default_activation_function")
    if name is None:
        return "classify"
    word = str(name).rpartition(".")[2]
    return _RERANKER_ACTIVATIONS.get(word, word)
