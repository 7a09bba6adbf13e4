"""The first rank, the other ranks and their group, without processes: what each sends and does."""

from __future__ import annotations

import gc
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmkit.common.errors import InputError, LlmkitError, ShortageError
from llmkit.runtime.engine.cuda_graphs import CudaGraph
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_plan import EnginePlan
from llmkit.runtime.memory_plan import MemoryPlan
from llmkit.runtime.parallel import distributed_group, leader, rank_engine, worker
from llmkit.runtime.parallel.distributed_group import DistributedGroup
from llmkit.runtime.parallel.leader import LeadEngine
from llmkit.runtime.parallel.rank_engine import LoadedRank, load_rank
from llmkit.runtime.parallel.rank_messages import (
    Connect,
    LoadPart,
    PartLoaded,
    RunStep,
    to_rank_decoder,
)
from llmkit.runtime.part_loader import LoadedPart, StartupReport
from llmkit.runtime.process_channel import Channel, Failed, frame

CPU = torch.device("cpu")
GPU = torch.device("cuda")
OPTIONS = EngineOptions(device="cpu")
LOADED = PartLoaded(num_blocks=40, max_model_len=900, file="rank-1", nbytes=2048, seconds=1.5)


class Process:
    """A process that has ended with this exit code once somebody waits for it."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.returncode: int | None = None
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> int:
        self.waits.append(timeout)
        self.returncode = self.code
        return self.code


class Peer:
    """A rank of the leader without its process: the test holds the other end of its socket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, index: int = 3, code: int = 5) -> None:
        near, self.far = socket.socketpair()
        self.process = Process(code)
        self.spawned: list[tuple[Any, ...]] = []

        def spawn(*arguments: Any) -> tuple[Process, socket.socket]:
            self.spawned.append(arguments)
            return self.process, near

        monkeypatch.setattr(leader, "spawn", spawn)
        self.message = LoadPart(index, "model", OPTIONS, 7)
        self.rank = leader._Rank(self.message, CPU)

    def say(self, *messages: Any) -> None:
        for message in messages:
            self.far.sendall(frame(message))


@pytest.mark.parametrize(("device", "variables"), [(CPU, {"OMP_NUM_THREADS": "7"}), (GPU, {})])
def test_rank_process_gets_its_threads_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, variables: dict[str, str]
) -> None:
    peer = Peer(monkeypatch)
    rank = leader._Rank(peer.message, device)
    assert peer.spawned[-1] == ("llmkit.runtime.parallel.worker", peer.message, variables)
    assert rank.index == 3


def test_rank_process_reports_its_sizes_or_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(monkeypatch)
    peer.say(LOADED)
    assert peer.rank.wait_until_loaded() == LOADED
    peer.say(Failed(4, "no memory", "", "less"))
    with pytest.raises(LlmkitError, match=r"^rank 3: no memory"):
        peer.rank.wait_until_loaded()
    assert not peer.process.waits
    peer.far.close()
    with pytest.raises(LlmkitError, match=r"^rank 3 ended \(exit code 5\)"):
        peer.rank.wait_until_loaded()
    assert len(peer.process.waits) == 1


def test_rank_process_that_ends_tells_its_last_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(monkeypatch)
    peer.say(LOADED, Failed(70, "it broke"))
    peer.far.close()
    death = peer.rank.death()
    assert str(death).startswith("rank 3: it broke")
    assert peer.rank.channel.socket.fileno() == -1
    assert peer.process.returncode == 5


@pytest.mark.parametrize("has_unread_step", [False, True])
def test_rank_process_that_fails_before_the_leader_looks_tells_why(
    monkeypatch: pytest.MonkeyPatch, has_unread_step: bool
) -> None:
    """Its message and the end of its socket arrive together."""
    peer = Peer(monkeypatch)
    if has_unread_step:  # then the socket's end is an error
        peer.rank.channel.send(RunStep([]))
    peer.say(Failed(InputError.exit_code, "a tensor is missing"))
    peer.far.close()
    with pytest.raises(InputError, match=r"^rank 3: a tensor is missing"):
        peer.rank.wait_until_loaded()
    with pytest.raises(EOFError):
        peer.rank.channel.receive(wait=True)


