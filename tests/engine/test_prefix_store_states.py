"""The prefix cache on disk of models with recurrent layers: states at the ends of pages."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_families import family_oracle

from llmkit.common.errors import InputError
from llmkit.kernels.recurrent_state import RecurrentState
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.prefix_engine import PrefixStoreEngine
from llmkit.runtime.prefix_store import PAGE_TOKENS

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
TOKENS = [3 + (i * 7 + i * i // 5) % 120 for i in range(2000)]
SYSTEM = TOKENS[: PAGE_TOKENS + 40]
OPTIONS = EngineOptions(
    device="cpu",
    kv_cache_memory=1 << 22,
    state_cache_memory=1 << 20,
    max_num_batched_tokens=512,
    max_num_seqs=4,
    max_model_len=2048,
)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid") / "model"
    family_oracle("qwen3.5", path, max_position_embeddings=2048)
    return path


def engine_with_store(
    model: Path, folder: Path, options: EngineOptions = OPTIONS, limit: int = 1 << 28
) -> PrefixStoreEngine:
    engine = load_engine(model, options, prefix_store=(str(folder), limit))
    assert isinstance(engine, PrefixStoreEngine)
    return engine


def without_cache(model: Path, prompt: list[int]) -> list[int]:
    return load_engine(model, replace(OPTIONS, prefix_cache=False)).generate([prompt], GREEDY)[0]


def run(engine: Engine, prompt: list[int]) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were cached."""
    engine.add(EngineRequest("a", prompt, GREEDY))
    answer = list[int]()
    cached = 0
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            answer += output.token_ids
            cached = output.cached_tokens
    assert engine.scheduler.states is not None
    engine.scheduler.states.cache.check_invariants()
    engine.scheduler.pools[0].check_invariants()
    return answer, cached


def close(engine: PrefixStoreEngine) -> None:
    """Wait for what is being written."""
    engine._write_thread.shutdown()


def state_files(engine: PrefixStoreEngine) -> list[Path]:
    size = 32 + engine._state_copier.num_bytes
    return [path for path in engine._store.folder.iterdir() if path.stat().st_size == size]


