"""Divides the machine's CPU threads and GPUs among the engine processes of one server."""

from __future__ import annotations

import os
from pathlib import Path

from llmkit.common.cpu_threads import choose_threads
from llmkit.common.errors import ShortageError


def replica_environments(
    count: int, device: str, threads: int | None = None
) -> list[dict[str, str]]:
    """Return the environment variables that give each process its CPU threads and GPUs.

    `count` is the number of processes. `device` is "auto", "cuda" or "cpu". `threads` is for all of
    them together; None: as many as this process may use. Raises ShortageError when there are GPUs,
    but fewer than processes.
    """
    if count == 1:
        return [{}]
    num_threads = choose_threads(threads).count
    gpus = [] if device == "cpu" else visible_gpus()
    gpus_each = len(gpus) // count
    if gpus and not gpus_each:
        raise ShortageError(
            f"{count} replicas need a GPU each, and there are {len(gpus)}",
            todo=f"Use --dp {len(gpus)} or less, or --device cpu",
        )
    environments = []
    for index in range(count):
        environment = {"OMP_NUM_THREADS": str(max(1, num_threads // count))}
        if gpus:
            own_gpus = gpus[index * gpus_each : (index + 1) * gpus_each]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own_gpus)
        environments.append(environment)
    return environments


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA shows to a child process, by number or name."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    names = [part.strip() for part in variable.split(",")]
    return [name for name in names if name not in ("", "-1")]
