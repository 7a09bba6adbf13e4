"""`llmkit shard` and `shard plan` on the command line: layouts of every kind, and what is said of
others.
"""

import json
from pathlib import Path

import pytest
from support.synthetic_checkpoint import synthetic_checkpoint

from llmkit.cli import main

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def run(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    """What the command prints: on stdout when it succeeds, else on stderr."""
    assert main.run(["shard", *map(str, words)]) == code
    out, err = capsys.readouterr()
    return " ".join((err if code else out).split())


def test_shard_command_with_experts_and_uneven_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = synthetic_checkpoint(tmp_path / "model", num_hidden_layers=3, **MIXTRAL)
    options = ("--tp", 2, "--ep", 2, "--pp-layers", "2,1")
    shown = run(capsys, 0, model, *options, "-o", tmp_path / "out")
    assert "TP 2, PP 2, EP 2" in shown
    assert "rank-pp0-tp1.safetensors │ 0 to 1 │ 2 to 3 │" in shown  # its layers and its experts
    layout = json.loads((tmp_path / "out" / "llmkit.json").read_text())["layout"]
    assert (layout["stages"], layout["experts"]) == ([[0, 1], [2]], [[0, 1], [2, 3]])
    assert "verifies: TP 2, PP 2, EP 2" in run(capsys, 0, "verify", tmp_path / "out")
    run(capsys, 0, tmp_path / "out", "--tp", 1, "-o", tmp_path / "one")
    run(capsys, 0, model, "--tp", 1, "-o", tmp_path / "direct")
    for file in (tmp_path / "direct").iterdir():
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()


def test_shard_command_refuses_wrong_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = synthetic_checkpoint(tmp_path / "model", **MIXTRAL)
    out = tmp_path / "out"
    sums = run(capsys, 3, model, "--tp", 1, "--pp-layers", "2,1", "-o", out)
    assert "--pp-layers 2,1: 2 + 1 = 3 layers. 2 layers in all, at least one in each stage" in sums
    assert "--pp-layers: '2,x' are not numbers" in run(
        capsys, 2, model, "--tp", 1, "--pp-layers", "2,x", "-o", out
    )
    run(capsys, 2, model, "--tp", 1, "--pp", 3, "--pp-layers", "1,1", "-o", out)
    assert "4/3 = 1.333 tensor-parallel ranks; EP 1, 2, 4" in run(
        capsys, 3, model, "--tp", 4, "--ep", 3, "-o", out
    )
    assert not out.exists()


def test_shard_plan_command_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = synthetic_checkpoint(tmp_path / "model", **MIXTRAL)
    document = json.loads(
        run(capsys, 0, "plan", model, "--tp", 4, "--ep", 2, "--gpu", "l4-24", "--json")
    )
    assert document["memory_bytes"] == 23034 * 2**20
    assert document["works"] == [
        {"tp": 1, "ep": [1]},
        {"tp": 2, "ep": [1, 2]},
        {"tp": 4, "ep": [1, 2, 4]},
    ]
    assert document["tokens"] == min(rank["tokens"] for rank in document["ranks"]) > 0
    shown = run(capsys, 0, "plan", model, "--tp", 4, "--gpu", "1MiB")
    assert "tokens of KV cache fit in 90% of 1MiB" in shown
    assert "TP that works: 1, 2 (EP 1, 2), 4 (EP 1, 2, 4); PP from 1 to 2" in shown
    assert "--gpu h9 is not known. One of" in run(
        capsys, 2, "plan", model, "--tp", 1, "--gpu", "h9"
    )


def test_shard_plan_command_explains_sizes_that_do_not_divide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = synthetic_checkpoint(tmp_path / "model")
    shown = run(capsys, 0, "plan", model, "--tp", 3, "--gpu", "h100-80")
    assert "--tp 3 does not divide q_proj: 4/3 = 1.333 heads; TP 1, 2, 4 work" in shown
    assert "TP that works: 1, 2, 4; PP from 1 to 2" in shown
    document = json.loads(run(capsys, 0, "plan", model, "--tp", 1, "--pp", 3, "--json"))
    assert document["refusal"] == "3 pipeline stages for 2 layers. At most 2 stages, one layer each"


def test_shard_command_writes_vllm_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = synthetic_checkpoint(tmp_path / "model")
    run(capsys, 0, model, "--tp", 2, "--format", "vllm", "-o", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == ["model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"]
    assert "verifies: TP 2" in run(capsys, 0, "verify", tmp_path / "out")
    words = (model, "--tp", 2, "--pp", 2, "--format", "vllm", "-o", tmp_path / "no")
    assert "Tensor-parallel ranks only (--tp)" in run(capsys, 2, *words)
