"""Mixed precision: the sensitivity of linears, the search for schemes, and complete runs."""

from __future__ import annotations

import itertools
import json
import math
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from support import tiny_models as tiny

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import GateError
from llmkit.common.progress import SilentProgress
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.families import model_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.linear import ActivationQuant
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model
from llmkit.quant import layer_sensitivity
from llmkit.quant.algorithm import QuantizeJob
from llmkit.quant.grid import FULL_SEARCH
from llmkit.quant.input_stats import InputStats
from llmkit.quant.layer_sensitivity import LayerSensitivity, SchemeCost, measure_sensitivity
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.methods import MethodOptions, build_quantization_config
from llmkit.quant.output_quality import score_logits
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_linear import quantize_linear
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.round_to_nearest import RtnQuantizer
from llmkit.quant.scheme_candidates import UNQUANTIZED, LinearUnit, linear_units
from llmkit.quant.scheme_search import SchemeSearch
from llmkit.quant.token_windows import evaluation_windows

pytestmark = pytest.mark.usefixtures("short_builtin_text")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("source") / "llama", num_hidden_layers=3)


ALL = ("w4a16", "w8a16", "w8a8", "fp8", "mxfp8", "mxfp4", "nvfp4", "nvfp4a16")


def units_of(path: Path, *names: str, **options: object) -> tuple[list[LinearUnit], LayerStream]:
    checkpoint = open_checkpoint(path)
    spec = model_spec(checkpoint.config)
    method = MethodOptions("rtn", mixed=True, **options)
    quantization = build_quantization_config(spec, method)
    assert quantization is not None
    stream = LayerStream.from_checkpoint(checkpoint, spec)
    return linear_units(spec, quantization, names, method), stream


