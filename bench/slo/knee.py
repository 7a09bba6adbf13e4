"""The knee of a curve of latency over load."""

from __future__ import annotations

from collections.abc import Sequence

_MIN_BEND = 0.1  # of the height of the curve; less is a line without a knee


def knee(curve: Sequence[tuple[float, float]]) -> float | None:
    """The load at which the latency bends upwards; None when it does not.

    curve: pairs of load and latency. Both are scaled to 0..1; the knee is the point farthest below
    the line between the first and the last point (Kneedle: V. Satopaa et al. 2011, "Finding a
    'Kneedle' in a Haystack").
    """
    ordered = sorted(curve)
    if len(ordered) < 3:
        return None
    loads = [load for load, _ in ordered]
    latencies = [latency for _, latency in ordered]
    width = loads[-1] - loads[0]
    height = max(latencies) - min(latencies)
    if width <= 0 or height <= 0:
        return None
    bends = [
        (load - loads[0]) / width - (latency - min(latencies)) / height for load, latency in ordered
    ]
    best = max(range(len(bends)), key=bends.__getitem__)
    return loads[best] if bends[best] >= _MIN_BEND else None
