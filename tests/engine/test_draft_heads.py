"""MTP and EAGLE-3 heads in the engine: answers stay what they are, and drafts are accepted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fp8_files import write_fp8
from support.tiny_draft_heads import (
    family_with_mtp,
    glm_with_mtp,
    llama_with_eagle3,
    nemotron_with_mtp,
    text_tokens,
)

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.kernels.cpu import cpu_kernels
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.runtime.engine import cpu_graphs
from llmkit.runtime.engine.draft_head_proposer import DraftHeadProposer
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.engine_plan import plan_engine, plan_part
from llmkit.runtime.prefix_engine import PrefixStoreEngine
from llmkit.runtime.prefix_store import PAGE_TOKENS
from llmkit.shard.rank_part import rank_parts
from llmkit.shard.shard_checkpoint import shard

TRAINING_STEPS = 40
OPTIONS = EngineOptions(device="cpu", max_model_len=160, max_num_seqs=6)
SAMPLED = [
    SamplingParams(temperature=t, top_k=k, top_p=p, seed=seed, max_tokens=24, ignore_eos=True)
    for seed, (t, k, p) in enumerate(
        [(0.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 40, 1.0), (1.3, 0, 0.8), (0.2, 0, 1.0)]
    )
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
HEADS = ("mtp", "eagle3")
needs_library = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models and heads, trained."""
    folder = tmp_path_factory.mktemp("heads")
    glm_with_mtp(folder / "mtp", steps=TRAINING_STEPS, dtype="bfloat16")
    llama_with_eagle3(folder, steps=TRAINING_STEPS)
    return folder


def loaded(folder: Path, head: str, count: int, **options: Any) -> Engine:
    """An engine with a head that drafts `count` tokens; 0: without one."""
    speculation: dict[str, Any] = {}
    if count and head == "mtp":
        speculation = {"speculate": f"mtp:{count}"}
    elif count:
        speculation = {"speculate": count, "draft_model": str(folder / "head")}
    path = folder / ("mtp" if head == "mtp" else "target")
    return load_engine(open_checkpoint(path), replace(OPTIONS, **(speculation | options)))


def prompts() -> list[list[int]]:
    """Parts of the text, and random tokens."""
    generator = torch.Generator().manual_seed(3)
    random = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (3, 40)]
    return [text_tokens(20), random[0], text_tokens(33, 5), random[1], text_tokens(16, 30)]


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, list[list[int]]]:
    return {head: loaded(folder, head, 0).generate(prompts(), SAMPLED) for head in HEADS}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("count", [1, 4])
def test_draft_heads_change_no_sampled_token(
    folder: Path, plain: dict[str, list[list[int]]], head: str, count: int
) -> None:
    running = loaded(folder, head, count)
    assert isinstance(running.runner.draft_model, DraftHeadProposer)
    assert running.generate(prompts(), SAMPLED) == plain[head]
    stats = running.stats()
    assert 0 < stats.accepted_total <= stats.drafted_total


@needs_library
@pytest.mark.parametrize("head", HEADS)
def test_draft_heads_draft_the_same_in_recorded_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    known = [text_tokens(20, start) for start in (0, 9, 30)]
    recorded = loaded(folder, head, 3)
    answers = recorded.generate(known, GREEDY)
    proposer = recorded.runner.draft_model
    assert proposer is not None
    graphs = proposer.graph_runner._graphs  # type: ignore[attr-defined]
    assert {(3, 12), (3, 3)} <= graphs.keys(), "of all tokens of a step, and of one draft each"
    monkeypatch.setattr(cpu_graphs, "MAX_HIDDEN_ELEMENTS", 0)
    eager = loaded(folder, head, 3)
    assert eager.generate(known, GREEDY) == answers
    for stats in (recorded.stats(), eager.stats()):
        assert stats.accepted_per_pos_total == eager.stats().accepted_per_pos_total
        assert stats.accepted_total > 0.3 * stats.drafted_total > 10


