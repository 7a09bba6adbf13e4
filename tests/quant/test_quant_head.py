"""`--lm-head` quantizes the output projection and never the embedding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_models as tiny

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import parse_quantization
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.errors import UsageError
from llmkit.common.progress import SilentProgress
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.families import model_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model, read_parameter
from llmkit.quant.methods import MethodOptions, build_quantization_config
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_report import Report
from llmkit.quant.target_engines import check_engine, parse_target
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.memory_plan import loaded_bytes, weight_bytes
from llmkit.shard.merge import merge
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.valid_layouts import explain_tp
from llmkit.shard.verify import verify

CALIBRATED: dict[str, Any] = {"samples": 4, "seq_len": 64}
RUNS: dict[str, tuple[str, dict[str, Any], Scheme]] = {  # the head's scheme is the last
    "int8": ("int8", {"lm_head": 8}, Scheme(8)),
    "w8a8": ("int8", {"lm_head": 8, "activations": True, **CALIBRATED}, Scheme(8)),
    "fp8": ("fp8", {"lm_head": 8}, Scheme(8)),
    "fp8-static": ("fp8", {"lm_head": 8, "static_activations": True, **CALIBRATED}, Scheme(8)),
    "rtn": ("rtn", {"lm_head": 8}, Scheme(8, 64)),
    "gptq": ("gptq", {"lm_head": 4, **CALIBRATED}, Scheme(4, 64)),
    "gptq-packed": (
        "gptq",
        {"lm_head": 8, "format": "compressed-tensors", **CALIBRATED},
        Scheme(8, 64),
    ),
    "awq-packed": (
        "awq",
        {"lm_head": 4, "format": "compressed-tensors", **CALIBRATED},
        Scheme(4, 64, False),
    ),
    "mixed": ("rtn", {"lm_head": 8, "target_bits": 8.0, **CALIBRATED}, Scheme(8, 64)),
}


pytestmark = pytest.mark.usefixtures("short_builtin_text")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(
        tmp_path_factory.mktemp("source") / "model", tie_word_embeddings=request.param
    )


def run(source: Path, out: Path, method: str, **options: Any) -> Report:
    plain = QuantizeOptions(method, evaluate=False, device="cpu")
    return quantize(str(source), str(out), dataclasses.replace(plain, **options), SilentProgress())


@pytest.mark.parametrize("name", RUNS)
def test_lm_head_is_quantized_and_the_embedding_is_not(
    source: Path, tmp_path: Path, name: str
) -> None:
    method, options, scheme = RUNS[name]
    report = run(source, tmp_path / "out", method, **options)
    found = open_checkpoint(tmp_path / "out")
    original = open_checkpoint(source)
    spec = model_spec(found.config)
    assert not spec.tie_word_embeddings
    head = parameters(spec)[-1]
    assert (
        head.name == "lm_head.weight"
        and scheme_of(head, head.source_names[0], found.quantization) == scheme
    )
    assert torch.equal(
        found.read("model.embed_tokens.weight"), original.read("model.embed_tokens.weight")
    )
    tied = model_spec(original.config).tie_word_embeddings
    wanted = original.read("model.embed_tokens.weight" if tied else "lm_head.weight").float()
    got = read_parameter(found, head, torch.float32)
    size = wanted.shape[1] if scheme.group_size == -1 else scheme.group_size
    step = 2 * wanted.abs().view(len(wanted), -1, size).amax(-1) / (2**scheme.bits - 2)
    worst = (got - wanted).abs().view(len(wanted), -1, size).amax(-1)
    bound = 0.51 if scheme.bits == 8 else 2  # a searched range is shorter, and clips
    assert (worst <= bound * step + 1e-6).all()
    assert [entry["name"] for entry in report["linears"]].count("lm_head") == 1
    assert f"--lm-head {options['lm_head']}" in report["command_line"]


@pytest.mark.parametrize("name", ["w8a8", "gptq", "mixed"])
def test_lm_head_is_served_as_it_is_stored(source: Path, tmp_path: Path, name: str) -> None:
    method, options, _ = RUNS[name]
    run(source, tmp_path / "out", method, **options)
    found = open_checkpoint(tmp_path / "out")
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = (
        hidden @ read_parameter(found, parameters(model_spec(found.config))[-1], torch.float32).T
    )
    with torch.inference_mode():
        for packed in (False, True):
            model = load_model(found, torch.float32, packed=packed)
            torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-4, atol=1e-4)
    planned = weight_bytes(found, model.spec, torch.float32, torch.device("cpu"))
    assert loaded_bytes(model) == pytest.approx(planned, rel=0.05)
    engine = load_engine(tmp_path / "out", EngineOptions(device="cpu", max_model_len=64))
    (answer,) = engine.generate(
        [[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    )
    assert len(answer) == 8


@pytest.mark.parametrize("name", ["w8a8", "gptq", "awq-packed"])
def test_lm_head_is_sharded_and_merged(source: Path, tmp_path: Path, name: str) -> None:
    method, options, _ = RUNS[name]
    run(
        source,
        tmp_path / "out",
        method,
        **(options | {"group_size": 32} if method != "int8" else options),
    )
    shard(tmp_path / "out", tmp_path / "ranks", 2)
    assert not verify(tmp_path / "ranks").problems
    merge(tmp_path / "ranks", tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_lm_head_that_would_need_padding_is_refused_for_tp(source: Path) -> None:
    spec = dataclasses.replace(
        model_spec(open_checkpoint(source).config), tie_word_embeddings=False, vocab_size=520
    )
    quantization = build_quantization_config(spec, MethodOptions("gptq", group_size=16, lm_head=4))
    assert explain_tp(spec, dataclasses.replace(quantization, ignore=("lm_head",)), 2) is None
    refusal = explain_tp(spec, quantization, 2)
    assert refusal is not None and "lm_head: 520/2 = 260 packed rows, no multiple of 64" in refusal


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bf16", {}, "is a cast"),
        ("awq", {}, "no place for a quantized one"),
        ("int8", {"lm_head": 4}, "8 bits go with"),
        ("gptq", {}, "4 bits go with"),
        ("rtn", {"lm_head": 5}, "4 or 8 bits go with"),
    ],
)
def test_lm_head_refuses_conflicting_options(
    source: Path, tmp_path: Path, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        run(source, tmp_path / "out", method, **{"lm_head": 8, **options})
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_lm_head_of_other_tools_is_read() -> None:
    said = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": True,
    }
    assert parse_quantization(said).scheme_of("lm_head") == Scheme(4, 32)
    assert parse_quantization(said | {"lm_head": False}).scheme_of("lm_head") is None


def test_check_engine_refuses_a_gptq_lm_head_for_transformers(source: Path) -> None:
    spec = dataclasses.replace(
        model_spec(open_checkpoint(source).config), tie_word_embeddings=False
    )

    def check(engine: str, options: MethodOptions) -> None:
        check_engine(parse_target(engine), build_quantization_config(spec, options), spec)

    with pytest.raises(UsageError, match="lm_head"):
        check("transformers", MethodOptions("gptq", lm_head=4))
    check("vllm", MethodOptions("gptq", lm_head=4))
    check("transformers", MethodOptions("gptq"))
    check("transformers", MethodOptions("rtn", lm_head=8))
