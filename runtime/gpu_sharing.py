"""Sharing a GPU: MPS (several processes at the same time) and MIG (hardware partitions of a GPU).

MPS's daemon is started by the operator, `nvidia-cuda-mps-control -d`. Processes find it by its pipe
directory. MIG instances are named by CUDA_VISIBLE_DEVICES=MIG-UUID; a process sees one of them.
Nothing heavy is imported.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmkit.common.errors import ShortageError, UsageError
from llmkit.common.formatting import nearest

THREADS_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
_DEFAULT_PIPES = "/tmp/nvidia-mps"  # noqa: S108 -- MPS's own default
_CONTROL_PIPE = "control"
MPS_FORM = "NAME=PERCENT was expected, such as chat=70, from 1 to 100"


def mps_pipe_directory() -> Path:
    """Where CUDA programs of this environment look for MPS."""
    return Path(os.environ.get(_PIPE_VARIABLE) or _DEFAULT_PIPES)


def has_mps() -> bool:
    """Whether MPS's control pipe is there."""
    return (mps_pipe_directory() / _CONTROL_PIPE).exists()


def parse_mps_shares(
    words: Sequence[str], local_models: Collection[str], device: str
) -> dict[str, int]:
    """The percent of the GPU's threads for each model, from words such as "chat=70".

    Raises UsageError for a wrong word, and ShortageError when MPS does not run.
    """
    shares: dict[str, int] = {}
    for word in words:
        name, _, percent = word.rpartition("=")
        if not name or not percent.isdecimal() or not 1 <= int(percent) <= 100:
            raise UsageError(f"--mps-share {word!r} is not understood", MPS_FORM)
        if name not in local_models:
            raise UsageError(
                f"--mps-share {word}: {name!r} is not a model that this server loads",
                nearest(name, list(local_models), "Models are"),
            )
        if name in shares:
            raise UsageError(f"--mps-share {word}: {name!r} has a share already")
        shares[name] = int(percent)
    if shares and device == "cpu":
        raise UsageError("--mps-share is for GPUs, and --device is cpu")
    if shares and not has_mps():
        raise ShortageError(
            f"--mps-share needs MPS, and {mps_pipe_directory()} has no control pipe of it",
            todo="Start `nvidia-cuda-mps-control -d` as this user, or leave --mps-share out",
        )
    return shares


def mps_environment(percent: int | None) -> dict[str, str]:
    """The variables of a process that may use `percent` of the GPU's threads; None: all."""
    return {} if percent is None else {THREADS_VARIABLE: str(percent)}


def gpu_sharing() -> dict[str, Any]:
    """What `llmkit doctor` shows: MPS, and MIG of each GPU of the machine.

    Without NVML (the `gpu` extra) no GPU is listed.
    """
    return {
        "mps": {
            "running": has_mps(),
            "pipe_directory": str(mps_pipe_directory()),
            "active_thread_percentage": os.environ.get(THREADS_VARIABLE),
        },
        "mig": _mig_of_gpus(),
    }


def _mig_of_gpus() -> list[dict[str, Any]]:
    with suppress(Exception):  # NVML's error classes are in the module that may be missing
        import pynvml  # an optional dependency

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return [_mig_of_gpu(pynvml, index) for index in range(count)]
    return []


def _mig_of_gpu(nvml: Any, index: int) -> dict[str, Any]:
    """A GPU that cannot be divided has no mode, which is an error of NVML."""
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    enabled = False
    instances = []
    with suppress(Exception):
        enabled = nvml.nvmlDeviceGetMigMode(gpu)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu) if enabled else 0):
        with suppress(Exception):  # the place is empty
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, place)
            instances.append(
                {
                    "uuid": _text(nvml.nvmlDeviceGetUUID(instance)),
                    "name": _text(nvml.nvmlDeviceGetName(instance)),
                    "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(instance).total,
                }
            )
    name = _text(nvml.nvmlDeviceGetName(gpu))
    return {"index": index, "name": name, "enabled": enabled, "instances": instances}


def _text(value: str | bytes) -> str:
    """Older versions of NVML's binding give bytes."""
    return value.decode() if isinstance(value, bytes) else value
