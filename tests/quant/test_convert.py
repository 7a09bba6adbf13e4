"""`llmkit convert`: values carry over bit for bit, or nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import gguf_files
from support.quantized_files import Change, quantized_checkpoint, quantized_weights
from support.synthetic_checkpoint import synthetic_checkpoint
from support.tiny_families import family_oracle
from support.tiny_models import VOCAB, tiny_checkpoint, write_tokenizer

from llmkit.checkpoint.gguf_integers import unpack_blocks
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, QuantizedWeight, Scheme
from llmkit.cli import main
from llmkit.common.errors import InputError, OutputError
from llmkit.common.progress import SilentProgress
from llmkit.model.full_forward import window_logits
from llmkit.model.weight_loader import load_model
from llmkit.quant import convert_checkpoint
from llmkit.quant.convert_checkpoint import convert
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.shard.shard_checkpoint import shard

INT4 = Scheme(4, 32)
UNEVEN = Scheme(4, 32, symmetric=False)
BLOCKS = Scheme(8, 32, kind="float", inputs="group", block_rows=16)
ONE_SCALE = Scheme(8, kind="float", inputs="tensor", block_rows=-1)
PER_ROW = Scheme(8, kind="float", inputs="token")
NVFP4 = Scheme(4, 16, kind="float", inputs="group", scale_format="e4m3")
MXFP4A16 = Scheme(4, 32, kind="float", scale_format="e8m0")
MXFP4AMXFP8 = replace(MXFP4A16, inputs="group", input_type="fp8")
MXFP4AFP8 = replace(MXFP4A16, inputs="tensor", input_type="fp8")
# (source format, scheme, formats that hold its values)
PAIRS: list[tuple[Format, Scheme, tuple[Format, ...]]] = [
    *(("gptq", Scheme(bits, 32), ("gptq_v2", "compressed-tensors")) for bits in (2, 3, 8)),
    ("gptq", Scheme(4), ("gptq_v2", "awq", "compressed-tensors")),
    *(
        ("gptq_v2", Scheme(bits, 32, symmetric=False), ("gptq", "compressed-tensors"))
        for bits in (2, 3, 8)
    ),
    ("awq", UNEVEN, ("gptq", "gptq_v2", "compressed-tensors")),
    ("compressed-tensors", INT4, ("gptq", "gptq_v2", "awq", "modelopt")),
    ("gptq", INT4, ("modelopt",)),
    ("modelopt", INT4, ("gptq", "awq", "compressed-tensors")),
    ("compressed-tensors", UNEVEN, ("gptq", "gptq_v2", "awq")),
    ("compressed-tensors", BLOCKS, ("fp8",)),
    ("compressed-tensors", ONE_SCALE, ("fp8", "modelopt")),
    ("compressed-tensors", PER_ROW, ("modelopt",)),
    ("compressed-tensors", NVFP4, ("modelopt",)),
    ("compressed-tensors", MXFP4A16, ("modelopt",)),
    ("modelopt", MXFP4AMXFP8, ("compressed-tensors",)),
    ("fp8", BLOCKS, ("compressed-tensors",)),
    ("modelopt", NVFP4, ("compressed-tensors",)),
    ("modelopt", replace(NVFP4, inputs="none", input_type=None), ("compressed-tensors",)),
]


def source_checkpoint(
    path: Path, form: Format, scheme: Scheme, change: Change | None = None, **options: Any
) -> Path:
    return quantized_checkpoint(path, QuantizationConfig(form, scheme, **options), change)


def is_same(path: Path, other: Path) -> bool:
    """Whether the codes, scales and zero points of all weights are equal, and so their values."""
    weights, others = quantized_weights(path), quantized_weights(other)
    assert weights.keys() == others.keys() and len(weights) == 7
    return all(
        torch.equal(weight.q.view(torch.uint8), others[name].q.view(torch.uint8))
        and torch.equal(weight.scales.float(), others[name].scales.float())
        and torch.equal(weight.zeros, others[name].zeros)
        and torch.equal(weight.dequantize(), others[name].dequantize())
        for name, weight in weights.items()
    )


def dense_bytes(path: Path) -> dict[str, bytes]:
    return {
        name: tensor.view(torch.uint8).numpy().tobytes()
        for name, tensor in load_file(path / "model.safetensors").items()
        if tensor.dtype == torch.bfloat16 and not name.endswith("_scale")
    }


@pytest.mark.parametrize(
    ("form", "scheme", "targets"), PAIRS, ids=[f"{row[0]}-{row[1].label}" for row in PAIRS]
)
def test_convert_there_and_back_keeps_every_bit(
    form: Format, scheme: Scheme, targets: tuple[Format, ...], tmp_path: Path
) -> None:
    source = source_checkpoint(tmp_path / "source", form, scheme)
    for target in targets:
        out, back = tmp_path / target, tmp_path / f"{target}-back"
        report = convert(source, out, target)
        assert report["verified"] == {"weights": 7, "values": 30_720}
        assert open_checkpoint(out).quantization.format == target  # type: ignore[union-attr]
        assert is_same(source, out)
        assert dense_bytes(out) == dense_bytes(source)
        convert(out, back, form)
        assert is_same(source, back)
        found = open_checkpoint(back).quantization
        assert found is not None and found.schemes == (scheme,)


def test_convert_to_compressed_tensors_keeps_float16_scales(tmp_path: Path) -> None:
    def with_long_scales(name: str, weight: QuantizedWeight) -> QuantizedWeight:
        return replace(weight, scales=weight.scales + 2.0**-17)  # more bits than bfloat16 has

    source = source_checkpoint(tmp_path / "source", "gptq", INT4, with_long_scales)
    convert(source, tmp_path / "out", "compressed-tensors")
    scales = load_file(tmp_path / "out" / "model.safetensors")
    assert scales["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float16
    assert is_same(source, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "back", "gptq")
    stored, again = (
        load_file(tmp_path / name / "model.safetensors") for name in ("source", "back")
    )
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)


def test_convert_writes_symmetric_weights_where_all_zero_points_are(tmp_path: Path) -> None:
    def even(name: str, weight: QuantizedWeight) -> QuantizedWeight:
        return replace(weight, zeros=torch.full_like(weight.zeros, 8))

    source = source_checkpoint(tmp_path / "source", "awq", UNEVEN, even)
    report = convert(source, tmp_path / "out", "gptq")
    assert [row["label"] for row in report["schemes"]] == ["INT4 in groups of 32"]
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["sym"]

    def even_but_one(name: str, weight: QuantizedWeight) -> QuantizedWeight:
        return weight if name == "model.layers.0.mlp.up_proj.weight" else even(name, weight)

    source = source_checkpoint(tmp_path / "mixed", "awq", UNEVEN, even_but_one)
    report = convert(source, tmp_path / "all", "compressed-tensors")
    # Engines fuse layers, and want one scheme for them.
    assert [row["weights"] for row in report["schemes"]] == [7]
    assert is_same(source, tmp_path / "all")


def test_convert_keeps_layers_of_other_bits_and_dense_ones(tmp_path: Path) -> None:
    overrides = (("re:.*down_proj", Scheme(8, 32)), ("re:.*v_proj", Scheme(2, 32)))
    ignore = ("lm_head", "model.layers.0.self_attn.o_proj")
    settings: dict[str, Any] = {"ignore": ignore, "overrides": overrides}
    source = source_checkpoint(tmp_path / "source", "compressed-tensors", INT4, **settings)
    convert(source, tmp_path / "out", "gptq")
    convert(tmp_path / "out", tmp_path / "back", "compressed-tensors")
    expected = quantized_weights(source)
    for path in (tmp_path / "out", tmp_path / "back"):
        found = quantized_weights(path)
        assert found.keys() == expected.keys() and len(found) == 6
        for name, weight in expected.items():
            assert found[name].scheme == weight.scheme
            assert torch.equal(found[name].dequantize(), weight.dequantize())


def test_convert_names_all_modules_of_mixed_schemes_in_modelopt(tmp_path: Path) -> None:
    overrides = (("re:.*down_proj", PER_ROW),)
    source = source_checkpoint(
        tmp_path / "source", "compressed-tensors", NVFP4, overrides=overrides
    )
    convert(source, tmp_path / "out", "modelopt")
    assert is_same(source, tmp_path / "out")
    schemes = {name: weight.scheme for name, weight in quantized_weights(tmp_path / "out").items()}
    assert schemes == {name: weight.scheme for name, weight in quantized_weights(source).items()}


def test_convert_keeps_a_quantized_lm_head_and_kv_scales(tmp_path: Path) -> None:
    source = quantized_checkpoint(
        tmp_path / "source", QuantizationConfig("gptq", INT4, ()), config={"vocab_size": 96}
    )
    report = convert(source, tmp_path / "out", "compressed-tensors")
    assert report["weights"] == 8
    assert "lm_head.weight" in quantized_weights(tmp_path / "out")
    source = source_checkpoint(tmp_path / "kv", "compressed-tensors", NVFP4, kv="fp8")
    convert(source, tmp_path / "modelopt", "modelopt")
    found = open_checkpoint(tmp_path / "modelopt")
    assert found.quantization is not None and found.quantization.kv == "fp8"
    assert found.read("model.layers.0.self_attn.v_proj.v_scale").item() == 0.125
    convert(tmp_path / "modelopt", tmp_path / "back", "compressed-tensors")
    assert open_checkpoint(tmp_path / "back").read("model.layers.0.self_attn.v_scale") == 0.125


def test_convert_drops_files_of_the_old_format(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path / "source", "gptq", INT4)
    assert (source / "quantize_config.json").exists()
    convert(source, tmp_path / "awq", "awq")
    assert not (tmp_path / "awq" / "quantize_config.json").exists()
    convert(tmp_path / "awq", tmp_path / "gptq", "gptq_v2")
    document = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert document["checkpoint_format"] == "gptq_v2"


def test_convert_output_computes_the_same_logits(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path / "source", "gptq_v2", Scheme(3, 32, symmetric=False))
    convert(source, tmp_path / "out", "compressed-tensors")
    windows = torch.arange(24).reshape(2, 12)
    logits = []
    for path in (source, tmp_path / "out"):
        model = load_model(open_checkpoint(path), torch.float32, packed=True)
        logits.append(torch.cat(list(window_logits(model, windows))))
    assert torch.equal(*logits)
    assert bool(logits[0].isfinite().all())


# Refusals


def changed(name: str, **values: Any) -> Change:
    """One weight with other values; a number fills a tensor's first element."""

    def change(other: str, weight: QuantizedWeight) -> QuantizedWeight:
        if other != name:
            return weight
        found = {}
        for key, value in values.items():
            found[key] = getattr(weight, key).clone()
            found[key].view(-1)[0] = value
        return replace(weight, **found)

    return change


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("form", "scheme", "change", "target", "message"),
    [
        (
            "gptq_v2",
            UNEVEN,
            changed(UP, zeros=0),
            "gptq",
            r"0\.mlp\.up_proj\.weight does not carry over: A zero point of 0 cannot be stored",
        ),
        (
            "compressed-tensors",
            INT4,
            changed(UP, scales=2.0**-30),
            "gptq",
            r"0\.mlp\.up_proj\.weight .*1 of 192 scales are not exact there \(9\.3.*e-10 would be",
        ),
        (
            "compressed-tensors",
            INT4,
            changed(UP, scales=2.0**20),
            "awq",
            r"0\.mlp\.up_proj\.weight .* A scale is too large for AWQ's float16",
        ),
        (
            "gptq",
            INT4,
            changed(UP, scales=1.0),  # replaced by NaN below
            "awq",
            r"0\.mlp\.up_proj\.weight: 1 of 192 values of scales are no scales, such as nan",
        ),
        ("gptq", Scheme(8, 32), None, "awq", "awq has 4 bits only, and this is INT8 in groups"),
        (
            "compressed-tensors",
            Scheme(8, inputs="token"),
            None,
            "gptq",
            "gptq has integers and inputs in 16 bits only, and this is INT8, inputs too",
        ),
        ("compressed-tensors", PER_ROW, None, "fp8", "fp8 has FP8 in blocks or with one scale"),
        ("compressed-tensors", BLOCKS, None, "modelopt", "modelopt has FP8, .* only"),
        ("gptq", Scheme(8, 32), None, "modelopt", "modelopt has FP8, .* only, and this is INT8"),
        ("gptq", Scheme(4), None, "modelopt", "modelopt has FP8, .* only, and this is INT4"),
        ("awq", UNEVEN, None, "modelopt", "not carry over: W4A16_AWQ has no zero points"),
        (
            "modelopt",
            MXFP4AFP8,
            None,
            "compressed-tensors",
            "compressed-tensors has no MXFP4, inputs in FP8 by a fixed scale",
        ),
        ("gptq", INT4, None, "gptq", "is in the format gptq already. Another --format"),
        (
            "modelopt",
            NVFP4,
            lambda name, weight: replace(
                weight,
                scales=weight.scales * 0.875,
                global_scale=torch.tensor([1.75 * 2.0**-10]),
            ),
            "compressed-tensors",
            r"q_proj\.weight does not carry over: its global scale 0\.00170898\d+ would be",
        ),
    ],
)
def test_convert_refuses_what_it_would_change_and_writes_nothing(
    form: Format,
    scheme: Scheme,
    change: Change | None,
    target: Format,
    message: str,
    tmp_path: Path,
) -> None:
    source = source_checkpoint(tmp_path / "source", form, scheme, change)
    if "such as nan" in message:
        poison(source, UP.replace("weight", "scales"))
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "out", target)
    assert not list(tmp_path.glob("out*"))


