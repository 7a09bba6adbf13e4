"""The commands on a tiny model, in this process: what they print, what they write, how they end."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.free_ports import free_port

from llmkit.cli import main
from llmkit.quant import quantize_plan
from llmkit.quant.time_estimate import Speed

MODEL = {"max_position_embeddings": 512}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def int4(model: Path, work: Path) -> Path:
    out = work / "int4"
    arguments = [
        "--method",
        "gptq",
        "--group-size",
        "32",
        "--samples",
        "4",
        "--seq-len",
        "64",
        "-o",
        str(out),
    ]
    assert main.run(["quantize", str(model), *arguments, "--quiet", "--json", "--seed", "3"]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Runs a command that must fail with `code`; returns its one line on stderr."""
    capsys.readouterr()
    assert main.run([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if ": error: " in line]
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err
    return errors[0]


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Runs a command with --json that must succeed; returns what it printed."""
    capsys.readouterr()
    assert main.run([*(str(argument) for argument in arguments), "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    parsed: dict[str, Any] = json.loads(captured.out)
    return parsed


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must succeed; returns its stdout with blanks squeezed."""
    capsys.readouterr()
    assert main.run([str(argument) for argument in arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_quantize_prints_the_report_it_writes(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = work / "rtn"
    report = document(capsys, "quantize", model, "--method", "rtn", "-o", out)
    assert report == json.loads((out / "llmkit_report.json").read_text())
    assert (report["method"], report["bits"], report["group_size"]) == ("rtn", 4, 64)
    table = shown(capsys, "quantize", model, "--method", "int8", "-o", work / "int8")
    for part in (
        "perplexity",
        "KL divergence, mean",
        "same most likely token",
        "INT8; compressed-tensors format",
        "size",
    ):
        assert part in table


def test_quantize_passes_its_options_on(int4: Path) -> None:
    report = json.loads((int4 / "llmkit_report.json").read_text())
    assert report["options"]["seed"] == 3
    assert report["group_size"] == 32
    assert report["calibration"]["windows"] == 4
    assert report["calibration"]["window_tokens"] == 64


def test_dry_run_writes_nothing(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = work / "nothing"
    table = shown(capsys, "quantize", model, "--method", "gptq", "-o", out, "--dry-run")
    assert "(nothing written)" in table
    assert "model.safetensors" in table
    plan = document(capsys, "shard", model, "--tp", "2", "-o", out, "--dry-run")
    assert plan["output"] is None
    assert plan["tp"] == 2
    assert not out.exists()


def test_dry_run_names_the_calibration_and_cheaper_settings_of_a_long_run(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("quantize", model, "--method", "gptq", "-o", work / "nothing", "--dry-run")
    table = shown(capsys, *words, "--samples", "1000")
    assert re.search(r"calibrates on 1000 windows of \d+ tokens \(--samples 1000 ", table)
    assert "instead" not in table, "the run is short"
    monkeypatch.setattr(quantize_plan, "measure_speed", lambda _: Speed(1e7, 0.01))
    table = shown(capsys, *words, "--samples", "1000")
    assert re.search(
        r"--samples \d+ --seq-len \d+ --effort fast: about \d+ min \d+ s instead", table
    )


def verified_tensors(folder: Path) -> list[str]:
    return list(json.loads((folder / "llmkit.json").read_text())["tensors"])


def test_shard_verify_and_merge(int4: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = work / "tp2"
    merged = work / "merged"
    planned = document(capsys, "shard", "plan", int4, "--tp", "2", "--pp", "2")
    written = document(capsys, "shard", int4, "--tp", "2", "--pp", "2", "-o", ranks)
    assert planned["ranks"] == written["ranks"]
    assert len(list(ranks.glob("*.safetensors"))) == 4
    assert "rank-pp1-tp0.safetensors" in shown(
        capsys, "shard", "plan", int4, "--tp", "2", "--pp", "2"
    )
    verified = document(capsys, "shard", "verify", ranks)
    assert verified["ok"]
    assert (verified["tp"], verified["pp"], verified["problems"]) == (2, 2, [])
    assert f"{ranks} verifies: TP 2, PP 2" in shown(capsys, "shard", "verify", ranks)
    assert "model.safetensors: " in shown(capsys, "shard", "merge", ranks, "-o", merged)
    lost = ranks / "rank-pp0-tp1.safetensors"
    kept = lost.rename(work / "kept.safetensors")
    capsys.readouterr()
    assert main.run(["shard", "verify", str(ranks)]) == 3
    count = len([key for key in verified_tensors(ranks) if key.startswith(lost.name)])
    assert capsys.readouterr().out.splitlines() == [
        f"{lost} is in llmkit.json but absent; {count} more problems of {lost.name}",
        "--json lists every problem",
    ]
    assert main.run(["shard", "verify", str(ranks), "--json"]) == 3
    assert len(json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "}")["problems"]) == (
        count + 1
    )
    kept.rename(lost)
    before = load_file(int4 / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        for name in before
    )
    file = ranks / "rank-pp0-tp1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    line = refused(capsys, 3, "shard", "verify", ranks)
    assert f"{ranks} does not verify (" in line
    assert "rank-pp0-tp1.safetensors" in line


def test_inspect_shows_what_llmkit_wrote(
    model: Path, int4: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = document(capsys, "inspect", int4)
    assert facts["quantization"] == {
        "format": "gptq",
        "method": "gptq",
        "kv": None,
        "schemes": [
            {
                "bits": 4,
                "group_size": 32,
                "symmetric": True,
                "kind": "int",
                "inputs": "none",
                "block_rows": 1,
                "scale_format": "float",
                "input_type": None,
                "preset": "",
                "label": "INT4 in groups of 32",
            }
        ],
    }
    assert facts["written_by"]["name"] == "llmkit"
    text = shown(capsys, "inspect", int4)
    assert "INT4 in groups of 32; gptq format" in text
    ranks = work / "tp4"
    document(capsys, "shard", model, "--tp", "4", "-o", ranks)
    assert document(capsys, "inspect", ranks)["layout"]["tp"] == 4
    assert "tp 4, pp 1" in shown(capsys, "inspect", ranks)


def test_quantize_refuses_bad_options_and_inputs(
    model: Path, int4: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantize(*arguments: object) -> tuple[object, ...]:
        return ("quantize", *arguments, "-o", work / "refused")

    line = refused(capsys, 2, *quantize(model, "--method", "int8", "--bits", "4"))
    assert "--method int8 and --bits 4 do not go together. The pairs that do: bf16 16," in line
    line = refused(capsys, 3, *quantize(model, "--method", "gptq", "--group-size", "48"))
    assert "group size 48 does not divide" in line
    assert "which has 64 in_features" in line
    line = refused(capsys, 2, *quantize(model, "--method", "gptq", "--group-size", "some"))
    assert "--group-size: 'some' is neither a positive number nor 'auto'." in line
    text = work / "calibration.jsonl"
    text.write_text('{"text": "fine"}\n{"words": "none"}\n')
    line = refused(capsys, 3, *quantize(model, "--method", "gptq", "--calibration", text))
    assert "calibration.jsonl" in line
    assert "words" in line
    assert not (work / "refused").exists()
    line = refused(capsys, 5, "quantize", model, "--method", "bf16", "-o", int4)
    assert str(int4) in line
    refused(capsys, 5, "quantize", model, "--method", "bf16", "-o", model)


def test_shard_refuses_bad_options_and_inputs(
    model: Path, int4: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, 3, "shard", model, "--tp", "3", "-o", work / "refused")
    assert "q_proj: 4/3 = 1.333 heads" in line
    assert "TP 1, 2, 4 work" in line
    refused(capsys, 2, "shard", model, "--tp", "0", "-o", work / "refused")
    refused(capsys, 3, "shard", "verify", model)
    refused(capsys, 3, "shard", "merge", model, "-o", work / "refused")
    refused(capsys, 5, "shard", model, "--tp", "2", "-o", int4)
    assert not (work / "refused").exists()


def test_bench_prints_one_table_and_checks_gates(
    model: Path, int4: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    less = ["--offline", "--limit", "2", "--no-warmup", "--windows", "2", "--window-tokens", "64"]
    report = document(capsys, "bench", model, int4, *less)
    assert [target["name"] for target in report["targets"]] == ["model", "int4"]
    assert report["targets"][1]["metrics"]["mean_kl"] > 0
    (work / "a.json").write_text(json.dumps(report))
    table = shown(capsys, "bench", "show", work / "a.json")
    for part in ("perplexity", "KL divergence from baseline, mean", "output", "model", "int4"):
        assert part in table
    assert "int4 (b)" in shown(capsys, "bench", "compare", work / "a.json", work / "a.json")
    quality = ["--no-speed", "--windows", "2", "--window-tokens", "64"]
    assert "pass" in shown(
        capsys, "bench", int4, "--baseline", model, *quality, "--gate", "mean_kl<=100"
    )
    capsys.readouterr()
    assert (
        main.run(
            ["bench", str(int4), "--baseline", str(model), *quality, "--gate", "top1>=2", "--json"]
        )
        == 1
    )
    captured = capsys.readouterr()
    assert json.loads(captured.out)["gates"][0]["passed"] is False
    assert "llmkit bench: error: 1 of 1 gate checks failed: int4: top1 is " in captured.err


def test_bench_refuses_bad_options(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is nothing to bench" in refused(capsys, 2, "bench")
    assert "names no metric" in refused(capsys, 2, "bench", model, "--gate", "speed>=1")
    assert "no such scenario: fast" in refused(capsys, 2, "bench", model, "--scenario", "fast")
    url = f"http://127.0.0.1:{free_port()}"
    line = refused(capsys, 4, "bench", "--url", url)
    assert url in line
    assert "ECONNREFUSED" in line
    refused(capsys, 3, "bench", "show", work / "absent.json")


def test_serve_refuses_bad_options_before_loading(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMKIT_API_KEY", raising=False)
    line = refused(capsys, 2, "serve", model, "--host", "0.0.0.0")
    assert "An address other than loopback needs an API key" in line
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refused(
            capsys, 4, "serve", model, "--port", port
        )
    assert "there is no such port (70000)" in refused(capsys, 2, "serve", model, "--port", "70000")
    for option, value in (
        ("--max-num-seqs", "0"),
        ("--gpu-memory-utilization", "1.5"),
        ("--drain-timeout", "-1"),
    ):
        assert f"{option}: {float(value):g} is out of range" in refused(
            capsys, 2, "serve", model, option, value
        )
    assert "is not a size" in refused(capsys, 2, "serve", model, "--kv-cache-memory", "lots")


@pytest.mark.parametrize("command", ["quantize", "bench", "serve"])
def test_cuda_device_that_is_missing_is_a_shortage(
    command: str, model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    more = {"quantize": ["--method", "bf16", "-o", work / "refused"], "serve": ["--port", "0"]}.get(
        command, []
    )
    line = refused(capsys, 4, command, model, "--device", "cuda", *more)
    assert line.endswith(
        "--device cuda was given, and PyTorch sees no CUDA device. An NVIDIA GPU, its driver and "
        "a PyTorch built for CUDA were expected. Use --device cpu, or see with llmkit doctor what "
        "is missing."
    )
