"""Bad models, as a user meets them: every command opens a model the same way, `inspect` stands for
them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_checkpoint

from llmkit.cli import main

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))


def read(model: Path) -> tuple[dict[str, Any], bytes]:
    content = (model / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(model: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    (model / WEIGHTS).write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)


def edit_header(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, data = read(model)
    change(header)
    write(model, header, data)


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def of_another_architecture(model: Path) -> None:
    edit_config(model, architectures=["T5ForConditionalGeneration"])


def with_remote_code(model: Path) -> None:
    edit_config(
        model,
        architectures=["EvilForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"},
    )


def pickled(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def of_another_shape(model: Path) -> None:
    edit_header(model, lambda header: header[NORM].update(shape=[1, 64]))


def of_another_dtype(model: Path) -> None:
    edit_header(model, lambda header: header[NORM].update(dtype="I16"))


def with_missing_tensors(model: Path) -> None:
    edit_config(model, num_hidden_layers=3)


def with_extra_tensors(model: Path) -> None:
    edit_config(model, num_hidden_layers=1)


def truncated(model: Path) -> None:
    file = model / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def with_a_header_longer_than_the_file(model: Path) -> None:
    (model / WEIGHTS).write_bytes(struct.pack("<Q", 10**9) + b"{}")


def with_overlapping_tensors(model: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        first = min(
            (entry for entry in header.values() if "dtype" in entry),
            key=lambda entry: entry["data_offsets"],
        )
        offsets = header[NORM]["data_offsets"]
        header[NORM]["data_offsets"] = [
            first["data_offsets"][0],
            first["data_offsets"][0] + offsets[1] - offsets[0],
        ]

    edit_header(model, overlap)


def with_a_tensor_twice(model: Path) -> None:
    header, data = read(model)
    entry = json.dumps({NORM: header[NORM]})[1:-1]
    write(model, json.dumps(header)[:-1] + ", " + entry + "}", data)


def write_index(model: Path, files: Callable[[str], str]) -> None:
    header, _ = read(model)
    index = {"weight_map": {name: files(name) for name in header if name != "__metadata__"}}
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def with_an_absent_shard(model: Path) -> None:
    write_index(model, lambda name: f"model-0000{2 if name == NORM else 1}-of-00002.safetensors")


def with_an_index_that_leaves_the_folder(model: Path) -> None:
    write_index(model, lambda name: "../tiny/model-00001-of-00002.safetensors")


CASES: list[tuple[Callable[[Path], None], str]] = [
    (without_config, "has no config.json; it holds "),
    (
        of_another_architecture,
        "unsupported architecture (T5ForConditionalGeneration): it is no family of llmkit's own,"
        " and transformers' modeling code does not help: transformers",
    ),
    (with_remote_code, "remote code is never run"),
    (
        pickled,
        "pytorch_model.bin is a pickle file, which can run code when loaded, and is never loaded.",
    ),
    (of_another_shape, "tensor model.norm.weight has shape [1, 64]. Shape [64]"),
    (of_another_dtype, "tensor model.norm.weight has dtype I16. Dtype F32 or F16 or BF16"),
    (with_missing_tensors, "lacks 9 tensors (model.layers.2."),
    (with_extra_tensors, "has 9 tensors (model.layers.1."),
    (truncated, "but the file has "),
    (
        with_a_header_longer_than_the_file,
        "its header claims 1000000000 bytes, but the file has 10.",
    ),
    (with_overlapping_tensors, "overlaps the tensor before it"),
    (with_a_tensor_twice, "its header is not valid JSON (model.norm.weight occurs twice)"),
    (
        with_an_absent_shard,
        "lacks 1 of the files that model.safetensors.index.json names (model-00002-of-00002.",
    ),
    (with_an_index_that_leaves_the_folder, "in '../tiny/model-00001-of-00002.safetensors'"),
]


@pytest.mark.parametrize(
    ("spoil", "message"), CASES, ids=lambda value: getattr(value, "__name__", None)
)
def test_model_is_refused(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(checkpoint)
    assert main.run(["inspect", str(checkpoint)]) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("llmkit inspect: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("architecture", "support"), [("llama", "native"), ("persimmon", "fallback")]
)
def test_inspect_says_how_a_model_runs(
    architecture: str, support: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_checkpoint(tmp_path / "model", architecture)
    assert main.run(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["support"] == support
    assert facts["tp"] == ([1] if support == "fallback" else [1, 2, 4])
    assert main.run(["inspect", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{support}: {facts['support_reason']}" in shown
    if support == "fallback":
        assert facts["support_reason"].endswith(
            "on one rank, because its class has no tp_plan, which would say how tensors are split"
        )


@pytest.mark.parametrize("command", ["quantize", "shard", "shard plan", "bench", "inspect"])
def test_missing_path_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        "quantize": ["--method", "bf16", "-o", str(tmp_path / "out")],
        "shard": ["--tp", "2", "-o", str(tmp_path / "out")],
        "shard plan": ["--tp", "2"],
        "bench": ["--offline"],
    }
    missing = str(tmp_path / "nothing")
    assert main.run([*command.split(), missing, *more.get(command, [])]) == 3
    assert f"llmkit {command}: error: {missing} does not exist." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_hub_id_without_a_network_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    assert main.run(["inspect", "nobody/no-such-model"]) == 3
    shown = capsys.readouterr().err
    assert shown == (
        "llmkit inspect: error: nobody/no-such-model is not a path here and not in the hub's cache,"
        " and HF_HUB_OFFLINE forbids a download. A directory, a cached hub id or a .gguf file was"
        " expected. Check the spelling, or unset HF_HUB_OFFLINE.\n"
    )


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("http://server/model?key=secret", "an address that begins with http:// is not the addr"),
        ("https://huggingface.co/org/name", "was expected. Write hf://org/name."),
        ("https://huggingface.co/org/name?token=secret", "was expected. Write hf://org/name."),
        ("s3://Bucket#secret/x", "the s3: address is not the address of a checkpoint. s3://BUCKET"),
    ],
)
def test_pull_says_which_addresses_there_are(
    reference: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["pull", reference, "-o", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "hf://ORGANIZATION/NAME was expected" in shown
    assert "secret" not in shown


@pytest.mark.parametrize("words", [["--no-eval"], ["--no-eval", "--dry-run"]])
def test_quantize_refuses_a_corrupt_tokenizer_before_it_writes(
    checkpoint: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = checkpoint / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes()[:-100])
    out = tmp_path / "out"
    command = ["quantize", str(checkpoint), "--method", "bf16", "-o", str(out), "--quiet", *words]
    assert main.run(command) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llmkit quantize: error: {tokenizer} is malformed (")
    assert line.endswith("Copy it again from where the model came from.")
    assert list(tmp_path.iterdir()) == [checkpoint]
    tokenizer.unlink()  # weights without any tokenizer may still be quantized
    (checkpoint / "tokenizer_config.json").unlink(missing_ok=True)
    assert main.run(command) == 0


def test_file_changed_after_writing_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "written"
    assert (
        main.run(
            [
                "quantize",
                str(checkpoint),
                "--method",
                "fp16",
                "--no-eval",
                "-o",
                str(written),
                "--quiet",
            ]
        )
        == 0
    )
    file = written / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert (
        main.run(
            [
                "quantize",
                str(written),
                "--method",
                "bf16",
                "--no-eval",
                "-o",
                str(tmp_path / "again"),
            ]
        )
        == 3
    )
    shown = capsys.readouterr().err
    assert "has SHA-256 " in shown
    assert "llmkit.json says " in shown
    assert not (tmp_path / "again").exists()


def test_inspect_shows_the_model(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["inspect", str(checkpoint), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    count = 2 * 512 * 64 + 2 * ((64 + 32 + 32 + 64) * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == count
    assert (facts["layers"], facts["heads"], facts["kv_heads"], facts["head_dim"]) == (2, 4, 2, 16)
    assert facts["weight_bytes"]["fp32"] == 4 * count
    assert facts["weight_bytes"]["bf16"] == 2 * count
    linear = 2 * ((64 + 32 + 32 + 64) * 64 + 3 * 64 * 128)
    assert linear // 2 < facts["weight_bytes"]["int4"] - 2 * (count - linear) < linear * 0.8
    assert linear < facts["weight_bytes"]["int8"] - 2 * (count - linear) < linear * 1.2
    assert facts["kv_bytes_per_token"] == {"fp32": 2 * 2 * 2 * 16 * 4, "bf16": 2 * 2 * 2 * 16 * 2}
    assert facts["disk_bytes"] == (checkpoint / WEIGHTS).stat().st_size
    assert facts["tp"] == [1, 2, 4]
    assert main.run(["inspect", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "LlamaForCausalLM, 0.1 million parameters",
        "4 query heads, 2 KV, of 16",
        "int4",
        "1, 2, 4",
    ):
        assert part in shown


def test_doctor_shows_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from llmkit.kernels.cpu import cpu_kernels

    assert main.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    cuda = next(path for path in found["paths"] if path["name"] == "CUDA")
    assert cuda["active"] == torch.cuda.is_available()
    compiled = next(
        path for path in found["paths"] if path["name"] == "compiled kernels on the CPU"
    )
    assert compiled["active"] == (cpu_kernels.library is not None)
    assert compiled["levels"] == cpu_kernels.levels()
    assert compiled["level"] in (*cpu_kernels.levels(), None)
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert found["torch"]["threads_why"]
    assert all(path["why"] for path in found["paths"])
    assert main.run(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", [["doctor"], ["bench", "MODEL", "--no-speed"]])
def test_cpu_level_that_the_processor_lacks_is_refused(
    command: list[str],
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llmkit.kernels.cpu import cpu_kernels

    monkeypatch.setenv("LLMKIT_CPU_LEVEL", "avx9")
    assert main.run([str(model) if word == "MODEL" else word for word in command]) == 3
    levels = cpu_kernels.levels()
    expected = f"One of {', '.join(levels)} was expected" if levels else "The compiled kernels are"
    error = capsys.readouterr().err
    assert f"LLMKIT_CPU_LEVEL: this processor has no level 'avx9'. {expected}" in error
    assert "Traceback" not in error
    assert "not a variable" not in error


@pytest.mark.parametrize("name", ["avx2", ""])
def test_cpu_level_is_forced_and_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.kernels.cpu import cpu_kernels
    from llmkit.runtime.engine.engine_options import EngineOptions
    from llmkit.runtime.part_loader import fast_paths

    if "avx2" not in cpu_kernels.levels():
        pytest.skip("a processor without AVX2")
    monkeypatch.setenv("LLMKIT_CPU_LEVEL", name)
    cpu_kernels.check_level()
    level = name or cpu_kernels.levels()[-1]
    assert cpu_kernels.level() == level
    options = EngineOptions(threads=3, cpu_activations="int8")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    lines = fast_paths(torch.device("cpu"), options)
    assert f"compiled kernels: level {level}" in lines
    assert "CPU threads: 1, a share of 3, --threads" in lines
    assert "CPU activations: int8 for int8 and 4-bit weights, else float32" in lines


def test_doctor_shows_why_a_path_is_off() -> None:
    from llmkit.cli.doctor import fast_paths

    def reasons(*machine: Any) -> dict[str, tuple[bool, str]]:
        return {path["name"]: (path["active"], path["why"]) for path in fast_paths(*machine)}

    bare = reasons([], None, "DEFAULT", None)
    assert not any(active for active, _ in bare.values())
    assert bare["CUDA"][1] == "this torch is a CPU build; install a CUDA build to use a GPU"
    assert "nvidia-smi" in reasons([], "13.0", "AVX512", "0.2")["CUDA"][1]
    full = reasons([{"name": "H200", "capability": [9, 0]}], "13.0", "AVX512", "0.2")
    assert {name for name, (active, _) in full.items() if not active} == {"Triton kernels"}
