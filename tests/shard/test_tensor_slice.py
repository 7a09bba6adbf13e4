"""`TensorSlice` and `ShardedLayout`: sizes, equality, and slices that do not fit together."""

from dataclasses import replace

import pytest
from support.synthetic_checkpoint import LLAMA

from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.model.checkpoint_tensors import checkpoint_tensors
from llmkit.model.families import model_spec
from llmkit.shard.sharded_layout import ShardedLayout
from llmkit.shard.tensor_slice import TensorSlice, slice_for_rank

ROWS = TensorSlice("a.weight", "BF16", (10, 6), 0, ((2, 4), (7, 10)), padding=3)
COLUMNS = TensorSlice("a.weight", "BF16", (10, 6), 1, ((1, 4),))


def test_tensor_slice_sizes_include_padding() -> None:
    assert (ROWS.length, ROWS.shape, ROWS.nbytes, ROWS.padding_bytes) == (5, (8, 6), 96, 36)
    assert (COLUMNS.length, COLUMNS.shape, COLUMNS.nbytes) == (3, (10, 3), 60)
    assert (COLUMNS.padding, COLUMNS.padding_bytes, COLUMNS.target_offset) == (0, 0, 0)
    empty = replace(ROWS, intervals=(), padding=0)
    assert (empty.shape, empty.nbytes, empty.padding_bytes) == ((0, 6), 0, 0)
    assert replace(ROWS, file="rank").key == "rank::a.weight"


def test_tensor_slices_are_equal_when_they_hold_the_same() -> None:
    stored = replace(
        ROWS, file="f", target="t", target_offset=64, replicas=("f", "g"), sha256="0" * 64
    )
    for field in ("file", "target", "target_offset", "replicas", "sha256"):
        one = replace(ROWS, **{field: getattr(stored, field)})
        assert (one, hash(one)) == (ROWS, hash(ROWS)), field
    assert replace(ROWS, padding=2) != ROWS != replace(ROWS, first_group=1)


def test_tensor_slice_of_the_whole_tensor() -> None:
    piece = replace(
        COLUMNS, derived="shape", dense_shape=(10, 3), source_dense_shape=(10, 6), file="f"
    )
    full = TensorSlice(
        "a.weight",
        "BF16",
        (10, 6),
        1,
        ((0, 6),),
        derived="shape",
        dense_shape=(10, 6),
        source_dense_shape=(10, 6),
    )
    assert piece.full_slice() == full
    assert (piece.full_slice().file, piece.full_slice().padding) == ("", 0)


def slices_of(name: str, tp: int, quantization: QuantizationConfig | None, **config: object):
    """The slices of a tensor on each of `tp` ranks."""
    parameter, packed = checkpoint_tensors(model_spec(LLAMA | config), quantization)[name]
    info = TensorInfo(name, packed.dtype or "BF16", packed.shape)
    return [slice_for_rank(parameter, packed, info, rank, tp) for rank in range(tp)]


@pytest.mark.parametrize(
    ("vocab_size", "tp", "expected"),
    [
        # Each rank has a multiple of 64 rows: 64 of 70 on the first, then 6, then padding only.
        (70, 4, [(((0, 64),), 0), (((64, 70),), 58), ((), 64), ((), 64)]),
        (128, 2, [(((0, 64),), 0), (((64, 128),), 0)]),
        (129, 2, [(((0, 128),), 0), (((128, 129),), 127)]),
        (64, 2, [(((0, 64),), 0), ((), 64)]),
        (70, 1, [(((0, 70),), 0)]),
    ],
)
def test_slices_of_the_vocabulary_are_padded(vocab_size: int, tp: int, expected: list) -> None:
    pieces = slices_of("model.embed_tokens.weight", tp, None, vocab_size=vocab_size)
    assert [(piece.intervals, piece.padding) for piece in pieces] == expected
    assert len({piece.shape for piece in pieces}) == 1


