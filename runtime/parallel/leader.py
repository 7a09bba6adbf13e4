"""The first rank: it starts the others, sends them every step, and is the caller's engine."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.common.errors import InputError, LlmkitError, ShortageError
from llmkit.common.formatting import bytes_text
from llmkit.common.numa_nodes import (
    move_process,
    numa_nodes,
    place_ranks,
    started_threads_on,
    threads_of_rank,
)
from llmkit.model.device import resolve_device
from llmkit.model.language_model import LanguageModel
from llmkit.runtime.engine.cuda_graphs import (
    BatchDescriptor,
    CudaGraph,
    CudaGraphRunner,
    StepGraph,
)
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.parallel.distributed_group import DistributedGroup
from llmkit.runtime.parallel.rank_engine import load_rank
from llmkit.runtime.parallel.rank_messages import (
    ANY_NUMBER,
    Connect,
    FromRank,
    LoadPart,
    PartLoaded,
    RunStep,
    Sleep,
    WakeUp,
    from_rank_decoder,
)
from llmkit.runtime.part_loader import StartupReport, load_part
from llmkit.runtime.process_channel import Channel, Failed, end_process, exit_text, spawn
from llmkit.shard.rank_part import RankPart, rank_parts

_GRACE_S = 2.0  # how long a process has to end by itself, and _watch_ranks to report its end
_SETTLE_S = 0.3  # wait after the first sign of a failure, then look which ranks have failed


class _Rank:
    """The process of another rank."""

    def __init__(self, message: LoadPart, device: torch.device) -> None:
        variables = {}
        if device.type == "cpu":
            variables["OMP_NUM_THREADS"] = str(message.num_threads)
        self.index = message.rank
        self.process, parent_end = spawn("llmkit.runtime.parallel.worker", message, variables)
        self.channel: Channel[FromRank] = Channel(parent_end, from_rank_decoder)

    def wait_until_loaded(self) -> PartLoaded:
        """Return the rank's sizes. Raises the LlmkitError with which it failed."""
        try:
            (message,) = self.channel.receive(wait=True)
        except (EOFError, OSError):
            raise self.death() from None
        if isinstance(message, Failed):
            raise message.error(f"rank {self.index}: ")
        return message

    def death(self) -> LlmkitError:
        """End the rank and return why it failed."""
        messages: list[FromRank] = []
        with contextlib.suppress(EOFError, OSError):
            messages = self.channel.receive(wait=True)
        self.end()
        for message in messages:
            if isinstance(message, Failed):
                return message.error(f"rank {self.index}: ")
        return LlmkitError(f"rank {self.index} ended ({exit_text(self.process)})")

    def end(self) -> None:
        """Close the channel and wait until the process has ended."""
        self.channel.close()
        end_process(self.process, _GRACE_S)


