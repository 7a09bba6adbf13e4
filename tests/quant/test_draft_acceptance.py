"""`quantize` reports what quantizing costs the drafts of a model's MTP head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_draft_heads import PERIOD, glm_with_mtp, load_mtp, mtp_hidden, text_tokens
from support.tiny_models import tiny_checkpoint, write_tokenizer

from llmkit.bench.bench_report import BenchReport
from llmkit.bench.gates import parse_gate
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import GateError
from llmkit.common.progress import SilentProgress
from llmkit.model.families import checkpoint_spec
from llmkit.pipeline.run_recipe import _quantize_report
from llmkit.quant.draft_acceptance import DraftAcceptance, measurable_head
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.quantize_checkpoint import check_gates, quantize
from llmkit.quant.quantize_options import QuantizeOptions

pytestmark = pytest.mark.usefixtures("short_builtin_text")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = glm_with_mtp(tmp_path_factory.mktemp("glm"), steps=25, dtype="bfloat16")
    write_tokenizer(path)
    return path


def windows() -> torch.Tensor:
    """Half of each is the text that the model knows."""
    generator = torch.Generator().manual_seed(4)
    random = torch.randint(3, 512, (3, 20), generator=generator)
    known = torch.tensor([text_tokens(20, start) for start in range(0, PERIOD, PERIOD // 3)])
    return torch.cat((random, known), 1)


def test_draft_acceptance_is_what_transformers_computes(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    spec = checkpoint_spec(checkpoint)
    head = measurable_head(checkpoint, spec)
    assert head is not None
    acceptance = DraftAcceptance(*head)
    stream = LayerStream.from_checkpoint(checkpoint, spec)
    logits = torch.stack(list(stream.logits(windows(), acceptance=acceptance)))

    oracle, oracle_head = load_mtp(model)
    with torch.no_grad():
        output = oracle(windows(), output_hidden_states=True)
        hidden = mtp_hidden(oracle_head, output.hidden_states[-1][:, :-1], windows()[:, 1:])
        drafts = oracle_head.shared_head(hidden).argmax(-1)
    torch.testing.assert_close(logits, output.logits, rtol=1e-3, atol=1e-3)
    wanted = (drafts == output.logits[:, 1:].argmax(-1)).double().mean().item()
    assert acceptance.rate == pytest.approx(wanted)
    assert 0.3 < acceptance.rate < 1


@pytest.fixture(scope="module", params=["bf16", "rtn"])
def quantized(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("out") / request.param
    options = QuantizeOptions(request.param, device="cpu", eval_windows=2)
    if request.param == "rtn":
        options = replace(options, group_size=32)
    quantize(str(model), str(out), options, SilentProgress())
    return request.param, out


def test_draft_acceptance_is_in_reports_and_gates(quantized: tuple[str, Path]) -> None:
    method, out = quantized
    report: BenchReport = _quantize_report("int4", out)
    before, after = (target.metrics["acceptance"] for target in report.targets)
    assert 0 <= after <= 1
    if method == "bf16":
        assert after == before
    report.check_gates([parse_gate("acceptance >= 0.5*baseline")])
    assert [gate.value for gate in report.gates] == [after]


def test_draft_acceptance_below_the_bound_fails(model: Path) -> None:
    quality = {
        "perplexity": 2.0,
        "reference_perplexity": 2.0,
        "mean_kl": 0.0,
        "acceptance": 0.4,
        "reference_acceptance": 0.5,
    }
    report = {"quality": quality, "output": "out"}
    options = QuantizeOptions("rtn")
    check_gates(report, replace(options, min_acceptance=0.8))
    with pytest.raises(GateError, match=r"acceptance is 0.400 after 0.500, which is less than 0.9"):
        check_gates(report, replace(options, min_acceptance=0.9))
    del quality["acceptance"]
    with pytest.raises(GateError, match="the source has no MTP head"):
        check_gates(report, replace(options, min_acceptance=0.9))


def test_draft_acceptance_needs_a_complete_head(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "plain"))
    assert measurable_head(checkpoint, checkpoint_spec(checkpoint)) is None
