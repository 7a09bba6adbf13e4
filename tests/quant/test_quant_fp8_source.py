"""A checkpoint in FP8 blocks as the source of `quantize`: it is dequantized on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fp8_files import write_fp8
from support.tiny_families import family_oracle
from support.tiny_models import write_tokenizer

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.common.progress import SilentProgress
from llmkit.model.dequantized_checkpoint import dequantized_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions

OPTIONS = QuantizeOptions("bf16", samples=4, seq_len=32, evaluate=False, device="cpu")


class Messages(SilentProgress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixture of experts as dense tensors, and the same values in FP8 blocks."""
    folder = tmp_path_factory.mktemp("fp8")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    family_oracle("minimax-m2", folder / "dense", **sizes)
    write_tokenizer(folder / "dense")
    write_fp8(folder / "dense", folder / "fp8", (48, 32))
    return folder / "dense", folder / "fp8"


def run(source: Path, out: Path, **changes: object) -> tuple[Path, list[str]]:
    progress = Messages()
    quantize(str(source), str(out), dataclasses.replace(OPTIONS, **changes), progress)
    return out, progress.texts


@pytest.mark.parametrize("method", ["bf16", "fp8", "rtn"])
def test_quantize_fp8_source_gives_the_bytes_of_the_dense_one(
    sources: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    dense, fp8 = sources
    expected, _ = run(dense, tmp_path / "from_dense", method=method)
    found, texts = run(fp8, tmp_path / "from_fp8", method=method)
    assert [text for text in texts if "the source is FP8" in text]
    stored = load_file(found / "model.safetensors")
    for name, tensor in load_file(expected / "model.safetensors").items():
        assert torch.equal(stored.pop(name).float(), tensor.float()), name
    assert not stored
    quantization = open_checkpoint(found).quantization
    assert (quantization is None) is (method == "bf16")
    assert quantization is None or quantization.format == "compressed-tensors"


def test_quantize_fp8_source_is_calibrated_and_compared(
    sources: tuple[Path, Path], tmp_path: Path, short_builtin_text: None
) -> None:
    out, _ = run(sources[1], tmp_path / "out", method="gptq", group_size=32, eval_windows=1)
    quantization = open_checkpoint(out).quantization
    assert quantization is not None and quantization.scheme is not None
    assert (quantization.format, quantization.scheme.bits) == ("gptq", 4)


def test_dequantized_checkpoint_has_dense_tensors(sources: tuple[Path, Path]) -> None:
    dense, fp8 = sources
    checkpoint = open_checkpoint(fp8)
    view = dequantized_checkpoint(checkpoint, checkpoint_spec(checkpoint))
    values = load_file(dense / "model.safetensors")
    assert view.quantization is None and "quantization_config" not in view.config
    assert set(view.tensors) == set(values)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert torch.equal(
        view.read_slice(name, [(5, 9), (40, 64)], 0), values[name][[*range(5, 9), *range(40, 64)]]
    )
    for name, tensor in values.items():
        assert torch.equal(view.read(name), tensor)


def test_quantize_fp8_source_with_nan_is_refused(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    _, fp8 = sources
    tensors = load_file(fp8 / "model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in fp8.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{name} holds 1 NaN"):
        run(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
