"""Divides the layers of a model among pipeline stages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache

from llmkit.common.errors import InputError

# (stage, its first layer, its end layer, cost of the stages after it) -> cost of this stage and the
# stages after it; None when the stage is not allowed.
StageCost = Callable[[int, int, int, int], int | None]


def balanced_stages(
    layer_bytes: Sequence[int],
    pp: int,
    embedding_bytes: int = 0,
    head_bytes: int = 0,
    starts: Collection[int] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """The layers of each of `pp` contiguous stages. No stage is empty.

    starts: the layers with which a stage after the first one can begin (see
    `ModelSpec.stage_starts`); None: any.

    Two criteria choose the division. First, the largest stage is as small as possible; embedding
    and head are not counted. Second, among such divisions, the sum of the squared stage sizes is
    the smallest; here the first stage includes the embedding, and the last stage the head.
    Raises InputError when there are more stages than layers that they can begin with.
    """
    num_layers = len(layer_bytes)
    if starts is None:
        starts = range(1, num_layers)
    if pp > num_layers and len(starts) == num_layers - 1:
        raise InputError(
            f"{pp} pipeline stages for {num_layers} layers",
            f"At most {num_layers} stages, one layer each",
            "Lower --pp",
        )
    if pp > len(starts) + 1:
        raise InputError(
            f"{pp} pipeline stages: {_explain_starts(starts)}",
            f"At most {len(starts) + 1} stage{'s' if starts else ''}",
            "Lower --pp, or use --tp",
        )
    ends = {*starts, num_layers}
    bytes_before = [0]  # of the layers before each layer
    for size in layer_bytes:
        bytes_before.append(bytes_before[-1] + size)

    def largest_stage(stage: int, first: int, end: int, rest: int) -> int | None:
        if end not in ends:
            return None
        return max(bytes_before[end] - bytes_before[first], rest)

    max_stage_bytes, _ = _cheapest_division(num_layers, pp, largest_stage)

    def sum_of_squares(stage: int, first: int, end: int, rest: int) -> int | None:
        size = bytes_before[end] - bytes_before[first]
        if size > max_stage_bytes or end not in ends:
            return None
        if stage == 0:
            size += embedding_bytes
        if stage == pp - 1:
            size += head_bytes
        return size**2 + rest

    _, chosen = _cheapest_division(num_layers, pp, sum_of_squares)
    firsts = (0, *chosen[:-1])
    return tuple(tuple(range(first, end)) for first, end in zip(firsts, chosen, strict=True))


def explicit_stages(
    num_layers: int, counts: Sequence[int], starts: Collection[int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Contiguous stages of the given numbers of layers. starts: see `balanced_stages`.

    Raises InputError unless every stage has a layer that it can begin with, and their sum is
    `num_layers`.
    """
    text = " + ".join(map(str, counts))
    if min(counts) < 1 or sum(counts) != num_layers:
        raise InputError(
            f"--pp-layers {','.join(map(str, counts))}: {text} = {sum(counts)} layers",
            f"{num_layers} layers in all, at least one in each stage",
            "Choose others, or leave --pp-layers out and give --pp",
        )
    firsts = [sum(counts[:index]) for index in range(len(counts))]
    if starts is not None and not set(firsts[1:]) <= set(starts):
        raise InputError(
            f"--pp-layers {','.join(map(str, counts))}: {_explain_starts(starts)}",
            "Stages that begin with these layers",
            "Choose others, or leave --pp-layers out and give --pp",
        )
    return tuple(
        tuple(range(first, first + count)) for first, count in zip(firsts, counts, strict=True)
    )


def _explain_starts(starts: Collection[int]) -> str:
    """Why stages can begin with these layers only."""
    layers = ", ".join(map(str, [0, *starts]))
    return (
        f"stages can begin with layer{'s' if starts else ''} {layers} only, because later layers"
        " read keys and values of earlier ones"
    )


def _cheapest_division(num_layers: int, pp: int, cost: StageCost) -> tuple[int, tuple[int, ...]]:
    """The cost of the cheapest division into `pp` stages, and the end layer of each stage."""

    @cache
    def from_layer(stage: int, first: int) -> tuple[int, tuple[int, ...]] | None:
        """The cheapest division of the layers from `first` on into the stages from `stage` on."""
        if stage == pp:
            return (0, ()) if first == num_layers else None
        best: tuple[int, tuple[int, ...]] | None = None
        for end in range(first + 1, num_layers - (pp - stage - 1) + 1):
            rest = from_layer(stage + 1, end)
            if rest is None:
                continue
            total = cost(stage, first, end, rest[0])
            if total is not None and (best is None or total < best[0]):
                best = total, (end, *rest[1])
        return best

    best = from_layer(0, 0)
    assert best is not None, "the division that gave max_stage_bytes is allowed"
    return best
