"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as SequenceOf

from llmkit.checkpoint.errors import InputError
from llmkit.model.decoder import Decoder
from llmkit.runtime.engine.runner import Runner
from llmkit.runtime.engine.scheduler import Scheduler, Sequence
from llmkit.runtime.engine.types import EngineConfig, EngineStats, Request, SamplingParams, TokenOutput


class Engine:
    """Continuous batching over one model on one device. Not thread-safe: one caller drives it."""

    def __init__(self, model: Decoder, config: EngineConfig, eos_ids: tuple[int, ...] = ()) -> None:
        self.model, self.config = model, config
        self.scheduler = Scheduler(config, eos_ids)
        self.runner = Runner(model, config)
        self.steps = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it could never run to its end."""
        seed = request.sampling.seed
        self.scheduler.add(Sequence(request, secrets.randbits(63) if seed is None else seed))

    def cancel(self, request_id: str) -> None:
        """Forget a request, at once; nothing more comes out of it. Unknown ids are ignored."""
        self.scheduler.cancel(request_id)

    def step(self) -> list[TokenOutput]:
        """Choose tokens, compute them, record them; one output for each request that got a token or failed."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        self.steps += 1
        return self.scheduler.commit(chunks, self.runner.run(chunks))

    def stats(self) -> EngineStats:
        """The figures of this moment."""
        state = self.scheduler
        return EngineStats(
            running=len(state.running),
            waiting=len(state.waiting),
            kv_used_blocks=state.pool.used,
            kv_total_blocks=state.pool.count,
            prompt_tokens_total=state.prompt_tokens,
            generation_tokens_total=state.generation_tokens,
            preemptions_total=state.preemptions,
            steps_total=self.steps,
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
        return list(answers.values())
