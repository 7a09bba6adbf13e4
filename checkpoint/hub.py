"""Fetching a model from the Hugging Face hub: safetensors, JSON and tokenizer files only, never code or pickle."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from llmkit.checkpoint.errors import InputError

SIGNATURE = "model.sig"  # of the OpenSSF model-signing library
WANTED = [
    "*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*",
    "report.html", SIGNATURE,
]  # fmt: skip
# Subfolders hold other exports of the same weights (onnx/, original/); consolidated files repeat the shards.
UNWANTED = ["*/*", "consolidated*.safetensors"]


def looks_like_hub_id(reference: str) -> bool:
    """Whether `reference` has the form organization/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", reference) is not None


def looks_remote(reference: str) -> bool:
    """Whether `reference` has the form of a URL, scheme:/..."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", reference) is not None


def is_wanted(name: str) -> bool:
    """Whether a file of this name may be part of a checkpoint: no code, no pickle, in no subfolder."""
    return any(fnmatch(name, form) for form in WANTED) and not any(fnmatch(name, form) for form in UNWANTED)


def fetch(reference: str) -> Path:
    """The local folder of the hub model `reference`, downloaded or from the cache (HF_HUB_OFFLINE is respected).

    Raises InputError when there is no such model, no access to it, or no network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(reference, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:  # the hub's client raises errors of its own, of requests, of httpx and OSError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{reference} is not a path here and could not be fetched from the hub ({reason})",
            "A directory, a hub id or a .gguf file was expected",
            "Check the spelling, the network and HF_TOKEN",
        ) from error
