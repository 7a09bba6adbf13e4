"""The parts of `tests/peers/bench_serve.py` that need no other engine: tables and CPU limits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkit.checkpoint.open_checkpoint import open_checkpoint

PEERS = Path(__file__).parents[1] / "peers"


@pytest.fixture(autouse=True)
def peers_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(PEERS)
    yield
    # `common` and others are names that other folders may use.
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if Path(file).parent == PEERS:
            del sys.modules[name]


def run_of(server: str, scenario: str, number: int, busy: int = 0, **metrics: Any) -> Any:
    base = {"server": server, "scenario": scenario, "round": number, "busy": busy}
    return base | metrics


def speed(output_tps: float, tpot_ms: float, ttft_ms: float = 100.0) -> dict[str, float]:
    return {
        "output_tps": output_tps,
        "tpot_mean_ms": tpot_ms,
        "ttft_mean_ms": ttft_ms,
        "ttft_p99_ms": 2 * ttft_ms,
        "cached_tokens": 0,
    }


def results() -> dict[str, Any]:
    facts = {"ready_s": 2.0, "ready_bytes": 1 << 20, "peak_bytes": 2 << 20}
    ours, theirs = "llmkit=bf16", "vllm=bf16"
    return {
        "environment": {"cpu": "A processor", "cores": 2, "cpu_flags": "avx2 avx512f"},
        "cpu_level": "avx512",
        "date": "2026-01-02",
        "cpus": 1.5,
        "bandwidths": [3e10, 4e10],
        "servers": {
            ours: {**facts, "token_bytes": 200_000_000},
            theirs: {**facts, "token_bytes": None},
        },
        "runs": [
            run_of(ours, "single", 0, **speed(100, 10)),
            run_of(ours, "single", 1, **speed(90, 10)),
            run_of(ours, "single", 0, busy=1, **speed(50, 20)),
            run_of(ours, "single", 1, busy=1, **speed(36, 25)),
            run_of(ours, "batch", 0, **speed(300, 50, 400)),
            run_of(theirs, "single", 0, **speed(50, 40)),
            run_of(theirs, "single", 1, error="a request failed"),
            run_of(theirs, "batch", 0, **speed(200, 100, 800)),
        ],
    }


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines()]


def test_serve_report_has_the_machine_medians_and_ratios_within_rounds() -> None:
    from serve_report import report  # type: ignore[import-not-found]

    text = report(results())
    machine = text.splitlines()[0]
    assert machine.startswith("A processor, 2 cores; flags avx2 avx512f; llmkit's level avx512; ")
    assert "memory reads at 40.0 GB/s; servers limited to 1.5 CPUs; 2026-01-02" in machine
    found = rows(text)
    # 200 MB in 10 ms are half of 40 GB/s.
    assert ["single", "llmkit=bf16", "95.0", "100.0", "200.0", "10.0", "50%", "0"] in found
    assert ["single", "vllm=bf16", "50.0", "100.0", "200.0", "40.0", "", "0"] in found
    once = "2.00 (2.00 to 2.00)"
    assert ["llmkit=bf16", "single", "output tokens/s", once] in found
    assert ["llmkit=bf16", "single", "decode tokens/s", "4.00 (4.00 to 4.00)"] in found
    assert ["llmkit=bf16", "batch", "output tokens/s", "1.50 (1.50 to 1.50)"] in found
    assert ["llmkit=bf16", "batch", "TTFT p99", "0.50 (0.50 to 0.50)"] in found
    shares = ["single, 1 busy", "llmkit=bf16", "0.45 (0.40 to 0.50)", "0.45 (0.40 to 0.50)"]
    assert shares in found


def test_serve_report_of_one_program_alone_has_no_ratios() -> None:
    from serve_report import report

    document = results()
    del document["servers"]["vllm=bf16"]
    document["runs"] = [document["runs"][0]]
    document["bandwidths"] = []
    text = report(document)
    assert "times that of" not in text
    assert "of alone" not in text
    assert ["single", "llmkit=bf16", "100.0", "100.0", "200.0", "10.0", "", "0"] in rows(text)


@pytest.mark.parametrize(
    ("membership", "inside", "files"),
    [
        (
            "9:memory:/m\n4:cpu,cpuacct:/jobs/one\n0::/\n",
            "cpu,cpuacct/jobs/one",
            {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000"},
        ),
        ("0::/user/session\n", "user", {"cpu.max": "150000 100000"}),
        ("0::/user/session\n", "unified/user/session", {"cpu.max": "150000 100000"}),
    ],
)
def test_cpu_limit_makes_a_group_with_a_quota(
    tmp_path: Path, membership: str, inside: str, files: dict[str, str]
) -> None:
    from cpu_limit import CpuLimit  # type: ignore[import-not-found]

    (tmp_path / "self").write_text(membership)
    parent = tmp_path / "cgroup" / inside
    parent.mkdir(parents=True)
    # Of v2, only one group lets those inside it have a quota; of v1 all do.
    marker = "cpu.cfs_quota_us" if "cpu.cfs_quota_us" in files else "cgroup.subtree_control"
    (parent / marker).write_text("cpuset cpu memory\n")
    limit = CpuLimit(1.5, "bench-1", tmp_path / "cgroup", tmp_path / "self")
    assert limit.folder == parent / "bench-1"
    assert {path.name: path.read_text() for path in limit.folder.iterdir()} == files
    assert limit.command(["serve", "a model"])[-3:] == [
        str(parent / "bench-1/cgroup.procs"),
        "serve",
        "a model",
    ]
    (limit.folder / "cpu.stat").write_text("nr_periods 7\nnr_throttled 2\n")
    assert limit.statistics() == {"nr_periods": 7, "nr_throttled": 2}
    for path in limit.folder.iterdir():
        path.unlink()
    limit.remove()
    assert not limit.folder.exists()


@pytest.mark.parametrize("controllers", ["", "memory pids\n"])
def test_cpu_limit_without_the_controller_is_an_error(tmp_path: Path, controllers: str) -> None:
    from cpu_limit import CpuLimit

    (tmp_path / "self").write_text("0::/user\n")
    (tmp_path / "cgroup/user").mkdir(parents=True)
    (tmp_path / "cgroup/user/cgroup.subtree_control").write_text(controllers)
    with pytest.raises(SystemExit, match="--cpus 2: no cgroup with a CPU quota can be made: no gr"):
        CpuLimit(2, "bench-1", tmp_path / "cgroup", tmp_path / "self")


def test_cpu_limit_names_what_the_system_refused(tmp_path: Path) -> None:
    from cpu_limit import CpuLimit

    (tmp_path / "self").write_text("1:cpu:/\n")
    (tmp_path / "cgroup/cpu/taken").mkdir(parents=True)
    (tmp_path / "cgroup/cpu/cpu.cfs_quota_us").write_text("-1\n")
    with pytest.raises(SystemExit, match=r"File exists \(.*/cgroup/cpu/taken\)"):
        CpuLimit(2, "taken", tmp_path / "cgroup", tmp_path / "self")


def test_cpu_limit_runs_the_command_in_the_group_under_its_own_process_id(tmp_path: Path) -> None:
    import subprocess

    from cpu_limit import JOIN_AND_RUN

    command = [
        "/bin/sh",
        "-c",
        JOIN_AND_RUN,
        str(tmp_path / "procs"),
        "sh",
        "-c",
        "echo $$ $0",
        "a b",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    assert output == f"{process.pid} a b\n"
    assert (tmp_path / "procs").read_text() == f"{process.pid}\n"


def test_token_bytes_are_the_weights_that_a_decode_step_reads(checkpoint: Path) -> None:
    """Of the file, or with all weights in another type; an embedding counts if it is the head."""
    from peer_servers import checkpoint_token_bytes  # type: ignore[import-not-found]

    tensors = load_file(checkpoint / "model.safetensors")
    (embedding,) = [name for name in tensors if "embed_tokens" in name]
    is_tied = "lm_head.weight" not in tensors
    weights = [tensor for name, tensor in tensors.items() if name != embedding or is_tied]
    stored = sum(tensor.nbytes for tensor in weights)
    assert checkpoint_token_bytes(checkpoint) == stored
    assert checkpoint_token_bytes(checkpoint, torch.float32.itemsize) == 2 * stored
    assert open_checkpoint(checkpoint).config["tie_word_embeddings"] is is_tied
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights)
