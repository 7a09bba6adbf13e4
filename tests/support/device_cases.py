"""Bodies of GPU tests that also run elsewhere: kernels in Triton's interpreter, engines on a CPU.

Each function takes the device, and returns what the kernels give and what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from llmkit.kernels import gated_delta_net, gated_delta_net_triton, penalties, sampling_triton
from llmkit.kernels.recurrent_state import NO_ROW, RecurrentBatch, RecurrentState
from llmkit.kernels.sampling import sample
from llmkit.kernels.token_bitmask import BITS, num_bitmask_words
from llmkit.model.decoder import Decoder
from llmkit.runtime.engine.cuda_graphs import BatchDescriptor, CudaGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from support.gated_delta_cases import Inputs, Steps
from support.sampling_cases import sampling_arguments

Pair = tuple[torch.Tensor, torch.Tensor]  # of the kernels, and expected


def masked_ids(size: int, row_step: int, device: str, dtype: torch.dtype = torch.float32) -> Pair:
    """Sampled ids of rows with a grammar's bitmask, beside rows without one.

    row_step: every so many rows of `sampling_arguments` are taken.
    Grammars allow one token, every third one, none (-1 is expected), and all.
    """
    logits, *parameters = (part[::row_step].contiguous() for part in sampling_arguments(size))
    logits = logits.to(dtype)
    is_allowed = torch.zeros(4, num_bitmask_words(size) * BITS, dtype=torch.int64)
    is_allowed[0, size // 2] = 1
    is_allowed[1, ::3] = 1
    is_allowed[3] = 1
    shifts = torch.arange(BITS)
    words = (is_allowed.view(4, -1, BITS) << shifts).sum(-1)
    bitmask = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    bitmask_rows = (torch.arange(len(logits)) % 5 - 1).int()
    there = [part.to(device) for part in (logits, *parameters, bitmask, bitmask_rows)]
    found = sampling_triton.sample(*there)
    masked = logits.float()
    for row, of_row in enumerate(bitmask_rows.tolist()):
        if of_row >= 0:
            masked[row].masked_fill_(is_allowed[of_row, :size] == 0, -1e30)
    expected = sample(masked, *parameters).masked_fill_(bitmask_rows == 2, -1)
    return found.cpu(), expected


def penalized_logits(size: int, device: str) -> Pair:
    """Logits with repetition, presence and frequency penalties; some rows have none."""
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(7, size, generator=draw) * 4
    table = torch.randint(0, 3, (5, size), generator=draw, dtype=torch.int32)
    table[:, ::4] |= penalties.IN_PROMPT
    table[2] = 0
    rows = torch.tensor([6, 0, 3])
    slots = torch.tensor([1, 2, 4])
    factors = torch.tensor([[1.3, 1.1, 0.8], [0.5, 0.2, -0.4], [0.0, 0.7, 0.1]])
    expected = logits.clone()
    _penalize_in_torch(expected, table, rows, slots, factors)
    found = logits.to(device)
    penalties.penalize(found, *(part.to(device) for part in (table, rows, slots, factors)))
    return found.cpu(), expected


def _penalize_in_torch(
    logits: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    factors: torch.Tensor,
) -> None:
    """`penalize`, one row after the other."""
    for row, slot, (repetition, presence, frequency) in zip(
        rows.tolist(), slots.tolist(), factors.T.tolist(), strict=True
    ):
        values = logits[row]
        times = table[slot] & (penalties.IN_PROMPT - 1)
        divided = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(table[slot] > 0, divided, values)
        logits[row] = values - torch.where(times > 0, presence + frequency * times, 0.0)


def delta_case(dtype: torch.dtype, steps: Steps) -> tuple[Inputs, torch.Tensor]:
    """Inputs of a gated delta net for these steps, and its states: 4 key heads, 8 value heads."""
    draw = torch.Generator().manual_seed(5)
    num_tokens = sum(steps[0])
    k_heads, v_heads, dim = 4, 8, 64
    width = (2 * k_heads + v_heads) * dim
    qkv = torch.randn(num_tokens, width, generator=draw).to(dtype)
    ba = torch.randn(num_tokens, 2 * v_heads, generator=draw).to(dtype)
    A_log = torch.rand(v_heads, generator=draw).mul(4).log()
    dt_bias = torch.randn(v_heads, generator=draw) - 2
    states = torch.randn(12, v_heads, dim, dim, generator=draw)
    return (qkv, ba, A_log, dt_bias, k_heads), states


def delta_outputs(dtype: torch.dtype, steps: Steps, device: str) -> tuple[Pair, Pair]:
    """Outputs of a gated delta net, and its states afterwards. Expected: in float32."""
    (qkv, ba, A_log, dt_bias, k_heads), states = delta_case(dtype, steps)
    expected_state = RecurrentState(torch.empty(0), states.clone())
    expected = gated_delta_net.gated_delta_rule_reference(
        qkv.float(),
        ba.float(),
        A_log,
        dt_bias,
        k_heads,
        expected_state,
        RecurrentBatch.build(*steps),
    )
    state = RecurrentState(torch.empty(0), states.to(device))
    found = gated_delta_net_triton.gated_delta_rule_triton(
        *(part.to(device) for part in (qkv, ba, A_log, dt_bias)),
        k_heads,
        state,
        RecurrentBatch.build(*steps, device=device),
    )
    return (found.cpu(), expected), (state.state.cpu(), expected_state.state)


def decode_steps(num_sequences: int, query_len: int = 1) -> Steps:
    """Decodes, or drafts to verify, of sequences with a state or none."""
    rows = [NO_ROW, *range(1, num_sequences)]
    writes = [[(query_len, row)] for row in range(num_sequences)]
    return [query_len] * num_sequences, rows, writes


def in_interpreter(function: str, *arguments: Any) -> Any:
    """Call a function of this file where Triton interprets."""
    penalties.runs_triton = lambda _: True  # else a tensor on a CPU has no kernel
    with torch.inference_mode():
        return globals()[function](*arguments, "cpu")


# Engines. A graph gives what the same kernels give one by one.


class Rerun:
    """What a graph repeats, launched again."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run
        run()


