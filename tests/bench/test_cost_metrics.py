"""Cost and energy of tokens: the formula, its options, RAPL's counters."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.bench.bench_metrics import RequestTimeline, calculate_metrics
from llmkit.bench.bench_options import BenchOptions
from llmkit.bench.cost_metrics import (
    check_cost_options,
    check_power,
    cost_metrics,
    input_cost_share,
)
from llmkit.bench.cpu_energy import CpuEnergyMonitor, cpu_energy_metrics
from llmkit.cli import main
from llmkit.common.errors import LlmkitError, ShortageError, UsageError

# Two requests of 100 prompt and 11 output tokens in 10 s: 3 s of prefill, of which 1 s of waiting,
# and 9 s of decode.
TIMELINES = [
    RequestTimeline("a", 0.0, (1.0, 6.0), 100, 0, 11),
    RequestTimeline("b", 4.0, (6.0, 10.0), 100, 40, 11),
]
METRICS = calculate_metrics(TIMELINES, 10.0)


def test_cost_is_that_of_the_paid_hours_and_of_the_energy() -> None:
    options = BenchOptions(price_per_hour=3.6, utilization=0.5, power=500.0, price_per_kwh=0.2)
    found = cost_metrics(options, METRICS, TIMELINES)
    # 7.2 an hour for the machine, 0.1 for half a kWh; 10 s of it.
    run_cost = 7.3 * 10 / 3600
    assert found == pytest.approx(
        {
            "kwh_per_million": 0.5 * 10 / 3600 / 22 * 1e6,
            "cost_per_million": run_cost / 22 * 1e6,
            "cost_per_million_total": run_cost / 222 * 1e6,
            "cost_per_million_input": 0.25 * run_cost / 200 * 1e6,
            "cost_per_million_output": 0.75 * run_cost / 22 * 1e6,
            "input_cost_share": 0.25,
        }
    )
    # Input and output tokens together bear the whole cost.
    both = found["cost_per_million_input"] * 200 + found["cost_per_million_output"] * 22
    assert both == pytest.approx(run_cost * 1e6)


def test_cost_needs_a_price_and_energy_a_power() -> None:
    assert cost_metrics(BenchOptions(), METRICS, TIMELINES) == {}
    assert list(cost_metrics(BenchOptions(power=70.0), METRICS, TIMELINES)) == ["kwh_per_million"]
    only_energy = BenchOptions(power=1000.0, price_per_kwh=0.36)
    assert cost_metrics(only_energy, METRICS, TIMELINES)["cost_per_million"] == pytest.approx(
        0.36 * 10 / 3600 / 22 * 1e6
    )
    counters = METRICS | {"gpu_power_w": 300.0, "cpu_power_w": 60.0}
    measured = cost_metrics(BenchOptions(power="measured"), counters, TIMELINES)
    assert measured["kwh_per_million"] == pytest.approx(0.36 * 10 / 3600 / 22 * 1e6)


def test_input_share_leaves_out_the_wait_in_the_queue() -> None:
    assert input_cost_share(TIMELINES) == pytest.approx(3 / 12)
    assert input_cost_share(TIMELINES, queue_s=1.0) == pytest.approx(2 / 11)
    assert input_cost_share([RequestTimeline("a", 0.0, (1.0,), 5, 0, 1)], queue_s=2.0) == 1.0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"price_per_hour": -1.0}, "a price of -1 per hour is not a valid price"),
        ({"price_per_kwh": 0.0}, "a price of 0 per kWh is not a valid price"),
        ({"price_per_kwh": 0.3}, "--price-per-kwh without a power. .* Give --power WATTS"),
        ({"utilization": 0.4}, "--utilization without a price. .* Give --price-per-hour"),
    ],
)
def test_cost_options_that_need_others_are_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        check_cost_options(BenchOptions(**options))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("has_servers", "has_counters", "error", "text"),
    [
        (True, True, UsageError, "--power measured with --url"),
        (False, False, ShortageError, "counters of energy cannot be read"),
    ],
)
def test_power_that_cannot_be_measured_is_refused(
    has_servers: bool, has_counters: bool, error: type[LlmkitError], text: str
) -> None:
    with pytest.raises(error, match=text):
        check_power(BenchOptions(power="measured"), has_servers, has_counters)
    check_power(BenchOptions(power=70.0), has_servers, has_counters)


def test_bench_command_refuses_a_power_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bench", "model", "--power", "much"]) == 2
    error = capsys.readouterr().err
    assert "--power: 'much' is not a power. Watts above 0, or measured, were expected" in error


def zone(root: Path, folder: str, name: str, energy_uj: int) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text("999999\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path / "energy_uj"


def test_cpu_energy_counts_packages_and_memory_over_a_restart_of_a_counter(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    platform = zone(tmp_path, "intel-rapl:1", "psys", 0)
    (tmp_path / "intel-rapl").mkdir()
    monitor = CpuEnergyMonitor(tmp_path)
    assert monitor.energy_j() == 0
    package.write_text("100000\n")  # it passed 999,999
    memory.write_text("50000\n")
    core.write_text("90000\n")
    platform.write_text("500000\n")
    assert monitor.energy_j() == pytest.approx(0.25)
    memory.write_text("60000\n")
    assert monitor.energy_j() == pytest.approx(0.26)


def test_cpu_energy_without_counters_is_not_known(tmp_path: Path) -> None:
    monitor = CpuEnergyMonitor(tmp_path)
    assert monitor.energy_j() is None
    assert cpu_energy_metrics(None, None, 1.0, 1) == {}
    assert cpu_energy_metrics(10.0, 40.0, 3.0, 60) == {
        "cpu_power_w": 10.0,
        "cpu_energy_per_token_j": 0.5,
    }