class Rank:
    """A rank that notes what the leader does with it."""

    def __init__(self, index: int = 1) -> None:
        self.index = index
        self.socket, self.far = socket.socketpair()
        self.log: list[Any] = []
        self.reason = LlmkitError(f"rank {index} ended")

    @property
    def channel(self) -> Rank:
        return self

    def send(self, message: Any) -> None:
        self.log.append(message)

    def close(self) -> None:
        self.log.append("close")

    def end(self) -> None:
        self.log.append("end")

    def death(self) -> LlmkitError:
        return self.reason

    def wait_until_loaded(self) -> PartLoaded:
        return replace_loaded(num_blocks=50 - self.index, max_model_len=700 + 100 * self.index)


def replace_loaded(**values: Any) -> PartLoaded:
    fields = {name: getattr(LOADED, name) for name in LOADED.__struct_fields__}
    return PartLoaded(**(fields | values))


def watch(*ranks: Rank) -> LlmkitError:
    death: Future[LlmkitError] = Future()
    stopped: list[str] = []
    group: Any = SimpleNamespace(stop=lambda: stopped.append("stopped"))
    leader._watch_ranks(ranks, group, death)  # type: ignore[arg-type]
    assert stopped == ["stopped"], "or the ranks would wait for it"
    return death.result(0)


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1), (1, 0)])
def test_leader_reports_the_rank_that_failed_first_of_all(
    monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...]
) -> None:
    """An internal error may follow from another rank's failure, whose reason counts then."""
    monkeypatch.setattr(leader, "_SETTLE_S", 0.0)
    ranks = [Rank(0), Rank(1), Rank(2)]
    ranks[failing[0]].reason = LlmkitError("the engine failed: it waits for another rank")
    for index in failing:
        ranks[index].far.close()
    assert watch(*ranks) is ranks[failing[-1]].reason


def test_leader_waits_longer_for_a_reason_than_it_takes_to_find_it() -> None:
    assert 0 < leader._SETTLE_S < leader._GRACE_S


def test_leader_reports_nothing_for_a_channel_that_it_has_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader, "_SETTLE_S", 0.0)
    rank = Rank()
    numbers = iter([rank.socket.fileno(), -1])
    rank.far.close()
    rank.socket = SimpleNamespace(  # type: ignore[assignment]
        fileno=lambda: next(numbers), real=rank.socket
    )
    death: Future[LlmkitError] = Future()
    group: Any = SimpleNamespace(stop=lambda: None)
    leader._watch_ranks([rank], group, death)  # type: ignore[list-item]
    assert not death.done()


@pytest.fixture
def lead(monkeypatch: pytest.MonkeyPatch) -> Iterator[LeadEngine]:
    """A leader whose own engine only notes its calls, with two ranks."""
    log: list[Any] = []
    monkeypatch.setattr(Engine, "__init__", lambda self, *_: None)
    monkeypatch.setattr(Engine, "add", lambda self, request: log.append(request))
    monkeypatch.setattr(Engine, "cancel", lambda self, name: log.append(name))
    monkeypatch.setattr(Engine, "add_adapter", lambda self, *names: log.append(names))
    monkeypatch.setattr(Engine, "step", lambda self: log.append("step") or ["output"])
    config = EngineConfig(64, 8, CPU, torch.float32)
    engine = LeadEngine(SimpleNamespace(), config)  # type: ignore[arg-type]
    engine.log = log  # type: ignore[attr-defined]
    engine.runner = SimpleNamespace(graph_runner=None)  # type: ignore[assignment]
    engine.add_adapter("early", "x")
    assert log == [("early", "x")]
    log.clear()
    engine.attach_ranks(
        [Rank(1), Rank(2)],  # type: ignore[list-item]
        SimpleNamespace(  # type: ignore[arg-type]
            disconnect=lambda: log.append("disconnect"), stop=lambda: None
        ),
    )
    yield engine
    for rank in engine._ranks:
        rank.socket.close()  # type: ignore[attr-defined]


