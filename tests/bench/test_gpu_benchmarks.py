"""The GPU benchmarks on a CPU with small shapes: what they count, and that every case runs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmkit.bench.gpu import baselines
from llmkit.bench.gpu import kernel_times as kernels
from llmkit.bench.gpu.decode_steps import STEP_MODELS, StepBench, StepModel
from llmkit.bench.gpu.figure_log import NotInstalledError, Record, latest
from llmkit.bench.gpu.floors import H200, step_cost
from llmkit.bench.gpu.gpu_tests import note_result
from llmkit.bench.gpu.graph_profile import host_times
from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS, tiny_config
from llmkit.bench.gpu.serving_times import loads, percentile
from llmkit.bench.gpu.timing import kernel_ms
from llmkit.kernels import w8a8_linear
from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.input_quant import InputQuant, QuantizedInput
from llmkit.kernels.w8a8_linear import W8A8Linear
from llmkit.model.families import model_spec

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
# Dependencies that a GPU machine may lack: it has torch, Triton, transformers and what they need.
ABSENT = (
    "datasets",
    "fastapi",
    "gguf",
    "httptools",
    "llguidance",
    "llmkit_is_not_installed",
    "msgspec",
    "pydantic",
    "starlette",
    "uvicorn",
)
MEASURED_PARTS = (
    "ceilings",
    "steps",
    "profile",
    "kernels",
    "saturate",
    "graphs",
    "serving",
    "tune",
    "quantized",
)
RUN_WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocker())
import pathlib, torch
import llmkit.bench.gpu.baselines, llmkit.bench.gpu.gpu_page, llmkit.bench.gpu.quantize_time
from llmkit.bench.gpu.figure_log import PartOptions
from llmkit.bench.gpu.run_parts import COMPLETE, PARTS, measure_part
options = PartOptions(torch.device("cpu"), pathlib.Path({results!r}), is_tiny=True)
for name in {parts!r}:
    assert measure_part(PARTS[name], options, 100, "run") == COMPLETE, name
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[str, str], Record]]:
    """The figures of every part that needs no GPU, measured without the packages of ABSENT."""
    results = tmp_path_factory.mktemp("results")
    code = RUN_WITHOUT.format(absent=ABSENT, results=str(results), parts=MEASURED_PARTS)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=280, cwd=ROOT / "tests")
    return {part: latest(results / "tiny.jsonl", part) for part in MEASURED_PARTS}


def values(records: dict[tuple[str, str], Record], figure: str) -> list[Record]:
    """The measured figures of one kind."""
    return [
        record
        for (kind, _), record in records.items()
        if kind == figure and record["status"] == "measured"
    ]


def test_gpu_parts_run_without_a_gpu_and_without_a_server(
    measured: dict[str, dict[tuple[str, str], Record]],
) -> None:
    steps = measured["steps"]
    decode = values(steps, "decode")
    assert len(decode) == 2 * 2 * len(STEP_MODELS)
    assert {one["sampler"] for one in decode} == {"greedy", "top-k top-p"}
    assert all(one["step_ms"] > 0 and one["call_ms"] > 0 and one["bytes"] > 0 for one in decode)
    assert len(values(steps, "prefill")) == 2 * sum(one.has_prefill for one in STEP_MODELS)
    assert {one["name"] for one in values(measured["ceilings"], "product")} == {
        "bf16",
        "fp8",
        "fp8, scales by rows",
        "int8",
    }
    for one in values(measured["saturate"], "saturated"):
        assert one["is_finished"] and one["output_tokens"] == 4 * 12
    for one in values(measured["serving"], "latency"):
        assert 0 < one["ttft_p50_ms"] <= one["ttft_p99_ms"] and one["itl_p99_ms"] > 0


def test_gpu_profile_has_kernels_and_the_hosts_time(
    measured: dict[str, dict[tuple[str, str], Record]],
) -> None:
    for one in values(measured["profile"], "kernels"):
        assert one["launches"] > 10 and one["busy_ms"] > 0
        assert one["table"] == sorted(one["table"], key=lambda kernel: -kernel["us"])
    (greedy, sampled) = values(measured["profile"], "host")
    assert (greedy["sampler"], sampled["sampler"]) == ("greedy", "top-k top-p")
    for one in (greedy, sampled):
        stages = one["schedule_ms"] + one["launch_ms"] + one["update_ms"]
        assert 0 < stages <= one["host_ms"] <= one["step_ms"]


def test_gpu_kernels_measure_every_case(
    measured: dict[str, dict[tuple[str, str], Record]],
) -> None:
    records = measured["kernels"]
    setting = kernels.Setting(CPU, 64)
    cases = list(kernels.kernel_cases(setting))
    assert len({(case.figure, case.name) for case in cases}) == len(cases)
    for case in cases:
        record = records[case.figure, case.name]
        is_own = case.implementation.startswith(kernels.LLMKIT)
        needs_gpu = case.figure == "experts" or "Triton" in case.implementation
        if is_own and not needs_gpu:
            assert record["status"] == "measured" and record["ms"] > 0, record
        assert record["status"] in ("measured", "skipped"), record
    linear = next(case for case in cases if case.case.startswith("Llama-3.1-8B down"))
    assert (linear.bytes, linear.flops) == (
        64 * 224 // 2 + 4 * 64 * 2 + 2 * (64 + 224),
        {"bf16": 2.0 * 64 * 224},
    )


def test_kernel_time_is_that_of_one_launch_over_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches take turns between copies of the arguments, which together exceed the cache."""
    seen = set[int]()
    clock = SimpleNamespace(now_s=0.0)
    clock.perf_counter = lambda: clock.now_s
    monkeypatch.setattr("llmkit.bench.gpu.timing.time", clock)

    def launch(x: torch.Tensor) -> None:
        seen.add(x.data_ptr())
        clock.now_s += 0.002

    x = torch.zeros(4)
    assert kernel_ms(partial(launch, x), 16, CPU, 2) == pytest.approx(2.0)
    assert len(seen) == 2 and x.data_ptr() in seen


