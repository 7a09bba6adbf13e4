"""Finding checkpoints on this machine: which folders are searched, and what is said of each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmkit.checkpoint.local_checkpoints import (
    describe_checkpoint,
    find_checkpoints,
    find_hub_checkpoints,
    hub_cache,
)

HEADER = b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"abc"


def make(path: Path, weights: tuple[str, ...] = ("model.safetensors",), **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for name in weights:
        (path / name).write_bytes(WEIGHTS)
    return path


def found(folder: Path, *depth: int) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_checkpoints(folder, *depth)]


def test_find_checkpoints_searches_three_folders_deep(tmp_path: Path) -> None:
    make(tmp_path / "a" / "b" / "c")
    make(tmp_path / "d" / "e" / "f" / "too-deep")
    (tmp_path / "d" / "e" / "f" / "x.gguf").touch()
    (tmp_path / "d" / "folder.gguf").mkdir()
    make(tmp_path / "d" / "folder.gguf" / "m")
    assert found(tmp_path) == ["a/b/c", "d/e/f/x.gguf", "d/folder.gguf/m"]
    assert found(tmp_path, 2) == []
    assert found(tmp_path, 4) == [*found(tmp_path)[:1], "d/e/f/too-deep", *found(tmp_path)[1:]]
    assert found(tmp_path / "a" / "b" / "c", 0) == ["."]
    assert found(tmp_path / "d" / "e" / "f" / "x.gguf") == []  # no folder


def test_find_checkpoints_leaves_out_what_is_hidden_or_inside_one(tmp_path: Path) -> None:
    make(tmp_path / ".hidden" / "model")
    make(tmp_path / ".model")
    make(tmp_path / "model")
    make(tmp_path / "model" / "checkpoint-500")
    (tmp_path / "model" / "x.gguf").touch()
    assert found(tmp_path) == ["model"]


def test_find_checkpoints_takes_links_to_checkpoints_only(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere" / "model")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "direct").symlink_to(tmp_path / "elsewhere" / "model")
    (folder / "around").symlink_to(tmp_path / "elsewhere")
    (folder / ".direct").symlink_to(tmp_path / "elsewhere" / "model")
    (folder / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "x.gguf").touch()
    (folder / "y.gguf").symlink_to(tmp_path / "x.gguf")
    assert found(folder) == ["direct", "y.gguf"]
    assert found(folder, 0) == ["y.gguf"]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("a.safetensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
        ("adapter_config.json", False),
    ],
)
def test_find_checkpoints_needs_weights_beside_a_config(
    name: str, counts: bool, tmp_path: Path
) -> None:
    make(tmp_path / "outer", (name,))
    make(tmp_path / "outer" / "inner")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / name).touch()  # without a config
    assert found(tmp_path) == (["outer"] if counts else ["outer/inner"])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "~/h"}, "~/h/hub"),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "~/new"}, "~/new"),
    ],
)
def test_hub_cache_is_where_huggingface_hub_looks(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(expected).expanduser()


def test_find_hub_checkpoints_takes_main_or_the_last_download(tmp_path: Path) -> None:
    snapshots: dict[str, list[str]] = {
        "a--two": ["new", "old"],  # without refs
        "b--main": ["new", "old"],
        "c--gone": ["new", "old"],  # refs name another one
        "d--empty": [],
        "e--broken": ["new"],
        "f--adapter": ["new"],
    }
    for name, versions in snapshots.items():
        for age, version in enumerate(versions):
            path = make(tmp_path / f"models--{name}" / "snapshots" / version)
            os.utime(path, (1000 - age, 1000 - age))
        (tmp_path / f"models--{name}" / "snapshots").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"models--{name}" / "refs").mkdir()
    (tmp_path / "models--b--main" / "refs" / "main").write_text("old\n")
    (tmp_path / "models--c--gone" / "refs" / "main").write_text("absent")
    (tmp_path / "models--f--adapter" / "snapshots" / "new" / "config.json").unlink()
    (tmp_path / "models--0--no-snapshots").mkdir()  # the first in order
    make(tmp_path / "datasets--a--b" / "snapshots" / "x")
    assert [(name, path.name) for name, path in find_hub_checkpoints(tmp_path)] == [
        ("a/two", "new"),
        ("b/main", "old"),
        ("c/gone", "new"),
        ("e/broken", "new"),
    ]
    assert list(find_hub_checkpoints(tmp_path / "absent")) == []


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({"architectures": ["A", "B"], "model_type": "m"}, "A"),
        ({"architectures": [], "model_type": "m"}, "m"),
        ({"architectures": [3], "model_type": "m"}, "m"),
        ({"architectures": "A"}, None),
        ({"model_type": 3}, None),
        ({}, None),
    ],
)
def test_checkpoint_description_names_the_architecture(
    config: dict[str, Any], architecture: str | None, tmp_path: Path
) -> None:
    described = describe_checkpoint("mine", make(tmp_path / "m", **config))
    assert described.as_dict() == {
        "name": "mine",
        "path": str(tmp_path / "m"),
        "architecture": architecture,
        "quantization": None,
        "weight_bytes": len(WEIGHTS),
        "complete": True,
        "problem": None,
    }


def groups(*bits: Any) -> dict[str, Any]:
    return {"config_groups": {str(i): {"weights": {"num_bits": b}} for i, b in enumerate(bits)}}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq 4-bit"),
        ({"quant_method": "awq", "w_bit": 3}, "awq 3-bit"),
        ({"quant_method": "x", "bits": 2, "w_bit": 3, **groups(8)}, "x 2-bit"),
        ({"quant_method": "ct", **groups(8, 4, 4)}, "ct 4/8-bit"),
        ({"quant_method": "ct", **groups(0)}, "ct"),
        ({"quant_method": "ct", "config_groups": {"a": 1, "b": {"weights": None}}}, "ct"),
        ({"quant_method": "ct", "config_groups": [1]}, "ct"),
        ({"quant_method": ""}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_checkpoint_description_names_the_quantization(
    entry: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "m", quantization_config=entry)
    (folder / "quantize_config.json").write_text('{"bits": 16}')  # the config comes first
    assert describe_checkpoint("", folder).quantization == expected


@pytest.mark.parametrize(
    ("legacy", "expected"),
    [('{"bits": 4}', "gptq 4-bit"), ('{"bits": 4, "quant_method": "other"}', "other 4-bit")],
)
def test_checkpoint_description_reads_the_old_file_of_autogptq(
    legacy: str, expected: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "m")
    (folder / "quantize_config.json").write_text(legacy)
    assert describe_checkpoint("", folder).quantization == expected


def manifest(folder: Path, files: Any) -> None:
    (folder / "llmkit.json").write_text(json.dumps({"files": files}))


def index(folder: Path, weight_map: Any) -> None:
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def problem(folder: Path) -> str | None:
    return describe_checkpoint("", folder).problem


def test_checkpoint_description_tells_what_is_missing(tmp_path: Path) -> None:
    names = ("a.safetensors", "b.safetensors")
    folder = make(tmp_path / "m", names)
    assert problem(folder) is None
    index(folder, {"x": "b.safetensors", "y": "b.safetensors"})
    assert problem(folder) is None
    index(folder, {str(number): f"{number}.safetensors" for number in range(5)})
    assert problem(folder) == (
        "5 of 5 weight files are missing (0.safetensors, 1.safetensors, 2.safetensors)"
    )
    index(folder, [])
    assert problem(folder) is None
    manifest(folder, {"c.safetensors": {}, "a.safetensors": {}, "config.json": {}})
    assert problem(folder) == "1 of 2 weight files are missing (c.safetensors)"
    manifest(folder, [])
    assert problem(folder) is None
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    index(folder, {"x": "absent.safetensors"})
    assert problem(folder) is None  # one file is preferred to an index
    (folder / "b.safetensors").write_bytes(WEIGHTS[:-1])
    manifest(folder, {"b.safetensors": {}})
    assert "b.safetensors: tensor a ends at data byte 3" in (problem(folder) or "")
    folder.rename(tmp_path / "m.partial")
    assert problem(tmp_path / "m.partial") == "an interrupted output of llmkit"


def test_checkpoint_description_without_safetensors(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", ("notes.txt",))
    assert problem(folder) == "no weights"
    (folder / "x.bin").touch()
    assert problem(folder) == "its weights are pickle files, which are never loaded"
    (folder / "config.json").write_text("{")
    described = describe_checkpoint("", folder)
    assert "config.json is not valid JSON" in (described.problem or "")
    assert (described.architecture, described.weight_bytes) == (None, 0)


def test_checkpoint_description_counts_the_files_that_are_there(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tuple(f"{number}.safetensors" for number in range(10)))
    for number in range(10, 20):
        (folder / f"{number}.safetensors").symlink_to(tmp_path / "gone")
    described = describe_checkpoint("", folder)
    assert described.weight_bytes == 10 * len(WEIGHTS)
    assert (described.problem or "").startswith("10 of 20 weight files are missing (10.")


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"GGUF", None), (b"GGUF" + bytes(9), None), (b"GGU", "it is not a GGUF file")],
)
def test_gguf_description_looks_at_the_first_bytes(
    data: bytes, expected: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    described = describe_checkpoint("", path)
    assert described.as_dict() == {
        "name": "",
        "path": str(path),
        "architecture": None,
        "quantization": "gguf",
        "weight_bytes": len(data),
        "complete": expected is None,
        "problem": expected,
    }


def test_gguf_description_of_an_unreadable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.gguf"
    path.touch()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    described = describe_checkpoint("", path)
    assert described.problem == "it cannot be read (Permission denied)"
    assert (described.quantization, described.weight_bytes) == (None, 0)
