"""Decode steps on a GPU as CUDA graphs, from token ids to sampled token ids.

Launching the kernels of a small step one by one takes longer than running them. A graph has a fixed
number of rows; a step with fewer sequences runs in the next larger graph, whose unused rows write
to a padding block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.sampling_triton import sample
from llmkit.kernels.triton_support import tl
from llmkit.model.decoder import Decoder
from llmkit.runtime.engine.sampling_tensors import SamplingTensors
from llmkit.runtime.engine.static_batch import BlockTables, StaticDecodeBatch

SMALL_SIZES = (1, 2, 4)  # rows of a graph; larger graphs have multiples of SIZE_STEP
SIZE_STEP = 8
# Graphs of up to this size are captured at the start, larger ones on first use.
MAX_SIZE_AT_START = 32
Sampler = Callable[..., torch.Tensor]
TRITON_SAMPLER: Sampler | None = None if tl is None else sample


class Replayable(Protocol):
    """Work that ran once and can be run again."""

    def replay(self) -> None:
        """Run it again."""


class CudaGraph:
    """The kernels that a function launches, captured so that one launch runs them all."""

    # The memory pool and the stream of all graphs, and the newest graph. Graphs can share them,
    # because no two graphs run at the same time. A separate stream would cost each graph 32 MiB
    # for cuBLAS. One graph is kept alive because PyTorch refuses a pool that has no graph left.
    _shared: Any = None

    def __init__(self, run: Callable[[], object]) -> None:
        if CudaGraph._shared is None:
            pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()
        else:
            pool, stream, _ = CudaGraph._shared
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compile all kernels before the capture
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
            run()
        CudaGraph._shared = (pool, stream, self._graph)

    def replay(self) -> None:
        """Launch the kernels."""
        self._graph.replay()


Capture = Callable[[Callable[[], None]], Replayable]


class DecodeGraph(StaticDecodeBatch):
    """A decode step of `num_rows` sequences. Its results stay valid until the next step."""

    logits: torch.Tensor  # float32 [rows, V]; hidden states before the last pipeline stage
    # int64 [rows]: sampled token ids, or the most probable ones without a sampler; -1 where logits
    # are not finite
    sampled_token_ids: torch.Tensor

    def __init__(
        self,
        model: Decoder,
        kv_caches: Sequence[KVCache],
        num_rows: int,
        max_blocks: int,
        block_size: int,
        capture: Capture,
        sampler: Sampler | None = None,
        logits_buffer: torch.Tensor | None = None,
    ) -> None:
        """logits_buffer: float32 [rows or more, V], shared by all graphs; None: this graph has its
        own logits.
        """
        padding_blocks = {
            layer.sliding_window: cache.kv.shape[1] - 1
            for layer, cache in zip(model.spec.layers, kv_caches, strict=True)
        }
        super().__init__(
            num_rows,
            max_blocks,
            block_size,
            padding_blocks,
            model.device,
            num_extra=_num_sampling_values(num_rows),
        )
        self._model = model
        self._kv_caches = kv_caches
        self._sampler = sampler
        self._logits_buffer = logits_buffer
        self.token_ids = torch.zeros(num_rows, dtype=torch.int64, device=model.device)
        self.fill([], [], {window: [] for window in padding_blocks})
        self._captured = capture(self._forward)

    def _forward(self) -> None:
        for window, blocks in self.block_tables.items():
            self.batch.metadata(window).update_block_tables(blocks, self.seq_lens)
        hidden = self._model(self.token_ids, self.positions, self.batch, self._kv_caches)
        if not self._model.spec.is_last_stage:
            self.logits = hidden
            self.sampled_token_ids = self.token_ids
            return
        logits = self._model.logits(hidden)
        if self._logits_buffer is not None:
            logits = self._logits_buffer[: self.num_rows].copy_(logits)
        self.logits = logits
        if self._sampler is not None:
            floats, integers = _sampling_views(self.extra, self.num_rows)
            temperature, top_p, min_p = floats
            top_k, seeds, counters = integers
            self.sampled_token_ids = self._sampler(
                logits, temperature, top_k, top_p, min_p, seeds, counters
            )
        else:
            group = self._model.parallel_group
            is_finite = group.rows_finite(logits)
            self.sampled_token_ids = torch.where(is_finite, group.argmax(logits), -1)

    def fill_sampling(self, sampling: SamplingTensors, num_sampled: Sequence[int]) -> None:
        """Write the sampling parameters of the next step.

        Call `fill` afterwards: it copies them to the device.
        """
        self.host_extra.zero_()  # unused rows are greedy
        floats, integers = _sampling_views(self.host_extra, self.num_rows)
        count = len(num_sampled)
        floats[0][:count] = sampling.temperature
        floats[1][:count] = sampling.top_p
        floats[2][:count] = sampling.min_p
        integers[0][:count] = sampling.top_k
        integers[1][:count] = sampling.seeds
        integers[2][:count] = torch.tensor(num_sampled)

    def run(self, token_ids: torch.Tensor) -> None:
        """Compute `logits` and `sampled_token_ids`. Call `fill` before."""
        self.token_ids[: len(token_ids)] = token_ids
        self._captured.replay()


class CudaGraphRunner:
    """The CUDA graphs of a model, by size.

    The KV caches must have one block more than the scheduler allocates: the padding block.
    """

    def __init__(
        self,
        model: Decoder,
        kv_caches: Sequence[KVCache],
        max_blocks: int,
        block_size: int,
        max_num_seqs: int,
        capture: Capture = CudaGraph,
        sampler: Sampler | None = TRITON_SAMPLER,
        enabled: bool = True,
    ) -> None:
        """max_blocks: blocks of the longest request. sampler: used only when this rank has the
        whole vocabulary.
        """
        self._model = model
        self._kv_caches = kv_caches
        self._capture = capture
        self._sampler = sampler if model.parallel_group.tp_size == 1 else None
        self._max_blocks = max_blocks
        self._block_size = block_size
        self.samples_tokens = self._sampler is not None
        small = [size for size in SMALL_SIZES if size < max_num_seqs]
        self.sizes = [*small, *range(SIZE_STEP, max_num_seqs, SIZE_STEP), max_num_seqs]
        self.graphs: dict[int, DecodeGraph] = {}  # by size
        self._logits_buffer = None
        if model.spec.is_last_stage:
            shape = (max_num_seqs, model.spec.vocab_size)
            self._logits_buffer = torch.empty(shape, device=model.device)
        # Experts can be captured only when the host need not see which ones the router selects.
        moe_layers = [layer for layer in model.layers if layer.layer.is_moe]
        can_capture = all(layer.fused_experts is not None for layer in moe_layers)
        self.enabled = enabled and can_capture

    @torch.inference_mode()
    def capture_common_sizes(self) -> None:
        """Capture the common sizes, the largest first, so that smaller ones reuse its memory."""
        if not self.enabled:
            return
        for size in reversed(self.sizes):
            if size <= MAX_SIZE_AT_START:
                self._graph(size)

    def should_run(self, num_rows: int) -> bool:
        """Whether `run` can run a decode step of this many sequences."""
        return self.enabled and num_rows <= self.sizes[-1]

    def run(
        self,
        token_ids: torch.Tensor,
        positions: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: BlockTables,
        sampling: SamplingTensors,
        num_sampled: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One decode step: the logits [rows, V] and the sampled token ids [rows].

        token_ids: int64 [rows], the last token of each sequence. seq_lens: tokens of each
        sequence, that one included. num_sampled: output tokens before the one that is sampled.
        """
        num_rows = len(seq_lens)
        graph = self._graph(next(size for size in self.sizes if size >= num_rows))
        graph.fill_sampling(sampling, num_sampled)
        graph.fill(positions, seq_lens, block_tables)
        graph.run(token_ids)
        return graph.logits[:num_rows], graph.sampled_token_ids[:num_rows]

    def _graph(self, size: int) -> DecodeGraph:
        if size not in self.graphs:
            self.graphs[size] = DecodeGraph(
                self._model,
                self._kv_caches,
                size,
                self._max_blocks,
                self._block_size,
                self._capture,
                self._sampler,
                self._logits_buffer,
            )
        return self.graphs[size]


def _num_sampling_values(num_rows: int) -> int:
    """int64 values for three int64 and three float32 parameters of each row."""
    return 3 * num_rows + -(-3 * num_rows // 2)


def _sampling_views(values: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of int64 values: float32 [3, rows] and int64 [3, rows]."""
    integers = values[: 3 * num_rows].view(3, num_rows)
    floats = values[3 * num_rows :].view(torch.float32)[: 3 * num_rows].view(3, num_rows)
    return floats, integers