@dataclass(frozen=True)
class GraphCase:
    """An engine whose steps are graphs of all kinds."""

    label: str
    architecture: str
    options: dict[str, Any]
    kinds: tuple[str, ...]  # of graphs that its requests must replay
    adapters: int = 0


GRAPH_CASES = (
    GraphCase("mixed", "llama", {}, ("decode", "mixed")),
    GraphCase("mixed with windows", "gemma2", {}, ("decode", "mixed")),
    GraphCase("verify", "llama", {"speculate": 3}, ("verify", "mixed")),
    GraphCase("adapters", "llama", {}, ("decode with adapters", "mixed with adapters"), adapters=2),
    GraphCase(
        "verify with adapters", "qwen3", {"speculate": 2}, ("verify with adapters",), adapters=1
    ),
)
PROMPTS = [[5, 6, 7, 8] * 6, [9] * 20, [11, 12, 11, 12, 11], [3], [4, 4], [8, 9, 10] * 9]


def kind_of(descriptor: BatchDescriptor) -> str:
    """The kind of a graph."""
    kind = "mixed"
    if descriptor.is_uniform:
        kind = "decode" if descriptor.max_query_len == 1 else "verify"
    return kind + (" with adapters" if descriptor.has_lora else "")


def use_graphs(engine: Engine, capture: Any, **arguments: Any) -> CudaGraphRunner:
    """Give an engine new graphs, captured by `capture`. arguments: others of CudaGraphRunner."""
    runner = engine.runner
    config = engine.config
    assert isinstance(engine.model, Decoder)
    graphs = CudaGraphRunner(
        engine.model,
        runner.paged_model.kv_caches,
        -(-config.max_model_len // config.block_size),
        config.block_size,
        config.max_num_seqs,
        capture,
        max_query_len=1 + config.num_speculative_tokens,
        max_mixed_tokens=config.max_num_batched_tokens,
        adapters=runner.adapters,
        **arguments,
    )
    assert graphs.enabled
    runner.graph_runner = graphs
    return graphs


def graph_answers(
    engine: Engine, graphs: CudaGraphRunner | None, adapters: Iterable[str]
) -> tuple[dict[str, list[int]], set[str]]:
    """Answers to PROMPTS, of which each comes a step after the last; and the kinds of graphs.

    graphs: those of the engine, captured here; None: it has none. adapters: requests take turns
    between none and each of these.
    """
    replayed: set[str] = set()
    if graphs is not None:
        graphs.capture_all()
    for descriptor, graph in () if graphs is None else graphs.graphs.items():
        replay = graph.replay

        def noted(
            token_ids: torch.Tensor,
            kind: str = kind_of(descriptor),
            replay: Callable[[torch.Tensor], None] = replay,
        ) -> None:
            replayed.add(kind)
            replay(token_ids)

        graph.replay = noted  # type: ignore[method-assign]
    names = cycle((None, *adapters))
    answers: dict[str, list[int]] = {}

    def step() -> None:
        for output in engine.step():
            assert output.error is None
            answers.setdefault(output.request_id, []).extend(output.token_ids)

    for number, (prompt, name) in enumerate(zip(PROMPTS, names, strict=False)):
        params = SamplingParams(
            temperature=0.6 * (number % 2), seed=number, max_tokens=8 + 3 * number, ignore_eos=True
        )
        engine.add(EngineRequest(f"{number}", prompt, params, adapter=name))
        step()
    while engine.has_work:
        step()
    return answers, replayed


def adapter_folders(case: GraphCase, model: Path) -> dict[str, str]:
    """Write the adapters of a case beside its model."""
    from support.tiny_adapters import write_adapter

    return {
        f"adapter {number}": str(
            write_adapter(model, model.parent / f"adapter-{number}", seed=number)
        )
        for number in range(case.adapters)
    }