class LeadEngine(Engine):
    """An engine on several ranks.

    The others run the same steps on their parts; a caller does not see them.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig,
        eos_token_ids: tuple[int, ...] = (),
        draft: LanguageModel | None = None,
    ) -> None:
        super().__init__(model, config, eos_token_ids, draft)
        self._events: list[EngineRequest | str] = []  # since the last step; see RunStep
        self._ranks: list[_Rank] = []
        self._death: Future[LlmkitError] = Future()

    def attach_ranks(self, ranks: list[_Rank], group: DistributedGroup) -> None:
        """Send steps to these ranks from now on, and end them with this engine."""
        self._ranks = ranks
        graph_runner = self.runner.graph_runner
        graphs = graph_runner.graphs if isinstance(graph_runner, CudaGraphRunner) else None
        self._close = weakref.finalize(self, _end_ranks, ranks, group, graphs)
        threading.Thread(
            target=_watch_ranks, args=(ranks, group, self._death), name="rank-watch", daemon=True
        ).start()

    def on_death(self, callback: Callable[[LlmkitError], None]) -> None:
        """See `Engine.on_death`.

        Once a rank has ended, the thread in `step` may wait in a collective operation forever.
        """
        self._death.add_done_callback(lambda death: callback(death.result()))

    def add(self, request: EngineRequest) -> None:
        """See `Engine.add`."""
        params = request.sampling_params
        if params.seed is None:  # all ranks must draw with the same seed
            params = replace(params, seed=secrets.randbits(63))
            request = replace(request, sampling_params=params)
        super().add(request)
        self._events.append(request)

    def add_adapter(self, name: str, directory: str | Path) -> None:
        """See `Engine.add_adapter`.

        Raises RequestError once the other ranks run: they load adapters at the start.
        """
        if self._ranks:
            raise RequestError(
                "not_supported",
                "on several ranks adapters are loaded at the start (--lora)",
                "model",
            )
        super().add_adapter(name, directory)

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        super().cancel(request_id)
        self._events.append(request_id)

    def step(self) -> list[EngineOutput]:
        """See `Engine.step`. Raises LlmkitError when a rank has ended."""
        events = self._events
        self._events = []
        try:
            for rank in self._ranks:
                rank.channel.send(RunStep(events))
            return super().step()
        except (RuntimeError, OSError) as error:
            try:
                death = self._death.result(_GRACE_S)
            except TimeoutError:  # all other ranks are alive: this rank caused the error
                raise error from None
            raise death from error

    def sleep(self) -> None:
        """See `Engine.sleep`. Raises RequestError on GPUs: their graphs hold NCCL's operations."""
        if self.config.device.type == "cuda":
            message = "ranks on several GPUs cannot sleep without ending"
            raise RequestError("not_supported", message, "level")
        if self._events:  # cancelled requests, which the other ranks still have
            self.step()
        self._send_to_ranks(Sleep())
        super().sleep()

    def wake_up(self) -> None:
        """See `Engine.wake_up`."""
        self._send_to_ranks(WakeUp())
        super().wake_up()

    def _send_to_ranks(self, message: Sleep | WakeUp) -> None:
        """Send a message. A rank that has ended is reported by the thread that watches it."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.channel.send(message)

    def close(self) -> None:
        """End the other ranks."""
        self._close()


def load_on_ranks(checkpoint: Checkpoint, options: EngineOptions, report: StartupReport) -> Engine:
    """An engine on as many ranks as the options and the checkpoint ask for, this one included.

    Raises as `load_engine` does.
    """
    with report.stage("checkpoint check"):
        parts = rank_parts(checkpoint, options.tp, options.pp, options.ep)
    if len(parts) == 1:
        part = parts[0]
        loaded = load_part(part.checkpoint, part.spec.full_model, options, report)
        return loaded.make_engine(report, Engine)
    device = resolve_device(options.device)
    _check_ranks(options, device, len(parts))
    # Each rank's threads and memory are on its own nodes.
    places = place_ranks(numa_nodes() if device.type == "cpu" else [], len(parts))
    num_threads = threads_of_rank(places, torch.get_num_threads() // len(parts))
    ranks: list[_Rank] = []
    try:
        for rank in range(1, len(parts)):
            message = LoadPart(rank, checkpoint.reference, options, num_threads)
            with started_threads_on(places[rank]):
                ranks.append(_Rank(message, device))
        if places[0] is None:
            return _load_leader(parts, options, report, ranks, num_threads)
        cpus_before = os.sched_getaffinity(0)
        move_process(places[0])
        engine = _load_leader(parts, options, report, ranks, num_threads)
        weakref.finalize(engine, move_process, cpus_before)
        return engine
    except BaseException:
        _end_ranks(ranks)
        raise


def _check_ranks(options: EngineOptions, device: torch.device, num_ranks: int) -> None:
    if options.draft_model:
        raise InputError(
            f"--draft-model on {num_ranks} ranks is not possible",
            todo="Leave it out, or serve on one rank",
        )
    if device.type == "cuda" and torch.cuda.device_count() < num_ranks:
        raise ShortageError(
            f"{num_ranks} ranks need a GPU each, and PyTorch sees {torch.cuda.device_count()}",
            todo="Use fewer ranks, or --device cpu",
        )


def _load_leader(
    parts: list[RankPart],
    options: EngineOptions,
    report: StartupReport,
    ranks: list[_Rank],
    num_threads: int,
) -> LeadEngine:
    """Load the first rank's part while the others load theirs, then connect all of them."""
    leader = load_rank(parts, 0, options, report, num_threads)
    loaded = [leader.message, *(rank.wait_until_loaded() for rank in ranks)]
    with (
        tempfile.TemporaryDirectory(prefix="llmkit-") as folder,
        report.stage("connecting the ranks"),
    ):
        num_blocks = min(message.num_blocks for message in loaded)
        if num_blocks == ANY_NUMBER:  # no stage has attention
            num_blocks = leader.part.plan.memory.num_blocks
        num_host_blocks = min(message.num_host_blocks for message in loaded)
        if num_host_blocks == ANY_NUMBER:
            num_host_blocks = leader.part.plan.memory.num_host_blocks
        sizes = Connect(
            num_blocks=num_blocks,
            max_model_len=min(message.max_model_len for message in loaded),
            store_path=f"{folder}/store",
            max_num_seqs=min(message.max_num_seqs for message in loaded),
            num_state_snapshots=min(message.num_state_snapshots for message in loaded),
            num_host_blocks=num_host_blocks,
            num_host_states=min(message.num_host_states for message in loaded),
        )
        for rank in ranks:
            rank.channel.send(sizes)
        leader.connect(sizes)
    for index, message in enumerate(loaded):
        source = message.file or "sliced from the whole checkpoint"
        size = bytes_text(message.nbytes)
        report.fast_paths.append(f"rank {index}: {source}, {size} in {message.seconds:.2f} s")
    engine = leader.make_engine(sizes, report, LeadEngine)
    engine.attach_ranks(ranks, leader.group)
    return engine


def _watch_ranks(ranks: list[_Rank], group: DistributedGroup, death: Future[LlmkitError]) -> None:
    """Wait until a rank sends a message or ends: both mean that it has failed.

    No rank waits for it any longer then.
    One failure can make other ranks fail. An internal error is therefore reported only when no rank
    has failed for another reason.
    """
    poll = select.poll()
    by_fd = {rank.channel.socket.fileno(): rank for rank in ranks}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    poll.poll()
    group.stop()
    time.sleep(_SETTLE_S)
    failed = []
    for fd, _ in poll.poll(0):
        if by_fd[fd].channel.socket.fileno() == fd:  # else this process has closed the channel
            failed.append(by_fd[fd])
    reasons = [rank.death() for rank in failed]
    if reasons:
        death.set_result(min(reasons, key=lambda reason: "the engine failed" in reason.what))


def _end_ranks(
    ranks: list[_Rank],
    group: DistributedGroup | None = None,
    graphs: dict[BatchDescriptor, StepGraph] | None = None,
) -> None:
    for rank in ranks:
        rank.channel.close()
    for rank in ranks:
        rank.end()
    if graphs is not None:  # NCCL waits for graphs that hold its operations
        graphs.clear()
        CudaGraph.release_shared()
    if group is not None:
        group.disconnect()
