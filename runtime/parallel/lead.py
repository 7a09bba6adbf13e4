"""The rank that leads: it starts the others, tells them of every step, and is the engine that a caller sees."""

from __future__ import annotations

import contextlib
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

from llmkit.checkpoint.errors import InputError, LlmkitError, ShortageError
from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.text import bytes_text
from llmkit.model.decoder import Decoder
from llmkit.model.device import resolve_device
from llmkit.runtime.channel import Channel, Failed, end, exit_text, spawn
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.graphs import Graph, Graphs
from llmkit.runtime.engine.types import EngineConfig, EngineOptions, Request, RequestError, TokenOutput
from llmkit.runtime.load import LoadedPart, StartUp, load_part
from llmkit.runtime.parallel.group import Group
from llmkit.runtime.parallel.messages import FromRank, Go, Join, Loaded, Step, from_rank_decoder
from llmkit.shard.rank import RankPart, rank_parts

_GRACE_S = 2.0  # for a process to end by itself, and for its end to be noticed
_SETTLE_S = 0.3  # between the first rank's end and asking all what has happened


class _Rank:
    """Another rank's process."""

    def __init__(self, index: int, join: Join, device: torch.device) -> None:
        variables = {"OMP_NUM_THREADS": str(join.threads)} if device.type == "cpu" else {}
        self.index = index
        self.process, ours = spawn("llmkit.runtime.parallel.worker", join, variables)
        self.channel: Channel[FromRank] = Channel(ours, from_rank_decoder)

    def receive(self) -> Loaded:
        """What it tells after loading. Raises the LlmkitError that it ended with."""
        try:
            (message,) = self.channel.receive(wait=True)
        except (EOFError, OSError):
            raise self.death() from None
        if isinstance(message, Failed):
            raise message.error(f"rank {self.index}: ")
        return message

    def death(self) -> LlmkitError:
        """Why it is gone or going."""
        told: list[FromRank] = []
        with contextlib.suppress(EOFError, OSError):
            told = self.channel.receive(wait=True)
        self.end()
        failed = next((message for message in told if isinstance(message, Failed)), None)
        if failed is not None:
            return failed.error(f"rank {self.index}: ")
        return LlmkitError(f"rank {self.index} ended ({exit_text(self.process)})")

    def end(self) -> None:
        """Hang up, and see that the process is gone."""
        self.channel.socket.close()
        end(self.process, _GRACE_S)


class LeadEngine(Engine):
    """An engine over ranks, for its caller one like any other; the others do what it does, a step at a time."""

    def __init__(
        self, model: Decoder, config: EngineConfig, eos_ids: tuple[int, ...] = (), draft: Decoder | None = None
    ) -> None:
        super().__init__(model, config, eos_ids, draft)
        self._events: list[Request | str] = []
        self._ranks: list[_Rank] = []
        self._death: Future[LlmkitError] = Future()

    def lead(self, ranks: list[_Rank], group: Group) -> None:
        """Take charge of ranks that are ready to step."""
        self._ranks = ranks
        graphs = self.runner.recordings
        made = graphs.made if isinstance(graphs, Graphs) else None
        self._closed = weakref.finalize(self, _end, ranks, group, made)
        threading.Thread(target=_watch, args=(ranks, self._death), name="rank-watch", daemon=True).start()

    def on_death(self, act: Callable[[LlmkitError], None]) -> None:
        """See `Engine.on_death`: a rank that is gone may leave this thread waiting for ever."""
        self._death.add_done_callback(lambda death: act(death.result()))

    def add(self, request: Request) -> None:
        """See `Engine.add`."""
        if request.sampling.seed is None:  # every rank draws with the same
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))
        super().add(request)
        self._events.append(request)

    def add_adapter(self, name: str, directory: str | Path) -> None:
        """See `Engine.add_adapter`. Once the other ranks run, RequestError: they have what was given at the start."""
        if self._ranks:
            raise RequestError("not_supported", "on several ranks adapters are loaded at the start (--lora)", "model")
        super().add_adapter(name, directory)

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        super().cancel(request_id)
        self._events.append(request_id)

    def step(self) -> list[TokenOutput]:
        """See `Engine.step`. Raises LlmkitError when a rank is gone."""
        events, self._events = self._events, []
        try:
            for rank in self._ranks:
                rank.channel.send(Step(events))
            return super().step()
        except (RuntimeError, OSError) as error:
            try:
                death = self._death.result(_GRACE_S)
            except TimeoutError:  # it is our own error
                raise error from None
            raise death from error

    def close(self) -> None:
        """End the other ranks."""
        self._closed()


