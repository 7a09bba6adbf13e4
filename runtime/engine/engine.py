"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import gc
import secrets
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmkit.common.errors import InputError, LlmkitError, ShortageError, is_out_of_memory
from llmkit.model.draft_head import DraftHead
from llmkit.model.families import require_native
from llmkit.model.language_model import LanguageModel
from llmkit.model.lora import LoraManager, load_adapter
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.cuda_graphs import CudaGraph, CudaGraphRunner
from llmkit.runtime.engine.draft_head_proposer import DraftHeadProposer
from llmkit.runtime.engine.draft_model import DraftModelProposer
from llmkit.runtime.engine.drafting import DraftProposer, NgramProposer
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_outputs import EngineOutput, EngineStats
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.grammar_matcher import GrammarMatcher
from llmkit.runtime.engine.model_runner import InFlightStep, ModelRunner
from llmkit.runtime.engine.pipeline_drafts import PipelineDrafts
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.scheduler import Scheduler
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.suffix_drafting import SuffixProposer
from llmkit.runtime.engine.weight_storages import HostWeights

# What proposes draft tokens from text, by `EngineConfig.draft_method`.
TEXT_PROPOSERS: dict[str, Callable[[], DraftProposer]] = {
    "ngram": NgramProposer,
    "suffix": SuffixProposer,
}


@dataclass
class _Sleep:
    """What is kept of an engine that sleeps, beside the model."""

    adapters: LoraManager
    weights: HostWeights | None = None  # None on a CPU: the model keeps them


