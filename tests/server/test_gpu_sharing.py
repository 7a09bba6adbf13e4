"""MPS and MIG, by the environment and a stand-in for NVML: no GPU runs here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from llmkit.bench.gpu_monitor import GpuMonitor
from llmkit.cli import main
from llmkit.cli.doctor import sharing_rows
from llmkit.common.errors import LlmkitError
from llmkit.runtime.gpu_sharing import gpu_sharing, mps_environment, parse_mps_shares
from llmkit.runtime.server.engines.resource_shares import replica_environments
from llmkit.runtime.server.process_usage import GpuUsageReader
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server_process import ServerProcess

INSTANCES = ["MIG-11111111-aaaa", "MIG-22222222-bbbb"]
GIB = 2**30


class NvmlError(Exception):
    """NVML's own error class."""


class StandInNvml(ModuleType):
    """NVML of a machine with a GPU that is divided and one that cannot be."""

    NVMLError = NvmlError
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.opened: list[str] = []

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"GPU-{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.opened.append(uuid)
        if uuid not in INSTANCES:
            raise NvmlError("not found")
        return uuid

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:  # noqa: N802
        if handle != "GPU-0":
            raise NvmlError("not supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:  # noqa: N802
        if index >= len(INSTANCES):
            raise NvmlError("not found")
        return INSTANCES[index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return handle

    def nvmlDeviceGetName(self, handle: str) -> bytes:  # noqa: N802
        return b"NVIDIA H200 MIG 3g.71gb" if handle in INSTANCES else b"NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=5 * GIB, total=71 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        raise NvmlError("not supported for MIG")

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        raise NvmlError("not supported for MIG")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> StandInNvml:
    module = StandInNvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


@pytest.fixture
def pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MPS's pipe directory; it has no daemon yet."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    return tmp_path


def test_doctor_shows_mps_and_mig(
    nvml: StandInNvml, pipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gpu_sharing()
    assert found["mps"]["running"] is False
    assert sharing_rows(found)[0] == ("MPS", f"does not run ({pipes} has no control pipe)")
    assert [gpu["enabled"] for gpu in found["mig"]] == [True, False]
    assert [one["uuid"] for one in found["mig"][0]["instances"]] == INSTANCES
    rows = dict(sharing_rows(found))
    assert f"MIG 3g.71gb: CUDA_VISIBLE_DEVICES={INSTANCES[0]}, 71.0 GiB" in rows["MIG of GPU 0"]
    assert rows["MIG of GPU 1"] == "off, or not possible"
    (pipes / "control").touch()
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "40")
    text = sharing_rows(gpu_sharing())[0][1]
    assert text == f"runs ({pipes}), 40 % of the GPU's threads here"


def test_doctor_without_a_gpu_lists_no_instances(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert main.run(["doctor", "--json"]) == 0
    sharing = json.loads(capsys.readouterr().out)["gpu_sharing"]
    assert sharing["mig"] == []
    assert set(sharing["mps"]) == {"running", "pipe_directory", "active_thread_percentage"}


def test_metrics_of_a_mig_instance_are_those_that_nvml_has(
    nvml: StandInNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", INSTANCES[1])
    memory = {"gpu_memory_used_bytes": 5 * GIB, "gpu_memory_total_bytes": 71 * GIB}
    assert GpuUsageReader().read() == {INSTANCES[1]: memory}


def test_bench_reads_the_memory_of_a_mig_instance(
    nvml: StandInNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(uuid=INSTANCES[0].removeprefix("MIG-"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert GpuMonitor([0]).memory_bytes() == 5 * GIB
    assert nvml.opened[-1] == INSTANCES[0]
    assert GpuMonitor([0]).energy_j() is None


def test_replicas_get_a_mig_instance_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(INSTANCES))
    shares = replica_environments(2, "cuda", 2)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == INSTANCES


def test_mps_shares_are_parsed(pipes: Path) -> None:
    (pipes / "control").touch()
    assert parse_mps_shares(["a=70", "b=c=30"], ["a", "b=c"], "auto") == {"a": 70, "b=c": 30}
    assert parse_mps_shares([], ["a"], "cpu") == {}
    assert mps_environment(70) == {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "70"}
    assert mps_environment(None) == {}


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--mps-share", "a"], 2, "--mps-share 'a' is not understood. NAME=PERCENT was expected"),
        (["--mps-share", "a=0"], 2, "from 1 to 100"),
        (["--mps-share", "a=101"], 2, "from 1 to 100"),
        (["--mps-share", "c=5"], 2, "'c' is not a model that this server loads"),
        (["--mps-share", "a=5", "--mps-share", "a=6"], 2, "'a' has a share already"),
        (["--mps-share", "a=5", "--device", "cpu"], 2, "--mps-share is for GPUs"),
        (["--mps-share", "a=5"], 4, "Start `nvidia-cuda-mps-control -d` as this user"),
    ],
)
def test_wrong_mps_shares_are_refused(
    words: list[str], code: int, text: str, pipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["serve", "a=/none/a", "b=/none/b", *words]) == code
    assert text in capsys.readouterr().err


def test_mps_share_of_one_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", "/none/a", "--mps-share", "a=5"]) == 2
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" in capsys.readouterr().err


def test_server_process_gets_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        given.update(options["env"])
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    process = ServerProcess(ServeOptions("/none/model"), environment=mps_environment(25))
    with pytest.raises(LlmkitError, match="/none/model"):
        process.ready.result(60)
    process.stop()
    assert given["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
