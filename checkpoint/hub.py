"""Downloads a model from the Hugging Face hub: safetensors, JSON and tokenizer files.

Code and pickle files are never downloaded.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from llmkit.common.errors import InputError
from llmkit.common.formatting import shortened

HUB_SCHEME = "hf://"
SIGNATURE = "model.sig"  # written by the OpenSSF model-signing library
ALLOWED_PATTERNS = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "report.html",
    SIGNATURE,
]
# Subfolders hold other exports of the same weights (onnx/, original/). A consolidated file holds
# the same weights as the sharded files.
IGNORED_PATTERNS = ["*/*", "consolidated*.safetensors"]


def is_hub_id(reference: str) -> bool:
    """Whether `reference` has the form organization/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", reference) is not None


def is_hub_url(reference: str) -> bool:
    """Whether `reference` has the form hf://organization/name."""
    return reference.startswith(HUB_SCHEME) and is_hub_id(reference.removeprefix(HUB_SCHEME))


def is_url(reference: str) -> bool:
    """Whether `reference` has the form of a URL, scheme:/..."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", reference) is not None


def is_allowed_file(name: str) -> bool:
    """Whether a checkpoint may hold a file of this name: no code, no pickle, no subfolder."""
    allowed = any(fnmatch(name, pattern) for pattern in ALLOWED_PATTERNS)
    return allowed and not any(fnmatch(name, pattern) for pattern in IGNORED_PATTERNS)


def download_from_hub(hub_id: str) -> Path:
    """The local folder of a hub model, from the cache or downloaded. HF_HUB_OFFLINE is respected.

    Raises InputError when there is no such model, no access to it, or no network.
    """
    # Only needed for a hub id, and slow to import.
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=ALLOWED_PATTERNS, ignore_patterns=IGNORED_PATTERNS
            )
        )
    # The hub's client raises its own errors, those of requests and httpx, and OSError.
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{hub_id} is not a path here and not in the hub's cache, and HF_HUB_OFFLINE"
                " forbids a download",
                "A directory, a cached hub id or a .gguf file was expected",
                "Check the spelling, or unset HF_HUB_OFFLINE",
            ) from error
        reason = shortened(str(error), 200) or type(error).__name__
        raise InputError(
            f"{hub_id} is not a path here and could not be fetched from the hub ({reason})",
            "A directory, a hub id or a .gguf file was expected",
            "Check the spelling, the network and HF_TOKEN",
        ) from error
