"""What the engine computes of a step beside the model: rows, logprobs, processors, buffers.

Small exact cases without a model.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.spec import LayerSpec
from llmkit.runtime.engine.draft_model import DraftModelProposer
from llmkit.runtime.engine.drafting import NgramProposer, accepted_tokens
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_outputs import Logprobs
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.logits_processors import apply_logits_processors
from llmkit.runtime.engine.paged_model import PagedModel
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.sampling_tensors import (
    SamplingTensorCache,
    sampling_tensors_on_device,
)
from llmkit.runtime.engine.scheduler_output import ScheduledRequest, SchedulerOutput
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.slot_block_tables import SlotBlockTables
from llmkit.runtime.engine.static_batch import StaticBatch
from llmkit.runtime.engine.step_logprobs import (
    PROMPT_POSITIONS,
    LogprobsTensors,
    compute_prompt_logprobs,
    concatenate,
    empty_logprobs,
    max_alternatives,
    num_prompt_logprobs,
    num_sampled_logprobs,
    sampled_logprob_rows,
    split_logprobs,
)

INF = math.inf


def new_sequence(prompt: list[int], output: list[int] | None = None, **params: Any) -> Sequence:
    request = EngineRequest("a", prompt, SamplingParams(**params))
    sequence = Sequence(request, seed=params.get("seed", 0))
    sequence.token_ids += output or []
    return sequence


def processed(
    row: list[float], sequence: Sequence, num_sampled: int = 0, start: int = 0
) -> list[float]:
    logits = torch.tensor([row])
    apply_logits_processors(logits, [sequence], [num_sampled], start, (1,))
    found: list[float] = logits[0].tolist()
    return found


@pytest.mark.parametrize(
    ("params", "num_sampled", "ended"),
    [
        ({"min_tokens": 2}, 0, [1]),
        ({"min_tokens": 2}, 1, [1]),
        ({"min_tokens": 2}, 2, []),
        ({"min_tokens": 2, "stop_token_ids": (3,)}, 1, [1, 3]),
        ({"min_tokens": 2, "stop_token_ids": (3,), "ignore_eos": True}, 1, [3]),
        ({"min_tokens": 2, "ignore_eos": True}, 1, []),
        ({"min_tokens": 0, "stop_token_ids": (3,)}, 0, []),
    ],
)
def test_min_tokens_mask_end_tokens_to_the_token(
    params: dict[str, Any], num_sampled: int, ended: list[int]
) -> None:
    row = [0.5, 1.5, 2.5, 3.5]
    expected = [-INF if token in ended else value for token, value in enumerate(row)]
    assert processed(row, new_sequence([2], **params), num_sampled) == expected


def test_repetition_penalty_covers_prompt_and_output_once() -> None:
    sequence = new_sequence([0, 2, 2], [3], repetition_penalty=2.0)
    assert processed([1.0, 1.0, -1.0, 0.0, 3.0], sequence) == [0.5, 1.0, -2.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("presence", "frequency", "expected"),
    [
        (0.5, 0.0, [1.0, 0.5, 0.5, 1.0]),
        (0.0, 0.25, [1.0, 0.75, 0.5, 1.0]),
        (0.5, 0.25, [1.0, 0.25, 0.0, 1.0]),
        (-0.5, 0.0, [1.0, 1.5, 1.5, 1.0]),
    ],
)
def test_presence_and_frequency_penalties_count_the_output_only(
    presence: float, frequency: float, expected: list[float]
) -> None:
    sequence = new_sequence(
        [0, 0, 2], [1, 2, 2], presence_penalty=presence, frequency_penalty=frequency
    )
    assert processed([1.0] * 4, sequence) == expected


@pytest.mark.parametrize(
    ("start", "expected"), [(0, [1.0, -8.0, 3.0]), (2, [3.0, 1.0, 4.0]), (4, [4.0, 1.0, 1.0])]
)
def test_logit_bias_reaches_the_columns_of_each_rank(start: int, expected: list[float]) -> None:
    """A rank holds three of the columns; the bounds of its part are exact."""
    sequence = new_sequence([0], logit_bias={1: -9.0, 2: 2.0, 4: 3.0})
    assert processed([1.0] * 3, sequence, start=start) == expected


def test_logits_processors_change_each_row_for_its_own_sequence() -> None:
    sequences = [new_sequence([0]), new_sequence([0], logit_bias={0: 1.0}), new_sequence([1])]
    logits = torch.zeros(3, 2)
    apply_logits_processors(logits, sequences, [0, 0, 0], 0, ())
    assert logits.tolist() == [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_sampling_params_say_whether_logits_are_changed() -> None:
    assert not SamplingParams().has_penalties
    assert not SamplingParams().needs_logits_processors
    assert not SamplingParams(temperature=0.0, top_p=0.5, logprobs=0).needs_logits_processors
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        params = SamplingParams(**{name: 0.5})  # type: ignore[arg-type]
        assert params.has_penalties
        assert params.needs_logits_processors
    for other in (SamplingParams(logit_bias={0: 1.0}), SamplingParams(min_tokens=1)):
        assert not other.has_penalties
        assert other.needs_logits_processors


def test_sampling_params_default_to_plain_sampling() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (16, 0, False)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (
        1,
        0,
        0,
    )
    assert (params.seed, params.logprobs, params.prompt_logprobs) == (None, None, None)
    assert EngineRequest("a", [5], params).priority == 0


def test_sampling_tensors_hold_each_parameter_in_its_place() -> None:
    first = new_sequence([5], temperature=0.5, top_k=3, top_p=0.75, min_p=0.25, seed=7)
    second = new_sequence([5], temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=2**62 + 1)
    cache = SamplingTensorCache()
    tensors = cache.get([first, second])
    assert tensors.temperature.tolist() == [0.5, 0.0]
    assert tensors.top_k.tolist() == [3, 0]
    assert tensors.top_p.tolist() == [0.75, 1.0]
    assert tensors.min_p.tolist() == [0.25, 0.0]
    assert tensors.seeds.tolist() == [7, 2**62 + 1]
    assert cache.get([first, second]) is tensors
    other = new_sequence([5], temperature=0.5, top_k=3, top_p=0.75, min_p=0.25, seed=8)
    assert cache.get([other, second]).seeds.tolist() == [8, 2**62 + 1]
    assert cache.get([second]).temperature.tolist() == [0.0]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6])
def test_sampling_tensors_on_a_device_are_aligned(num_rows: int) -> None:
    """Triton compiles a kernel again for arguments of another alignment."""
    sequences = [
        new_sequence([5], temperature=0.5 * n, top_k=n, top_p=0.75, min_p=0.25, seed=7 + n)
        for n in range(num_rows)
    ]
    sampling = SamplingTensorCache().get(sequences)
    counters = [10 * n for n in range(num_rows)]
    found = sampling_tensors_on_device(sampling, counters, torch.device("cpu"))
    assert [tensor.data_ptr() % 16 for tensor in found] == [0] * 6
    assert all(tensor.is_contiguous() for tensor in found)
    wanted = [*sampling, torch.tensor(counters)]
    assert [tensor.tolist() for tensor in found] == [tensor.tolist() for tensor in wanted]


def scheduled(
    sequence: Sequence, start: int, num_tokens: int, *, samples: bool = True, num_drafts: int = 0
) -> ScheduledRequest:
    tokens = sequence.token_ids[start : start + num_tokens - num_drafts]
    return ScheduledRequest(
        sequence, start, num_tokens, samples, 0, [*tokens, *[0] * num_drafts], num_drafts
    )


@pytest.mark.parametrize(
    ("start", "num_tokens", "count"), [(0, 4, 4), (0, 5, 4), (3, 1, 1), (4, 1, 0), (5, 1, 0)]
)
def test_prompt_logprobs_are_counted_to_the_last_token(
    start: int, num_tokens: int, count: int
) -> None:
    """A prompt of five tokens has four: the first token has no logprob."""
    sequence = new_sequence([5, 6, 7, 8, 9], [3], prompt_logprobs=0)
    assert num_prompt_logprobs(scheduled(sequence, start, num_tokens)) == count
    unwanted = new_sequence([5, 6, 7, 8, 9], [3], logprobs=2)
    assert num_prompt_logprobs(scheduled(unwanted, start, num_tokens)) == 0


def test_sampled_logprobs_are_those_of_requests_that_sample_and_want_them() -> None:
    wants = new_sequence([5, 6, 7], logprobs=2)
    plain = new_sequence([5, 6, 7], prompt_logprobs=3)
    requests = [
        scheduled(wants, 0, 1, num_drafts=0, samples=False),
        scheduled(plain, 2, 1),
        scheduled(wants, 2, 3, num_drafts=2),
        scheduled(plain, 2, 2, num_drafts=1),
        scheduled(wants, 2, 1),
    ]
    assert [num_sampled_logprobs(request) for request in requests] == [0, 0, 3, 0, 1]
    assert sampled_logprob_rows(requests) == [2, 3, 4, 7]
    assert max_alternatives(requests) == 3
    assert max_alternatives(requests[:1]) == 2
    assert max_alternatives([]) == 0
    assert max_alternatives([scheduled(new_sequence([5]), 0, 1)]) == 0


def test_empty_logprobs_have_a_row_for_each_wanted_one() -> None:
    wants = new_sequence([5, 6, 7], logprobs=2, prompt_logprobs=1)
    plain = new_sequence([5, 6, 7])
    table = empty_logprobs([scheduled(plain, 0, 3), scheduled(wants, 0, 3)])
    assert table is not None
    assert [column.shape for column in table] == [(3,), (3, 2), (3, 2)]
    assert [column.dtype for column in table] == [torch.float32, torch.float32, torch.int64]
    assert empty_logprobs([scheduled(plain, 0, 3)]) is None
    assert concatenate([]) is None


def test_logprobs_are_split_by_request_with_the_alternatives_that_each_wants() -> None:
    both = new_sequence([5, 6, 7], logprobs=0, prompt_logprobs=2)
    sampled = new_sequence([5], logprobs=1)
    neither = new_sequence([5, 6])
    requests = [scheduled(both, 0, 3), scheduled(neither, 0, 2), scheduled(sampled, 0, 1)]
    rows = torch.arange(4.0)
    table = LogprobsTensors(
        -rows, -rows[:, None] - torch.tensor([0.5, 0.75]), torch.arange(8).view(4, 2)
    )
    halves = [LogprobsTensors(*(c[:2] for c in table)), LogprobsTensors(*(c[2:] for c in table))]
    joined = concatenate(halves)
    assert joined is not None
    of_prompts, of_sampled = split_logprobs(requests, joined)
    assert of_prompts == [
        [Logprobs(0.0, [(0, -0.5), (1, -0.75)]), Logprobs(-1.0, [(2, -1.5), (3, -1.75)])], [], []
    ]  # fmt: skip
    assert of_sampled == [[Logprobs(-2.0, [])], [], [Logprobs(-3.0, [(6, -3.5)])]]


@pytest.mark.parametrize("length", [2, PROMPT_POSITIONS, PROMPT_POSITIONS + 1, 150])
def test_prompt_logprobs_are_computed_a_few_positions_at_a_time(length: int) -> None:
    """The model's logits are its hidden states here, so that each row shows where it is from."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(0, 32, (length,), generator=generator).tolist()
    hidden = torch.randn(3 + length, 32, generator=generator)
    sizes = []

    def logits(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows

    model: Any = SimpleNamespace(logits=logits, parallel_group=ParallelGroup())
    requests = [
        scheduled(new_sequence([5, 6, 7]), 0, 3),
        scheduled(new_sequence(prompt, prompt_logprobs=2), 0, length),
    ]
    table = concatenate(compute_prompt_logprobs(model, requests, hidden))
    assert table is not None
    truth = hidden[3:-1].log_softmax(-1)
    expected = truth.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert torch.allclose(table.logprobs, expected, atol=1e-5)
    assert torch.equal(table.top_token_ids, truth.topk(2).indices)
    assert PROMPT_POSITIONS == 64
    assert sizes == [64] * ((length - 1) // 64) + [(length - 1) % 64] * ((length - 1) % 64 > 0)


@pytest.mark.parametrize("num_graph_inputs", [0, 3])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_static_batch_has_the_slots_and_blocks_of_each_row(
    num_graph_inputs: int, device: str
) -> None:
    padding = {None: 9, 8: 5}
    slot_tables = SlotBlockTables(6, 3, padding)
    batch = StaticBatch(4, slot_tables, 4, padding, device, num_graph_inputs)
    assert len(batch.host) == 4 * (3 + 2) + num_graph_inputs
    assert batch.host.dtype == torch.int64
    assert (batch.device is batch.host) == (device == "cpu")
    assert batch.device.device.type == device
    assert len(batch.graph_inputs) == len(batch.host_graph_inputs) == num_graph_inputs
    batch.host_graph_inputs.fill_(77)
    if device != "cpu":
        return
    tables = {None: [[3, 4], [6, 7, 8]], 8: [[1, 2], [-1, 0, 4]]}
    batch.prepare_inputs([107, 108], [8, 9], tables, slots=[5, 2])
    assert batch.seq_lens.tolist() == [8, 9, 1, 1]
    assert batch.positions.tolist() == [107, 108, 0, 0]
    assert batch.slots.tolist() == [5, 2, 6, 6]
    assert batch.graph_inputs.tolist() == [77] * num_graph_inputs
    assert batch.batch.query_lens.tolist() == [1] * 4
    assert batch.batch.seq_lens.tolist() == [8, 9, 1, 1]
    assert batch.batch.metadata(None).slot_mapping.tolist() == [19, 32, 36, 36]
    assert batch.batch.metadata(8).slot_mapping.tolist() == [11, 16, 20, 20]
    for window, expected in (
        (None, [[3, 4], [6, 7, 8], [9], [9]]),
        (8, [[1, 2], [-1, 0, 4], [5], [5]]),
    ):
        table = batch.batch.metadata(window).block_table
        assert table.starts.tolist() == [5 * 16, 2 * 16, 6 * 16, 6 * 16]
        assert table.sizes.tolist() == [16] * 4
        assert np.shares_memory(table.blocks, slot_tables.host)
        for start, row in zip(table.starts.tolist(), expected, strict=True):
            assert table.blocks[start : start + len(row)].tolist() == row
    batch.prepare_inputs([1], [5], {None: [[0, 1]], 8: [[2, 3]]})  # the rows before are unused now
    assert batch.seq_lens.tolist() == [5, 1, 1, 1]
    assert batch.positions.tolist() == [1, 0, 0, 0]
    assert batch.slots.tolist() == [0, 6, 6, 6]
    assert batch.batch.metadata(None).slot_mapping.tolist() == [4, 36, 36, 36]


def test_static_batch_places_several_tokens_of_a_row() -> None:
    slot_tables = SlotBlockTables(4, 3, {None: 9})
    batch = StaticBatch(3, slot_tables, 4, {None: 9}, max_query_len=3)
    batch.prepare_inputs([6, 7, 8, 2], [9, 3], {None: [[7, 5, 1], [4]]}, [3, 1])
    assert batch.seq_lens.tolist() == [9, 3, 0]
    assert batch.positions.tolist() == [6, 7, 8, 2, 0, 0, 0, 0, 0]
    assert batch.query_start_loc is not None
    assert batch.query_start_loc.tolist() == [0, 3, 4, 4]
    assert batch.batch.query_lens.tolist() == [3, 1, 0]
    assert batch.batch.metadata(None).slot_mapping.tolist() == [22, 23, 4, 18] + [36] * 5
    batch.prepare_inputs([2], [3], {None: [[4]]})
    assert batch.query_start_loc.tolist() == [0, 1, 1, 1]
    assert batch.batch.metadata(None).slot_mapping.tolist() == [18] + [36] * 8


class Sent(SlotBlockTables):
    """Notes the entries that are copied to the device."""

    def update(self, slots: Any, block_tables: Any) -> list[tuple[int, ...]]:
        """The window, slot, column and block of each entry that has changed on the device."""
        assert self.device is not None
        self.device[self.device >= 0] += 1000  # whatever is not written again
        super().update(slots, block_tables)
        places = (self.device < 1000).nonzero().tolist()
        changed = [(*place, int(self.device[tuple(place)])) for place in places]
        self.device[self.device >= 1000] -= 1000
        return changed


def test_slot_block_tables_send_what_has_changed() -> None:
    tables = Sent(4, 20, {None: 9, 8: 5}, "cpu")
    assert tables.width == 32
    assert tables.device is not None
    assert tables.device.dtype == torch.int32
    assert tables.device_table(None)[4, 0] == 9
    assert tables.device_table(8)[4, 0] == 5
    first, second = [3, 4], [7]
    windowed, other = [6, 2], [8]
    steps = {None: [first, second], 8: [windowed, other]}
    assert tables.update([1, 3], steps) == [
        (0, 1, 0, 3), (0, 1, 1, 4), (0, 3, 0, 7), (1, 1, 0, 6), (1, 1, 1, 2), (1, 3, 0, 8)
    ]  # fmt: skip
    assert tables.update([1, 3], steps) == []
    first += [0, 1]
    assert tables.update([1, 3], steps) == [(0, 1, 2, 0), (0, 1, 3, 1)]
    # Two blocks have left the window; a freed block is 0 on the device.
    windowed += [5]
    windowed[:2] = [-1, -1]
    assert tables.update([1, 3], steps) == [(1, 1, 0, 0), (1, 1, 1, 0), (1, 1, 2, 5)]
    assert tables.rows(8)[32:35].tolist() == [-1, -1, 5]
    assert tables.update([1], {None: [first], 8: [windowed]}) == []
    # Another sequence has the slot now, with equal blocks; the one that had it comes back.
    assert tables.update([3], {None: [[7]], 8: [[8]]}) == [(0, 3, 0, 7), (1, 3, 0, 8)]
    assert tables.update([3], {None: [second], 8: [other]}) == [(0, 3, 0, 7), (1, 3, 0, 8)]


def test_slot_block_tables_are_on_the_host_alone_where_no_device_reads_them() -> None:
    tables = SlotBlockTables(2, 3, {None: 0})
    tables.update([1], {None: [[4, 2]]})
    assert tables.device is None
    assert tables.host[0, 1, :2].tolist() == [4, 2]


@pytest.mark.parametrize("tile_sizes", [(4, 32), (16, 16), (1, 8)])
def test_mixed_graphs_have_the_tiles_of_eager_steps(tile_sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        count = int(torch.randint(1, 9, (), generator=generator))
        lens = torch.randint(1, 40, (count,), generator=generator).tolist()
        lens[::2] = [1] * len(lens[::2])
        tables = {None: [[row] * 10 for row in range(len(lens))]}
        eager = AttentionBatch.build(lens, [length + 5 for length in lens], tables, 16)
        num_tokens = sum(lens) + 3
        block_tables = SlotBlockTables(10, 10, {None: 9}, "cpu")
        fixed = StaticBatch(
            len(lens) + 2, block_tables, 16, {None: 9}, "cpu", 0, num_tokens, num_tokens
        )
        fixed.prepare_inputs([0] * sum(lens), [length + 5 for length in lens], tables, lens)
        metadata = fixed.batch.metadata(None)
        metadata.update_block_tables(
            block_tables.device_table(None), fixed.seq_lens, fixed.query_start_loc, fixed.slots
        )
        found = {}
        for tiles in metadata.query_tiles(*tile_sizes):
            assert tiles.tiles is not None and len(tiles.tiles) == tiles.num_tiles
            real = [tuple(tile) for tile in tiles.tiles.tolist() if tile[0] < len(lens)]
            rest = {tuple(tile) for tile in tiles.tiles.tolist() if tile[0] >= len(lens)}
            assert rest <= {(len(lens), 0), (len(lens) + 1, 0)}, "rows without tokens"
            assert len(real) == len(set(real))
            if real:
                found[tiles.tile_queries] = set(real)
        wanted = {}
        for tiles in eager.metadata(None).query_tiles(*tile_sizes):
            rows = [(row, 0) for row in range(len(lens))]
            if tiles.tiles is not None:
                rows = [tuple(tile) for tile in tiles.tiles.tolist()]
            wanted[tiles.tile_queries] = set(rows)
        assert found == wanted


def test_accepted_tokens_end_with_the_first_difference_to_the_drafts() -> None:
    assert accepted_tokens([], [5]) == [5]
    assert accepted_tokens([5, 6], [5, 6, 7]) == [5, 6, 7]
    assert accepted_tokens([5, 6], [5, 8, 7]) == [5, 8]
    assert accepted_tokens([5, 6], [8, 6, 7]) == [8]


def test_ngram_proposer_keeps_an_index_for_each_sequence_until_it_is_forgotten() -> None:
    proposer = NgramProposer()
    first = new_sequence([5, 6, 7, 5, 6])
    second = new_sequence([5, 6, 8, 5, 6])
    assert proposer.propose(first, 1) == [7]
    assert proposer.propose(second, 1) == [8]
    index = proposer._indexes[first]
    assert proposer.propose(first, 2) == [7, 5]
    assert proposer._indexes[first] is index
    proposer.forget(first)
    assert list(proposer._indexes) == [second]
    proposer.forget(first)


class CountingModel:
    """A model whose next token is its token plus one; it notes what it computes.

    Its hidden state is the token, and its vocabulary has 64 tokens.
    """

    parallel_group = ParallelGroup()

    def __init__(self) -> None:
        layer = LayerSpec(sliding_window=4)
        self.spec = SimpleNamespace(
            layers=[layer],
            sliding_windows=(4,),
            rope_offset=lambda length: 1000 if length > 50 else 0,
            for_layer=lambda index: None,
        )
        self.calls: list[tuple[list[int], list[int]]] = []
        self.cache_sizes: list[tuple[int, int]] = []
        self.slots: list[list[int]] = []

    def new_kv_cache(self, num_blocks: int, block_size: int, *_: object) -> KVCache:
        self.cache_sizes.append((num_blocks, block_size))
        return KVCache.__new__(KVCache)

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, batch: Any, caches: object
    ) -> torch.Tensor:
        self.calls.append((token_ids.tolist(), positions.tolist()))
        self.slots.append(batch.metadata(4).slot_mapping.tolist())
        return token_ids[:, None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((hidden[:, 0] + 1) % 64, 64).float()


def config(**sizes: Any) -> EngineConfig:
    chosen: dict[str, Any] = {"max_model_len": 64, "num_blocks": 20, "block_size": 4}
    return EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **(chosen | sizes))


def test_draft_model_drafts_in_rounds_for_the_requests_that_want_more() -> None:
    model: Any = CountingModel()
    proposer = DraftModelProposer(model, config(sliding_windows=(8, None)))
    assert model.cache_sizes == [(21, 4)]
    requests = []
    for index, (length, known, num_drafts) in enumerate([(6, 5, 1), (3, 0, 0), (4, 2, 3)]):
        sequence = new_sequence([10 * (index + 1) + n for n in range(length)], temperature=0.0)
        sequence.num_draft_computed_tokens = known
        # The second table is that of full attention.
        sequence.block_tables = [[0] * 3, [5 * index, 5 * index + 1, 5 * index + 2]]
        sequence.slot = index
        start = length - 1
        requests.append(scheduled(sequence, start, 1 + num_drafts, num_drafts=num_drafts))
    drafts = proposer.run(SchedulerOutput(requests))
    assert drafts is not None
    assert drafts.tolist() == [16, 34, 35, 36]
    assert model.calls == [
        ([15, 20, 21, 22, 32, 33], [5, 0, 1, 2, 2, 3]),
        ([34], [4]),  # the only draft of the first request is not needed
        ([35], [5]),
    ]
    assert model.slots == [[5, 20, 21, 22, 42, 43], [44], [45]]
    assert proposer.run(SchedulerOutput(requests[1:2])) is None
    assert proposer.propose(requests[0].sequence, 3) == [0, 0, 0]


def test_draft_model_orders_the_drafts_of_two_requests() -> None:
    model: Any = CountingModel()
    proposer = DraftModelProposer(model, config())
    requests = []
    for index, num_drafts in enumerate((2, 3)):
        sequence = new_sequence([20 * (index + 1)], temperature=0.0)
        sequence.block_tables = [[index]]
        sequence.slot = index
        requests.append(scheduled(sequence, 0, 1 + num_drafts, num_drafts=num_drafts))
    drafts = proposer.run(SchedulerOutput(requests))
    assert drafts is not None
    assert drafts.tolist() == [21, 22, 41, 42, 43]
    assert model.calls == [([20, 40], [0, 0]), ([21, 41], [1, 1]), ([42], [2])]


def test_draft_model_draws_with_the_counters_of_the_large_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def note(logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        seen.append((parameters[4].tolist(), parameters[5].tolist()))
        return logits.argmax(-1)

    monkeypatch.setattr("llmkit.runtime.engine.draft_model.sample", note)
    model: Any = CountingModel()
    proposer = DraftModelProposer(model, config())
    sequence = new_sequence([20], [21], seed=9)
    sequence.block_tables = [[0, 1]]
    sequence.slot = 0
    sequence.num_draft_computed_tokens = 1
    step = SchedulerOutput([ScheduledRequest(sequence, 1, 4, True, 5, [21, 0, 0, 0], 3)])
    proposer.run(step)
    assert seen == [([9], [5]), ([9], [6]), ([9], [7])]


def test_paged_model_places_each_span_at_its_positions() -> None:
    """A long request is rotated with an offset; its slots and lengths are those without."""
    model: Any = CountingModel()
    paged = PagedModel(model, [], config(), {4: 1, None: 0})
    short = new_sequence([5] * 8, max_tokens=42)  # 50 tokens at most
    long = new_sequence([5] * 8, max_tokens=43)
    for index, sequence in enumerate((short, long)):
        sequence.block_tables = [[index, index + 2], [index + 4, index + 6]]
        sequence.slot = 3 - 2 * index
    inputs = paged.forward_inputs([(short, 2, 5), (long, 6, 8)])
    assert inputs.query_lens == [3, 2]
    assert inputs.seq_lens == [5, 8]
    assert inputs.positions == [2, 3, 4, 1006, 1007]
    assert inputs.block_tables == {4: [[4, 6], [5, 7]], None: [[0, 2], [1, 3]]}
    assert inputs.slots == [3, 1]
    paged.forward(torch.tensor([1, 2, 3, 4, 5]), inputs)
    assert model.slots == [[18, 19, 24, 30, 31]]


def test_paged_model_zeroes_the_blocks_of_each_layer_by_its_window() -> None:
    cleared = []
    model: Any = CountingModel()
    model.spec.layers = [
        SimpleNamespace(sliding_window=window, kv_shared_layer_offset=0) for window in (4, None)
    ]
    caches: Any = [SimpleNamespace(clear=cleared.append) for _ in range(2)]
    PagedModel(model, caches, config(), {4: 1, None: 0}).zero_blocks([[1, 2], [3]])
    assert cleared == [[3], [1, 2]]


def test_scheduled_request_counts_its_rows() -> None:
    request = scheduled(new_sequence([5, 6, 7]), 2, 3, num_drafts=2)
    assert (request.stop, request.num_sampled_rows, request.returns_embedding) == (5, 3, False)
    plain = ScheduledRequest(new_sequence([5]), 0, 1, True, 0, [5])
    assert (plain.num_draft_tokens, plain.num_sampled_rows) == (0, 1)
    pooled = Sequence(EngineRequest("a", [5, 6], SamplingParams(), pooling="last"), seed=0)
    assert [scheduled(pooled, 0, 2, samples=s).returns_embedding for s in (True, False)] == [
        True, False
    ]  # fmt: skip
