"""Runs the steps of an engine: token ids in, sampled token ids out.

A step is `prepare_inputs`, `execute`, `sample` and the copy of the results to the host. The runner
reads sequences and never changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.sampling import FULL_VOCAB, VocabParallel, gather_logprobs, sample
from llmkit.kernels.token_bitmask import apply_token_bitmask
from llmkit.model.decoder import Decoder
from llmkit.model.language_model import LanguageModel, new_layer_caches
from llmkit.model.lora import LoraManager
from llmkit.model.parallel_group import Waitable
from llmkit.runtime.engine.cpu_graphs import CpuGraphRunner
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner, compute_logits
from llmkit.runtime.engine.draft_head_proposer import DraftHeadProposer
from llmkit.runtime.engine.draft_model import DraftModelProposer
from llmkit.runtime.engine.drafting import accepted_tokens
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.grammar_bitmasks import GrammarBitmasks, grammar_bitmasks
from llmkit.runtime.engine.graph_runner import GraphRunner, NoGraphRunner, Sampler
from llmkit.runtime.engine.host_block_store import HostBlockStore
from llmkit.runtime.engine.host_cache import HostCopies
from llmkit.runtime.engine.logits_processor_tables import LogitsProcessorTables
from llmkit.runtime.engine.logits_processors import apply_logits_processors
from llmkit.runtime.engine.paged_model import ForwardInputs, PagedModel, int64_tensor
from llmkit.runtime.engine.sampling_tensors import (
    SamplingTensorCache,
    SamplingTensors,
    sampling_tensors_on_device,
)
from llmkit.runtime.engine.scheduler_output import (
    ModelRunnerOutput,
    ScheduledRequest,
    SchedulerOutput,
)
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.step_logprobs import (
    LogprobsTensors,
    compute_prompt_logprobs,
    concatenate,
    empty_logprobs,
    max_alternatives,
    num_prompt_logprobs,
    sampled_logprob_rows,
    split_logprobs,
)
from llmkit.runtime.engine.synthetic_acceptance import synthetic_tokens
from llmkit.runtime.engine.thinking_budget import forced_rows

# Logits of a step that one thread samples from: starting and ending the parallel loops of torch's
# operators takes longer than a thread saves.
MAX_SERIAL_LOGITS = 1 << 16


@dataclass(frozen=True)
class SamplingMetadata:
    """What is sampled in a step: the sequence of each row of logits, and what follows from them.

    Most steps have the same rows as the step before and share this.
    """

    sequences: list[Sequence]
    slots: list[int]
    slots_on_device: torch.Tensor  # int64
    tensors: SamplingTensors
    all_greedy: bool  # no row is drawn
    needs_logits_processors: bool
    has_grammar: bool
    wants_logprobs: bool
    wants_prompt_logprobs: bool
    has_lora: bool
    has_pooling: bool


@dataclass(frozen=True)
class StepInputs:
    """A step, ready for the model."""

    step: SchedulerOutput
    token_ids: torch.Tensor  # int64 [T], on the device
    # The draft model's tokens for all requests, int64 on the device; None: there are none.
    draft_token_ids: torch.Tensor | None
    forward: ForwardInputs
    sampling_metadata: SamplingMetadata
    num_sampled: list[int]  # of each row of logits: the output tokens before the sampled one
    # Of each row: whether its token will be used; empty where no logits change.
    samples: list[bool]
    use_graph: bool
    wants_prompt_logprobs: bool


@dataclass(frozen=True)
class StepResult:
    """What the model computes in a step."""

    # [rows, V], float32 or the model's dtype; hidden states before the last pipeline stage
    logits: torch.Tensor
    token_ids: torch.Tensor | None = None  # int64 [rows], when a graph has sampled them
    prompt_logprobs: tuple[LogprobsTensors, ...] = ()
    embeddings: tuple[torch.Tensor, ...] = ()  # float32, of each request that returns one
    hidden_states: torch.Tensor | None = (
        None  # [T, C], what a draft head reads; None: there is none
    )


@dataclass(frozen=True)
class InFlightStep:
    """A launched step. Its tensors are on the host once `done` has completed."""

    step: SchedulerOutput
    token_ids: torch.Tensor  # int64 [rows of logits]; -1 where logits are not finite
    draft_token_ids: torch.Tensor | None  # the draft model's tokens for all requests
    logprobs: LogprobsTensors | None
    embeddings: tuple[torch.Tensor, ...]  # float32 [H] of each request that returns one
    done: Waitable | None  # None: the tensors are on the host already
    synthetic_acceptance_rates: tuple[float, ...] = ()  # see `EngineConfig`
    # In a pipeline with a draft head, see `DraftHeadProposer.propose_next`.
    next_draft_token_ids: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the last pipeline stage sends to the others."""
        drafts = [] if self.next_draft_token_ids is None else [self.next_draft_token_ids]
        return [self.token_ids, *(self.logprobs or ()), *self.embeddings, *drafts]

    def synchronize(self) -> None:
        """Wait until the results are on the host."""
        if self.done is not None:
            self.done.synchronize()

    def wait(self) -> ModelRunnerOutput:
        """The results, once they are on the host."""
        self.synchronize()
        requests = self.step.requests
        logprobs = None
        prompt_logprobs = None
        if self.logprobs is not None:
            prompt_logprobs, logprobs = split_logprobs(requests, self.logprobs)
        embeddings: dict[str, torch.Tensor] = {}
        if self.embeddings:
            returning = (r.sequence.request.request_id for r in requests if r.returns_embedding)
            embeddings = dict(zip(returning, self.embeddings, strict=True))
        next_drafts = None
        if self.next_draft_token_ids is not None:
            rows = self.next_draft_token_ids.tolist()
            next_drafts = [[token_id for token_id in row if token_id >= 0] for row in rows]
        return ModelRunnerOutput(
            token_ids=self.verified_token_ids(),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            embeddings={name: tensor.numpy().tobytes() for name, tensor in embeddings.items()},
            next_draft_token_ids=next_drafts,
        )

    def verified_token_ids(self) -> list[list[int]]:
        """For each request the accepted draft tokens and the token after them.

        They must be on the host, see `synchronize`.
        """
        sampled = self.token_ids.tolist()
        if len(sampled) == len(self.step.requests):  # no request has drafts
            return [[token_id] for token_id in sampled]
        draft_model_token_ids = (
            None if self.draft_token_ids is None else self.draft_token_ids.tolist()
        )
        accepted = []
        row = 0
        num_drafts = 0
        for request in self.step.requests:
            if draft_model_token_ids is None:
                first_draft = request.num_tokens - request.num_draft_tokens
                drafts = request.token_ids[first_draft:]
            else:
                drafts = draft_model_token_ids[num_drafts : num_drafts + request.num_draft_tokens]
                num_drafts += request.num_draft_tokens
            rows = sampled[row : row + request.num_sampled_rows]
            row += request.num_sampled_rows
            if self.synthetic_acceptance_rates:
                tokens = synthetic_tokens(
                    self.synthetic_acceptance_rates,
                    drafts,
                    rows,
                    request.sequence.arrival,
                    request.num_sampled,
                )
            else:
                tokens = accepted_tokens(drafts, rows)
            accepted.append(tokens)
        return accepted