@pytest.fixture(scope="module")
def folder(hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pages of TOKENS and the states after the second."""
    folder = tmp_path_factory.mktemp("kept") / "prefixes"
    engine = engine_with_store(hybrid, folder)
    for _ in range(2):
        run(engine, TOKENS[: 2 * PAGE_TOKENS + 30])
    close(engine)
    assert (len(list(folder.iterdir())), len(state_files(engine))) == (3, 1)
    return folder


def copied(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir(mode=0o700)
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize(
    ("family", "speculate"),
    [("qwen3.5", 0), ("qwen3.5", "suffix:3"), ("mamba2", 0), ("lfm2", 0)],
)
def test_second_turn_continues_from_states_on_disk_after_a_restart(
    family: str, speculate: int | str, tmp_path: Path
) -> None:
    options = replace(OPTIONS, speculate=speculate)
    model = tmp_path / "model"
    family_oracle(family, model, max_position_embeddings=2048)
    first = TOKENS[: 2 * PAGE_TOKENS + 30]
    engine = engine_with_store(model, tmp_path / "kept", options)
    answer, _ = run(engine, first)
    second = first + answer + TOKENS[1000:1300]
    expected = without_cache(model, second)
    assert run(engine, second) == (expected, (len(first) + len(answer) - 1) // 16 * 16)
    close(engine)

    restarted = engine_with_store(model, tmp_path / "kept", options)
    assert run(restarted, second) == (expected, 2 * PAGE_TOKENS)
    stats = restarted.stats()
    assert (stats.store_hits_total, stats.store_damaged_total) == (2 * PAGE_TOKENS, 0)
    # Now memory has more of it than the files.
    assert run(restarted, second)[1] == (len(second) - 1) // 16 * 16
    assert restarted.stats().store_hits_total == 2 * PAGE_TOKENS


def test_states_after_a_shared_system_prompt_are_stored(hybrid: Path, tmp_path: Path) -> None:
    engine = engine_with_store(hybrid, tmp_path / "kept")
    prompts = [SYSTEM + TOKENS[start : start + 500] for start in (700, 800, 900)]
    for prompt in prompts[:2]:
        run(engine, prompt)
    close(engine)
    restarted = engine_with_store(hybrid, tmp_path / "kept")
    assert run(restarted, prompts[2]) == (without_cache(hybrid, prompts[2]), PAGE_TOKENS)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone before the start", "gone later"])
def test_prefix_without_its_states_is_computed_and_they_are_stored_again(
    hybrid: Path, folder: Path, tmp_path: Path, damage: str
) -> None:
    kept = copied(folder, tmp_path)
    prompt = TOKENS[:700]
    (path,) = state_files(engine_with_store(hybrid, kept))
    right = path.read_bytes()
    if damage == "gone before the start":
        path.unlink()
    engine = engine_with_store(hybrid, kept)
    if damage == "gone later":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(right[:-1])
    elif damage == "flipped":
        middle = len(right) // 2
        path.write_bytes(right[:middle] + bytes([right[middle] ^ 1]) + right[middle + 1 :])
    assert run(engine, prompt) == (without_cache(hybrid, prompt), 0)
    close(engine)
    assert path.read_bytes() == right, "it was computed and stored again"
    stats = engine.stats()
    assert stats.store_damaged_total == (damage in ("flipped", "cut"))
    # Without states, the pages before them are not even read.
    assert stats.store_hits_total == (0 if damage == "gone before the start" else 2 * PAGE_TOKENS)


def test_states_on_disk_wait_for_a_row_in_memory(hybrid: Path, folder: Path) -> None:
    engine = engine_with_store(hybrid, folder)
    assert engine.scheduler.states is not None
    cache = engine.scheduler.states.cache
    prompt = TOKENS[:700]
    engine.scheduler.states.begin_step()
    held = [cache.allocate() for _ in range(cache.num_rows)]
    assert run(engine, prompt) == (without_cache(hybrid, prompt), 0)
    for row in held:
        assert row is not None
        cache.release(row)
    # The pages are in memory by now; only the states are read.
    assert run(engine, prompt)[1] == 2 * PAGE_TOKENS
    assert engine.stats().store_hits_total == 2 * PAGE_TOKENS


def test_prefix_store_must_hold_a_page_and_its_states(hybrid: Path, folder: Path) -> None:
    engine = engine_with_store(hybrid, folder)
    limit = engine._block_copier.num_bytes + engine._state_copier.num_bytes
    engine_with_store(hybrid, folder, limit=limit)
    with pytest.raises(InputError, match="is less than 256 tokens need"):
        engine_with_store(hybrid, folder, limit=limit - 1)


def test_engine_stats_count_states_and_tokens_without_one(hybrid: Path) -> None:
    engine = load_engine(hybrid, OPTIONS)
    assert engine.stats().state_snapshots == 0
    run(engine, SYSTEM + TOKENS[700:798])
    stats = engine.stats()
    assert stats.state_snapshots == 1  # at the end of the prompt
    assert stats.prefix_stateless_total == 0
    # The blocks of the system prompt are cached, but no state is kept after them before this.
    run(engine, SYSTEM + TOKENS[900:998])
    stats = engine.stats()
    assert stats.prefix_stateless_total == len(SYSTEM) // 16 * 16
    assert run(engine, SYSTEM + TOKENS[1100:1198])[1] == len(SYSTEM) // 16 * 16
    more = engine.stats()
    assert more.prefix_stateless_total == stats.prefix_stateless_total
    assert more.state_snapshots == 4
    states = engine.runner.paged_model.kv_caches[0]
    assert isinstance(states, RecurrentState)
    rows, width, channels = states.conv.shape
    bytes_of_layer = 4 * (width * channels + states.state[0].numel())
    assert more.state_snapshot_bytes == 4 * 3 * bytes_of_layer  # three of four layers
    assert more.state_total_snapshots == rows - OPTIONS.max_num_seqs


@pytest.mark.parametrize("has_store", [False, True])
def test_turns_of_conversations_find_nine_tenths_of_the_possible_blocks(
    hybrid: Path, tmp_path: Path, has_store: bool
) -> None:
    if has_store:
        engine: Engine = engine_with_store(hybrid, tmp_path / "kept")
    else:
        engine = load_engine(hybrid, OPTIONS)
    lengths = itertools.cycle((23, 70, 41, 112))  # of what a user adds
    num_found = 0
    num_possible = 0
    for conversation in range(3):
        num_known = 0  # tokens that an earlier request shares
        prompt = SYSTEM + TOKENS[500 + conversation : 600 + conversation]
        for turn in range(6):
            if turn == 0 and conversation:
                num_known = len(SYSTEM)
            answer, cached = run(engine, prompt)
            num_found += cached
            num_possible += num_known // 16 * 16
            num_known = len(prompt) + len(answer) - 1  # the last token was never computed
            start = next(lengths) + 10 * turn + conversation
            prompt = [*prompt, *answer, *TOKENS[start : start + next(lengths)]]
    assert 0.9 * num_possible < num_found <= num_possible
    stats = engine.stats()
    assert stats.prefix_hits_total == num_found
    # Where two conversations part is known when the second arrives: the third finds its state.
    assert stats.prefix_stateless_total == len(SYSTEM) // 16 * 16 - (PAGE_TOKENS * has_store)