@pytest.mark.parametrize(
    ("model", "weights", "batch", "floor_ms"),
    [
        ("Llama-3.1-8B", "bf16", 1, 3.52),
        ("Llama-3.1-8B", "bf16", 128, 7.49),
        ("Llama-3.1-8B", "fp8", 1, 1.90),
        ("Llama-3.1-8B", "int4", 1, 1.14),
        ("Llama-3.1-8B", "int4", 128, 5.10),
        ("Qwen3-0.6B", "bf16", 1, 0.305),
        ("Qwen3-0.6B", "bf16", 128, 3.77),
    ],
)
def test_step_floor_counts_weights_and_context(
    model: str, weights: str, batch: int, floor_ms: float
) -> None:
    cost = step_cost(model_spec(MODEL_CONFIGS[model]), weights, batch, 1, 1024)
    assert H200.seconds(cost.bytes, cost.flops) * 1e3 == pytest.approx(floor_ms, rel=0.01)


@pytest.mark.parametrize(("weights", "floor_ms"), [("bf16", 77.9), ("fp8", 41.8), ("int4", 77.9)])
def test_prefill_floor_counts_operations(weights: str, floor_ms: float) -> None:
    cost = step_cost(model_spec(MODEL_CONFIGS["Llama-3.1-8B"]), weights, 1, 4096, 4096)
    assert H200.seconds(cost.bytes, cost.flops) * 1e3 == pytest.approx(floor_ms, rel=0.01)


def test_step_floor_counts_the_experts_that_tokens_choose() -> None:
    spec = model_spec(MODEL_CONFIGS["Qwen3-30B-A3B"])
    one = step_cost(spec, "bf16", 1, 1, 16)
    two = step_cost(spec, "bf16", 2, 1, 16)
    expert_bytes = 3 * 2048 * 768 * 2 * 48
    kv_bytes = 16 * 2 * 4 * 128 * 2 * 48
    chosen = 8 + (1 - 8 / 128) * 8  # of 128, by two tokens
    assert two.bytes - one.bytes == pytest.approx((chosen - 8) * expert_bytes + kv_bytes)


def test_host_times_need_requests_that_decode() -> None:
    bench = StepBench(StepModel("Qwen3-0.6B", "bf16"), CPU, is_tiny=True)
    assert host_times(bench, 2, "greedy", 2)["batch"] == 2


def test_latency_loads_mix_lengths_and_arrive_during_decode() -> None:
    by_name = loads(is_tiny=False)
    (mixed,) = [name for name in by_name if "32,768" in name]
    lengths = [one.num_tokens for one in by_name[mixed]]
    assert len(lengths) == 64 and sorted(lengths)[-2:] == [384, 32768]
    arrivals = by_name["arrivals during decode"]
    assert [one.at_s for one in arrivals] == sorted(one.at_s for one in arrivals)
    assert 8 < arrivals[-1].at_s < 20


