"""Killed at any moment, sharding, resharding and merging lose nothing; what a changed source gave
is not kept.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fault_injection import KILLED, counted, disk_with_room, killed_at
from support.synthetic_checkpoint import synthetic_checkpoint

from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.common.errors import InputError, ShortageError
from llmkit.shard import chunking as blocks
from llmkit.shard import copy_slices as stream
from llmkit.shard.merge import merge
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.verify import verify

GPTQ = QuantizationConfig("gptq", Scheme(4, 8))
MOMENTS = 6  # of each run, drawn at random


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(params=["shard", "reshard", "merge"])
def run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Callable]:
    """What is read, and a function that writes what is made of it into a folder."""
    source = synthetic_checkpoint(tmp_path / "source", GPTQ)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 700)
    monkeypatch.setattr(stream, "COMMIT_BYTES", 3000)
    if request.param == "shard":
        return source, lambda out: shard(source, out, 2, 2)
    shard(source, tmp_path / "ranks", 2)
    if request.param == "reshard":
        return tmp_path / "ranks", lambda out: shard(tmp_path / "ranks", out, 4, 2)
    return tmp_path / "ranks", lambda out: merge(tmp_path / "ranks", out)


def test_shard_killed_at_random_moments_loses_nothing(
    run: tuple[Path, Callable], tmp_path: Path
) -> None:
    source, write = run
    before = contents(source)
    out = tmp_path / "out"
    write(tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    total = counted(tmp_path / "counted", lambda: write(tmp_path / "counted"))
    moments = random.Random(0).sample(range(1, total + 1), MOMENTS)
    for moment in moments:  # each takes up what the one before left
        status = killed_at(moment, out, lambda: write(out))
        assert status in (0, KILLED)
        assert contents(source) == before
        if out.exists():  # complete, or it would not have its name
            assert contents(out) == expected
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
    write(out)
    assert contents(out) == expected
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_shard_resumes_after_a_full_disk(run: tuple[Path, Callable], tmp_path: Path) -> None:
    _, write = run
    write(tmp_path / "expected")
    with (
        disk_with_room(9000, "out.partial"),
        pytest.raises(ShortageError, match="The disk is full"),
    ):
        write(tmp_path / "out")
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_shard_of_a_changed_source_leaves_nothing(tmp_path: Path) -> None:
    shard(synthetic_checkpoint(tmp_path / "source", GPTQ), tmp_path / "ranks", 2)
    file = tmp_path / "ranks" / "rank-pp0-tp1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    text = r"rank-pp0-tp1\.safetensors has SHA-256 \w{64}, llmkit\.json says \w{64}"
    for write in (
        lambda out: shard(tmp_path / "ranks", out, 4),
        lambda out: merge(tmp_path / "ranks", out),
    ):
        with pytest.raises(InputError, match=text):
            write(tmp_path / "out")
        assert list(tmp_path.glob("out*")) == []
    data[-1] ^= 1
    file.write_bytes(data)
    shard(tmp_path / "ranks", tmp_path / "out", 4)
    assert verify(tmp_path / "out").ok


def test_shard_rereads_a_source_that_changed_since_the_interruption(
    tmp_path: Path, monkeypatch
) -> None:
    source = synthetic_checkpoint(tmp_path / "source")
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 700)
    monkeypatch.setattr(stream, "COMMIT_BYTES", 3000)
    total = counted(tmp_path / "counted", lambda: shard(source, tmp_path / "counted", 2))
    assert (
        killed_at(total // 2, tmp_path / "out", lambda: shard(source, tmp_path / "out", 2))
        == KILLED
    )
    synthetic_checkpoint(source, seed=1)
    shard(source, tmp_path / "out", 2)
    shard(source, tmp_path / "expected", 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
