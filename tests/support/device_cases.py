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

from llmkit.kernels import gated_delta_net, gated_delta_net_triton, sampling_triton
from llmkit.kernels.logits_tables import IN_PROMPT, IS_END, LogitsTables, change_logits
from llmkit.kernels.recurrent_state import NO_ROW, RecurrentBatch, RecurrentState
from llmkit.kernels.sampling import sample
from llmkit.kernels.token_bitmask import BITS, num_bitmask_words
from llmkit.model.decoder import Decoder
from llmkit.runtime.engine.cuda_graphs import BatchDescriptor, CudaGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.logits_processor_tables import LogitsProcessorTables
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


def changed_ids(size: int, row_step: int, device: str, dtype: torch.dtype = torch.float32) -> Pair:
    """Sampled ids of rows whose slots change logits, beside rows without a slot.

    row_step: every so many rows of `sampling_arguments` are taken.
    """
    draw = torch.Generator().manual_seed(3)
    logits, *parameters = (part[::row_step].contiguous() for part in sampling_arguments(size))
    logits = logits.to(dtype)
    num_slots = 5
    counts = torch.randint(0, 3, (num_slots, size), generator=draw, dtype=torch.int32)
    counts[:, ::4] |= IN_PROMPT
    counts[:, 1::5] |= IS_END
    bias = torch.randint(-3, 4, (num_slots, size), generator=draw).float() / 2
    factors = [
        (1 / 1.3, 1.3, 0.5, 0.0, 1),  # everything
        (1, 1, 0, 0, 1),  # a bias alone
        (1, 1, 0, 0, 0),  # a minimum length alone
        (1 / 1.1, 1.1, -0.2, 0.7, 0),  # penalties alone
        (1 / 0.8, 0.8, 0.0, 0.1, 1),
    ]
    min_tokens = torch.tensor([1 << 20, 0, 1 << 20, 0, 5])
    tables = LogitsTables(counts, bias, torch.tensor(factors, dtype=torch.float32), min_tokens)
    slots = torch.arange(len(logits)) % (num_slots + 1) - 1
    there = [part.to(device) for part in (logits, *parameters)]
    tables_there = LogitsTables(*(part.to(device) for part in tables))
    found = sampling_triton.sample(*there, None, None, tables_there, slots.to(device))
    return found.cpu(), sample(change_logits(logits, tables, slots, parameters[-1]), *parameters)


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
    with torch.inference_mode():
        return globals()[function](*arguments, "cpu")


# Engines. A graph gives what the same kernels give one by one.


class Rerun:
    """What a graph repeats, launched again."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run
        run()


def sample_in_torch(logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """What the Triton kernels give, of steps without grammars."""
    parameters = arguments[:6]
    if len(arguments) > 8:
        tables, slots = arguments[8:]
        logits = change_logits(logits, tables, slots, parameters[-1])
    return sample(logits.float(), *parameters)


def use_tables(engine: Engine) -> None:
    """Give an engine on a CPU the tables of logits processors that it has on a GPU."""
    config = engine.config
    engine.runner.logits_processors = LogitsProcessorTables(
        config.max_num_seqs,
        config.max_num_seqs * (1 + config.num_speculative_tokens),
        engine.model.spec.full_model.vocab_size,
        0,
        config.device,
    )


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
# Of each prompt.
LOGITS_PROCESSORS: list[dict[str, Any]] = [
    {},
    {"logit_bias": {20: 6.0, 21: 5.5, 9: -100.0}},
    {"logit_bias": {22: 8.0, 23: 7.5}, "stop_token_ids": (22,), "min_tokens": 9},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {},
    {"repetition_penalty": 0.8, "logit_bias": {24: 3.0, 25: -2.0}},
]


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
        logits_processors=runner.logits_processors,
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
            changes_logits: bool,
            kind: str = kind_of(descriptor),
            replay: Callable[[torch.Tensor, bool], torch.Tensor] = replay,
        ) -> torch.Tensor:
            replayed.add(kind)
            if changes_logits:
                replayed.add("logits processors")
            return replay(token_ids, changes_logits)

        graph.replay = noted  # type: ignore[method-assign]
    names = cycle((None, *adapters))
    answers: dict[str, list[int]] = {}

    def step() -> None:
        for output in engine.step():
            assert output.error is None
            answers.setdefault(output.request_id, []).extend(output.token_ids)

    for number, (prompt, name) in enumerate(zip(PROMPTS, names, strict=False)):
        params = SamplingParams(
            temperature=0.6 * (number % 2),
            seed=number,
            max_tokens=8 + 3 * number,
            ignore_eos=True,
            **LOGITS_PROCESSORS[number],
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
