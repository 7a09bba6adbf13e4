"""`torch.cuda` and Triton for tests on a CPU that acts as a CUDA device: see `fake_gpu`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmkit.model import device as transfer
from llmkit.model import weight_loader as loader
from llmkit.runtime.engine import cuda_graphs as graphs
from support.fake_cuda import GPU, Device, MixedError


@dataclass(frozen=True)
class FakeGpu:
    """A CPU in the place of a CUDA device, a Hopper."""

    device: Device
    launches: Counter[str]  # how often each kernel of Triton was launched
    patch: pytest.MonkeyPatch  # for what a test replaces besides; undone with the rest


@contextmanager
def fake_gpu(has_triton: bool = True) -> Iterator[FakeGpu]:
    """Let the CPU act as a CUDA device inside the `with` block.

    has_triton: False leaves Triton as it is; then nothing may launch a kernel.
    Nothing that is kept for all engines of a process comes from before or stays after it.
    """
    with pytest.MonkeyPatch.context() as patch:
        device = Device()
        stand_in_cuda(patch, device)
        launches = stand_in_triton(patch, device) if has_triton else Counter[str]()
        patch.setattr(graphs.CudaGraph, "_shared", None)
        transfer.uploader.cache_clear()
        try:
            with device:
                yield FakeGpu(device, launches, patch)
        finally:
            transfer.uploader.cache_clear()


def stand_in_triton(monkeypatch: pytest.MonkeyPatch, device: Device) -> Counter[str]:
    """Have Triton bind launches for a Hopper and run none; how often each kernel was launched.

    A launch with a tensor of the host, one without programs and one that is compiled in a graph
    raise MixedError.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: Counter[str] = Counter()
    fake = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_active_torch_device=lambda: GPU,
    )
    monkeypatch.setattr(driver, "_active", fake, raising=False)
    monkeypatch.setattr(driver, "_default", fake, raising=False)

    def compiled(
        self: Any,
        key: Any,
        signature: Any,
        _: Any,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> Any:
        if device.capturing:
            raise MixedError(f"{self.__name__} is compiled while a graph is captured")
        kernel = SimpleNamespace(
            launch_metadata=lambda *_: None, run=lambda *_: None, function=0, packed_metadata=0
        )
        self.device_caches[0][0][key] = kernel
        device.compiled.append((self.__name__, str(key)))
        return kernel

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not found[self.__name__]:
            self.device_caches.clear()
        found[self.__name__] += 1
        bound = self.signature.bind_partial(
            *args, **{k: v for k, v in kwargs.items() if k in self.arg_names}
        )
        for name, one in bound.arguments.items():
            if isinstance(one, torch.Tensor) and not getattr(one, "_there", False):
                raise MixedError(f"{self.__name__}: {name} is on the host")
        if not all(
            isinstance(size, int) and 0 < size < limit
            for size, limit in zip(grid, (1 << 31, 65536, 65536), strict=False)
        ):
            raise MixedError(f"{self.__name__}: a grid of {grid}")
        with torch._C.DisableTorchFunction():
            device.reading(bound.arguments.values())
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    original = JITFunction.run
    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(JITFunction, "run", run)
    return found


class AtOnce:
    """In the place of a ThreadPoolExecutor: other threads know nothing of a Device."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done


class Generator(torch.Generator):
    """That of the CPU."""

    def __new__(cls, *_: Any) -> Generator:
        return super().__new__(cls)


class Stream:
    """Does its work at once."""

    def __init__(self, *_: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...


def stand_in_cuda(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """`torch.cuda` for the Device."""

    class Event:
        recorded = 0

        def __init__(self, **_: Any) -> None:
            self.number = 0

        def record(self, stream: Any = None) -> None:
            if stream is None:  # the current one, of steps
                Event.recorded += 1
                self.number = Event.recorded
                device.note(f"event {self.number}")

        def synchronize(self) -> None:
            if self.number:
                device.log.append(f"wait for {self.number}")

        def query(self) -> bool:
            return True

    begin = graphs.CudaGraph.__init__

    def captured(self: Any, run: Callable[[], None]) -> None:
        device.log.append("capture")
        begin(self, run)
        self.run = run
        self.reads = set(device.reads)

    def replay(self: Any) -> None:
        device.log.append("graph")
        device.reads = set()
        device.made = set()
        self.run()
        if device.reads != self.reads:
            raise MixedError("a graph would read other memory than it does when it is run again")

    monkeypatch.setattr(graphs.CudaGraph, "__init__", captured)
    monkeypatch.setattr(graphs.CudaGraph, "replay", replay)

    @contextmanager
    def graph(
        _: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        device.capturing = True
        device.reads = set()
        device.made = set()
        try:
            yield
        finally:
            device.capturing = False

    def synchronize(*_: Any) -> None:
        device.note("synchronize")

    properties = SimpleNamespace(
        name="stand-in", major=9, minor=0, multi_processor_count=132, total_memory=140 << 30
    )
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: "stand-in",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (138 << 30, 140 << 30),
        "memory_allocated": lambda *_: 1 << 20,
        "max_memory_allocated": lambda *_: 2 << 20,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "synchronize": synchronize,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda *_: Stream(),
        "stream": lambda _: nullcontext(),
        "CUDAGraph": object,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "device_of": lambda _: nullcontext(),
        "device": lambda _: nullcontext(),
    }
    monkeypatch.setattr(loader, "ThreadPoolExecutor", AtOnce)
    for name, one in replaced.items():
        monkeypatch.setattr(torch.cuda, name, one)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None, raising=False)
    monkeypatch.setattr(torch, "Generator", Generator)
