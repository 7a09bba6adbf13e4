"""`--for ENGINE[@GPU]`: which schemes mixed precision chooses from, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny_models as tiny

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import UsageError
from llmkit.common.progress import SilentProgress
from llmkit.model.checkpoint_tensors import check_checkpoint, scheme_of
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters
from llmkit.quant.number_formats import NUMBER_FORMATS
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_plan import QuantizePlan, make_plan
from llmkit.quant.scheme_candidates import UNQUANTIZED
from llmkit.quant.target_engines import (
    FAST_SCHEMES,
    GENERATIONS,
    fast_schemes,
    parse_target,
)

pytestmark = pytest.mark.usefixtures("short_builtin_text")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that blocks of 128 divide, also of q, k and v."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "vocab_size": 512}
    path = tmp_path_factory.mktemp("source") / "llama"
    return tiny.tiny_checkpoint(path, intermediate_size=256, **sizes)


Plan = Callable[..., QuantizePlan]


@pytest.fixture
def plan(wide: Path, tmp_path: Path) -> Plan:
    def make(**options: object) -> QuantizePlan:
        settings = QuantizeOptions(
            **({"method": "gptq", "target_bits": 12.0, "device": "cpu"} | options)
        )
        return make_plan(str(wide), tmp_path / "out", settings, SilentProgress())

    return make


def test_fast_schemes_are_known_and_can_be_stored_together() -> None:
    for engine, by_generation in FAST_SCHEMES.items():
        assert set(by_generation) <= {"", *GENERATIONS.values()}, engine
        for names in by_generation.values():
            assert len(set(names)) == len(names) > 0
            assert all("compressed-tensors" in NUMBER_FORMATS[name].formats for name in names)


def test_fast_schemes_follow_the_hardware() -> None:
    def names(text: str | None, rounds_inputs: bool = False) -> set[str]:
        return set(fast_schemes(parse_target(text), rounds_inputs))

    assert names(None) == names("vllm") == names("transformers") == {"w4a16", "w8a16"}
    assert names("vllm@A100") == {"w4a16", "w8a16", "nvfp4a16", "mxfp4a16"}
    assert names("vllm@h200") == names("vllm@h100") >= {"w4a16", "fp8", "fp8-block", "nvfp4a16"}
    assert "w8a8" not in names("vllm@h100")
    assert names("vllm@h100", True) == {"fp8", "fp8-block", "w8a8", "w4afp8"}
    assert names("vllm@b200") == {"nvfp4", "mxfp4", "mxfp8", "fp8", "fp8-block"}
    # FP4 and MXFP8 products are of Blackwell, FP8 products of Ada and later.
    for engine, by_generation in FAST_SCHEMES.items():
        for generation, found in by_generation.items():
            for name in found:
                scheme = NUMBER_FORMATS[name].scheme
                if scheme.input_type == "fp4" or (scheme.is_fp8 and scheme.scale_format == "e8m0"):
                    assert generation == "blackwell", (engine, name)
                elif scheme.input_type == "fp8":
                    assert generation in ("ada", "hopper", "blackwell"), (engine, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trt", r"--for trt is not known\. One of vllm, sglang, transformers, llmkit"),
        ("vllm@h900", r"--for vllm@h900 is not known\. vllm@ and one of a100.*, h200.*, cpu was"),
        ("vllm@", r"--for vllm@ is not known"),
        (
            "transformers@h100",
            r"--for transformers@h100 is not known\. transformers alone was expected",
        ),
    ],
)
def test_unknown_target_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_target(text)


def test_candidates_fit_the_linears(plan: Plan) -> None:
    found = plan(engine="vllm@h100")
    (qkv, *_), down = found.units, found.units[-1]
    # Q, K and V have 128 rows each; w4afp8 has the weights of w4a16 and rounds inputs too.
    assert set(qkv.schemes) == {
        "w4a16",
        "w4a16-g32",
        "w8a16",
        "fp8",
        "fp8-block",
        "nvfp4a16",
        "mxfp4a16",
    }
    bits = {name: down.stored_bits(name) / down.num_weights for name in down.schemes}
    assert down.stored_bits(UNQUANTIZED) == 16 * down.num_weights
    # 128 x 256: the shape takes two integers of 64 bits.
    shape = 2 * 64 / down.num_weights
    assert bits["w4a16"] == pytest.approx(4 + 16 / 128 + shape)
    assert bits["w4a16-g32"] == pytest.approx(4 + 16 / 32 + shape)
    assert bits["mxfp4a16"] == pytest.approx(4 + 8 / 32, abs=0.01)
    assert bits["nvfp4a16"] == pytest.approx(4 + 8 / 16, abs=0.01)
    rounding = plan(engine="vllm@h100", activations=True)
    assert rounding.candidates == ("fp8", "fp8-block", "w8a8", "w4afp8")
    assert rounding.units[0].schemes["w4afp8"].group_size == 128
    calibrated = plan(engine="vllm@h100", activations=True, method="auto")
    assert calibrated.candidates == rounding.candidates
    assert plan(engine="vllm@h100", activations=True, method="awq").candidates == ("w4afp8",)
    assert plan(engine="vllm@h100", group_size=64).units[0].schemes["w4a16"].group_size == 64


def test_candidates_leave_out_what_does_not_fit(tmp_path: Path) -> None:
    """Blocks of 128 do not divide 64 rows, nor groups of 32 a row of 48."""
    source = tiny.tiny_checkpoint(tmp_path / "model", hidden_size=48, head_dim=12)
    options = QuantizeOptions("rtn", target_bits=12.0, device="cpu", engine="vllm@b200")
    found = make_plan(str(source), tmp_path / "out", options, SilentProgress())
    by_name = {unit.name: set(unit.schemes) for unit in found.units}
    assert by_name["layers.0.attn.qkv"] == {"fp8", "nvfp4"}
    assert by_name["layers.0.mlp.down"] == {"fp8", "nvfp4", "mxfp4", "mxfp8"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bits": 4.0}, r"--target-bits is 4, and the smallest schemes have 4\.14 bits"),
        ({"target_bits": 17.0}, r"--target-bits is 17\. 1 to 16 bits"),
        ({"scheme": "nvfp4"}, r"--scheme is one scheme for all layers.*Leave out --scheme"),
        ({"activations": True}, r"--activations: no candidate.*Add --for vllm@h100"),
        (
            {"method": "awq", "engine": "vllm@b200"},
            r"--method awq chooses values for none of nvfp4",
        ),
        ({"static_activations": True}, r"--method gptq has no fixed activation scales"),
        ({"format": "gptq"}, r"They go with .*gptq, awq, .*and --format compressed-tensors"),
        ({"target_kl": 0.1}, r"--target-kl and --target-bits were both given"),
    ],
)
def test_targets_that_nothing_reaches_are_refused(
    plan: Plan, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(**options)


@pytest.mark.parametrize(
    ("engine", "method"), [("vllm@b200", "rtn"), ("vllm@h100", "rtn"), ("llmkit@h100", "auto")]
)
def test_target_bits_over_float_schemes_is_one_checkpoint(
    wide: Path, tmp_path: Path, engine: str, method: str
) -> None:
    options = QuantizeOptions(
        method, target_bits=6.5, engine=engine, samples=4, seq_len=64, eval_windows=1, device="cpu"
    )
    report = quantize(str(wide), str(tmp_path / "out"), options, SilentProgress())
    assert 5.5 < report["mean_bits"] <= 6.5
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = checkpoint_spec(checkpoint)
    check_checkpoint(checkpoint, spec)
    chosen = {entry["name"]: entry["scheme"] for entry in report["sensitivity"]}
    assert len(set(chosen.values())) > 1
    found = make_plan(str(wide), tmp_path / "again", options, SilentProgress())
    schemes = {unit.name: unit.schemes for unit in found.units}
    for row in parameters(spec):
        if row.is_linear:
            stored = scheme_of(row, row.source_names[0], checkpoint.quantization)
            assert stored == schemes[row.module].get(chosen[row.module]), row.module
    linears = [
        info
        for name, info in checkpoint.tensors.items()
        if ".self_attn." in name or ".mlp." in name
    ]
    weights = sum(entry["weights"] for entry in report["sensitivity"])
    assert report["mean_bits"] == pytest.approx(8 * sum(i.nbytes for i in linears) / weights)
    assert report["quality"]["mean_kl"] < max(cost["mean_kl"] for cost in report["uniform"]) * 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Chosen schemes" in page
    assert torch.isfinite(torch.tensor([entry["mean_kl"] for entry in report["frontier"]])).all()


@pytest.mark.parametrize(("scheme", "engine"), [("mxfp4a16", "vllm"), ("mxfp4afp8", "vllm@b200")])
def test_mxfp4_of_model_optimizer_is_refused_for_vllm(plan: Plan, scheme: str, engine: str) -> None:
    with pytest.raises(UsageError, match="vllm does not read MXFP4 of the modelopt format"):
        plan(method="rtn", scheme=scheme, format="modelopt", engine=engine, target_bits=None)
