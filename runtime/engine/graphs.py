"""Decode steps on a GPU as CUDA graphs, from token ids to sampled ones: launching each kernel would take longer.

A graph is for so many sequences; a step of fewer runs the next larger one, whose other rows write to a spare block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from llmkit.kernels.attention import KvCache
from llmkit.kernels.jit import tl
from llmkit.kernels.sampling_gpu import sample
from llmkit.model.decoder import Decoder
from llmkit.runtime.engine.replay import Inputs, Tables

SIZES = (1, 2, 4)  # sequences of a graph, and every multiple of STEP
STEP = 8
Parameters = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # as `sample` has them
Draw = Callable[..., torch.Tensor]
DRAW: Draw | None = None if tl is None else sample  # where there is Triton
AT_START = 32  # graphs of up to so many sequences are made at the start, larger ones when they are needed


class Repeatable(Protocol):
    """What was run once and can be run again."""

    def replay(self) -> None:
        """Run it again."""


def _parameters(words: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where int64 words hold numbers for `rows` rows, three of each kind: float32 and int64 [3, rows]."""
    return words[3 * rows :].view(torch.float32)[: 3 * rows].view(3, rows), words[: 3 * rows].view(3, rows)


class CudaGraph:
    """The kernels that a function launches, as one launch. It is run before, so that nothing is compiled meanwhile."""

    _shared: Any = None  # memory for all, no two of which run at a time, and one stream: cuBLAS keeps 32 MiB for each

    def __init__(self, run: Callable[[], object]) -> None:
        pool, side = (CudaGraph._shared or (torch.cuda.graph_pool_handle(), torch.cuda.Stream()))[:2]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool, side, capture_error_mode="thread_local"):  # waits for the device
            run()
        CudaGraph._shared = pool, side, self._graph  # without a graph that lives, PyTorch refuses the pool from then on

    def replay(self) -> None:
        """Launch them."""
        self._graph.replay()


class Graph(Inputs):
    """A step of `rows` sequences. logits: float32 [rows, V]; ids: what `draw` gives for them, or without it the most
    probable ones, -1 where logits are not finite. Both stay until the next step."""

    logits: torch.Tensor
    ids: torch.Tensor

    def __init__(
        self, model: Decoder, caches: Sequence[KvCache], rows: int, width: int, block_size: int,
        capture: Callable[[Callable[[], None]], Repeatable], draw: Draw | None = None, out: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """out: float32 [rows or more, V], where logits go, which would else be memory of this graph alone."""
        spare = {layer.window: cache.kv.shape[1] - 1 for layer, cache in zip(model.spec.layers, caches, strict=True)}
        super().__init__(rows, width, block_size, spare, model.device, 3 * rows + -(-3 * rows // 2))
        self._model, self._caches, self._draw, self._out = model, caches, draw, out
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.set([], [], {window: [] for window in spare})
        self._captured = capture(self._run)

    def _run(self) -> None:
        for window, blocks in self.blocks.items():
            self.batch.of(window).refresh(blocks, self.contexts)
        hidden = self._model(self.tokens, self.positions, self.batch, self._caches)
        self.logits, self.ids = hidden, self.tokens  # of no meaning before the last stage
        if self._model.spec.ends:
            logits, ranks = self._model.logits(hidden), self._model.ranks
            self.logits = logits if self._out is None else self._out[: self.rows].copy_(logits)
            if self._draw is not None:
                (temperature, top_p, min_p), (top_k, seeds, counters) = _parameters(self.extra, self.rows)
                self.ids = self._draw(self.logits, temperature, top_k, top_p, min_p, seeds, counters)
            else:
                self.ids = torch.where(ranks.finite(self.logits), ranks.argmax(self.logits), -1)

    def choose(self, parameters: Parameters, counters: Sequence[int]) -> None:
        """How the sequences of the next step sample, before `set`."""
        self.own.zero_()  # the most probable token for rows that no sequence has
        floats, whole = _parameters(self.own, self.rows)
        temperature, top_k, top_p, min_p, seeds = parameters
        for line, values in zip((*floats, *whole), (temperature, top_p, min_p, top_k, seeds, torch.tensor(counters)),
                                strict=True):  # fmt: skip
            line[: len(counters)] = values

    def run(self, tokens: torch.Tensor) -> None:
        """Fill `logits` and `ids`, after `set`."""
        self.tokens[: len(tokens)] = tokens
        self._captured.replay()


class Graphs:
    """A model's graphs by size. Its caches must have a block more than the scheduler gives away."""

    def __init__(
        self, model: Decoder, caches: Sequence[KvCache], width: int, block_size: int, most: int,
        capture: Callable[[Callable[[], None]], Repeatable] = CudaGraph, draw: Draw | None = DRAW,
    ) -> None:  # fmt: skip
        """width: blocks of the longest request; most: sequences of a step; draw: for a model that has the whole
        vocabulary."""
        self._model, self._caches, self._capture = model, caches, capture
        self._draw = draw if model.ranks.size == 1 else None
        self.draws = self._draw is not None
        self._width, self._block_size = width, block_size
        self.sizes = [*(size for size in SIZES if size < most), *range(STEP, most, STEP), most]
        self.made: dict[int, Graph] = {}  # by size
        self._out = torch.empty(most, model.spec.vocab, device=model.device) if model.spec.ends else None
        # Of a mixture of experts, only where the host need not see who is chosen.
        self.possible = all(layer.together is not None for layer in model.layers if layer.layer.moe)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Make the common ones, the largest first: the others fit into its memory."""
        for size in reversed([size for size in self.sizes if size <= AT_START]) if self.possible else ():
            self._graph(size)

    def take(self, rows: int) -> bool:
        """Whether `run` is to be called for a step of so many tokens, one a sequence."""
        return self.possible and rows <= self.sizes[-1]

    def run(
        self, tokens: torch.Tensor, positions: Sequence[int], contexts: Sequence[int], tables: Tables,
        sampling: tuple[Parameters, Sequence[int]],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The logits after `tokens` [rows], the last of such contexts, and the ids; sampling: see `Graph.choose`."""
        rows = len(contexts)
        graph = self._graph(next(size for size in self.sizes if size >= rows))
        graph.choose(*sampling)
        graph.set(positions, contexts, tables)
        graph.run(tokens)
        return graph.logits[:rows], graph.ids[:rows]

    def _graph(self, size: int) -> Graph:
        if size not in self.made:
            how = self._width, self._block_size, self._capture, self._draw, self._out
            self.made[size] = Graph(self._model, self._caches, size, *how)
        return self.made[size]
