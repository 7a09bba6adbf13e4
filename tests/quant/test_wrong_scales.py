"""Scales that are not finite, in every format: one error of a command, and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import gguf_files
from support.mxfp4_files import write_gpt_oss
from support.quantized_files import quantized_checkpoint
from support.refused_commands import check_refused, quantize_command
from support.sharded_files import overwrite
from support.tiny_models import tiny_checkpoint, write_tokenizer

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, ScaleRule, Scheme
from llmkit.checkpoint.stored_tensors import check_scales
from llmkit.common.errors import InputError
from llmkit.model.weight_loader import load_model
from llmkit.shard import chunking
from llmkit.shard.merge import merge
from llmkit.shard.shard_checkpoint import shard

Read = pytest.CaptureFixture[str]
SIZES = {"intermediate_size": 128, "head_dim": 32}
NAN = float("nan")
INF = float("inf")
LAST = "model.layers.0.mlp.down_proj"  # what comes before it could be written
INT4 = Scheme(4, 32)
UNEVEN = Scheme(4, 32, symmetric=False)
BLOCKS = Scheme(8, 32, kind="float", inputs="group", block_rows=16)
MODELOPT_BLOCKS = replace(BLOCKS, group_size=128, block_rows=128)
ONE_SCALE = Scheme(8, kind="float", inputs="tensor", block_rows=-1)
PER_ROW = Scheme(8, kind="float", inputs="token")
NVFP4 = Scheme(4, 16, kind="float", inputs="group", scale_format="e4m3")
MXFP4 = Scheme(4, 32, kind="float", scale_format="e8m0")
MXFP4AFP8 = replace(MXFP4, inputs="tensor", input_type="fp8")
MXFP8 = Scheme(8, 32, kind="float", inputs="group", scale_format="e8m0")
# (format, scheme, tensor, its wrong value or byte, a format to convert to; "": there is none)
CASES: list[tuple[Format, Scheme, str, float, str]] = [
    ("gptq", INT4, "scales", NAN, "compressed-tensors"),
    ("gptq", Scheme(3, 32), "scales", INF, "gptq_v2"),
    ("gptq_v2", UNEVEN, "scales", -INF, "gptq"),
    ("awq", UNEVEN, "scales", NAN, "gptq"),
    ("awq", UNEVEN, "scales", INF, "compressed-tensors"),
    ("compressed-tensors", INT4, "weight_scale", NAN, "gptq"),
    ("compressed-tensors", UNEVEN, "weight_scale", INF, "awq"),
    ("compressed-tensors", Scheme(8, inputs="token"), "weight_scale", NAN, ""),
    ("compressed-tensors", PER_ROW, "weight_scale", NAN, "modelopt"),
    ("compressed-tensors", ONE_SCALE, "weight_scale", INF, "fp8"),
    ("compressed-tensors", ONE_SCALE, "input_scale", NAN, "modelopt"),
    ("compressed-tensors", BLOCKS, "weight_scale", NAN, "fp8"),
    ("compressed-tensors", NVFP4, "weight_scale", 0x7F, "modelopt"),
    ("compressed-tensors", NVFP4, "weight_global_scale", INF, "modelopt"),
    ("compressed-tensors", NVFP4, "input_global_scale", NAN, "modelopt"),
    ("compressed-tensors", MXFP4, "weight_scale", 255, "modelopt"),
    ("compressed-tensors", MXFP8, "weight_scale", 255, "modelopt"),
    ("fp8", BLOCKS, "weight_scale_inv", NAN, "compressed-tensors"),
    ("fp8", ONE_SCALE, "activation_scale", INF, "compressed-tensors"),
    ("autofp8", ONE_SCALE, "weight_scale", NAN, "compressed-tensors"),
    ("modelopt", ONE_SCALE, "weight_scale", NAN, "compressed-tensors"),
    ("modelopt", PER_ROW, "weight_scale", INF, "compressed-tensors"),
    ("modelopt", MODELOPT_BLOCKS, "weight_scale", NAN, "fp8"),
    ("modelopt", INT4, "weight_scale", NAN, "gptq"),
    ("modelopt", NVFP4, "weight_scale", 0xFF, "compressed-tensors"),
    ("modelopt", NVFP4, "weight_scale_2", NAN, "compressed-tensors"),
    ("modelopt", MXFP4, "weight_scale", 255, "compressed-tensors"),
    ("modelopt", MXFP4AFP8, "input_scale", INF, ""),
    ("modelopt", MXFP8, "weight_scale", 255, "compressed-tensors"),
]


def change_last(path: Path, tensor: str, value: float) -> None:
    """Give the last scale of a tensor another value; of one-byte scales another byte."""
    tensors = load_file(path / "model.safetensors")
    scales = tensors[tensor]
    if scales.element_size() == 1:
        scales = scales.view(torch.uint8)
    scales.view(-1)[-1] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def change_last_of_rank(path: Path, rank: int, tensor: str, value: float) -> None:
    """As `change_last`, in the file of one rank. The manifest agrees with the changed file."""
    file = f"rank-pp0-tp{rank}.safetensors"
    dtype = load_file(path / file)[tensor].dtype
    if dtype.itemsize == 1:
        new = bytes([int(value)])
    else:
        new = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
    overwrite(path, file, tensor, -len(new), new)


def check_scale_refused(command: list[str], message: str, folder: Path, capsys: Read) -> None:
    """The command is refused with one error, which says what to do."""
    error = check_refused(command, message, folder, capsys)
    assert "were expected. Download the checkpoint again" in error


@pytest.mark.parametrize(
    ("form", "scheme", "suffix", "value", "target"),
    CASES,
    ids=lambda value: value.label if isinstance(value, Scheme) else str(value),
)
def test_scale_that_is_not_finite_is_refused_by_every_command(
    form: Format,
    scheme: Scheme,
    suffix: str,
    value: float,
    target: str,
    tmp_path: Path,
    capsys: Read,
) -> None:
    config = QuantizationConfig(form, scheme)
    source = quantized_checkpoint(tmp_path / "source", config, config=SIZES)
    write_tokenizer(source)
    load_model(open_checkpoint(source), torch.float32)
    change_last(source, f"{LAST}.{suffix}", value)
    message = rf"{LAST}.*: 1 of \d+ values of {suffix} are "
    with pytest.raises(InputError, match=message) as caught:
        load_model(open_checkpoint(source), torch.float32)
    assert caught.value.exit_code == 3
    out = tmp_path / "out"
    check_scale_refused(quantize_command(source, out), message, tmp_path, capsys)
    if target:
        convert = ["convert", str(source), "--format", target, "-o", str(out)]
        check_scale_refused(convert, message, tmp_path, capsys)
    message = rf"1 of \d+ values of {LAST}.{suffix} are "
    for tp in ("1",) if scheme == MODELOPT_BLOCKS else ("1", "2"):
        command = ["shard", str(source), "--tp", tp, "-o", str(out)]
        check_scale_refused(command, message, tmp_path, capsys)


def test_gpt_oss_with_a_scale_of_255_is_refused_by_every_command(
    tmp_path: Path, capsys: Read
) -> None:
    source = tmp_path / "source"
    write_gpt_oss(tmp_path / "dense", source)
    write_tokenizer(source)
    change_last(source, "model.layers.1.mlp.experts.down_proj_scales", 255)
    message = r"experts.down_proj: 1 of \d+ values of scales are 255, not a number"
    with pytest.raises(InputError, match=message):
        load_model(open_checkpoint(source), torch.float32)
    check_scale_refused(quantize_command(source, tmp_path / "out"), message, tmp_path, capsys)
    for size in ("--tp", "--ep"):
        command = ["shard", str(source), "--tp", "2", size, "2", "-o", str(tmp_path / "out")]
        message = r"1 of \d+ values of .*down_proj_scales are 255, not a number"
        check_scale_refused(command, message, tmp_path, capsys)


@pytest.mark.parametrize("value", [NAN, 0.0])
def test_kv_scale_that_is_none_is_refused(value: float, tmp_path: Path, capsys: Read) -> None:
    config = QuantizationConfig("compressed-tensors", INT4, kv="fp8")
    source = quantized_checkpoint(tmp_path / "source", config, config=SIZES)
    name = "model.layers.0.self_attn.v_scale"
    change_last(source, name, value)
    with pytest.raises(InputError, match=f"1 of 1 values of {name} are no scales"):
        load_model(open_checkpoint(source), torch.float32)
    out = str(tmp_path / "out")
    for command in (
        ["shard", str(source), "--tp", "2", "-o", out],
        ["convert", str(source), "--format", "modelopt", "-o", out],
    ):
        check_scale_refused(command, f"1 of 1 values of {name} are no scales", tmp_path, capsys)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2)])
def test_merge_refuses_scales_that_are_none(tp: int, ep: int, tmp_path: Path, capsys: Read) -> None:
    source = tmp_path / "source"
    write_gpt_oss(tmp_path / "dense", source)
    write_tokenizer(source)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    shard(source, tmp_path / "ranks", tp, ep=ep)
    merge(tmp_path / "ranks", tmp_path / "merged")
    change_last_of_rank(tmp_path / "ranks", tp - 1, name, 255)
    for command in (
        ["shard", "merge", str(tmp_path / "ranks"), "-o", str(tmp_path / "out")],
        ["shard", str(tmp_path / "ranks"), "--tp", str(3 - tp), "-o", str(tmp_path / "out")],
    ):
        message = rf"1 of \d+ values of {name} are 255, not a number"
        check_scale_refused(command, message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("form", "scheme", "kv", "tensor", "value"),
    [
        ("gptq", INT4, "", f"{LAST}.scales", NAN),
        ("compressed-tensors", NVFP4, "", f"{LAST}.weight_global_scale", INF),
        ("compressed-tensors", INT4, "fp8", "model.layers.0.self_attn.k_scale", 0.0),
    ],
)
def test_merge_refuses_what_shard_refuses(
    form: Format,
    scheme: Scheme,
    kv: str,
    tensor: str,
    value: float,
    tmp_path: Path,
    capsys: Read,
) -> None:
    config = QuantizationConfig(form, scheme, kv=kv)
    source = quantized_checkpoint(tmp_path / "source", config, config=SIZES)
    shard(source, tmp_path / "ranks", 2)
    change_last_of_rank(tmp_path / "ranks", 0, tensor, value)
    change_last_of_rank(tmp_path / "ranks", 1, tensor, value)
    command = ["shard", "merge", str(tmp_path / "ranks"), "-o", str(tmp_path / "out")]
    check_scale_refused(command, rf"\d of \d+ values of {tensor} are no scales", tmp_path, capsys)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_gguf_scale_that_is_none_is_refused(
    kind: str, value: float, tmp_path: Path, capsys: Read
) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "llama")
    ggml_type = gguf.GGMLQuantizationType[kind]
    file = tmp_path / "model.gguf"
    gguf_files.convert(open_checkpoint(dense), file, "llama", kind=ggml_type)
    load_model(open_checkpoint(file), torch.float32)
    tensor = next(
        tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.1.ffn_down.weight"
    )
    with file.open("r+b") as stored:
        stored.seek(int(tensor.data_offset))  # where the first block's scale is
        stored.write(torch.tensor([value]).half().view(torch.uint8).numpy().tobytes())
    with pytest.raises(InputError, match=r"scales of blocks of blk\.1\.ffn_down\.weight are NaN"):
        load_model(open_checkpoint(file), torch.float32)
    out = str(tmp_path / "out")
    commands = [
        quantize_command(file, tmp_path / "out"),
        ["shard", str(file), "--tp", "2", "-o", out],
    ]
    if kind in ("Q4_0", "Q8_0"):  # of others, convert reads no random values
        commands.append(["convert", str(file), "--format", "compressed-tensors", "-o", out])
    for command in commands:
        check_scale_refused(command, "scales", tmp_path, capsys)


def test_shard_finds_a_wrong_scale_in_any_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that are read in several chunks, which slices of columns cut."""
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 64)
    config = QuantizationConfig("gptq", INT4)
    source = quantized_checkpoint(tmp_path / "source", config, config=SIZES)
    shard(source, tmp_path / "whole", 2)
    change_last(source, f"{LAST}.scales", NAN)
    with pytest.raises(InputError, match=f"values of {LAST}.scales are no scales, such as nan"):
        shard(source, tmp_path / "out", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "whole"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rule", "wrong", "expected"),
    [
        ("finite", (NAN, INF, -INF), "Finite numbers were expected"),
        ("not negative", (NAN, INF, -INF, -1.0), "Finite numbers of at least 0 were expected"),
        ("positive", (NAN, INF, -INF, -1.0, 0.0), "Finite numbers above 0 were expected"),
    ],
)
def test_scales_keep_the_rule_of_their_tensor(
    rule: ScaleRule, wrong: tuple[float, ...], expected: str, dtype: torch.dtype
) -> None:
    kept = {"finite": -2.0, "not negative": 0.0, "positive": 2.0**-14}[rule]
    scales = torch.full((5, 7), kept, dtype=dtype)
    check_scales("scales", scales, rule)
    check_scales("scales", scales[:0], rule)
    for place in (0, 17, 34):
        for value in wrong:
            changed = scales.clone()
            changed.view(-1)[place] = value
            with pytest.raises(InputError, match=expected) as caught:
                check_scales("scales", changed, rule)
            assert f"1 of 35 values of scales are no scales, such as {value}" in str(caught.value)
