"""The host's part of an engine step: thread CPU time by phase, beside a model that costs nothing.

`python -m llmkit.bench.gpu.step_profile --host` prints it. The scheduler, the runner and the
buffers of CUDA graphs are the engine's own; kernels and copies to the device are left out, so
that no GPU is needed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.decoder import SINGLE_RANK
from llmkit.model.families import model_spec
from llmkit.model.language_model import LayerCache
from llmkit.model.linear import Linear
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.model_runner import ModelRunner, StepInputs, StepResult
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.scheduler import Scheduler
from llmkit.runtime.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from llmkit.runtime.engine.step_logprobs import LogprobsTensors
from llmkit.runtime.process_channel import frame
from llmkit.runtime.server.engines.engine_messages import EngineOutputs

CPU = torch.device("cpu")
BATCHES = (1, 64, 256)  # sequences
VOCAB_SIZE = 16
EOS_TOKEN = 2
SAMPLED_TOKEN = 7
PROMPT_TOKENS = 1000  # of each decoding sequence
CHUNK_TOKENS = 256  # of a prompt, in each step that has a prompt beside the decodes
WARM_UP_STEPS = 5
# In the order of a step. "results" is what remains of `Engine.step`: the copy of the results and
# their split by request. "output" encodes the message to the API process.
PHASES = ("schedule", "inputs", "buffers", "sample", "results", "update", "output")


class PhaseTimer:
    """The thread CPU milliseconds of each phase of the current step."""

    def __init__(self) -> None:
        self.spent_ms = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the `with` block to a phase."""
        start_s = time.thread_time()
        yield
        self.spent_ms[phase] += (time.thread_time() - start_s) * 1e3


class TimedScheduler(Scheduler):
    """A scheduler that is timed."""

    def __init__(self, timer: PhaseTimer, config: EngineConfig) -> None:
        super().__init__(config, (EOS_TOKEN,))
        self._timer = timer

    def schedule(self) -> SchedulerOutput:
        """See `Scheduler.schedule`."""
        with self._timer("schedule"):
            return super().schedule()

    def update(self, step: SchedulerOutput, output: ModelRunnerOutput) -> list[EngineOutput]:
        """See `Scheduler.update`."""
        with self._timer("update"):
            return super().update(step, output)


