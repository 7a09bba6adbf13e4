"""The prefix cache on disk: found after a restart, private, and never wrong."""

from __future__ import annotations

import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_families import family_oracle
from support.tiny_models import tiny_checkpoint

from llmkit.common.errors import InputError, ShortageError, UsageError
from llmkit.kernels.latent_cache import LatentCache
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.prefix_engine import PrefixStoreEngine
from llmkit.runtime.prefix_folder import PAGE_SUFFIX, files_in, private_folder
from llmkit.runtime.prefix_store import PAGE_TOKENS, PrefixStore
from llmkit.runtime.server.run_server import run_server
from llmkit.runtime.server.serve_options import ServeOptions

MODEL = {"max_position_embeddings": 2048}

LIMIT = 1 << 28
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = [3 + (i * 7 + i * i // 5) % 500 for i in range(3 * PAGE_TOKENS + 40)]
OPTIONS = EngineOptions(device="cpu", kv_cache_memory=1 << 22, max_num_batched_tokens=512)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    return load_engine(model, OPTIONS).generate([PROMPT], GREEDY)[0]


def engine_with_store(
    model: Path, folder: Path, options: EngineOptions = OPTIONS, limit: int = LIMIT
) -> PrefixStoreEngine:
    engine = load_engine(model, options, prefix_store=(str(folder), limit))
    assert isinstance(engine, PrefixStoreEngine)
    return engine


def run(engine: Engine, prompt: list[int], salt: str = "") -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were cached."""
    engine.add(EngineRequest("a", prompt, GREEDY, cache_salt=salt))
    answer = list[int]()
    cached = 0
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            answer = answer + output.token_ids
            cached = output.cached_tokens
    return answer, cached


def close(engine: PrefixStoreEngine) -> None:
    """Wait for what is being written."""
    engine._write_thread.shutdown()


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which PROMPT is kept."""
    folder = tmp_path_factory.mktemp("kept") / "new" / "prefixes"
    engine = engine_with_store(model, folder)
    for _ in range(2):
        run(engine, PROMPT)
    close(engine)
    return folder


def test_prefix_requested_twice_is_there_after_a_restart(
    model: Path, folder: Path, expected: list[int]
) -> None:
    assert len(list(folder.glob("*.kv"))) == 3
    engine = engine_with_store(model, folder)
    assert run(engine, PROMPT) == (expected, 3 * PAGE_TOKENS)
    stats = engine.stats()
    assert (
        stats.store_queries_total,
        stats.store_hits_total,
        stats.store_damaged_total,
    ) == (
        768,
        768,
        0,
    )
    assert run(engine, PROMPT)[1] == len(PROMPT) // 16 * 16, "the second time memory has it"
    engine.scheduler.pools[0].check_invariants()
    assert engine.stats().kv_used_blocks == 0


def test_prefix_requested_once_is_not_written(model: Path, tmp_path: Path) -> None:
    engine = engine_with_store(model, tmp_path / "kept")
    run(engine, PROMPT)
    run(engine, [9, *PROMPT])
    run(engine, PROMPT[: PAGE_TOKENS - 1])
    close(engine)
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("change", [{"salt": "other"}, {"prompt": [PROMPT[0] + 1, *PROMPT[1:]]}])
def test_prefix_store_finds_nothing_for_another_client_or_text(
    model: Path, folder: Path, change: dict[str, object]
) -> None:
    engine = engine_with_store(model, folder)
    prompt: list[int] = change.get("prompt", PROMPT)  # type: ignore[assignment]
    assert run(engine, prompt, str(change.get("salt", "")))[1] == 0
    assert engine.stats().store_hits_total == 0


def test_prefix_store_finds_nothing_for_another_model_of_the_same_shape(
    model: Path, tmp_path: Path, folder: Path
) -> None:
    other = tiny_checkpoint(tmp_path / "b", max_position_embeddings=2048, seed=1)
    assert run(engine_with_store(other, folder), PROMPT)[1] == 0
    assert (
        run(
            engine_with_store(model, folder, EngineOptions(device="cpu", kv_cache_dtype="int8")),
            PROMPT,
        )[1]
        == 0
    )


@pytest.mark.parametrize(
    "more", [{"kv_cache_dtype": "int8"}, {"draft_model": "itself", "speculate": 2}]
)
def test_prefix_store_pages_of_an_8_bit_cache_and_of_a_draft_model(
    model: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    options = replace(
        OPTIONS, **(more | ({"draft_model": str(model)} if "draft_model" in more else {}))
    )
    engine = engine_with_store(model, tmp_path / "kept", options)
    answers = [run(engine, PROMPT)[0] for _ in range(2)]
    close(engine)
    assert run(engine_with_store(model, tmp_path / "kept", options), PROMPT) == (
        answers[0],
        3 * PAGE_TOKENS,
    )
    assert answers[0] == answers[1]


def test_prefix_store_keeps_latents(tmp_path: Path) -> None:
    family_oracle("deepseek-v3", tmp_path / "model", max_position_embeddings=2048)
    prompt = [token % 128 for token in PROMPT]
    engine = engine_with_store(tmp_path / "model", tmp_path / "kept")
    assert isinstance(engine.runner.paged_model.kv_caches[0], LatentCache)
    answers = [run(engine, prompt)[0] for _ in range(2)]
    close(engine)
    restarted = engine_with_store(tmp_path / "model", tmp_path / "kept")
    assert run(restarted, prompt) == (answers[0], 3 * PAGE_TOKENS)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "exchanged", "gone"])
def test_prefix_store_removes_a_damaged_page_and_computes_it(
    model: Path, folder: Path, expected: list[int], damage: str, tmp_path: Path
) -> None:
    copy = private_folder(str(tmp_path / "copy"))
    for path in folder.glob("*.kv"):
        (copy / path.name).write_bytes(path.read_bytes())
    engine = engine_with_store(model, copy)
    keys = [page.key for page in engine._pages(_sequence(engine), len(PROMPT))]
    first, second = (copy / f"{key}.kv" for key in keys[:2])
    data = bytearray(second.read_bytes())
    if damage == "gone":
        second.unlink()
    elif damage == "exchanged":
        second.write_bytes(first.read_bytes())
    else:
        data[len(data) // 2] ^= 1
        second.write_bytes(
            data if damage == "flipped" else data[:-1] if damage == "cut" else data + b"x"
        )
    assert run(engine, PROMPT) == (expected, PAGE_TOKENS)
    assert not second.exists()
    assert engine.stats().store_damaged_total == (damage != "gone")


def _sequence(engine: PrefixStoreEngine) -> object:
    engine.add(EngineRequest("look", PROMPT, GREEDY))
    sequence = engine._awaiting_first_token["look"]
    engine.cancel("look")
    return sequence


def test_requests_waiting_for_pages_delay_no_others_and_can_be_cancelled(
    model: Path, folder: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with_store(model, folder)
    open_ = threading.Event()
    read = engine._store.read
    monkeypatch.setattr(engine._store, "read", lambda *key: open_.wait(30) and read(*key))
    for name in ("gone", "waits", "waits too"):
        engine.add(EngineRequest(name, PROMPT, GREEDY))
    engine.add(EngineRequest("short", PROMPT[:20], GREEDY))
    assert engine.stats().waiting == 4
    stats = [output.request_id for _ in range(20) for output in engine.step()]
    assert stats == ["short"] * 6
    engine.cancel("gone")
    assert engine.stats().waiting == 2
    open_.set()
    answers: dict[str, list[int]] = {"waits": [], "waits too": []}
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id] += output.token_ids
    assert answers == {"waits": expected, "waits too": expected}
    assert engine.stats().store_hits_total == 3 * PAGE_TOKENS, "each page is read once"


def test_pages_that_take_too_long_are_computed(
    model: Path, folder: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.runtime.prefix_engine.PAGE_TIMEOUT_S", 0.05)
    engine = engine_with_store(model, folder)
    never = threading.Event()
    monkeypatch.setattr(engine._store, "read", lambda *key: never.wait(30))
    assert run(engine, PROMPT) == (expected, 0)
    never.set()


def test_pages_are_computed_when_the_kv_cache_is_too_small(
    model: Path, folder: Path, expected: list[int]
) -> None:
    small = EngineOptions(
        device="cpu",
        kv_cache_memory=60 * 16 * 512,
        max_model_len=900,
        kv_cache_dtype="float32",
    )
    engine = engine_with_store(model, folder, small)
    assert engine.config.num_blocks < 64
    assert run(engine, PROMPT)[0] == expected
    for salt in ("b", "c"):
        assert run(engine, PROMPT, salt)[0] == expected
    engine.scheduler.pools[0].check_invariants()


def test_prefix_store_keeps_recent_pages_and_the_begin_of_a_prompt_longest(
    tmp_path: Path,
) -> None:
    page = torch.arange(64, dtype=torch.uint8)
    store = PrefixStore(private_folder(str(tmp_path / "kept")), 3 * 96, b"model")
    old = [store.key(bytes([index])) for index in range(3)]
    new = [store.key(bytes([9, index])) for index in range(2)]
    for index, key in enumerate(old):
        store.write(key, page, 1000 - index)
    assert sum(size for _, size, _ in files_in(store.folder, PAGE_SUFFIX)) == 3 * 96
    assert store.read(old[2], 64, 3000 - 2) is not None
    assert torch.equal(store.read(old[2], 64, 3000 - 2), page)  # type: ignore[arg-type]
    for index, key in enumerate(new):
        store.write(key, page, 2000 - index)
    assert [store.has(key) for key in (*old, *new)] == [False, False, True, True, True]
    assert store.read(old[0], 64, 0) is None
    again = PrefixStore(store.folder, 96, b"model")
    assert [again.has(key) for key in (*old, *new)] == [False, False, True, False, False]
    assert not PrefixStore(store.folder, 96, b"another").has(
        PrefixStore(store.folder, 96, b"another").key(b"x")
    )


def test_prefix_store_files_are_private(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_prefix_folder_that_others_can_read_is_refused(tmp_path: Path, model: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    # Of the group, or of everybody; the right to read, write or pass through is each too much.
    for mode in (0o740, 0o720, 0o710, 0o704, 0o702, 0o701):
        wide.chmod(mode)
        with pytest.raises(InputError, match=f"others may look into .*mode {mode:o}"):
            private_folder(str(wide))
    wide.chmod(0o700)
    assert private_folder(str(wide)) == wide
    wide.chmod(0o755)
    with pytest.raises(InputError, match=r"others may look into .*mode 755.*chmod 700"):
        load_engine(model, OPTIONS, prefix_store=(str(wide), LIMIT))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        private_folder(str(tmp_path / "file"))
    if os.geteuid():
        with pytest.raises(ShortageError):
            private_folder("/proc/none")


def test_prefix_store_is_refused_at_the_start_where_it_cannot_work(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is less than 256 tokens need"):
        engine_with_store(model, tmp_path / "kept", limit=1000)
    off = EngineOptions(prefix_cache=False)
    with pytest.raises(UsageError, match="exclude each other"):
        run_server(ServeOptions(str(model), prefix_cache_dir=tmp_path / "kept", engine=off))
    with pytest.raises(InputError, match="on several ranks"):
        engine_with_store(model, tmp_path / "kept", EngineOptions(device="cpu", tp=2))
    sliding = tiny_checkpoint(tmp_path / "gemma", "gemma2")
    with pytest.raises(InputError, match="sliding windows"):
        engine_with_store(sliding, tmp_path / "kept", EngineOptions(device="cpu"))