def load_on_ranks(checkpoint: Checkpoint, options: EngineOptions, start: StartUp) -> Engine:
    """An engine over as many processes as the layout has ranks, this one included. Raises as `load_engine` does."""
    with start.stage("checkpoint check"):
        parts = rank_parts(checkpoint, options.tp, options.pp, options.ep)
        if len(parts) == 1:
            whole = parts[0]
    if len(parts) == 1:
        return load_part(whole.checkpoint, whole.spec.whole, options, start).engine(start, Engine)
    device = resolve_device(options.device)
    _require(options, device, len(parts))
    threads = max(1, torch.get_num_threads() // len(parts))
    joins = [Join(index, checkpoint.reference, options, threads) for index in range(len(parts))]
    ranks: list[_Rank] = []
    try:
        ranks += [_Rank(join.index, join, device) for join in joins[1:]]
        return _load(parts, options, start, device, ranks, threads)
    except BaseException:
        _end(ranks)
        raise


def _watch(ranks: list[_Rank], death: Future[LlmkitError]) -> None:
    """Wait until a rank speaks or hangs up: it is going. The others fail for want of it, so the first reason counts."""
    poll = select.poll()
    by_fd = {rank.channel.socket.fileno(): rank for rank in ranks}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    poll.poll()
    time.sleep(_SETTLE_S)
    gone = [by_fd[fd] for fd, _ in poll.poll(0) if by_fd[fd].channel.socket.fileno() == fd]
    reasons = [rank.death() for rank in gone]  # none when we have hung up ourselves
    if reasons:
        death.set_result(min(reasons, key=lambda reason: "the engine failed" in reason.what))


def _load(
    parts: list[RankPart], options: EngineOptions, start: StartUp, device: torch.device, ranks: list[_Rank],
    threads: int,
) -> LeadEngine:  # fmt: skip
    own, group, loaded = load_rank(parts, 0, options, start, threads)
    told = [own, *(rank.receive() for rank in ranks)]
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder, start.stage("meeting the other ranks"):
        go = Go(min(one.num_blocks for one in told), min(one.max_model_len for one in told), f"{folder}/store")
        for rank in ranks:
            rank.channel.send(go)
        group.join(Path(go.store), device)
    start.paths += [
        f"rank {index}: {one.file or 'cut out of the whole'}, {bytes_text(one.nbytes)} in {one.seconds:.2f} s"
        for index, one in enumerate(told)
    ]
    engine = agreed(loaded, go).engine(start, LeadEngine)
    engine.lead(ranks, group)
    return engine


def load_rank(
    parts: list[RankPart], index: int, options: EngineOptions, start: StartUp, threads: int
) -> tuple[Loaded, Group, LoadedPart]:
    """Load the part of a rank; nobody is met yet."""
    part = parts[index]
    assert part.spec.rank is not None
    if resolve_device(options.device).type == "cuda":
        torch.cuda.set_device(index)
    else:
        torch.set_num_threads(threads)
    group = Group(part.spec, index, len(parts) // part.spec.rank.tp)
    before = sum(start.seconds.values())
    loaded = load_part(part.checkpoint, part.spec, options, start, group, len(parts))
    memory, seconds = loaded.plan.memory, sum(start.seconds.values()) - before
    return Loaded(memory.num_blocks, memory.max_model_len, part.file, part.nbytes, seconds), group, loaded


def agreed(loaded: LoadedPart, go: Go) -> LoadedPart:
    """The part with the sizes that all ranks take."""
    memory = replace(loaded.plan.memory, num_blocks=go.num_blocks, max_model_len=go.max_model_len)
    return replace(loaded, plan=replace(loaded.plan, memory=memory))


def _require(options: EngineOptions, device: torch.device, count: int) -> None:
    if options.draft_model:
        raise InputError(f"--draft-model on {count} ranks is not possible", todo="Leave it out, or serve on one rank")
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise ShortageError(
            f"{count} ranks need a GPU each, and PyTorch sees {torch.cuda.device_count()}",
            todo="Use fewer ranks, or --device cpu",
        )


def _end(ranks: list[_Rank], group: Group | None = None, graphs: dict[int, Graph] | None = None) -> None:
    for rank in ranks:
        rank.channel.socket.close()
    for rank in ranks:
        rank.end()
    if graphs is not None:  # NCCL lets nobody go whose sums are in one
        graphs.clear()
    if group is not None:
        group.leave()
