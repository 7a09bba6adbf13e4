"""One model on several ranks, a process each: the same tokens as on one, and clean ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import torch
from support.server_process import serving
from support.tiny_adapters import write_adapter
from support.tiny_families import COMMON, FAMILIES, family_oracle
from support.tiny_models import tiny_checkpoint
from support.tiny_wrappers import WRAPPERS, save_wrapper, tiny_wrapper

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import InputError, LlmkitError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.families import checkpoint_spec, model_spec
from llmkit.model.parallel_group import rank_spec
from llmkit.model.parameter_table import parameters
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.runtime.engine.cpu_graphs import CpuGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.parallel import distributed_group
from llmkit.runtime.parallel.leader import LeadEngine
from llmkit.runtime.parallel.rank_messages import RunStep
from llmkit.runtime.part_loader import StartupReport
from llmkit.shard.shard_checkpoint import shard

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(
    temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, seed=5, max_tokens=12, ignore_eos=True
)
SAMPLING = [GREEDY, GREEDY, DRAWN, GREEDY, DRAWN]
BLOCK = (
    2 * 2 * 16 * 4 * 16
)  # bytes of a rank of two: k and v, its layers and KV heads, head_dim, float32, tokens
LAYOUTS = {"TP 2": (2, 1), "PP 2": (1, 2), "TP 2 x PP 2": (2, 2)}
# Families that `make test` runs as TP 2 x PP 2, one for each kind of layer that ranks divide.
QUICK_FAMILIES = (
    "llama",
    "gemma3",
    "mixtral",
    "gpt-oss",
    "deepseek-v3",
    "qwen3-next",
    "mamba2",
    "wrapper of gemma3",
)
WRAPPER_NAMES = tuple(f"wrapper of {name}" for name in WRAPPERS)


def save_model(name: str, path: Path) -> Path:
    """Save the tiny model of a family, or of a wrapper with the names of the hub's files."""
    if name in WRAPPER_NAMES:
        return save_wrapper(tiny_wrapper(name.removeprefix("wrapper of ")), path, hub_names=True)
    family_oracle(name, path)
    return path


def family_layouts() -> Iterator[Any]:
    """All families in all layouts. `make test` runs some families, and one in every layout."""
    for name in (*FAMILIES, *WRAPPER_NAMES):
        for layout in LAYOUTS:
            quick = name == "llama" or (name in QUICK_FAMILIES and layout == "TP 2 x PP 2")
            marks = () if quick else pytest.mark.slow
            yield pytest.param(name, layout, marks=marks, id=f"{name}-{layout}")


def prompts(vocab: int = COMMON["vocab_size"]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in (1, 9, 30, 44, 5)]


@contextlib.contextmanager
def engine(model: Path, start: StartupReport | None = None, **options: Any) -> Iterator[Engine]:
    """An engine whose other ranks are gone afterwards."""
    # Ranks sum in another order. Rounding to bfloat16 would make other tokens of some differences.
    chosen: dict[str, Any] = {
        "device": "cpu",
        "kv_cache_memory": 1 << 20,
        "kv_cache_dtype": "float32",
    } | options
    running = load_engine(model, EngineOptions(**chosen), start)
    try:
        yield running
    finally:
        if isinstance(running, LeadEngine):
            running.close()


def to_the_end(running: Engine) -> None:
    while running.has_work:
        running.step()


def answers(model: Path, **options: Any) -> list[list[int]]:
    with engine(model, **options) as running:
        vocab = running.model.spec.full_model.vocab_size
        return running.generate(prompts(vocab), SAMPLING)


@pytest.fixture(scope="module")
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]]]:
    path = save_model(request.param, tmp_path_factory.mktemp("family"))
    return path, answers(path)


