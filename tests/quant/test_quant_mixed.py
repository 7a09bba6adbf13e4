"""Mixed precision: the sensitivity of linears, the search for bits, and complete runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random

import pytest
import torch
from support import tiny_models as tiny

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.progress import SilentProgress
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.families import model_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model
from llmkit.quant.bit_search import BITS, BitSearch
from llmkit.quant.grid import FULL_SEARCH, round_to_nearest
from llmkit.quant.layer_sensitivity import LayerSensitivity, measure_sensitivity
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.methods import MethodOptions, build_quantization_config
from llmkit.quant.output_quality import score_logits
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_linear import quant_target
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.token_windows import evaluation_windows

pytestmark = pytest.mark.usefixtures("short_builtin_text")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("source") / "llama", num_hidden_layers=3)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_sensitivity_is_the_kl_of_rounding_one_linear(tmp_path: Path, architecture: str) -> None:
    """Against a model in which only that linear (of all experts) was rounded."""
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "model", architecture))
    spec = model_spec(checkpoint.config)
    quantization = build_quantization_config(spec, MethodOptions("rtn", mixed=True))
    targets = {}
    for row in parameters(spec):
        if (target := quant_target(row, quantization)) is not None:
            targets.setdefault(row.layers[0], []).append(target)
    windows = torch.randint(0, tiny.VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    units = measure_sensitivity(
        LayerStream.from_checkpoint(checkpoint, spec), targets, windows, SilentProgress()
    )
    assert sorted(module for unit in units for module in unit.modules) == sorted(
        row.module for row in parameters(spec) if row.is_linear
    )
    assert sum(unit.num_weights for unit in units) == sum(
        row.shape[0] * row.shape[1] for row in parameters(spec) if row.is_linear
    )
    reference = load_model(checkpoint, torch.float32)
    for unit in units[:2] + units[-2:]:
        model = load_model(checkpoint, torch.float32)
        for target in itertools.chain(*targets.values()):
            if target.parameter.module in unit.modules:
                linear = model.layers[target.parameter.layers[0]].linears[target.name]
                linear.weight = round_to_nearest(
                    linear.weight, target.scheme, target.scale_dtype, FULL_SEARCH
                ).dequantize()
        kl = score_logits(
            window_logits(model, windows), window_logits(reference, windows), windows
        ).mean_kl
        assert unit.kl[4] == pytest.approx(kl, rel=0.02, abs=2e-7)
        assert 0 <= unit.kl[8] < 0.1 * unit.kl[4]
    assert next(window_logits(reference, windows)).shape == (40, tiny.VOCAB)


def units(*kls: float) -> list[LayerSensitivity]:
    return [
        LayerSensitivity(f"u{i}", (f"m{i}",), 100 * (i + 1), {4: kl, 8: kl / 100, 16: 0.0})
        for i, kl in enumerate(kls)
    ]


@pytest.mark.parametrize("bound", [4, 4.5, 5.0, 6.3, 8, 11.9, 16])
def test_bit_search_within_bits_is_as_good_as_the_best(bound: float) -> None:
    search = BitSearch(units(0.4, 0.01, 0.2, 0.3), target_bits=bound)
    bits = search.next_bits()
    assert search.total_bits(bits) <= bound * search.num_weights

    def kl(choice: dict[str, int]) -> float:
        return sum(unit.kl[choice[unit.name]] for unit in search.layers)

    every = [dict(zip(bits, choice, strict=True)) for choice in itertools.product(BITS, repeat=4)]
    best = min(
        kl(choice) for choice in every if search.total_bits(choice) <= bound * search.num_weights
    )
    assert kl(bits) <= best + 0.25 * kl(dict.fromkeys(bits, 4))
    assert search.record_attempt(bits, 0.1)


@pytest.mark.parametrize("truth", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("bound", [0.001, 0.02, 0.1, 0.5, 3.0])
def test_bit_search_ends_within_the_target_kl(truth: float, bound: float) -> None:
    """However far the KL of a choice is from the predicted one."""
    search = BitSearch(units(0.4, 0.01, 0.2, 0.3), target_kl=bound)
    tried = []
    for _ in range(20):
        bits = search.next_bits()
        kl = truth * sum(unit.kl[bits[unit.name]] ** 1.1 for unit in search.layers)
        tried.append((search.total_bits(bits), kl))
        if search.record_attempt(bits, kl):
            break
    assert kl <= bound
    assert len(tried) <= 7
    assert tried[-1][0] == min(size for size, kl in tried if kl <= bound)


@pytest.mark.parametrize("bound", [0.02, 0.1, 0.3])
def test_bit_search_accepts_no_larger_choice_than_a_good_one_it_tried(bound: float) -> None:
    """Where the KL of a choice differs from the predicted one as the choice pleases."""
    went_back = 0
    for seed in range(200):
        search = BitSearch(units(0.4, 0.01, 0.2, 0.3, 0.15, 0.08), target_kl=bound)
        tried = []
        for _ in range(20):
            bits = search.next_bits()
            factor = Random(f"{seed} {sorted(bits.items())}").uniform(0.2, 2.5)
            kl = factor * sum(unit.kl[bits[unit.name]] for unit in search.layers)
            tried.append((search.total_bits(bits), kl))
            if search.record_attempt(bits, kl):
                break
        assert kl <= bound
        assert tried[-1][0] == min(size for size, kl in tried if kl <= bound)
        assert len(tried) <= 9
        went_back += tried[-1] in tried[:-1]
    assert went_back, "some searches end with an attempt before their last new one"


def run(source: Path, out: Path, **options: object) -> dict[str, object]:
    settings = QuantizeOptions(samples=8, seq_len=64, eval_windows=1, device="cpu", **options)
    return quantize(str(source), str(out), settings, SilentProgress())


def test_target_bits_is_kept_and_the_checkpoint_says_which(llama: Path, tmp_path: Path) -> None:
    report = run(llama, tmp_path / "out", method="gptq", target_bits=6.0)
    assert report["format"] == "compressed-tensors"
    assert 5.0 < report["mean_bits"] <= 6.0
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = model_spec(checkpoint.config)
    stored = {
        row.module: scheme_of(row, row.source_names[0], checkpoint.quantization)
        for row in parameters(spec)
        if row.is_linear
    }
    chosen = {entry["name"]: entry["bits"] for entry in report["sensitivity"]}
    assert {name: scheme.bits if scheme else 16 for name, scheme in stored.items()} == chosen
    assert len(set(chosen.values())) > 1
    assert {entry["name"]: entry["bits"] for entry in report["linears"]}.items() <= chosen.items()
    model = load_model(checkpoint, torch.float32)
    reference = load_model(open_checkpoint(llama), torch.float32)
    windows = evaluation_windows(load_tokenizer(checkpoint), 1, 256)
    again = score_logits(window_logits(model, windows), window_logits(reference, windows), windows)
    assert again.mean_kl == pytest.approx(report["quality"]["mean_kl"], rel=1e-3)
    assert not list(tmp_path.glob("*.search"))
    plain = run(llama, tmp_path / "plain", method="gptq", format="compressed-tensors")
    assert report["quality"]["mean_kl"] < plain["quality"]["mean_kl"]


def test_target_kl_is_kept(llama: Path, tmp_path: Path) -> None:
    plain = run(llama, tmp_path / "plain", method="rtn")
    bound = plain["quality"]["mean_kl"] / 3
    report = run(llama, tmp_path / "out", method="rtn", target_kl=bound)
    assert report["quality"]["mean_kl"] <= bound
    assert 4 < report["mean_bits"] < 16
    assert report["attempts"][-1]["mean_kl"] == report["quality"]["mean_kl"]
    assert all(entry["mean_kl"] > 0 for entry in report["attempts"])
    loose = run(llama, tmp_path / "loose", method="rtn", target_kl=10.0)
    assert loose["mean_bits"] == 4.0


def test_bit_search_resumes_after_an_interruption(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(llama, tmp_path / "whole", method="gptq", target_bits=5.0)
    from llmkit.quant import quantize_checkpoint as module

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "out", method="gptq", target_bits=5.0)
    assert json.loads((tmp_path / "out.partial.search").read_text())["units"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure_sensitivity", lambda *_: pytest.fail("measured again"))
        again = run(llama, tmp_path / "out", method="gptq", target_bits=5.0)
    assert again["sensitivity"] == whole["sensitivity"]
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob("*.search"))


def test_mixed_precision_has_one_group_size(llama: Path) -> None:
    quantization = build_quantization_config(
        model_spec(open_checkpoint(llama).config), MethodOptions("awq", mixed=True)
    )
    assert quantization is not None
    assert quantization.scheme == Scheme(4, 64, symmetric=False)
