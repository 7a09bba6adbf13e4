"""The limits of a GGUF header: files of a few bytes, each one byte or one item within or beyond."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import raw_gguf, raw_string, raw_tensor

from llmkit.checkpoint.gguf_header import read_gguf_header
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError

Q8_0 = 8  # 32 values in 34 bytes


def read(path: Path, content: bytes) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    file = path / "a.gguf"
    file.write_bytes(content)
    return read_gguf_header(file)


def refused(path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(path, content)


def start(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def test_gguf_header_needs_eight_bytes_and_the_magic(tmp_path: Path) -> None:
    refused(tmp_path, b"GGUF123", r"a.gguf: it begins with b'GGUF', not with b'GGUF'")
    refused(tmp_path, b"GGML" + start()[4:], r"begins with b'GGML', not with b'GGUF'. A complete")
    refused(tmp_path, start()[:8], r"it has 8 bytes, too few for 8 more after 8\.")
    refused(tmp_path, start()[:23], r"it has 23 bytes, too few for 8 more after 16\.")
    assert read(tmp_path, start()) == ({}, {})


@pytest.mark.parametrize(("version", "is_read"), [(1, False), (2, True), (3, True), (4, False)])
def test_gguf_header_reads_versions_2_and_3(tmp_path: Path, version: int, is_read: bool) -> None:
    if is_read:
        assert read(tmp_path, start(version)) == ({}, {})
    else:
        refused(tmp_path, start(version), f"it has version {version}, and little-endian files")


@pytest.mark.parametrize(("name", "at", "item_bytes"), [("tensors", 16, 24), ("entries", 24, 13)])
def test_gguf_header_compares_counts_with_the_rest_of_the_file(
    tmp_path: Path, name: str, at: int, item_bytes: int
) -> None:
    """So many items may fit; that they are malformed is found later."""
    head = start(**{name: 100})
    too_many = f"it claims 100 items at byte {at}, but has {at + 100 * item_bytes - 1} bytes"
    whole = (head + b"\xff" * 2400)[: at + 100 * item_bytes]
    refused(tmp_path, whole[:-1], too_many)
    with pytest.raises(InputError) as caught:
        read(tmp_path, whole)
    assert "it claims 100 items" not in str(caught.value)


def number(kind: int, code: str, value: float) -> tuple[int, bytes]:
    return kind, struct.pack(f"<{code}", value)


def test_gguf_header_reads_every_type_of_value(tmp_path: Path) -> None:
    metadata = {
        "u8": (number(0, "B", 255), 255),
        "i8": (number(1, "b", -1), -1),
        "u16": (number(2, "H", 65535), 65535),
        "i16": (number(3, "h", -2), -2),
        "u32": (number(4, "I", 2**32 - 1), 2**32 - 1),
        "i32": (number(5, "i", -3), -3),
        "f32": (number(6, "f", 1e-5), 1e-5),  # the nearest float32 has this as its shortest text
        "bool": (number(7, "?", True), True),
        "text": ("grün", "grün"),
        "u64": (number(10, "Q", 2**64 - 1), 2**64 - 1),
        "i64": (number(11, "q", -4), -4),
        "f64": (number(12, "d", 0.1), 0.1),
        "texts": (["a", "", "bc"], ["a", "", "bc"]),
        "numbers": ([7, 8], [7, 8]),
        "floats": ([0.5, 0.25], [0.5, 0.25]),
        "shorts": ((9, struct.pack("<IQ3h", 3, 3, 1, -1, 2)), [1, -1, 2]),
        "nothing": ([], []),
    }
    content = raw_gguf({name: written for name, (written, _) in metadata.items()})
    assert read(tmp_path, content)[0] == {name: value for name, (_, value) in metadata.items()}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((13, b""), "its metadata has the unknown type 13"),
        ((9, struct.pack("<IQ", 9, 0)), "its metadata has an array of the unknown type 9"),
        ((8, struct.pack("<Q", 2) + b"\xc3\x28"), "a text before byte 47 is not UTF-8"),
        ((8, struct.pack("<Q", 4) + b"abc"), "it has 48 bytes, too few for 4 more after 45"),
        ((9, struct.pack("<IQ", 8, 4) + bytes(31)), "claims 4 items at byte 49, but has 80 bytes"),
        ((9, struct.pack("<IQ", 4, 4) + bytes(15)), "claims 4 items at byte 49, but has 64 bytes"),
    ],
)
def test_gguf_header_refuses_values(tmp_path: Path, value: tuple[int, bytes], message: str) -> None:
    refused(tmp_path, raw_gguf({"a": value}), message)


def test_gguf_header_may_end_with_its_last_value(tmp_path: Path) -> None:
    assert read(tmp_path, raw_gguf({"a": [""] * 9}))[0] == {"a": [""] * 9}
    assert read(tmp_path, raw_gguf({"a": "abc"}))[0] == {"a": "abc"}
    twice = start(entries=2) + 2 * (raw_string("key") + number(4, "I", 4)[1] * 2)
    refused(tmp_path, twice, "its metadata names key twice")


@pytest.mark.parametrize("alignment", [1, 2, 8])
def test_gguf_header_accepts_small_alignments(tmp_path: Path, alignment: int) -> None:
    entries = [raw_tensor("a", (3,)), raw_tensor("b", (1,), offset=16)]
    content = raw_gguf({"general.alignment": alignment}, entries, bytes(20), alignment)
    _, tensors = read(tmp_path, content)
    first = len(content) - 20
    assert (tensors["a"].start, tensors["a"].end) == (first, first + 12)
    assert (tensors["b"].start, tensors["b"].end) == (first + 16, first + 20)


@pytest.mark.parametrize("alignment", [0, 3, 24])
def test_gguf_header_refuses_alignments(tmp_path: Path, alignment: int) -> None:
    content = raw_gguf({"general.alignment": alignment})
    refused(tmp_path, content, f"alignment is {alignment}, and a power of two was expected")


def test_gguf_header_aligns_tensors_to_32_bytes(tmp_path: Path) -> None:
    for size in (16, 17, 32):  # of the key, so that the header has another length each time
        entry = raw_tensor("a", (2, 1, 32), Q8_0)
        content = raw_gguf({"k" * size: 1}, [entry], bytes(68))
        info = read(tmp_path, content)[1]["a"]
        assert info == TensorInfo(
            "a", "F32", (2, 1, 32), "a.gguf", len(content) - 68, len(content), ggml_type="Q8_0"
        )
        assert info.start % 32 == 0
        refused(
            tmp_path,
            content[:-1],
            f"tensor a ends at byte {len(content)}, but the file has {len(content) - 1}",
        )


def test_gguf_header_refuses_overlapping_and_repeated_tensors(tmp_path: Path) -> None:
    for offset in (32, 31):
        entries = [raw_tensor("b", (1,), offset=offset), raw_tensor("a", (8,))]
        content = raw_gguf({}, entries, bytes(64))
        first = len(content) - 64
        if offset == 32:
            assert [*read(tmp_path, content)[1]] == ["a", "b"]  # in the order of their bytes
        else:
            message = f"tensor b begins at byte {first + 31}, before the end of another"
            refused(tmp_path, content, rf"{message} at {first + 32}\.")
    twice = [raw_tensor("a", (1,)), raw_tensor("a", (1,), offset=4)]
    refused(tmp_path, raw_gguf({}, twice, bytes(64)), "tensor a occurs twice")


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((), 0, r"tensor x{200} has the shape \[\], and rows of F32 are made of blocks of 1 v"),
        ((32, 33), Q8_0, r"shape \[32, 33\], and rows of Q8_0 are made of blocks of 32 values"),
        ((1, 1, 1, 1, 1), 0, r"tensor x{80} has 5 dimensions"),
        ((1,), 99, r"tensor x{80} has the unknown type 99"),
    ],
)
def test_gguf_header_refuses_tensors(
    tmp_path: Path, shape: tuple[int, ...], kind: int, message: str
) -> None:
    content = raw_gguf({}, [raw_tensor("x" * 200, shape, kind)], bytes(4096))
    refused(tmp_path, content, message)


def test_gguf_header_accepts_four_dimensions(tmp_path: Path) -> None:
    content = raw_gguf({}, [raw_tensor("a", (33, 1, 2, 32), Q8_0)], bytes(66 * 34))
    assert read(tmp_path, content)[1]["a"].shape == (33, 1, 2, 32)
    refused(tmp_path, content[:-1], "tensor a ends at byte")


def test_gguf_header_of_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no.gguf cannot be read \(No such file or directory\)"):
        read_gguf_header(tmp_path / "no.gguf")
