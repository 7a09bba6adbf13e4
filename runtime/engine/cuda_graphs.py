"""Steps on a GPU as CUDA graphs, from token ids to sampled token ids.

Launching the kernels of a small step one by one takes longer than running them. A graph has a fixed
number of sequences and tokens (`BatchDescriptor`); a smaller step is padded to the next larger
graph, where unused tokens are written to a padding block. There are graphs for decodes, for the
verification of drafts, and for mixed steps, which have prompts beside either; each of them without
adapters and with them. All are captured at the start, so that no step waits for one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from operator import attrgetter
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
from llmkit.model.language_model import LanguageModel, LayerCache
from llmkit.model.lora import LoraManager
from llmkit.model.parallel_group import gather_logits
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.graph_runner import Sampler
from llmkit.runtime.engine.logits_processor_tables import LogitsProcessorTables
from llmkit.runtime.engine.paged_model import ForwardInputs
from llmkit.runtime.engine.sampling_tensors import (
    SamplingTensors,
    num_packed_values,
    packed_views,
)
from llmkit.runtime.engine.slot_block_tables import SlotBlockTables
from llmkit.runtime.engine.static_batch import StaticBatch

SMALL_SIZES = (1, 2, 4)  # sequences of a graph; larger graphs have multiples of SIZE_STEP
SIZE_STEP = 8
# Tokens of a step with prompts beside decodes. In larger steps, the host launches kernels in less
# time than they run.
MAX_MIXED_TOKENS = 512
MIXED_SIZES = (16, *range(32, 256, 32), *range(256, MAX_MIXED_TOKENS, 64))
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


class BatchDescriptor(NamedTuple):
    """What a graph can run: steps of up to so many sequences and tokens."""

    num_reqs: int  # sequences
    num_tokens: int
    num_logits: int  # tokens that are sampled from
    # Each sequence has up to `num_tokens // num_reqs` tokens, and all are sampled from: a decode,
    # or the verification of drafts. Otherwise prompts are beside decodes: the step is mixed.
    is_uniform: bool = True
    has_lora: bool = False

    @property
    def max_query_len(self) -> int:
        """The most tokens of a sequence."""
        return self.num_tokens // self.num_reqs if self.is_uniform else self.num_tokens


class StepGraph(StaticBatch):
    """The graph of a step, from token ids to sampled ids. Its results stay valid until the next."""

    # [L, V] of the L tokens that are sampled from, of `logits_dtype` with a sampler, else float32;
    # hidden states before the last pipeline stage
    logits: torch.Tensor
    # int64 [L]: sampled token ids, or the most probable ones without a sampler; -1 where logits are
    # not finite
    sampled_token_ids: torch.Tensor
    changed_token_ids: torch.Tensor  # int64 [L]: the same after the logits processors

    def __init__(
        self,
        model: Decoder | DraftHead,
        kv_caches: Sequence[LayerCache],
        descriptor: BatchDescriptor,
        block_tables: SlotBlockTables,
        block_size: int,
        capture: Capture,
        sampler: Sampler | None = None,
        logits_buffer: torch.Tensor | None = None,
        adapters: LoraManager | None = None,
        hidden_buffer: torch.Tensor | None = None,
        logits_processors: LogitsProcessorTables | None = None,
    ) -> None:
        """Capture it. logits_buffer: [L or more, V], shared by all graphs; None: this graph has its
        own logits. adapters: those that the step applies, with `descriptor.has_lora`.
        hidden_buffer: [T or more, C], shared by all graphs: gets what a draft head reads of each
        token; None: there is no draft head. logits_processors: of a second, small graph, which
        samples again in the steps that have some; None: no step has.
        """
        self.descriptor = descriptor
        num_logits = descriptor.num_logits
        # The graph inputs: sampling parameters, then the tokens that are sampled from (all of them
        # in a uniform step), then the adapter of each token.
        num_sampling_values = num_packed_values(num_logits)
        num_indices = 0 if descriptor.is_uniform else num_logits
        num_lora_values = descriptor.num_tokens if descriptor.has_lora else 0
        padding_blocks = padding_blocks_of(model.spec, kv_caches)
        super().__init__(
            descriptor.num_reqs,
            block_tables,
            block_size,
            padding_blocks,
            model.device,
            num_graph_inputs=num_sampling_values + num_indices + num_lora_values,
            max_query_len=descriptor.max_query_len,
            max_num_tokens=None if descriptor.is_uniform else descriptor.num_tokens,
            padding_state_row=padding_state_row_of(kv_caches),
        )
        parts = (num_sampling_values, num_indices, num_lora_values)
        self._sampling, self._logits_indices, self._lora_slots = self.graph_inputs.split(parts)
        host_parts = self.host_graph_inputs.split(parts)
        self._host_sampling, self._host_logits_indices, self._host_lora_slots = host_parts
        self._sampling_tensors: SamplingTensors | None = None  # those in `_host_sampling`
        _, integers = packed_views(self._host_sampling, num_logits)
        self._host_counters = integers[2].numpy()
        self._model = model
        self._kv_caches = kv_caches
        self._sampler = sampler
        self._logits_buffer = logits_buffer
        self._hidden_buffer = hidden_buffer
        self._adapters = adapters if descriptor.has_lora else None
        self._logits_processors = logits_processors
        self.token_ids = torch.zeros(self.num_tokens, dtype=torch.int64, device=model.device)
        self.prepare_inputs([], [], {window: [] for window in padding_blocks})
        self._captured = capture(self._forward)
        self._captured_processors: Replayable | None = None
        if sampler is not None and logits_processors is not None and model.spec.is_last_stage:
            self._captured_processors = capture(self._sample_changed)

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
        with nullcontext() if adapters is None else adapters.activate_slots(self._lora_slots):
            hidden = self._model(self.token_ids, self.positions, self.batch, self._kv_caches)
        if not self._model.spec.is_last_stage:
            self.logits = hidden
            self.sampled_token_ids = self.token_ids
            return
        if self._hidden_buffer is not None:
            self._hidden_buffer[: len(hidden)] = self._model.draft_inputs(hidden)
        if not self.descriptor.is_uniform:
            hidden = hidden[self._logits_indices]
        out = None
        if self._logits_buffer is not None:
            out = self._logits_buffer[: self.descriptor.num_logits]
        logits = compute_logits(self._model, hidden, self._sampler, out)
        self.logits = logits
        if self._sampler is not None:
            self.sampled_token_ids = self._sampler(logits, *self._sampling_arguments())
        else:
            self.sampled_token_ids = self._model.parallel_group.greedy(logits)

    def _sampling_arguments(self) -> tuple[torch.Tensor, ...]:
        """The sampling parameters and counters, in the order of `kernels.sampling.sample`."""
        floats, integers = packed_views(self._sampling, self.descriptor.num_logits)
        temperature, top_p, min_p = floats
        top_k, seeds, counters = integers
        return temperature, top_k, top_p, min_p, seeds, counters

    def _sample_changed(self) -> None:
        """Sample again, from logits after the processors."""
        assert self._sampler is not None and self._logits_processors is not None
        self.changed_token_ids = self._sampler(
            self.logits,
            *self._sampling_arguments(),
            None,
            None,
            self._logits_processors.tables,
            self._logits_processors.row_slots[: self.descriptor.num_logits],
        )

    # Each step: write what the graph reads, `prepare_inputs` last, as it copies all to the device.

    def prepare_sampling(self, sampling: SamplingTensors, num_sampled: Sequence[int]) -> None:
        """Write the sampling parameters of the next step, of each token that is sampled from."""
        count = len(num_sampled)
        if sampling is not self._sampling_tensors:  # most steps have those of the step before
            self._sampling_tensors = sampling
            floats, integers = packed_views(self._host_sampling, self.descriptor.num_logits)
            floats.zero_()  # unused rows are greedy
            integers.zero_()
            floats[0][:count] = sampling.temperature
            floats[1][:count] = sampling.top_p
            floats[2][:count] = sampling.min_p
            integers[0][:count] = sampling.top_k
            integers[1][:count] = sampling.seeds
        self._host_counters[:count] = num_sampled

    def prepare_logits_indices(self, indices: Sequence[int]) -> None:
        """Write which tokens of a mixed step are sampled from."""
        _write_padded(self._host_logits_indices, indices)

    def prepare_lora_slots(self, slots: Sequence[int]) -> None:
        """Write the adapter of each token; see `LoraManager.activate_slots`."""
        _write_padded(self._host_lora_slots, slots)

    def replay(self, token_ids: torch.Tensor, changes_logits: bool = False) -> torch.Tensor:
        """Compute `logits`. Returns `sampled_token_ids`, or else `changed_token_ids`.

        changes_logits: whether rows have logits processors. Call `prepare_inputs` before.
        """
        self.token_ids[: len(token_ids)] = token_ids
        self._captured.replay()
        if not changes_logits or self._captured_processors is None:
            return self.sampled_token_ids
        self._captured_processors.replay()
        return self.changed_token_ids


def _write_padded(buffer: torch.Tensor, values: Sequence[int]) -> None:
    """Write values to the beginning of a buffer, and 0 after them."""
    buffer[: len(values)] = torch.tensor(values, dtype=torch.int64)
    buffer[len(values) :] = 0


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
        logits_processors: LogitsProcessorTables | None = None,
    ) -> None:
        """max_blocks: blocks of the longest request. sampler: None: there is no Triton.
        max_query_len: tokens of a sequence in a step that verifies drafts.
        max_capture_size: the most tokens of a graph; None: those of `max_num_seqs` sequences.
        max_mixed_tokens: the most tokens of a step with prompts beside decodes; 0: they have no
        graphs. hidden_size: the columns of what a draft head reads of each token (`hidden_states`);
        0: there is no draft head. logits_processors: see the attribute.
        """
        self._model = model
        self._kv_caches = kv_caches
        self._capture = capture
        # It samples in graphs, and in steps without them; None: the runner samples. Ranks gather
        # the logits, and each samples the same tokens.
        self.sampler = sampler
        self._block_tables = SlotBlockTables(
            max_num_seqs, max_blocks, padding_blocks_of(model.spec, kv_caches), model.device
        )
        self._block_size = block_size
        self._adapters = adapters
        # Those of steps; None: no step has any. Graphs are captured with them.
        self.logits_processors = logits_processors
        self._adapters_version = 0 if adapters is None else adapters.version
        self._captures_all = False
        self.samples_tokens = self.sampler is not None
        # Without adapters; graphs with them have the same sizes.
        self._descriptors = batch_descriptors(
            max_num_seqs,
            max_query_len,
            max_capture_size,
            max_mixed_tokens if can_capture_prompts(model.spec) else 0,
        )
        uniform = [descriptor for descriptor in self._descriptors if descriptor.is_uniform]
        self._decodes = [descriptor for descriptor in uniform if descriptor.max_query_len == 1]
        self._verifications = [descriptor for descriptor in uniform if descriptor.max_query_len > 1]
        self._mixed = [descriptor for descriptor in self._descriptors if not descriptor.is_uniform]
        self.graphs: dict[BatchDescriptor, StepGraph] = {}
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
        self.enabled = enabled and can_capture and bool(self._descriptors)
        self._logits_buffer = None
        if model.spec.is_last_stage and self.enabled:
            num_logits = max(descriptor.num_logits for descriptor in self._descriptors)
            shape = (num_logits, model.spec.vocab_size)
            dtype = torch.float32
            if self.samples_tokens:
                shape = (num_logits, model.spec.full_model.vocab_size)
                dtype = logits_dtype(model.spec, model.dtype)
            self._logits_buffer = torch.empty(shape, device=model.device, dtype=dtype)
        # What a draft head reads of the tokens of the last step, [T, hidden_size].
        self.hidden_states = torch.empty(0, device=model.device, dtype=model.dtype)
        self._hidden_buffer = None
        if hidden_size and self.enabled:
            num_tokens = max(descriptor.num_tokens for descriptor in self._descriptors)
            self._hidden_buffer = self.hidden_states.new_empty(num_tokens, hidden_size)

    @property
    def num_graphs(self) -> int:
        """How many graphs there are."""
        return len(self.graphs)

    @property
    def max_num_reqs(self) -> int:
        """The most sequences of a decode that a graph runs."""
        return max((descriptor.num_reqs for descriptor in self._decodes), default=0)

    @torch.inference_mode()
    def capture_all(self, captured: Callable[[int, int], None] = lambda *_: None) -> None:
        """Capture all graphs that are missing, the largest first: smaller ones reuse its memory.

        captured: called with the number of graphs that exist and of those that will.
        """
        if not self.enabled:
            return
        self._captures_all = True
        descriptors = list(self._descriptors)
        if self._adapters is not None and self._adapters.has_slots:
            descriptors += [descriptor._replace(has_lora=True) for descriptor in descriptors]
        descriptors.sort(key=lambda descriptor: descriptor.num_tokens, reverse=True)
        for number, descriptor in enumerate(descriptors, start=1):
            self._graph(descriptor)
            captured(number, len(descriptors))
        if self._model.device.type == "cuda":
            # What ran once before each capture has left memory that only this stream could reuse.
            torch.cuda.empty_cache()

    def update_adapters(self) -> None:
        """Capture the graphs with adapters again if an adapter was added that they do not have."""
        adapters = self._adapters
        if adapters is None or adapters.version == self._adapters_version:
            return
        self._adapters_version = adapters.version
        for descriptor in [descriptor for descriptor in self.graphs if descriptor.has_lora]:
            del self.graphs[descriptor]
        if self._captures_all:
            self.capture_all()

    def can_replay(
        self,
        query_lens: Sequence[int],
        adapter_ids: Collection[int] = (),
        is_mixed: bool = False,
    ) -> bool:
        """See `GraphRunner.can_replay`."""
        adapters = self._adapters
        for adapter_id in adapter_ids:
            if adapter_id and (adapters is None or adapters.slot(adapter_id) is None):
                return False
        return self.enabled and self._dispatch(query_lens, is_mixed) is not None

    def replay(
        self,
        token_ids: torch.Tensor,
        inputs: ForwardInputs,
        sampling: SamplingTensors,
        num_sampled: Sequence[int],
        logits_indices: Sequence[int] | None = None,
        adapter_ids: Sequence[int] = (),
        changes_logits: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GraphRunner.replay`."""
        query_lens = inputs.query_lens
        descriptor = self._dispatch(query_lens, logits_indices is not None)
        assert descriptor is not None, "a step that can_replay refuses"
        adapters = self._adapters if any(adapter_ids) else None
        graph = self._graph(descriptor._replace(has_lora=adapters is not None))
        graph.prepare_sampling(sampling, num_sampled)
        if logits_indices is not None:
            graph.prepare_logits_indices(logits_indices)
        if adapters is not None:
            slot_of = {id_: adapters.slot(id_) or 0 for id_ in set(adapter_ids)}
            graph.prepare_lora_slots(
                [
                    slot_of[adapter_id]
                    for adapter_id, num_tokens in zip(adapter_ids, query_lens, strict=True)
                    for _ in range(num_tokens)
                ]
            )
        graph.prepare_inputs(
            inputs.positions,
            inputs.seq_lens,
            inputs.block_tables,
            query_lens,
            inputs.slots,
            inputs.state_rows,
        )
        sampled_token_ids = graph.replay(token_ids, changes_logits)
        if self._hidden_buffer is not None:
            self.hidden_states = self._hidden_buffer[: len(token_ids)]
        num_logits = len(num_sampled)
        return graph.logits[:num_logits], sampled_token_ids[:num_logits]

    def _dispatch(self, query_lens: Sequence[int], is_mixed: bool) -> BatchDescriptor | None:
        """The smallest graph for a step, without adapters; None: there is none."""
        num_reqs = len(query_lens)
        if is_mixed:
            descriptors = self._mixed
            # One sequence stays unused: `AttentionBatch` wants it.
            index = bisect_right(descriptors, num_reqs, key=attrgetter("num_reqs"))
            by_tokens = bisect_left(descriptors, sum(query_lens), key=attrgetter("num_tokens"))
            index = max(index, by_tokens)
        else:
            descriptors = self._decodes if max(query_lens) == 1 else self._verifications
            index = bisect_left(descriptors, num_reqs, key=attrgetter("num_reqs"))
        if index == len(descriptors):
            return None
        descriptor = descriptors[index]
        return descriptor if max(query_lens) <= descriptor.max_query_len else None

    def _graph(self, descriptor: BatchDescriptor) -> StepGraph:
        if descriptor not in self.graphs:
            self.graphs[descriptor] = StepGraph(
                self._model,
                self._kv_caches,
                descriptor,
                self._block_tables,
                self._block_size,
                self._capture,
                self.sampler,
                self._logits_buffer,
                self._adapters,
                self._hidden_buffer,
                self.logits_processors,
            )
        return self.graphs[descriptor]


