"""Host memory behind the KV cache: hits, answers, copies in order, and the memory plan.

The engine's own code path runs on a CPU, whose tensors are in the place of the device's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_streams import LateCuda
from support.tiny_draft_heads import family_with_mtp
from support.tiny_families import family_oracle
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError, ShortageError
from llmkit.runtime import kv_offload_memory
from llmkit.runtime.engine import host_block_store
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import NO_KV_OFFLOAD, EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.host_block_store import HostBlockStore
from llmkit.runtime.engine.host_cache import HostCache, HostCopies
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.engine_plan import plan_engine
from llmkit.runtime.kv_offload_memory import plan_host_memory, staging_bytes
from llmkit.runtime.memory_plan import MemoryPlan
from llmkit.runtime.parallel import leader
from llmkit.runtime.parallel.leader import LeadEngine
from llmkit.runtime.parallel.rank_messages import Connect
from llmkit.runtime.part_loader import StartupReport, load_part
from llmkit.runtime.prefix_engine import PrefixStoreEngine

CPU = torch.device("cpu")
GPU = torch.device("cuda")
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
OPTIONS = EngineOptions(
    device="cpu",
    kv_cache_memory=1 << 22,
    state_cache_memory=1 << 20,
    max_num_seqs=2,
    max_num_batched_tokens=64,
    max_model_len=128,
)
NUM_PROMPTS = 8
PROMPTS = [[3 + (7 * i + 11 * p + i * i // 5) % 120 for i in range(96)] for p in range(NUM_PROMPTS)]
NUM_BLOCKS = 8 + 2  # of the device: one request


def engine(
    path: Path, num_host_blocks: int, options: EngineOptions = OPTIONS, **config: Any
) -> Engine:
    """An engine whose device holds one prompt, and whose host memory so many blocks."""
    checkpoint = open_checkpoint(path)
    part = load_part(checkpoint, plan_spec(path), options, StartupReport())
    loaded = part.make_engine(StartupReport(), Engine)
    sizes = {"num_blocks": NUM_BLOCKS, "num_state_snapshots": 3, **config}
    chosen = replace(
        loaded.config, **sizes, num_host_blocks=num_host_blocks, num_host_states=num_host_blocks
    )
    return Engine(part.model, chosen, draft=part.draft)


def plan_spec(path: Path) -> Any:
    from llmkit.model.families import checkpoint_spec

    return checkpoint_spec(open_checkpoint(path))


def run(engine: Engine, prompt: list[int], salt: str = "") -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were cached."""
    engine.add(EngineRequest("a", prompt, GREEDY, cache_salt=salt))
    answer: list[int] = []
    cached = 0
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            answer += output.token_ids
            cached = output.cached_tokens
    for pool in engine.scheduler.pools:
        pool.check_invariants()
    return answer, cached


