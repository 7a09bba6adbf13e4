"""What a wrong input of `quantize` gets: the error's text, its exit code, and nothing written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models as tiny

from llmkit.common.errors import InputError, LlmkitError, OutputError, ShortageError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.quant import memory_estimate as memory
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions

OPTIONS = QuantizeOptions("gptq", samples=2, seq_len=32, evaluate=False, device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 50)
    return str(path)


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def refused(
    source: Path, out: Path, message: str, kind: type[LlmkitError], code: int, **changes: object
) -> None:
    """The run fails with this error, and leaves nothing at or next to `out`."""
    before = sorted(out.parent.rglob("*"))
    options = dataclasses.replace(OPTIONS, **changes)
    with pytest.raises(kind, match=message) as caught:
        quantize(str(source), str(out), options, SilentProgress())
    assert caught.value.exit_code == code
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.parametrize("method", ["gptq", "rtn", "bf16"])
def test_check_finite_names_the_tensor_and_the_count(
    llama: Path, text: str, tmp_path: Path, method: str
) -> None:
    source = copy(llama, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, :3] = torch.nan
    weights[name][1, 0] = torch.inf
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    message = f"tensor {name} holds 3 NaN and 1 infinite values of 8192".replace(".", r"\.")
    refused(source, tmp_path / "out", message, InputError, 3, method=method, calibration=text)


def test_group_size_that_does_not_divide_is_refused(llama: Path, text: str, tmp_path: Path) -> None:
    message = (
        r"group size 48 does not divide layers\.0\.attn\.qkv, which has 64 in_features"
        r".*: 8, 16, 32, 64, -1\."
    )
    refused(llama, tmp_path / "out", message, InputError, 3, group_size=48, calibration=text)
    message = r"group size 128 does not divide layers\.0\.attn\.qkv"
    refused(llama, tmp_path / "out", message, InputError, 3, group_size=128, method="rtn")


@pytest.mark.parametrize(("scheme", "group"), [("nvfp4", 16), ("mxfp4", 32), ("mxfp8", 32)])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_groups_of_a_scheme_that_do_not_divide_are_refused(
    text: str, tmp_path: Path, scheme: str, group: int, method: str
) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "source", intermediate_size=72)
    message = rf"{scheme} has groups of {group}, which do not divide layers\.0\.mlp\.down with 72 "
    options = {"method": method, "scheme": scheme, "calibration": text}
    refused(source, tmp_path / "out", message, InputError, 3, **options)


def test_source_of_an_unknown_method_is_refused(llama: Path, tmp_path: Path) -> None:
    source = copy(llama, tmp_path / "bnb")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path / "out", "quantized with bitsandbytes", InputError, 3)


@pytest.mark.parametrize(
    ("method", "bits"), [("int8", 4), ("gptq", 5), ("bf16", 4), ("rtn", 16), ("fp16", 8)]
)
def test_conflicting_options_are_refused(
    llama: Path, tmp_path: Path, method: str, bits: int
) -> None:
    message = (
        rf"--method {method} and --bits {bits} do not go together\. "
        r"The pairs that do: bf16 16, fp16 16, int8 8, fp8 8, auto 2, auto 3, auto 4, auto 8,"
        r" gptq 2, gptq 3, gptq 4, gptq 8, awq 4, rtn 2, rtn 3, rtn 4, rtn 8"
    )
    refused(llama, tmp_path / "out", message, UsageError, 2, method=method, bits=bits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "int3"}, "--method int3 is not known"),
        ({"method": "rtn", "effort": "max"}, "--effort max does nothing with --method rtn"),
        ({"method": "bf16", "effort": "high"}, "--effort high does nothing with --method bf16"),
        (
            {"method": "gptq", "scheme": "q4_k_m", "format": "gguf", "effort": "max"},
            "--effort max does nothing with --format gguf",
        ),
        (
            {"method": "int8", "group_size": 64},
            "--method int8 has no groups, and --group-size is 64.*gptq, awq, rtn",
        ),
        (
            {"method": "int8", "format": "awq"},
            "--method int8 and --format awq do not.*compressed-tensors",
        ),
        (
            {"method": "bf16", "format": "gptq"},
            "--method bf16 and --format gptq do not.*safetensors only",
        ),
        (
            {"bits": 8, "format": "awq"},
            "--format awq holds 4 bits only.*compressed-tensors for 8 bits",
        ),
        (
            {"symmetric": False},
            "--format gptq does not support --asymmetric.*--symmetric goes with it",
        ),
        (
            {"format": "awq", "symmetric": True},
            "--format awq does not support --symmetric",
        ),
        ({"method": "fp8", "symmetric": False}, "--method fp8 has a symmetric grid"),
        ({"activations": True}, "--method gptq rounds no activations.*goes with int8"),
        (
            {"static_activations": True},
            "--method gptq has no fixed activation scales.*goes with fp8",
        ),
        (
            {"kv": "fp8"},
            "--format gptq has no place for the scales of a KV cache.*--format compressed-tensors",
        ),
        (
            {"target_kl": 0.1, "evaluate": True, "format": "awq"},
            "--target-kl and --target-bits choose a scheme.*compressed-tensors",
        ),
        (
            {"method": "int8", "target_bits": 5.0},
            "--target-kl and --target-bits choose a scheme.*go with .*gptq, awq, rtn",
        ),
        ({"scheme": "fp7"}, "--scheme fp7 is not known.*nvfp4"),
        (
            {"method": "bf16", "scheme": "nvfp4"},
            "--method bf16 and --scheme nvfp4 do not.*A cast.*--method auto or gptq or rtn",
        ),
        (
            {"method": "awq", "scheme": "nvfp4"},
            "--method awq and --scheme nvfp4 do not go together. w4a16, w4afp8 goes with",
        ),
        ({"scheme": "nvfp4", "bits": 8}, "--scheme nvfp4 has 4 bits, and --bits is 8"),
        (
            {"scheme": "mxfp4", "group_size": 64},
            "--scheme mxfp4 has groups of 32, and --group-size is 64. --group-size goes with w2a16",
        ),
        (
            {"scheme": "mxfp4", "format": "gptq"},
            "--scheme mxfp4 and --format gptq do not go together. Expected compressed-tensors",
        ),
        (
            {"scheme": "mxfp4", "format": "modelopt"},
            "--scheme mxfp4 and --format modelopt do not.*compressed-tensors; modelopt has FP8, ",
        ),
        (
            {"scheme": "w8a8", "format": "modelopt"},
            "--scheme w8a8 and --format modelopt do not.*; modelopt has FP8, .*W4A16_AWQ only",
        ),
        ({"scheme": "fp8-block", "symmetric": False}, "--scheme fp8-block has a symmetric grid"),
        (
            {"scheme": "nvfp4", "static_activations": True},
            "--scheme nvfp4 has no fixed activation scales",
        ),
        (
            {"scheme": "fp8-block", "format": "fp8", "kv": "fp8"},
            "--format fp8 has no place for the scales of a KV cache",
        ),
        (
            {"scheme": "nvfp4", "format": "modelopt", "kv": "int8"},
            "--format modelopt has no place for the scales of an INT8 KV cache",
        ),
        (
            {"scheme": "fp8-block", "engine": "vllm"},
            "vLLM does not load blocks of 128 rows of .*q_proj, which has 64 rows.*--scheme fp8",
        ),
        ({"scheme": "nvfp4", "target_bits": 5.0}, "--scheme is one scheme for all layers"),
        ({"target_bits": 0.5}, r"--target-bits is 0\.5.*1 to 16"),
        ({"target_kl": 0.1}, "--target-kl needs the evaluation"),
        ({"max_kl": 0.1}, "--max-kl needs the evaluation that --no-eval leaves out"),
        ({"max_kl": -1.0, "evaluate": True}, r"--max-kl is -1\.0"),
        ({"target_kl": 0.1, "target_bits": 5.0, "evaluate": True}, "were both given"),
        ({"keep": "("}, r"--keep \( is not a regular expression"),
        ({"keep": "nothing"}, "--keep nothing finds no linear layer.*self_attn.q_proj"),
        ({"layers": "1-5"}, "--layers is 1-5.*from 0 to 1"),
        ({"layers": "b"}, "--layers is b.*A-B was expected"),
        (
            {"engine": "vllm", "group_size": 16},
            "vllm has no kernel for groups of 16.*-1, 32, 64, 128",
        ),
        ({"engine": "tgi"}, "--for tgi is not known.*vllm, sglang, transformers"),
        (
            {"engine": "transformers", "method": "rtn", "symmetric": False},
            "transformers runs asymmetric.*--format awq",
        ),
        (
            {"engine": "vllm", "method": "fp8", "kv": "int8"},
            "vllm knows no INT8 KV cache.*--kv fp8",
        ),
        (
            {"engine": "transformers", "method": "bf16", "kv": "fp8"},
            "transformers keeps its KV cache in 16 bits",
        ),
        ({"samples": 0}, "--samples is 0"),
        ({"seq_len": 8}, "--seq-len is 8"),
        ({"damp": 0.0}, r"--damp is 0\.0"),
    ],
)
def test_options_out_of_range_are_refused(
    llama: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    refused(llama, tmp_path / "out", message, UsageError, 2, **changes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b"too short", r"a\.txt is too short: \d tokens, and one window needs 32"),
        ("a.txt", b"\xff", r"a\.txt is not UTF-8 \(byte 0 is 0xff\)"),
        ("a.jsonl", b"{", r"line 1 of .*a\.jsonl is not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"line 1 of .*a\.jsonl has no field 'text'.*keys seen: body"),
    ],
)
def test_bad_calibration_text_is_refused(
    llama: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(llama, tmp_path / "out", message, InputError, 3, calibration=str(tmp_path / name))


def test_tokenizer_with_more_tokens_than_the_embedding_is_refused(
    tmp_path: Path, text: str
) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "source", vocab_size=300)
    tiny.write_tokenizer(source, vocab=512)
    refused(
        source,
        tmp_path / "out",
        r"gives the id \d+ and the model's embedding has 300 rows",
        InputError,
        3,
        calibration=text,
    )


def test_output_in_the_way_is_refused(llama: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").touch()
    refused(llama, out, "exists and is not empty", OutputError, 5, calibration=text)
    source = copy(llama, tmp_path / "source")
    refused(source, source, "is the source", OutputError, 5, calibration=text)


def test_too_small_disk_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(llama, tmp_path / "out", r"needs \d+ bytes .* disk has 1000", ShortageError, 4)
    refused(
        llama, tmp_path / "out", r"needs \d+ bytes .* disk has 1000", ShortageError, 4, dry_run=True
    )


def test_too_little_memory_is_refused_with_an_option_that_fits(
    llama: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = quantize(
        str(llama),
        str(tmp_path / "out"),
        dataclasses.replace(OPTIONS, samples=1000, offload="memory", dry_run=True),
        SilentProgress(),
    )["plan"]
    free = plan["memory_bytes"] - 10 * 32 * 64 * 4
    monkeypatch.setattr(memory, "available_bytes", lambda _: free)
    message = rf"needs {plan['memory_bytes']} bytes .* {free} \(.*are free\. Use --samples 990\."
    refused(
        llama,
        tmp_path / "out",
        message,
        ShortageError,
        4,
        samples=1000,
        calibration=text,
        offload="memory",
    )
    again = dataclasses.replace(OPTIONS, samples=1000, dry_run=True)
    assert (
        quantize(str(llama), str(tmp_path / "out"), again, SilentProgress())["plan"]["offload"]
        is True
    )
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1000)
    refused(llama, tmp_path / "out", "Use --method rtn", ShortageError, 4, calibration=text)


def test_missing_cuda_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(
        llama,
        tmp_path / "out",
        "PyTorch sees no CUDA device.*Use --device cpu",
        ShortageError,
        4,
        device="cuda",
    )


def test_sharded_source_is_refused(llama: Path, tmp_path: Path, text: str) -> None:
    quantize(
        str(llama),
        str(tmp_path / "whole"),
        dataclasses.replace(OPTIONS, method="bf16"),
        SilentProgress(),
    )
    source = tmp_path / "whole"
    manifest = json.loads((source / "llmkit.json").read_text())
    manifest["layout"] = {"tp": 1, "pp": 1}
    (source / "llmkit.json").write_text(json.dumps(manifest))
    refused(
        source, tmp_path / "out", "is sharded.*llmkit shard merge", InputError, 3, calibration=text
    )


def test_missing_tensor_is_refused(llama: Path, tmp_path: Path) -> None:
    source = copy(llama, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    refused(source, tmp_path / "out", r"model\.norm\.weight", InputError, 3)