@pytest.mark.parametrize("head", HEADS)
def test_draft_heads_of_the_text_they_know_are_accepted(folder: Path, head: str) -> None:
    known = [text_tokens(20, start) for start in (0, 9, 30)]
    running = loaded(folder, head, 1)
    assert running.generate(known, GREEDY) == [text_tokens(24, start + 20) for start in (0, 9, 30)]
    stats = running.stats()
    assert stats.accepted_total >= 0.9 * stats.drafted_total
    assert stats.accepted_per_pos_total == (stats.accepted_total,)
    assert stats.drafts_total == stats.drafted_total
    assert running.num_steps <= 15, "two tokens in most steps"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("options", "preempts"),
    [
        ({"kv_cache_memory": 9}, True),
        ({"max_num_batched_tokens": 7}, False),
        ({"max_num_seqs": 2}, False),
        ({"prefix_cache": False}, False),
    ],
)
def test_draft_heads_draft_beside_preempted_and_chunked_prompts(
    folder: Path,
    plain: dict[str, list[list[int]]],
    head: str,
    options: dict[str, Any],
    preempts: bool,
) -> None:
    if preempts:
        sizes = loaded(folder, head, 3, kv_cache_memory=1 << 22)
        per_block = (1 << 22) // sizes.config.num_blocks
        options = {"kv_cache_memory": (options["kv_cache_memory"] + 1) * per_block}
        options |= {"max_model_len": 96}
    running = loaded(folder, head, 3, **options)
    assert running.generate(prompts(), SAMPLED) == plain[head]
    stats = running.stats()
    assert stats.accepted_total > 0
    assert (stats.preemptions_total > 0) == preempts
    assert all(pool.num_used_blocks == 0 for pool in running.scheduler.pools)


@pytest.mark.parametrize("head", HEADS)
def test_draft_heads_know_cached_prefixes(folder: Path, head: str) -> None:
    running = loaded(folder, head, 1)
    first = running.generate([text_tokens(64)], GREEDY)[0]
    drafted, accepted = (running.stats().drafted_total, running.stats().accepted_total)
    # A second turn, and one whose prompt ends with a block: its last token alone is computed.
    turns = [text_tokens(64) + first + text_tokens(9, 88), text_tokens(65)]
    answers = running.generate(turns, GREEDY)
    assert running.stats().prefix_hits_total >= 64 + 80
    assert answers == loaded(folder, head, 0).generate(turns, GREEDY)
    stats = running.stats()
    again = (stats.accepted_total - accepted) / (stats.drafted_total - drafted)
    assert again >= accepted / drafted - 0.1 > 0.5


def test_draft_heads_draft_for_requests_that_come_and_go(folder: Path) -> None:
    running = loaded(folder, "mtp", 2)
    for index, prompt in enumerate(prompts() * 3):
        running.add(EngineRequest(str(index), prompt, SAMPLED[index % 5]))
    outputs = [output for _ in range(4) for output in running.step()]
    for name in ("1", "4", "8"):
        running.cancel(name)
    while running.has_work:
        outputs += running.step()
    expected = loaded(folder, "mtp", 0).generate(prompts(), SAMPLED)
    for index in set(range(15)) - {1, 4, 8}:
        tokens = [t for output in outputs if output.request_id == str(index) for t in output[1]]
        assert tokens == expected[index % 5]
    proposer = running.runner.draft_model
    assert isinstance(proposer, DraftHeadProposer)
    assert not proposer._rows_of_slot


def test_draft_heads_leave_requests_with_penalties_alone(folder: Path) -> None:
    params = replace(GREEDY, frequency_penalty=0.5)
    beside = [text_tokens(20), text_tokens(20, 8)]
    expected = loaded(folder, "mtp", 0).generate(beside, [params, GREEDY])
    assert loaded(folder, "mtp", 1).generate(beside, [params, GREEDY]) == expected


def with_mtp(name: str, path: Path, **changes: Any) -> None:
    """A row of FAMILIES with a random MTP head, as a checkpoint at `path`."""
    if name.startswith("nemotron"):
        nemotron_with_mtp(path, name, **changes)
    else:
        family_with_mtp(name, path, **changes)


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-next", "nemotron-3"])
def test_mtp_heads_draft_for_latent_attention_and_recurrent_layers(
    tmp_path: Path, name: str
) -> None:
    with_mtp(name, tmp_path)
    options = replace(OPTIONS, max_model_len=96)
    asked = [[token % 128 for token in prompt] for prompt in prompts()]
    expected = load_engine(open_checkpoint(tmp_path), options).generate(asked, SAMPLED)
    running = load_engine(open_checkpoint(tmp_path), replace(options, speculate="mtp:2"))
    assert running.generate(asked, SAMPLED) == expected
    assert running.stats().drafted_total > 100
    assert running.generate(asked, SAMPLED) == expected, "with cached prefixes"


