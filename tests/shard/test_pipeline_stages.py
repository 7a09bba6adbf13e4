"""Pipeline stages: balanced ones are the best that there are, explicit ones are checked."""

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.common.errors import InputError
from llmkit.model.spec import LayerSpec, ModelSpec
from llmkit.shard.pipeline_stages import balanced_stages, explicit_stages


def divisions(num_layers: int, pp: int, first: int = 0) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to divide the layers from `first` on into `pp` stages that are not empty."""
    if pp == 1:
        yield (tuple(range(first, num_layers)),)
        return
    for end in range(first + 1, num_layers - pp + 2):
        for rest in divisions(num_layers, pp - 1, end):
            yield (tuple(range(first, end)), *rest)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.integers(1, 8),
    st.integers(0, 60),
    st.integers(0, 60),
    st.sets(st.integers(1, 7)),
)
def test_balanced_stages_are_the_best_of_all_divisions(
    sizes: list[int], pp: int, embedding: int, head: int, never_first: set[int]
) -> None:
    starts = set(range(1, len(sizes))) - never_first
    pp = min(pp, len(starts) + 1)

    def cost(stages: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
        stage_bytes = [sum(sizes[layer] for layer in stage) for stage in stages]
        largest = max(stage_bytes)
        stage_bytes[0] += embedding
        stage_bytes[-1] += head
        return largest, sum(size**2 for size in stage_bytes)

    stages = balanced_stages(sizes, pp, embedding, head, starts)
    possible = [
        division
        for division in divisions(len(sizes), pp)
        if {stage[0] for stage in division[1:]} <= starts
    ]
    assert stages in possible
    assert cost(stages) == min(map(cost, possible))


@pytest.mark.parametrize(
    ("sizes", "pp", "counts"),
    [
        ([10] * 5, 1, [5]),
        ([10] * 5, 5, [1, 1, 1, 1, 1]),
        ([10] * 6, 4, [1, 1, 2, 2]),  # the first of equally good divisions
        ([30, 10, 10, 10], 2, [1, 3]),
    ],
)
def test_balanced_stages_without_embedding_and_head(
    sizes: list[int], pp: int, counts: list[int]
) -> None:
    assert [len(stage) for stage in balanced_stages(sizes, pp)] == counts


def test_balanced_stages_prefer_equal_squares() -> None:
    # No stage has more than 2 layers. Embedding and head decide which stage has 2.
    assert balanced_stages([10] * 4, 3, 25, 25) == ((0,), (1, 2), (3,))
    assert balanced_stages([10] * 4, 3, 25, 0) == ((0,), (1,), (2, 3))
    assert balanced_stages([10] * 4, 3, 0, 25) == ((0,), (1, 2), (3,))


def test_balanced_stages_are_at_most_the_layers() -> None:
    text = "4 pipeline stages for 3 layers. At most 3 stages, one layer each"
    with pytest.raises(InputError, match=text):
        balanced_stages([1, 1, 1], 4)
    assert balanced_stages([1, 1, 1], 3) == ((0,), (1,), (2,))


def test_explicit_stages_cover_all_layers() -> None:
    assert explicit_stages(6, (1, 3, 2)) == ((0,), (1, 2, 3), (4, 5))
    assert explicit_stages(1, (1,)) == ((0,),)
    for counts, text in (
        ((3, 0, 3), "--pp-layers 3,0,3: 3 + 0 + 3 = 6 layers. 6 layers in all, at least one"),
        ((7, -1), "--pp-layers 7,-1: 7 + -1 = 6 layers"),
        ((2, 3), "--pp-layers 2,3: 2 + 3 = 5 layers. 6 layers in all"),
        ((7,), "--pp-layers 7: 7 = 7 layers"),
    ):
        with pytest.raises(InputError, match=re.escape(text)):
            explicit_stages(6, counts)


def test_stages_begin_only_with_layers_that_read_no_earlier_keys() -> None:
    """Layers 4 and 5 read the keys and values of layers 2 and 3."""
    layers = [LayerSpec()] * 4 + [LayerSpec(kv_shared_layer_offset=2)] * 2
    starts = shared_spec(tuple(layers)).stage_starts
    assert starts == (1, 2)
    assert balanced_stages([10] * 6, 3, starts=starts) == ((0,), (1,), (2, 3, 4, 5))
    assert explicit_stages(6, (2, 4), starts) == ((0, 1), (2, 3, 4, 5))
    reason = "stages can begin with layers 0, 1, 2 only, because later layers read keys and values"
    with pytest.raises(InputError, match=f"4 pipeline stages: {reason}.* At most 3 stages"):
        balanced_stages([10] * 6, 4, starts=starts)
    with pytest.raises(InputError, match=f"--pp-layers 3,3: {reason}"):
        explicit_stages(6, (3, 3), starts)
    layers = [LayerSpec(), LayerSpec(kv_shared_layer_offset=1)]
    with pytest.raises(InputError, match=r"layer 0 only.* At most 1 stage\. Lower --pp, or use"):
        balanced_stages([10] * 2, 2, starts=shared_spec(tuple(layers)).stage_starts)
    assert shared_spec((LayerSpec(),) * 3).stage_starts == (1, 2)


def shared_spec(layers: tuple[LayerSpec, ...]) -> ModelSpec:
    return ModelSpec("Gemma4ForCausalLM", 8, 1, 1, 8, 8, 8, 8, layers, {})
