"""The GPU benchmarks on a CPU with small shapes: what they count, and that every case runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmkit.bench.gpu import baselines as baselines
from llmkit.bench.gpu import decode_steps as steps
from llmkit.bench.gpu import kernel_times as kernels
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.families import model_spec

CPU = torch.device("cpu")


@pytest.mark.parametrize("weights", steps.WEIGHT_SCHEMES)
def test_decode_steps_measures_every_weight_scheme(weights: str) -> None:
    config = steps.MODEL_CONFIGS["SmolLM2-135M"] | {"num_hidden_layers": 1, "vocab_size": 512}
    model = steps.random_model(
        model_spec(config), torch.float32, CPU, steps.WEIGHT_SCHEMES[weights]
    )
    decode = steps.measure_step("tiny", weights, model, 3, 1, 40, 1e9, repeats=1)
    prefill = steps.measure_step("tiny", weights, model, 1, 40, 40, 1e9, repeats=1)
    assert (decode.kind, decode.tokens, prefill.kind, prefill.tokens) == (
        "decode",
        3,
        "prefill",
        40,
    )
    kv = 2 * 3 * 64 * 4  # bytes of a token
    assert (decode.floor_ms - prefill.floor_ms) * 1e6 == pytest.approx(2 * 40 * kv)
    linears = 960 * 576 + 576 * 576 + 3 * 1536 * 576
    rows = 960 + 576 + 2 * 1536 + 576
    down = 1536 * 576  # the only linear whose inputs are whole groups of 128
    stored = {
        "bf16": 4 * linears,  # in float32 on a CPU
        "fp8": 2 * linears + 4 * rows,  # the CPU kernel keeps 16-bit values, and a scale a row
        "int8": linears + 4 * rows,
        "int4": 4 * (linears - down) + down / 2 + 4 * down / 128,  # a scale a group
    }
    if cpu_kernels.library is None:  # torch's operators multiply by dense weights
        stored |= {"fp8": 4 * linears, "int8": 4 * linears, "int4": 4 * linears}
    assert prefill.floor_ms * 1e6 - 40 * kv == pytest.approx(stored[weights] + 512 * 576 * 4)
    assert steps.full_engine_tps(model, 3, 8, 5) > 0


def test_kernel_times_measures_every_kernel() -> None:
    rows, failed = kernels.measure(CPU, scale=128, repeats=1)
    assert failed == {}
    names = [row.kernel for row in rows]
    assert len(names) == len(set(names)) == 5 + 3 * 4 * 5 + 3 * 3
    assert all(row.ms > 0 and row.floor_ms > 0 and row.bytes > 0 and row.flops > 0 for row in rows)
    one = next(row for row in rows if row.kernel == "down [32, 112], bf16, 16 rows")
    assert (one.bytes, one.flops) == ((32 * 112 + 16 * (32 + 112)) * 4, 2 * 16 * 32 * 112)


def test_decode_steps_measures_experts() -> None:
    """Its floor counts as many experts as so many tokens choose."""
    small = {"num_hidden_layers": 2, "vocab_size": 512, "num_experts": 8, "num_experts_per_tok": 2}
    model = steps.random_model(
        model_spec(steps.MODEL_CONFIGS["Qwen3-30B-A3B"] | small), torch.float32, CPU
    )
    one, many = (
        steps.measure_step("moe", "bf16", model, n, 1, 16, 1e9, repeats=1) for n in (1, 64)
    )
    # bytes
    kv = 16 * 2 * 2 * 4 * 128 * 4
    expert = 3 * 2048 * 768 * 4
    rest = 512 * 2048 * 4 + 2 * 4 * (2048 * (4096 + 1024) + 4096 * 2048 + 8 * 2048)
    assert one.floor_ms * 1e6 == pytest.approx(rest + 2 * 2 * expert + kv)
    assert many.floor_ms * 1e6 == pytest.approx(rest + 2 * 8 * expert + 64 * kv, rel=1e-4)


WORK = baselines.Workload(
    steps.MODEL_CONFIGS["SmolLM2-135M"] | {"num_hidden_layers": 1, "vocab_size": 512},
    "cpu",
    2,
    5,
    4,
)


def test_baselines_run_the_same_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    found = baselines.measure("llmkit", WORK)
    assert found["output_tps"] > 0 and found["warm_after_s"] > 0
    given: list[list[list[int]]] = []
    monkeypatch.setitem(
        baselines.ENGINES, "short", lambda work: lambda prompts: given.append(prompts) or 7
    )
    with pytest.raises(RuntimeError, match="gave 7 tokens and not 2 x 4"):
        baselines.measure("short", WORK)
    assert given[0] != given[1] and all(len(prompt) == 5 for prompts in given for prompt in prompts)
    assert given[1] == WORK.prompts(seed=2) and max(max(prompt) for prompt in given[1]) < 512


def test_baselines_run_transformers_in_a_subprocess() -> None:
    found = baselines.measure_in_subprocess("transformers", WORK, 120)
    assert found.get("output_tps", 0) > 0, found


def test_baselines_report_missing_and_failed_engines() -> None:
    assert baselines.measure_in_subprocess("no_such_engine", WORK, 60) == {
        "skipped": "it is not installed"
    }
    wrong = replace(WORK, config=WORK.config | {"architectures": ["NoSuchModel"]})
    assert "NoSuchModel" in baselines.measure_in_subprocess("llmkit", wrong, 60)["failed"]
