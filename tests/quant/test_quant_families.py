"""`quantize` on a model of each piece in which families differ from Llama."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.tiny_models import VOCAB, tiny_checkpoint
from support.tiny_quantized import PIECES, dense_checkpoint, piece_checkpoint, stored_tensors

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.model import families
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.mla import LatentLinear
from llmkit.model.spec import GatedDeltaNetSpec, ModelSpec
from llmkit.model.weight_loader import load_model
from llmkit.quant import calibrate_layer, quantize_layers
from llmkit.quant.calibration_text import load_text
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_report import Report
from llmkit.quant.smoothing_mappings import SmoothingMapping, apply_scales, find_mapping
from llmkit.quant.token_windows import calibration_windows
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

pytestmark = pytest.mark.usefixtures("short_builtin_text")

BASE = QuantizeOptions("rtn", samples=4, seq_len=64, evaluate=False, device="cpu")
METHODS = {
    "gptq": replace(BASE, method="gptq", group_size=16),
    "awq": replace(BASE, method="awq", group_size=32),
    "fp8": replace(BASE, method="fp8"),
    "int8": replace(BASE, method="int8", activations=True),
}
# How far a method may move the logits of these models, relative to the logits.
MAX_ERROR = {"gptq": 0.5, "awq": 0.4, "fp8": 0.2, "int8": 0.1}
# A gated delta net normalizes its output: small errors of small outputs are large afterwards.
# Keys and values of latent attention are products of products.
ERROR_FACTORS = {
    "gated delta net, gate beside each query": 2.0,
    "projections by key head": 2.0,
    "latent attention": 1.5,
}
# Every piece takes AWQ, which moves scales between layers; these take one of the other methods, in
# turn. The other pairs are slow tests.
ALL_METHODS = (
    "norms with offset and bias",
    "groups of experts, shared expert",
    "shared keys, input of each layer",
    "gated delta net, gate beside each query",
    "latent attention",
    "one block each layer, experts without gate",
    "short convolutions",
)
SECOND_METHODS = dict(zip(ALL_METHODS, cycle(("gptq", "fp8", "int8")), strict=False))
CASES = [
    pytest.param(
        piece,
        method,
        marks=() if method in ("awq", SECOND_METHODS.get(piece)) else pytest.mark.slow,
    )
    for piece in PIECES
    for method in METHODS
]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("pieces")

    def made(name: str) -> Path:
        path = folder / name
        return path if path.exists() else piece_checkpoint(name, path)

    return made


def run(source: Path, out: Path, options: QuantizeOptions) -> Report:
    return quantize(str(source), str(out), options, SilentProgress())


def windows(count: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(1))


def transformers_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        logits: torch.Tensor = oracle(tokens, use_cache=False).logits
    return logits


def logits_without_rounded_inputs(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        for linear in layer.linears.values():
            linear.activation_quant = None
    return torch.stack(list(window_logits(model, tokens)))


@pytest.mark.parametrize(("piece", "method"), CASES)
def test_quantized_model_is_close_and_equals_transformers_with_its_dense_weights(
    pieces: Callable[[str], Path], tmp_path: Path, piece: str, method: str
) -> None:
    source = pieces(piece)
    report = run(source, tmp_path / "out", METHODS[method])
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = checkpoint_spec(checkpoint)
    assert {entry["name"].split(".")[1] for entry in report["linears"]} == {
        str(index) for index in range(len(spec.layers))
    }
    tokens = windows()
    dense = dense_checkpoint(checkpoint, tmp_path / "dense")
    wanted = transformers_logits(dense, tokens)
    streamed = torch.stack(list(LayerStream.from_checkpoint(checkpoint, spec).logits(tokens)))
    model = load_model(checkpoint, torch.float32)
    loaded = logits_without_rounded_inputs(model, tokens)
    torch.testing.assert_close(loaded, wanted, atol=1e-4, rtol=1e-4)
    before = load_model(open_checkpoint(source), torch.float32)
    reference = torch.stack(list(window_logits(before, tokens)))
    error = (streamed - reference).norm() / reference.norm()
    assert 0 < error < MAX_ERROR[method] * ERROR_FACTORS.get(piece, 1.0)


def test_resume_of_latent_attention_with_rounded_inputs_gives_the_same_bytes(
    pieces: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of kv_b are not rounded, neither while its layer is quantized nor afterwards."""
    source = pieces("latent attention")
    run(source, tmp_path / "whole", METHODS["int8"])
    write_layer = quantize_layers._write_layer

    def stop_in_the_second_layer(state: Any, writer: Any, *, tunes_norms: bool) -> None:
        if state.index == 1:
            raise KeyboardInterrupt
        write_layer(state, writer, tunes_norms=tunes_norms)

    with monkeypatch.context() as patch:
        patch.setattr(quantize_layers, "_write_layer", stop_in_the_second_layer)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", METHODS["int8"])
    run(source, tmp_path / "out", METHODS["int8"])
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "piece",
    [
        "norms before and after, fused gate_up",
        "shared keys, input of each layer",
        "groups of experts, shared expert",
    ],
)
def test_recorded_inputs_of_last_linears_change_no_byte(
    pieces: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    piece: str,
) -> None:
    finished: list[object] = []
    finish = calibrate_layer._from_last_linear
    with monkeypatch.context() as patch:
        patch.setattr(
            calibrate_layer,
            "_from_last_linear",
            lambda *arguments: finished.append(arguments) or finish(*arguments),
        )
        run(pieces(piece), tmp_path / "recorded", METHODS["gptq"])
    assert finished
    monkeypatch.setattr(calibrate_layer, "RECORDED_BYTES", 0)
    run(pieces(piece), tmp_path / "computed again", METHODS["gptq"])
    one, two = (stored_tensors(tmp_path / name) for name in ("recorded", "computed again"))
    assert all(one[name].equal(two[name]) for name in one.keys() | two.keys())


