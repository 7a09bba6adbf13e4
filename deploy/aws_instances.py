"""The GPUs of AWS' instance types."""

from __future__ import annotations

import re

from llmkit.common.errors import UsageError

# GPUs by family and size. A family's sizes that are not listed have one.
_GPUS: dict[str, dict[str, int]] = {
    "g4dn": {"12xlarge": 4, "metal": 8},
    "g5": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
    "g6": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
    "g6e": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
    "g7e": {"12xlarge": 2, "24xlarge": 4, "48xlarge": 8},
    "gr6": {},
    "p3": {"8xlarge": 4, "16xlarge": 8},
    "p4d": {"24xlarge": 8},
    "p4de": {"24xlarge": 8},
    "p5": {"48xlarge": 8},
    "p5e": {"48xlarge": 8},
    "p5en": {"48xlarge": 8},
    "p6-b200": {"48xlarge": 8},
    "p6-b300": {"48xlarge": 8},
}
# Families of AWS' and Intel's accelerators, and of those whose sizes have no entry above.
_OTHER_ACCELERATORS = re.compile(r"(inf|trn|dl)[0-9]")
_GPU_FAMILIES = re.compile(r"(g|p)[0-9r]")


def num_gpus(option: str, instance_type: str) -> int | None:
    """The GPUs of an instance type such as ml.g6e.12xlarge; None: the type is not known here.

    Raises UsageError for what is no type, and for one of other accelerators.
    """
    match = re.fullmatch(r"(?:ml\.)?([a-z][a-z0-9-]*)\.([a-z0-9-]+)", instance_type)
    if match is None:
        raise UsageError(
            f"{option}: {instance_type!r} is not an instance type", "Write it like ml.g6e.2xlarge"
        )
    family, size = match.groups()
    if _OTHER_ACCELERATORS.match(family):
        raise UsageError(
            f"{option}: {instance_type} has no NVIDIA GPU",
            "llmkit serves on NVIDIA GPUs and on CPUs",
            "Choose a type of the families g5, g6, g6e, p4d, p5 …, or c7i and m7i",
        )
    if family in _GPUS:
        return _GPUS[family].get(size, 1)
    return None if _GPU_FAMILIES.match(family) else 0


def check_gpus(what: str, available: int | None, needed: int, device: str) -> str | None:
    """Return a note for the user on GPUs that stay idle, or on a CPU; None: nothing to note.

    what: has `available` GPUs; None: it is not known. needed: by --tp, --pp and --dp. device: of
    `llmkit serve`. Raises UsageError when there are too few.
    """
    if available is None:
        return None
    if device == "cpu":
        return f"{available} GPUs of {what} stay idle: --device cpu" if available else None
    if available < needed and (available or needed > 1 or device == "cuda"):
        raise UsageError(
            f"{what} has {_gpus_text(available)}, and the server needs {needed}",
            "A GPU for each of --tp x --pp x --dp ranks was expected",
            "Take another instance type or another --tp, or serve with -- --device cpu",
        )
    if not available:
        return f"{what} has no GPU: the model is served on the CPU"
    if available > needed:
        return (
            f"{available - needed} of {available} GPUs of {what} stay idle: use them with "
            f"-- --tp {available} or -- --dp {available}"
        )
    return None


def _gpus_text(count: int) -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(count, f"{count} GPUs")
