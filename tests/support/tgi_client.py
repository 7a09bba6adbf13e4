"""huggingface_hub's InferenceClient of a server under test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import huggingface_hub
import pytest


@contextlib.contextmanager
def inference_client(
    url: str, token: str | None = None
) -> Iterator[huggingface_hub.InferenceClient]:
    """Yield a client of the server at `url`, which is on this machine.

    Tests forbid the package to reach the hub, and it takes every server for the hub.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield huggingface_hub.InferenceClient(url, token=token)