def test_slices_of_quantized_weights() -> None:
    gptq = QuantizationConfig("gptq", Scheme(4, 16))
    down = [
        slices_of(f"model.layers.0.mlp.down_proj.{suffix}", 2, gptq)
        for suffix in ("g_idx", "qweight", "scales")
    ]
    assert [piece.intervals for piece in down[0]] == [((0, 32),), ((32, 64),)]
    assert [piece.first_group for piece in down[0]] == [0, 2]
    assert [piece.intervals for piece in down[1]] == [((0, 4),), ((4, 8),)]
    assert [(piece.dim, piece.intervals) for piece in down[2]] == [(0, ((0, 2),)), (0, ((2, 4),))]
    (up,) = set(slices_of("model.layers.0.mlp.up_proj.g_idx", 2, gptq))
    assert (up.intervals, up.first_group, up.derived) == (((0, 32),), 0, "group_index")
    per_channel = QuantizationConfig("gptq", Scheme(4, -1))
    groups = slices_of("model.layers.0.mlp.down_proj.g_idx", 2, per_channel)
    assert [piece.first_group for piece in groups] == [0, 0]
    packed = QuantizationConfig("compressed-tensors", Scheme(4, 16))
    for module, shape in (("down", (32, 32)), ("up", (32, 32)), ("gate", (32, 32))):
        for piece in slices_of(f"model.layers.0.mlp.{module}_proj.weight_shape", 2, packed):
            assert (piece.derived, piece.dense_shape) == ("shape", shape)
            assert piece.source_dense_shape == ((32, 64) if module == "down" else (64, 32))
            assert (piece.dim, piece.intervals) == (0, ((0, 2),))


def layout_of(*slices: TensorSlice) -> ShardedLayout:
    order = tuple(dict.fromkeys(piece.name for piece in slices))
    return ShardedLayout(1, 1, 1, ((0,),), ("f",), order, (), slices)


def part(*intervals: tuple[int, int], name: str = "a") -> TensorSlice:
    return TensorSlice(name, "BF16", (10, 6), 0, intervals)


DIFFERENT = "a: its slices are of different tensors"


@pytest.mark.parametrize(
    ("slices", "problems"),
    [
        ([part((0, 10))], []),
        ([part((5, 10)), part((0, 5))], []),
        # A KV head, 4 to 6, that two ranks share.
        ([part((0, 2), (4, 6), (6, 8)), part((2, 4), (4, 6), (8, 10))], []),
        ([part((1, 10))], ["a: its slices leave out 1 of 10"]),
        ([part((0, 5)), part((6, 10))], ["a: its slices leave out 6 of 10"]),
        ([part((0, 5)), part((4, 10))], ["a: its slices overlap at 4 of 10"]),
        ([part((0, 5)), part((5, 9))], ["a: its slices end at 9 of 10"]),
        ([part((0, 10)), replace(part((0, 10)), dtype="F16")], [DIFFERENT]),
        ([part((0, 10)), replace(part((0, 10)), dim=1)], [DIFFERENT]),
        ([part((0, 10)), replace(part((0, 10)), source_shape=(10, 7))], [DIFFERENT]),
        # The shape of the dense weight is whole on every rank.
        ([replace(part((0, 1)), derived="shape")], []),
        (
            [part((0, 9)), part((0, 10), name="b"), part((2, 10), name="c")],
            ["a: its slices end at 9 of 10", "c: its slices leave out 2 of 10"],
        ),
    ],
)
def test_layout_gaps(slices: list[TensorSlice], problems: list[str]) -> None:
    assert layout_of(*slices).gaps() == problems


def test_layout_tensors_are_the_sources() -> None:
    layout = layout_of(part((5, 10), name="b"), part((0, 10)), part((0, 5), name="b"))
    assert list(layout.tensors) == ["b", "a"]
    assert layout.tensors["b"].shape == (10, 6)
    assert [piece.intervals for piece in layout.slices_by_source["b"]] == [((0, 5),), ((5, 10),)]
