"""Models with a classification head in place of the output projection: classifiers, rerankers.

Their architecture is that of a text model with another ending (`Qwen3ForSequenceClassification`).
The head is a linear without a bias that reads the last token's hidden state and has a row for each
label, as transformers' `GenericForSequenceClassification` computes it. A reranker has one label.
"""

from __future__ import annotations

from typing import Any

from llmkit.common.errors import InputError

HEAD_MODULE = "score"  # the head's module in checkpoints
_ENDING = "ForSequenceClassification"
# Architectures whose text model does not have the name that follows from their own.
_OTHER_TEXT_MODELS = {"Gemma3TextForSequenceClassification": "Gemma3ForCausalLM"}
_DEFAULT_LABELS = 2  # of transformers, for a config.json that names none


def is_classifier(architecture: str) -> bool:
    """Whether models of the architecture have a classification head."""
    return architecture.endswith(_ENDING)


def text_architecture(architecture: str) -> str:
    """The architecture of a classifier's layers: that of the text model it was made of."""
    stem = architecture.removesuffix(_ENDING)
    return _OTHER_TEXT_MODELS.get(architecture, f"{stem}ForCausalLM")


def num_labels(config: dict[str, Any]) -> int:
    """The rows of the classification head. Raises InputError for a config without any label."""
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", _DEFAULT_LABELS)
    if type(count) is not int or count < 1:
        raise InputError(f"config.json has {count!r} labels", "id2label with a name for each label")
    return count


def not_supported(architecture: str) -> InputError:
    """The error for a classifier whose layers are of no family of llmkit's own."""
    return InputError(
        f"unsupported architecture ({architecture}): its layers are of no decoder family of"
        " llmkit's own",
        "A classification head on a decoder, such as Qwen3ForSequenceClassification."
        " Encoders such as BERT do not run",
        "Use a reranker or classifier that is made of a text model of docs/models.md",
    )
