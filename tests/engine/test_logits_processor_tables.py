"""Logits processors of a GPU against those that read the tokens themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.sampling_cases import sampling_arguments
from support.triton_checks import compiled_for, interpreted

from llmkit.kernels import logits_tables, sampling_triton
from llmkit.kernels.logits_tables import (
    IN_PROMPT,
    IS_END,
    NO_SLOT,
    LogitsTables,
    change_logits,
    count_tokens,
)
from llmkit.kernels.sampling import sample
from llmkit.kernels.token_bitmask import apply_token_bitmask
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.logits_processor_tables import LogitsProcessorTables
from llmkit.runtime.engine.logits_processors import apply_logits_processors
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.sequence import Sequence

CPU = torch.device("cpu")
VOCAB = 40
NUM_SLOTS = 8
ASKED = [
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
    SamplingParams(),
    SamplingParams(repetition_penalty=0.7),
    SamplingParams(frequency_penalty=-0.5, logit_bias={3: 2.0, 39: -4.0}),
    SamplingParams(presence_penalty=0.1, min_tokens=3, stop_token_ids=(7,)),
    SamplingParams(min_tokens=2, ignore_eos=True, stop_token_ids=(8,), logit_bias={8: 9.0}),
]


def new_sequence(index: int, params: SamplingParams) -> Sequence:
    request = EngineRequest(f"{index}", [index, 9, 9, 20 + index], params)
    sequence = Sequence(request, seed=index)
    sequence.slot = (3 * index + 1) % NUM_SLOTS
    return sequence


def new_sequences() -> list[Sequence]:
    return [new_sequence(index, params) for index, params in enumerate([*ASKED, ASKED[0]])]


def new_tables(start: int = 0, size: int = VOCAB) -> LogitsProcessorTables:
    return LogitsProcessorTables(NUM_SLOTS, 3 * NUM_SLOTS, size, start, CPU)


def changed(
    tables: LogitsProcessorTables,
    logits: torch.Tensor,
    sequences: list[Sequence],
    num_sampled: list[int],
    eos_token_ids: tuple[int, ...] = (5,),
) -> torch.Tensor:
    """The logits of a step."""
    tables.update(sequences, num_sampled, [True] * len(sequences), eos_token_ids)
    return tables.apply(logits, num_sampled)


@pytest.mark.parametrize(("start", "size"), [(0, VOCAB), (0, 20), (20, 20)])
def test_tables_give_the_logits_of_the_processors(start: int, size: int) -> None:
    """Over the steps of requests, of which some change their slots. A rank has some columns."""
    draw = torch.Generator().manual_seed(1)
    tables = new_tables(start, size)
    sequences = new_sequences()
    for step in range(6):
        num_sampled = [len(s.token_ids) - s.num_prompt_tokens for s in sequences]
        logits = torch.randn(len(sequences), size, generator=draw) * 3
        expected = logits.clone()
        apply_logits_processors(expected, sequences, num_sampled, start, (5,))
        found = changed(tables, logits, sequences, num_sampled)
        masked = expected == float("-inf")
        assert bool(masked.any()) == (start < 8 and num_sampled[0] < 3)
        assert (found[masked] < -1e29).all()
        torch.testing.assert_close(found[~masked], expected[~masked], rtol=1e-6, atol=1e-6)
        tokens = torch.randint(0, VOCAB, (len(sequences),), generator=draw) // 4
        tables.count(tokens)
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.token_ids.append(token)
        if step == 2:  # two were preempted and run again, in each other's slot
            sequences[0].slot, sequences[2].slot = sequences[2].slot, sequences[0].slot
            sequences[3].slot, sequences[5].slot = sequences[5].slot, sequences[3].slot
        if step == 3:  # the tokens of a step were lost
            for sequence in sequences:
                sequence.token_ids.pop()


def test_tables_forget_the_request_that_had_the_slot() -> None:
    """One with a bias, a minimum length and penalties ends; the next ones in its slot have less."""
    tables = new_tables()
    everything = SamplingParams(
        logit_bias={3: 5.0}, min_tokens=9, stop_token_ids=(7,), presence_penalty=1.0
    )
    logits = torch.arange(VOCAB).float()[None]
    assert not torch.equal(changed(tables, logits, [new_sequence(0, everything)], [0]), logits)
    tables.count(torch.tensor([6]))
    for params, places in (
        (SamplingParams(), []),
        (SamplingParams(logit_bias={4: 1.0}), [4]),
        (SamplingParams(min_tokens=2, ignore_eos=True, stop_token_ids=(8,)), [8]),
        (SamplingParams(presence_penalty=1.0), []),
        (SamplingParams(repetition_penalty=2.0), [9, 20]),  # 0 stays 0
        (SamplingParams(logit_bias={3: 1.0}), [3]),
    ):
        found = changed(tables, logits, [new_sequence(0, params)], [0])
        assert (found != logits).nonzero()[:, 1].tolist() == places, params
        tables.count(torch.tensor([6]))


def test_tables_change_rows_of_drafts_until_the_minimum_length() -> None:
    """A request that verifies drafts has several rows, each with its own count."""
    tables = new_tables()
    params = SamplingParams(min_tokens=2, ignore_eos=True, stop_token_ids=(7,), logit_bias={7: 1.0})
    plain = new_sequence(1, SamplingParams())
    rows = [plain, *[new_sequence(0, params)] * 3, plain]
    found = changed(tables, torch.zeros(5, VOCAB), rows, [5, 0, 1, 2, 6])
    assert found[:, 7].tolist() == [0.0, pytest.approx(-1e30), pytest.approx(-1e30), 1.0, 0.0]
    assert int(found.count_nonzero()) == 3


def test_tables_count_tokens_that_the_host_does_not_know() -> None:
    tables = new_tables()
    sequence = new_sequences()[0]
    for num_sampled, token in enumerate((11, 11, -1, 12)):
        changed(tables, torch.zeros(1, VOCAB), [sequence], [num_sampled], ())
        tables.count(torch.tensor([token]))
    counts = tables.tables.token_counts[sequence.slot]
    assert (int(counts[11]), int(counts[12])) == (2, 1)
    assert counts.nonzero()[:, 0].tolist() == [0, 9, 11, 12, 20]
    assert int(counts[9]) == IN_PROMPT, "a token of the prompt is no output"


def test_tables_leave_rows_that_sample_nothing_yet() -> None:
    tables = new_tables()
    sequences = new_sequences()
    tables.update(sequences, [0] * 7, [False] * 7, (5,))
    assert (tables.apply(torch.ones(7, VOCAB), [0] * 7) == 1).all()
    tables.count(torch.zeros(7, dtype=torch.int64))
    assert (tables.row_slots == NO_SLOT).all()
    assert not tables.tables.token_counts.any()


def test_tables_send_nothing_while_the_same_requests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = new_tables()
    sequences = new_sequences()
    changed(tables, torch.zeros(7, VOCAB), sequences, [0] * 7)
    tables.count(torch.zeros(7, dtype=torch.int64))
    written: list[object] = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: written.append("rows"))
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda *_: written.append("slot"))
    tables.update(sequences, [1] * 7, [True] * 7, (5,))
    assert written == []
    tables.update(sequences[:5], [1] * 5, [True] * 5, (5,))
    assert written == ["rows"]


def test_tables_take_penalties_that_are_integers() -> None:
    params = SamplingParams(repetition_penalty=2, presence_penalty=1, frequency_penalty=1)
    tables = new_tables()
    found = changed(tables, torch.full((1, VOCAB), 3.0), [new_sequence(0, params)], [0])
    assert found.dtype == torch.float32
    assert found.unique().tolist() == [1.5, 3.0]


def test_smallest_repetition_penalty_keeps_logits_finite() -> None:
    params = SamplingParams(repetition_penalty=1e-40)
    logits = torch.zeros(1, VOCAB)
    assert torch.equal(changed(new_tables(), logits, [new_sequence(0, params)], [0]), logits)


# In the interpreter

Call = tuple[torch.Tensor, ...]


def requests_against(token: int) -> list[SamplingParams]:
    """Of each slot; most make a token less likely that is in the output twice."""
    return [
        SamplingParams(presence_penalty=3.0, frequency_penalty=4.0),
        SamplingParams(),
        SamplingParams(repetition_penalty=9.5),
        SamplingParams(logit_bias={token: -30.0, 40: 2.0}),
        SamplingParams(min_tokens=4, stop_token_ids=(token,)),
        SamplingParams(min_tokens=2, stop_token_ids=(token,), logit_bias={41: 3.0}),  # reached
        SamplingParams(
            repetition_penalty=1.3,
            frequency_penalty=-0.7,
            logit_bias={token: -1.0, 42: 9.0},
            min_tokens=5,
            stop_token_ids=(42, 43),
        ),
        SamplingParams(repetition_penalty=0.7, presence_penalty=-0.3),
    ]


def sampler_calls() -> list[Call]:
    """Rows of all kinds of requests, greedy and drawn, with and without a grammar's bitmask.

    A slot has two rows, as with drafts. Some rows sample nothing yet.
    """
    size = 700
    calls = []
    for dtype, is_masked in (
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, True),
    ):
        logits, *parameters = (part[1::6][:9].contiguous() for part in sampling_arguments(size))
        logits = logits.to(dtype)
        counters = [3] * len(logits)
        parameters[-1] = torch.tensor(counters)
        likely = sample(logits.float(), *parameters).tolist()  # type: ignore[call-arg]
        sequences = []
        for row, token in enumerate(likely[:NUM_SLOTS]):
            sequences.append(new_sequence(row, requests_against(token)[row]))
            sequences[-1].token_ids += [token, token, 11]
        tables = LogitsProcessorTables(NUM_SLOTS, len(logits), size, 0, CPU)
        samples = [row != 7 for row in range(len(logits))]
        tables.update([*sequences, sequences[0]], counters, samples, (5, 6))
        masks: list[torch.Tensor] = []
        if is_masked:
            draw = torch.Generator().manual_seed(6)
            masks = [
                torch.randint(-(1 << 31), 1 << 31, (5, 22), generator=draw).int(),
                torch.tensor([-1, 0, 1, -1, 2, 3, 4, -1, -1]).int(),
            ]
        call = (logits, *parameters, *tables.tables, tables.row_slots, *masks)
        calls.append(tuple(part.clone() for part in call))
    return calls


def sampled(*arguments: torch.Tensor) -> torch.Tensor:
    """What the kernels sample."""
    parameters, tables = arguments[:7], LogitsTables(*arguments[7:11])
    masks = arguments[12:] or (None, None)
    return sampling_triton.sample(*parameters, *masks, tables, arguments[11])


def counted(tables: Call, slots: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The counts after the kernel."""
    logits_tables.runs_triton = lambda _: True
    count_tokens(LogitsTables(*tables), slots, token_ids)
    return tables[0]