class TimedRunner(ModelRunner):
    """A runner that is timed, with the graphs of a GPU."""

    def __init__(self, timer: PhaseTimer, model: StandInModel, config: EngineConfig) -> None:
        super().__init__(model, config)
        self._timer = timer
        sampled = torch.full((config.max_num_seqs,), SAMPLED_TOKEN)
        self.graph_runner = CudaGraphRunner(
            model,  # type: ignore[arg-type]
            self.paged_model.kv_caches,
            -(-config.max_model_len // config.block_size),
            config.block_size,
            config.max_num_seqs,
            StandInGraph,
            lambda logits, *parameters: sampled[: len(logits)],
            max_mixed_tokens=config.max_num_batched_tokens,
        )

    def prepare_inputs(self, step: SchedulerOutput) -> StepInputs:
        """See `ModelRunner.prepare_inputs`."""
        with self._timer("inputs"):
            return super().prepare_inputs(step)

    def execute(self, inputs: StepInputs) -> StepResult:
        """See `ModelRunner.execute`."""
        with self._timer("buffers"):
            return super().execute(inputs)

    def sample(
        self, inputs: StepInputs, result: StepResult
    ) -> tuple[torch.Tensor, LogprobsTensors | None]:
        """See `ModelRunner.sample`."""
        with self._timer("sample"):
            return super().sample(inputs, result)


class StandInModel:
    """A model of one layer that computes nothing and always predicts the same token."""

    layers = ()
    parallel_group = SINGLE_RANK
    dtype = torch.float32
    device = CPU

    def __init__(self, max_num_tokens: int) -> None:
        sizes = {"num_hidden_layers": 1, "vocab_size": VOCAB_SIZE}
        self.spec: ModelSpec = model_spec(MODEL_CONFIGS["SmolLM2-135M"] | sizes)
        self._hidden = torch.zeros(max_num_tokens, 1)
        self._logits = torch.zeros(max_num_tokens, VOCAB_SIZE)
        self._logits[:, SAMPLED_TOKEN] = 100.0  # it is also drawn always

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """Make what the first layer of a model makes on the host for all layers."""
        metadata = batch.metadata(None)
        assert len(metadata.slot_mapping) == len(tokens) == len(positions)
        metadata.device_tensors()
        return self._hidden[: len(tokens)]

    def logits(self, hidden: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The same for each row."""
        return self._logits[: len(hidden)]

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int = 16,
        kv_cache_dtype: str | None = None,
        layer_spec: ModelSpec | None = None,
    ) -> KVCache:
        """A cache without memory."""
        return KVCache(torch.empty(2, num_blocks, block_size, 1, device="meta"))

    def weights(self) -> tuple[list[Linear], list[torch.Tensor]]:
        """None."""
        return [], []


class StandInGraph:
    """Stands in for a CUDA graph: it runs once, and its replay costs nothing."""

    def __init__(self, run: Callable[[], None]) -> None:
        run()

    def replay(self) -> None:
        """Do nothing."""


def profile_host(
    num_seqs: int, num_steps: int, with_prompt: bool = False
) -> list[dict[str, float]]:
    """Milliseconds of thread CPU time by phase and of the "whole step", for each of `num_steps`
    steps that decode `num_seqs` sequences.

    with_prompt: each step also computes a chunk of a prompt.
    """
    timed_steps = WARM_UP_STEPS + num_steps
    long_prompt = [5] * (CHUNK_TOKENS * (timed_steps + 1) * with_prompt)
    # A decoding sequence must not end while others compute their prompts.
    max_tokens = timed_steps + num_seqs * (1 + PROMPT_TOKENS // CHUNK_TOKENS) + WARM_UP_STEPS
    max_model_len = max(len(long_prompt) + 1, PROMPT_TOKENS + max_tokens)
    config = EngineConfig(
        max_model_len=max_model_len,
        num_blocks=(num_seqs + 1) * (1 + max_model_len // 16),
        device=CPU,
        dtype=torch.float32,
        max_num_seqs=num_seqs + with_prompt,
        max_num_batched_tokens=num_seqs + CHUNK_TOKENS,
        async_scheduling=True,
    )
    model = StandInModel(config.max_num_batched_tokens)
    timer = PhaseTimer()
    engine = Engine(model, config)
    engine.scheduler = TimedScheduler(timer, engine.config)
    engine.runner = TimedRunner(timer, model, engine.config)
    for index in range(num_seqs):
        sampling = SamplingParams(
            temperature=0.7 * (index % 2), top_p=0.9, seed=index, max_tokens=max_tokens
        )
        prompt = [3 + (index + place) % 13 for place in range(PROMPT_TOKENS)]
        engine.add(EngineRequest(f"cmpl-{index:032x}", prompt, sampling))
    while any(s.num_uncomputed_tokens > 1 for s in engine.scheduler.running) or (
        engine.scheduler.waiting
    ):
        engine.step()
    if with_prompt:
        engine.add(EngineRequest("prompt", long_prompt, SamplingParams(max_tokens=1)))
    for _ in range(WARM_UP_STEPS):
        engine.step()
    return [_time_step(engine, timer) for _ in range(num_steps)]


def _time_step(engine: Engine, timer: PhaseTimer) -> dict[str, float]:
    timer.spent_ms = dict.fromkeys(PHASES, 0.0)
    start_s = time.thread_time()
    outputs = engine.step()
    step_ms = (time.thread_time() - start_s) * 1e3
    timer.spent_ms["results"] = step_ms - sum(timer.spent_ms.values())
    with timer("output"):
        frame(EngineOutputs(outputs, engine.stats()))
    whole_ms = (time.thread_time() - start_s) * 1e3
    return timer.spent_ms | {"whole step": whole_ms}


def median_step(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each phase and of the whole step."""
    return {phase: statistics.median(step[phase] for step in steps) for phase in steps[0]}


def host_times(num_steps: int) -> dict[str, dict[str, float]]:
    """The median milliseconds by phase of each kind of step; also a table on stderr."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the time of the calling thread counts
    header = "".join(f"{phase:>12}" for phase in (*PHASES, "whole step"))
    sys.stderr.write(f"{'milliseconds':32}{header}\n")
    found: dict[str, dict[str, float]] = {}
    try:
        for with_prompt in (False, True):
            for num_seqs in BATCHES:
                name = f"decode, {num_seqs} sequences"
                if with_prompt:
                    name += " + prompt"
                found[name] = median_step(profile_host(num_seqs, num_steps, with_prompt))
                row = "".join(f"{spent_ms:12.3f}" for spent_ms in found[name].values())
                sys.stderr.write(f"{name:32}{row}\n")
    finally:
        torch.set_num_threads(threads)
    return found
