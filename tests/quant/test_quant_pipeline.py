"""Whole runs on tiny models: quality, the bytes on disk, resuming, fused and routed layers."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_models as tiny

from llmkit.checkpoint.manifest import verify_manifest
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import GateError
from llmkit.common.progress import SilentProgress
from llmkit.model.families import checkpoint_spec, model_spec
from llmkit.model.full_forward import hidden_states, make_batch, window_logits
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model, read_parameter
from llmkit.quant import calibration_text as text
from llmkit.quant import quantize_layers
from llmkit.quant.input_stats import FIRST_TOKEN_WEIGHT
from llmkit.quant.layer_stream import LayerStream, prefetch_layers
from llmkit.quant.output_quality import score_logits
from llmkit.quant.parameter_writer import ParameterWriter, split_rows
from llmkit.quant.quantize_checkpoint import check_gates, quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_report import Report
from llmkit.quant.token_windows import calibration_windows, evaluation_windows

OPTIONS = QuantizeOptions("gptq", samples=4, seq_len=64, evaluate=False, device="cpu")


pytestmark = pytest.mark.usefixtures("short_builtin_text")


class InterruptedRunError(Exception):
    pass


class StopAfter(SilentProgress):
    """Raises when the given number of units of a stage are done."""

    def __init__(self, stage: str, units: int) -> None:
        self.stage = stage
        self.left = units
        self.current = ""

    def start(self, stage: str, total: int, unit: str) -> None:
        self.current = stage

    def advance(self, n: int = 1, note: str = "") -> None:
        if self.current == self.stage:
            self.left -= n
            if n and self.left == 0:
                raise InterruptedRunError


class Messages(SilentProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def run(source: Path, out: Path, options: QuantizeOptions = OPTIONS, **changes: object) -> Report:
    return quantize(
        str(source), str(out), dataclasses.replace(options, **changes), SilentProgress()
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("source") / "llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def llama_int4(llama: Path) -> Path:
    out = llama.parent / "int4"
    run(llama, out)
    return out


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(path.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_output(one: Path, two: Path) -> None:
    """Every file has the same bytes, except for the seconds in the report and its digest."""
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in two.iterdir())
    for name in names:
        if name in ("llmkit_report.json", "llmkit.json"):
            left, right = (json.loads((path / name).read_text()) for path in (one, two))
            for content in (left, right):
                for name_of_a_run in ("seconds", "output", "command_line"):
                    content.pop(name_of_a_run, None)
                for file in ("llmkit_report.json", "report.html"):
                    content.get("files", {}).pop(file, None)
                content.get("options", {}).pop("resume", None)
            assert left == right, name
        elif name != "report.html":
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_quantize_writes_a_complete_checkpoint(llama: Path, llama_int4: Path) -> None:
    assert verify_manifest(llama_int4) == []
    checkpoint = open_checkpoint(llama_int4)
    assert checkpoint.quantization is not None
    assert (checkpoint.quantization.format, checkpoint.quantization.scheme) == (
        "gptq",
        Scheme(4, 64),
    )
    stored = tensors(llama_int4)
    source = tensors(llama)
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
    ):
        assert torch.equal(stored[name], source[name])
        assert stored[name].dtype == torch.bfloat16
    assert stored["model.layers.0.self_attn.k_proj.qweight"].shape == (8, 32)
    assert "model.layers.0.self_attn.k_proj.weight" not in stored
    assert (llama_int4 / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert (llama_int4 / "quantize_config.json").is_file()
    assert not list(llama_int4.parent.glob("int4.*"))


def test_report_lists_every_linear(llama_int4: Path) -> None:
    report = json.loads((llama_int4 / "llmkit_report.json").read_text())
    assert [entry["name"] for entry in report["linears"]] == [
        f"layers.{i}.{name}"
        for i in range(3)
        for name in ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
    ]
    for entry in report["linears"]:
        assert 0 < entry["error"] < 0.02
        assert (entry["method"], entry["bits"], entry["group_size"], entry["tokens"]) == (
            "gptq",
            4,
            64,
            256,
        )
        assert entry["damp"] == 0.01
    assert report["fallbacks"] == []
    assert report["calibration"]["tokens"] == 256
    assert len(report["calibration"]["windows_sha256"]) == 64
    assert report["sizes"]["checkpoint_bytes"] < report["sizes"]["source_bytes"]
    assert {"quantize", "check", "hash"} <= report["seconds"].keys()


def test_loaded_model_has_the_weights_of_the_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, torch.Tensor] = {}
    original = quantize_layers._write_layer

    def spy(
        layer: quantize_layers.LayerState, storage: ParameterWriter, *, tunes_norms: bool
    ) -> None:
        used.update(
            {
                f"layers.{layer.index}.{name}.weight": one.weight
                for name, one in layer.layer.linears.items()
            }
        )
        original(layer, storage, tunes_norms=tunes_norms)

    monkeypatch.setattr(quantize_layers, "_write_layer", spy)
    run(llama, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    linears = [row for row in parameters(model_spec(checkpoint.config)) if row.is_linear]
    assert used.keys() == {row.name for row in linears}
    for row in linears:
        assert torch.equal(read_parameter(checkpoint, row, torch.float32), used[row.name]), row.name
    model = load_model(checkpoint, torch.float32)
    assert torch.equal(model.layers[1].linears["attn.qkv"].weight, used["layers.1.attn.qkv.weight"])


def structured(path: Path) -> Path:
    """A tiny model whose inputs have structure: few directions carry most of the signal."""
    from safetensors.torch import save_file

    tiny.tiny_checkpoint(path)
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    basis = torch.randn(12, 64, generator=generator)
    embedding = torch.randn(tiny.VOCAB, 12, generator=generator) @ basis * 0.3
    weights["model.embed_tokens.weight"] = embedding.bfloat16()
    weights["lm_head.weight"] = (weights["lm_head.weight"].float() * 3).bfloat16()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def test_gptq_beats_rtn_in_kl_and_reports_it(tmp_path: Path) -> None:
    source = structured(tmp_path / "source")
    gptq = run(source, tmp_path / "gptq", samples=32, seq_len=128, evaluate=True, eval_windows=4)[
        "quality"
    ]
    rtn = run(source, tmp_path / "rtn", QuantizeOptions("rtn", device="cpu", eval_windows=4))[
        "quality"
    ]
    assert gptq["windows_sha256"] == rtn["windows_sha256"]
    assert gptq["mean_kl"] < 0.7 * rtn["mean_kl"]
    assert gptq["top1"] > rtn["top1"]
    assert gptq["reference_perplexity"] == rtn["reference_perplexity"]

    reference = open_checkpoint(source)
    model = open_checkpoint(tmp_path / "gptq")
    windows = evaluation_windows(load_tokenizer(model), 4, 256)
    again = score_logits(
        *(window_logits(load_model(one, torch.float32), windows) for one in (model, reference)),
        windows,
    )
    for name, value in dataclasses.asdict(again).items():
        assert value == pytest.approx(gptq[name], rel=1e-4), name


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_moe"])
def test_layer_stream_computes_the_logits_of_the_model(tmp_path: Path, architecture: str) -> None:
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "model", architecture))
    spec = model_spec(checkpoint.config)
    windows = torch.randint(0, tiny.VOCAB, (5, 48), generator=torch.Generator().manual_seed(0))
    whole = list(window_logits(load_model(checkpoint, torch.float32), windows))
    streamed = list(LayerStream.from_checkpoint(checkpoint, spec).logits(windows))
    for one, two in zip(whole, streamed, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_prefetch_reads_one_layer_ahead() -> None:
    order: list[str] = []
    second = threading.Event()

    def read(index: int) -> str:
        order.append(f"read {index}")
        if index == 1:
            second.set()
        return f"layer {index}"

    found = []
    for layer in prefetch_layers(read, [0, 1, 2], prefetch=True):  # type: ignore[arg-type]
        if not found:
            assert second.wait(10), "the second layer is not read while the first is in use"
        found.append(layer)
    assert (
        found
        == ["layer 0", "layer 1", "layer 2"]
        == list(prefetch_layers(read, [0, 1, 2], prefetch=False))
    )  # type: ignore
    assert list(prefetch_layers(read, [], prefetch=True)) == []  # type: ignore[arg-type]


def test_calibration_uses_outputs_of_quantized_layers(llama: Path, llama_int4: Path) -> None:
    """The last layer's inputs during calibration are those of the quantized model.

    Its reported error is the one measured behind the quantized layers of the output.
    """
    checkpoint = open_checkpoint(llama_int4)
    spec = model_spec(checkpoint.config)
    report = json.loads((llama_int4 / "llmkit_report.json").read_text())
    model = load_model(checkpoint, torch.float32)
    tokenizer = load_tokenizer(checkpoint)
    windows = calibration_windows(tokenizer, text.load_text("builtin"), True, 4, 64, 0)
    seen = []
    handle = (
        model.layers[2]
        .linears["mlp.down"]
        .register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    )
    hidden_states(model, list(windows))
    handle.remove()
    inputs = torch.cat(seen)
    inputs[::64] *= FIRST_TOKEN_WEIGHT**0.5  # of windows of 64 tokens
    row = next(row for row in parameters(spec) if row.name == "layers.2.mlp.down.weight")
    dense = read_parameter(open_checkpoint(llama), row, torch.float32)
    lost = (inputs @ (dense - model.layers[2].linears["mlp.down"].weight).T).square().sum()
    share = (lost / (inputs @ dense.T).square().sum()).item()
    assert share == pytest.approx(report["linears"][-1]["error"], rel=1e-3)


@pytest.mark.parametrize("num_experts", [0, 4])
def test_auto_method_brings_the_output_closer_than_gptq(tmp_path: Path, num_experts: int) -> None:
    """Its weights correct the earlier layers' errors on the calibration text."""
    experts = {"num_local_experts": num_experts} if num_experts else {}
    architecture = "mixtral" if num_experts else "llama"
    source = tiny.tiny_checkpoint(tmp_path / "source", architecture, num_hidden_layers=4, **experts)
    options = replace(OPTIONS, samples=16, format="compressed-tensors")
    checkpoint = open_checkpoint(source)
    windows = calibration_windows(
        load_tokenizer(checkpoint), text.load_text("builtin"), True, 16, 64, 0
    )
    spec = checkpoint_spec(checkpoint)
    wanted = torch.stack(list(LayerStream.from_checkpoint(checkpoint, spec).logits(windows)))
    lost = {}
    for method in ("gptq", "auto"):
        report = run(source, tmp_path / method, replace(options, method=method))
        assert {entry["method"] for entry in report["linears"]} == {"gptq"}
        stream = LayerStream.from_checkpoint(open_checkpoint(tmp_path / method), spec)
        logits = torch.stack(list(stream.logits(windows)))
        lost[method] = ((logits - wanted).norm() / wanted.norm()).item()
    assert 0 < lost["auto"] < 0.95 * lost["gptq"]