def test_leader_sends_each_event_to_all_ranks_once(
    lead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda count: 1000 + count)
    unseeded = EngineRequest("a", [5], SamplingParams())
    seeded = EngineRequest("b", [5], SamplingParams(seed=0))
    lead.add(unseeded)
    lead.add(seeded)
    lead.cancel("a")
    assert lead.step() == ["output"]
    assert lead.step() == ["output"]
    first, same, name, *steps = lead.log
    assert (same, name, steps) == (seeded, "a", ["step", "step"])
    assert replace(first, sampling_params=unseeded.sampling_params) == unseeded
    assert first.sampling_params.seed == 1063, "seeds are positive int64 numbers"
    for rank in lead._ranks:
        assert [message.events for message in rank.log] == [[first, seeded, "a"], []]
    with pytest.raises(RequestError, match="adapters are loaded at the start"):
        lead.add_adapter("late", "x")
    watching = [thread for thread in threading.enumerate() if thread.name == "rank-watch"]
    assert watching and all(thread.daemon for thread in watching)
    lead.close()
    assert [rank.log[2:] for rank in lead._ranks] == [["close", "end"]] * 2
    assert lead.log[-1] == "disconnect"
    lead.close()
    assert lead.log.count("disconnect") == 1


def test_leader_raises_the_death_of_a_rank_in_place_of_its_own_error(
    lead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "_GRACE_S", 0.01)
    heard: list[LlmkitError] = []
    lead.on_death(heard.append)
    for error in (RuntimeError("collective"), BrokenPipeError()):

        def fail(_: Engine, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Engine, "step", fail)
        with pytest.raises(type(error)) as caught:
            lead.step()  # all other ranks are alive
        assert caught.value is error
    death = LlmkitError("rank 2 ended")
    assert heard == []
    lead._death.set_result(death)
    with pytest.raises(LlmkitError) as raised:
        lead.step()
    assert raised.value is death
    assert heard == [death]