@pytest.mark.parametrize(("family", "layout"), family_layouts(), indirect=["family"])
def test_ranks_answer_as_one_rank_for_every_family(
    family: tuple[Path, list[list[int]]], layout: str, tmp_path: Path
) -> None:
    path, expected = family
    tp, pp = LAYOUTS[layout]
    if (tp, pp) == (2, 2):
        # Each rank reads its own file. In the other layouts all slice the whole checkpoint.
        shard(path, tmp_path / "out", tp, pp)
        assert answers(tmp_path / "out") == expected
    else:
        assert answers(path, tp=tp, pp=pp) == expected


def families_with_experts() -> Iterator[Any]:
    """All families with experts; `make test` runs two of them."""
    names = {"num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"}
    for name, (_, differences) in FAMILIES.items():
        if names & differences.keys():
            quick = name in ("glm4-moe", "gpt-oss")
            yield pytest.param(name, marks=() if quick else pytest.mark.slow)
    yield pytest.param("wrapper of qwen3-vl-moe", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", families_with_experts())
def test_ranks_divide_experts(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path / "model")
    expected = answers(tmp_path / "model")
    assert answers(tmp_path / "model", tp=2, ep=2) == expected
    spec = checkpoint_spec(open_checkpoint(tmp_path / "model"))
    assert spec.moe is not None
    if spec.moe.expert_stack is not None:
        return  # one tensor of all experts is split over groups or over ranks, not over both
    shard(tmp_path / "model", tmp_path / "out", 4, ep=2)
    assert answers(tmp_path / "out") == expected, (
        "four ranks, two for each half of the experts, two for each KV head"
    )


MODES: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 9},
    "preempted": {"kv_cache_memory": 9 * BLOCK, "max_model_len": 96},
    "speculative": {"speculate": 3},
    "one at a time": {"max_num_seqs": 1},
}


def modes_of_layouts() -> Iterator[Any]:
    """Every mode in both layouts. `make test` runs each mode in one of them."""
    quick = {("tp", "chunked"), ("tp", "speculative"), ("pp", "preempted"), ("pp", "one at a time")}
    for size in ("tp", "pp"):
        for mode in MODES:
            marks = () if (size, mode) in quick else pytest.mark.slow
            yield pytest.param({size: 2}, mode, marks=marks, id=f"{size.upper()} 2-{mode}")


@pytest.mark.parametrize(("layout", "mode"), modes_of_layouts())
def test_ranks_answer_the_same_in_every_mode(
    layout: dict[str, int], mode: str, tmp_path: Path
) -> None:
    model = tiny_checkpoint(
        tmp_path / "model", vocab_size=500, tie_word_embeddings=True
    )  # no multiple of 2 x 64
    expected = answers(model)
    with engine(model, **layout, **MODES[mode]) as running:
        for _ in range(2):  # the second time from the prefix cache
            assert running.generate(prompts(500), SAMPLING) == expected
        assert running.stats().prefix_hits_total > 0
        assert all(pool.num_used_blocks == 0 for pool in running.scheduler.pools)
        assert mode != "preempted" or running.stats().preemptions_total > 0