def poison(path: Path, name: str) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_convert_refuses_schemes_and_scales_without_a_place(tmp_path: Path) -> None:
    mixed = source_checkpoint(
        tmp_path / "mixed", "compressed-tensors", INT4, overrides=(("re:.*down_proj", Scheme(4)),)
    )
    with pytest.raises(InputError, match=r"layers of different schemes .*, and awq has one"):
        convert(mixed, tmp_path / "out", "awq")
    head = quantized_checkpoint(
        tmp_path / "head", QuantizationConfig("gptq", INT4, ()), config={"vocab_size": 96}
    )
    with pytest.raises(InputError, match=r"lm_head\.weight .*no place for a quantized output proj"):
        convert(head, tmp_path / "out", "awq")
    kv = source_checkpoint(tmp_path / "kv", "compressed-tensors", INT4, kv="fp8")
    with pytest.raises(InputError, match=r"scales of an FP8 KV cache, and gptq has no place"):
        convert(kv, tmp_path / "out", "gptq")
    assert not list(tmp_path.glob("out*"))


def test_convert_refuses_sources_that_are_not_quantized_or_sharded(tmp_path: Path) -> None:
    dense = synthetic_checkpoint(tmp_path / "dense")
    with pytest.raises(InputError, match=r"dense is not quantized. .*Quantize it: llmkit quantize"):
        convert(dense, tmp_path / "out", "gptq")
    source = source_checkpoint(tmp_path / "source", "gptq", Scheme(4, 16))
    shard(source, tmp_path / "ranks", 2)
    with pytest.raises(InputError, match=r"sharded already .*llmkit shard merge"):
        convert(tmp_path / "ranks", tmp_path / "out", "awq")
    with pytest.raises(OutputError, match="is the source or lies in it"):
        convert(source, source / "out", "awq")
    assert not list(tmp_path.glob("out*"))


