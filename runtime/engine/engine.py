"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path

from llmkit.checkpoint.errors import InputError, LlmkitError, ShortageError, is_out_of_memory
from llmkit.model.decoder import Decoder
from llmkit.model.lora import load_adapter
from llmkit.runtime.engine.runner import Flight, Runner
from llmkit.runtime.engine.scheduler import Scheduler
from llmkit.runtime.engine.sequence import Guide, Sequence
from llmkit.runtime.engine.shaping import unfold
from llmkit.runtime.engine.types import EngineConfig, EngineStats, Request, RequestError, SamplingParams, TokenOutput


class Engine:
    """Continuous batching over one model on one device. Not thread-safe: one caller drives it."""

    def __init__(
        self, model: Decoder, config: EngineConfig, eos_ids: tuple[int, ...] = (), draft: Decoder | None = None
    ) -> None:
        config = replace(config, windows=model.spec.whole.windows, stages=model.ranks.stages)
        self.model, self.config = model, config
        self.scheduler = Scheduler(config, eos_ids, draft_model=draft is not None)
        self.runner = Runner(model, config, draft, eos_ids)
        self.steps = 0
        self.grammars: Callable[[str], Guide] | None = None  # what reads the grammars of requests
        self._flights: deque[Flight] = deque()  # launched, their tokens not yet recorded

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._flights)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it could never run to its end or its adapter is not there."""
        seed = request.sampling.seed
        adapter = 0 if request.adapter is None else self._adapter(request.adapter)
        guide = None
        if request.grammar is not None:
            if self.grammars is None:
                raise RequestError("not_supported", "a grammar needs a model with a tokenizer", "grammar")
            guide = self.grammars(request.grammar)
        self.scheduler.add(Sequence(request, secrets.randbits(63) if seed is None else seed, adapter, guide))

    def cancel(self, request_id: str) -> None:
        """Forget a request, at once; nothing more comes out of it. Unknown ids are ignored."""
        self.scheduler.cancel(request_id)

    def on_death(self, act: Callable[[LlmkitError], None]) -> None:
        """Have `act` called from another thread when a process that the engine needs is gone; alone it needs none."""

    @property
    def adapters(self) -> list[str]:
        """The names that requests may give as their adapter."""
        return list(self.runner.adapters.keys)

    def add_adapter(self, name: str, directory: str | Path) -> None:
        """Load a LoRA adapter as PEFT saves it; requests may use it from now on, others notice nothing.

        Raises RequestError when the name is taken, InputError for a directory that is no plain LoRA adapter of this
        model, ShortageError when memory runs out.
        """
        if name in self.adapters:
            raise RequestError("already_exists", f"there is an adapter {name!r} already; remove it first", "model")
        try:
            updates = load_adapter(Path(directory).expanduser(), self.model.spec, self.config.dtype, self.config.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ShortageError(f"there was not enough memory for the adapter {name!r}") from error
        self.runner.adapters.add(name, updates)

    def remove_adapter(self, name: str) -> None:
        """Let go of an adapter. Raises RequestError while requests use it, and when there is none of that name."""
        key = self._adapter(name)
        users = sum(s.adapter == key for s in (*self.scheduler.running, *self.scheduler.waiting))
        if users:
            raise RequestError("in_use", f"{users} requests that are under way use the adapter {name!r}", "model")
        self.runner.adapters.remove(name)

    def step(self) -> list[TokenOutput]:
        """Choose tokens, compute them, record them; one output for each request that got tokens or failed.

        With `config.ahead` the next step is launched before this one's tokens are known, so that the device does not
        wait for what the host does with them; in a pipeline, as many steps as fill its stages.
        """
        outputs: list[TokenOutput] = []
        if chunks := self.scheduler.schedule():
            self.steps += 1
            try:
                self._flights.append(self.runner.launch(chunks))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.model.spec.rank:  # other ranks would wait for this one
                    raise
                outputs.append(self.scheduler.give_up(chunks, "there was not enough memory to compute it"))
        if self._flights and (not chunks or len(self._flights) > max(self.config.ahead, self.config.stages - 1)):
            flight = self._flights.popleft()
            sampled = flight.wait()
            told = unfold(flight.chunks, flight.told) if flight.told else None
            outputs += self.scheduler.commit(flight.chunks, sampled, told)
            if any(self.scheduler.poisoned):
                self.runner.clear(self.scheduler.take_poisoned())
        return outputs

    def stats(self) -> EngineStats:
        """The figures of this moment."""
        state = self.scheduler
        return EngineStats(
            running=len(state.running),
            waiting=len(state.waiting),
            kv_used_blocks=sum(pool.used for pool in state.pools),
            kv_cached_blocks=sum(pool.cached for pool in state.pools),
            kv_total_blocks=sum(pool.count for pool in state.pools),
            prompt_tokens_total=state.prompt_tokens,
            generation_tokens_total=state.generation_tokens,
            preemptions_total=state.preemptions,
            steps_total=self.steps,
            prefix_queries_total=state.prefix_queries,
            prefix_hits_total=state.prefix_hits,
            drafted_total=state.drafted,
            accepted_total=state.accepted,
        )

    def generate(
        self, prompts: list[list[int]], sampling: SamplingParams | SequenceOf[SamplingParams]
    ) -> list[list[int]]:
        """Run prompts to their end, all at once, on an idle engine; the generated ids of each.

        Raises RequestError as `add` does and InputError when a prompt's logits are not finite; the engine is idle
        again then too.
        """
        assert not self.has_work, "generate() on an engine that has requests under way"
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        answers: dict[str, list[int]] = {}
        try:
            for index, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
                answers[f"prompt {index}"] = []
                self.add(Request(f"prompt {index}", prompt, chosen))
            while self.has_work:
                for output in self.step():
                    if output.error:
                        raise InputError(f"{output.request_id}: {output.error}", todo="Check the model's weights")
                    answers[output.request_id] += output.token_ids
        finally:
            for request_id in answers:
                self.cancel(request_id)
            self._flights.clear()
        return list(answers.values())

    def _adapter(self, name: str) -> int:
        key = self.runner.adapters.keys.get(name)
        if key is None:
            known = f"there are {', '.join(self.adapters)}" if self.adapters else "none is loaded"
            raise RequestError("model_not_found", f"there is no adapter {name!r}; {known}", "model")
        return key
