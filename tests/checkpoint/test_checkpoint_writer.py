"""Writing checkpoints: all or nothing, resumed runs give the same bytes, nothing is overwritten."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import DTYPE_NAMES
from llmkit.checkpoint.manifest import verify_manifest
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.output_directory import check_output
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.writer import CheckpointWriter, plan_files, planned_bytes
from llmkit.common.errors import InputError, OutputError, ShortageError

TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "b.packed": torch.arange(3, dtype=torch.uint8),
    "c.weight": torch.arange(10).to(torch.bfloat16),
    "d.scalar": torch.tensor(7, dtype=torch.int64),
    "e.empty": torch.empty(0, 3, dtype=torch.float16),
}
PLAN = plan_files(
    [TensorInfo(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in TENSORS.items()], max_bytes=100
)
IDENTITY = {"command": "test", "seed": 1}


class InterruptedRunError(Exception):
    pass


def run(
    out: Path,
    names: Iterable[str] = TENSORS,
    stop: str | None = None,
    source: Checkpoint | None = None,
) -> None:
    """Write TENSORS in the order of `names`, committing each; stop before `stop`."""
    with CheckpointWriter(out, PLAN, source, IDENTITY) as writer:
        for name in names:
            if name == stop:
                raise InterruptedRunError
            if not writer.is_written(name):
                writer.write(name, TENSORS[name])
                writer.commit()
        writer.finish({"model_type": "x"}, {"tokenizer.json": b"{}"}, {"seed": 1})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def siblings(out: Path) -> set[str]:
    return {file.name for file in out.parent.iterdir()}


def test_writer_files_load_with_safetensors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out)
    assert siblings(out) == {"out"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found: dict[str, torch.Tensor] = {}
    for file in PLAN:
        found |= load_file(out / file)
    assert len(PLAN) == 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert name in load_file(out / index["weight_map"][name])
    assert sum((out / file).stat().st_size for file in PLAN) == planned_bytes(PLAN)


def test_writer_aligns_tensors_to_their_element_size(tmp_path: Path) -> None:
    run(tmp_path / "out")
    for info in open_checkpoint(tmp_path / "out").tensors.values():
        assert info.start % info.torch_dtype.itemsize == 0


def test_writer_output_loads_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = open_checkpoint(tiny_checkpoint(tmp_path / "source"))
    plan = [TensorInfo(info.name, info.dtype, info.shape) for info in source.tensors.values()]
    with CheckpointWriter(tmp_path / "out", plan_files(plan, max_bytes=50_000), source) as writer:
        for name in source.tensors:
            writer.write(name, source.read(name))
        writer.finish(source.config, source.side_files(), {})
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    manifest = json.loads((tmp_path / "out" / "llmkit.json").read_text())
    assert manifest["source"] == {
        "reference": str(tmp_path / "source"),
        "files": source.source_hashes(),
    }


@pytest.mark.parametrize("stop", list(TENSORS))
def test_writer_resumes_to_the_same_bytes(tmp_path: Path, stop: str) -> None:
    run(tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "resumed", stop=stop)
    assert siblings(tmp_path / "whole") == {"whole", "resumed.partial", "resumed.partial.journal"}
    run(tmp_path / "resumed", names=reversed(TENSORS))
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")
    assert siblings(tmp_path / "whole") == {"whole", "resumed"}
    assert verify_manifest(tmp_path / "resumed") == []


def test_writer_keeps_uncommitted_tensors_after_an_error(tmp_path: Path) -> None:
    def interrupted() -> None:
        with CheckpointWriter(tmp_path / "out", PLAN, identity=IDENTITY) as writer:
            writer.write("a.weight", TENSORS["a.weight"])
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        interrupted()
    with CheckpointWriter(tmp_path / "out", PLAN, identity=IDENTITY) as writer:
        assert writer.is_written("a.weight")
        assert not writer.is_written("c.weight")
        assert torch.equal(writer.read_back("a.weight"), TENSORS["a.weight"])
        with pytest.raises(ValueError, match=r"c.weight has not been written"):
            writer.read_back("c.weight")


@pytest.mark.parametrize("identity", [{"command": "test", "seed": 2}, {}])
def test_writer_restarts_for_another_identity(tmp_path: Path, identity: dict[str, Any]) -> None:
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "out", stop="e.empty")
    (tmp_path / "out.partial" / "stray").write_text("left over")
    with CheckpointWriter(tmp_path / "out", PLAN, identity=identity) as writer:
        assert not any(writer.is_written(name) for name in TENSORS)
        assert not (tmp_path / "out.partial" / "stray").exists()


def test_writer_restarts_for_another_plan(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "out", stop="e.empty")
    plan = {"model.safetensors": [tensor for part in PLAN.values() for tensor in part]}
    with CheckpointWriter(tmp_path / "out", plan, identity=IDENTITY) as writer:
        assert not any(writer.is_written(name) for name in TENSORS)


def test_writer_rewrites_a_torn_journal_line(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "out", stop="d.scalar")
    journal = tmp_path / "out.partial.journal"
    written = journal.read_bytes()
    last_tensor = written.rindex(b'["model')
    journal.write_bytes(written[: last_tensor + 20])
    with CheckpointWriter(tmp_path / "out", PLAN, identity=IDENTITY) as writer:
        assert [writer.is_written(name) for name in TENSORS] == [True, True, False, False, False]
    run(tmp_path / "out")
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_writer_refuses_a_partial_output_that_changed(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "out", stop="c.weight")
    file = next(iter(PLAN))
    with (tmp_path / "out.partial" / file).open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x55")
    with pytest.raises(OutputError, match=r"tensor \S+ changed after the interrupted run wrote it"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_or_die(out: Path, die_at: int) -> None:
    """Write tensors, committing each second one; killed after number `die_at`."""
    sizes = {f"t{i}": (1000, 10 + i) for i in range(8)}
    plan = {"model.safetensors": [TensorInfo(n, "F32", s) for n, s in sizes.items()]}
    with CheckpointWriter(out, plan, identity={"a": 1}) as writer:
        for i, (name, shape) in enumerate(sizes.items()):
            if writer.is_written(name):
                continue
            writer.write(name, torch.full(shape, float(i)))
            if i % 2:
                writer.commit()
            if i == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        writer.finish({}, {"tokenizer.json": b"{}"}, {})


def test_writer_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    def start(out: str, die_at: int) -> int | None:
        process = get_context("fork").Process(target=write_or_die, args=(tmp_path / out, die_at))
        process.start()
        process.join()
        return process.exitcode

    assert start("whole", -1) == 0
    assert start("killed", 2) == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    lines = (tmp_path / "killed.partial.journal").read_text().splitlines()
    assert len([line for line in lines if line.startswith("[")]) == 2
    assert start("killed", 5) == -signal.SIGKILL
    assert start("killed", -1) == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    assert siblings(tmp_path / "whole") == {"whole", "killed"}


def test_writer_chunks_give_the_bytes_of_whole_tensors(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with CheckpointWriter(tmp_path / "out", PLAN, identity=IDENTITY) as writer:
        for file, part in PLAN.items():
            for planned in part:
                data = TENSORS[planned.name].reshape(-1).view(torch.uint8).numpy().tobytes()
                cut = len(data) // 3
                writer.write_chunk(file, planned.name, 0, data[:cut])
                if cut:
                    assert not writer.is_written(planned.name)
                    with pytest.raises(ValueError, match="after byte"):
                        writer.write_chunk(file, planned.name, cut + 1, data[cut + 1 :])
                    with pytest.raises(ValueError, match="after byte"):
                        writer.write_chunk(file, planned.name, cut, data[cut:] + b"x")
                    writer.write_chunk(file, planned.name, cut, data[cut:])
        writer.finish({"model_type": "x"}, {"tokenizer.json": b"{}"}, {"seed": 1})
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


@pytest.mark.parametrize("refused", ["nothing", "open", "write"])
def test_writer_writes_large_chunks_past_the_page_cache(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they begin and end; a file system that cannot do it says so when a file is opened or
    written.
    """
    data = {"a": os.urandom(7), "b": os.urandom(20_000_003), "c": os.urandom(3_000_000)}
    plan = plan_files([TensorInfo(name, "U8", (len(value),)) for name, value in data.items()])
    cuts = {"b": [0, 5, 1_100_000, 1_100_001, 2_148_577, 12_148_577, 20_000_003]}
    opened = os.open
    pwrite = os.pwrite

    def no_open(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *more, **named)

    def no_write(fd: int, view: memoryview, position: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(fd, view, position)

    if refused == "open":
        monkeypatch.setattr(os, "open", no_open)
    if refused == "write":
        monkeypatch.setattr(os, "pwrite", no_write)
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        for name, value in data.items():
            for start, stop in itertools.pairwise(cuts.get(name, [0, len(value)])):
                writer.write_chunk("model.safetensors", name, start, value[start:stop])
        writer.finish({"model_type": "x"}, {}, {})
    assert verify_manifest(tmp_path / "out") == []
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.numpy().tobytes() for name, tensor in found.items()} == data


