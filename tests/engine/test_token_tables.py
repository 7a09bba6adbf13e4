"""Token tables of a GPU against the processors that read the tokens themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.triton_checks import compiled_for, interpreted

from llmkit.kernels import penalties
from llmkit.kernels.penalties import IN_PROMPT, penalize
from llmkit.runtime.engine import logits_processors
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.logits_processors import TokenTables, apply_logits_processors
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.sequence import Sequence

VOCAB = 40
ASKED = [
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
    SamplingParams(),
    SamplingParams(repetition_penalty=0.7),
    SamplingParams(frequency_penalty=-0.5, logit_bias={3: 2.0, 39: -4.0}),
    SamplingParams(presence_penalty=0.1, min_tokens=3, stop_token_ids=(7,)),
    SamplingParams(min_tokens=2, ignore_eos=True, stop_token_ids=(8,), logit_bias={8: 9.0}),
]


def new_sequences() -> list[Sequence]:
    sequences = []
    for index, params in enumerate([*ASKED, ASKED[0]]):
        request = EngineRequest(f"{index}", [index, 9, 9, 20 + index], params)
        sequences.append(Sequence(request, seed=index))
        sequences[-1].slot = (3 * index + 1) % 8
    return sequences


@pytest.mark.parametrize(("start", "size"), [(0, VOCAB), (0, 20), (20, 20)])
def test_token_tables_give_the_logits_of_the_processors(start: int, size: int) -> None:
    """Over the steps of requests, of which some change their slots. A rank has some columns."""
    draw = torch.Generator().manual_seed(1)
    tables = TokenTables(8, size, start, torch.device("cpu"))
    sequences = new_sequences()
    for step in range(6):
        num_sampled = [len(s.token_ids) - s.num_prompt_tokens for s in sequences]
        logits = torch.randn(len(sequences), size, generator=draw) * 3
        expected = logits.clone()
        apply_logits_processors(expected, sequences, num_sampled, start, (5,))
        tables.apply(logits, sequences, num_sampled, [True] * len(sequences), (5,))
        masked = expected == float("-inf")
        assert bool(masked.any()) == (start < 8 and num_sampled[0] < 3)
        assert (logits[masked] < -1e29).all()
        torch.testing.assert_close(logits[~masked], expected[~masked], rtol=1e-6, atol=1e-6)
        tokens = torch.randint(0, VOCAB, (len(sequences),), generator=draw) // 4
        tables.count(tokens)
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.token_ids.append(token)
        if step == 2:  # two were preempted and run again, in each other's slot
            sequences[0].slot, sequences[2].slot = sequences[2].slot, sequences[0].slot
        if step == 3:  # the tokens of a step were lost
            for sequence in sequences:
                sequence.token_ids.pop()


def test_token_tables_count_tokens_that_the_host_does_not_know() -> None:
    tables = TokenTables(8, VOCAB, 0, torch.device("cpu"))
    sequence = new_sequences()[0]
    for num_sampled, token in enumerate((11, 11, -1, 12)):
        tables.apply(torch.zeros(1, VOCAB), [sequence], [num_sampled], [True], ())
        tables.count(torch.tensor([token]))
    table = tables._table
    assert table is not None
    counts = table[sequence.slot]
    assert (int(counts[11]), int(counts[12])) == (2, 1)
    assert counts.nonzero()[:, 0].tolist() == [0, 9, 11, 12, 20]
    assert int(counts[9]) == IN_PROMPT, "a token of the prompt is no output"


def test_token_tables_leave_rows_that_sample_nothing_yet() -> None:
    tables = TokenTables(8, VOCAB, 0, torch.device("cpu"))
    logits = torch.ones(7, VOCAB)
    tables.apply(logits, new_sequences(), [0] * 7, [False] * 7, (5,))
    tables.count(torch.zeros(7, dtype=torch.int64))
    assert (logits == 1).all()
    assert tables._table is None, "nobody has a penalty yet"


def test_token_tables_take_penalties_that_are_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []
    monkeypatch.setattr(
        logits_processors, "penalize", lambda *arguments: dtypes.append(arguments[-1].dtype)
    )
    params = SamplingParams(repetition_penalty=2, presence_penalty=1, frequency_penalty=1)
    sequence = Sequence(EngineRequest("a", [5], params), seed=0)
    sequence.slot = 0
    tables = TokenTables(1, VOCAB, 0, torch.device("cpu"))
    tables.apply(torch.zeros(1, VOCAB), [sequence], [0], [True], ())
    assert dtypes == [torch.float32]


def penalized(*arguments: torch.Tensor) -> torch.Tensor:
    """The logits after the kernel, for the interpreter."""
    logits, *others = arguments
    penalties.runs_triton = lambda _: True
    penalize(logits, *others)
    return logits


def test_penalize_kernel_matches_torch(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    wide = torch.randn(4, 1500, generator=draw) * 3
    table = torch.randint(0, 3, (6, 1300), generator=draw, dtype=torch.int32)
    table |= torch.randint(0, 2, (6, 1300), generator=draw, dtype=torch.int32) * IN_PROMPT
    others = (
        table,
        torch.tensor([0, 3]),
        torch.tensor([5, 2]),
        torch.tensor([[1.3, 0.8], [0.5, 0.0], [-0.25, 2.0]]),
    )
    expected = wide[:, :1300].clone()
    penalize(expected, *others)
    (got,) = interpreted(
        "engine.test_token_tables", "penalized", [(wide[:, :1300], *others)], tmp_path
    )
    assert torch.equal(got[[1, 2]], wide[[1, 2], :1300])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_penalize_kernel_compiles(tmp_path: Path) -> None:
    kinds = {"logits": "*fp32", "table": "*i32", "rows": "*i64", "slots": "*i64"}
    kinds |= {"factors": "*fp32"}
    kinds |= dict.fromkeys(("num_rows", "row_stride", "vocab_size"), "i32")
    for capability in (90, 80):
        compiled = compiled_for(
            capability, penalties._penalize_kernel, kinds, {"TILE": 1024}, tmp_path, num_warps=4
        )
        assert compiled.stack_bytes == 0