def counting_call() -> tuple[Call, torch.Tensor, torch.Tensor]:
    """More rows than a program has; a slot has several, some none, and some no token."""
    draw = torch.Generator().manual_seed(2)
    tables = LogitsTables.empty(6, 130, CPU)
    tables.token_counts[:, 3] = IS_END + 2
    slots = torch.randint(-1, 6, (300,), generator=draw)
    token_ids = torch.randint(-1, 5, (300,), generator=draw)
    token_ids[0] = 130
    return tuple(tables), slots, token_ids


def run(name: str, *arguments: Any) -> torch.Tensor:
    """A function of this file, in the interpreter."""
    found: torch.Tensor = globals()[name](*arguments)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    calls = [("sampled", *call) for call in sampler_calls()]
    results: list[torch.Tensor] = interpreted(
        "engine.test_logits_processor_tables",
        "run",
        [*calls, ("counted", *counting_call())],
        tmp_path_factory.mktemp("tables"),
    )
    return results


def test_sampler_reads_tables_as_the_reference_does(found: list[torch.Tensor]) -> None:
    for call, ids in zip(sampler_calls(), found[:-1], strict=True):
        parameters, tables, slots = call[1:7], LogitsTables(*call[7:11]), call[11]
        logits = change_logits(call[0], tables, slots, parameters[-1])
        assert not torch.equal(logits, call[0].float())
        if len(call) > 12:
            apply_token_bitmask(logits, *call[12:])
        assert ids.tolist() == sample(logits, *parameters).tolist()  # type: ignore[call-arg]
        plain = sample(call[0].float(), *parameters)  # type: ignore[call-arg]
        assert (ids != plain).sum() >= 4, "the tables matter"


def test_count_kernel_matches_torch(found: list[torch.Tensor]) -> None:
    tables, slots, token_ids = counting_call()
    before = tables[0].clone()
    count_tokens(LogitsTables(*tables), slots, token_ids)
    assert torch.equal(found[-1], tables[0])
    is_counted = (slots >= 0) & (token_ids >= 0) & (token_ids < 130)
    assert int((tables[0] - before).sum()) == int(is_counted.sum()) > 100


def test_count_kernel_compiles(tmp_path: Path) -> None:
    kinds = {"token_counts": "*i32", "slots": "*i64", "token_ids": "*i64"}
    kinds |= dict.fromkeys(("num_rows", "vocab_size"), "i32")
    for capability in (90, 80):
        kernel = logits_tables._count_tokens_kernel
        compiled = compiled_for(capability, kernel, kinds, {"TILE": 256}, tmp_path, num_warps=4)
        assert compiled.stack_bytes == 0