@pytest.mark.parametrize(
    ("stage", "units", "method"),
    [
        ("quantize", 1, "gptq"),
        ("quantize", 2, "gptq"),
        ("evaluate", 4, "gptq"),
        ("quantize", 2, "auto"),
    ],
)
def test_resume_of_a_calibrated_run_gives_the_same_bytes(
    llama: Path, tmp_path: Path, stage: str, units: int, method: str
) -> None:
    options = dataclasses.replace(OPTIONS, method=method, evaluate=True, eval_windows=2)
    run(llama, tmp_path / "whole", options)
    out = tmp_path / "resumed"
    with pytest.raises(InterruptedRunError):
        quantize(str(llama), str(out), options, StopAfter(stage, units))
    assert not out.exists()
    calls = []
    original = quantize_layers._quantize_layer

    def count(*arguments: object) -> None:
        calls.append(arguments)
        original(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_layers, "_quantize_layer", count)
        run(llama, out, options, resume=True)
    assert len(calls) == (3 - units if stage == "quantize" else 0)
    assert_same_output(tmp_path / "whole", out)


@pytest.mark.parametrize("method", ["rtn", "int8", "fp16"])
def test_resume_of_rounding_gives_the_same_bytes(llama: Path, tmp_path: Path, method: str) -> None:
    options = QuantizeOptions(method, evaluate=False, device="cpu")
    run(llama, tmp_path / "whole", options)
    with pytest.raises(InterruptedRunError):
        quantize(str(llama), str(tmp_path / "resumed"), options, StopAfter("write", 7))
    run(llama, tmp_path / "resumed", options)
    assert_same_output(tmp_path / "whole", tmp_path / "resumed")