class Engine:
    """Continuous batching over one model on one device. Not thread-safe: one caller drives it."""

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig,
        eos_token_ids: tuple[int, ...] = (),
        draft: LanguageModel | DraftHead | None = None,
    ) -> None:
        config = replace(
            config,
            sliding_windows=model.spec.full_model.sliding_windows,
            has_recurrent_states=model.spec.full_model.recurrent is not None,
            pipeline_parallel_size=model.parallel_group.pp_size,
        )
        self.model = model
        self.config = config
        self._draft = draft
        self._eos_token_ids = eos_token_ids
        self._allocate()
        self.num_steps = 0
        self._sleep: _Sleep | None = None
        self._counters_before_sleep: EngineStats | None = None
        # Compiles the grammars of requests; None: requests with a grammar are refused.
        self.compile_grammar: Callable[[str], GrammarMatcher] | None = None
        self._in_flight: deque[InFlightStep] = deque()  # launched, results not recorded yet
        # Steps that may stay in flight after `step` returns: one with async scheduling, otherwise
        # one less than there are pipeline stages.
        self._max_in_flight = max(int(config.async_scheduling), config.pipeline_parallel_size - 1)

    def _allocate(self, adapters: LoraManager | None = None) -> None:
        """Make what needs memory beside the weights: caches, and recorded or captured steps.

        adapters: those that are loaded.
        """
        config = self.config
        draft = self._draft
        draft_model: DraftModelProposer | None = None
        draft_proposer: DraftProposer | None = None
        self._pipeline_drafts: PipelineDrafts | None = None
        if isinstance(draft, DraftHead):
            draft_model = draft_proposer = DraftHeadProposer(draft, config)
        elif draft is not None:
            draft_model = draft_proposer = DraftModelProposer(draft, config)
        elif config.num_speculative_tokens and not config.receives_drafts:
            draft_proposer = TEXT_PROPOSERS[config.draft_method]()
        if config.receives_drafts:
            draft_proposer = self._pipeline_drafts = PipelineDrafts()
        self.scheduler = Scheduler(config, self._eos_token_ids, draft_proposer)
        self.runner = ModelRunner(self.model, config, draft_model, self._eos_token_ids, adapters)

    @property
    def is_sleeping(self) -> bool:
        """Whether the memory of the caches is free; see `sleep`."""
        return self._sleep is not None

    def sleep(self) -> None:
        """Free the memory of the caches, and with it all cached prefixes; keep the weights.

        On a GPU the weights move to host memory. Call it without work, and add no request before
        `wake_up`. Raises RequestError when the engine cannot sleep. A sleeping engine goes on
        sleeping.
        """
        if self._sleep is not None:
            return
        assert not self.has_work, "sleep() of an engine that has requests under way"
        counters = self.stats().counters()
        self._sleep = _Sleep(self.runner.adapters)
        self._counters_before_sleep = counters
        self.num_steps = 0
        # Requests that were cancelled late ask a scheduler, and statistics too.
        self.scheduler = Scheduler(self.config, self._eos_token_ids)
        del self.runner  # only `wake_up` and `stats` are called without it
        if self.config.device.type == "cuda":
            CudaGraph.release_shared()
            gc.collect()  # graphs are in cycles
            self._sleep.weights = HostWeights([self.model, self._draft], self.config.device)
            torch.cuda.empty_cache()

    def wake_up(self) -> None:
        """Be as before `sleep`, except that no prefix is cached.

        Raises RuntimeError when there is not enough memory; then it sleeps on. An engine that does
        not sleep stays as it is.
        """
        if self._sleep is None:
            return
        if self._sleep.weights is not None:
            self._sleep.weights.restore()
        self._allocate(self._sleep.adapters)
        graph_runner = self.runner.graph_runner
        if isinstance(graph_runner, CudaGraphRunner) and graph_runner.enabled:
            self.runner.capture_graphs()
            self.runner.update_adapter_graphs()
        self._sleep = None

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._in_flight)

    @property
    def in_flight_steps(self) -> SequenceOf[InFlightStep]:
        """The launched steps whose results are not recorded yet, the oldest first."""
        return self._in_flight

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises RequestError when the request can never finish or its adapter is not loaded.
        """
        _check_task(request, self.model.spec)
        seed = request.sampling_params.seed
        adapter_id = 0 if request.adapter is None else self._adapter_id(request.adapter)
        grammar_matcher = None
        if request.grammar is not None:
            if self.compile_grammar is None:
                raise RequestError(
                    "not_supported", "a grammar needs a model with a tokenizer", "grammar"
                )
            grammar_matcher = self.compile_grammar(request.grammar)
        sequence = Sequence(
            request,
            seed=secrets.randbits(63) if seed is None else seed,
            adapter_id=adapter_id,
            grammar_matcher=grammar_matcher,
        )
        sequence.rope_offset = self.model.spec.rope_offset(sequence.max_num_tokens)
        self.scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Drop a request at once; it has no further output. Unknown ids are ignored."""
        self.scheduler.cancel(request_id)

    def on_death(self, callback: Callable[[LlmkitError], None]) -> None:
        """Call `callback` from another thread when a process that the engine needs has ended.

        An engine on one rank needs no other process, so that `callback` is never called.
        """

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters."""
        return list(self.runner.adapters.adapter_ids)

    def add_adapter(self, name: str, directory: str | Path) -> None:
        """Load a LoRA adapter in PEFT's format.

        Requests may use it from now on; running ones are not affected.

        Raises RequestError when the name is taken, InputError for a directory that is no plain LoRA
        adapter of this model, ShortageError when memory runs out.
        """
        require_native(self.model.spec, f"the adapter {name!r}")
        if name in self.adapters:
            raise RequestError(
                "already_exists", f"there is an adapter {name!r} already; remove it first", "model"
            )
        try:
            weights = load_adapter(
                Path(directory).expanduser(), self.model.spec, self.config.dtype, self.config.device
            )
            self.runner.adapters.add(name, weights)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if name in self.adapters:  # some of the linears have it already
                self.runner.adapters.remove(name)
            raise ShortageError(f"there was not enough memory for the adapter {name!r}") from error
        finally:
            self.runner.update_adapter_graphs()

    def remove_adapter(self, name: str) -> None:
        """Unload an adapter.

        Raises RequestError while requests use it and when no adapter has that name.
        """
        adapter_id = self._adapter_id(name)
        sequences = (*self.scheduler.running, *self.scheduler.waiting)
        users = sum(sequence.adapter_id == adapter_id for sequence in sequences)
        if users:
            raise RequestError(
                "in_use", f"{users} running requests use the adapter {name!r}", "model"
            )
        self.runner.adapters.remove(name)
        self.runner.update_adapter_graphs()

    def step(self) -> list[EngineOutput]:
        """Launch the next step and record the oldest one in flight.

        With async scheduling the next step is launched before the tokens of this one are known, so
        that the device does not wait for the host. With pipeline parallelism, as many steps are in
        flight as there are stages.
        """
        outputs: list[EngineOutput] = []
        step = self.scheduler.schedule()
        self.copy_host_blocks()
        if step.requests:
            self.num_steps += 1
            try:
                self._in_flight.append(self.runner.launch(step))
            except (RuntimeError, MemoryError) as error:
                # On several ranks the others would wait forever for this one: the engine must end.
                if not is_out_of_memory(error) or self.model.spec.rank:
                    raise
                message = "there was not enough memory to compute it"
                outputs.append(self.scheduler.abort_step(step, message))
        if self._in_flight and (not step.requests or len(self._in_flight) > self._max_in_flight):
            oldest = self._in_flight.popleft()
            result = oldest.wait()
            outputs += self.scheduler.update(oldest.step, result)
            if self._pipeline_drafts is not None:
                self._pipeline_drafts.record(oldest.step, result)
            blocks = self.scheduler.take_blocks_to_zero()
            if blocks is not None:
                self.runner.zero_blocks(blocks)
        return outputs

    def copy_host_blocks(self) -> None:
        """Start the copies between device and host memory that allocations have asked for.

        Call it before anything else writes blocks that were allocated.
        """
        if self.runner.host_stores:
            self.runner.copy_host_blocks(self.scheduler.take_host_copies())

    def stats(self) -> EngineStats:
        """The statistics of this moment."""
        before = self._counters_before_sleep
        if before is None:
            return self._stats_since_sleep()
        return before if self.is_sleeping else before + self._stats_since_sleep()

    def _stats_since_sleep(self) -> EngineStats:
        scheduler = self.scheduler
        states = None if scheduler.states is None else scheduler.states.cache
        hosts = scheduler.host_caches
        stores = self.runner.host_stores
        num_snapshots = 0 if states is None else states.num_used_rows
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_used_blocks=sum(pool.num_used_blocks for pool in scheduler.pools),
            kv_cached_blocks=sum(pool.num_cached_blocks for pool in scheduler.pools),
            kv_total_blocks=sum(pool.num_blocks for pool in scheduler.pools),
            prompt_tokens_total=scheduler.num_prompt_tokens,
            generation_tokens_total=scheduler.num_generation_tokens,
            preemptions_total=scheduler.num_preemptions,
            steps_total=self.num_steps,
            prefix_queries_total=scheduler.num_prefix_queries,
            prefix_hits_total=scheduler.num_prefix_hits,
            host_used_blocks=sum(host.num_used_rows for host in hosts),
            host_total_blocks=sum(host.num_rows for host in hosts),
            host_hits_total=scheduler.num_host_hits,
            host_saves_total=sum(host.num_saves for host in hosts),
            host_loads_total=sum(host.num_loads for host in hosts),
            host_saved_bytes_total=sum(store.saved_bytes for store in stores),
            host_loaded_bytes_total=sum(store.loaded_bytes for store in stores),
            state_snapshots=num_snapshots,
            state_snapshot_bytes=num_snapshots * self.runner.paged_model.bytes_per_state,
            state_total_snapshots=0 if states is None else states.num_rows,
            prefix_stateless_total=scheduler.num_prefix_stateless,
            drafts_total=scheduler.num_drafts,
            drafted_total=scheduler.num_draft_tokens,
            accepted_total=scheduler.num_accepted_tokens,
            accepted_per_pos_total=tuple(scheduler.num_accepted_tokens_per_pos),
        )

    def generate(
        self,
        prompts: list[list[int]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams],
    ) -> list[list[int]]:
        """Run all prompts to their end on an idle engine and return the output token ids of each.

        Raises RequestError as `add` does and InputError when a prompt's logits are not finite; the
        engine is idle again then too.
        """
        assert not self.has_work, "generate() on an engine that has requests under way"
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        answers: dict[str, list[int]] = {}
        try:
            for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
                request_id = f"prompt {index}"
                answers[request_id] = []
                self.add(EngineRequest(request_id, prompt, params))
            while self.has_work:
                for output in self.step():
                    if output.error:
                        raise InputError(
                            f"{output.request_id}: {output.error}", todo="Check the model's weights"
                        )
                    answers[output.request_id] += output.token_ids
        finally:
            for request_id in answers:
                self.cancel(request_id)
            self._in_flight.clear()
        return list(answers.values())

    def _adapter_id(self, name: str) -> int:
        adapter_id = self.runner.adapters.adapter_ids.get(name)
        if adapter_id is None:
            known = f"there are {', '.join(self.adapters)}" if self.adapters else "none is loaded"
            raise RequestError("model_not_found", f"there is no adapter {name!r}; {known}", "model")
        return adapter_id


def _check_task(request: EngineRequest, spec: ModelSpec) -> None:
    """Raise RequestError for a request that a model of this kind has no answer to."""
    labels = request.label_token_ids
    if spec.num_labels and (request.pooling != "classify" or labels is not None):
        message = f"a model with a classification head ({spec.architecture}) only classifies"
        raise RequestError("not_supported", message, "model")
    if request.pooling == "classify" and not spec.num_labels and not labels:
        raise RequestError("not_supported", "the model has no classification head", "model")
