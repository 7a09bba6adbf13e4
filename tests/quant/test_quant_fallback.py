"""Quantizing a model that is no native family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.common.progress import SilentProgress
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.weight_loader import load_model
from llmkit.quant.input_stats import InputStats
from llmkit.quant.quantize_checkpoint import REPORT_FILE, quantize
from llmkit.quant.quantize_options import QuantizeOptions

MODEL = {"architecture": "persimmon"}
pytestmark = pytest.mark.usefixtures("short_builtin_text")
LINEARS = 2 * 4  # of the two layers: QKV, attention's output, and the two of the MLP


def run(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"device": "cpu", "evaluate": False, "samples": 6, "seq_len": 48} | options
    return quantize(str(model), str(out), QuantizeOptions(**options), SilentProgress())


def logits_of(path: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    spec = checkpoint_spec(checkpoint)
    check_checkpoint(checkpoint, spec)
    model = load_model(checkpoint, torch.float32, spec=spec, packed=True)
    tokens = torch.arange(20, 60)[None]
    return next(window_logits(model, tokens))


@pytest.mark.parametrize(
    ("method", "limit", "options"),
    [
        ("rtn", 0.5, {"group_size": 32}),
        ("int8", 0.05, {}),
        ("fp8", 0.3, {}),
        ("fp8", 0.3, {"static_activations": True}),
        ("gptq", 0.5, {"group_size": 32}),
        ("auto", 0.5, {"group_size": 32}),
    ],
    ids=["rtn", "int8", "fp8", "fp8 static", "gptq", "auto"],
)
def test_quantize_fallback_keeps_the_logits_close(
    model: Path, tmp_path: Path, method: str, limit: float, options: dict[str, Any]
) -> None:
    report = run(model, tmp_path / "out", method=method, **options)
    assert len(report["linears"]) == LINEARS
    assert {entry["name"].split(".")[1] for entry in report["linears"]} == {"0", "1"}
    names = open_checkpoint(tmp_path / "out").tensor_names
    assert "model.layers.0.self_attn.query_key_value.weight" in open_checkpoint(model).tensor_names
    assert "model.layers.0.self_attn.query_key_value.bias" in names
    source = logits_of(model)
    difference = logits_of(tmp_path / "out") - source
    assert 0 < difference.norm() / source.norm() < limit


def test_quantize_fallback_knows_the_first_token_of_a_window(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[int]]] = []
    add = InputStats.add

    def record(stats: InputStats, inputs: torch.Tensor, **options: Any) -> None:
        seen.append((inputs[..., 0].numel(), list(options["first_tokens"])))
        add(stats, inputs, **options)

    monkeypatch.setattr(InputStats, "add", record)
    run(model, tmp_path / "out", method="gptq", group_size=32)
    assert sum(len(firsts) for _, firsts in seen) == 6 * LINEARS  # of 6 windows
    for num_tokens, firsts in seen:
        assert firsts == list(range(0, num_tokens, 48))


def test_quantize_fallback_gptq_loses_less_than_rounding(model: Path, tmp_path: Path) -> None:
    errors = {}
    for method in ("gptq", "rtn"):
        options = {"effort": "fast"} if method == "rtn" else {}
        run(model, tmp_path / method, method=method, group_size=32, evaluate=True, **options)
        report = json.loads((tmp_path / method / REPORT_FILE).read_text())
        errors[method] = report["quality"]["mean_kl"]
    assert 0 < errors["gptq"] < errors["rtn"]


def test_quantize_fallback_cast_loads_in_transformers(model: Path, tmp_path: Path) -> None:
    """A cast has transformers' own tensors, and transformers computes the same."""
    run(model, tmp_path / "out", method="fp16")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        expected = oracle(torch.arange(20, 60)[None]).logits[0]
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"method": "rtn", "require_native": True}, "--require-native"),
        ({"method": "awq"}, "smoothing of inputs"),
        ({"method": "gptq", "effort": "max"}, "--effort max"),
        ({"method": "int8", "kv": "int8"}, "--kv"),
        ({"method": "gptq", "target_bits": 5.0, "evaluate": True}, "--target-kl or --target-bits"),
    ],
)
def test_quantize_fallback_refuses(
    model: Path, tmp_path: Path, options: dict[str, Any], feature: str
) -> None:
    with pytest.raises(InputError, match=f"^{feature} is not possible with PersimmonForCausalLM"):
        run(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_quantize_fallback_refuses_a_model_without_linears(tmp_path: Path) -> None:
    """GPT-2's projections are of transformers' own class Conv1D."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    path = tiny_checkpoint(tmp_path / "model", "gpt2", **sizes)
    with pytest.raises(InputError, match="GPT2LMHeadModel has no linear layers of the class"):
        run(path, tmp_path / "out", method="rtn")
    run(path, tmp_path / "out", method="bf16", evaluate=True, eval_windows=1)
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(path), atol=1e-4, rtol=0)
