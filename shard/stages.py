"""Dividing the layers among pipeline stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from llmkit.checkpoint.errors import InputError


def balanced_stages(layer_bytes: Sequence[int], pp: int, first: int = 0, last: int = 0) -> tuple[tuple[int, ...], ...]:
    """The layers of each of `pp` contiguous stages, none empty.

    The largest stage has as few layer bytes as possible. Among such divisions the one is taken whose stages are
    most equal when the embedding (`first` bytes, in the first stage) and the head (`last` bytes, in the last) are
    counted too. Raises InputError when there are more stages than layers.
    """
    count = len(layer_bytes)
    if pp > count:
        raise InputError(
            f"{pp} pipeline stages for {count} layers", f"At most {count} stages, one layer each", "Lower --pp"
        )
    sums = [0]
    for size in layer_bytes:
        sums.append(sums[-1] + size)

    def largest(stage: int, start: int, stop: int, rest: int) -> int:
        return max(sums[stop] - sums[start], rest)

    bound, _ = _best(count, pp, largest)

    def squares(stage: int, start: int, stop: int, rest: int) -> int | None:
        size = sums[stop] - sums[start]
        if size > bound:
            return None
        ends = (first if stage == 0 else 0) + (last if stage == pp - 1 else 0)
        return (size + ends) ** 2 + rest

    _, stops = _best(count, pp, squares)
    starts = (0, *stops[:-1])
    return tuple(tuple(range(start, stop)) for start, stop in zip(starts, stops, strict=True))


def explicit_stages(layers: int, counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Contiguous stages of so many layers each. Raises InputError unless they make up all `layers`, each with one."""
    text = " + ".join(map(str, counts))
    if min(counts) < 1 or sum(counts) != layers:
        raise InputError(
            f"--pp-layers {','.join(map(str, counts))}: {text} = {sum(counts)} layers",
            f"{layers} layers in all, at least one in each stage",
            "Choose others, or leave --pp-layers out and give --pp",
        )
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return tuple(tuple(range(start, start + count)) for start, count in zip(starts, counts, strict=True))


def _best(count: int, pp: int, cost: Callable[[int, int, int, int], int | None]) -> tuple[int, tuple[int, ...]]:
    """The cheapest division of layers 0..count into `pp` stages and where each stage stops.

    `cost(stage, start, stop, cost of the stages after it)` is None for a stage that is not allowed.
    """

    @cache
    def from_layer(stage: int, start: int) -> tuple[int, tuple[int, ...]] | None:
        if stage == pp:
            return (0, ()) if start == count else None
        found: tuple[int, tuple[int, ...]] | None = None
        for stop in range(start + 1, count - (pp - stage - 1) + 1):
            rest = from_layer(stage + 1, stop)
            if rest is None:
                continue
            here = cost(stage, start, stop, rest[0])
            if here is not None and (found is None or here < found[0]):
                found = here, (stop, *rest[1])
        return found

    found = from_layer(0, 0)
    assert found is not None, "the division that gave the bound is allowed"
    return found
