"""`llmkit bench`'s own options, on the command line."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from llmkit.bench.bench_options import BenchOptions
from llmkit.bench.bench_planner import make_plan
from llmkit.bench.measure_speed import _make_backend
from llmkit.checkpoint.registry import local_copies
from llmkit.checkpoint.registry.transfer import FolderStore
from llmkit.cli import main
from llmkit.common.errors import UsageError
from llmkit.common.option_values import parse_numbers, parse_range

QUICK = ["--offline", "--no-quality", "--no-warmup", "-q"]


def test_bench_options_parse_lists_and_ranges() -> None:
    assert parse_numbers("--rate", "0.5, 2") == (0.5, 2.0)
    assert parse_numbers("--rate", None) == ()
    assert parse_range("--input-tokens", "64-512") == (64, 512)
    assert parse_range("--input-tokens", " 128 ") == (128, 128)
    for text in ("", "1,,2", "a", "-1", "1-2"):
        with pytest.raises(UsageError, match="is not a list of numbers"):
            parse_numbers("--rate", text)
    with pytest.raises(UsageError, match="is not a list"):
        parse_numbers("--concurrency", "1.5", whole=True)
    for text in ("", "0", "5-2", "1-2-3", "x"):
        with pytest.raises(UsageError, match="is not a range of tokens"):
            parse_range("--input-tokens", text)


def test_bench_command_runs_a_load_and_writes_its_files(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = ["--requests", "3", "--input-tokens", "8", "--output-tokens", "4-6"]
    files = {name: tmp_path / f"x.{name}" for name in ("output", "html", "csv", "junit", "summary")}
    named = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    wishes = ["--slo", "e2e:60s", "--gate", "goodput>0", "--rate", "100", "--burstiness", "0.5"]
    assert main.run(["bench", str(model), *QUICK, *lengths, *wishes, *named]) == 0
    assert "rate100" in capsys.readouterr().out
    report = json.loads(files["output"].read_text())
    assert report["workload"]["load"]["burstiness"] == 0.5
    assert [gate["metric"] for gate in report["gates"]] == ["rate100.goodput"]
    assert all(path.stat().st_size > 100 for path in files.values())
    again = tmp_path / "again.html"
    assert main.run(["bench", "show", str(files["output"]), "--html", str(again), "-q"]) == 0
    assert again.read_bytes() == files["html"].read_bytes()
    both = tmp_path / "both.csv"
    assert (
        main.run(["bench", "compare", *[str(files["output"])] * 2, "--csv", str(both), "-q"]) == 0
    )
    assert "model (b),rate100,goodput" in both.read_text()


def test_bench_throughput_mode_runs_offline(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    lengths = ["--requests", "3", "--input-tokens", "8", "--output-tokens", "4"]
    assert (
        main.run(
            ["bench", str(model), *QUICK[1:], "--mode", "throughput", *lengths, "-o", str(out)]
        )
        == 0
    )
    (target,) = json.loads(out.read_text())["targets"]
    assert target["kind"] == "offline"
    assert target["scenarios"]["throughput"]["output_tokens"] == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "fast"], "fast"),
        (["--mode", "latency", "--rate", "1"], "--rate does not go with --mode latency"),
        (["--mode", "serve", "--scenario", "batch"], "--scenario does not go with --mode"),
        (["--slo", "fast"], "--slo 'fast' is not understood"),
        (["--price-per-hour", "-1"], "a price of -1 per hour"),
        (["--concurrency", "x"], "--concurrency: 'x' is not a list of numbers"),
    ],
)
def test_bench_command_refuses_conflicting_options(
    model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["bench", str(model), *QUICK, *options]) == 2
    assert message in capsys.readouterr().err


def test_bench_copies_checkpoints_of_registries_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []

    def open_store(reference: str) -> AbstractContextManager[FolderStore]:
        opened.append(reference)
        return nullcontext(FolderStore(model))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(local_copies, "_copies", {})
    monkeypatch.setattr(local_copies, "open_store", open_store)
    remote = "s3://bucket/models/tiny"
    lengths = ["--requests", "1", "--input-tokens", "8", "--output-tokens", "4", "--json"]
    assert main.run(["bench", remote, "--baseline", str(model), *QUICK, *lengths]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(target["name"], target["reference"]) for target in report["targets"]] == [
        ("model", str(model)),
        ("tiny", remote),
    ]
    assert main.run(["bench", str(model), "--baseline", remote, *QUICK, *lengths]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "tiny"
    # Its server reads the copy, and does not ask the registry at each start.
    plan = make_plan([remote], BenchOptions())
    backend = _make_backend(plan, plan.targets[0])
    (copy,) = (tmp_path / "cache" / "llmkit" / "checkpoints").iterdir()
    assert backend.reference == str(copy)  # type: ignore[attr-defined]
    assert opened == [remote]


def test_bench_throughput_mode_is_not_offline_beside_a_server(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(model), "--mode", "throughput", "--no-quality", "-q"]
    assert main.run([*words, "--baseline", "http://127.0.0.1:9"]) == 4
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


def test_bench_url_is_the_address_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bench", "--url", "s3://bucket/tiny", *QUICK]) == 2
    assert "--url s3://bucket/tiny is not a URL. Addresses begin with http" in (
        capsys.readouterr().err
    )
