"""Shared test set-up: one thread per process (tests run side by side), and `import tiny` from any test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import httpx
    import openai
    from serving import ServerProcess

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parent))

with suppress(ImportError):  # kernels are compiled for GPUs in tests, though llmkit imports Triton only where one is
    import triton  # noqa: F401


@pytest.fixture(scope="module")
def short_builtin_text() -> Iterator[None]:
    """A tenth of the builtin text: tokenizing all of it would be most of the time of the tests that quantize."""
    from llmkit.quant import text

    with pytest.MonkeyPatch.context() as patch:
        short = text.builtin_text()[:50_000]
        patch.setattr(text, "builtin_text", lambda: short)
        yield


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """OpenAI's own, of a module's `server`."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """A plain client of a module's `server`."""
    with server.client() as client:
        yield client
