"""Times of steps that are not plain decodes: the part `graphs` of `make gpu`.

Drafts are verified, prompts are beside decodes, and requests have adapters. Each step is timed as a
replay of the engine's CUDA graph, and as the same kernels launched one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from llmkit.bench.gpu.decode_steps import (
    SAMPLERS,
    StepBench,
    StepModel,
    back_to_back_ms,
    free_memory,
    sampling_tensors,
)
from llmkit.bench.gpu.figure_log import FigureLog, PartOptions
from llmkit.bench.gpu.floors import StepCost, step_cost
from llmkit.bench.gpu.model_shapes import BLOCK_SIZE
from llmkit.bench.gpu.timing import EagerGraph, time_ms
from llmkit.model.lora import LoraManager, LoraWeights
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner
from llmkit.runtime.engine.paged_model import ForwardInputs

QUERY_LEN = 4  # tokens of a sequence whose drafts are verified: three drafts
NUM_ADAPTERS = 4
ADAPTER_RANK = 16
SAMPLER = "top-k top-p"


@dataclass(frozen=True)
class GraphStep:
    """A step: sequences that decode or verify drafts, and perhaps a prompt beside them."""

    kind: str  # "verify", "mixed" or "adapters"
    batch: int  # sequences without the prompt
    query_len: int = 1  # tokens of each
    prompt: int = 0  # tokens of the prompt; 0: there is none

    @property
    def label(self) -> str:
        """Its name in figures."""
        if self.kind == "verify":
            return f"verify, batch {self.batch} x {self.query_len} tokens"
        if self.kind == "mixed":
            return f"mixed, batch {self.batch} beside {self.prompt} prompt tokens"
        return f"{NUM_ADAPTERS} adapters, batch {self.batch}"

    def cost(self, spec: ModelSpec, weights: str, context: int) -> StepCost:
        """What it reads and computes. Adapters are not counted."""
        cost = step_cost(spec, weights, self.batch, self.query_len, context)
        if not self.prompt:
            return cost
        prompt = step_cost(spec, weights, 1, self.prompt, self.prompt)
        weight_bytes = step_cost(spec, weights, 0, 1, 0).bytes  # which are read once
        flops = {name: count + prompt.flops[name] for name, count in cost.flops.items()}
        return StepCost(cost.bytes + prompt.bytes - weight_bytes, flops)


# With adapters last, as they stay in the model.
GRAPH_STEPS = (
    GraphStep("verify", 1, QUERY_LEN),
    GraphStep("verify", 16, QUERY_LEN),
    GraphStep("verify", 64, QUERY_LEN),
    GraphStep("mixed", 16, prompt=240),
    GraphStep("mixed", 64, prompt=448),
    GraphStep("adapters", 1),
    GraphStep("adapters", 64),
)
TINY_STEPS = (
    GraphStep("verify", 2, QUERY_LEN),
    GraphStep("mixed", 2, prompt=20),
    GraphStep("adapters", 2),
)
GRAPH_MODELS = (StepModel("Llama-3.1-8B", "fp8"), StepModel("Qwen3-0.6B", "bf16"))


def measure(log: FigureLog, options: PartOptions) -> None:
    """Measure all steps of every model."""
    steps = TINY_STEPS if options.is_tiny else GRAPH_STEPS
    for step_model in GRAPH_MODELS:
        bench = GraphBench(step_model, steps, options)
        for step in steps:
            name = f"{step_model.label}, {step.label}"
            run = partial(bench.step, step)
            log.measure("graph", name, run, needs_s=4)
            del run  # it refers to the model
        del bench
        free_memory(options.device)


class GraphBench(StepBench):
    """A model with its KV caches, for steps that are not plain decodes."""

    def __init__(
        self, step_model: StepModel, steps: Sequence[GraphStep], options: PartOptions
    ) -> None:
        largest = max(step.batch for step in steps) + 1  # and the prompt
        model = replace(step_model, batches=(largest,))
        super().__init__(model, options.device, options.is_tiny)
        self._largest = largest

    @cached_property
    def adapters(self) -> LoraManager:
        """Random adapters of all linear layers."""
        manager = LoraManager(self.model, uses_slots=True)
        for number in range(NUM_ADAPTERS):
            weights = {
                row.module: self._random_adapter(row.shape)
                for row in parameters(self.spec)
                if row.is_linear and row.expert is None
            }
            manager.add(f"adapter {number}", weights)
        return manager

    def _random_adapter(self, shape: Sequence[int]) -> LoraWeights:
        rows, columns = shape[0], shape[1]
        new = partial(torch.randn, dtype=self.model.dtype, device=self.device)
        return LoraWeights(new(ADAPTER_RANK, columns) * 0.02, new(rows, ADAPTER_RANK) * 0.02)

    @torch.inference_mode()
    def step(self, step: GraphStep) -> dict[str, Any]:
        """The time of a replay, and of the kernels launched one by one."""
        values = self._values("graph", step.batch, step.query_len, self.context)
        cost = step.cost(self.spec, self.step_model.weights, self.context)
        values |= {"kind": step.kind, "bytes": cost.bytes, "flops": cost.flops}
        step_ms, _ = self._times(step, in_graph=True)
        _, eager_ms = self._times(step, in_graph=False)
        return values | {"step_ms": step_ms, "eager_ms": eager_ms}

    def _times(self, step: GraphStep, *, in_graph: bool) -> tuple[float, float]:
        """Milliseconds of a replay alone, and of the call with what the host prepares."""
        arguments: dict[str, Any] = {}
        if self.device.type != "cuda":
            arguments = {"capture": EagerGraph, "sampler": None}
        elif not in_graph:
            arguments = {"capture": EagerGraph}
        adapters = self.adapters if step.kind == "adapters" else None
        runner = CudaGraphRunner(
            self.model,
            self.kv_caches,
            -(-self.context // BLOCK_SIZE),
            BLOCK_SIZE,
            self._largest,
            max_query_len=step.query_len,
            max_mixed_tokens=512 if step.prompt else 0,
            adapters=adapters,
            **arguments,
        )
        inputs, logits_indices = self._inputs(step)
        token_ids = torch.randint(
            0, self.spec.vocab_size, (sum(inputs.query_lens),), device=self.device
        )
        num_logits = len(token_ids) if logits_indices is None else len(logits_indices)
        adapter_ids = [] if adapters is None else list(adapters.adapter_ids.values())
        adapter_ids = [adapter_ids[i % NUM_ADAPTERS] for i in range(step.batch) if adapter_ids]
        sampling = sampling_tensors(SAMPLERS[SAMPLER], num_logits)

        def run() -> None:
            runner.replay(
                token_ids, inputs, sampling, [1] * num_logits, logits_indices, adapter_ids
            )

        run()  # captures the graph, and copies what it reads
        (graph,) = runner.graphs.values()
        replay_ms = time_ms(lambda: graph.replay(token_ids), self.device, self.repeats)
        return replay_ms, back_to_back_ms(run, self.device, self.repeats)

    def _inputs(self, step: GraphStep) -> tuple[ForwardInputs, list[int] | None]:
        """What the model reads, and the tokens that are sampled from; None: all."""
        query_lens = [step.query_len] * step.batch
        seq_lens = [self.context] * step.batch
        logits_indices = None
        if step.prompt:
            query_lens.append(step.prompt)
            seq_lens.append(step.prompt)
            logits_indices = [*range(step.batch), step.batch + step.prompt - 1]
        num_seqs = len(query_lens)
        blocks = -(-self.context // BLOCK_SIZE)
        tables = [list(range(s * blocks, (s + 1) * blocks)) for s in range(num_seqs)]
        positions: list[int] = []
        for query_len, seq_len in zip(query_lens, seq_lens, strict=True):
            positions += range(seq_len - query_len, seq_len)
        inputs = ForwardInputs(
            query_lens=query_lens,
            seq_lens=seq_lens,
            positions=positions,
            block_tables=dict.fromkeys(self.spec.sliding_windows, tables),
            slots=list(range(num_seqs)),
            state_rows=[],
        )
        return inputs, logits_indices
