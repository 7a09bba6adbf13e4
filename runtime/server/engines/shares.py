"""What of the machine each of several engine processes may use."""

from __future__ import annotations

import os
from pathlib import Path

from llmkit.checkpoint.errors import ShortageError


def shares(count: int, device: str) -> list[dict[str, str]]:
    """The environment variables that give each of `count` processes its CPU threads and its GPUs.

    `device`: "auto", "cuda" or "cpu". Raises ShortageError for fewer GPUs than processes, where there are some.
    """
    if count == 1:
        return [{}]
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdigit() else len(os.sched_getaffinity(0))
    gpus = [] if device == "cpu" else visible_gpus()
    each = len(gpus) // count
    if gpus and not each:
        todo = f"Use --dp {len(gpus)} or less, or --device cpu"
        raise ShortageError(f"{count} replicas need a GPU each, and there are {len(gpus)}", todo=todo)
    return [
        {"OMP_NUM_THREADS": str(max(1, threads // count))}
        | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * each : (index + 1) * each])} if gpus else {})
        for index in range(count)
    ]


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would show to a process of ours, by their numbers or names."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name for part in told.split(",") if (name := part.strip()) not in ("", "-1")]
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