@pytest.mark.parametrize("name", ["glm4-moe-lite", "qwen3-next", "nemotron-3"])
def test_mtp_heads_have_their_part_of_prefixes_on_disk(tmp_path: Path, name: str) -> None:
    with_mtp(name, tmp_path / "model", max_position_embeddings=1024)
    options = EngineOptions(device="cpu", max_num_seqs=2, speculate="mtp:2")
    prompt = [3 + (i * 7 + i * i // 5) % 120 for i in range(2 * PAGE_TOKENS + 40)]

    def started() -> PrefixStoreEngine:
        store = (str(tmp_path / "kept"), 1 << 28)
        engine = load_engine(tmp_path / "model", options, prefix_store=store)
        assert isinstance(engine, PrefixStoreEngine)
        return engine

    first = started()
    answers = [first.generate([prompt], GREEDY)[0] for _ in range(2)]
    first._write_thread.shutdown()
    again = started()
    assert again.generate([prompt], GREEDY) == [answers[0]] == answers[1:]
    assert again.stats().store_hits_total == 2 * PAGE_TOKENS
    plain = load_engine(tmp_path / "model", replace(options, speculate=0))
    assert plain.generate([prompt], GREEDY) == [answers[0]]


def acceptance(path: Path) -> tuple[int, int]:
    engine = load_engine(open_checkpoint(path), replace(OPTIONS, speculate="mtp:2"))
    engine.generate([text_tokens(20, start) for start in range(0, 40, 8)], GREEDY)
    stats = engine.stats()
    return stats.accepted_total, stats.drafted_total


@pytest.mark.parametrize("method", ["bf16", "rtn"])
def test_mtp_heads_carried_through_quantize_are_accepted_as_before(
    folder: Path, tmp_path: Path, method: str
) -> None:
    options = QuantizeOptions(method, device="cpu", evaluate=False)
    if method == "rtn":
        options = replace(options, group_size=32)
    quantize(str(folder / "mtp"), str(tmp_path / "out"), options, SilentProgress())
    before = acceptance(folder / "mtp")
    after = acceptance(tmp_path / "out")
    if method == "bf16":
        assert after == before
    assert after[0] / after[1] >= 0.8 * before[0] / before[1] > 0.3


def test_mtp_heads_of_fp8_checkpoints_are_read_as_they_are_stored(
    folder: Path, tmp_path: Path
) -> None:
    glm_with_mtp(tmp_path / "dense", steps=TRAINING_STEPS)
    write_fp8(tmp_path / "dense", tmp_path / "fp8", (32, 32))
    stored = open_checkpoint(tmp_path / "fp8").tensors
    head = "model.layers.2."
    assert stored[f"{head}self_attn.q_proj.weight"].dtype == "F8_E4M3"
    assert stored[f"{head}eh_proj.weight"].dtype == "F32", "which no entry of the config says"
    after = acceptance(tmp_path / "fp8")
    before = acceptance(tmp_path / "dense")
    assert after[0] / after[1] >= 0.8 * before[0] / before[1] > 0.3


def test_draft_heads_are_part_of_the_memory_plan(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "mtp")
    options = replace(OPTIONS, kv_cache_dtype="float32")
    alone = plan_engine(checkpoint, options).memory
    with_head = plan_engine(checkpoint, replace(options, speculate="mtp")).memory
    assert with_head.weight_bytes > alone.weight_bytes
    assert with_head.bytes_per_block == alone.bytes_per_block * 3 // 2, "a third layer"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_model": "x", "tp": 2}, "--draft-model on 2 ranks is not possible"),
        ({"speculate": "mtp:2", "draft_model": "x"}, "both say what drafts"),
    ],
)
def test_mtp_heads_are_refused_where_they_cannot_draft(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_engine(open_checkpoint(folder / "mtp"), replace(OPTIONS, **options))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, ("ngram", 3)),
        ("3", ("ngram", 3)),
        (0, ("ngram", 0)),
        ("ngram", ("ngram", 4)),
        ("suffix:12", ("suffix", 12)),
        ("mtp", ("mtp", 1)),
        ("mtp:3", ("mtp", 3)),
    ],
)
def test_speculation_is_a_number_a_method_or_both(
    value: int | str, expected: tuple[str, int]
) -> None:
    assert EngineOptions(speculate=value).speculation == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("eagle", "'eagle' is not understood.*ngram, suffix or mtp"),
        ("mtp:", "is not understood"),
        ("mtp:0", "0 is out of range"),
        (65, "65 is out of range"),
        (-1, "-1 is out of range"),
    ],
)
def test_speculation_of_another_form_is_refused(value: int | str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _ = EngineOptions(speculate=value).speculation


@pytest.mark.parametrize(("name", "ep", "is_sharded"), [("glm", 1, True), ("nemotron-3", 2, False)])
def test_mtp_heads_are_split_over_ranks_as_their_model_is(
    folder: Path, tmp_path: Path, name: str, ep: int, is_sharded: bool
) -> None:
    path = folder / "mtp"
    if name != "glm":
        path = tmp_path / "model"
        with_mtp(name, path)
    asked = [[token % 128 for token in prompt] for prompt in prompts()]
    sampling = SAMPLED
    if name == "glm":
        asked = [text_tokens(20, start) for start in (0, 9, 30)]
        sampling = [GREEDY] * 3
    options = replace(OPTIONS, max_model_len=96)
    alone = load_engine(open_checkpoint(path), replace(options, speculate="mtp:2"))
    expected = alone.generate(asked, sampling)
    source: Path = path
    if is_sharded:
        shard(path, tmp_path / "ranks", 2)
        source = tmp_path / "ranks"
        options = replace(options, tp=1)
    else:
        options = replace(options, tp=2, ep=ep)
    running = load_engine(open_checkpoint(source), replace(options, speculate="mtp:2"))
    try:
        assert running.generate(asked, sampling) == expected
        stats = running.stats()
        assert abs(stats.accepted_total - alone.stats().accepted_total) <= 2
        assert stats.drafted_total > 20
        plan = plan_engine(open_checkpoint(source), replace(options, speculate="mtp:2"))
        without = plan_engine(open_checkpoint(source), options)
        assert plan.memory.weight_bytes > without.memory.weight_bytes
    finally:
        running.close()


def expected_of(path: Path, asked: list[list[int]], options: EngineOptions) -> list[list[int]]:
    """The answers to `asked` of one rank without drafts."""
    options = replace(options, speculate=0, pp=1)
    return load_engine(open_checkpoint(path), options).generate(asked, SAMPLED)


@pytest.mark.parametrize(("tp", "count"), [(1, 1), (2, 3)])
def test_mtp_heads_draft_on_the_last_stage_of_a_pipeline(
    folder: Path, tmp_path: Path, tp: int, count: int
) -> None:
    asked = [text_tokens(20, start) for start in (0, 9, 30)]
    options = replace(OPTIONS, speculate=f"mtp:{count}")
    alone = load_engine(open_checkpoint(folder / "mtp"), options)
    expected = alone.generate(asked, [GREEDY] * 3)
    source = folder / "mtp"
    if tp == 2:  # each rank reads its own file, and the last stage the first one's embedding
        shard(source, tmp_path / "ranks", tp, 2)
        source = tmp_path / "ranks"
    running = load_engine(open_checkpoint(source), replace(options, pp=2))
    try:
        assert running.generate(asked, [GREEDY] * 3) == expected
        stats = running.stats()
        rate = alone.stats().accepted_total / alone.stats().drafted_total
        assert stats.accepted_total / stats.drafted_total >= rate - 0.1 > 0.5
        assert stats.accepted_total > 30
        assert running._pipeline_drafts is not None
        assert not running._pipeline_drafts._drafts, "all are finished"
    finally:
        running.close()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3-next", {}),
        ("deepseek-v3", {"max_num_batched_tokens": 7}),
        ("glm4-moe-lite", {"kv_cache_memory": 10}),
        pytest.param("nemotron-3", {"tp": 2}, marks=pytest.mark.slow),
    ],
)
def test_mtp_heads_of_a_pipeline_change_no_sampled_token(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """Recurrent states, chunked prompts, preempted sequences, ranks within the stages."""
    with_mtp(name, tmp_path)
    asked = [[token % 128 for token in prompt] for prompt in prompts()]
    chosen = replace(OPTIONS, max_model_len=96, pp=2, speculate="mtp:2")
    chosen = replace(chosen, kv_cache_dtype="float32")
    expected = expected_of(tmp_path, asked, chosen)
    if "kv_cache_memory" in options:
        plan = plan_engine(open_checkpoint(tmp_path), chosen)
        options = {"kv_cache_memory": options["kv_cache_memory"] * plan.memory.bytes_per_block}
    running = load_engine(open_checkpoint(tmp_path), replace(chosen, **options))
    try:
        for _ in range(2):  # the second time from the prefix cache
            assert running.generate(asked, SAMPLED) == expected
        stats = running.stats()
        assert stats.drafted_total > 100
        is_preempted = "kv_cache_memory" in options
        assert (stats.preemptions_total > 0) == is_preempted
        assert stats.prefix_hits_total > 0 or is_preempted
        assert all(pool.num_used_blocks == 0 for pool in running.scheduler.pools)
    finally:
        running.close()


def test_mtp_heads_of_a_pipeline_are_in_the_plan_of_its_last_stage(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "mtp")
    options = replace(OPTIONS, pp=2, speculate="mtp")
    first, last = rank_parts(checkpoint, pp=2)
    plans = [
        plan_part(part.checkpoint, part.spec, options, 2, part.whole) for part in (first, last)
    ]
    without = [
        plan_part(part.checkpoint, part.spec, replace(options, speculate=0), 2, part.whole)
        for part in (first, last)
    ]
    assert plans[0].memory.weight_bytes == without[0].memory.weight_bytes
    embedding = checkpoint.tensors["model.embed_tokens.weight"]
    added = plans[1].memory.weight_bytes - without[1].memory.weight_bytes
    assert added > 2 * embedding.nbytes, "the head in float32, and the embedding"