@pytest.mark.parametrize("shares_memory", [True, False], ids=["shared memory", "gloo"])
def test_ranks_of_a_stage_reduce_through_shared_memory(
    shares_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then their decode steps are recorded. Without it, gloo gives the same answers."""
    model = tiny_checkpoint(tmp_path / "model")
    expected = answers(model)
    if not shares_memory:
        monkeypatch.setattr(distributed_group, "can_share_memory", lambda: False)
    with engine(model, tp=2) as running:
        vocab = running.model.spec.full_model.vocab_size
        assert running.generate(prompts(vocab), SAMPLING) == expected
        has_kernels = cpu_kernels.library is not None
        group = running.model.parallel_group
        assert group.reduces_in_kernels == (shares_memory and has_kernels)
        graph_runner = running.runner.graph_runner
        assert isinstance(graph_runner, CpuGraphRunner)
        assert bool(graph_runner.num_graphs) == (shares_memory and has_kernels)


class RecordingRank:
    """Another rank that only notes what it is sent."""

    index = 1

    def __init__(self) -> None:
        self.socket, self._peer = socket.socketpair()
        self.sent: list[RunStep] = []

    @property
    def channel(self) -> RecordingRank:
        return self

    def send(self, message: RunStep) -> None:
        self.sent.append(message)

    def close(self) -> None:
        self._peer.close()
        self.socket.close()

    def end(self) -> None:
        self.close()


def test_leader_sends_requests_and_cancels_with_the_next_step(tmp_path: Path) -> None:
    """In order, once, and with a seed: ranks that drew different tokens would part."""
    loaded = load_engine(tiny_checkpoint(tmp_path / "model"), EngineOptions(device="cpu"))
    lead = LeadEngine(loaded.model, loaded.config)
    rank = RecordingRank()
    group = SimpleNamespace(disconnect=lambda: None, stop=lambda: None)
    lead.attach_ranks([rank], group)  # type: ignore[arg-type, list-item]
    unseeded = replace(GREEDY, seed=None, max_tokens=200)
    lead.add(EngineRequest("a", [5, 6], unseeded))
    lead.add(EngineRequest("b", [7, 8], unseeded))
    lead.step()
    lead.cancel("a")
    lead.add(EngineRequest("c", [9], GREEDY))
    lead.step()
    lead.step()
    lead.close()
    first, second, third = (
        [event if isinstance(event, str) else f"+{event.request_id}" for event in message.events]
        for message in rank.sent
    )
    assert (first, second, third) == (["+a", "+b"], ["a", "+c"], [])
    seeds = [event.sampling_params.seed for event in rank.sent[0].events]
    assert None not in seeds and len(set(seeds)) == 2


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["TP 2", "PP 2"])
def test_ranks_drop_a_cancelled_request_together(layout: dict[str, int], tmp_path: Path) -> None:
    """Ranks that disagree on a step's tokens would break the others' collective operations."""
    model = tiny_checkpoint(tmp_path / "model")
    with engine(model) as alone:
        (expected,) = alone.generate([[7, 8, 9]], GREEDY)
    with engine(model, **layout) as running:
        running.add(EngineRequest("cancelled", [5, 6], replace(GREEDY, max_tokens=200)))
        for _ in range(4):
            running.step()
        running.cancel("cancelled")
        running.add(EngineRequest("kept", [7, 8, 9], GREEDY))
        found = []
        while running.has_work:
            for output in running.step():
                assert output.request_id == "kept"
                found += output.token_ids
        assert found == expected
        assert all(pool.num_used_blocks == 0 for pool in running.scheduler.pools)


@pytest.mark.parametrize(
    "vocab_size",
    [
        pytest.param(130, id="half of rank 1 is padding", marks=pytest.mark.slow),
        pytest.param(60, id="all of rank 1 is padding"),
    ],
)
def test_ranks_never_draw_padding_of_the_vocabulary(vocab_size: int, tmp_path: Path) -> None:
    """Its logits would be 0: as probable as any token for this model and temperature."""
    model = tiny_checkpoint(tmp_path / "model", vocab_size=vocab_size)
    hot = [
        SamplingParams(temperature=50.0, seed=seed, max_tokens=16, ignore_eos=True)
        for seed in range(4)
    ]
    asked = [[3, 4, 5 + index] for index in range(4)]
    with engine(model) as alone:
        expected = alone.generate(asked, hot)
    assert max(map(max, expected)) >= 0.9 * vocab_size, "the last tokens are drawn as well"
    with engine(model, tp=2) as running:
        assert running.generate(asked, hot) == expected


@pytest.mark.parametrize(
    "pp_layers", [pytest.param((2, 1), marks=pytest.mark.slow), (1, 2)], ids=str
)
def test_ranks_use_the_least_blocks_and_length_of_any(
    pp_layers: tuple[int, int], tmp_path: Path
) -> None:
    """The stage with two layers has half as many blocks in the same memory as the other one."""
    model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=3, max_position_embeddings=4096)
    shard(model, tmp_path / "out", 1, 2, pp_layers=pp_layers)
    block = 2 * 2 * 2 * 16 * 4 * 16  # k and v, two layers, KV heads, head_dim, float32, tokens
    with engine(tmp_path / "out", kv_cache_memory=40 * block) as running:
        assert running.config.num_blocks == 40
        assert running.config.max_model_len == 640
        (answer,) = running.generate([[5] * 620], replace(GREEDY, max_tokens=20))
        assert len(answer) == 20


def test_pipeline_stages_work_on_different_steps(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=4)
    with engine(model, pp=4) as running:
        for index in range(8):
            running.add(EngineRequest(str(index), [5, 6, 7 + index], GREEDY))
        under_way = []
        while running.has_work:
            running.step()
            flights = [
                {request.sequence.request.request_id for request in flight.step.requests}
                for flight in running.in_flight_steps
            ]
            assert sum(map(len, flights)) == len(set().union(*flights)), (
                "a sequence is in one step at a time"
            )
            under_way.append(len(flights))
        assert max(under_way) == 3, "and the last stage's, which is done"


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", {"tp": 2, "pp": 2}),
        pytest.param("qwen3_moe", {"tp": 4, "ep": 2}, marks=pytest.mark.slow),
    ],
)
def test_ranks_load_adapters(family: str, layout: dict[str, int], tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", family)
    adapter = str(write_adapter(model, tmp_path / "adapter", lora_alpha=32))
    requests = [
        EngineRequest(str(i), prompt, GREEDY, adapter=["it", None][i % 2])
        for i, prompt in enumerate(prompts(500))
    ]

    def run(**chosen: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {request.request_id: [] for request in requests}
        with engine(model, adapters={"it": adapter}, **chosen) as running:
            for request in requests:
                running.add(request)
            while running.has_work:
                for output in running.step():
                    found[output.request_id] += output.token_ids
        return found

    expected = run()
    assert expected["0"] != answers(model)[0]
    assert run(**layout) == expected


QUANTIZED_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "nemotron_h": {
        "head_dim": 32,
        "hybrid_override_pattern": "M*E-",
        "mamba_num_heads": 16,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 128,
        "moe_shared_expert_intermediate_size": 128,
    },
    "lfm2": {
        "head_dim": 32,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
}


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        pytest.param(
            name, method, marks=() if (name, method) == ("llama", "gptq") else pytest.mark.slow
        )
        for name in QUANTIZED_SIZES
        for method in ("gptq", "awq", "int8")
    ],
)
def test_ranks_load_quantized_parts(architecture: str, method: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(
        tmp_path / "source",
        architecture,
        hidden_size=128,
        intermediate_size=256,
        **QUANTIZED_SIZES[architecture],
    )
    size = None if method == "int8" else 64
    options = QuantizeOptions(
        method, group_size=size, samples=2, seq_len=32, evaluate=False, device="cpu"
    )
    quantize(source, tmp_path / "model", options, SilentProgress())
    expected = answers(tmp_path / "model")
    assert answers(tmp_path / "model", tp=2) == expected
    shard(tmp_path / "model", tmp_path / "out", 2, 2)
    assert answers(tmp_path / "out") == expected


def test_ranks_read_their_own_files(tmp_path: Path) -> None:
    shard(tiny_checkpoint(tmp_path / "model"), tmp_path / "out", 2)
    start = StartupReport()
    with engine(tmp_path / "out", start):
        reported = [line for line in start.fast_paths if line.startswith("rank ")]
    assert [line.split(",")[0] for line in reported] == [
        f"rank {i}: rank-pp0-tp{i}.safetensors" for i in range(2)
    ]
    (tmp_path / "out" / "rank-pp0-tp1.safetensors").chmod(0)
    if os.geteuid():  # root may read it all the same
        with pytest.raises(InputError, match="rank 1"):
            load_engine(tmp_path / "out", EngineOptions(device="cpu"))


def test_ranks_detect_a_flipped_bit_in_a_file(tmp_path: Path) -> None:
    shard(tiny_checkpoint(tmp_path / "model"), tmp_path / "out", 2)
    file = tmp_path / "out" / "rank-pp0-tp1.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"rank 1: .*SHA-256"):
        load_engine(tmp_path / "out", EngineOptions(device="cpu"))
    assert not psutil.Process().children()


def test_parallel_sizes_that_are_impossible_are_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    shard(model, tmp_path / "out", 2)
    with pytest.raises(UsageError, match="is sharded for TP 2, PP 1, EP 1"):
        load_engine(tmp_path / "out", EngineOptions(device="cpu", tp=4))
    with pytest.raises(InputError, match=r"4/3 = 1\.333 heads"):
        load_engine(model, EngineOptions(device="cpu", tp=3))
    with pytest.raises(InputError, match="--draft-model on 2 ranks"):
        load_engine(model, EngineOptions(device="cpu", tp=2, draft_model=str(model)))


def test_parameter_tables_of_all_ranks_cover_the_whole_table() -> None:
    whole = model_spec(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **COMMON, "rope_theta": 1e4}
    )
    rows = [
        {row.name for row in parameters(rank_spec(whole, 0, 2, 1, span))}
        for span in ((0, 1), (1, 4))
    ]
    first = {row.sources[0].name for row in parameters(rank_spec(whole, 0, 2, 1, (1, 4)))}
    assert "embed.weight" in rows[0] and "norm.weight" not in rows[0]
    assert "embed.weight" not in rows[1] and {"norm.weight", "lm_head.weight"} <= rows[1]
    assert (
        "model.layers.1.self_attn.q_proj.weight" in first
        and "model.layers.0.self_attn.q_proj.weight" not in first
    )


def test_rank_that_dies_ends_the_engine_with_its_reason(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    with engine(model, tp=2) as running:
        heard: list[LlmkitError] = []
        running.on_death(heard.append)
        running.add(
            EngineRequest(
                "a", [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
            )
        )
        running.step()
        (child,) = psutil.Process().children()
        child.kill()
        with pytest.raises(LlmkitError, match=r"rank 1 ended \(signal SIGKILL"):
            to_the_end(running)
        assert [str(error) for error in heard] == [str(heard[0])] and "SIGKILL" in str(heard[0])
    assert not psutil.Process().children()


def test_ranks_end_with_the_first(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    code = (
        "import sys, time\n"
        "from llmkit.runtime.engine.engine_options import EngineOptions\n"
        "from llmkit.runtime.engine_loader import load_engine\n"
        f"engine = load_engine({str(model)!r}, EngineOptions(device='cpu', tp=2, pp=2))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as lead:
        assert lead.stdout is not None and lead.stdout.readline() == "ready\n"
        others = psutil.Process(lead.pid).children()
        assert len(others) == 3
        lead.kill()
    _, alive = psutil.wait_procs(others, timeout=60)
    assert not alive


def test_server_on_ranks_answers_and_ends_cleanly(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    with engine(model) as alone:
        (expected,) = alone.generate([[5, 9, 11]], GREEDY)
    shard(model, tmp_path / "out", 2, 2)
    body = {"prompt": [5, 9, 11], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    log = tmp_path / "log"
    with serving(log, tmp_path / "out", max_model_len=128) as server, server.client() as client:
        answer = client.post("/v1/completions", json={"model": "out", **body}).json()
        assert answer["choices"][0]["text"] == load_tokenizer(open_checkpoint(model)).decode(
            expected
        )
        # In the order of their ranks. Process numbers start again at the bottom some day.
        ranks = sorted(server.engine().children(), key=lambda rank: (rank.create_time(), rank.pid))
        assert len(ranks) == 3
        ranks[1].send_signal(signal.SIGKILL)
        assert server.process.wait(60) == 70
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and any(rank.is_running() for rank in ranks):
            time.sleep(0.1)
        assert not any(rank.is_running() for rank in ranks)
        with pytest.raises(httpx.HTTPError):
            client.get("/health")
    said = [line for line in log.read_text().splitlines() if "error:" in line]
    assert said and "rank 2 ended (signal SIGKILL" in said[-1]
    assert "Traceback" not in log.read_text()