def test_leader_ends_ranks_and_then_its_own_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits until no graph is left, the one that keeps the memory pool included."""
    log: list[str] = []
    monkeypatch.setattr(CudaGraph, "_shared", ("pool", "stream", "the newest graph"))
    ranks: list[Any] = [Rank(1), Rank(2)]
    for rank in ranks:
        rank.log = log
    graphs: Any = {1: "graph"}
    leader._end_ranks(
        ranks,
        SimpleNamespace(  # type: ignore[arg-type]
            disconnect=lambda: log.append(f"disconnect {graphs} {CudaGraph._shared}")
        ),
        graphs,
    )
    assert log == ["close", "close", "end", "end", "disconnect {} None"]
    leader._end_ranks([])


@pytest.mark.parametrize(
    ("device", "num_ranks", "draft", "error"),
    [
        (CPU, 9, None, None),
        (GPU, 2, None, None),
        (GPU, 3, None, ShortageError),
        (CPU, 2, "draft", InputError),
    ],
)
def test_leader_needs_a_gpu_for_each_rank_and_no_draft_model(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    num_ranks: int,
    draft: str | None,
    error: type[LlmkitError] | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = replace(OPTIONS, draft_model=draft)
    if error is None:
        leader._check_ranks(options, device, num_ranks)
        return
    with pytest.raises(error, match=f"{num_ranks} ranks"):
        leader._check_ranks(options, device, num_ranks)


@pytest.mark.parametrize(("threads", "each"), [(8, 2), (7, 2), (2, 1)])
def test_leader_starts_the_other_ranks_with_a_share_of_the_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, each: int
) -> None:
    started: list[Any] = []
    ended: list[Any] = []
    asked: list[Any] = []

    def start(message: LoadPart, device: torch.device) -> str:
        started.append((message.rank, message.model, message.num_threads, device.type))
        return f"rank {message.rank}"

    def parts(checkpoint: Any, *sizes: int) -> list[str]:
        asked.append(sizes)
        return list("abc")

    monkeypatch.setattr(leader, "rank_parts", parts)
    monkeypatch.setattr(leader, "_Rank", start)
    monkeypatch.setattr(leader, "_end_ranks", ended.append)
    monkeypatch.setattr(leader, "_load_leader", lambda *arguments: arguments)
    monkeypatch.setattr(leader, "numa_nodes", list)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    checkpoint: Any = SimpleNamespace(reference="model")
    options = replace(OPTIONS, tp=2, pp=3, ep=1)
    report = StartupReport()
    found: Any = leader.load_on_ranks(checkpoint, options, report)
    assert found == (list("abc"), options, report, ["rank 1", "rank 2"], each)
    assert started == [(1, "model", each, "cpu"), (2, "model", each, "cpu")]
    assert asked == [(2, 3, 1)]
    assert ended == []

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(leader, "_load_leader", fail)
    with pytest.raises(KeyboardInterrupt):
        leader.load_on_ranks(checkpoint, options, report)
    assert ended == [["rank 1", "rank 2"]]


def test_leader_places_ranks_on_numa_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank inherits its CPUs, this process moves, and moves back after the engine."""
    left = frozenset({0, 1})
    right = frozenset({2, 3})
    calls: list[Any] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cpus: calls.append((thread, cpus)))
    monkeypatch.setattr(leader, "numa_nodes", lambda: [left, right])
    monkeypatch.setattr(leader, "move_process", lambda cpus: calls.append(cpus))
    monkeypatch.setattr(leader, "rank_parts", lambda *_: ["a", "b"])
    monkeypatch.setattr(leader, "_Rank", lambda message, _: calls.append(message.num_threads))
    monkeypatch.setattr(leader, "_load_leader", lambda *_: Rank())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    checkpoint: Any = SimpleNamespace(reference="model")
    engine = leader.load_on_ranks(checkpoint, replace(OPTIONS, tp=2), StartupReport())
    assert calls == [(0, right), 2, (0, {0, 1, 2, 3}), left]
    del engine
    gc.collect()
    assert calls[4:] == [{0, 1, 2, 3}]


def test_leader_loads_a_single_part_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    part: Any = SimpleNamespace(checkpoint="checkpoint", spec=SimpleNamespace(full_model="spec"))
    loaded: Any = SimpleNamespace(make_engine=lambda report, kind: kind)
    monkeypatch.setattr(leader, "rank_parts", lambda *_: [part])
    seen: list[Any] = []
    monkeypatch.setattr(leader, "load_part", lambda *a: seen.append(a) or loaded)
    report = StartupReport()
    checkpoint: Any = None
    loaded: Any = leader.load_on_ranks(checkpoint, OPTIONS, report)
    assert loaded is Engine
    assert seen == [("checkpoint", "spec", OPTIONS, report)]


