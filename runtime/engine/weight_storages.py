"""Moves the memory of a model's tensors between the GPU and the host, in place.

A tensor is a view of a storage. The memory of each storage is copied to the host and freed, and
later allocated again and filled. So all tensors, packed layouts and views of them stay the same
objects, and only their addresses change: what has recorded addresses, such as a CUDA graph, must
be made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

# Objects that hold no weights, and lead to much that does not belong to a model.
_LEAVES = (str, bytes, int, float, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)


class HostWeights:
    """The weights of models while their memory on the device is free."""

    def __init__(self, models: list[Any], device: torch.device) -> None:
        """Move all tensors on `device` that the models' attributes lead to."""
        self._moved: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        for storage in _storages(models, device):
            source = _as_bytes(storage)
            host = torch.empty(len(source), dtype=torch.uint8, pin_memory=device.type == "cuda")
            host.copy_(source)
            del source
            storage.resize_(0)
            self._moved.append((storage, host))

    @property
    def num_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(host.nbytes for _, host in self._moved)

    def restore(self) -> None:
        """Allocate the memory on the device again, and fill it.

        After a RuntimeError (the device has no memory left) call it again: it goes on.
        """
        while self._moved:
            storage, host = self._moved[-1]
            storage.resize_(host.nbytes)
            _as_bytes(storage).copy_(host)
            self._moved.pop()


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages(roots: list[Any], device: torch.device) -> Iterator[torch.UntypedStorage]:
    """Yield each storage on a device once, of the tensors that attributes and items lead to."""
    seen: dict[int, Any] = {}  # by id; holds the objects, so that no id is used again
    addresses: set[int] = set()
    pending: list[Any] = list(roots)
    while pending:
        value = pending.pop()
        if value is None or isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            if value.device.type != device.type:
                continue
            storage = value.untyped_storage()
            is_movable = storage.nbytes() and storage.resizable()  # not the memory of a file
            if is_movable and storage.data_ptr() not in addresses:
                addresses.add(storage.data_ptr())
                yield storage
            continue
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            pending += value
        pending += getattr(value, "__dict__", {}).values()
