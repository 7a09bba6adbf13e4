"""Mixed precision: sensitivities against the model itself, the choice of bits, and whole runs within their bounds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import tiny
import torch

from llmkit.checkpoint.progress import SilentProgress
from llmkit.checkpoint.quantized import Scheme
from llmkit.checkpoint.source import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.model.families import model_spec
from llmkit.model.layout import parameters
from llmkit.model.loader import load_model, scheme_of
from llmkit.model.sequence import logits_of
from llmkit.quant.grid import FULL_SEARCH, round_to_nearest
from llmkit.quant.methods import Choice, quantization_of
from llmkit.quant.mixed import BITS, BitSearch, Unit, sensitivity
from llmkit.quant.pipeline import site_of
from llmkit.quant.quality import score_logits
from llmkit.quant.quantize import QuantizeOptions, quantize
from llmkit.quant.stream import LayerStream
from llmkit.quant.tokens import evaluation_windows

pytestmark = pytest.mark.usefixtures("short_builtin_text")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("source") / "llama", num_hidden_layers=3)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_sensitivity_is_the_kl_of_rounding_one_linear(tmp_path: Path, architecture: str) -> None:
    """Against a model in which only that linear (of all experts) was rounded."""
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "model", architecture))
    spec = model_spec(checkpoint.config)
    quantization = quantization_of(spec, Choice("rtn", mixed=True))
    sites = {}
    for row in parameters(spec):
        if (site := site_of(row, quantization)) is not None:
            sites.setdefault(row.stages[0], []).append(site)
    windows = torch.randint(0, tiny.VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    units = sensitivity(LayerStream.of(checkpoint, spec), sites, windows, SilentProgress())
    assert sorted(module for unit in units for module in unit.modules) == sorted(
        row.module for row in parameters(spec) if row.linear
    )
    assert sum(unit.weights for unit in units) == sum(
        row.shape[0] * row.shape[1] for row in parameters(spec) if row.linear
    )
    reference = load_model(checkpoint, torch.float32)
    for unit in units[:2] + units[-2:]:
        model = load_model(checkpoint, torch.float32)
        for site in itertools.chain(*sites.values()):
            if site.row.module in unit.modules:
                linear = model.layers[site.row.stages[0]].linears[site.name]
                linear.weight = round_to_nearest(linear.weight, site.scheme, site.dtype, FULL_SEARCH).dequantize()
        kl = score_logits(logits_of(model, windows), logits_of(reference, windows), windows).mean_kl
        assert unit.kl[4] == pytest.approx(kl, rel=0.02, abs=2e-7)
        assert 0 <= unit.kl[8] < 0.1 * unit.kl[4]
    assert next(logits_of(reference, windows)).shape == (40, tiny.VOCAB)


def units(*kls: float) -> list[Unit]:
    return [Unit(f"u{i}", (f"m{i}",), 100 * (i + 1), {4: kl, 8: kl / 100, 16: 0.0}) for i, kl in enumerate(kls)]


@pytest.mark.parametrize("bound", [4, 4.5, 5.0, 6.3, 8, 11.9, 16])
def test_a_choice_within_bits_is_as_good_as_the_best(bound: float) -> None:
    search = BitSearch(units(0.4, 0.01, 0.2, 0.3), target_bits=bound)
    bits = search.choice()
    assert search.size(bits) <= bound * search.weights

    def kl(choice: dict[str, int]) -> float:
        return sum(unit.kl[choice[unit.name]] for unit in search.units)

    every = [dict(zip(bits, choice, strict=True)) for choice in itertools.product(BITS, repeat=4)]
    best = min(kl(choice) for choice in every if search.size(choice) <= bound * search.weights)
    assert kl(bits) <= best + 0.25 * kl(dict.fromkeys(bits, 4))
    assert search.tell(bits, 0.1)


@pytest.mark.parametrize("truth", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("bound", [0.001, 0.02, 0.1, 0.5, 3.0])
def test_the_search_ends_within_the_bound(truth: float, bound: float) -> None:
    """Whatever a choice really gives over what was predicted, and however that depends on the choice."""
    search = BitSearch(units(0.4, 0.01, 0.2, 0.3), target_kl=bound)
    tried = []
    for _ in range(20):
        bits = search.choice()
        kl = truth * sum(unit.kl[bits[unit.name]] ** 1.1 for unit in search.units)
        tried.append((search.size(bits), kl))
        if search.tell(bits, kl):
            break
    assert kl <= bound
    assert len(tried) <= 7
    assert tried[-1][0] == min(size for size, kl in tried if kl <= bound)


def run(source: Path, out: Path, **options: object) -> dict[str, object]:
    settings = QuantizeOptions(samples=8, seq_len=64, eval_windows=1, device="cpu", **options)  # type: ignore[arg-type]
    return quantize(str(source), str(out), settings, SilentProgress())


def test_target_bits_is_kept_and_the_checkpoint_says_which(llama: Path, tmp_path: Path) -> None:
    report = run(llama, tmp_path / "out", method="gptq", target_bits=6.0)
    assert report["format"] == "compressed-tensors"
    assert 5.0 < report["mean_bits"] <= 6.0
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = model_spec(checkpoint.config)
    stored = {
        row.module: scheme_of(row, row.tensors[0], checkpoint.quantization) for row in parameters(spec) if row.linear
    }
    chosen = {entry["name"]: entry["bits"] for entry in report["sensitivity"]}
    assert {name: scheme.bits if scheme else 16 for name, scheme in stored.items()} == chosen
    assert len(set(chosen.values())) > 1
    assert {entry["name"]: entry["bits"] for entry in report["linears"]}.items() <= chosen.items()
    model, reference = load_model(checkpoint, torch.float32), load_model(open_checkpoint(llama), torch.float32)
    windows = evaluation_windows(load_tokenizer(checkpoint), 1, 256)
    again = score_logits(logits_of(model, windows), logits_of(reference, windows), windows)
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


def test_an_interrupted_search_goes_on_where_it_was(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(llama, tmp_path / "whole", method="gptq", target_bits=5.0)
    from llmkit.quant import quantize as module

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "out", method="gptq", target_bits=5.0)
    assert json.loads((tmp_path / "out.partial.search").read_text())["units"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "sensitivity", lambda *_: pytest.fail("measured again"))
        again = run(llama, tmp_path / "out", method="gptq", target_bits=5.0)
    assert again["sensitivity"] == whole["sensitivity"]
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob("*.search"))


def test_mixed_schemes_of_one_model_have_one_group_size(llama: Path) -> None:
    quantization = quantization_of(model_spec(open_checkpoint(llama).config), Choice("awq", mixed=True))
    assert quantization is not None
    assert quantization.scheme == Scheme(4, 64, symmetric=False)