def test_writer_sharded_layout_holds_a_name_in_several_files(tmp_path: Path) -> None:
    plan = {f"rank-{rank}.safetensors": [TensorInfo("w", "F32", (2, 2))] for rank in range(2)}
    layout = {"tp": 2}
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        with pytest.raises(ValueError, match="w is planned in"):
            writer.write("w", torch.zeros(2, 2))
        for rank, file in enumerate(plan):
            writer.write("w", torch.full((2, 2), float(rank)), file=file)
        writer.finish({"model_type": "x"}, {}, {"layout": layout})
    manifest = json.loads((tmp_path / "out" / "llmkit.json").read_text())
    assert set(manifest["tensors"]) == {"rank-0.safetensors::w", "rank-1.safetensors::w"}
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert load_file(tmp_path / "out" / "rank-1.safetensors")["w"].tolist() == [[1, 1], [1, 1]]
    opened = open_checkpoint(tmp_path / "out")
    assert opened.layout == layout
    assert opened.tensors == {}
    assert verify_manifest(tmp_path / "out") == []


def test_writer_refuses_tensors_that_are_not_planned(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", PLAN) as writer:
        with pytest.raises(ValueError, match=r"planned as F32 \[4, 6\]"):
            writer.write("a.weight", TENSORS["a.weight"].half())
        with pytest.raises(ValueError, match=r"planned as F32 \[4, 6\]"):
            writer.write("a.weight", TENSORS["a.weight"].t())
        with pytest.raises(ValueError, match="unknown is planned in no file"):
            writer.write("unknown", TENSORS["a.weight"])
        with pytest.raises(ValueError, match=r"5 tensors have not been written \(a.weight"):
            writer.finish({}, {}, {})


def test_writer_leaves_an_existing_output_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep")
    with pytest.raises(OutputError, match="exists and is not empty"):
        run(out)
    assert contents(out) == {"precious": b"keep"}
    assert siblings(out) == {"out"}
    (tmp_path / "file").write_text("keep")
    with pytest.raises(OutputError, match="exists and is a file"):
        run(tmp_path / "file")


def test_writer_accepts_an_empty_directory_and_missing_parents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty")
    run(tmp_path / "new" / "deep" / "out")
    assert contents(tmp_path / "empty") == contents(tmp_path / "new" / "deep" / "out")


def test_writer_refuses_an_output_in_the_source(tmp_path: Path) -> None:
    run(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    (tmp_path / "link").symlink_to(tmp_path / "source")
    before = contents(tmp_path / "source")
    for out in ("source", "source/inside", "link", "other/../source"):
        with pytest.raises(OutputError, match="is the source or lies in it"):
            run(tmp_path / out, source=source)
    assert contents(tmp_path / "source") == before


def test_output_lock_names_the_process(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", PLAN) as writer:
        with pytest.raises(
            OutputError, match=rf"being written by another run \(process {os.getpid()}\)"
        ):
            run(tmp_path / "out")
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.finish({}, {}, {})
    assert siblings(tmp_path / "out") == {"out"}


def test_output_lock_of_a_dead_run_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "out.lock").write_text("1\n")
    run(tmp_path / "out")
    assert siblings(tmp_path / "out") == {"out"}
    with (tmp_path / "other.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match=r"process unknown"):
            run(tmp_path / "other")


def test_check_output_finds_a_small_disk_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**25))
    with pytest.raises(
        ShortageError, match=rf"needs {2**30 + 2**25} bytes \(1.0 GiB\) and the disk has {2**25}"
    ):
        check_output(tmp_path / "out", None, 2**30)
    with pytest.raises(ShortageError, match="Free some space"):
        run(tmp_path / "out")
    assert siblings(tmp_path / "out") == set()


def test_writer_unwritable_place_is_a_shortage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ShortageError, match="file is not writable"):
        run(tmp_path / "file" / "out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_writer_full_disk_is_a_shortage_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Also where only the user's quota is used up."""
    real = os.pwrite
    written = 0

    def full(fd: int, data: memoryview, position: int) -> int:
        nonlocal written
        written += len(data)
        if written > 100:
            raise OSError(code, os.strerror(code))
        return real(fd, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ShortageError, match="The disk is full") as caught:
            run(tmp_path / "out")
    assert caught.value.exit_code == 4
    run(tmp_path / "out")
    assert verify_manifest(tmp_path / "out") == []


def test_plan_files_splits_in_order() -> None:
    tensors = [TensorInfo(str(i), "U8", (size,)) for i, size in enumerate([40, 40, 40, 500, 10])]
    files = plan_files(tensors, max_bytes=100)
    assert {file: [t.name for t in part] for file, part in files.items()} == {
        "model-00001-of-00004.safetensors": ["0", "1"],
        "model-00002-of-00004.safetensors": ["2"],
        "model-00003-of-00004.safetensors": ["3"],
        "model-00004-of-00004.safetensors": ["4"],
    }
    assert list(plan_files(tensors, stem="x")) == ["x.safetensors"]


def test_manifest_finds_every_change(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out)
    file = next(iter(PLAN))
    whole = (out / file).read_bytes()

    changed = bytearray(whole)
    changed[-1] ^= 1
    (out / file).write_bytes(changed)
    problems = verify_manifest(out)
    assert len(problems) == 2
    assert all("SHA-256" in problem and file in problem for problem in problems)
    opened = open_checkpoint(out)
    last = max(
        (info for info in opened.tensors.values() if info.file == file), key=lambda info: info.end
    )
    wanted = opened.manifest["tensors"][last.name]["sha256"] if opened.manifest else ""
    for read in (lambda: opened.read(last.name), lambda: opened.read_slice(last.name, [(0, 1)], 0)):
        with pytest.raises(
            InputError, match=rf"{file}: tensor {last.name} has SHA-256 \w{{64}}, .* says {wanted}"
        ):
            read()

    (out / file).write_bytes(whole[:-1])
    with pytest.raises(
        InputError, match=rf"{file} has {len(whole) - 1} bytes, llmkit.json says {len(whole)}"
    ):
        open_checkpoint(out)

    (out / file).unlink()
    with pytest.raises(InputError, match=f"{file} is in llmkit.json but absent"):
        open_checkpoint(out)
    assert any("absent" in problem for problem in verify_manifest(out))

    (out / file).write_bytes(whole)
    (out / "config.json").write_text('{"model_type": "y"}\n')
    with pytest.raises(
        InputError, match=r"config.json has SHA-256 \w{64}, llmkit.json says \w{64}"
    ):
        open_checkpoint(out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds a JSON list"),
        ("{", "is not valid JSON"),
        ('{"format_version": 9}', "format_version 9"),
        ('{"format_version": 1, "files": []}', "files is malformed"),
        (
            '{"format_version": 1, "files": {"a": {"bytes": "1", "sha256": ""}}, "tensors": {}}',
            "files is malformed",
        ),
        (
            '{"format_version": 1, "files": {"../a": {"bytes": 1, "sha256": ""}}, "tensors": {}}',
            "names the file '../a'",
        ),
    ],
)
def test_manifest_malformed_is_an_input_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "llmkit.json").write_text(text)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)