FAMILIES = {
    "full attention": ("qwen2", {}, {}),
    "sliding windows": ("gemma2", {"sliding_window": 40}, {}),
    "int8 cache": ("qwen2", {}, {"kv_cache_dtype": "int8"}),
    "fp8 cache": ("qwen2", {}, {"kv_cache_dtype": "fp8"}),
    "speculation": ("qwen2", {}, {"speculate": 3}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_kv_offload_finds_evicted_prefixes_and_gives_the_same_answers(
    name: str, tmp_path: Path
) -> None:
    architecture, sizes, changes = FAMILIES[name]
    path = tiny_checkpoint(tmp_path / "model", architecture, **sizes)
    options = replace(OPTIONS, **changes)
    without = engine(path, 0, options)
    expected = [run(without, prompt)[0] for prompt in PROMPTS]
    with_host = engine(path, 100, options)
    for _ in range(2):
        found = [run(with_host, prompt) for prompt in PROMPTS]
        assert [answer for answer, _ in found] == expected
    # Everything but the last prompt token's block was cached: in host memory, as the device holds
    # one prompt.
    assert [cached for _, cached in found] == [80] * NUM_PROMPTS
    stats = with_host.stats()
    assert stats.host_hits_total == stats.prefix_hits_total == 80 * NUM_PROMPTS
    # A second eviction copies nothing: host memory has the block.
    num_pools = len(with_host.scheduler.pools)
    assert stats.host_loads_total >= NUM_PROMPTS * 3
    assert stats.host_saves_total <= num_pools * NUM_PROMPTS * 7
    stores = with_host.runner.host_stores
    assert stats.host_loaded_bytes_total == sum(store.loaded_bytes for store in stores)
    assert stats.host_loaded_bytes_total > 0
    assert without.stats().host_total_blocks == 0


@pytest.mark.parametrize("family", ["qwen3.5", "mamba2", "deepseek-v3"])
def test_kv_offload_keeps_recurrent_states_and_latents(family: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    family_oracle(family, path)
    without = engine(path, 0, enable_prefix_caching=False)
    expected = [run(without, prompt)[0] for prompt in PROMPTS]
    with_host = engine(path, 60)
    for _ in range(2):
        found = [run(with_host, prompt) for prompt in PROMPTS]
        assert [answer for answer, _ in found] == expected
    assert [cached for _, cached in found] == [80] * NUM_PROMPTS
    assert with_host.stats().host_hits_total > 0


def test_kv_offload_keeps_the_cache_of_a_draft_head(tmp_path: Path) -> None:
    path = tmp_path / "model"
    family_with_mtp("qwen3.5", path)
    options = replace(OPTIONS, speculate="mtp:2")
    expected = [run(engine(path, 0, options), prompt)[0] for prompt in PROMPTS[:3]]
    with_host = engine(path, 60, options)
    for _ in range(2):
        found = [run(with_host, prompt) for prompt in PROMPTS[:3]]
        assert [answer for answer, _ in found] == expected
    assert with_host.stats().host_hits_total > 0
    store = with_host.runner.host_stores[0]
    own = sum(t[:, :1].nbytes for t in with_host.runner.paged_model.block_tensors(0))
    assert store.bytes_per_row > own, "the head's keys and values are with the model's"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("offload") / "model", "qwen2")


def test_kv_offload_on_two_ranks_gives_the_same_answers(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks are processes; the leader tells them sizes that a CPU's plan never has."""

    def sizes(**planned: Any) -> Connect:
        return Connect(**{**planned, "num_blocks": NUM_BLOCKS, "num_host_blocks": 100})

    without = engine(model, 0)
    expected = [run(without, prompt)[0] for prompt in PROMPTS]
    monkeypatch.setattr(leader, "Connect", sizes)
    ranks = load_engine(model, replace(OPTIONS, tp=2))
    assert isinstance(ranks, LeadEngine)
    try:
        for _ in range(2):
            found = [run(ranks, prompt) for prompt in PROMPTS]
            assert [answer for answer, _ in found] == expected
        assert [cached for _, cached in found] == [80] * NUM_PROMPTS
        stats = ranks.stats()
        assert stats.host_hits_total == 80 * NUM_PROMPTS
        assert stats.host_loads_total >= NUM_PROMPTS * 3
        ranks.sleep()
        ranks.wake_up()
        assert run(ranks, PROMPTS[0]) == (expected[0], 0), "host memory is empty after a sleep"
        run(ranks, PROMPTS[1])
        assert run(ranks, PROMPTS[0]) == (expected[0], 80)
        assert ranks.stats().host_hits_total > stats.host_hits_total
    finally:
        ranks.close()


def test_kv_offload_never_shares_between_salts(model: Path) -> None:
    with_host = engine(model, 100)
    for prompt in PROMPTS[:3]:
        run(with_host, prompt, salt="one")
    assert run(with_host, PROMPTS[0], salt="other")[1] == 0
    assert run(with_host, PROMPTS[0], salt="one")[1] == 80
    assert with_host.stats().host_hits_total == 80


def test_kv_offload_keeps_the_least_recently_used_blocks_out(model: Path) -> None:
    with_host = engine(model, 12)  # two prompts
    for prompt in PROMPTS[:5]:
        run(with_host, prompt)
    assert run(with_host, PROMPTS[0])[1] == 0
    assert run(with_host, PROMPTS[4])[1] > 0
    assert with_host.stats().host_used_blocks == with_host.stats().host_total_blocks == 12


def test_kv_offload_of_preempted_requests_gives_the_same_answers(model: Path) -> None:
    params = replace(GREEDY, max_tokens=60)
    prompts = [prompt[:40] for prompt in PROMPTS[:6]]
    roomy = engine(model, 0, replace(OPTIONS, max_num_seqs=4), num_blocks=60)
    expected = roomy.generate(prompts, params)
    with_host = engine(model, 50, replace(OPTIONS, max_num_seqs=4), num_blocks=12)
    assert with_host.generate(prompts, params) == expected
    stats = with_host.stats()
    assert stats.preemptions_total > 0
    assert stats.host_loads_total > 0, "what a preempted request had computed was loaded again"


def test_kv_offload_forgets_blocks_of_a_failed_request(model: Path) -> None:
    with_host = engine(model, 100)
    run(with_host, PROMPTS[0])
    run(with_host, PROMPTS[1])
    assert run(with_host, PROMPTS[0])[1] == 80  # in host memory, and on the device again
    with_host.model.final_norm[:] = float("nan")
    with_host.add(EngineRequest("bad", PROMPTS[0], GREEDY))
    errors = [output.error for _ in range(4) for output in with_host.step() if output.error]
    assert errors == ["the model's logits were not finite"]
    hashes = _hashes(PROMPTS[0])
    host = with_host.scheduler.pools[0].host
    assert host is not None
    assert not any(map(host.has, hashes))


def _hashes(prompt: list[int]) -> list[bytes]:
    from llmkit.runtime.engine.sequence import Sequence

    return Sequence(EngineRequest("a", prompt, GREEDY), seed=0).block_hashes(6, 16)


def test_kv_offload_works_with_the_prefix_store(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", "qwen2", max_position_embeddings=1024)
    options = replace(OPTIONS, max_model_len=600)
    checkpoint = open_checkpoint(path)
    part = load_part(checkpoint, plan_spec(path), options, StartupReport())
    loaded = part.make_engine(StartupReport(), Engine)
    prompts = [[3 + (7 * i + 13 * p) % 120 for i in range(530)] for p in range(3)]
    expected = [run(loaded, prompt)[0] for prompt in prompts]
    config = replace(loaded.config, num_blocks=40, num_host_blocks=20)
    folder = tmp_path / "pages"
    folder.mkdir(mode=0o700)
    for _ in range(2):  # the second engine reads what the first one wrote
        tiered = PrefixStoreEngine(part.model, config)
        tiered.open_store(folder, 1 << 28, [checkpoint])
        for _ in range(2):
            assert [run(tiered, prompt)[0] for prompt in prompts] == expected
        tiered._write_thread.shutdown()
    stats = tiered.stats()
    assert stats.store_hits_total > 0
    assert stats.host_saves_total > 0


# Decisions


def test_host_cache_keeps_what_is_loaded_until_the_copies_are_made() -> None:
    cache = HostCache(2)
    cache.save(b"a", 0)
    cache.save(b"b", 1)
    assert cache.take_copies() == HostCopies(saves=[(0, 1), (1, 0)])
    cache.lock([b"a", b"b", b"not there"])
    cache.save(b"c", 2)
    assert not cache.has(b"c"), "all rows are being loaded"
    cache.load(b"a", 7)
    assert cache.take_copies() == HostCopies(loads=[(1, 7)])
    cache.save(b"c", 2)  # the tail of a loaded prefix goes before its head
    assert (cache.has(b"a"), cache.has(b"b"), cache.has(b"c")) == (True, False, True)
    cache.save(b"c", 5)
    assert cache.take_copies() == HostCopies(saves=[(2, 0)]), "it is there already"
    cache.remove(b"a")
    cache.check_invariants()
    cache.clear()
    assert cache.num_used_rows == 0
    cache.check_invariants()


# Copies


def tensors() -> list[torch.Tensor]:
    """Caches of 20 rows: of 16-bit keys, scales, and one whose rows are no whole words."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(4, 20, 4, 3, generator=generator).to(torch.float16),
        torch.randn(2, 20, 4, 1, generator=generator),
        torch.randint(0, 255, (1, 20, 3), generator=generator, dtype=torch.uint8),
        torch.empty(0, 20, 3),
    ]


@pytest.mark.parametrize("cuda", [None, LateCuda])
@pytest.mark.parametrize("staging", [1, 300, 1 << 20])
def test_host_block_store_gives_back_what_it_saved(
    cuda: Any, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_block_store, "STAGING_BYTES", staging)
    monkeypatch.setattr(host_block_store, "PINNED_PIECE_BYTES", 400)
    device = tensors()
    store = HostBlockStore(device, 9, CPU, cuda() if cuda else torch.cuda)
    original = [tensor.clone() for tensor in device]
    saves = [(3, 0), (4, 1), (5, 2), (9, 8), (19, 7), (6, 0)]
    store.copy(HostCopies(saves=saves))
    for tensor in device:  # the next step overwrites what was saved at once
        tensor.zero_()
    loads = [(0, 10), (1, 11), (2, 12), (8, 0), (7, 1)]
    store.copy(HostCopies(loads=loads))
    expected = {10: 6, 11: 4, 12: 5, 0: 9, 1: 19}
    for tensor, before in zip(device, original, strict=True):
        for row in range(20) if tensor.numel() else ():
            content = torch.zeros_like(before[:, 0])
            if row in expected:
                content = before[:, expected[row]]
            assert torch.equal(tensor[:, row], content), row
    assert store.saved_bytes == len(saves) * store.bytes_per_row
    assert store.loaded_bytes == len(loads) * store.bytes_per_row


def test_host_block_store_saves_beside_the_steps_and_loads_before_them() -> None:
    cuda = LateCuda()
    store = HostBlockStore(tensors(), 9, CPU, cuda)
    store.copy(HostCopies(saves=[(3, 0), (4, 1)]))
    assert cuda.log == ["copy"], "one piece, which no step waits for"
    store.copy(HostCopies(loads=[(0, 5)]))
    assert cuda.log == ["copy", "copy", "copied", "copied"], "the load waits for the save"
    store.copy(HostCopies(saves=[(5, 3)]))
    store.copy(HostCopies(saves=[(6, 4)]))
    assert cuda.log[4:] == ["copy", "copy"], "there are two buffers"
    store.copy(HostCopies(saves=[(7, 5)]))
    assert cuda.log[-2:] == ["copied", "copy"], "a buffer is filled when its last copy is done"


# The plan


def test_memory_plan_shows_host_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = MemoryPlan(
        free_bytes=1 << 34,
        weight_bytes=0,
        workspace_bytes=0,
        num_blocks=100,
        bytes_per_block=1 << 16,
        block_size=16,
        max_model_len=1024,
        model_limit=1024,
    )
    options = replace(OPTIONS, kv_offload=1 << 24)
    host = plan_host_memory(plan, GPU, options, num_ranks=2)
    assert (host.num_blocks, host.num_states, host.num_bytes) == (128, 0, 1 << 23)
    hybrid = replace(plan, bytes_per_state=1 << 18, num_state_snapshots=25)
    host = plan_host_memory(hybrid, GPU, options, num_ranks=1)
    assert (host.num_blocks, host.num_states) == (128, 32)  # divided as on the device
    spec = plan_spec(model)
    assert staging_bytes(spec, GPU, options) == 2 << 24
    assert staging_bytes(spec, CPU, options) == staging_bytes(spec, GPU, OPTIONS) == 0

    with pytest.raises(InputError, match="too small") as error:
        plan_host_memory(hybrid, GPU, replace(options, kv_offload=1 << 17), num_ranks=1)
    least = int(error.value.expected.split()[2])
    assert plan_host_memory(hybrid, GPU, replace(options, kv_offload=least), num_ranks=1).num_blocks
    with pytest.raises(InputError, match="--no-prefix-cache caches none"):
        plan_host_memory(plan, GPU, replace(options, prefix_cache=False), num_ranks=1)
    monkeypatch.setattr(kv_offload_memory, "free_bytes", lambda *_: 1 << 20)
    with pytest.raises(ShortageError, match="of host memory"):
        plan_host_memory(plan, GPU, options, num_ranks=1)


def test_kv_offload_says_that_a_cpu_has_no_use_for_it(model: Path) -> None:
    options = replace(OPTIONS, kv_offload=1 << 30)
    checkpoint = open_checkpoint(model)
    assert plan_engine(checkpoint, options).as_dict()["kv_offload_bytes"] == 0
    assert "kv_offload_bytes" not in plan_engine(checkpoint, OPTIONS).as_dict()
    report = StartupReport()
    part = load_part(checkpoint, plan_spec(model), options, report)
    loaded = part.make_engine(report, Engine)
    assert f"KV cache in host memory: {NO_KV_OFFLOAD}" in report.fast_paths
    assert loaded.config.num_host_blocks == 0 and not loaded.runner.host_stores
