"""Options of `llmkit bench` that would be ignored beside others are refused before any run."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import tiny_checkpoint

from llmkit.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


TRACE = ["--trace", "trace.jsonl"]
SWEEP = ["--sweep-options", "max_num_seqs=8,16"]
SLO = ["--slo", "ttft:1s"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # --mode with --trace.
        (["--mode", "latency", *TRACE], "--trace goes with --mode serve alone"),
        (["--mode", "throughput", *TRACE], "--trace goes with --mode serve alone"),
        (["--mode", "sweep", *TRACE], "--trace goes with --mode serve alone"),
        (["--mode", "startup", *TRACE], "--trace does not go with --mode startup"),
        (["--mode", "slo", *SLO, *TRACE], "No --concurrency, --rate, --trace or --turns"),
        ([*TRACE, "--input-tokens", "9"], "--input-tokens does not go with --trace"),
        ([*TRACE, "--output-tokens", "9"], "--output-tokens does not go with --trace"),
        ([*TRACE, "--burstiness", "2"], "--burstiness does not go with --trace"),
        # Loads.
        (["--burstiness", "2"], "--burstiness needs --rate"),
        (["--concurrency", "2", "--burstiness", "2"], "--burstiness needs --rate"),
        (
            ["--mode", "slo", *SLO, "--search", "concurrency", "--burstiness", "2"],
            "--burstiness needs --rate",
        ),
        (["--mode", "startup", "--input-tokens", "9"], "--input-tokens does not go with --mode"),
        (["--mode", "startup", "--prefix-tokens", "9"], "--prefix-tokens does not go with --mode"),
        # --sweep-options.
        ([*SWEEP, "--mode", "startup"], "--sweep-options does not go with --mode startup"),
        ([*SWEEP, "--mode", "throughput"], "--mode throughput implies --offline"),
        ([*SWEEP, "--mode", "agentic", *TRACE], "trace trace.jsonl cannot be read"),
        ([*SWEEP, "--offline"], "--offline has none"),
        ([*SWEEP, "--no-speed"], "--sweep-options does not go with --no-speed"),
        # --slo and what else is measured under a load.
        (["--mode", "startup", *SLO], "--slo does not go with --mode startup"),
        (["--mode", "startup", "--server-metrics"], "--server-metrics does not go with --mode"),
        (["--mode", "startup", "--limit", "3"], "--limit does not go with --mode startup"),
        (["--mode", "startup", "--data", "x"], "--data does not go with --mode startup"),
        (["--mode", "startup", "--price-per-hour", "1"], "--price-per-hour does not go with"),
        (["--no-speed", *SLO], "--slo does not go with --no-speed"),
        (["--no-speed", "--repeats", "2"], "--repeats does not go with --no-speed"),
        (["--no-speed", "--power", "9"], "--power does not go with --no-speed"),
        (["--no-speed", "--mode", "sweep"], "--no-speed does not go with --mode"),
        (["--no-speed", "--mode", "slo", *SLO], "--no-speed does not go with --mode"),
        (["--no-speed", "--concurrency", "2"], "--no-speed does not go with --mode"),
        # --tool-cases.
        (["--tool-limit", "3"], "--tool-limit needs --tool-cases"),
        (["--tool-max-tokens", "3"], "--tool-max-tokens needs --tool-cases"),
        (["--tasks-limit", "3"], "--tasks-limit needs --tasks"),
        (["--tool-cases", "builtin", "--offline"], "--tool-cases asks a server"),
        (["--tool-cases", "builtin", "--mode", "throughput"], "--tool-cases asks a server"),
        (
            ["--tool-cases", "builtin", "--speculate", "2", "--synthetic-accept-length", "2"],
            "--tool-cases would score its answers. They are not the model's",
        ),
        # --search and --attained.
        (["--search", "concurrency"], "--search belongs to --mode slo"),
        (["--mode", "sweep", "--attained", "0.9"], "--attained belongs to --mode slo"),
        (["--mode", "serve", "--precision", "0.1"], "--precision belongs to --mode slo"),
        (["--max-probes", "3"], "--max-probes belongs to --mode slo"),
        # --offline and --url.
        (["--offline", "--server-metrics"], "--server-metrics asks a server"),
        (["--offline", "--mode", "agentic", *TRACE], "--mode agentic asks a server"),
        (["--offline", "--mode", "startup"], "only a checkpoint that is served can be started"),
        (
            ["--url", "http://127.0.0.1:9", "--mode", "startup"],
            "only a checkpoint that is served can be started",
        ),
    ],
)
def test_bench_refuses_an_option_that_it_would_ignore(
    model: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main.run(["bench", str(model), "--device", "cpu", *words])
    captured = capsys.readouterr()
    assert message in captured.err
    assert code in (2, 3), captured.err
    assert captured.out == ""