# Interruptions


class Notes(SilentProgress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def test_convert_continues_an_interrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_checkpoint(tmp_path / "source", "gptq", INT4)
    convert(source, tmp_path / "whole", "awq")
    compared = []

    def interrupted(*weights: QuantizedWeight) -> str:
        compared.append(1)
        if len(compared) == 5:
            raise KeyboardInterrupt
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, "difference", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    notes = Notes()
    report = convert(source, tmp_path / "out", "awq", progress=notes)
    assert notes.texts[0].startswith("continuing an interrupted run")
    assert report["verified"]["weights"] == 7
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_convert_removes_an_output_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_checkpoint(tmp_path / "source", "gptq", INT4)
    read_back = convert_checkpoint.CheckpointWriter.read_back

    def damaged(self: Any, name: str, file: str | None = None) -> torch.Tensor:
        tensor = read_back(self, name, file)
        return tensor ^ 1 if name.endswith("0.mlp.up_proj.qweight") else tensor

    monkeypatch.setattr(convert_checkpoint.CheckpointWriter, "read_back", damaged)
    with pytest.raises(InputError, match=r"up_proj\.weight changed on the way: quantized values"):
        convert(source, tmp_path / "out", "awq")
    assert not list(tmp_path.glob("out*"))


def test_convert_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path / "source", "gptq", INT4)
    report = convert(source, tmp_path / "out", "awq", dry_run=True)
    assert (report["output"], report["verified"], report["weights"]) == (None, None, 7)
    assert not list(tmp_path.glob("out*"))
    convert(source, tmp_path / "out", "awq")
    assert report["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


# GGUF


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("Q4_0", ("gptq", "awq", "compressed-tensors")),
        ("Q8_0", ("gptq_v2", "compressed-tensors")),
    ],
)
def test_convert_reads_gguf_integers(
    kind: str, targets: tuple[Format, ...], llama: Path, tmp_path: Path
) -> None:
    """llama.cpp's converter moves rows of q and k, and blocks of an embedding become float32."""
    ggml_type = gguf.GGMLQuantizationType[kind]
    file = gguf_files.convert(
        open_checkpoint(llama), tmp_path / "model.gguf", "llama", kind=ggml_type
    )
    source = open_checkpoint(file)
    for target in targets:
        report = convert(file, tmp_path / target, target)
        assert report["from"] == "gguf"
        out = open_checkpoint(tmp_path / target)
        weights = quantized_weights(tmp_path / target)
        assert len(weights) == report["weights"] == 14
        for name, info in source.tensors.items():
            expected = source.read(name)
            found = weights[name].dequantize() if name in weights else out.read(name)
            assert torch.equal(found, expected), name
            if name not in weights and info.ggml_type == kind:
                assert name in report["float32_tensors"]
        assert "model.embed_tokens.weight" in report["float32_tensors"]
        assert (tmp_path / target / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0"])
def test_convert_refuses_gguf_types_whose_values_do_not_carry_over(
    kind: str, llama: Path, tmp_path: Path
) -> None:
    ggml_type = gguf.GGMLQuantizationType[kind]
    file = gguf_files.convert(
        open_checkpoint(llama), tmp_path / "model.gguf", "llama", kind=ggml_type
    )
    message = rf"14 linear weights whose .*q_proj\.weight in {kind}.*Q4_0, Q4_1, Q8_0 and floats"
    if kind == "Q4_1":
        message = r"q_proj\.weight: .* minima of Q4_1 blocks are no integer times the scale"
    with pytest.raises(InputError, match=message):
        convert(file, tmp_path / "out", "gptq")
    assert not list(tmp_path.glob("out*"))


def gguf_tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """The type and the bytes of each tensor, as the gguf package reads them."""
    return {
        tensor.name: (tensor.tensor_type.name, tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_convert_to_gguf_gives_the_blocks_again(kind: str, llama: Path, tmp_path: Path) -> None:
    """q and k are in the order of llama.cpp, and other tensors stay what they are."""
    file = gguf_files.convert(
        open_checkpoint(llama),
        tmp_path / "model.gguf",
        "llama",
        kind=gguf.GGMLQuantizationType[kind],
    )
    convert(file, tmp_path / "gptq", "gptq")
    report = convert(tmp_path / "gptq", tmp_path / "out", "gguf")
    assert report["verified"]["weights"] == 14
    (written,) = (tmp_path / "out").glob("*.gguf")
    assert written.name == f"model-{kind}.gguf"
    before, after = gguf_tensors(file), gguf_tensors(written)
    assert before.keys() == after.keys()
    for name, stored in before.items():
        if name.startswith("blk.") or stored[0] == "F32":
            assert after[name] == stored, name
    assert after["token_embd.weight"][0] == "F32"
    source, out = open_checkpoint(file), open_checkpoint(written)
    for name in source.tensors:
        assert torch.equal(source.read(name), out.read(name)), name


def test_convert_to_gguf_reads_experts_back_that_the_family_has_in_one_tensor(
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    family_oracle("gpt-oss", tmp_path / "dense", **sizes, vocab_size=VOCAB, swiglu_limit=7.0)
    write_tokenizer(tmp_path / "dense")
    options = QuantizeOptions(
        "rtn", "w4a16", format="gptq", group_size=32, evaluate=False, device="cpu"
    )
    quantize(tmp_path / "dense", tmp_path / "source", options, SilentProgress())
    report = convert(tmp_path / "source", tmp_path / "out", "gguf")
    assert report["verified"]["weights"] == report["weights"] == 2 * (4 + 3 * 4)
    (written,) = (tmp_path / "out").glob("*.gguf")
    windows = torch.arange(3, 15)[None]
    logits = [
        torch.cat(list(window_logits(load_model(open_checkpoint(path), torch.float32), windows)))
        for path in (tmp_path / "source", written)
    ]
    assert torch.allclose(*logits, rtol=1e-5, atol=1e-5)
    refused = r"has 4 linear weights .*gate_up_proj in Q4_0, all experts of a layer, "
    with pytest.raises(InputError, match=refused):
        convert(written, tmp_path / "back", "gptq")


def with_zero_points(source: Path, path: Path, word: int) -> Path:
    """The checkpoint with other words of zero points, from -2^31 to 2^31 - 1."""
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("qzeros"):
            tensors[name] = torch.full_like(tensor, word)
    path.mkdir()
    for file in source.iterdir():
        if file.name not in ("llmkit.json", "model.safetensors"):
            (path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_convert_to_gguf_keeps_zero_points_that_float16_holds(llama: Path, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_0
    file = gguf_files.convert(open_checkpoint(llama), tmp_path / "model.gguf", "llama", kind=kind)
    convert(file, tmp_path / "awq", "awq")
    four = with_zero_points(tmp_path / "awq", tmp_path / "four", 0x44444444)
    report = convert(four, tmp_path / "out", "gguf")
    assert [row["label"] for row in report["schemes"]] == ["INT4 in groups of 32 with zero points"]
    (written,) = (tmp_path / "out").glob("*.gguf")
    found = open_checkpoint(written)
    for name, weight in quantized_weights(four).items():
        assert found.tensors[name].ggml_type == "Q4_1"
        assert torch.equal(found.read(name), weight.dequantize())
    # 13 times a scale of bfloat16's 8 bits has more bits than float16.
    thirteen = with_zero_points(tmp_path / "awq", tmp_path / "13", 0xDDDDDDDD - 2**32)
    with pytest.raises(InputError, match=r"q_proj\.weight does not carry over: .* minima of Q4_1"):
        convert(thirteen, tmp_path / "refused", "gguf")
    assert not list(tmp_path.glob("refused*"))


def test_convert_to_gguf_refuses_zero_points_of_8_bits(llama: Path, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    file = gguf_files.convert(open_checkpoint(llama), tmp_path / "model.gguf", "llama", kind=kind)
    convert(file, tmp_path / "gptq", "gptq_v2")
    other = with_zero_points(tmp_path / "gptq", tmp_path / "other", 0x01020304)
    with pytest.raises(InputError, match=r"q_proj\.weight .*: Q8_0 has no zero points"):
        convert(other, tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("out*"))


def test_convert_to_gguf_needs_a_tokenizer(tmp_path: Path) -> None:
    source = source_checkpoint(tmp_path / "source", "gptq", INT4)
    with pytest.raises(InputError, match="tokenizer"):
        convert(source, tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("form", "scheme", "message"),
    [
        ("gptq", Scheme(3, 32), "integers of 4 or 8 bits, and this is INT3"),
        ("compressed-tensors", NVFP4, "integers of 4 or 8 bits, and this is NVFP4"),
        ("gptq", Scheme(4, 16), "blocks have 32 values, and groups of 16 in 64 are not made of"),
    ],
)
def test_convert_to_gguf_refuses_what_blocks_do_not_hold(
    form: Format, scheme: Scheme, message: str, tmp_path: Path
) -> None:
    source = source_checkpoint(tmp_path / "source", form, scheme)
    with pytest.raises(InputError, match=rf"q_proj\.weight does not carry over: .*{message}"):
        convert(source, tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("out*"))


def test_unpack_blocks_reads_q4_1_with_integer_zero_points() -> None:
    """Against the gguf package's own dequantization."""
    rng = np.random.default_rng(0)
    d = (rng.integers(64, 128, (6, 2, 1)) / 4096).astype(np.float16)
    zeros = rng.integers(0, 16, (6, 2, 1))
    d[0, 0] = 0
    zeros[0, 0] = 0
    minima = (-d.astype(np.float32) * zeros).astype(np.float16)
    codes = rng.integers(0, 256, (6, 2, 16)).astype(np.uint8)
    blocks = np.concatenate([d.view(np.uint8), minima.view(np.uint8), codes], axis=2)
    weight = unpack_blocks("Q4_1", torch.from_numpy(blocks))
    expected = gguf.quants.dequantize(blocks.reshape(6, -1), gguf.GGMLQuantizationType.Q4_1)
    assert weight.zeros.tolist() == zeros[:, :, 0].tolist()
    assert torch.equal(weight.dequantize(), torch.from_numpy(expected))


# The command


def test_convert_command_prints_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_checkpoint(tmp_path / "source", "gptq", INT4)
    out = tmp_path / "out"
    arguments = ["convert", str(source), "-o", str(out), "--format", "awq"]
    assert main.run([*arguments, "--dry-run"]) == 0
    assert "(awq) (nothing written)" in capsys.readouterr().out
    assert main.run([*arguments, "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["from"], report["format"], report["weights"]) == ("gptq", "awq", 7)
    assert report["verified"]["values"] == 30_720
    manifest = json.loads((out / "llmkit.json").read_text())
    assert manifest["recipe"] == {"command": "convert", "from": "gptq", "format": "awq"}
    assert main.run(["inspect", str(out)]) == 0
    assert "INT4 in groups of 32 with zero points; awq format" in capsys.readouterr().out
    assert main.run(arguments) == 5
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "exl2"], 2, "'exl2' is not one of 'gptq'"),
        ([], 2, "missing option '--format'"),
        (["--format", "fp8"], 3, "fp8 has FP8 in blocks"),
    ],
)
def test_convert_command_reports_wrong_input(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = source_checkpoint(tmp_path / "source", "gptq", INT4)
    assert main.run(["convert", str(source), "-o", str(tmp_path / "out"), *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("llmkit convert: error: ")
    assert message in error
    assert not list(tmp_path.glob("out*"))


def test_convert_command_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_checkpoint(tmp_path / "source", "gptq", INT4)
    arguments = ["convert", str(source), "-o", str(tmp_path / "out"), "--format", "awq"]

    def interrupted(*weights: QuantizedWeight) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, "difference", interrupted)
        assert main.run(arguments) == 130
    assert f"llmkit {' '.join(arguments)}" in capsys.readouterr().err
    assert main.run(arguments) == 0
    assert is_same(source, tmp_path / "out")
