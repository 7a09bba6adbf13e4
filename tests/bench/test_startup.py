"""Startups: the page cache, the metrics of a start, and their place in plans and reports."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from llmkit.bench.bench_metrics import STARTUP_METRICS
from llmkit.bench.page_cache import resident_share, set_page_cache_state
from llmkit.bench.startup import STARTUP_STAGES, stage_metric_name
from llmkit.cli import main
from llmkit.common.errors import ShortageError


def test_page_cache_is_filled_and_dropped(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "empty")]
    for file, size in zip(files, (3_000_000, 10, 0), strict=True):
        file.write_bytes(bytes(size))
    assert set_page_cache_state(files, "warm") == 1.0 == resident_share(files)
    assert resident_share([]) == 1.0
    try:
        share = set_page_cache_state(files, "cold")
    except ShortageError:
        pytest.skip("the tests' folder itself is in memory")
    assert share == 0.0 == resident_share(files)
    assert set_page_cache_state(files, "warm") == 1.0 == resident_share(files)


def test_page_cache_cannot_drop_tmpfs() -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no tmpfs")
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(bytes(100_000))
        file.flush()
        with pytest.raises(ShortageError, match="100% of the weights stay in the page cache"):
            set_page_cache_state([Path(file.name)], "cold")


def test_startup_is_measured_in_stages(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    html = tmp_path / "x.html"
    gates = [
        "--gate",
        "startup.first_token_s<=600",
        "--gate",
        "ready_s<=0.001",
        "--gate",
        "cached_share>=1",
    ]
    command = [
        "bench",
        str(model),
        "--mode",
        "startup",
        "--repeats",
        "2",
        "--no-quality",
        "--device",
        "cpu",
        "-q",
    ]
    assert (
        main.run(
            [
                *command,
                *gates,
                "-o",
                str(out),
                "--html",
                str(html),
                "--charts",
                str(tmp_path / "charts"),
            ]
        )
        == 1
    )
    report = json.loads(out.read_text())
    (target,) = report["targets"]
    assert [(gate["metric"], gate["passed"]) for gate in report["gates"]] == [
        ("startup.first_token_s", True),
        ("startup.ready_s", False),
        ("startup.cached_share", True),
    ]
    assert len(target["rounds"]["startup"]) == 2
    for figures in target["rounds"]["startup"]:
        assert {*STARTUP_METRICS, *map(stage_metric_name, STARTUP_STAGES)} <= figures.keys()
        assert 0 < figures["stage_building_s"] < figures["ready_s"] < figures["first_token_s"]
        stages = sum(value for name, value in figures.items() if name.startswith("stage_"))
        assert stages == pytest.approx(figures["ready_s"], abs=0.05), (
            "the stages are all of the start"
        )
    assert target["metrics"]["peak_memory_bytes"] > 50 * 2**20
    assert target["absent"]["goodput"] == "no load was run" or "slo" in target["absent"]["goodput"]
    assert report["workload"]["page_cache"] == "warm"
    assert "From the command that serves a checkpoint" in html.read_text()
    assert [file.name for file in (tmp_path / "charts").iterdir()] == ["starts.svg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--offline"], "only a checkpoint that is served can be started"),
        (["--concurrency", "2"], "a start is measured with one request"),
        (["--gate", "output_tps>1"], "is on output_tps, which is not measured"),
        (["--page-cache", "hot"], "hot"),
        (["--url", "http://127.0.0.1:1"], "only a checkpoint that is served can be started"),
    ],
)
def test_startup_refuses_other_options(
    model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["bench", str(model), "--mode", "startup", "--no-quality", "-q", *options]) == 2
    assert message in capsys.readouterr().err