def test_leader_connects_all_ranks_with_the_least_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[Any] = [Rank(1), Rank(2)]
    seen: list[Any] = []
    engine: Any = SimpleNamespace(attach_ranks=lambda *arguments: seen.append(arguments))
    own: Any = SimpleNamespace(
        message=replace_loaded(file="", num_blocks=60),
        connect=lambda sizes: seen.append((sizes, Path(sizes.store_path).parent.exists())),
        make_engine=lambda sizes, report, kind: seen.append((sizes, kind)) or engine,
        group="group",
    )
    monkeypatch.setattr(leader, "load_rank", lambda *arguments: seen.append(arguments) or own)
    report = StartupReport()
    parts: Any = ["a", "b", "c"]
    found: Any = leader._load_leader(parts, OPTIONS, report, ranks, 2)
    assert found is engine
    load, (sizes, existed), made, attached = seen
    assert load == (["a", "b", "c"], 0, OPTIONS, report, 2)
    assert (sizes.num_blocks, sizes.max_model_len, existed) == (48, 800, True)
    assert not Path(sizes.store_path).parent.exists()
    assert (made, attached) == ((sizes, LeadEngine), (ranks, "group"))
    assert [rank.log for rank in ranks] == [[sizes]] * 2
    assert report.fast_paths == [
        "rank 0: sliced from the whole checkpoint, 2.0 KiB in 1.50 s",
        "rank 1: rank-1, 2.0 KiB in 1.50 s",
        "rank 2: rank-1, 2.0 KiB in 1.50 s",
    ]
    assert "connecting the ranks" in report.seconds


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rank_loads_its_part_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    spec = SimpleNamespace(rank=SimpleNamespace(tp_size=2, tp_rank=1), vocab_size=64)
    parts: Any = [
        SimpleNamespace(spec=spec, checkpoint=f"part {n}", file=f"file {n}", nbytes=n, whole="all")
        for n in range(6)
    ]
    report = StartupReport(seconds={"before": 10.0})
    memory = MemoryPlan(0, 0, 0, 30, 64, 16, 500, 900, 0, 8, 100, 12, 4)
    seen: list[Any] = []

    def load(*arguments: Any) -> Any:
        seen.append(arguments)
        report.seconds |= {"building": 1.5, "before": 10.5}
        return SimpleNamespace(plan=SimpleNamespace(memory=memory))

    monkeypatch.setattr(rank_engine, "load_part", load)
    monkeypatch.setattr(rank_engine, "resolve_device", torch.device)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.append(f"{n} threads"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda n: seen.append(f"GPU {n}"))
    options = replace(OPTIONS, device=device)
    rank = load_rank(parts, 3, options, report, 4)
    where, (checkpoint, of_rank, asked, same, group, num_parts, whole) = seen
    assert whole == "all"
    assert where == ("4 threads" if device == "cpu" else "GPU 3")
    assert (checkpoint, of_rank, asked, same, num_parts) == ("part 3", spec, options, report, 6)
    assert group is rank.group
    assert (group.rank, group.tp_size, group.pp_size, group.vocab_start) == (3, 2, 3, 64)
    assert rank.message == PartLoaded(30, 500, "file 3", 3, 2.0, 8, 4)
    with pytest.raises(FrozenInstanceError):
        rank.group = group  # type: ignore[misc]


class WorkerChannel:
    """The messages that a worker receives, and what it sends."""

    def __init__(self, *batches: list[Any]) -> None:
        self.batches = list(batches)
        self.sent: list[Any] = []

    def receive(self, wait: bool) -> list[Any]:
        assert wait
        if not self.batches:
            raise EOFError
        return self.batches.pop(0)

    def send(self, message: Any) -> None:
        self.sent.append(message)


def test_worker_runs_the_steps_of_the_leader_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    engine: Any = SimpleNamespace(
        add=lambda request: log.append(f"+{request.request_id}"),
        cancel=lambda name: log.append(f"-{name}"),
        step=lambda: log.append("step"),
    )
    sizes = Connect(10, 20, "store")
    rank = SimpleNamespace(
        message=LOADED,
        connect=lambda sizes: log.append(sizes),
        make_engine=lambda sizes, report, kind: engine if kind is Engine else None,
    )
    monkeypatch.setattr(
        worker, "open_checkpoint", lambda model, warn_of_edits: log.append((model, warn_of_edits))
    )
    monkeypatch.setattr(worker, "rank_parts", lambda *a: log.append(a) or ["a", "b"])
    monkeypatch.setattr(worker, "load_rank", lambda *a: log.append((a[0], a[1], a[4])) or rank)
    a = EngineRequest("a", [5], SamplingParams())
    b = EngineRequest("b", [5], SamplingParams())
    load = LoadPart(1, "model", replace(OPTIONS, tp=2, pp=3, ep=4), 6)
    channel = WorkerChannel(
        [load],
        [sizes, RunStep([a])],  # the first steps may arrive with the sizes
        [RunStep(["a", b]), RunStep([])],
        [RunStep(["b"])],
    )
    with pytest.raises(EOFError):
        worker.run_worker(channel)  # type: ignore[arg-type]
    assert channel.sent == [LOADED]
    assert log == [
        ("model", False),
        (None, 2, 3, 4),
        (["a", "b"], 1, 6),
        sizes,
        *("+a", "step", "-a", "+b", "step", "step", "-b", "step"),
    ]