class ModelRunner:
    """A model and its KV cache on a device."""

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig,
        draft_model: DraftModelProposer | None = None,
        eos_token_ids: tuple[int, ...] = (),
        adapters: LoraManager | None = None,
    ) -> None:
        """adapters: those that the model has; None: it has none yet."""
        self.model = model
        self.config = config
        self.draft_model = draft_model
        self.draft_head = draft_model if isinstance(draft_model, DraftHeadProposer) else None
        self.eos_token_ids = eos_token_ids
        on_gpu = config.device.type == "cuda"
        self.adapters = adapters or LoraManager(
            model, uses_slots=on_gpu and not config.enforce_eager
        )

        kv_caches = new_layer_caches(
            model,
            lambda layer: config.num_cache_blocks(layer.sliding_window),
            config.block_size,
            config.kv_cache_dtype,
            config.num_state_rows + int(on_gpu),  # one for unused sequences of a CUDA graph
        )
        table_of_window = {
            window: config.sliding_windows.index(window) for window in model.spec.sliding_windows
        }
        self.paged_model = PagedModel(model, kv_caches, config, table_of_window)
        # Of each block table, and then of the recurrent states; empty without --kv-offload.
        self.host_stores = self._make_host_stores() if config.num_host_blocks else []

        max_blocks = -(-config.max_model_len // config.block_size)
        self.graph_runner: GraphRunner
        cuda_graphs: CudaGraphRunner | None = None
        if not isinstance(model, Decoder) or model.spec.num_labels:
            self.graph_runner = NoGraphRunner()
        elif on_gpu:
            cuda_graphs = CudaGraphRunner(
                model,
                kv_caches,
                max_blocks,
                config.block_size,
                config.max_num_seqs,
                enabled=not config.enforce_eager,
                max_query_len=1 + config.num_speculative_tokens,
                max_capture_size=config.max_cudagraph_capture_size,
                max_mixed_tokens=config.max_num_batched_tokens,
                adapters=self.adapters,
                hidden_size=0 if self.draft_head is None else self.draft_head.input_size,
            )
            self.graph_runner = cuda_graphs
        else:
            self.graph_runner = CpuGraphRunner(
                model,
                kv_caches,
                max_blocks,
                config.block_size,
                config.max_num_seqs,
                enabled=not config.enforce_eager,
            )
        # On the CPU, the host knows all tokens and changes few logits.
        self.logits_processors: LogitsProcessorTables | None = None
        if on_gpu and model.spec.is_last_stage and not model.spec.num_labels:
            spec = model.spec if self.vocab.is_split else model.spec.full_model
            self.logits_processors = LogitsProcessorTables(
                config.max_num_seqs,
                config.max_num_seqs * (1 + config.num_speculative_tokens),
                spec.vocab_size,
                self.vocab.vocab_start,
                config.device,
            )
        if cuda_graphs is not None:
            cuda_graphs.logits_processors = self.logits_processors
        self._graphs_enabled = True
        self._is_recurrent = config.has_recurrent_states
        self._sampling_tensors = SamplingTensorCache()
        self._sampling_metadata: SamplingMetadata | None = None  # of the last step
        # The last sampled token of each sequence, by slot; for async scheduling.
        self._last_token_ids = torch.zeros(
            config.max_num_seqs, dtype=torch.int64, device=config.device
        )
        # For mean pooling of prompts that take several steps: the sum of the hidden states so far,
        # divided by the prompt's length; float32 [H], by slot.
        self._partial_means: dict[int, torch.Tensor] = {}

    @property
    def vocab(self) -> VocabParallel:
        """The columns that the logits of steps have: a GPU's sampler gets the whole vocabulary."""
        return self.model.parallel_group if self.graph_runner.sampler is None else FULL_VOCAB

    @torch.inference_mode()
    def launch(self, step: SchedulerOutput) -> InFlightStep:
        """Start a step. Steps run in the order of their launches."""
        inputs = self.prepare_inputs(step)
        result = self.execute(inputs)
        if not self.model.spec.is_last_stage:
            return self._receive_results(inputs)
        token_ids, logprobs = self.sample(inputs, result)
        in_flight = self._copy_to_host(inputs, result, token_ids, logprobs)
        if self.draft_head is not None and result.hidden_states is not None:
            self.draft_head.observe(step, inputs.token_ids, token_ids, result.hidden_states)
        if self.model.parallel_group.pp_size > 1:
            in_flight.synchronize()
            if self.draft_head is not None:
                drafts = self.draft_head.propose_next(step, in_flight.verified_token_ids())
                in_flight = replace(in_flight, next_draft_token_ids=drafts)
            self.model.parallel_group.broadcast_results(in_flight.tensors)
        return in_flight

    def prepare_inputs(self, step: SchedulerOutput) -> StepInputs:
        """Run the draft model and collect token ids, block tables and sampling parameters."""
        requests = step.requests
        draft_token_ids = None
        if self.draft_model is not None and not self.config.receives_drafts:
            draft_token_ids = self.draft_model.run(step)
        metadata = self._make_sampling_metadata(requests)
        token_ids = self._step_token_ids(requests, metadata)
        if draft_token_ids is not None:
            token_ids[self._to_device(_draft_rows(requests))] = draft_token_ids

        num_sampled = [request.num_sampled for request in requests]
        if len(metadata.sequences) > len(requests):
            num_sampled = [
                request.num_sampled + row
                for request in requests
                for row in range(request.num_sampled_rows)
            ]
        samples: list[bool] = []
        if metadata.needs_logits_processors or metadata.has_grammar:
            samples = [
                request.samples_next_token
                for request in requests
                for _ in range(request.num_sampled_rows)
            ]
        if metadata.needs_logits_processors and self.logits_processors is not None:
            self.logits_processors.update(
                metadata.sequences, num_sampled, samples, self.eos_token_ids
            )
        forward = self.paged_model.forward_inputs(
            [(request.sequence, request.start, request.stop) for request in requests],
            [request.state_rows for request in requests] if self._is_recurrent else (),
        )
        wants_prompt_logprobs = metadata.wants_prompt_logprobs and any(
            num_prompt_logprobs(request) for request in requests
        )
        uses_eager = wants_prompt_logprobs or metadata.has_pooling or not self._graphs_enabled
        return StepInputs(
            step=step,
            token_ids=token_ids,
            draft_token_ids=draft_token_ids,
            forward=forward,
            sampling_metadata=metadata,
            num_sampled=num_sampled,
            samples=samples,
            use_graph=not uses_eager and self._can_replay(requests, forward, metadata),
            wants_prompt_logprobs=wants_prompt_logprobs,
        )

    def _can_replay(
        self, requests: list[ScheduledRequest], forward: ForwardInputs, metadata: SamplingMetadata
    ) -> bool:
        """Whether a graph can run the step."""
        adapter_ids: Collection[int] = ()
        if metadata.has_lora:
            adapter_ids = {request.sequence.adapter_id for request in requests}
        is_mixed = len(forward.positions) > len(metadata.sequences)
        return self.graph_runner.can_replay(forward.query_lens, adapter_ids, is_mixed)

    def execute(self, inputs: StepInputs) -> StepResult:
        """Compute the logits that are sampled from."""
        uses_torch = inputs.sampling_metadata.has_lora or inputs.wants_prompt_logprobs
        if uses_torch or not self.paged_model.is_compiled:
            return self._execute(inputs)
        with cpu_kernels.torch_on_one_thread():
            return self._execute(inputs)

    def _execute(self, inputs: StepInputs) -> StepResult:
        if inputs.use_graph:
            result = self._replay(inputs)
            if self.draft_head is None:
                return result
            return replace(result, hidden_states=self.graph_runner.hidden_states)

        requests = inputs.step.requests
        adapter_rows = [(request.sequence.adapter_id, request.num_tokens) for request in requests]
        with self.adapters.activate(adapter_rows, self._to_device):
            hidden = self.paged_model.forward(inputs.token_ids, inputs.forward)
        if not self.model.spec.is_last_stage:
            return StepResult(hidden)
        hidden_states = None
        if self.draft_head is not None:
            hidden_states = self.draft_head.draft_inputs(hidden)
        step_hidden = hidden
        prompt_logprobs: list[LogprobsTensors] = []
        if inputs.wants_prompt_logprobs:
            prompt_logprobs = compute_prompt_logprobs(self.model, requests, hidden)
        logits_indices = _logits_indices(requests)
        if len(logits_indices) < len(hidden):
            hidden = hidden[self._to_device(logits_indices)]
        logits = compute_logits(self.model, hidden, self.graph_runner.sampler)
        embeddings: tuple[torch.Tensor, ...] = ()
        if inputs.sampling_metadata.has_pooling:
            embeddings = self._pool(requests, step_hidden, logits)
        return StepResult(
            logits=logits,
            prompt_logprobs=tuple(prompt_logprobs),
            embeddings=embeddings,
            hidden_states=hidden_states,
        )

    def _replay(self, inputs: StepInputs) -> StepResult:
        requests = inputs.step.requests
        metadata = inputs.sampling_metadata
        logits_indices = None
        if len(inputs.token_ids) > len(metadata.sequences):  # prompts are beside decodes
            logits_indices = _logits_indices(requests)
        adapter_ids: list[int] = []
        if metadata.has_lora:
            adapter_ids = [request.sequence.adapter_id for request in requests]
        logits, token_ids = self.graph_runner.replay(
            inputs.token_ids,
            inputs.forward,
            metadata.tensors,
            inputs.num_sampled,
            logits_indices,
            adapter_ids,
            metadata.needs_logits_processors and not metadata.has_grammar,
        )
        return StepResult(logits, token_ids)

    def block_tensors(self, table: int) -> list[torch.Tensor]:
        """See `PagedModel.block_tensors`; those of the draft model too."""
        return [tensor for model in self._paged_models for tensor in model.block_tensors(table)]

    def state_tensors(self) -> list[torch.Tensor]:
        """See `PagedModel.state_tensors`; those of the draft model too."""
        return [tensor for model in self._paged_models for tensor in model.state_tensors()]

    def copy_host_blocks(self, copies: list[HostCopies]) -> None:
        """Start copies between device and host memory. Later steps find and may overwrite blocks.

        copies: see `Scheduler.take_host_copies`.
        """
        for store, of_store in zip(self.host_stores, copies, strict=True):
            if of_store:
                store.copy(of_store)

    @property
    def _paged_models(self) -> list[PagedModel]:
        draft = [] if self.draft_model is None else [self.draft_model.paged_model]
        return [self.paged_model, *draft]

    def _make_host_stores(self) -> list[HostBlockStore]:
        config = self.config
        stores = [
            HostBlockStore(self.block_tensors(table), config.num_host_blocks, config.device)
            for table in range(len(config.sliding_windows))
        ]
        if config.has_recurrent_states:
            states = self.state_tensors()
            stores.append(HostBlockStore(states, config.num_host_states, config.device))
        return stores

    def capture_graphs(self, captured: Callable[[int, int], None] = lambda *_: None) -> None:
        """Capture all CUDA graphs. captured: see `GraphRunner.capture_all`."""
        draft = None if self.draft_model is None else self.draft_model.graph_runner
        for runner in (self.graph_runner, draft):
            if runner is not None:
                runner.capture_all(captured)

    def update_adapter_graphs(self) -> None:
        """Capture graphs for the adapters as they are now. Call it after they have changed."""
        self.graph_runner.update_adapters()

    def sample(
        self, inputs: StepInputs, result: StepResult
    ) -> tuple[torch.Tensor, LogprobsTensors | None]:
        """Sample a token for each row of logits, and compute the logprobs that requests want.

        The token ids are int64 [rows], -1 where logits are not finite. Requests that do not sample
        yet have a row too: a value that is not finite spreads to all later tokens of the sequence,
        so it is found early.
        """
        logits = result.logits
        metadata = inputs.sampling_metadata
        logprob_rows: list[int] = []
        if metadata.wants_logprobs:
            logprob_rows = sampled_logprob_rows(inputs.step.requests)
        # Logprobs come from the unchanged logits; the processors change logits in place.
        raw_logits = logits[self._to_device(logprob_rows)].float() if logprob_rows else logits

        # A graph without a sampler has taken the most probable tokens.
        graph_samples = metadata.all_greedy or self.graph_runner.samples_tokens
        if metadata.needs_logits_processors:
            graph_samples = self.graph_runner.samples_tokens and self.logits_processors is not None
        if result.token_ids is not None and graph_samples and not metadata.has_grammar:
            token_ids = result.token_ids
        else:
            token_ids = self._sample_eagerly(inputs, logits)
        token_ids = self._force_tokens(inputs.step.requests, token_ids)
        if metadata.needs_logits_processors and self.logits_processors is not None:
            self.logits_processors.count(token_ids)

        tables = list(result.prompt_logprobs)
        if logprob_rows:
            sampled = token_ids[self._to_device(logprob_rows)]
            num_alternatives = max_alternatives(inputs.step.requests)
            table = gather_logprobs(raw_logits, sampled, num_alternatives, self.vocab)
            tables.append(LogprobsTensors(*table))
        if self.config.async_scheduling:
            self._last_token_ids[metadata.slots_on_device] = token_ids
        return token_ids, concatenate(tables)

    def _sample_eagerly(self, inputs: StepInputs, logits: torch.Tensor) -> torch.Tensor:
        """Sample after changes to the logits [rows, V], which may be made in place."""
        metadata = inputs.sampling_metadata
        group = self.vocab
        sampler = self.graph_runner.sampler
        bitmasks = None
        if metadata.has_grammar:
            # The host finds what grammars allow while the device computes the logits.
            num_tokens = group.vocab_start + logits.shape[1]
            bitmasks = grammar_bitmasks(
                metadata.sequences, inputs.samples, num_tokens, self.config.device
            )
        if sampler is not None:  # finds logits that are not finite itself
            return self._draw_on_gpu(sampler, inputs, logits, bitmasks)
        if metadata.all_greedy and bitmasks is None and not metadata.needs_logits_processors:
            return group.greedy(logits)
        is_finite = group.rows_finite(logits)
        if bitmasks is not None:
            apply_token_bitmask(logits, *bitmasks, group.vocab_start)
        if metadata.needs_logits_processors and self.logits_processors is not None:
            logits = self.logits_processors.apply(logits, inputs.num_sampled)
        elif metadata.needs_logits_processors:
            apply_logits_processors(
                logits,
                metadata.sequences,
                inputs.num_sampled,
                group.vocab_start,
                self.eos_token_ids,
            )
        return torch.where(is_finite, self._draw(inputs, logits), -1)

    def _force_tokens(
        self, requests: list[ScheduledRequest], token_ids: torch.Tensor
    ) -> torch.Tensor:
        """Put forced tokens in place of sampled ones, int64 [rows]; -1 stays."""
        if all(request.forced_token_id is None for request in requests):
            return token_ids
        rows, forced = forced_rows(
            (request.num_sampled_rows, request.forced_token_id) for request in requests
        )
        at = self._to_device(rows)
        sampled = token_ids[at]
        changed = token_ids.clone()  # a graph may own `token_ids`
        changed[at] = torch.where(sampled < 0, sampled, self._to_device(forced))
        return changed

    def _draw_on_gpu(
        self,
        sampler: Sampler,
        inputs: StepInputs,
        logits: torch.Tensor,
        bitmasks: GrammarBitmasks | None,
    ) -> torch.Tensor:
        """Sample from logits [rows, V], after grammars and logits processors."""
        metadata = inputs.sampling_metadata
        device = self.config.device
        arguments = sampling_tensors_on_device(metadata.tensors, inputs.num_sampled, device)
        if not metadata.needs_logits_processors:
            return sampler(logits, *arguments, *(bitmasks or ()))
        assert self.logits_processors is not None
        masks = (None, None) if bitmasks is None else bitmasks
        slots = self.logits_processors.row_slots[: len(logits)]
        return sampler(logits, *arguments, *masks, self.logits_processors.tables, slots)

    def _draw(self, inputs: StepInputs, logits: torch.Tensor) -> torch.Tensor:
        """Sample from float32 logits [rows, V] with torch."""
        sampling = inputs.sampling_metadata.tensors
        counters = torch.tensor(inputs.num_sampled)
        is_small = logits.numel() <= MAX_SERIAL_LOGITS
        with cpu_kernels.torch_on_one_thread() if is_small else nullcontext():
            return sample(logits, *sampling, counters, self.model.parallel_group)

    def zero_blocks(self, blocks: list[list[int]]) -> None:
        """Zero blocks of each block table in all KV caches."""
        self.paged_model.zero_blocks(blocks)
        if self.draft_model is not None:
            self.draft_model.paged_model.zero_blocks(blocks)

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Replay no step from a graph inside the `with` block."""
        self._graphs_enabled = False
        try:
            yield
        finally:
            self._graphs_enabled = True

    def forget_last_step(self) -> None:
        """Let go of the sequences of the last step."""
        self._sampling_metadata = None

    def _make_sampling_metadata(self, requests: list[ScheduledRequest]) -> SamplingMetadata:
        """What is sampled in a step; that of the last step where it is the same."""
        sequences = [request.sequence for request in requests]
        if any(request.num_draft_tokens for request in requests):
            sequences = [
                request.sequence for request in requests for _ in range(request.num_sampled_rows)
            ]
        slots = [sequence.slot for sequence in sequences]
        last = self._sampling_metadata
        # Sequences are compared by identity. A preempted one may have come back in another slot.
        if last is not None and sequences == last.sequences and slots == last.slots:
            return last
        params = [sequence.request.sampling_params for sequence in sequences]
        self._sampling_metadata = SamplingMetadata(
            sequences=sequences,
            slots=slots,
            slots_on_device=self._to_device(slots),
            tensors=self._sampling_tensors.get(sequences),
            all_greedy=not any(p.temperature for p in params),
            needs_logits_processors=any(p.needs_logits_processors for p in params),
            has_grammar=any(sequence.grammar_matcher is not None for sequence in sequences),
            wants_logprobs=any(p.logprobs is not None for p in params),
            wants_prompt_logprobs=any(p.prompt_logprobs is not None for p in params),
            has_lora=any(sequence.adapter_id for sequence in sequences),
            has_pooling=any(sequence.request.pooling for sequence in sequences),
        )
        return self._sampling_metadata

    def _step_token_ids(
        self, requests: list[ScheduledRequest], metadata: SamplingMetadata
    ) -> torch.Tensor:
        """The token ids of a step, on the device.

        Token ids that the host does not know yet come from the device's table of last tokens. -1
        will end its sequence once the host sees it; until then it counts as token 0.
        """
        if not any(request.token_ids for request in requests):
            return self._last_token_ids[metadata.slots_on_device].clamp_min(0)
        token_ids: list[int] = []
        unknown: list[int] = []  # the places in the step of tokens that the host does not know
        slots: list[int] = []
        for request in requests:
            token_ids += request.token_ids
            if len(request.token_ids) < request.num_tokens:
                unknown.append(len(token_ids))
                slots.append(request.sequence.slot)
                token_ids.append(0)
        on_device = self._to_device(token_ids)
        if unknown:
            last = self._last_token_ids[self._to_device(slots)]
            on_device[self._to_device(unknown)] = last.clamp_min(0)
        return on_device

    def _pool(
        self, requests: list[ScheduledRequest], hidden: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return what is complete of the pooled requests of a step, float32 each.

        hidden: [T, H], all hidden states of the step. logits: [rows, V] or, of a model with a
        classification head, [rows, labels].
        """
        embeddings = []
        of_requests = hidden.split([request.num_tokens for request in requests])
        last_rows = accumulate(request.num_sampled_rows for request in requests)
        for request, rows, end in zip(requests, of_requests, last_rows, strict=True):
            sequence = request.sequence
            if sequence.request.pooling == "classify":
                if request.returns_embedding:
                    label_token_ids = sequence.request.label_token_ids
                    embeddings.append(self._label_logits(logits[end - 1], label_token_ids))
            elif sequence.request.pooling == "mean":
                embedding = rows.sum(0, dtype=torch.float32) / sequence.num_prompt_tokens
                if request.start:
                    embedding = self._partial_means[sequence.slot] + embedding
                self._partial_means[sequence.slot] = embedding
                if request.returns_embedding:
                    embeddings.append(self._partial_means.pop(sequence.slot))
            elif request.returns_embedding:
                embeddings.append(rows[-1].float())
        return tuple(embeddings)

    def _label_logits(
        self, logits: torch.Tensor, label_token_ids: tuple[int, ...] | None
    ) -> torch.Tensor:
        """The logits of a row [V] that a request asks for, float32 [labels], as a copy.

        label_token_ids: None: all of them, as the row is that of a classification head.
        """
        if label_token_ids is None:
            return logits.to(torch.float32, copy=True)
        # A rank may have a part of the vocabulary.
        group = self.vocab
        places = self._to_device(list(label_token_ids)) - group.vocab_start
        is_here = (places >= 0) & (places < len(logits))
        own = logits[places.clamp(0, len(logits) - 1)].float()
        return group.all_reduce(own.where(is_here, torch.zeros_like(own)))

    def _receive_results(self, inputs: StepInputs) -> InFlightStep:
        """Start receiving the results of a step from the last pipeline stage."""
        requests = inputs.step.requests
        token_ids = torch.zeros(len(inputs.sampling_metadata.sequences), dtype=torch.int64)
        logprobs = empty_logprobs(requests)
        embeddings = tuple(
            torch.zeros(self._pooled_size(request))
            for request in requests
            if request.returns_embedding
        )
        next_draft_token_ids = None
        if self.config.receives_drafts:
            shape = len(requests), self.config.num_speculative_tokens
            next_draft_token_ids = torch.zeros(shape, dtype=torch.int64)
        in_flight = InFlightStep(
            inputs.step,
            token_ids,
            None,
            logprobs,
            embeddings,
            None,
            self.config.synthetic_acceptance_rates,
            next_draft_token_ids,
        )
        done = self.model.parallel_group.receive_results(in_flight.tensors)
        return replace(in_flight, done=done)

    def _pooled_size(self, request: ScheduledRequest) -> int:
        """How many numbers a pooled request returns."""
        engine_request = request.sequence.request
        if engine_request.pooling != "classify":
            return self.model.spec.hidden_size
        if engine_request.label_token_ids is None:
            return self.model.spec.num_labels
        return len(engine_request.label_token_ids)

    def _copy_to_host(
        self,
        inputs: StepInputs,
        result: StepResult,
        token_ids: torch.Tensor,
        logprobs: LogprobsTensors | None,
    ) -> InFlightStep:
        """Start copying the results to the host."""
        draft_token_ids = inputs.draft_token_ids
        embeddings = result.embeddings
        done = None
        if self.config.device.type != "cpu":
            if draft_token_ids is not None:
                draft_token_ids = _to_host(draft_token_ids)
            token_ids = _to_host(token_ids)
            if logprobs is not None:
                logprobs = LogprobsTensors(*map(_to_host, logprobs))
            embeddings = tuple(map(_to_host, embeddings))
            done = torch.cuda.Event()
            done.record()
        return InFlightStep(
            inputs.step,
            token_ids,
            draft_token_ids,
            logprobs,
            embeddings,
            done,
            self.config.synthetic_acceptance_rates,
        )

    def _to_device(self, values: list[int]) -> torch.Tensor:
        return int64_tensor(values, self.config.device)


def _logits_indices(requests: list[ScheduledRequest]) -> list[int]:
    """The tokens of a step whose logits are sampled from.

    They are the last known token and the draft tokens of each request.
    """
    indices: list[int] = []
    ends = accumulate(request.num_tokens for request in requests)
    for request, end in zip(requests, ends, strict=True):
        indices += range(end - request.num_sampled_rows, end)
    return indices


def _draft_rows(requests: list[ScheduledRequest]) -> list[int]:
    """The rows of a step's tokens that are drafts."""
    rows: list[int] = []
    ends = accumulate(request.num_tokens for request in requests)
    for request, end in zip(requests, ends, strict=True):
        rows += range(end - request.num_draft_tokens, end)
    return rows


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """Start a copy into pinned memory."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
