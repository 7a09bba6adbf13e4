"""CUDA streams and events on a CPU: side streams work as late as the order allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class LateStream:
    """Does its work when somebody waits for it; the current stream does its own at once."""

    def __init__(self, log: list[str], current: bool = False) -> None:
        self.log = log
        self.current = current
        self.work: list[Callable[[], object] | LateEvent] = []

    def wait_event(self, event: LateEvent) -> None:
        if self.current:
            event.synchronize()
        else:  # what is given to this stream now happens after the event
            assert event.done or event.stream is self, "events of a third stream are unknown here"

    def wait_stream(self, other: LateStream) -> None:
        assert other.current
        self.log.append("side waits for current")

    def run(self, until: LateEvent) -> None:
        while until in self.work:
            done = self.work.pop(0)
            if isinstance(done, LateEvent):
                done.done = True
            else:
                with _disable_current_modes():
                    done()
                self.log.append("copied")


class LateEvent:
    """`done` when its stream has come by, or when it was never recorded."""

    def __init__(self, blocking: bool = False) -> None:
        self.done = True
        self.stream = None

    def record(self, stream: LateStream) -> None:
        self.stream = stream
        self.done = stream.current
        if not stream.current:
            stream.work.append(self)

    def synchronize(self) -> None:
        if not self.done and self.stream is not None:
            self.stream.run(self)


class _Deferred(TorchDispatchMode):
    def __init__(self, stream: LateStream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and len(args) > 2 and args[2]:  # not blocking
            self.stream.log.append("copy")
            self.stream.work.append(lambda: torch.ops.aten.copy_.default(*args))
            return args[0]
        result = func(*args, **(kwargs or {}))
        if (
            func is torch.ops.aten.empty.memory_format
        ):  # what is not copied is not what was there by chance
            result.view(-1).view(torch.uint8).fill_(255)
        return result


class LateCuda:
    """In the place of `torch.cuda`. log: copies as they are given to a side stream and done."""

    Event = LateEvent

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = LateStream(self.log, current=True)

    def Stream(self, device: torch.device) -> LateStream:  # noqa: N802
        return LateStream(self.log)

    def current_stream(self, device: torch.device) -> LateStream:
        return self.now

    @contextmanager
    def stream(self, stream: LateStream) -> Iterator[None]:
        with _Deferred(stream):
            yield