@pytest.mark.parametrize(
    ("error", "code", "sent"),
    [
        (None, 0, []),
        (EOFError(), 0, []),
        (BrokenPipeError(), 0, []),
        (ConnectionResetError(), 0, []),
        (ShortageError("no memory"), ShortageError.exit_code, ["no memory"]),
        (ValueError("bug"), 70, ["the engine failed: ValueError: bug"]),
    ],
)
def test_worker_sends_its_failure_and_exits_with_its_code(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, code: int, sent: list[str]
) -> None:
    near, far = socket.socketpair()

    def run(channel: Channel[Any]) -> None:
        assert channel.socket is near
        if error is not None:
            raise error

    monkeypatch.setattr(worker, "parent_socket", lambda: near)
    monkeypatch.setattr(worker, "run_worker", run)
    with near, far:
        assert worker.main() == code
        near.shutdown(socket.SHUT_WR)
        leader_end: Channel[Any] = Channel(far, leader.from_rank_decoder)
        messages = leader_end.receive(wait=True) if sent else []
        assert [message.what for message in messages] == sent
        assert [message.exit_code for message in messages] == [code] * len(sent)


def test_rank_messages_are_decoded_by_their_tags() -> None:
    for message in (
        LoadPart(1, "model", OPTIONS, 2),
        Connect(3, 4, "store"),
        RunStep([EngineRequest("a", [5], SamplingParams(seed=1)), "b"]),
    ):
        assert to_rank_decoder.decode(frame(message)[4:]) == message
    assert leader.from_rank_decoder.decode(frame(LOADED)[4:]) == LOADED


class FakeDist:
    """torch.distributed with one other rank, whose tensors the test gives."""

    ReduceOp = dist.ReduceOp

    def __init__(self, *others: torch.Tensor, backend: str = "gloo") -> None:
        self.others = list(others)
        self.backend = backend
        self.calls: list[Any] = []
        self.done = False
        self.initialized = True
        # What another rank broadcasts: its pid and no shared memory. None: this rank is the sender.
        self.owner: torch.Tensor | None = torch.tensor([1, -1])

    def all_reduce(self, x: torch.Tensor, operation: Any = None, group: Any = None) -> None:
        assert x.numel(), "nothing to wait for"
        self.calls.append(("all_reduce", group))
        if self.others:
            join: dict[Any, Callable[..., torch.Tensor]] = {
                dist.ReduceOp.SUM: torch.add,
                dist.ReduceOp.MAX: torch.maximum,
                dist.ReduceOp.MIN: torch.minimum,
            }
            x.copy_(join[operation](x, self.others.pop(0)))

    def broadcast(self, x: torch.Tensor, rank: int, group: Any) -> None:
        self.calls.append(("broadcast", rank, group))
        if self.owner is not None:
            x.copy_(self.owner)

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor, group: Any) -> None:
        assert x.is_contiguous()
        self.calls.append(("all_gather", group, len(parts)))
        parts[0].copy_(x)
        parts[1].copy_(self.others.pop(0))

    def recv(self, x: torch.Tensor, rank: int) -> None:
        self.calls.append(("recv", tuple(x.shape), x.dtype, rank))

    def send(self, x: torch.Tensor, rank: int) -> None:
        self.calls.append(("send", rank))

    def isend(self, x: torch.Tensor, rank: int, group: Any) -> Any:
        self.calls.append(("isend", rank, group))
        return SimpleNamespace(is_completed=lambda: self.done)

    def irecv(self, x: torch.Tensor, rank: int, group: Any) -> Any:
        self.calls.append(("irecv", rank, group))
        return SimpleNamespace(wait=lambda: self.calls.append("waited"))

    def init_process_group(self, backend: str, **arguments: Any) -> None:
        self.calls.append((backend, arguments))

    def new_group(self, ranks: list[int] | None = None, backend: str | None = None) -> Any:
        self.calls.append(("new_group", ranks, backend))
        return ranks or "all"

    def is_initialized(self) -> bool:
        return self.initialized

    def get_backend(self) -> str:
        return self.backend

    def destroy_process_group(self) -> None:
        self.calls.append("destroyed")


