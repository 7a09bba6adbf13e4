"""Decode steps on a GPU as CUDA graphs, from token ids to sampled token ids.

Launching the kernels of a small step one by one takes longer than running them. A graph has a fixed
number of sequences and of tokens for each; a smaller step runs in the next larger graph, whose
unused rows write to a padding block. Steps that verify draft tokens have graphs of their own, and
so have steps with adapters. All graphs are captured at the start, so that no step waits for one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch

from llmkit.kernels import latent_attention_triton
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.latent_cache import LatentCache
from llmkit.kernels.paged_attention import supports_cache
from llmkit.kernels.recurrent_state import RecurrentState
from llmkit.kernels.sampling_triton import sample
from llmkit.kernels.triton_support import tl
from llmkit.model.decoder import Decoder
from llmkit.model.draft_head import DraftHead
from llmkit.model.language_model import LayerCache
from llmkit.model.lora import LoraManager
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.graph_runner import Sampler
from llmkit.runtime.engine.sampling_tensors import (
    SamplingTensors,
    num_packed_values,
    packed_views,
)
from llmkit.runtime.engine.slot_block_tables import BlockTables, SlotBlockTables
from llmkit.runtime.engine.state_scheduler import StateRows
from llmkit.runtime.engine.static_batch import StaticDecodeBatch

SMALL_SIZES = (1, 2, 4)  # rows of a graph; larger graphs have multiples of SIZE_STEP
SIZE_STEP = 8
# Tokens of a step with prompts beside decodes. In larger steps, the host launches kernels in less
# time than they run.
MAX_MIXED_TOKENS = 512
MIXED_SIZES = (16, *range(32, 256, 32), *range(256, MAX_MIXED_TOKENS, 64))
# Memory of the driver for each kernel of a graph: estimated, not measured.
BYTES_PER_KERNEL = 8 << 10
KERNELS_PER_LAYER = 14
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

    @classmethod
    def release_shared(cls) -> None:
        """Let go of the graph that is kept alive. The next graph gets new memory."""
        cls._shared = None


Capture = Callable[[Callable[[], None]], Replayable]


class GraphKey(NamedTuple):
    """What a graph can run."""

    num_rows: int  # sequences
    max_query_len: int  # tokens of each: 1, or more to verify drafts
    has_adapters: bool = False
    # Prompts beside decodes: all sequences together have up to `max_query_len` tokens.
    is_mixed: bool = False

    @property
    def num_tokens(self) -> int:
        """The tokens of a step."""
        return self.max_query_len * (1 if self.is_mixed else self.num_rows)

    @property
    def num_sampled(self) -> int:
        """The tokens that are sampled from."""
        return self.num_rows if self.is_mixed else self.num_tokens


class DecodeGraph(StaticDecodeBatch):
    """A decode step of `num_rows` sequences. Its results stay valid until the next step.

    All tokens of a step are sampled from: they are the last known token and the drafts after it.
    In a mixed step, with prompts beside decodes, it is the last token of each sequence.
    """

    # [sampled tokens, V], of `logits_dtype` with a sampler, else float32; hidden states before the
    # last pipeline stage
    logits: torch.Tensor
    # int64 [sampled tokens]: sampled token ids, or the most probable ones without a sampler; -1
    # where logits are not finite
    sampled_token_ids: torch.Tensor

    def __init__(
        self,
        model: Decoder | DraftHead,
        kv_caches: Sequence[LayerCache],
        num_rows: int,
        block_tables: SlotBlockTables,
        block_size: int,
        capture: Capture,
        sampler: Sampler | None = None,
        logits_buffer: torch.Tensor | None = None,
        max_query_len: int = 1,
        adapters: LoraManager | None = None,
        is_mixed: bool = False,
        hidden_buffer: torch.Tensor | None = None,
    ) -> None:
        """logits_buffer: [sampled tokens or more, V], shared by all graphs; None: this graph has
        its own logits. max_query_len: the most tokens of a sequence; of a mixed step, those of all
        sequences. adapters: those that the step applies. hidden_buffer: [tokens or more, C], shared
        by all graphs: gets what a draft head reads of each token; None: there is no draft head.
        """
        key = GraphKey(num_rows, max_query_len, adapters is not None, is_mixed)
        self._num_sampled = key.num_sampled
        # After the sampling parameters: the rows of sampled tokens, or the adapters of tokens.
        num_token_values = key.num_rows if is_mixed else key.num_tokens * key.has_adapters
        padding_blocks = padding_blocks_of(model.spec, kv_caches)
        super().__init__(
            num_rows,
            block_tables,
            block_size,
            padding_blocks,
            model.device,
            num_graph_inputs=num_packed_values(key.num_sampled) + num_token_values,
            max_query_len=max_query_len,
            max_num_tokens=key.num_tokens if is_mixed else None,
            padding_state_row=padding_state_row_of(kv_caches),
        )
        self._is_mixed = is_mixed
        self._model = model
        self._kv_caches = kv_caches
        self._sampler = sampler
        self._logits_buffer = logits_buffer
        self._hidden_buffer = hidden_buffer
        self._adapters = adapters
        self._host_sampling: SamplingTensors | None = None  # those in `host_graph_inputs`
        _, integers = packed_views(self.host_graph_inputs, self._num_sampled)
        self._host_counters = integers[2].numpy()
        self.token_ids = torch.zeros(self.num_tokens, dtype=torch.int64, device=model.device)
        self.fill([], [], {window: [] for window in padding_blocks})
        self._captured = capture(self._forward)

    def _forward(self) -> None:
        for window in self.padding_blocks:
            metadata = self.batch.metadata(window)
            metadata.update_block_tables(
                self.block_tables.device_table(window),
                self.seq_lens,
                self.query_start_loc,
                self.slots,
            )
        adapters = self._adapters
        token_values = self.graph_inputs[num_packed_values(self._num_sampled) :]
        with nullcontext() if adapters is None else adapters.activate_slots(token_values):
            hidden = self._model(self.token_ids, self.positions, self.batch, self._kv_caches)
        if not self._model.spec.is_last_stage:
            self.logits = hidden
            self.sampled_token_ids = self.token_ids
            return
        if self._hidden_buffer is not None:
            self._hidden_buffer[: len(hidden)] = self._model.draft_inputs(hidden)
        if self._is_mixed:
            hidden = hidden[token_values]
        dtype = torch.float32
        if self._sampler is not None:
            dtype = logits_dtype(self._model.spec, self._model.dtype)
        logits = self._model.logits(hidden, dtype)
        if self._logits_buffer is not None:
            logits = self._logits_buffer[: self._num_sampled].copy_(logits)
        self.logits = logits
        if self._sampler is not None:
            floats, integers = packed_views(self.graph_inputs, self._num_sampled)
            temperature, top_p, min_p = floats
            top_k, seeds, counters = integers
            self.sampled_token_ids = self._sampler(
                logits, temperature, top_k, top_p, min_p, seeds, counters
            )
        else:
            self.sampled_token_ids = self._model.parallel_group.greedy(logits)

    def fill_sampling(self, sampling: SamplingTensors, num_sampled: Sequence[int]) -> None:
        """Write the sampling parameters of the next step, of each token.

        Call `fill` afterwards: it copies them to the device.
        """
        count = len(num_sampled)
        if sampling is not self._host_sampling:  # most steps have those of the step before
            self._host_sampling = sampling
            floats, integers = packed_views(self.host_graph_inputs, self._num_sampled)
            floats.zero_()  # unused rows are greedy
            integers.zero_()
            floats[0][:count] = sampling.temperature
            floats[1][:count] = sampling.top_p
            floats[2][:count] = sampling.min_p
            integers[0][:count] = sampling.top_k
            integers[1][:count] = sampling.seeds
        self._host_counters[:count] = num_sampled

    def fill_token_values(self, values: Sequence[int]) -> None:
        """Write the adapter slot of each token (see `LoraManager.activate_slots`) or, for a mixed
        step, the rows of the sampled tokens.

        Call it after `fill_sampling` and before `fill`.
        """
        host = self.host_graph_inputs[num_packed_values(self._num_sampled) :]
        host[: len(values)] = torch.tensor(values)
        host[len(values) :] = 0

    def run(self, token_ids: torch.Tensor) -> None:
        """Compute `logits` and `sampled_token_ids`. Call `fill` before."""
        self.token_ids[: len(token_ids)] = token_ids
        self._captured.replay()


class CudaGraphRunner:
    """The CUDA graphs of a model (`GraphRunner`).

    The KV caches must have one block more than the scheduler allocates: the padding block.
    """

    def __init__(
        self,
        model: Decoder | DraftHead,
        kv_caches: Sequence[LayerCache],
        max_blocks: int,
        block_size: int,
        max_num_seqs: int,
        capture: Capture = CudaGraph,
        sampler: Sampler | None = TRITON_SAMPLER,
        enabled: bool = True,
        *,
        max_query_len: int = 1,
        max_capture_size: int | None = None,
        max_mixed_tokens: int = 0,
        adapters: LoraManager | None = None,
        hidden_size: int = 0,
    ) -> None:
        """max_blocks: blocks of the longest request. sampler: used only when this rank has the
        whole vocabulary. max_query_len: tokens of a sequence in a step that verifies drafts.
        max_capture_size: the most tokens of a graph; None: those of `max_num_seqs` sequences.
        max_mixed_tokens: the most tokens of a step with prompts beside decodes; 0: they have no
        graphs. hidden_size: the columns of what a draft head reads of each token (`hidden_states`);
        0: there is no draft head.
        """
        self._model = model
        self._kv_caches = kv_caches
        self._capture = capture
        # It samples in graphs, and in steps without them; None: the runner samples.
        self.sampler = sampler if model.parallel_group.tp_size == 1 else None
        self._block_tables = SlotBlockTables(
            max_num_seqs, max_blocks, padding_blocks_of(model.spec, kv_caches), model.device
        )
        self._block_size = block_size
        self._adapters = adapters
        self._adapters_version = 0 if adapters is None else adapters.version
        self._captures_all = False
        self.samples_tokens = self.sampler is not None
        self.max_query_len = max_query_len
        # The numbers of sequences that graphs are captured for, by the tokens of each.
        self.sizes = {
            query_len: capture_sizes(max_num_seqs, query_len, max_capture_size)
            for query_len in {1, max_query_len}
        }
        self._mixed_keys: list[GraphKey] = []
        # The kernels for prompts of these layers need the lengths on the host.
        if model.spec.recurrent is None and model.spec.mla is None:
            self._mixed_keys = mixed_keys(max_num_seqs, max_mixed_tokens, max_capture_size)
        self.graphs: dict[GraphKey, DecodeGraph] = {}
        # Experts can be captured only when the host need not see which ones the router selects.
        moe_layers = [layer for layer in model.layers if layer.layer.is_moe]
        can_capture = all(layer.fused_experts is not None for layer in moe_layers)
        # Attention in torch reads the sequences on the host, which a replay would not do again.
        self.can_capture_attention = model.device.type != "cuda" or (
            tl is not None
            and all(supports_cache(cache) for cache in kv_caches if isinstance(cache, KVCache))
            and all(
                latent_attention_triton.supports_cache(cache)
                for cache in kv_caches
                if isinstance(cache, LatentCache)
            )
        )
        can_capture = can_capture and self.can_capture_attention
        self.enabled = enabled and can_capture and any(self.sizes.values())
        self._logits_buffer = None
        if model.spec.is_last_stage and self.enabled:
            num_tokens = max(key.num_sampled for key in self._keys())
            shape = (num_tokens, model.spec.vocab_size)
            dtype = torch.float32
            if self.samples_tokens:
                dtype = logits_dtype(model.spec, model.dtype)
            self._logits_buffer = torch.empty(shape, device=model.device, dtype=dtype)
        # What a draft head reads of the tokens of the last step, [T, hidden_size].
        self.hidden_states = torch.empty(0, device=model.device, dtype=model.dtype)
        self._hidden_buffer = None
        if hidden_size and self.enabled:
            num_tokens = max(key.num_tokens for key in self._keys())
            self._hidden_buffer = self.hidden_states.new_empty(num_tokens, hidden_size)

    @torch.inference_mode()
    def capture_all(self, captured: Callable[[int, int], None] = lambda *_: None) -> None:
        """Capture all graphs that are missing, the largest first: smaller ones reuse its memory.

        captured: called with the number of graphs that exist and of those that will.
        """
        if not self.enabled:
            return
        self._captures_all = True
        keys = sorted(self._keys(), key=lambda key: key.num_tokens, reverse=True)
        for number, key in enumerate(keys, start=1):
            self._graph(key)
            captured(number, len(keys))

    @property
    def num_graphs(self) -> int:
        """How many graphs there are."""
        return len(self.graphs)

    def update_adapters(self) -> None:
        """Capture the graphs with adapters again if an adapter was added that they do not have."""
        adapters = self._adapters
        if adapters is None or adapters.version == self._adapters_version:
            return
        self._adapters_version = adapters.version
        for key in [key for key in self.graphs if key.has_adapters]:
            del self.graphs[key]
        if self._captures_all:
            self.capture_all()

    def should_run(self, query_lens: Sequence[int], adapter_ids: Collection[int] = ()) -> bool:
        """See `GraphRunner.should_run`."""
        adapters = self._adapters
        for adapter_id in adapter_ids:
            if adapter_id and (adapters is None or adapters.slot(adapter_id) is None):
                return False
        return self.enabled and self._size(len(query_lens), max(query_lens)) is not None

    def run(
        self,
        token_ids: torch.Tensor,
        positions: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: BlockTables,
        sampling: SamplingTensors,
        num_sampled: Sequence[int],
        query_lens: Sequence[int] | None = None,
        adapter_ids: Sequence[int] = (),
        slots: Sequence[int] | None = None,
        state_rows: Sequence[StateRows] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GraphRunner.run`."""
        adapters = self._adapters if any(adapter_ids) else None
        query_len = 1 if query_lens is None else max(query_lens)
        size = self._size(len(seq_lens), query_len)
        assert size is not None, "a step that should_run refuses"
        width = 1 if query_len == 1 else self.max_query_len
        graph = self._graph(GraphKey(size, width, adapters is not None))
        graph.fill_sampling(sampling, num_sampled)
        if adapters is not None:
            slot_of = {id_: adapters.slot(id_) or 0 for id_ in set(adapter_ids)}
            graph.fill_token_values([slot_of[adapter_id] for adapter_id in adapter_ids])
        graph.fill(positions, seq_lens, block_tables, query_lens, slots, state_rows)
        graph.run(token_ids)
        self._keep_hidden_states(len(token_ids))
        return graph.logits[: len(token_ids)], graph.sampled_token_ids[: len(token_ids)]

    def should_run_mixed(self, num_rows: int, num_tokens: int) -> bool:
        """See `GraphRunner.should_run_mixed`."""
        return self.enabled and self._mixed_key(num_rows, num_tokens) is not None

    def run_mixed(
        self,
        token_ids: torch.Tensor,
        positions: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: BlockTables,
        sampling: SamplingTensors,
        num_sampled: Sequence[int],
        query_lens: Sequence[int],
        slots: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GraphRunner.run_mixed`."""
        num_rows = len(seq_lens)
        key = self._mixed_key(num_rows, len(token_ids))
        assert key is not None, "a step that should_run_mixed refuses"
        graph = self._graph(key)
        graph.fill_sampling(sampling, num_sampled)
        graph.fill_token_values([end - 1 for end in accumulate(query_lens)])
        graph.fill(positions, seq_lens, block_tables, query_lens, slots)
        graph.run(token_ids)
        self._keep_hidden_states(len(token_ids))
        return graph.logits[:num_rows], graph.sampled_token_ids[:num_rows]

    def _keep_hidden_states(self, num_tokens: int) -> None:
        if self._hidden_buffer is not None:
            self.hidden_states = self._hidden_buffer[:num_tokens]

    def _mixed_key(self, num_rows: int, num_tokens: int) -> GraphKey | None:
        """The smallest mixed graph for a step; None: there is none."""
        for key in self._mixed_keys:
            if key.num_tokens >= num_tokens and key.num_rows > num_rows:  # one row stays unused
                return key
        return None

    def _keys(self) -> list[GraphKey]:
        """All graphs that steps may need."""
        has_adapters = self._adapters is not None and self._adapters.has_slots
        return [
            GraphKey(size, query_len, with_adapters)
            for query_len, sizes in self.sizes.items()
            for size in sizes
            for with_adapters in ((False, True) if has_adapters else (False,))
        ] + self._mixed_keys

    def _size(self, num_rows: int, query_len: int) -> int | None:
        """The smallest graph for this many sequences; None: there is none."""
        if query_len > self.max_query_len:
            return None
        sizes = self.sizes[1 if query_len == 1 else self.max_query_len]
        return next((size for size in sizes if size >= num_rows), None)

    def _graph(self, key: GraphKey) -> DecodeGraph:
        if key not in self.graphs:
            self.graphs[key] = DecodeGraph(
                self._model,
                self._kv_caches,
                key.num_rows,
                self._block_tables,
                self._block_size,
                self._capture,
                self.sampler,
                self._logits_buffer,
                key.max_query_len,
                self._adapters if key.has_adapters else None,
                key.is_mixed,
                self._hidden_buffer,
            )
        return self.graphs[key]


def padding_blocks_of(spec: ModelSpec, kv_caches: Sequence[LayerCache]) -> dict[int | None, int]:
    """By attention window, the block that unused rows of a graph write to: the last one."""
    paddings = dict.fromkeys(spec.sliding_windows, 0)  # without attention, nothing is written
    for layer, cache in zip(spec.layers, kv_caches, strict=True):
        if isinstance(cache, KVCache | LatentCache):
            paddings[layer.sliding_window] = cache.kv.shape[1] - 1
    return paddings


def padding_state_row_of(caches: Sequence[LayerCache]) -> int | None:
    """The row of recurrent states that unused rows of a graph read and write: the last one.

    None: the model has no recurrent layers.
    """
    for cache in caches:
        if isinstance(cache, RecurrentState) and cache.conv.numel():
            return len(cache.conv) - 1
    return None


def capture_sizes(
    max_num_seqs: int, query_len: int = 1, max_capture_size: int | None = None
) -> list[int]:
    """The numbers of sequences that graphs are captured for: 1, 2, 4, 8, 16, 24 and so on.

    query_len: tokens of each sequence. max_capture_size: the most tokens of a graph.
    """
    largest = max_num_seqs
    if max_capture_size is not None:
        largest = min(largest, max_capture_size // query_len)
    if not largest:
        return []
    small = [size for size in SMALL_SIZES if size < largest]
    return [*small, *range(SIZE_STEP, largest, SIZE_STEP), largest]


def logits_dtype(spec: ModelSpec, dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits for the sampler: that of the LM head's outputs, if they are the logits.

    The sampler reads 16-bit logits as they are. That halves their memory traffic, and a copy less.
    """
    return torch.float32 if spec.scales_logits else dtype


def mixed_keys(
    max_num_seqs: int, max_mixed_tokens: int, max_capture_size: int | None = None
) -> list[GraphKey]:
    """The graphs of steps with prompts beside decodes, the smallest first.

    A row more than there can be sequences stays unused.
    """
    largest = min(max_mixed_tokens, MAX_MIXED_TOKENS)
    if max_capture_size is not None:
        largest = min(largest, max_capture_size)
    sizes = [size for size in MIXED_SIZES if size < largest]
    if largest:
        sizes.append(largest)
    return [GraphKey(min(size, max_num_seqs) + 1, size, is_mixed=True) for size in sizes]


def estimate_graph_bytes(
    spec: ModelSpec,
    dtype: torch.dtype,
    max_num_seqs: int,
    max_query_len: int,
    max_capture_size: int | None,
    max_blocks: int,
    max_mixed_tokens: int = 0,
) -> int:
    """Bytes on the device of all CUDA graphs of a model, the logits that they share included.

    max_blocks: blocks of the longest request. Counted are logits, the activations of the largest
    graph, whose memory the others use, too, the inputs of every graph, and the driver's memory.
    """
    sizes = {
        query_len: capture_sizes(max_num_seqs, query_len, max_capture_size)
        for query_len in {1, max_query_len}
    }
    mixed = mixed_keys(max_num_seqs, max_mixed_tokens, max_capture_size)
    num_graphs = sum(map(len, sizes.values())) + len(mixed)
    if not num_graphs:
        return 0
    num_tokens = max(size * query_len for query_len in sizes for size in sizes[query_len])
    widest = max(spec.for_layer(i).intermediate_size for i in range(len(spec.layers)))
    num_activations = max(num_tokens, *(key.num_tokens for key in mixed), 0)
    activations = num_activations * (2 * spec.hidden_size + 3 * widest) * dtype.itemsize
    # What the LM head computes, and the buffer; without a sampler in the graph, float32 is between.
    itemsize = 2 * logits_dtype(spec, dtype).itemsize
    if spec.rank is not None or itemsize > 2 * dtype.itemsize:
        itemsize = dtype.itemsize + 4 + 4
    logits = num_tokens * spec.vocab_size * itemsize
    num_rows = sum(sum(of_len) for of_len in sizes.values()) + sum(key.num_rows for key in mixed)
    # int32: those of all slots, and those of each graph's rows.
    tables = (max_num_seqs + num_rows) * max_blocks * 4 * len(spec.sliding_windows)
    kernels = num_graphs * (len(spec.layers) + 1) * KERNELS_PER_LAYER
    return activations + logits + tables + kernels * BYTES_PER_KERNEL