def test_quantized_latent_attention_is_served_in_the_absorbed_form(
    pieces: Callable[[str], Path], tmp_path: Path
) -> None:
    run(pieces("latent attention"), tmp_path / "out", METHODS["gptq"])
    checkpoint = open_checkpoint(tmp_path / "out")
    dense, served = (load_model(checkpoint, torch.float32, packed=kind) for kind in (False, True))
    assert isinstance(served, Decoder)
    assert isinstance(served.layers[0].linears["attn.kv_b"], LatentLinear)
    tokens = windows()
    expected, answer = (torch.stack(list(window_logits(m, tokens))) for m in (dense, served))
    torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)


def smoothable(stream: LayerStream, index: int) -> list[SmoothingMapping]:
    layer = stream.layer(index)
    found = [find_mapping(layer, row) for row in stream.layer_parameters(index) if row.is_linear]
    return [mapping for mapping in found if mapping is not None]


# What each kind of mapping is, by piece: from a norm, from v to o, from up to down. Of the last
# layer, which has experts where a layer has them.
MAPPINGS = {
    "layer norms with bias, ungated MLP": {"attn.qkv", "attn.o", "mlp.up"},
    "norms with offset and bias": {"attn.qkv", "attn.o", "mlp.up"},
    "parallel block": {"attn.o", "mlp.down"},
    "norms before and after, fused gate_up": {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"},
    "xIELU": {"attn.qkv", "attn.o", "mlp.up"},
    "norms after, no positions": {"attn.o", "mlp.down"},
    "attention gate": {"attn.o", "mlp.experts.3.down", "mlp.shared_expert.down"},
    "groups of experts, shared expert": {
        "attn.qkv",
        "attn.o",
        "mlp.experts.3.down",
        "mlp.shared_expert.down",
    },
    "gate of the shared expert": {
        "attn.qkv",
        "attn.o",
        "mlp.experts.3.down",
        "mlp.shared_expert.down",
    },
    "bias that chooses experts": {
        "attn.qkv",
        "attn.o",
        "mlp.experts.3.down",
        "mlp.shared_expert.down",
    },
    "gated delta net, gate beside each query": {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"},
    "projections by key head": {
        "attn.qkv",
        "attn.o",
        "mlp.experts.3.down",
        "mlp.shared_expert.down",
    },
    "latent attention": {
        "attn.qkv_a",
        "attn.q_b",
        "attn.kv_b",
        "mlp.experts.3.down",
        "mlp.shared_expert.down",
    },
    "one block each layer, experts without gate": {"mlp.up"},
    "short convolutions": {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"},
    "sizes by layer": {"attn.qkv", "mlp.gate_up", "mlp.down"},
    "shared keys, input of each layer": {"attn.qkv", "mlp.gate_up", "mlp.down"},
}


@pytest.mark.parametrize("piece", PIECES)
def test_apply_scales_keeps_the_layers_output(pieces: Callable[[str], Path], piece: str) -> None:
    checkpoint = open_checkpoint(pieces(piece))
    spec = checkpoint_spec(checkpoint)
    stream = LayerStream.from_checkpoint(checkpoint, spec)
    generator = torch.Generator().manual_seed(3)
    batches = stream.embed(windows(2, 24))
    hidden = torch.randn(48, spec.hidden_size, generator=generator)

    def update(layer: DecoderLayer) -> torch.Tensor:
        return layer(hidden, *batches[0].layer_inputs(layer.index)) - hidden

    for index in range(len(spec.layers)):
        wanted = update(stream.layer(index))
        layer = stream.layer(index)
        mappings = smoothable(stream, index)
        for mapping in mappings:
            norm = layer.norms.get(mapping.smooth_layer)
            if norm is None:
                size = len(layer.linears[mapping.smooth_layer].weight[mapping.rows])
            else:
                size = len(norm)
            scales = torch.rand(size, generator=generator) * 1.5 + 0.5
            names = (f"{mapping.smooth_layer}.{kind}" for kind in ("weight", "bias"))
            apply_scales(layer, mapping, scales, dict.fromkeys(names, torch.float32))
            difference = (update(layer) - wanted).abs().max()
            assert difference <= 1e-4 * wanted.abs().max(), (mapping, difference)
        stream.run_layer(stream.layer(index), batches)  # later layers may read its keys
    expected = MAPPINGS[piece]
    linears = {mapping.linear for mapping in mappings}
    assert {name for name in linears if not name.startswith("mlp.experts")} | {
        name for name in linears if name == "mlp.experts.3.down"
    } == expected


@pytest.mark.parametrize("piece", ["layer norms with bias, ungated MLP", *ALL_METHODS[:1]])
def test_apply_scales_is_exact_in_float64_for_a_norm_with_bias(
    pieces: Callable[[str], Path], piece: str
) -> None:
    checkpoint = open_checkpoint(pieces(piece))
    stream = LayerStream.from_checkpoint(checkpoint, checkpoint_spec(checkpoint))
    normed = torch.randn(50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def output(layer: DecoderLayer, mapping: SmoothingMapping) -> torch.Tensor:
        norm = layer.norms[mapping.smooth_layer].double()
        bias = layer.norm_biases[mapping.smooth_layer].double()
        return (normed * norm + bias) @ layer.linears[mapping.linear].weight.double().T

    mappings = [mapping for mapping in smoothable(stream, 0) if mapping.rows is None]
    assert {mapping.linear for mapping in mappings} == {"attn.qkv", "mlp.up"}
    for mapping in mappings:
        layer = stream.layer(0)
        before = output(layer, mapping)
        old_bias = layer.norm_biases[mapping.smooth_layer]
        dtypes = dict.fromkeys(
            (f"{mapping.smooth_layer}.weight", f"{mapping.smooth_layer}.bias"), torch.float64
        )
        apply_scales(layer, mapping, torch.linspace(0.1, 10, 64, dtype=torch.float64), dtypes)
        assert not torch.equal(layer.norm_biases[mapping.smooth_layer], old_bias)
        torch.testing.assert_close(output(layer, mapping), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("piece", "norm", "linears"),
    [
        ("layer norms with bias, ungated MLP", "input_layernorm", ("q_proj", "k_proj")),
        ("norms with offset and bias", "post_attention_layernorm", ("up_proj",)),
    ],
)
def test_smoothquant_writes_the_weight_and_the_bias_of_a_norm(
    pieces: Callable[[str], Path],
    tmp_path: Path,
    piece: str,
    norm: str,
    linears: tuple[str, ...],
) -> None:
    """The norm's output has outliers, so that scales move. The products stay the same."""
    shutil.copytree(pieces(piece), tmp_path / "source")
    tensors = stored_tensors(tmp_path / "source")
    for layer in range(2):
        tensors[f"model.layers.{layer}.{norm}.weight"][::16] *= 50
        tensors[f"model.layers.{layer}.{norm}.bias"] *= 5
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    run(tmp_path / "source", tmp_path / "out", METHODS["int8"])
    dense_checkpoint(open_checkpoint(tmp_path / "out"), tmp_path / "dense")
    dense = stored_tensors(tmp_path / "dense")
    offset = 1.0 if "offset" in piece else 0.0
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        changed = []
        for kind in ("weight", "bias"):
            added = offset if kind == "weight" else 0.0
            old = tensors[f"{prefix}{norm}.{kind}"].float() + added
            new = dense[f"{prefix}{norm}.{kind}"] + added
            changed.append(bool((new / old - 1).abs().max() > 0.5))
            for name, weight in tensors.items():
                if name.startswith(prefix) and name.removesuffix(".weight").endswith(linears):
                    before = weight.float() * old
                    after = dense[name] * new
                    assert (after - before).norm() < 0.05 * before.norm(), name
        assert changed == [True, True]


def test_static_kv_scales_of_a_hybrid_serve(pieces: Callable[[str], Path], tmp_path: Path) -> None:
    """Its recurrent layers have no keys and values, and so no scales."""
    kept = replace(BASE, method="fp8", static_activations=True, kv="fp8")
    run(pieces("gated delta net, gate beside each query"), tmp_path / "out", kept)
    checkpoint = open_checkpoint(tmp_path / "out")
    scales = [name for name in checkpoint.tensors if name.endswith(("k_scale", "v_scale"))]
    assert [name.split(".")[2] for name in scales] == ["1", "1"]
    engine = load_engine(
        tmp_path / "out",
        EngineOptions(device="cpu", kv_cache_memory=1 << 20, kv_cache_dtype="fp8"),
    )
    assert engine.model.new_kv_cache(1, kv_cache_dtype="fp8").scales is None
    (answer,) = engine.generate(
        [[5, 6, 7, 8] * 8], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    )
    assert len(answer) == 4


def test_biases_that_choose_experts_stay_in_float32(tmp_path: Path) -> None:
    """Rounded to 16 bits, the close scores of two experts would change places."""
    source = piece_checkpoint(ALL_METHODS[1], tmp_path / "source")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = stored_tensors(source)
    bias = torch.linspace(7.0, 7.01, 8)
    tensors[name] = bias
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for method in ("fp16", "gptq"):
        run(source, tmp_path / method, replace(BASE, method=method))
        assert torch.equal(stored_tensors(tmp_path / method)[name], bias), method
    (layer,) = load_model(open_checkpoint(tmp_path / "gptq"), torch.bfloat16).layers[1:]
    assert torch.equal(layer.vectors["mlp.router.correction_bias"], bias)


def test_report_counts_the_tokens_of_experts_and_names_starved_ones(tmp_path: Path) -> None:
    """With groups of experts and a shared one: the tokens are those that transformers' router
    sends to each expert, and only experts with too few are rounded to nearest."""
    source = piece_checkpoint(ALL_METHODS[1], tmp_path / "source")
    tensors = stored_tensors(source)
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.tensor(
        [0.0, 0.0, 0.0, 0.0, -9.0, 0.05, 0.0, 0.1]
    )
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    # Attention and the first layer stay as they are, so that the router sees the source's inputs.
    options = replace(BASE, method="gptq", group_size=16, samples=8, layers="1", keep="self_attn")
    report = run(source, tmp_path / "out", options)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", dtype=torch.float32
    )
    chosen: list[torch.Tensor] = []
    oracle.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda _, inputs: chosen.append(inputs[1])
    )
    tokens = calibration_windows(
        load_tokenizer(open_checkpoint(source)), load_text("builtin"), True, 8, 64, 0
    )
    with torch.inference_mode():
        oracle(tokens, use_cache=False)
    counts = torch.cat(chosen).flatten().bincount(minlength=8).tolist()
    assert sum(counts) == 3 * 8 * 64
    entries = {entry["name"]: entry for entry in report["linears"]}
    for linear in ("gate_up", "down"):
        found = [entries[f"layers.1.mlp.experts.{expert}.{linear}"] for expert in range(8)]
        assert [entry["tokens"] for entry in found] == counts
        starved = [entry["name"] for entry in found if entry["tokens"] < 128]
        assert f"layers.1.mlp.experts.4.{linear}" in starved
        assert 0 < len(starved) < 8
        assert [name for name in report["fallbacks"] if name.endswith(linear)] == starved
        shared = entries[f"layers.1.mlp.shared_expert.{linear}"]
        assert (shared["tokens"], shared["method"], shared["fallback"]) == (512, "gptq", None)
    assert entries["layers.1.mlp.experts.4.down"]["fallback"] == (
        "saw 0 calibration tokens of the 128 an expert needs"
    )


def test_shared_expert_needs_no_more_tokens_than_other_linears(
    pieces: Callable[[str], Path], tmp_path: Path
) -> None:
    options = replace(METHODS["gptq"], samples=1)
    report = run(pieces(ALL_METHODS[1]), tmp_path / "out", options)
    methods = {entry["name"]: entry["method"] for entry in report["linears"]}
    assert methods["layers.1.mlp.shared_expert.down"] == methods["layers.1.attn.o"] == "gptq"
    assert methods["layers.1.mlp.experts.0.down"] == "rtn"


def test_check_engine_refuses_what_engines_do_not_load_of_a_family(
    pieces: Callable[[str], Path], tmp_path: Path
) -> None:
    glm4 = pieces("norms before and after, fused gate_up")
    gemma4 = pieces("sizes by layer")
    moe = pieces(ALL_METHODS[1])
    for source, engine, options, message in (
        (glm4, "vllm", replace(BASE, method="gptq"), r"gate_up_proj .* Glm4.*--format awq"),
        (gemma4, "vllm", replace(BASE, method="gptq"), r"v_proj .* Gemma4.*--format awq"),
        (moe, "transformers", METHODS["int8"], r"INT8 experts.*--method fp8"),
    ):
        with pytest.raises(UsageError, match=message):
            run(source, tmp_path / "out", replace(options, engine=engine, dry_run=True))
        run(source, tmp_path / "out", replace(options, dry_run=True))
    awq = replace(METHODS["awq"], engine="vllm", dry_run=True)
    run(glm4, tmp_path / "out", awq)
    kept = replace(METHODS["int8"], engine="transformers", keep=r"\.experts\.", dry_run=True)
    run(moe, tmp_path / "out", kept)


@pytest.mark.parametrize(
    "piece", ["projections by key head", "gated delta net, gate beside each query"]
)
def test_gates_of_a_delta_net_that_others_quantized_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: str
) -> None:
    """llmkit's quantizers leave them in 16 bits; here they do not."""
    source = piece_checkpoint(piece, tmp_path / "source", dtype="float32")
    read_as_stored = families._with_stored_gates
    with monkeypatch.context() as patch:

        def quantized(spec: ModelSpec, tensors: Collection[str]) -> ModelSpec:
            spec = read_as_stored(spec, tensors)
            assert isinstance(spec.recurrent, GatedDeltaNetSpec)
            return replace(spec, recurrent=replace(spec.recurrent, quantized_gates=True))

        patch.setattr(families, "_with_stored_gates", quantized)
        quantize(str(source), str(tmp_path / "out"), replace(BASE, group_size=16), SilentProgress())
    checkpoint = open_checkpoint(tmp_path / "out")
    gates = [name for name in checkpoint.tensors if re.search(r"in_proj_b?a?\.", name)]
    assert gates and not any(name.endswith(".weight") for name in gates)
    recurrent = checkpoint_spec(checkpoint).recurrent
    assert isinstance(recurrent, GatedDeltaNetSpec) and recurrent.quantized_gates
    dense = dense_checkpoint(checkpoint, tmp_path / "dense")
    options = EngineOptions(device="cpu", max_model_len=64, cpu_activations="float32")
    assert "quantized_gates=False" in str(checkpoint_spec(open_checkpoint(dense)).recurrent)
    answers = [
        load_engine(path, options).generate(
            [[5, 6, 7], [9] * 20], SamplingParams(temperature=0.0, max_tokens=8)
        )
        for path in (tmp_path / "out", dense)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("mamba2", {"num_heads": 8, "head_dim": 16, "expand": 2}, "this one has no attention"),
        ("deepseek_v3", PIECES["latent attention"][1], "caches a latent for each token"),
    ],
)
def test_quantized_kv_cache_of_a_model_without_keys_and_values_is_refused(
    tmp_path: Path, kind: str, config: dict[str, Any], message: str
) -> None:
    source = tiny_checkpoint(tmp_path / "source", kind, **config)
    with pytest.raises(InputError, match=rf"--kv int8 is not possible .* {message}.* Leave out"):
        run(source, tmp_path / "out", replace(BASE, kv="int8"))
