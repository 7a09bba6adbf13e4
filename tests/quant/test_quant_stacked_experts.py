"""`quantize` of checkpoints that store all experts of a layer in one tensor: they are unstacked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.mxfp4_files import write_gpt_oss
from support.tiny_families import family_oracle
from support.tiny_models import VOCAB, write_tokenizer
from support.tiny_quantized import stored_tensors
from support.tiny_wrappers import save_wrapper, tiny_wrapper

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.model.families import checkpoint_spec, unstack_experts
from llmkit.model.full_forward import window_logits
from llmkit.model.parameter_table import parameters
from llmkit.model.unstacked_experts import with_unstacked_experts
from llmkit.model.weight_loader import load_model, read_parameter
from llmkit.quant.calibration_text import load_text
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_report import Report
from llmkit.quant.token_windows import calibration_windows
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.parallel.leader import LeadEngine
from llmkit.shard.merge import merge
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.valid_layouts import valid_layouts
from llmkit.shard.verify import verify

pytestmark = pytest.mark.usefixtures("short_builtin_text")

BASE = QuantizeOptions("rtn", samples=4, seq_len=64, evaluate=False, device="cpu")
METHODS = {
    "gptq": replace(BASE, method="gptq", group_size=16),
    "awq": replace(BASE, method="awq", group_size=16),
    "fp8": replace(BASE, method="fp8"),
    "int8": replace(BASE, method="int8", activations=True),
}
# How far a method may move the logits of these models, relative to the logits.
MAX_ERROR = {"gptq": 0.6, "awq": 0.6, "fp8": 0.25, "int8": 0.15}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
# The module of a layer's experts in the output, by family.
MODULES = {
    "granite-moe-shared": "block_sparse_moe.experts",
    "gpt-oss": "mlp.experts",
    "gemma4-moe": "experts",
    "qwen3-vl-moe": "mlp.experts",
}
CASES = [
    pytest.param(
        family,
        method,
        marks=() if method == "gptq" or "granite" in family else pytest.mark.slow,
    )
    for family in MODULES
    for method in METHODS
]


def family_checkpoint(family: str, path: Path) -> Path:
    """A tiny model whose experts are stacked."""
    if family == "qwen3-vl-moe":
        return save_wrapper(tiny_wrapper(family), path, hub_names=False)
    changes: dict[str, Any] = dict(SIZES)
    if family in ("gpt-oss", "gemma4-moe"):
        changes |= WINDOWS
    if family == "granite-moe-shared":
        changes |= {"shared_intermediate_size": 32}
    if family == "gemma4-moe":
        changes |= {"moe_intermediate_size": 32, "vocab_size_per_layer_input": VOCAB}
    family_oracle(family, path, **changes)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("stacked")

    def made(family: str) -> Path:
        path = folder / family
        return path if path.exists() else family_checkpoint(family, path)

    return made


def run(source: Path, out: Path, options: QuantizeOptions) -> Report:
    return quantize(str(source), str(out), options, SilentProgress())


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


def logits_of(path: Path, windows: torch.Tensor, rounded_inputs: bool = True) -> torch.Tensor:
    model = load_model(open_checkpoint(path), torch.float32)
    if not rounded_inputs:
        for layer in model.layers:
            for linear in layer.linears.values():
                linear.activation_quant = None
    return torch.stack(list(window_logits(model, windows)))


def restacked(quantized: Checkpoint, source: Path, path: Path) -> Path:
    """The source with the dense weights of a quantized checkpoint in place of its own."""
    tensors = {name: tensor.float() for name, tensor in stored_tensors(source).items()}
    rows = {row.name: row for row in parameters(checkpoint_spec(quantized))}
    for row in parameters(checkpoint_spec(open_checkpoint(source))):
        value = read_parameter(quantized, rows[row.name], torch.float32)
        end = 0
        for part in row.sources:
            stored = tensors[part.name]
            if part.expert is not None:
                stored = stored[part.expert.index]
                stored = stored.T if part.expert.transposed else stored
            start, end = end, end + part.shape[0]
            part.rows_of(stored)[:] = value[start:end]
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config))
    return path


def transformers_logits(path: Path, windows: torch.Tensor) -> torch.Tensor:
    is_wrapper = "text_config" in json.loads((path / "config.json").read_text())
    auto = (
        transformers.AutoModelForImageTextToText
        if is_wrapper
        else transformers.AutoModelForCausalLM
    )
    oracle = auto.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = oracle.eval()(input_ids=windows, use_cache=False).logits
    return logits


@pytest.mark.parametrize(("family", "method"), CASES)
def test_quantized_experts_are_unstacked_and_equal_transformers_with_their_dense_weights(
    sources: Callable[[str], Path], tmp_path: Path, family: str, method: str
) -> None:
    source = sources(family)
    report = run(source, tmp_path / "out", METHODS[method])
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = checkpoint_spec(checkpoint)
    stacked = checkpoint_spec(open_checkpoint(source))
    assert spec.moe is not None and spec.moe.expert_stack is None
    assert stacked.moe is not None and stacked.moe.expert_stack is not None
    weight = {"gptq": "qweight", "awq": "qweight"}.get(method, "weight")
    expert = re.compile(rf"\.1\.{re.escape(MODULES[family])}\.3\.(\w+)\.{weight}$")
    found = [match[1] for name in checkpoint.tensors if (match := expert.search(name))]
    assert sorted(found) == ["down_proj", "gate_proj", "up_proj"]
    count = sum(".experts." in entry["name"] for entry in report["linears"])
    assert count == 2 * spec.moe.num_experts * len(spec.layers)
    dense = restacked(checkpoint, source, tmp_path / "dense")
    wanted = transformers_logits(dense, tokens())
    loaded = logits_of(tmp_path / "out", tokens(), rounded_inputs=False)
    torch.testing.assert_close(loaded, wanted, atol=1e-4, rtol=1e-4)
    reference = logits_of(source, tokens())
    error = (logits_of(tmp_path / "out", tokens()) - reference).norm() / reference.norm()
    assert 0 < error < MAX_ERROR[method]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family == "gpt-oss" else pytest.mark.slow)
        for family in MODULES
    ],
)
def test_gptq_of_stacked_experts_loses_less_than_rounding_to_nearest(
    sources: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    source = sources(family)
    tokenizer = load_tokenizer(open_checkpoint(source))
    windows = calibration_windows(tokenizer, load_text("builtin"), True, 16, 64, 0)
    reference = logits_of(source, windows)
    errors = {}
    for method in ("rtn", "gptq"):
        options = replace(BASE, method=method, group_size=-1, samples=16, keep="self_attn")
        report = run(source, tmp_path / method, options)
        assert not report["fallbacks"]
        errors[method] = float((logits_of(tmp_path / method, windows) - reference).norm())
    assert 0 < errors["gptq"] < errors["rtn"]


def test_report_names_starved_experts_of_a_stack(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    source = family_checkpoint("gpt-oss", tmp_path / "source")
    tensors = stored_tensors(source)
    tensors["model.layers.0.mlp.router.bias"] = torch.tensor([0.0, 0.0, -99.0, 0.0])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = run(source, tmp_path / "out", replace(METHODS["gptq"], samples=8, layers="0"))
    entries = {entry["name"]: entry for entry in report["linears"]}
    counts = [entries[f"layers.0.mlp.experts.{expert}.down"]["tokens"] for expert in range(4)]
    assert counts[2] == 0 and sum(counts) == 2 * 8 * 64
    starved = [f"layers.0.mlp.experts.{i}" for i, count in enumerate(counts) if count < 128]
    assert report["fallbacks"] == [f"{name}.{x}" for x in ("gate_up", "down") for name in starved]
    assert entries["layers.0.mlp.experts.2.down"]["fallback"] == (
        "saw 0 calibration tokens of the 128 an expert needs"
    )


@pytest.mark.parametrize("family", MODULES)
def test_scales_move_from_up_to_down_of_experts_unless_up_is_clamped(
    sources: Callable[[str], Path], family: str
) -> None:
    spec = checkpoint_spec(open_checkpoint(sources(family)))
    for form in (spec, unstack_experts(spec)):
        rows = {row.name: row for row in parameters(form)}
        gate_up = rows["layers.1.mlp.experts.2.gate_up.weight"]
        assert gate_up.input_from is None
        down = rows["layers.1.mlp.experts.2.down.weight"]
        assert down.input_from == (None if family == "gpt-oss" else gate_up.name)


def test_check_engine_refuses_unstacked_experts_that_an_engine_ignores(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    for engine, family in (
        ("transformers", "gemma4-moe"),
        ("transformers", "gpt-oss"),
        ("vllm", "gpt-oss"),
    ):
        options = replace(METHODS["fp8"], engine=engine, dry_run=True)
        with pytest.raises(UsageError, match=rf"{engine} reads the experts of .* one by one"):
            run(sources(family), tmp_path / "out", options)
        run(sources(family), tmp_path / "out", replace(options, method="bf16"))
    options = replace(METHODS["fp8"], engine="vllm", dry_run=True)
    run(sources("granite-moe-shared"), tmp_path / "out", options)


def test_kept_experts_are_unstacked_too(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """Biases, interleaved rows and transposed weights, which the output stores as others do."""
    source = sources("gpt-oss")
    run(source, tmp_path / "out", replace(METHODS["fp8"], keep=r"experts\.2\."))
    tensors = stored_tensors(tmp_path / "out")
    before = stored_tensors(source)
    expert = "model.layers.1.mlp.experts.2"
    gate_up = before["model.layers.1.mlp.experts.gate_up_proj"][2].T
    assert torch.equal(tensors[f"{expert}.up_proj.weight"], gate_up[1::2].bfloat16())
    bias = before["model.layers.1.mlp.experts.gate_up_proj_bias"][2]
    assert torch.equal(tensors[f"{expert}.gate_proj.bias"], bias[0::2].bfloat16())
    down = before["model.layers.1.mlp.experts.down_proj"][2].T
    assert torch.equal(tensors[f"{expert}.down_proj.weight"], down.bfloat16())
    assert tensors["model.layers.1.mlp.experts.1.down_proj.weight"].dtype == torch.float8_e4m3fn


def test_mixed_bits_of_stacked_experts(sources: Callable[[str], Path], tmp_path: Path) -> None:
    options = replace(
        BASE, method="rtn", group_size=32, samples=2, evaluate=True, eval_windows=1, target_bits=6.0
    )
    report = run(sources("granite-moe-shared"), tmp_path / "out", options)
    schemes = {entry["name"]: entry["scheme"] for entry in report["sensitivity"]}
    assert len(set(schemes.values())) > 1
    for layer in range(2):  # all linears of a layer's experts have one scheme
        of_layer = [e for e in report["linears"] if f"layers.{layer}.mlp.experts." in e["name"]]
        expected = {"w4a16": {4}, "w8a16": {8}, "16-bit": set()}
        chosen = schemes[f"layers.{layer}.mlp.experts"]
        assert {entry["bits"] for entry in of_layer} == expected[chosen]
    assert 0 < report["quality"]["mean_kl"] < 1
    assert logits_of(tmp_path / "out", tokens()).isfinite().all()


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_unstacked_experts_divide_over_ranks(
    sources: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    """Over groups and within an expert at once, which the stack cannot; with biases."""
    run(sources("gpt-oss"), tmp_path / "out", METHODS[method])
    checkpoint = open_checkpoint(tmp_path / "out")
    layouts = valid_layouts(checkpoint_spec(checkpoint), checkpoint.quantization)
    assert layouts == {1: [1], 2: [1, 2], 4: [1, 2, 4]}
    stored = stored_tensors(tmp_path / "out")
    for tp, ep in ((2, 1), (2, 2), (4, 2)):
        shard(tmp_path / "out", tmp_path / f"{tp}-{ep}", tp, ep=ep)
        assert verify(tmp_path / f"{tp}-{ep}").problems == []
        sharded = checkpoint_spec(open_checkpoint(tmp_path / f"{tp}-{ep}"))
        assert sharded.moe is not None and sharded.moe.expert_stack is None
        merge(tmp_path / f"{tp}-{ep}", tmp_path / f"merged-{tp}-{ep}")
        merged = stored_tensors(tmp_path / f"merged-{tp}-{ep}")
        assert merged.keys() == stored.keys()
        assert all(torch.equal(merged[name], stored[name]) for name in stored)
    rank = load_file(tmp_path / "4-2" / "rank-pp0-tp3.safetensors")
    bias = stored["model.layers.0.mlp.experts.2.up_proj.bias"]
    assert torch.equal(rank["model.layers.0.mlp.experts.2.up_proj.bias"], bias[32:])
    assert not any(".experts.0." in name for name in rank)


@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt-oss", "gptq"), pytest.param("gemma4-moe", "int8", marks=pytest.mark.slow)],
)
def test_unstacked_experts_are_served_packed_and_by_two_ranks(
    sources: Callable[[str], Path], tmp_path: Path, family: str, method: str
) -> None:
    """The greedy tokens are the likeliest of the dense weights, also with an expert's half each."""
    run(sources(family), tmp_path / "out", METHODS[method])
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    options = EngineOptions(device="cpu", max_model_len=64, dtype="float32")
    answers = load_engine(open_checkpoint(tmp_path / "out"), options).generate(prompts, greedy)
    model = load_model(open_checkpoint(tmp_path / "out"), torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        (logits,) = window_logits(model, torch.tensor([prompt + answer]))
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    ranks = load_engine(open_checkpoint(tmp_path / "out"), replace(options, tp=2, ep=2))
    assert isinstance(ranks, LeadEngine)
    try:
        assert ranks.generate(prompts, greedy) == answers
    finally:
        ranks.close()


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one model with experts in MXFP4 ("packed") and as dense tensors ("dense")."""
    path = tmp_path_factory.mktemp("mxfp4")
    write_gpt_oss(path / "dense", path / "packed", vocab_size=VOCAB, max_position_embeddings=256)
    for name in ("dense", "packed"):
        write_tokenizer(path / name)
    return path


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_mxfp4_source_is_quantized_like_its_dense_values(
    mxfp4: Path, tmp_path: Path, method: str
) -> None:
    options = replace(METHODS[method], evaluate=True, eval_windows=1)
    reports = [run(mxfp4 / name, tmp_path / name, options) for name in ("dense", "packed")]
    dense, packed = (stored_tensors(tmp_path / name) for name in ("dense", "packed"))
    assert dense.keys() == packed.keys()
    assert any(".experts.3.gate_proj." in name for name in packed)
    for name, tensor in dense.items():
        if ".experts." in name and "bias" not in name:
            assert torch.equal(tensor, packed[name]), name
    first, second = (report["quality"]["mean_kl"] for report in reports)
    assert second == pytest.approx(first, rel=0.1)
    assert open_checkpoint(tmp_path / "packed").config["quantization_config"]["quant_method"] in (
        "gptq",
        "compressed-tensors",
    )


def test_mxfp4_source_is_cast_to_its_dense_values(mxfp4: Path, tmp_path: Path) -> None:
    run(mxfp4 / "packed", tmp_path / "out", replace(BASE, method="bf16"))
    run(mxfp4 / "dense", tmp_path / "expected", replace(BASE, method="bf16"))
    expected = stored_tensors(tmp_path / "expected")
    found = stored_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "quantization_config" not in open_checkpoint(tmp_path / "out").config


def test_unstacked_view_reads_what_the_stack_holds(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    source = sources("gpt-oss")
    run(source, tmp_path / "cast", replace(BASE, method="bf16"))
    checkpoint = open_checkpoint(tmp_path / "cast")
    spec = checkpoint_spec(checkpoint)
    view = with_unstacked_experts(checkpoint, spec)
    assert with_unstacked_experts(view, checkpoint_spec(view)) is view
    rows = zip(parameters(spec), parameters(checkpoint_spec(view)), strict=True)
    for row, unstacked in rows:
        wanted = read_parameter(checkpoint, row, torch.float32)
        assert torch.equal(read_parameter(view, unstacked, torch.float32), wanted), row.name
    (file,) = checkpoint.weight_files
    info = checkpoint.tensors["model.layers.1.mlp.experts.down_proj"]
    with (tmp_path / "cast" / file).open("r+b") as stored:
        stored.seek(info.end - 1)
        stored.write(b"\x01")
    with pytest.raises(InputError, match=r"down_proj has SHA-256.*llmkit\.json says"):
        run(tmp_path / "cast", tmp_path / "out", METHODS["fp8"])