@pytest.mark.parametrize(
    ("architecture", "names"), [("llama", ALL), ("qwen3_moe", ("w4a16", "fp8"))]
)
def test_sensitivity_is_the_kl_of_quantizing_one_unit(
    tmp_path: Path, architecture: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a model in which only that unit is quantized, with its inputs as at run time.

    One choice of each unit is measured; the others follow from the error of the unit's outputs.
    """
    path = tiny.tiny_checkpoint(tmp_path / "model", architecture)
    units, stream = units_of(path, *names)
    quantizer = RtnQuantizer(FULL_SEARCH)
    windows = torch.randint(0, tiny.VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    # The hidden states of few variants fit: the model is read several times.
    monkeypatch.setattr(layer_sensitivity, "VARIANT_BYTES", 7 * 120 * 64 * 4)
    if architecture == "llama":
        monkeypatch.setattr(layer_sensitivity, "SLACK", math.inf)  # every scheme is a choice
    found = measure_sensitivity(stream, units, quantizer, windows, SilentProgress())
    rows = {row.module: row for row in parameters(stream.spec) if row.is_linear}
    assert sorted(module for unit in found.layers for module in unit.modules) == sorted(rows)
    weights = sum(row.shape[0] * row.shape[1] for row in rows.values())
    assert sum(unit.num_weights for unit in found.layers) == weights
    if architecture == "qwen3_moe":
        experts = [unit for unit in found.layers if unit.name.endswith("mlp.experts")]
        assert [len(unit.modules) for unit in experts] == [8, 8]
    checkpoint = open_checkpoint(path)
    reference = load_model(checkpoint, torch.float32)
    logits = list(window_logits(reference, windows))

    def kl_of(chosen: list[LinearUnit], choice: str) -> float:
        model = load_model(checkpoint, torch.float32)
        for unit in chosen:
            layer = model.layers[unit.layer]
            stats = input_stats(layer.index)
            for target in unit.targets(choice):
                linear = layer.linears[target.name]
                job = QuantizeJob(target, linear.weight, stats[target.name])
                weight = quantize_linear(quantizer, job).weight
                linear.weight = weight.dequantize()
                linear.activation_quant = ActivationQuant.of(target.scheme, weight.input_scale)
        return score_logits(window_logits(model, windows), iter(logits), windows).mean_kl

    @cache
    def input_stats(index: int) -> dict[str, InputStats]:
        """The inputs of a layer's linears in the original model, by hooks of its own."""
        model = load_model(checkpoint, torch.float32)
        linears = model.layers[index].linears
        stats = {}
        for name, linear in linears.items():
            stats[name] = InputStats(linear.weight.shape[1], {"magnitudes"})
            hook = stats[name]
            linear.register_forward_pre_hook(lambda _, x, hook=hook: hook.add(x[0]))
        for _ in window_logits(model, windows):
            pass
        return stats

    by_name = {unit.name: unit for unit in units}
    for layer in (found.layers[0], found.layers[-1]):
        unit = by_name[layer.name]
        num_measured = 0
        for choice, cost in layer.costs.items():
            if choice == UNQUANTIZED:
                assert cost.kl == 0
                assert cost.stored_bits == 16 * layer.num_weights
                continue
            assert cost.scheme == unit.schemes[choice]
            measured = kl_of([unit], choice)
            assert cost.kl == pytest.approx(measured, rel=0.6, abs=2e-6), choice
            num_measured += cost.kl == pytest.approx(measured, rel=0.02, abs=3e-7)
        assert num_measured >= 1
    assert [cost.name for cost in found.uniform] == list(units[0].schemes)
    for cost in found.uniform[:2]:
        able = [unit for unit in units if cost.name in unit.schemes]
        assert cost.kl == pytest.approx(kl_of(able, cost.name), rel=0.02, abs=3e-7), cost.name
        assert cost.stored_bits == sum(unit.stored_bits(cost.name) for unit in able)


def layers(*kls: float) -> list[LayerSensitivity]:
    """Units with three choices, as large as their number."""
    found = []
    for i, kl in enumerate(kls):
        size = 100 * (i + 1)
        costs = {
            "w4a16": SchemeCost(4 * size, kl, Scheme(4)),
            "w8a16": SchemeCost(8 * size, kl / 100, Scheme(8)),
            "fp8": SchemeCost(9 * size, kl / 90, Scheme(8, kind="float")),  # never worth it
            UNQUANTIZED: SchemeCost(16 * size, 0.0, None),
        }
        found.append(LayerSensitivity(f"u{i}", (f"m{i}",), size, costs))
    return found


def predicted(search: SchemeSearch, choice: dict[str, str], power: float = 1.0) -> float:
    return sum(layer.costs[choice[layer.name]].kl ** power for layer in search.layers)


@pytest.mark.parametrize("bound", [4, 4.5, 5.0, 6.3, 8, 11.9, 16])
def test_scheme_search_within_bits_is_as_good_as_the_best(bound: float) -> None:
    search = SchemeSearch(layers(0.4, 0.01, 0.2, 0.3), target_bits=bound)
    chosen = search.next_choice()
    assert search.total_bits(chosen) <= bound * search.num_weights
    assert "fp8" not in chosen.values()
    names = ("w4a16", "w8a16", "fp8", UNQUANTIZED)
    every = [
        dict(zip(chosen, choice, strict=True)) for choice in itertools.product(names, repeat=4)
    ]
    best = min(
        predicted(search, choice)
        for choice in every
        if search.total_bits(choice) <= bound * search.num_weights
    )
    smallest = predicted(search, dict.fromkeys(chosen, "w4a16"))
    assert predicted(search, chosen) <= best + 0.25 * smallest
    assert search.record_attempt(chosen, 0.1)


@pytest.mark.parametrize("truth", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("bound", [0.001, 0.02, 0.1, 0.5, 3.0])
def test_scheme_search_ends_within_the_target_kl(truth: float, bound: float) -> None:
    """However far the KL of a choice is from the predicted one."""
    search = SchemeSearch(layers(0.4, 0.01, 0.2, 0.3), target_kl=bound)
    tried = []
    for _ in range(20):
        choice = search.next_choice()
        kl = truth * predicted(search, choice, 1.1)
        tried.append((search.total_bits(choice), kl))
        if search.record_attempt(choice, kl):
            break
    assert kl <= bound
    assert len(tried) <= 7
    assert tried[-1][0] == min(size for size, kl in tried if kl <= bound)


@pytest.mark.parametrize("bound", [0.02, 0.1, 0.3])
def test_scheme_search_accepts_no_larger_choice_than_a_good_one_it_tried(bound: float) -> None:
    """Where the KL of a choice differs from the predicted one as the choice pleases."""
    went_back = 0
    for seed in range(200):
        search = SchemeSearch(layers(0.4, 0.01, 0.2, 0.3, 0.15, 0.08), target_kl=bound)
        tried = []
        for _ in range(20):
            choice = search.next_choice()
            factor = Random(f"{seed} {sorted(choice.items())}").uniform(0.2, 2.5)
            kl = factor * predicted(search, choice)
            tried.append((search.total_bits(choice), kl))
            if search.record_attempt(choice, kl):
                break
        assert kl <= bound
        assert tried[-1][0] == min(size for size, kl in tried if kl <= bound)
        assert len(tried) <= 9
        went_back += tried[-1] in tried[:-1]
    assert went_back, "some searches end with an attempt before their last new one"


def run(source: Path, out: Path, **options: object) -> dict[str, object]:
    settings = QuantizeOptions(samples=8, seq_len=64, eval_windows=1, device="cpu", **options)
    return quantize(str(source), str(out), settings, SilentProgress())


def test_scheme_search_ends_with_an_error_if_no_choice_is_within_the_target_kl() -> None:
    """As with --lm-head or --kv, which change the model whatever the linears have."""
    search = SchemeSearch(layers(0.4, 0.01, 0.2), target_kl=0.05)
    choice = search.next_choice()
    for _ in range(100):
        if set(choice.values()) == {UNQUANTIZED}:
            break
        assert not search.record_attempt(choice, 0.06 + predicted(search, choice))
        choice = search.next_choice()
    with pytest.raises(GateError, match=r"in 16-bit the mean KL is 0.06, and --target-kl is 0.05"):
        search.record_attempt(choice, 0.06)


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
    chosen = {entry["name"]: entry["scheme"] for entry in report["sensitivity"]}
    for name, scheme in stored.items():
        size = 128 if name.endswith("down") else 64
        expected = {
            "w4a16": Scheme(4, size),
            "w4a16-g32": Scheme(4, 32),
            "w8a16": Scheme(8, size),
            UNQUANTIZED: None,
        }
        assert scheme == expected[chosen[name]], name
    assert len(set(chosen.values())) > 1
    # The bits are those of the file, with scales.
    linears = [
        info
        for name, info in checkpoint.tensors.items()
        if ".self_attn." in name or ".mlp." in name
    ]
    weights = sum(entry["weights"] for entry in report["sensitivity"])
    assert report["mean_bits"] == pytest.approx(8 * sum(info.nbytes for info in linears) / weights)
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
    assert {entry["scheme"] for entry in loose["sensitivity"]} == {"w4a16"}
    assert 4.2 < loose["mean_bits"] < 4.3


def test_scheme_search_resumes_after_an_interruption(
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
