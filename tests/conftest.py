"""Shared test set-up: one thread per process (tests run side by side), and `import tiny` from any test."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parent))

with suppress(ImportError):  # kernels are compiled for GPUs in tests, though llmkit imports Triton only where one is
    import triton  # noqa: F401
