"""Asynchronous copies from the host to a device."""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device. Work queued on the device afterwards can use the copy.

    Pinned memory makes the copy asynchronous. For a CPU, the tensor itself is returned.
    """
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)
