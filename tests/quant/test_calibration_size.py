"""Defaults of calibration, and estimates of a run's time."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.common.progress import SilentProgress
from llmkit.model.families import model_spec
from llmkit.quant import quantize_plan
from llmkit.quant.algorithm import Algorithm
from llmkit.quant.calibration_size import default_seq_len, default_windows
from llmkit.quant.gptq import GptqQuantizer
from llmkit.quant.grid import FULL_SEARCH
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.time_estimate import Speed, Work, estimate_seconds, measure_speed

MODEL = {"dtype": "float32", "max_position_embeddings": 4096}
CPU = torch.device("cpu")
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LLAMA_8B = SMOLLM2 | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN3_30B_A3B = LLAMA_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "head_dim": 128,
    "num_hidden_layers": 1,
}
GPTQ = Algorithm(GptqQuantizer(0.01, FULL_SEARCH))


@pytest.mark.parametrize(
    ("config", "seq_len", "windows"),
    [
        (SMOLLM2, 2048, 8),  # 16,384 tokens
        (SMOLLM2, 256, 64),
        (LLAMA_8B, 256, 448),  # 8 * 14,336 tokens
        (LLAMA_8B, 65536, 8),  # never fewer than 8
        (QWEN3_30B_A3B, 256, 1024),  # 8 * 2,048 * 128 / 8 tokens, for an expert
        (QWEN3_30B_A3B | {"num_experts_per_tok": 4}, 256, 1024),  # no more tokens than on a GPU
    ],
)
def test_default_windows_on_a_cpu_follow_the_widest_linear(
    config: dict[str, Any], seq_len: int, windows: int
) -> None:
    spec = model_spec(config)
    assert default_windows(spec, seq_len, CPU) == windows
    assert default_windows(spec, seq_len, torch.device("cuda")) == 128


def test_default_windows_are_recorded_and_explicit_ones_kept(
    model: Path, tmp_path: Path, short_builtin_text: None
) -> None:
    options = QuantizeOptions("gptq", seq_len=128, evaluate=False, device="cpu", dry_run=True)

    def plan(**changes: Any) -> dict[str, Any]:
        chosen = dataclasses.replace(options, **changes)
        return quantize(str(model), str(tmp_path / "out"), chosen, SilentProgress())

    assert plan()["plan"]["samples"] == plan()["options"]["samples"] == 128
    assert plan(samples=3)["plan"]["samples"] == plan(samples=3)["options"]["samples"] == 3
    assert plan(method="rtn")["plan"]["samples"] is None
    assert plan(method="rtn")["options"]["samples"] is None
    report = plan(dry_run=False)
    assert report["options"]["samples"] == 128
    assert "--samples 128 --seq-len 128" in report["command_line"]


def test_default_windows_are_short_on_a_cpu_unless_their_number_is_given(
    model: Path, tmp_path: Path
) -> None:
    def windows(samples: int | None, seq_len: int | None) -> tuple[int, int]:
        options = QuantizeOptions(
            "gptq", samples=samples, seq_len=seq_len, device="cpu", dry_run=True
        )
        plan = quantize(str(model), str(tmp_path / "out"), options, SilentProgress())["plan"]
        return plan["samples"], plan["seq_len"]

    assert windows(None, None) == (64, 256)
    assert windows(16, None) == (16, 2048)
    assert windows(None, 128) == (128, 128)
    assert default_seq_len(None, torch.device("cuda")) == 2048


@pytest.mark.parametrize(
    ("windows", "length", "speed", "measured_s"),
    [
        (16, 1024, Speed(160e9, 2), 62 + 28),  # two threads: quantizing, then evaluating
        (16, 256, Speed(80e9, 1), 39 + 50),  # one thread
    ],
)
def test_estimate_is_near_measured_runs_of_smollm2(
    windows: int, length: int, speed: Speed, measured_s: float
) -> None:
    work = Work(269_000_000, windows * length, GPTQ, searches=True, eval_windows=8)
    assert measured_s / 1.5 < estimate_seconds(model_spec(SMOLLM2), work, speed) < measured_s * 1.5


def test_estimate_grows_with_the_work() -> None:
    spec = model_spec(SMOLLM2)
    speed = Speed(1e11, 1)

    def seconds(**changes: Any) -> float:
        work = Work(269_000_000, 16_384, GPTQ, searches=True, eval_windows=8)
        return estimate_seconds(spec, dataclasses.replace(work, **changes), speed)

    whole = seconds()
    for less in ({"tokens": 8192}, {"searches": False}, {"eval_windows": 0}, {"source_bytes": 0}):
        assert seconds(**less) < whole, less
    assert seconds(tokens=0, algorithm=None) < seconds(tokens=1)


def test_measured_speed_takes_no_time_and_keeps_the_threads() -> None:
    threads = torch.get_num_threads()
    started = time.thread_time()
    speed = measure_speed(CPU)
    assert time.thread_time() - started < 1
    assert torch.get_num_threads() == threads
    assert speed.rounding == threads
    assert speed.flops_per_second > 1e8


def test_dry_run_offers_settings_that_take_less_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_plan, "measure_speed", lambda _: Speed(1e7, 0.01))
    options = QuantizeOptions("gptq", samples=1000, seq_len=64, device="cpu", dry_run=True)

    def cheaper(**changes: Any) -> tuple[list[str], dict[str, Any]]:
        chosen = dataclasses.replace(options, **changes)
        report = quantize(str(model), str(tmp_path / "out"), chosen, SilentProgress())
        plan = report["plan"]
        assert all(entry["seconds"] <= 0.9 * plan["seconds"] for entry in plan["cheaper"])
        return [entry["options"] for entry in plan["cheaper"]], plan

    names, plan = cheaper()
    assert names[-2:] == ["--samples 256 --seq-len 64", "--samples 256 --seq-len 64 --effort fast"]
    # What is offered takes the time that is promised for it.
    _, taken = cheaper(samples=256)
    promised = {entry["options"]: entry["seconds"] for entry in plan["cheaper"]}
    assert taken["seconds"] == pytest.approx(promised["--samples 256 --seq-len 64"])
    assert cheaper(effort="max")[0][:2] == ["--effort high", "--effort normal"]
    assert not any("samples" in name for name in cheaper(samples=2)[0])
    assert cheaper(method="rtn", samples=None)[0] == []
