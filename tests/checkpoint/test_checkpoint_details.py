"""Opened checkpoints and the files beside their weights: exact slices, choices and messages."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.manifest import make_manifest, manifest_text
from llmkit.checkpoint.model_files import (
    find_model,
    list_names,
    parse_json,
    read_generation_config,
    read_side_files,
)
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.open_model_files import open_model_files, resolve_model
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.checkpoint.registry.open_store import open_store
from llmkit.checkpoint.registry.store_interface import hash_partial_file, store_errors
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError, ShortageError, UsageError

WEIGHTS = "model.safetensors"
W = torch.arange(15, dtype=torch.float32).reshape(5, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": W}, folder / WEIGHTS)
    (folder / "config.json").write_text("{}")
    return folder


class Rows:
    """Gives rows of W, and notes which."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        self.asked.append((start, stop))
        return W[start:stop].clone() if info.shape[0] else torch.empty(info.shape)


def dequantized(tmp_path: Path, rows: Rows) -> Checkpoint:
    return Checkpoint(
        "x.gguf", tmp_path / "x.gguf", "gguf", {}, {}, dict, {}, None, None, ("x.gguf",), rows
    )


def test_checkpoint_bytes_of_dequantized_rows(tmp_path: Path) -> None:
    """Only the rows that hold the bytes are dequantized."""
    info = TensorInfo("w", "F32", (5, 3))
    data = W.numpy().tobytes()
    for start in range(61):
        for stop in range(start, 61):
            rows = Rows()
            opened = dequantized(tmp_path, rows)
            assert opened.read_bytes(info, start, stop) == data[start:stop]
            assert rows.asked == [(start // 12, -(-stop // 12))]
    assert dequantized(tmp_path, Rows()).read_bytes(TensorInfo("e", "F32", (0, 3)), 0, 0) == b""


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (2, 1), (0, 61), (61, 61)])
def test_checkpoint_bytes_lie_in_their_tensor(start: int, stop: int, folder: Path) -> None:
    opened = open_checkpoint(folder)
    assert opened.read_bytes(opened.tensors["w"], 0, 60) == W.numpy().tobytes()
    with pytest.raises(AssertionError):
        opened.read_bytes(opened.tensors["w"], start, stop)


@pytest.mark.parametrize("dim", [0, 1])
def test_checkpoint_slices_lie_in_their_tensor(dim: int, folder: Path) -> None:
    opened = open_checkpoint(folder)
    count = W.shape[dim]
    for whole in ([(0, count)], [(0, 0), (0, count), (count, count)]):
        assert torch.equal(opened.read_slice("w", whole, dim), W)
    for wrong in ((-1, 1), (2, 1), (0, count + 1)):
        with pytest.raises(AssertionError, match=r"w: \["):
            opened.read_slice("w", [(0, 1), wrong], dim)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("change", ["size", "time", "inode", "absent"])
def test_checkpoint_that_changes_is_refused(name: str, change: str, folder: Path) -> None:
    opened = open_checkpoint(folder)
    opened.require_unchanged()
    path = folder / name
    status = path.stat()
    if change == "size":
        path.write_bytes(path.read_bytes() + b" ")
    elif change == "inode":
        path.with_name("new").write_bytes(path.read_bytes())
        path.with_name("new").replace(path)
    if change == "time":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    elif change == "absent":
        path.unlink()
    else:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputError, match=rf"^{path} was changed while it was read"):
        opened.require_unchanged()


def test_checkpoint_stamps_the_files_that_it_reads(folder: Path, tmp_path: Path) -> None:
    assert open_checkpoint(folder).stamps.keys() == {"config.json", WEIGHTS}
    opened = dequantized(tmp_path, Rows())
    assert opened.stamps == {"x.gguf": (0, 0, 0)}  # it does not exist
    opened.require_unchanged()
    (tmp_path / "x.gguf").touch()
    given = opened.with_dtype("BF16")  # the stamps of the first one, not new ones
    with pytest.raises(InputError, match=r"x.gguf was changed"):
        given.require_unchanged()


def test_checkpoint_representation_has_no_readers(folder: Path) -> None:
    text = repr(open_checkpoint(folder))
    assert "config={}" in text
    for name in ("load_side_files", "row_reader", "stamps", "_verified", "_read_ahead"):
        assert f"{name}=" not in text