def padding_blocks_of(spec: ModelSpec, kv_caches: Sequence[LayerCache]) -> dict[int | None, int]:
    """By attention window, the block that unused tokens are written to: the last one."""
    paddings = dict.fromkeys(spec.sliding_windows, 0)  # without attention, nothing is written
    for layer, cache in zip(spec.layers, kv_caches, strict=True):
        if isinstance(cache, KVCache | LatentCache):
            paddings[layer.sliding_window] = cache.kv.shape[1] - 1
    return paddings


def padding_state_row_of(caches: Sequence[LayerCache]) -> int | None:
    """The row of recurrent states that unused sequences of a graph read and write: the last one.

    None: the model has no recurrent layers.
    """
    for cache in caches:
        if isinstance(cache, RecurrentState) and cache.conv.numel():
            return len(cache.conv) - 1
    return None


def can_capture_prompts(spec: ModelSpec) -> bool:
    """Whether graphs can run prompts. Those of other layers need the lengths on the host."""
    return spec.recurrent is None and spec.mla is None


def batch_descriptors(
    max_num_seqs: int,
    max_query_len: int = 1,
    max_capture_size: int | None = None,
    max_mixed_tokens: int = 0,
) -> list[BatchDescriptor]:
    """The graphs of all steps without adapters: of each kind, the smallest first.

    max_query_len: tokens of a sequence in a step that verifies drafts. max_capture_size: the most
    tokens of a graph; None: any number. max_mixed_tokens: the most tokens of a step with prompts
    beside decodes; 0: they have no graphs.
    """
    descriptors = []
    for query_len in sorted({1, max_query_len}):
        for num_reqs in capture_sizes(max_num_seqs, query_len, max_capture_size):
            num_tokens = num_reqs * query_len
            descriptors.append(BatchDescriptor(num_reqs, num_tokens, num_tokens))
    for num_tokens in mixed_sizes(max_mixed_tokens, max_capture_size):
        num_reqs = min(num_tokens, max_num_seqs)
        num_logits = min(num_tokens, num_reqs * max_query_len)
        # A sequence more than there can be stays unused.
        mixed = BatchDescriptor(num_reqs + 1, num_tokens, num_logits, is_uniform=False)
        descriptors.append(mixed)
    return descriptors


def capture_sizes(
    max_num_seqs: int, query_len: int = 1, max_capture_size: int | None = None
) -> list[int]:
    """The numbers of sequences of decodes and verifications: 1, 2, 4, 8, 16, 24 and so on.

    query_len: tokens of each sequence. max_capture_size: the most tokens of a graph.
    """
    largest = max_num_seqs
    if max_capture_size is not None:
        largest = min(largest, max_capture_size // query_len)
    if not largest:
        return []
    small = [size for size in SMALL_SIZES if size < largest]
    return [*small, *range(SIZE_STEP, largest, SIZE_STEP), largest]


def mixed_sizes(max_mixed_tokens: int, max_capture_size: int | None = None) -> list[int]:
    """The numbers of tokens of mixed steps: 16, 32, 64 and so on up to MAX_MIXED_TOKENS."""
    largest = min(max_mixed_tokens, MAX_MIXED_TOKENS)
    if max_capture_size is not None:
        largest = min(largest, max_capture_size)
    sizes = [size for size in MIXED_SIZES if size < largest]
    return [*sizes, largest] if largest else []


def logits_dtype(spec: ModelSpec, dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits for the sampler: that of the LM head's outputs, if they are the logits.

    The sampler reads 16-bit logits as they are. That halves their memory traffic, and a copy less.
    """
    return torch.float32 if spec.scales_logits else dtype


def compute_logits(
    model: LanguageModel | DraftHead,
    hidden: torch.Tensor,
    sampler: Sampler | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logits [n, V] of hidden states [n, H], in graphs and in steps without them.

    They are float32, and of a rank's part of the vocabulary. A GPU's sampler gets those of the
    whole vocabulary, of `logits_dtype`. out: gets them, and is returned.
    """
    if not isinstance(model, Decoder | DraftHead):
        logits = model.logits(hidden)
    else:
        dtype = torch.float32 if sampler is None else logits_dtype(model.spec, model.dtype)
        is_gathered = sampler is not None and model.parallel_group.is_split
        if out is not None and isinstance(model, Decoder) and not is_gathered:
            return model.logits(hidden, dtype, out)
        logits = model.logits(hidden, dtype)
        if is_gathered:
            logits = gather_logits(logits, model.spec, model.parallel_group)
    return logits if out is None else out.copy_(logits)
