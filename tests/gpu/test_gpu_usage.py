"""On a CUDA device: what NVML tells of it is what torch knows (`make gpu`)."""

from __future__ import annotations

import pytest
import torch

from llmkit.runtime.server.process_usage import GPU_METRICS, GpuUsageReader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_gpu_monitor_reads_every_gpu() -> None:
    pytest.importorskip("pynvml")
    readings = GpuUsageReader().read()
    assert len(readings) == torch.cuda.device_count()
    for index, figures in enumerate(readings.values()):
        assert figures.keys() == GPU_METRICS.keys()
        assert 0 <= figures["gpu_utilization_perc"] <= 1
        assert figures["gpu_memory_used_bytes"] < figures["gpu_memory_total_bytes"]
        whole = torch.cuda.get_device_properties(index).total_memory
        assert figures["gpu_memory_total_bytes"] == pytest.approx(whole, rel=0.1)
        assert figures["gpu_power_watts"] > 1