def test_checkpoint_hashes_are_kept_and_may_be_given(folder: Path) -> None:
    opened = open_checkpoint(folder)
    expected = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("config.json", WEIGHTS)
    }
    opened.source_hashes().clear()  # a copy
    (folder / "config.json").write_text("{ }")
    assert opened.source_hashes() == expected
    opened.set_source_hashes({"a": "b"})
    assert opened.source_hashes() == {"a": "b"}


def test_checkpoint_of_ranks_says_how_to_merge_it(folder: Path) -> None:
    opened = open_checkpoint(folder)
    opened.require_unsharded()
    opened.manifest = {"layout": {"tp": 2, "pp": 3}}
    with pytest.raises(InputError) as caught:
        opened.require_unsharded()
    assert str(caught.value) == (
        f"{folder} is sharded already (TP 2, PP 3): it is split over 6 ranks. A whole checkpoint"
        f" was expected. Merge it first: llmkit shard merge {folder} -o DIR."
    )


@pytest.mark.parametrize("as_slice", [False, True])
def test_checkpoint_refuses_a_tensor_that_the_manifest_lacks(as_slice: bool, folder: Path) -> None:
    document = make_manifest(folder)
    document["tensors"]["other"] = document["tensors"].pop("w")
    (folder / "llmkit.json").write_bytes(manifest_text(document))
    opened = open_checkpoint(folder)
    with pytest.raises(InputError, match=rf"^{folder}/{WEIGHTS}: tensor w is not in llmkit.json"):
        opened.read_slice("w", [(0, 1)], 0) if as_slice else opened.read("w")


def test_checkpoint_warns_of_edits_unless_told_otherwise(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "llmkit.json").write_bytes(manifest_text(make_manifest(folder)))
    (folder / "generation_config.json").write_text("{}")
    open_checkpoint(folder, warn_of_edits=False)
    assert caplog.messages == []
    open_checkpoint(folder)
    assert "was edited after llmkit wrote it (generation_config.json)" in caplog.text


def index(folder: Path, located: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": located}))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_index_errors_name_the_first_five(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    located = {"w": "a.safetensors"}
    index(folder, located)
    assert open_checkpoint(folder).weight_files == ("a.safetensors",)
    index(folder, located | {str(number): "a.safetensors" for number in range(6)})
    refused(folder, r"places 6 tensors in files that lack them \(0, 1, 2, 3, 4\)")
    index(folder, located | {str(n): f"{n}.safetensors" for n in range(6)})
    refused(folder, r"lacks 6 of the files .* \((\d.safetensors, ){4}4.safetensors\)")
    index(folder, {"w": 3})  # type: ignore[dict-item]
    refused(folder, "places w in '3'")


def test_open_checkpoint_names_the_first_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    for name in ("b.pt", "c.bin", "a.ckpt"):
        (folder / name).touch()
    refused(folder, rf"^{folder}/a.ckpt is a pickle file")


def test_open_checkpoint_prefers_the_quantization_of_the_config(folder: Path) -> None:
    settings = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    entry = {"quant_method": "gptq", **settings, "group_size": 64}
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    quantization = open_checkpoint(folder).quantization
    assert quantization is not None
    assert quantization.scheme == Scheme(4, 64)


def test_open_checkpoint_of_ranks_has_their_files(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "b.safetensors")
    save_file({"v": W}, folder / "a.safetensors")
    document = make_manifest(folder) | {"layout": {"tp": 2}}
    (folder / "llmkit.json").write_bytes(manifest_text(document))
    opened = open_checkpoint(folder)
    assert (opened.weight_files, opened.tensors) == (("a.safetensors", "b.safetensors"), {})
    (folder / "llmkit.json").write_bytes(manifest_text(document | {"layout": None}))
    assert open_checkpoint(folder).tensors.keys() == {"v", "w"}


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "nothing"),
        (1, "0"),
        (5, "0, 1, 2, 3, 4"),
        (6, "0, 1, 2, 3, 4 and 1 more"),
        (8, "0, 1, 2, 3, 4 and 3 more"),
    ],
)
def test_list_names_shows_five(count: int, expected: str, tmp_path: Path) -> None:
    for number in range(count):
        (tmp_path / str(number)).touch()
    assert list_names(tmp_path) == expected


