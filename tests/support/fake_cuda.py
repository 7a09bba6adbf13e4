"""A CPU in the place of a CUDA device: where tensors are and what the host waits for.

Tensors that would be on the device are marked, and what is made of them. A kernel of Triton is
bound to its arguments as Triton binds them, and then not run: what it would write stays zero.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
LOOKS = {
    "tolist",
    "item",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "cpu",
    "equal",
    "unique",
    "masked_select",
    "argwhere",
}
MIXES = {"copy_", "__setitem__", "__getitem__"}  # that take tensors of both sides, and wait
MADE = {"empty", "empty_like", "new_empty", "empty_strided"}


class MixedError(RuntimeError):
    """Tensors of the host and of the device in one operation, or what a device does not do."""


class Device(TorchFunctionMode):
    """The fake device.

    log: copies, launches of graphs, events, and looks into the device's memory. places: the files
    where they happen. compiled: kernels that Triton would have compiled, each with its key: the
    types, constants and specializations of its arguments, and the options.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.places: Counter[tuple[str, str]] = Counter()
        self.compiled: list[tuple[str, str]] = []
        self.capturing = False
        # Addresses of memory, in a graph: what was there, and what it makes.
        self.reads = set[int]()
        self.made = set[int]()

    def note(self, what: str) -> None:
        """Log it, and forbid it while a graph is captured."""
        self.log.append(what)
        self.places[what, _product_file()] += 1
        if self.capturing:
            raise MixedError(f"{what} while a graph is captured")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reading((*args, *(kwargs or {}).values()))
        result = self._run(func, args, kwargs)
        self.made |= {one for one in _addresses((result,)) if one not in self.reads}
        return result

    def reading(self, arguments: Any) -> None:
        """Note what an operation reads or writes that no operation before it has made."""
        self.reads |= {one for one in _addresses(arguments) if one not in self.made}

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return self._attribute(func, args)
        tensors = [
            one for one in _flat((args, tuple(kwargs.values()))) if isinstance(one, torch.Tensor)
        ]
        there = any(getattr(one, "_there", False) for one in tensors)
        if name in (
            "data_ptr",
            "stride",
            "size",
            "dim",
            "numel",
            "is_contiguous",
            "storage_offset",
            "element_size",
            "__len__",
            "untyped_storage",
            "is_floating_point",
            "__repr__",
            "__format__",
        ):
            return func(*args, **kwargs)
        if name == "pin_memory":
            self._not_there(there, name)
            if self.capturing:
                self.note("pinned memory")
            args[0]._pinned = True
            return args[0]
        if name == "get_device":
            return 0 if there else -1
        if name == "to" or name == "cuda":
            return self._to(func, name, args, kwargs, there)
        self._check(name, tensors, there)
        if there and name in LOOKS:
            self.note(f"looks by {name}")
        if name in ("repeat_interleave",) and there and isinstance(args[1], torch.Tensor):
            self.note(f"looks by {name}")
        if name in ("__getitem__", "__setitem__") and there:
            for index in _flat((args[1],)):
                if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.note("looks by mask")
                elif (
                    isinstance(index, torch.Tensor)
                    and not getattr(index, "_there", False)
                    and index.dim()
                ):
                    self.note("slow copy")
            if isinstance(args[1], list) or (
                isinstance(args[1], tuple) and any(isinstance(i, list) for i in args[1])
            ):
                self.note("slow copy")
        own = (
            getattr(args[0], "_there", False)
            if args and isinstance(args[0], torch.Tensor)
            else False
        )
        if name == "__setitem__" and isinstance(args[2], torch.Tensor) and args[2].dim():
            if own != getattr(args[2], "_there", False):
                self.note("slow copy")
            there = own
        if name == "copy_":
            if own != getattr(args[1], "_there", False):
                pinned = hasattr(args[1] if own else args[0], "_pinned")
                self.note(
                    ("to device" if own else "to host")
                    if kwargs.get("non_blocking") and pinned
                    else "slow copy"
                )
            there = own
        wanted = kwargs.get("device")
        if wanted is not None:
            there = torch.device(wanted).type == "cuda"
            if there and name in ("tensor", "as_tensor"):
                self.note("slow copy")
            if there:
                kwargs["device"] = "cpu"
        pinned = kwargs.pop("pin_memory", False)
        result = self._special(func, name, args, kwargs) if there else func(*args, **kwargs)
        if there and name in MADE and result.device.type == "cpu":
            result.zero_()
        for one in _flat((result,)):
            if isinstance(one, torch.Tensor):
                one._there = there
                if pinned or (
                    not there and any(hasattr(t, "_pinned") and _same(one, t) for t in tensors)
                ):
                    one._pinned = True
        return result

    def _attribute(self, func: Any, args: Any) -> Any:
        there = getattr(args[0], "_there", False)
        if there and func == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if there and func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
            return func == torch.Tensor.is_cuda.__get__
        result = func(*args)
        if isinstance(result, torch.Tensor) and result is not args[0]:
            result._there = there
            if hasattr(args[0], "_pinned"):
                result._pinned = True
        return result

    def _to(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], there: bool
    ) -> torch.Tensor:
        there = getattr(args[0], "_there", False)
        target = there
        rest = []
        for one in args[1:]:
            if isinstance(one, torch.Tensor):
                target = getattr(one, "_there", False)
                rest.append(one.dtype)
            elif isinstance(one, torch.device | str) and not isinstance(one, torch.dtype):
                target = torch.device(one).type == "cuda"
            else:
                rest.append(one)
        if "device" in kwargs:
            target = torch.device(kwargs.pop("device")).type == "cuda"
        if name == "cuda":
            target = True
        if target and not there:
            self.note(
                "to device"
                if kwargs.get("non_blocking") and hasattr(args[0], "_pinned")
                else "slow copy"
            )
        if there and not target:
            self.note("looks by cpu")
        result = args[0].to(*rest, **kwargs) if rest or "dtype" in kwargs else args[0]
        if target != there and result is args[0]:
            result = result.clone()
        if result is not args[0]:
            result._there = target
        return result

    def _check(self, name: str, tensors: list[torch.Tensor], there: bool) -> None:
        if not there:
            return
        host = [
            one
            for one in tensors
            if not getattr(one, "_there", False) and one.dim() and one.device.type != "meta"
        ]
        if host and name not in MIXES:
            raise MixedError(
                f"{name} of tensors of the host {[tuple(one.shape) for one in host]} "
                "and of the device"
            )

    def _not_there(self, there: bool, name: str) -> None:
        if there:
            raise MixedError(f"{name} of a tensor on the device")

    def _special(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "_int_mm":
            a, b = args
            ok = (
                a.shape[0] > 16
                and a.shape[1] % 8 == 0
                and b.shape[1] % 8 == 0
                and a.is_contiguous()
            )
            if not (ok and a.dtype == b.dtype == torch.int8 and b.T.is_contiguous()):
                raise MixedError(f"_int_mm of {a.shape} {a.stride()} and {b.shape} {b.stride()}")
            return torch.zeros(len(a), b.shape[1], dtype=torch.int32)
        if name == "_scaled_mm":
            a, b, one, other, bias = args[:5]
            shapes = (
                a.shape[1] % 16 == 0
                and b.shape[1] % 16 == 0
                and a.is_contiguous()
                and b.T.is_contiguous()
            )
            scales = (
                one.shape == (len(a), 1)
                and other.shape == (1, b.shape[1])
                and other.is_contiguous()
            )
            kinds = one.dtype == other.dtype == torch.float32 and args[6] == torch.bfloat16
            if not (shapes and scales and kinds and (bias is None or bias.dtype == torch.bfloat16)):
                given = [(x.shape, x.stride(), x.dtype) for x in args[:5] if x is not None]
                raise MixedError(f"_scaled_mm of {given}")
            return torch.zeros(len(a), b.shape[1], dtype=torch.bfloat16)
        return func(*args, **kwargs)


def _product_file() -> str:
    """The file of llmkit that is running, relative to the repository; else the outermost file."""
    frame = sys._getframe()
    while True:
        path = _resolved(frame.f_code.co_filename)
        if ROOT in path.parents and TESTS not in path.parents:
            return path.relative_to(ROOT).as_posix()
        if frame.f_back is None:  # called by a test
            return path.name
        frame = frame.f_back


@cache
def _resolved(file: str) -> Path:
    """Without links: a clone imports llmkit through those of `.typecheck`."""
    return Path(file).resolve()


def _flat(values: Any) -> Iterator[Any]:
    for one in values:
        if isinstance(one, tuple | list):
            yield from _flat(one)
        else:
            yield one


def _addresses(values: Any) -> Iterator[int]:
    """Of the memory on the device behind tensors."""
    for one in _flat(values):
        if isinstance(one, torch.Tensor) and getattr(one, "_there", False) and one.numel():
            yield one.untyped_storage().data_ptr()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.device.type == "cpu"
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )
