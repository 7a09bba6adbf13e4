"""Decode steps on a CPU as recorded calls of the compiled kernels.

In a small step Python takes longer than the kernels. The layers are recorded once for each number
of sequences and then replayed without Python.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.decoder import Decoder
from llmkit.model.draft_head import DraftHead
from llmkit.model.language_model import LayerCache
from llmkit.model.rope import CosSinTable
from llmkit.runtime.engine.graph_runner import Sampler, WithoutCapture
from llmkit.runtime.engine.paged_model import ForwardInputs
from llmkit.runtime.engine.sampling_tensors import SamplingTensors
from llmkit.runtime.engine.slot_block_tables import SlotBlockTables
from llmkit.runtime.engine.static_batch import StaticBatch, has_recurrent_states

# Rows times hidden size of a step that is replayed. In larger steps Python is a small part.
MAX_HIDDEN_ELEMENTS = 1 << 15
MAX_RECORDINGS = 4  # each keeps all tensors that a step allocates


class _TorchWatcher(TorchDispatchMode):
    """Keeps the tensors that a step allocates, and notes whether a torch operator computes.

    A replay runs only the compiled kernels, so it would miss what torch computes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated: list[torch.Tensor] = []
        self.computed = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler with the first operator, which takes 1.3 s.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator."""
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default):
            self.allocated.append(result)
        elif not func.is_view:
            self.computed = True
        return result


class CpuGraph(StaticBatch):
    """The layers of a model for `num_reqs` sequences with `num_tokens` new tokens.

    Each has one token, or several where drafts are verified.
    """

    def __init__(
        self,
        model: Decoder | DraftHead,
        kv_caches: Sequence[LayerCache],
        num_reqs: int,
        num_tokens: int,
        block_tables: SlotBlockTables,
        block_size: int,
        cos_sin_tables: Mapping[str, CosSinTable],
    ) -> None:
        padding_blocks = dict.fromkeys(model.spec.sliding_windows, 0)
        padding_state_row = 0 if has_recurrent_states(kv_caches) else None  # no row is unused
        super().__init__(
            num_reqs,
            block_tables,
            block_size,
            padding_blocks,
            max_query_len=1 + num_tokens - num_reqs,
            max_num_tokens=num_tokens if num_tokens > num_reqs else None,
            padding_state_row=padding_state_row,
        )
        self.input = torch.zeros(num_tokens, model.spec.hidden_size)
        self.per_layer_inputs: torch.Tensor | None = None  # [tokens, layers, P]
        if model.spec.per_layer_input_size:
            shape = len(model.layers), num_tokens, model.spec.per_layer_input_size
            # A layer's inputs lie together, because the kernels take rows that do.
            self.per_layer_inputs = torch.zeros(shape).transpose(0, 1)
        self.output = self.input  # [tokens, H], after the last norm
        self.aux_hidden_states: dict[int, torch.Tensor] = {}  # see `Decoder.aux_hidden_states`
        self._model = model
        self._kv_caches = kv_caches
        self._cos_sin_tables = cos_sin_tables
        self.cos_sin = model.cos_sin(self.positions)
        self._program = b""
        self._allocated: list[torch.Tensor] = []  # tensors that the program reads and writes

    def embed(self, token_ids: torch.Tensor, largest_position: int) -> None:
        """Write the input of the first layer. Call `prepare_inputs` before."""
        hidden, per_layer_inputs = self._model.embed(token_ids)
        self.input.copy_(hidden)
        if self.per_layer_inputs is not None and per_layer_inputs is not None:
            self.per_layer_inputs.copy_(per_layer_inputs)
        for name, table in self._cos_sin_tables.items():
            table.write(self.positions, largest_position, self.cos_sin[name])

    def record(self) -> bool:
        """Run the layers and record them. Returns False when they cannot be replayed."""
        with cpu_kernels.recording() as recorder, _TorchWatcher() as watcher:
            self.output = self._model.run_layers(
                self.input, self.cos_sin, self.batch, self._kv_caches, self.per_layer_inputs
            )
        self.aux_hidden_states = self._model.aux_hidden_states
        if watcher.computed:
            return False
        self._program = recorder.program()
        self._allocated = watcher.allocated
        return True

    def replay(self) -> None:
        """Run the recorded layers on the current inputs."""
        assert cpu_kernels.library is not None
        cpu_kernels.library.run(self._program)


class CpuGraphRunner(WithoutCapture):
    """The recorded decode steps of a model, by numbers of sequences and tokens (`GraphRunner`).

    A step is recorded when the last step had as many of both. Steps that verify drafts are counted
    apart from those with one token of each sequence.
    """

    samples_tokens = False  # `replay` returns logits only
    sampler: Sampler | None = None

    def __init__(
        self,
        model: Decoder | DraftHead,
        kv_caches: Sequence[LayerCache],
        max_blocks: int,
        block_size: int,
        max_num_seqs: int,
        enabled: bool = True,
    ) -> None:
        """max_blocks: blocks of the longest request."""
        self._model = model
        self._kv_caches = kv_caches
        padding_blocks = dict.fromkeys(model.spec.sliding_windows, 0)
        self._block_tables = SlotBlockTables(max_num_seqs, max_blocks, padding_blocks)
        self._block_size = block_size
        self._max_positions = max_blocks * block_size
        # By the sequences and tokens of a step.
        self._graphs: OrderedDict[tuple[int, int], CpuGraph] = OrderedDict()
        # By whether sequences have several tokens: the size of the last such step.
        self._last_keys: dict[bool, tuple[int, int]] = {}
        # What a draft head reads of the tokens of the last step, [T, C].
        self.hidden_states = torch.empty(0)
        # Other collective operations than those of the compiled kernels are not recorded.
        group = model.parallel_group
        has_recorded_group = group.reduces_in_kernels and group.pp_size == 1
        has_kernels = cpu_kernels.library is not None and model.dtype == torch.float32
        self.enabled = enabled and has_recorded_group and has_kernels

    @cached_property
    def _cos_sin_tables(self) -> dict[str, CosSinTable]:
        """Of each rotary embedding of the model."""
        return {
            name: CosSinTable(rope, self._max_positions) for name, rope in self._model.ropes.items()
        }

    @property
    def num_graphs(self) -> int:
        """How many recordings are in memory."""
        return len(self._graphs)

    def can_replay(
        self,
        query_lens: Sequence[int],
        adapter_ids: Collection[int] = (),
        is_mixed: bool = False,
    ) -> bool:
        """See `GraphRunner.can_replay`.

        The step must be small, and either recorded already or as large as the last step of its
        kind, whose size this method remembers: steps of draft heads for one token and for several
        take turns. Adapters are applied by torch.
        """
        if is_mixed or any(adapter_ids):
            return False
        num_tokens = sum(query_lens)
        key = (len(query_lens), num_tokens)
        has_drafts = num_tokens > len(query_lens)
        repeats = key == self._last_keys.get(has_drafts) or key in self._graphs
        self._last_keys[has_drafts] = key
        is_small = num_tokens * self._model.spec.hidden_size <= MAX_HIDDEN_ELEMENTS
        return repeats and self.enabled and is_small

    def replay(
        self,
        token_ids: torch.Tensor,
        inputs: ForwardInputs,
        sampling: SamplingTensors,
        num_sampled: Sequence[int],
        logits_indices: Sequence[int] | None = None,
        adapter_ids: Sequence[int] = (),
        changes_logits: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """See `GraphRunner.replay`. The first step of a size is recorded."""
        assert logits_indices is None and not any(adapter_ids), "a step that can_replay refuses"
        key = (len(inputs.seq_lens), len(inputs.positions))
        graph = self._graphs.get(key)
        is_recorded = graph is not None
        if graph is None:
            graph = CpuGraph(
                self._model,
                self._kv_caches,
                *key,
                self._block_tables,
                self._block_size,
                self._cos_sin_tables,
            )
        graph.prepare_inputs(
            inputs.positions,
            inputs.seq_lens,
            inputs.block_tables,
            inputs.query_lens,
            inputs.slots,
            inputs.state_rows,
        )
        graph.embed(token_ids, max(inputs.positions))
        if is_recorded:
            graph.replay()
            self._graphs.move_to_end(key)
        elif graph.record():
            self._graphs[key] = graph
            if len(self._graphs) > MAX_RECORDINGS:
                self._graphs.popitem(last=False)
        else:  # this step's result is valid, but no step of this model can be replayed
            self.enabled = False
            self._graphs.clear()
        self._model.aux_hidden_states = graph.aux_hidden_states
        self.hidden_states = self._model.draft_inputs(graph.output)
        return self._model.logits(graph.output), None
