"""How much memory tensors take at most while a piece of code runs, on a CPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the `with` blocks.

    Matrix products are not computed: their results have any values.
    live_bytes: of those that still exist. peak_bytes: the most that there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and count what it makes."""
        before = {one.untyped_storage()._cdata for one in _tensors((args, kwargs or {}))}
        if func is torch.ops.aten.mm.default:
            result = args[0].new_empty(args[0].shape[0], args[1].shape[1])
        else:
            result = func(*args, **(kwargs or {}))
        for one in _tensors(result):
            storage = one.untyped_storage()
            key = storage._cdata
            if key in before or key in self._storages:
                continue
            num_bytes = storage.nbytes()
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self._storages[key] = weakref.finalize(storage, self._free, key, num_bytes)
        return result

    def _free(self, key: int, num_bytes: int) -> None:
        del self._storages[key]
        self.live_bytes -= num_bytes


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        return _tensors(list(values.values()))
    if isinstance(values, list | tuple):
        return [one for value in values for one in _tensors(value)]
    return []