def test_seed_decides_the_bytes(llama: Path, llama_int4: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "same")
    run(llama, tmp_path / "other", seed=1)
    assert_same_output(llama_int4, tmp_path / "same")
    name = "model.safetensors"
    assert (llama_int4 / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_resume_starts_over_with_another_number_of_threads(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        quantize(str(llama), str(tmp_path / "out"), OPTIONS, StopAfter("quantize", 2))
    calls = []
    original = quantize_layers._quantize_layer
    threads = torch.get_num_threads()

    def count(*arguments: object) -> None:
        calls.append(arguments)
        original(*arguments)  # type: ignore[arg-type]

    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantize_layers, "_quantize_layer", count)
            run(llama, tmp_path / "out")
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 3, "all layers: sums of floats depend on the number of threads"


def test_resume_starts_over_with_other_options(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        quantize(str(llama), str(tmp_path / "out"), OPTIONS, StopAfter("quantize", 2))
    told: list[str] = []

    class Listener(SilentProgress):
        def message(self, text: str) -> None:
            told.append(text)

    options = dataclasses.replace(OPTIONS, group_size=32)
    report = quantize(str(llama), str(tmp_path / "out"), options, Listener())
    assert "earlier runs" not in report["seconds"]
    (replaced,) = [text for text in told if "interrupted" in text]
    assert re.match(
        r"the interrupted run had other settings \(changed: .*quantization.*\): its partial output "
        rf"{tmp_path / 'out.partial'} is removed, and this run starts from the beginning",
        replaced,
    )
    run(llama, tmp_path / "fresh", group_size=32)
    assert_same_output(tmp_path / "out", tmp_path / "fresh")


def test_resume_reports_the_time_of_the_whole_run(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        quantize(str(llama), str(tmp_path / "out"), OPTIONS, StopAfter("quantize", 2))
    journal = tmp_path / "out.partial.journal"
    with journal.open("a") as file:
        file.write('{"seconds": 1234.5}\n')  # as if the interrupted run had been a long one
    told: list[str] = []

    class Listener(SilentProgress):
        def message(self, text: str) -> None:
            told.append(text)

    report = quantize(str(llama), str(tmp_path / "out"), OPTIONS, Listener())
    assert report["seconds"]["earlier runs"] == 1234.5
    (continued,) = [text for text in told if "interrupted" in text]
    assert continued.startswith("continuing an interrupted run of 1234.5 s: ")


def test_fused_checkpoint_stays_fused(tmp_path: Path) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "phi", "phi3")
    report = run(source, tmp_path / "out")
    stored = tensors(tmp_path / "out")
    assert stored["model.layers.0.self_attn.qkv_proj.qweight"].shape == (8, 128)
    assert stored["model.layers.0.mlp.gate_up_proj.qweight"].shape == (8, 256)
    assert report["linears"][0]["tensors"] == ["model.layers.0.self_attn.qkv_proj.weight"]
    load_model(open_checkpoint(tmp_path / "out"), torch.float32)


def test_split_rows_follows_the_parts(llama: Path) -> None:
    row = next(
        row
        for row in parameters(model_spec(open_checkpoint(llama).config))
        if row.module == "layers.0.attn.qkv"
    )
    int_values = torch.arange(128, dtype=torch.uint8)[:, None].expand(128, 64)
    scales = torch.arange(128.0)[:, None]
    parts = split_rows(row, QuantizedWeight(int_values, scales, int_values[:, :1], Scheme(8, 64)))
    q, k, v = (parts[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv")
    assert [part.q[0, 0].item() for part in (q, k, v)] == [0, 64, 96]
    assert [len(part.scales) for part in (q, k, v)] == [64, 32, 32]
    assert v.scales[-1].item() == 127


def test_experts_with_few_tokens_fall_back_to_rtn(tmp_path: Path) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "moe", "qwen3_moe")
    few = run(source, tmp_path / "few", samples=1, seq_len=64)
    experts = [entry for entry in few["linears"] if ".experts." in entry["name"]]
    assert len(experts) == 2 * 4 * 2
    assert few["fallbacks"] == [entry["name"] for entry in experts]
    assert all(
        entry["method"] == "rtn" and "calibration tokens" in entry["fallback"] for entry in experts
    )
    many = run(source, tmp_path / "many", samples=16, seq_len=128)
    enough = [
        entry
        for entry in many["linears"]
        if ".experts." in entry["name"] and entry["tokens"] >= 128
    ]
    assert len(enough) > 8
    assert all(entry["method"] == "gptq" for entry in enough)
    stored = tensors(tmp_path / "many")
    assert stored["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    load_model(open_checkpoint(tmp_path / "many"), torch.float32)


def test_compressed_tensors_ignores_the_routers_of_experts(tmp_path: Path) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "moe", "mixtral")
    run(source, tmp_path / "out", QuantizeOptions("rtn", evaluate=False, device="cpu"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"][0] == "lm_head"
    assert len(config["ignore"]) == 3
    load_model(open_checkpoint(tmp_path / "out"), torch.float32)


GRID = Scheme(4, 64)
METHODS = [
    (QuantizeOptions("rtn"), "compressed-tensors", GRID),
    (QuantizeOptions("rtn", bits=8, format="gptq"), "gptq", replace(GRID, bits=8)),
    (QuantizeOptions("rtn", format="awq"), "awq", replace(GRID, symmetric=False)),
    (QuantizeOptions("rtn", symmetric=False), "compressed-tensors", replace(GRID, symmetric=False)),
    (QuantizeOptions("int8"), "compressed-tensors", Scheme(8)),
    (QuantizeOptions("int8", activations=True), "compressed-tensors", Scheme(8, inputs="token")),
    (QuantizeOptions("fp8"), "compressed-tensors", Scheme(8, kind="float", inputs="token")),
    (
        QuantizeOptions("fp8", static_activations=True),
        "compressed-tensors",
        Scheme(8, kind="float", inputs="tensor"),
    ),
    (QuantizeOptions("gptq", bits=8), "gptq", replace(GRID, bits=8)),
    (QuantizeOptions("gptq", format="awq"), "awq", replace(GRID, symmetric=False)),
    (
        QuantizeOptions("gptq", format="compressed-tensors", effort="fast"),
        "compressed-tensors",
        GRID,
    ),
    (QuantizeOptions("awq"), "awq", replace(GRID, symmetric=False)),
    (
        QuantizeOptions("awq", format="compressed-tensors"),
        "compressed-tensors",
        replace(GRID, symmetric=False),
    ),
    (QuantizeOptions("awq", format="gptq", effort="fast"), "gptq", GRID),
    (QuantizeOptions("auto"), "compressed-tensors", GRID),
    (QuantizeOptions("auto", format="awq", effort="max"), "awq", replace(GRID, symmetric=False)),
    (
        QuantizeOptions("fp8", kv="fp8"),
        "compressed-tensors",
        Scheme(8, kind="float", inputs="token"),
    ),
    (QuantizeOptions("rtn", kv="int8"), "compressed-tensors", GRID),
]


@pytest.mark.parametrize(
    ("options", "form", "scheme"), METHODS, ids=lambda value: getattr(value, "label", "")
)
def test_every_method_gives_a_close_model_with_the_reported_quality(
    llama: Path, tmp_path: Path, options: QuantizeOptions, form: str, scheme: Scheme
) -> None:
    options = dataclasses.replace(options, samples=4, seq_len=64, eval_windows=1, device="cpu")
    report = run(llama, tmp_path / "out", options)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.quantization is not None
    assert (checkpoint.quantization.format, checkpoint.quantization.scheme) == (form, scheme)
    assert checkpoint.quantization.kv == options.kv
    limit = 1.0 if scheme.bits == 4 else 2e-3 if scheme.kind == "int" else 5e-3
    assert all(0 < entry["error"] < limit for entry in report["linears"])
    assert 0 <= report["quality"]["mean_kl"] < limit
    assert verify_manifest(tmp_path / "out") == []

    model = load_model(checkpoint, torch.float32)
    reference = load_model(open_checkpoint(llama), torch.float32)
    windows = evaluation_windows(load_tokenizer(checkpoint), 1, 256)
    again = score_logits(window_logits(model, windows), window_logits(reference, windows), windows)
    assert again.mean_kl == pytest.approx(report["quality"]["mean_kl"], rel=1e-3, abs=1e-7)
    rounded = [
        linear.activation_quant for layer in model.layers for linear in layer.linears.values()
    ]
    assert all((rounding is not None) == (scheme.inputs != "none") for rounding in rounded)
    assert all(
        set(layer.activation_quant) >= ({"attn.k", "attn.v"} if options.kv else set())
        for layer in model.layers
    )


def test_kv_cache_is_calibrated_without_quantized_weights(llama: Path, tmp_path: Path) -> None:
    """Nothing but the scales is added, and the model rounds its keys and values by them."""
    report = run(
        llama,
        tmp_path / "out",
        QuantizeOptions("bf16", kv="fp8", samples=4, seq_len=64, device="cpu"),
    )
    stored = tensors(tmp_path / "out")
    source = tensors(llama)
    scales = {f"model.layers.{layer}.self_attn.{name}_scale" for layer in range(3) for name in "kv"}
    assert stored.keys() == source.keys() | scales
    assert all(torch.equal(stored[name], source[name]) for name in source)
    assert 0 < report["quality"]["mean_kl"] < 1e-2
    seen = {}
    model = load_model(open_checkpoint(tmp_path / "out"), torch.float32)
    tokens = calibration_windows(
        load_tokenizer(open_checkpoint(llama)), text.load_text("builtin"), True, 4, 64, 0
    )
    positions, batch = make_batch(model, [64] * 4)
    caches = [model.new_kv_cache(batch.num_blocks) for _ in model.layers]
    model(tokens.flatten(), positions, batch, caches)
    seen = caches[0].kv.chunk(2)[0]
    scale = stored["model.layers.0.self_attn.k_scale"]
    assert seen.abs().max() / 448 == pytest.approx(scale.item(), rel=0.07)
    steps = seen / scale
    torch.testing.assert_close(steps.to(torch.float8_e4m3fn).float(), steps)


def test_ignored_layers_and_modules_are_not_quantized(llama: Path, tmp_path: Path) -> None:
    for form in ("gptq", "awq", "compressed-tensors"):
        options = QuantizeOptions(
            "rtn",
            format=form,
            keep=r"0\.self_attn\.q_proj|down_proj",
            layers="0-1",
            eval_windows=1,
            device="cpu",
        )
        report = run(llama, tmp_path / form, options)
        stored = tensors(tmp_path / form)
        source = tensors(llama)
        kept = [
            name
            for name, value in source.items()
            if "layers.2." in name
            or "down_proj" in name
            or ("layers.0.self_attn" in name and "o_proj" not in name)
        ]
        assert all(torch.equal(stored[name], source[name]) for name in kept)
        assert {entry["name"] for entry in report["linears"]} == {
            "layers.0.attn.o",
            "layers.0.mlp.gate_up",
            "layers.1.attn.qkv",
            "layers.1.attn.o",
            "layers.1.mlp.gate_up",
        }
        assert report["quality"]["mean_kl"] > 0
        load_model(open_checkpoint(tmp_path / form), torch.float32)


@pytest.mark.parametrize("method", ["awq", "gptq", "int8"])
def test_offload_to_disk_gives_the_same_bytes(llama: Path, tmp_path: Path, method: str) -> None:
    options = QuantizeOptions(
        method, activations=method == "int8", samples=40, seq_len=256, evaluate=False, device="cpu"
    )
    run(llama, tmp_path / "memory", options, offload="memory")
    run(llama, tmp_path / "disk", options, offload="disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]
    name = "model.safetensors"
    assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
    assert not (tmp_path / "disk" / "hidden").exists()


def test_gates_name_the_figure_and_the_limit(llama_int4: Path) -> None:
    report = json.loads((llama_int4 / "llmkit_report.json").read_text())
    report["quality"] = {"mean_kl": 0.25, "perplexity": 12.0, "reference_perplexity": 10.0}
    check_gates(report, QuantizeOptions("gptq", max_kl=0.25, max_ppl_ratio=1.2))
    with pytest.raises(
        GateError,
        match=r"the mean KL is 0\.25, above 0\.2; the perplexity ratio is 1\.2, above 1\.1",
    ):
        check_gates(report, QuantizeOptions("gptq", max_kl=0.2, max_ppl_ratio=1.1))
    report["quality"]["mean_kl"] = float("nan")
    with pytest.raises(GateError, match="the mean KL is nan"):
        check_gates(report, QuantizeOptions("gptq", max_kl=0.2))


@pytest.mark.parametrize(("method", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_cast_equals_that_of_torch(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "source", dtype="float32")
    report = run(source, tmp_path / "out", QuantizeOptions(method, evaluate=False, device="cpu"))
    before = tensors(source)
    after = tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(dtype)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    assert "quantization_config" not in config
    assert report["overflows"] == {}
    assert report["calibration"] is None


def change(path: Path, name: str, value: torch.Tensor) -> Path:
    from safetensors.torch import save_file

    weights = load_file(path / "model.safetensors")
    weights[name] = value.to(weights[name].dtype)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def test_overflows_of_float16_are_counted_and_clamped(tmp_path: Path) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "source")
    weight = torch.zeros(64)
    weight[3] = 1e6
    weight[4] = -1e6
    weight[5] = 65504
    change(source, "model.norm.weight", weight)
    report = run(source, tmp_path / "out", QuantizeOptions("fp16", evaluate=False, device="cpu"))
    assert report["overflows"]["model.norm.weight"] >= 2
    stored = tensors(tmp_path / "out")["model.norm.weight"]
    assert stored[3:5].tolist() == [65504, -65504]


def test_float32_sources_are_written_in_bfloat16(tmp_path: Path) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "source", dtype="float32")
    run(source, tmp_path / "out")
    stored = tensors(tmp_path / "out")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_float16_sources_stay_float16(tmp_path: Path) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "source", dtype="float16")
    run(source, tmp_path / "out", QuantizeOptions("int8", evaluate=False, device="cpu"))
    assert tensors(tmp_path / "out")["model.norm.weight"].dtype == torch.float16


def test_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    report = run(llama, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    plan = report["plan"]
    assert report["group_size"] == 64
    assert 0 < plan["checkpoint_bytes"] < plan["disk_bytes"]
    assert plan["memory_bytes"] > plan["checkpoint_bytes"]
    more = run(llama, tmp_path / "out", dry_run=True, samples=40_000, effort="max", evaluate=True)[
        "plan"
    ]
    assert 0 < plan["seconds"] < more["seconds"]
    run(llama, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == plan["disk_bytes"]


def test_calibration_with_too_few_windows_uses_all_and_says_so(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 40)
    messages = Messages()
    options = dataclasses.replace(OPTIONS, calibration=str(path), samples=100)
    report = quantize(str(llama), str(tmp_path / "out"), options, messages)
    used = report["calibration"]["windows"]
    assert 1 <= used < 100
    assert any(
        f"has {used} windows of 64 tokens" in said and "100 asked for" in said
        for said in messages.texts
    )
    assert report["calibration"]["source"] == str(path)


def test_calibration_windows_are_no_longer_than_the_model_allows(
    llama: Path, tmp_path: Path
) -> None:
    messages = Messages()
    report = quantize(
        str(llama), str(tmp_path / "out"), dataclasses.replace(OPTIONS, seq_len=2048), messages
    )
    assert report["calibration"]["window_tokens"] == 256
    assert any("256 tokens" in said for said in messages.texts)
