"""Opening checkpoints: what is read, and the error for each wrong input (the rows of the inputs
table).
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.hub import ALLOWED_PATTERNS, IGNORED_PATTERNS
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.writer import CheckpointWriter
from llmkit.common.errors import InputError

TENSORS = {
    "w": torch.arange(60, dtype=torch.float32).reshape(6, 10),
    "v": torch.arange(5, dtype=torch.int32),
}
INDEX = "model.safetensors.index.json"


def folder(
    path: Path, config: dict[str, Any] | None = None, **files: dict[str, torch.Tensor]
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    for name, tensors in files.items():
        save_file(tensors, path / f"{name}.safetensors")
    return path


def index(path: Path, **located: str) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": located}))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")


def test_checkpoint_reads_every_tensor_of_several_files(sharded: Path) -> None:
    opened = open_checkpoint(sharded)
    expected: dict[str, torch.Tensor] = {}
    for file in sharded.glob("*.safetensors"):
        expected |= load_file(file)
    assert len(opened.weight_files) > 2
    assert opened.tensors.keys() == expected.keys()
    assert opened.config["model_type"] == "llama"
    assert opened.generation_config["eos_token_id"] == 2
    assert opened.quantization is None
    assert opened.manifest is None
    assert opened.layout is None
    assert opened.weight_bytes == sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    for name, tensor in expected.items():
        found = opened.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        info = opened.tensors[name]
        assert (
            opened.read_bytes(info, 2, 8)
            == tensor.reshape(-1).view(torch.uint8)[2:8].numpy().tobytes()
        )
    with pytest.raises(KeyError):
        opened.read("unknown")


def test_checkpoint_source_hashes_and_side_files(sharded: Path) -> None:
    opened = open_checkpoint(sharded)
    assert opened.source_hashes() == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in [sharded / "config.json", *sharded.glob("*.safetensors")]
    }
    assert set(opened.side_files()) == {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_checkpoint_read_returns_its_own_memory(tmp_path: Path) -> None:
    opened = open_checkpoint(folder(tmp_path, model=TENSORS))
    opened.read("w").zero_()
    assert torch.equal(opened.read("w"), TENSORS["w"])


@pytest.mark.parametrize("chunk", [64 * 2**20, 50])
@pytest.mark.parametrize(
    ("dim", "intervals"),
    [(0, [(0, 2), (4, 6)]), (0, [(3, 4)]), (0, [(2, 2)]), (1, [(8, 10), (0, 3)]), (1, [(0, 10)])],
)
def test_checkpoint_read_slice_equals_slices_of_the_tensor(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dim: int,
    intervals: list[tuple[int, int]],
    chunk: int,
) -> None:
    monkeypatch.setattr("llmkit.checkpoint.checkpoint.CHUNK_BYTES", chunk)
    opened = open_checkpoint(folder(tmp_path, model=TENSORS))
    parts = [TENSORS["w"].narrow(dim, start, stop - start) for start, stop in intervals]
    assert torch.equal(opened.read_slice("w", intervals, dim), torch.cat(parts, dim))


def test_checkpoint_read_slice_of_more_dimensions(tmp_path: Path) -> None:
    tensor = torch.randn(4, 3, 5)
    opened = open_checkpoint(folder(tmp_path, model={"t": tensor, "s": torch.tensor(2.5)}))
    for dim in range(3):
        assert torch.equal(opened.read_slice("t", [(1, 3)], dim), tensor.narrow(dim, 1, 2))
    assert opened.read("s") == torch.tensor(2.5)


def refused(reference: str | Path, message: str) -> str:
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(reference)
    assert error.value.exit_code == 3
    return str(error.value)


def test_open_checkpoint_refuses_a_missing_path() -> None:
    refused("/nowhere/at/all", "/nowhere/at/all does not exist")
    refused(Path("one/two"), "one/two does not exist")


def test_open_checkpoint_of_a_hub_id_without_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*args: object, **options: object) -> str:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    text = refused(
        "organization/model",
        "organization/model is not a path here and could not be fetched from the hub",
    )
    assert "Name or service not known" in text


def test_open_checkpoint_downloads_no_code_and_no_pickle(
    monkeypatch: pytest.MonkeyPatch, sharded: Path
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    def download(reference: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (allow_patterns, ignore_patterns) == (ALLOWED_PATTERNS, IGNORED_PATTERNS)
        return str(sharded)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    opened = open_checkpoint("organization/model")
    assert (opened.reference, opened.path) == ("organization/model", sharded)
    offered = [
        "config.json",
        "model-1.safetensors",
        INDEX,
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "modeling_evil.py",
        "pytorch_model.bin",
        "model.pt",
        "onnx/model.safetensors",
        "original/params.json",
        "consolidated.safetensors",
        "README.md",
    ]
    assert (
        list(
            filter_repo_objects(
                offered, allow_patterns=ALLOWED_PATTERNS, ignore_patterns=IGNORED_PATTERNS
            )
        )
        == offered[:6]
    )


def test_open_checkpoint_refuses_a_directory_without_config(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json; it holds nothing")
    for name in "abcdefg":
        (tmp_path / name).touch()
    refused(tmp_path, "it holds a, b, c, d, e and 2 more")
    (tmp_path / "x.gguf").touch()
    assert str(tmp_path / "x.gguf") in refused(tmp_path, "Give the file itself")


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_open_checkpoint_refuses_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    refused(tmp_path, r"config.json (is not valid JSON|holds a JSON list)")


def test_open_checkpoint_never_loads_pickles(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    for reference in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert "save_pretrained" in refused(reference, "pytorch_model.bin is a pickle file")
    assert not (tmp_path / "ran").exists()


def test_open_checkpoint_refuses_a_directory_without_weights(tmp_path: Path) -> None:
    refused(folder(tmp_path), "has no weights; it holds config.json")


def test_open_checkpoint_of_a_weight_file_names_its_directory(tmp_path: Path) -> None:
    folder(tmp_path, model=TENSORS)
    assert f"Give its directory, {tmp_path}" in refused(tmp_path / "model.safetensors", "is a file")
    refused(tmp_path / "config.json", "is a file")


def test_open_checkpoint_names_absent_files(tmp_path: Path) -> None:
    folder(tmp_path, **{"model-1": {"w": TENSORS["w"]}})
    index(tmp_path, w="model-1.safetensors", v="model-2.safetensors", u="model-3.safetensors")
    refused(tmp_path, r"lacks 2 of the files .* \(model-2.safetensors, model-3.safetensors\)")


@pytest.mark.parametrize(
    "file",
    [
        "../a.safetensors",
        "/a.safetensors",
        "x/a.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "a.bin",
    ],
)
def test_open_checkpoint_refuses_an_index_that_leaves_the_folder(tmp_path: Path, file: str) -> None:
    folder(tmp_path / "model", **{"model-1": TENSORS})
    save_file(TENSORS, tmp_path / "a.safetensors")
    index(tmp_path / "model", w=file)
    refused(tmp_path / "model", "places w in ")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_open_checkpoint_refuses_an_index_without_weight_map(tmp_path: Path, text: str) -> None:
    folder(tmp_path, **{"model-1": TENSORS})
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, "has no weight_map")


def test_open_checkpoint_refuses_an_index_that_disagrees(tmp_path: Path) -> None:
    folder(tmp_path, **{"model-1": {"w": TENSORS["w"]}, "model-2": {"v": TENSORS["v"]}})
    index(tmp_path, w="model-1.safetensors", v="model-1.safetensors")
    refused(tmp_path, r"places 1 tensors in files that lack them \(v\)")


def test_open_checkpoint_refuses_duplicate_tensors(tmp_path: Path) -> None:
    folder(tmp_path, **{"model-1": TENSORS, "model-2": {"v": TENSORS["v"]}})
    refused(tmp_path, "tensor v is in both model-1.safetensors and model-2.safetensors")


def test_open_checkpoint_refuses_a_truncated_file(sharded: Path, tmp_path: Path) -> None:
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    last = max(tmp_path.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-10])
    refused(tmp_path, f"{last.name}: tensor .* ends at data byte")


def test_open_checkpoint_ignores_files_that_are_not_in_the_index(tmp_path: Path) -> None:
    folder(tmp_path, model=TENSORS)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    assert open_checkpoint(tmp_path).weight_files == ("model.safetensors",)


def test_open_checkpoint_parses_the_quantization(tmp_path: Path) -> None:
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
    }
    opened = open_checkpoint(
        folder(tmp_path / "a", {"quantization_config": settings}, model=TENSORS)
    )
    assert opened.quantization is not None
    assert (opened.quantization.format, opened.quantization.scheme) == ("gptq", Scheme(4, 128))

    old = folder(tmp_path / "b", model=TENSORS)
    del settings["quant_method"]
    (old / "quantize_config.json").write_text(json.dumps(settings))
    assert open_checkpoint(old).quantization == opened.quantization

    refused(
        folder(tmp_path / "c", {"quantization_config": {"quant_method": "hqq"}}, model=TENSORS),
        "quantized with hqq",
    )


def written(path: Path, layout: dict[str, Any] | None = None) -> Checkpoint:
    plan = {"model.safetensors": [TensorInfo("w", "F32", (6, 10))]}
    with CheckpointWriter(path, plan) as writer:
        writer.write("w", TENSORS["w"])
        writer.finish({"model_type": "llama"}, {}, {"layout": layout} if layout else {})
    return open_checkpoint(path)


def test_checkpoint_verifies_each_tensor_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = written(tmp_path / "out")
    calls: list[str] = []
    real = __import__("llmkit.checkpoint.checkpoint", fromlist=["x"]).sha256_range
    monkeypatch.setattr(
        "llmkit.checkpoint.checkpoint.sha256_range",
        lambda path, *range_: calls.append(path.name) or real(path, *range_),
    )
    for _ in range(2):
        assert torch.equal(opened.read_slice("w", [(1, 2)], 0), TENSORS["w"][1:2])
        assert torch.equal(opened.read("w"), TENSORS["w"])
    assert calls == ["model.safetensors"]
    calls.clear()
    opened = written(tmp_path / "again")
    assert torch.equal(opened.read("w"), TENSORS["w"])  # hashed from what was read
    assert torch.equal(opened.read_slice("w", [(1, 2)], 0), TENSORS["w"][1:2])
    assert calls == []


def test_checkpoint_read_info_reads_sharded_files(tmp_path: Path) -> None:
    from llmkit.checkpoint.safetensors_header import read_header

    opened = written(tmp_path / "out", {"tp": 1})
    info = read_header(tmp_path / "out" / "model.safetensors")["w"]
    assert opened.weight_files == ("model.safetensors",)
    assert torch.equal(opened.read_info(info), TENSORS["w"])