def group_of(
    monkeypatch: pytest.MonkeyPatch, fake: FakeDist, rank: int, tp: int = 2, pp: int = 1
) -> DistributedGroup:
    monkeypatch.setattr(distributed_group, "dist", fake)
    spec: Any = SimpleNamespace(rank=SimpleNamespace(tp_size=tp, tp_rank=rank % tp), vocab_size=4)
    group = DistributedGroup(spec, rank, pp)
    group._stage_group = "stage"
    group._results_group = "results"
    return group


@pytest.mark.parametrize(
    ("rank", "other_best", "other_ids", "expected"),
    [
        (0, [9.0, 1.0, 5.0], [6, 4, 5], [6, 1, 2]),  # the second row is this rank's
        (1, [9.0, 1.0, 5.0], [2, 3, 0], [2, 5, 0]),
    ],
)
def test_distributed_argmax_is_the_first_token_of_the_largest_value(
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    other_best: list[float],
    other_ids: list[int],
    expected: list[int],
) -> None:
    """In the third row both ranks have a 5: the first token wins."""
    none = torch.iinfo(torch.int64).max
    theirs = [other_ids[0], none, other_ids[2]]
    fake = FakeDist(torch.tensor(other_best), torch.tensor(theirs))
    group = group_of(monkeypatch, fake, rank)
    assert group.vocab_start == 4 * rank
    x = torch.tensor([[1.0, 2.0, 3.0, 0.0], [1.0, 7.0, 7.0, 0.0], [1.0, 2.0, 5.0, 0.0]])
    kept = x.clone()
    assert group.argmax(x).tolist() == expected
    assert torch.equal(x, kept)
    assert fake.calls == [("all_reduce", "stage")] * 2


def test_distributed_reductions_need_no_other_rank_for_tp_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeDist()
    group = group_of(monkeypatch, fake, 1, tp=1, pp=2)
    x = torch.tensor([[1.0, 3.0, 2.0]])
    assert group.argmax(x).tolist() == [1]
    assert group.all_reduce(x) is x
    assert group.all_reduce_max(x) is x
    assert group.all_gather(x) is x
    assert fake.calls == []
    assert group.vocab_start == 0


def test_distributed_reductions_join_both_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.tensor([[5.0, 1.0], [2.0, 4.0]])
    fake = FakeDist(other, other, other)
    group = group_of(monkeypatch, fake, 0)
    mine = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    assert group.all_reduce(mine.clone()).tolist() == [[6.0, 4.0], [4.0, 4.0]]
    assert group.all_reduce_max(mine.clone()).tolist() == [[5.0, 3.0], [2.0, 4.0]]
    assert group.all_gather(mine.T.contiguous().T).tolist() == [[1, 3, 5, 1], [2, 0, 2, 4]]
    assert fake.calls[-1] == ("all_gather", "stage", 2)


