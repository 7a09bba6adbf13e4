"""`--mode startup`: the time from `llmkit serve` to the first token, in stages."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from llmkit.bench.backends import ServedBackend
from llmkit.bench.bench_metrics import STAGE_PREFIX, STARTUP, require_complete
from llmkit.bench.page_cache import set_page_cache_state
from llmkit.bench.workload import WorkloadRequest
from llmkit.checkpoint.checkpoint import Checkpoint

REST = "the rest"
# The stages of every start. The server's JSON output names them; REST is the remaining time.
STARTUP_STAGES = (
    "checkpoint check",
    "memory plan",
    "building",
    "waiting for the disk",
    "KV cache",
    REST,
)
FIRST_REQUEST = WorkloadRequest("first", tuple(range(16, 32)), 1)


def measure_startup(
    backend: ServedBackend, checkpoint: Checkpoint, page_cache: str
) -> tuple[dict[str, float], float]:
    """Start a server, send it one request for one token, and stop it.

    page_cache: one of PAGE_CACHE_STATES. Returns the metrics of the start and the peak host memory
    in bytes. Raises the error that the server ended with, and as `set_page_cache_state` does.
    """
    try:
        weight_files = [checkpoint.folder / name for name in checkpoint.weight_files]
        cached_share = set_page_cache_state(weight_files, page_cache)
        ready_s = backend.start()["ready_s"]
        run = backend.run([FIRST_REQUEST], 1)
        require_complete(run.timelines, backend.name, STARTUP)
        stages = backend.startup_stages()
    finally:
        peak_bytes = backend.stop().get("peak_memory_bytes", 0.0)
    stages[REST] = max(0.0, ready_s - sum(stages.values()))
    stage_metrics = {stage_metric_name(stage): seconds for stage, seconds in stages.items()}
    metrics = {
        "ready_s": ready_s,
        "first_token_s": ready_s + run.timelines[0].ttft_s,
        **stage_metrics,
        "cached_share": cached_share,
    }
    return metrics, peak_bytes


def describe_startup(rounds: int, page_cache: str) -> dict[str, Any]:
    """The report's description of the workload."""
    where = "in" if page_cache == "warm" else "not in"
    prompt_tokens = len(FIRST_REQUEST.prompt)
    about = f"weights {where} the page cache, then a prompt of {prompt_tokens} tokens"
    scenario = {"name": STARTUP, "requests": 1, "clients": 1, "about": about}
    document: dict[str, Any] = {"rounds": rounds, "page_cache": page_cache, "scenarios": [scenario]}
    return {"sha256": hashlib.sha256(json.dumps(document).encode()).hexdigest(), **document}


def stage_metric_name(stage: str) -> str:
    """The metric of a stage: "KV cache" gives "stage_kv_cache_s"."""
    return f"{STAGE_PREFIX}{'_'.join(re.findall('[a-z0-9]+', stage.lower()))}_s"
