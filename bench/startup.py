"""`--mode startup`: from the command that serves a checkpoint to its first token, in stages."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from llmkit.bench.metrics import STAGE, STARTUP, require_complete
from llmkit.bench.page_cache import prepare
from llmkit.bench.targets import ServedTarget
from llmkit.bench.workload import WorkloadRequest
from llmkit.checkpoint.source import Checkpoint

REST = "the rest"
STAGES = ("checkpoint check", "memory plan", "building", "waiting for the disk", "KV cache", REST)  # of every start
FIRST = WorkloadRequest("first", tuple(range(16, 32)), 1)


def measure_start(speed: ServedTarget, checkpoint: Checkpoint, page_cache: str) -> tuple[dict[str, float], float]:
    """Start a server, ask it for one token and stop it: the figures of the start, and the peak of memory in bytes.

    page_cache: of STATES. Raises what the server ended with, and as `prepare` does.
    """
    try:
        share = prepare([checkpoint.folder / name for name in checkpoint.weight_files], page_cache)
        ready_s = speed.start()["ready_s"]
        run = speed.run([FIRST], 1)
        require_complete(run.timelines, speed.name, STARTUP)
        stages = speed.stages()
    finally:
        peak = speed.stop().get("peak_memory_bytes", 0.0)
    stages[REST] = max(0.0, ready_s - sum(stages.values()))
    named = {stage_name(stage): spent for stage, spent in stages.items()}
    return {
        "ready_s": ready_s,
        "first_token_s": ready_s + run.timelines[0].ttft_s,
        **named,
        "cached_share": share,
    }, peak


def describe_starts(rounds: int, page_cache: str) -> dict[str, Any]:
    """What a report says of the work."""
    about = f"weights {'in' if page_cache == 'warm' else 'not in'} the page cache, then a prompt of {len(FIRST.prompt)}"
    scenario = {"name": STARTUP, "requests": 1, "clients": 1, "about": f"{about} tokens"}
    document: dict[str, Any] = {"rounds": rounds, "page_cache": page_cache, "scenarios": [scenario]}
    return {"sha256": hashlib.sha256(json.dumps(document).encode()).hexdigest(), **document}


def stage_name(stage: str) -> str:
    """The name of a stage's figure."""
    return f"{STAGE}{'_'.join(re.findall('[a-z0-9]+', stage.lower()))}_s"