def test_find_model_says_what_to_give_instead(tmp_path: Path, folder: Path) -> None:
    def message(reference: str | Path) -> str:
        with pytest.raises(InputError) as caught:
            find_model(reference)
        return str(caught.value)

    expected = "A directory, a hub id or a .gguf file was expected."
    assert message("") == f"the model's name is empty. {expected}"
    assert message("no/such/model") == f"no/such/model does not exist. {expected}"
    assert message(Path("a/b")) == f"a/b does not exist. {expected}"
    config = folder / "config.json"
    assert message(config) == f"{config} is a file. {expected}"
    weights = folder / WEIGHTS
    assert message(weights) == f"{weights} is a file. {expected} Give its directory, {folder}."
    (folder / "x.pth").touch()
    assert message(folder / "x.pth").startswith(f"{folder}/x.pth is a pickle file, which can run")
    assert find_model(str(folder)) == folder
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    assert find_model(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    assert message(tmp_path) == (
        f"{tmp_path} has no config.json; it holds a.gguf, b.gguf, model. A Hugging Face model"
        f" directory was expected. Give the file itself, {tmp_path}/a.gguf."
    )
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty").endswith("A Hugging Face model directory was expected.")


def test_model_files_are_those_beside_the_weights(folder: Path) -> None:
    assert read_generation_config(folder) == {}
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    (folder / "merges.txt").write_text("m")
    (folder / "LICENSE.md").write_text("l")
    (folder / "notes.txt").write_text("n")
    (folder / "tokenizer.model").mkdir()
    opened = open_model_files(folder)
    assert opened.generation_config == {"top_k": 3}
    expected = {"LICENSE.md": b"l", "generation_config.json": b'{"top_k": 3}', "merges.txt": b"m"}
    assert opened.side_files() == read_side_files(folder) == expected
    assert (opened.reference, opened.path, opened.file_format) == (
        str(folder),
        folder,
        "safetensors",
    )


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 20_000])
def test_parse_json_names_its_origin(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^here is not valid JSON"):
        parse_json(data, "here")
    with pytest.raises(InputError, match=r"^here holds a JSON str"):
        parse_json(b'"a"', "here")


def test_model_may_have_a_path_like_a_url(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    folder.rename(tmp_path / "s3:" / "model")
    (tmp_path / "s3:" / "x.gguf").touch()
    assert resolve_model("s3://model") == Path("s3:/model")
    assert resolve_model("s3://x.gguf") == Path("s3:/x.gguf")
    assert resolve_model(tmp_path / "s3:" / "model") == tmp_path / "s3:" / "model"
    with pytest.raises(InputError, match="s3:/none does not exist"):
        resolve_model(Path("s3://none"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://B/x", "the s3: address is not the address of a checkpoint"),
        ("runs:/", "the runs: address is not"),
        ("models:/a//b", "the models: address is not"),
        ("models://a", "the models: address is not"),
        ("gs://b/./x", "the gs: address is not"),
        ("https://huggingface.co/org/name", "begins with https:// .* Write hf://org/name"),
        ("https://www.hf.co/org/name/tree/main?x", "begins with https:// .* Write hf://org/name"),
        ("https://hf.co/org", "begins with https:// .*NAME was expected.$"),
        ("https://hf.co/.org/name", "begins with https:// .*NAME was expected.$"),
        ("ftp://x/y", "begins with ftp:// is not the address"),
    ],
)
def test_open_store_says_what_a_url_should_be(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_store(url)


@pytest.mark.parametrize(
    ("reference", "where"),
    [
        ("models:/a/1", "MLFLOW_TRACKING_URI"),
        ("hf://a/b", "HF_TOKEN and HF_ENDPOINT"),
        ("gs://b", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
@pytest.mark.parametrize(("text", "reason"), [("", "OSError"), ("a\nb", "a b")])
def test_store_errors_say_what_to_check(reference: str, where: str, text: str, reason: str) -> None:
    with pytest.raises(ShortageError) as caught, store_errors(reference):
        raise OSError(text)
    assert str(caught.value) == (
        f"{reference} could not be reached ({reason}). Check the address, the network and {where}."
    )
    own = InputError("as it is")
    with pytest.raises(InputError) as same, store_errors(reference):
        raise own
    assert same.value is own


@pytest.mark.parametrize(("size", "kept"), [(11, 10), (10, 10), (9, 0), (0, 0)])
def test_partial_file_that_is_too_long_is_emptied(size: int, kept: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert hash_partial_file(path, size)[1] == 0
    assert path.read_bytes() == b""
    path.write_bytes(bytes(10))
    assert hash_partial_file(path, size)[1] == kept
    assert path.stat().st_size == kept
