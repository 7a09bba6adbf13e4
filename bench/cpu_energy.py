"""Energy of the processors and their memory, from RAPL's counters (/sys/class/powercap)."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
# The counters start again from 0 after some 65 to 262 kJ: minutes at full power.
READ_INTERVAL_S = 30.0


class CpuEnergyMonitor:
    """The counters of all packages and of their DRAM. Without readable ones, `energy_j` is None.

    Linux lets only root read them, unless the administrator allows more.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._counters = [
            counter
            for folder in sorted(root.glob("*-rapl:*"))
            if (counter := _Counter.open(folder)) is not None
        ]
        self._lock = threading.Lock()
        if self._counters:
            threading.Thread(target=self._keep_reading, name="cpu-energy", daemon=True).start()

    def energy_j(self) -> float | None:
        """Joules since this object was made."""
        if not self._counters:
            return None
        with self._lock:
            return sum(counter.read_j() for counter in self._counters)

    def _keep_reading(self) -> None:
        """Read so often that no counter starts again twice between two readings."""
        pause = threading.Event()
        while True:
            pause.wait(READ_INTERVAL_S)
            self.energy_j()


class _Counter:
    """One zone's counter."""

    def __init__(self, file: Path, range_uj: int, first_uj: int) -> None:
        self._file = file
        self._range_uj = range_uj
        self._last_uj = first_uj
        self._total_uj = 0

    @staticmethod
    def open(folder: Path) -> _Counter | None:
        """The counter of a package or of its DRAM; None for other zones and unreadable ones.

        A package's own zones "core" and "uncore" are part of it, and "psys" is the whole platform.
        """
        with suppress(OSError, ValueError):
            name = (folder / "name").read_text().strip()
            if name == "dram" or name.startswith("package"):
                file = folder / "energy_uj"
                range_uj = int((folder / "max_energy_range_uj").read_text())
                return _Counter(file, range_uj, int(file.read_text()))
        return None

    def read_j(self) -> float:
        """Joules since the counter was opened."""
        now_uj = int(self._file.read_text())
        step_uj = now_uj - self._last_uj
        if step_uj < 0:
            step_uj += self._range_uj + 1
        self._last_uj = now_uj
        self._total_uj += step_uj
        return self._total_uj / 1e6


def cpu_energy_metrics(
    before_j: float | None, after_j: float | None, span_s: float, output_tokens: int
) -> dict[str, float]:
    """cpu_power_w and cpu_energy_per_token_j between two readings; {} without readings."""
    if before_j is None or after_j is None:
        return {}
    used_j = after_j - before_j
    return {"cpu_power_w": used_j / span_s, "cpu_energy_per_token_j": used_j / output_tokens}