def test_percentile_is_a_measured_value() -> None:
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.99) == 4.0
    assert percentile([5.0], 0.0) == 5.0


def test_gpu_tests_count_results_with_and_without_processes() -> None:
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}
    for line in (
        "tests/gpu/test_a.py::test_one[1, 2] PASSED                     [ 33%]",
        "[gw3] [ 66%] PASSED tests/gpu/test_a.py::test_two[x] ",
        "[gw0] [ 99%] FAILED tests/gpu/test_b.py::test_three[1, 2] ",
        "FAILED tests/gpu/test_b.py::test_three[1, 2] - AssertionError: far off",
        "some output that PASSED by",
    ):
        note_result(line, counts, failures)
    assert counts == {"PASSED": 2, "FAILED": 1}
    assert failures == {"tests/gpu/test_b.py::test_three[1, 2]": "AssertionError: far off"}


@pytest.mark.slow
def test_smoke_tests_are_found_by_their_whole_names() -> None:
    """A name that no test has would select nothing."""
    lines = (ROOT / "tests" / "gpu" / "smoke.txt").read_text(encoding="utf-8").splitlines()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "tests/gpu"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert set(lines) <= set(found.stdout.splitlines())


def test_smoke_tests_are_tests() -> None:
    lines = (ROOT / "tests" / "gpu" / "smoke.txt").read_text(encoding="utf-8").splitlines()
    assert 10 <= len(lines) == len(set(lines)) <= 30
    for line in lines:
        file, _, name = line.partition("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name.partition('[')[0]}(" in source, line


WORK = baselines.Workload(
    tiny_config(MODEL_CONFIGS["SmolLM2-135M"]),
    "cpu",
    2,
    5,
    4,
)


def test_baselines_run_the_same_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    found = baselines.measure_engine("llmkit", WORK)
    assert found["output_tps"] > 0 and found["warm_after_s"] > 0
    given: list[list[list[int]]] = []
    monkeypatch.setitem(
        baselines.ENGINES, "short", lambda work: lambda prompts: given.append(prompts) or 7
    )
    with pytest.raises(RuntimeError, match="gave 7 tokens and not 2 x 4"):
        baselines.measure_engine("short", WORK)
    assert given[0] != given[1] and all(len(prompt) == 5 for prompts in given for prompt in prompts)
    assert given[1] == WORK.prompts(seed=4) and max(max(prompt) for prompt in given[1]) < 512


def test_baselines_run_transformers_with_a_static_cache() -> None:
    assert baselines.measure_engine("transformers_static", WORK)["output_tps"] > 0


def test_baselines_run_transformers_in_a_subprocess() -> None:
    found = baselines.measure_in_subprocess("transformers", WORK, 240)
    assert found["output_tps"] > 0


def test_baselines_report_missing_and_failed_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baselines.MODULES, "vllm", "no_such_module")
    with pytest.raises(NotInstalledError, match="no_such_module is not installed"):
        baselines.measure_in_subprocess("vllm", WORK, 240)
    wrong = replace(WORK, config=WORK.config | {"architectures": ["NoSuchModel"]})
    with pytest.raises(RuntimeError, match="NoSuchModel"):
        baselines.measure_in_subprocess("llmkit", wrong, 240)


def test_fp8_products_are_timed_with_and_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are padded where nothing is tuned."""
    rows: list[int] = []

    def scaled_mm(values: torch.Tensor, *_: object) -> torch.Tensor:
        rows.append(len(values))
        return torch.zeros(len(values), 32)

    def quantize(x: torch.Tensor, quant: InputQuant) -> QuantizedInput:
        return quant.empty(*x.shape, x)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(kernels, "quantize_input", quantize)
    monkeypatch.setattr(w8a8_linear, "quantize_input", quantize)
    kernel = W8A8Linear(torch.ones(32, 64).to(FP8), torch.ones(32, 1), None)
    monkeypatch.setattr(kernels, "_layer", lambda *_: SimpleNamespace(kernel=kernel))
    setting = kernels.Setting(torch.device("cpu"))
    kernel(torch.ones(3, 64))
    kernels._unpadded_fp8(setting, (32, 64), 3)()
    assert rows == [17, 3]