def test_distributed_stages_send_to_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 2 and 3 are the second of three stages."""
    fake = FakeDist()
    group = group_of(monkeypatch, fake, 3, tp=2, pp=3)
    received = group.receive(5, 8, torch.bfloat16, CPU)
    assert received.shape == (5, 8)
    group.send(torch.zeros(5, 8))
    assert fake.calls == [("recv", (5, 8), torch.bfloat16, 1), ("isend", 5, None)]
    gpu: Any = SimpleNamespace(is_cuda=True)
    group.send(gpu)
    assert fake.calls[2:] == [("send", 5)]


def test_distributed_results_go_from_the_last_stage_to_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeDist()
    last = group_of(monkeypatch, fake, 5, tp=2, pp=3)
    last.broadcast_results([torch.zeros(1), torch.zeros(2)])
    assert fake.calls == [("isend", rank, "results") for rank in (1, 1, 3, 3)]
    assert len(last._sends) == 4  # under way: the tensors must live
    fake.done = True
    last.broadcast_results([torch.zeros(1)])
    assert len(last._sends) == 1
    fake.calls.clear()
    first = group_of(monkeypatch, fake, 0, tp=2, pp=3)
    receiving = first.receive_results([torch.zeros(1), torch.zeros(2)])
    assert fake.calls == [("irecv", 4, "results")] * 2
    receiving.synchronize()
    assert fake.calls[2:] == ["waited"] * 2
    receiving.synchronize()
    assert len(fake.calls) == 4


@pytest.mark.parametrize(("rank", "stage"), [(0, [0, 1]), (1, [0, 1]), (2, [2, 3]), (5, [4, 5])])
def test_distributed_group_connects_its_stage_and_all_ranks(
    monkeypatch: pytest.MonkeyPatch, rank: int, stage: list[int]
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.setenv(name, "kept")
    fake = FakeDist()
    group = group_of(monkeypatch, fake, rank, tp=2, pp=3)
    group.connect(Path("/there/store"), CPU)
    assert fake.calls == [
        (
            "gloo",
            {
                "init_method": "file:///there/store",
                "rank": rank,
                "world_size": 6,
                "device_id": None,
            },
        ),
        *(("new_group", ranks, None) for ranks in ([0, 1], [2, 3], [4, 5])),
        ("new_group", None, "gloo"),
        ("broadcast", 0, "all"),
        ("all_reduce", "all"),
        ("all_reduce", "all"),
    ]
    assert not group.reduces_in_kernels, "the first rank has no shared memory"
    assert group._stage_group == stage
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    fake.calls.clear()
    group.connect(Path("/there/store"), GPU)
    assert fake.calls[0][0] == "nccl"
    assert fake.calls[0][1]["device_id"] == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("initialized", "backend", "calls"),
    [(False, "gloo", []), (True, "gloo", ["destroyed"]), (True, "nccl", ["aborted"])],
)
def test_distributed_group_is_aborted_on_gpus(
    monkeypatch: pytest.MonkeyPatch, initialized: bool, backend: str, calls: list[str]
) -> None:
    fake = FakeDist(backend=backend)
    fake.initialized = initialized
    abort = lambda: fake.calls.append("aborted")  # noqa: E731
    monkeypatch.setattr(distributed_group, "_abort_process_group", abort)
    group_of(monkeypatch, fake, 0).disconnect()
    assert fake.calls == calls


def test_loaded_rank_connects_and_builds_its_engine_with_the_agreed_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_engine, "resolve_device", torch.device)
    made: list[Any] = []
    monkeypatch.setattr(LoadedPart, "make_engine", lambda self, *a: made.append((self, *a)))
    memory = MemoryPlan(0, 0, 0, 40, 64, 16, 900, 900)
    dtypes = (torch.float32, torch.float32, "auto", None)
    plan: Any = EnginePlan(CPU, *dtypes, 512, memory, None)  # type: ignore[arg-type]
    part = LoadedPart(None, OPTIONS, None, None, plan)  # type: ignore[arg-type]
    seen: list[Any] = []
    group: Any = SimpleNamespace(connect=lambda *a: seen.append(a))
    rank = LoadedRank(part, group, LOADED)
    sizes = Connect(7, 100, "/store")
    rank.connect(sizes)
    assert seen == [(Path("/store"), CPU)]
    rank.make_engine(sizes, StartupReport(), Engine)
    ((used, _, kind),) = made
    assert kind is Engine
    memory = used.plan.memory
    assert (memory.num_blocks, memory.max_model_len, memory.block_size) == (7, 100, 16)
