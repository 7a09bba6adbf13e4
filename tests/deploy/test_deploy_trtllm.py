"""`llmkit deploy trtllm`: what it writes, and what it refuses, beside facts out of TensorRT-LLM's
sources (tests/data/trtllm.yaml); and llmkit's modelopt checkpoints beside its loaders.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.int4_awq_files import write_int4_awq
from support.quantized_files import SIZES, quantized_checkpoint
from support.synthetic_checkpoint import LLAMA
from support.tiny_families import family_oracle
from support.tiny_models import tiny_checkpoint, write_tokenizer

from llmkit.checkpoint.modelopt_format import ALGORITHMS
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, QuantizedWeight, Scheme
from llmkit.cli.main import run
from llmkit.deploy.loadable_checkpoints import scheme_name
from llmkit.deploy.trtllm import engine_on
from llmkit.model.checkpoint_tensors import checkpoint_tensors, with_pre_quant_scales
from llmkit.model.families import checkpoint_spec, model_spec
from llmkit.shard.layout_capacity import plan_report
from llmkit.shard.shard_checkpoint import open_source

FACTS = yaml.safe_load((Path(__file__).parents[1] / "data" / "trtllm.yaml").read_text())
TYPES = {"int": int, "bool": bool, "str": str, "float": float, "list": list}
# llmkit's names of schemes in modelopt, by TensorRT-LLM's.
SCHEMES = {
    "FP8": "fp8-static",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "FP8_BLOCK_SCALES": "fp8-block",
    "NVFP4": "nvfp4",
    "W4A16_AWQ": "w4a16",
    "W4A8_MXFP4_FP8": "mxfp4afp8",
}
# One GPU of each generation.
GPUS = {
    "a100-80": "ampere",
    "l40s": "ada",
    "h200": "hopper",
    "b200": "blackwell",
    "rtx5090": "consumer blackwell",
}
Read = pytest.CaptureFixture[str]


def checkpoint(path: Path, name: Format, scheme: Scheme, **config: Any) -> Path:
    def round_scales(_: str, weight: QuantizedWeight) -> QuantizedWeight:
        if scheme.scale_format == "e8m0":  # powers of two
            weight.scales = weight.scales.log2().round().exp2()
        return weight

    quantization = QuantizationConfig(name, scheme)
    config = ({"intermediate_size": 128} if scheme.group_size == 64 else {}) | config
    quantization = with_pre_quant_scales(quantization, model_spec(LLAMA | SIZES | config))
    return quantized_checkpoint(path / "m", quantization, round_scales, config)


def deploy(model: Path, gpu: str, *words: str) -> int:
    return run(["deploy", "trtllm", str(model), "--gpu", gpu, "--tokens", "64", *words])


def document(capsys: Read) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def check_options(options: dict[str, Any], class_name: str = "TorchLlmArgs") -> None:
    """As TensorRT-LLM's classes do: no unknown field, and no value of another type."""
    fields = FACTS["options"][class_name]
    for name, value in options.items():
        assert name in fields, f"{class_name} has no {name}"
        if fields[name] in FACTS["options"]:
            check_options(value, fields[name])
        else:
            assert type(value) is TYPES[fields[name]], name


def test_options_are_fields_of_its_classes(model: Path, capsys: Read) -> None:
    assert deploy(model, "h100", "--kv-cache-dtype", "fp8", "--max-num-seqs", "32") == 0
    text = capsys.readouterr().out
    options = yaml.safe_load(text)
    check_options(options)
    assert options["kv_cache_config"]["dtype"] == "fp8"
    assert 0 < options["kv_cache_config"]["free_gpu_memory_fraction"] <= 1
    assert options["max_batch_size"] == options["cuda_graph_config"]["max_batch_size"] == 32
    assert options["max_seq_len"] == 64 and options["tensor_parallel_size"] == 1
    with pytest.raises(AssertionError, match="has no dtyp"):
        check_options({"kv_cache_config": {"dtyp": "auto"}})


def test_tensor_parallel_size_is_the_smallest_that_holds_the_model(
    model: Path, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmkit.deploy import trtllm

    whole = plan_report(open_source(str(model)), 1)["ranks"][0]["bytes"]
    monkeypatch.setattr(trtllm, "gpu_bytes", lambda gpu: whole)
    assert deploy(model, "h100", "--json") == 0
    made = document(capsys)
    assert made["tp"] == made["options"]["tensor_parallel_size"] == 2
    assert deploy(model, "h100", "--gpus-per-node", "1") == 3
    assert "do not fit on one node of 1 h100" in capsys.readouterr().err


def script_parts(text: str) -> tuple[dict[str, Any], list[str]]:
    """The options that a script writes, and its command."""
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    body = re.search(r"<<'END'\n(.*)END\n", text, re.S)
    assert body is not None
    command = shlex.split(text.splitlines()[-1])
    assert command[0] == "exec"
    return yaml.safe_load(body[1]), command[1:]


def check_command(command: list[str]) -> None:
    assert {word for word in command if word.startswith("--")} <= set(FACTS["command"])


def test_script_writes_the_options_and_starts_the_server(
    model: Path, tmp_path: Path, capsys: Read
) -> None:
    out = tmp_path / "serve.sh"
    assert deploy(model, "h100", "--form", "command", "-o", str(out), "--json") == 0
    made = document(capsys)
    assert out.read_text() == made["text"]
    assert deploy(model, "h100", "--form", "options", "-o", str(out)) == 5
    assert f"The output {out} exists and is a file. Remove it" in capsys.readouterr().err
    assert out.read_text() == made["text"]
    options, command = script_parts(made["text"])
    assert options == made["options"]
    assert command[:2] == ["trtllm-serve", str(model)]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    check_command(command)
    # The script itself: a program in place of the server prints what it would read.
    program = tmp_path / "bin" / "trtllm-serve"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor last; do :; done\ncat "$last"\n')
    program.chmod(0o755)
    ran = subprocess.run(
        ["sh", str(out)],
        env={"PATH": f"{program.parent}:/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert yaml.safe_load(ran.stdout) == made["options"]


@pytest.mark.parametrize("is_local", [True, False])
def test_container_has_the_model_and_listens_on_this_machine_only(
    model: Path, capsys: Read, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    if not is_local:
        from llmkit.cli import deploy_trtllm

        monkeypatch.setattr(deploy_trtllm, "absolute_model", lambda name: "org/name")
    assert deploy(model, "h100", "--form", "container", "--port", "9000", "--name", "Chat") == 0
    options, command = script_parts(capsys.readouterr().out)
    check_options(options)
    assert command[:3] == ["docker", "run", "--rm"]
    pairs = list(itertools.pairwise(command))
    assert ("-p", "127.0.0.1:9000:9000") in pairs and ("--gpus", "1") in pairs
    assert ("-v", "$options:/options.yaml:ro") in pairs
    serve = command[command.index("trtllm-serve") :]
    check_command(serve)
    if is_local:
        assert ("-v", f"{model}:/models/chat:ro") in pairs and serve[1] == "/models/chat"
    else:
        assert serve[1] == "org/name"
    assert command[command.index("trtllm-serve") - 1].startswith("nvcr.io/nvidia/tensorrt-llm/")


def test_kubernetes_objects_follow_its_schemas_and_have_the_options(
    model: Path, capsys: Read
) -> None:
    assert deploy(model, "h100", "--form", "kubernetes", "--replicas", "3", "--image", "x:1") == 0
    text = capsys.readouterr().out
    assert "&id" not in text and "options.yaml: |" in text
    objects = {one["kind"]: one for one in yaml.safe_load_all(text)}
    assert list(objects) == ["ConfigMap", "Deployment", "Service"]
    for one in objects.values():
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    check_options(yaml.safe_load(objects["ConfigMap"]["data"]["options.yaml"]))
    spec = objects["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["replicas"] == 3 and container["image"] == "x:1"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    check_command(container["command"])
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert container["command"][1] == mounts["models"] == f"/models/{model.name}"
    assert container["command"][-1] == f"{mounts['options']}/options.yaml"
    assert {one["name"] for one in pod["volumes"]} == set(mounts)
    assert objects["Service"]["spec"]["selector"] == spec["template"]["metadata"]["labels"]


@pytest.mark.parametrize("gpu", GPUS)
def test_formats_of_a_gpu_are_those_of_the_hardware_matrix(gpu: str) -> None:
    known = FACTS["hardware"][GPUS[gpu]]
    engine = engine_on(gpu)
    found = {one.format: set(one.schemes) for one in engine.formats}
    expected = {SCHEMES[name] for name in known if name in SCHEMES}
    assert found.get("modelopt", set()) == expected
    (modelopt,) = [one for one in engine.formats if one.format == "modelopt"]
    sizes = FACTS["int4_group_sizes"] if "W4A16_AWQ" in known else []
    assert list(modelopt.group_sizes) == sizes
    assert ("fp8" in found) is ("FP8_BLOCK_SCALES" in known)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    "algorithm",
    [
        "FP8",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "NVFP4",
        "W4A16_NVFP4",
        "W4A16_AWQ",
        "W4A8_MXFP4_FP8",
        "W4A16_MXFP4",
    ],
)
def test_modelopt_checkpoint_is_deployed_where_it_runs_and_refused_elsewhere(
    tmp_path: Path, capsys: Read, gpu: str, algorithm: str
) -> None:
    scheme = Scheme(4, 64) if algorithm == "W4A16_AWQ" else ALGORITHMS[algorithm]
    model = checkpoint(tmp_path, "modelopt", scheme)
    runs = algorithm in FACTS["hardware"][GPUS[gpu]]
    assert deploy(model, gpu) == (0 if runs else 3)
    captured = capsys.readouterr()
    if runs:
        check_options(yaml.safe_load(captured.out))
    else:
        name = scheme_name(ALGORITHMS[algorithm])
        assert f"does not load {name} in the modelopt format. It loads 16 bits" in captured.err
        assert f"`llmkit quantize {model} " in captured.err


def test_mixed_precision_is_deployed_where_every_scheme_runs(tmp_path: Path, capsys: Read) -> None:
    layer = "model.layers.0"
    attention = [(f"{layer}.self_attn.{name}_proj", ALGORITHMS["FP8"]) for name in "qkvo"]
    mlp = [(f"{layer}.mlp.{name}_proj", ALGORITHMS["NVFP4"]) for name in ("gate", "up", "down")]
    config = QuantizationConfig("modelopt", None, overrides=(*attention, *mlp))
    model = quantized_checkpoint(tmp_path / "m", config)
    assert deploy(model, "b200") == 0
    assert deploy(model, "h100") == 3
    assert "does not load nvfp4 in the modelopt format" in capsys.readouterr().err


REFUSED: list[tuple[str, Format, Scheme, str, str]] = [
    ("b200", "compressed-tensors", ALGORITHMS["NVFP4"], "nvfp4", "llmkit convert"),
    ("h100", "compressed-tensors", ALGORITHMS["FP8_PER_CHANNEL_PER_TOKEN"], "fp8", "convert"),
    ("h100", "compressed-tensors", Scheme(8, inputs="token"), "w8a8", "--scheme fp8-static"),
    ("b200", "awq", Scheme(4, 32, symmetric=False), "w4a16", "--scheme nvfp4"),
    ("a100-80", "gptq", Scheme(4, 32), "w4a16", "--method awq --format modelopt"),
    ("a100-80", "gptq", Scheme(4, 64), "w4a16", "llmkit convert"),
    ("h100", "compressed-tensors", Scheme(4, 64), "w4a16", "llmkit convert"),
    ("l40s", "awq", Scheme(4, 64, symmetric=False), "w4a16", "--scheme fp8-static"),
    ("b200", "modelopt", ALGORITHMS["MXFP8"], "mxfp8", "--scheme nvfp4"),
]


@pytest.mark.parametrize(("gpu", "name", "scheme", "what", "todo"), REFUSED)
def test_other_checkpoints_are_refused_with_a_command_that_makes_one(
    tmp_path: Path,
    capsys: Read,
    gpu: str,
    name: Format,
    scheme: Scheme,
    what: str,
    todo: str,
) -> None:
    model = checkpoint(tmp_path, name, scheme)
    assert deploy(model, gpu) == 3
    error = capsys.readouterr().err
    assert f"does not load {what} in the {name} format" in error and todo in error
    found = re.search("`llmkit (.*) -o DIR`", error)
    assert found is not None
    if "--method gptq" in found[1] or "fp8-static" in found[1] or "--method awq" in found[1]:
        return  # calibrates
    out = tmp_path / "out"
    words = shlex.split(found[1])
    device = ["--device", "cpu"] if words[0] == "quantize" else []
    assert run([*words, "-o", str(out), *device, "--quiet"]) == 0
    assert deploy(out, gpu, "--quiet") == 0


@pytest.mark.parametrize(
    ("gpu", "what"),
    [
        ("48GiB", "which checkpoints TensorRT-LLM reads depends on the GPU"),
        ("t4", "TensorRT-LLM has no kernels for it. Ampere or later"),
        ("h1000", "--gpu h1000 is not known"),
    ],
)
def test_gpu_that_says_too_little_is_refused(
    model: Path, capsys: Read, gpu: str, what: str
) -> None:
    assert deploy(model, gpu) == 2
    assert what in capsys.readouterr().err


def test_architecture_that_it_does_not_have_is_refused(tmp_path: Path, capsys: Read) -> None:
    config = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
    model = checkpoint(tmp_path, "modelopt", ALGORITHMS["FP8"], **config)
    assert deploy(model, "h100") == 3
    assert "TensorRT-LLM on h100 has no SmolLM3ForCausalLM" in capsys.readouterr().err


def test_scales_that_differ_in_one_fused_linear_are_refused(tmp_path: Path, capsys: Read) -> None:
    def double_up(name: str, weight: QuantizedWeight) -> QuantizedWeight:
        if "up_proj" in name and weight.global_scale is not None:
            weight.global_scale = weight.global_scale * 2
        return weight

    config = QuantizationConfig("modelopt", ALGORITHMS["NVFP4"])
    model = quantized_checkpoint(tmp_path / "m", config, double_up)
    assert deploy(model, "b200") == 3
    error = capsys.readouterr().err
    assert "The weight_scale_2 of linears that are one in TensorRT-LLM on b200 differ" in error
    assert "up_proj.weight: " in error


def test_schemes_that_differ_in_one_fused_linear_are_refused(tmp_path: Path, capsys: Read) -> None:
    modules = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    overrides = tuple(
        (module, ALGORITHMS["FP8" if module.endswith("k_proj") else "NVFP4"]) for module in modules
    )
    config = QuantizationConfig("modelopt", None, overrides=overrides)
    model = quantized_checkpoint(tmp_path / "m", config)
    assert deploy(model, "b200") == 3
    assert "q_proj.weight has NVFP4, inputs too, and others" in capsys.readouterr().err


def test_int4_groups_without_a_kernel_are_refused(tmp_path: Path, capsys: Read) -> None:
    model = checkpoint(tmp_path, "modelopt", Scheme(4, 32))
    assert deploy(model, "a100-80") == 3
    error = capsys.readouterr().err
    assert (
        "q_proj.weight has groups of 32. TensorRT-LLM on a100 has INT4 in groups of 64 or 128"
        in (error)
    )
    assert "--method awq --format modelopt --group-size 64 -o DIR" in error


def change_scales(model: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Set or remove tensors of the first layer."""
    tensors = load_file(model / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(f"model.layers.0.{name}", None)
        if value is not None:
            tensors[f"model.layers.0.{name}"] = value.clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_int4_without_the_pre_quant_scale_of_a_linear_alone_is_refused(
    tmp_path: Path, capsys: Read
) -> None:
    model = checkpoint(tmp_path, "modelopt", Scheme(4, 64))
    change_scales(model, {"mlp.down_proj.pre_quant_scale": None})
    assert deploy(model, "h100") == 3
    error = capsys.readouterr().err
    assert "lacks model.layers.0.mlp.down_proj.pre_quant_scale. TensorRT-LLM on h100 needs" in error


def test_int4_with_a_pre_quant_scale_that_would_be_ignored_is_refused(
    tmp_path: Path, capsys: Read
) -> None:
    model = checkpoint(tmp_path, "modelopt", Scheme(4, 64))
    scale = torch.ones(64, dtype=torch.bfloat16)
    names = [f"self_attn.{name}_proj.pre_quant_scale" for name in "qkv"]
    change_scales(model, dict.fromkeys(names, scale))
    assert deploy(model, "h100", "--quiet") == 0
    change_scales(model, dict.fromkeys(names, scale * 2))
    assert deploy(model, "h100") == 3
    error = capsys.readouterr().err
    assert "q_proj.pre_quant_scale is not 1, and TensorRT-LLM on h100 ignores it" in error


def test_int4_experts_are_refused(tmp_path: Path, capsys: Read) -> None:
    family_oracle("mixtral", tmp_path / "dense", hidden_size=64, intermediate_size=64)
    write_int4_awq(tmp_path / "dense", tmp_path / "m", 64, r"(o_proj|w2)$")
    assert deploy(tmp_path / "m", "a100-80") == 3
    error = capsys.readouterr().err
    assert "w1.weight is INT4, and TensorRT-LLM on a100 has no INT4 experts with inputs in" in error
    assert "--method bf16 --no-eval -o DIR" in error


def test_mxfp4_experts_are_refused(tmp_path: Path, capsys: Read) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 320}
    family_oracle("mixtral", tmp_path / "dense", **sizes)
    write_tokenizer(tmp_path / "dense", vocab=320)
    words = ["--method", "rtn", "--scheme", "mxfp4afp8", "--format", "modelopt", "--no-eval"]
    samples = ["--samples", "2", "--seq-len", "32", "--device", "cpu", "--quiet"]
    out = str(tmp_path / "m")
    assert run(["quantize", str(tmp_path / "dense"), *words, *samples, "-o", out]) == 0
    assert deploy(tmp_path / "m", "b200") == 3
    error = capsys.readouterr().err
    assert "w1.weight is an expert in MXFP4" in error
    assert "--scheme nvfp4 --format modelopt -o DIR" in error


def test_fp8_blocks_of_another_size_are_refused(tmp_path: Path, capsys: Read) -> None:
    blocks = Scheme(8, 64, kind="float", inputs="group", block_rows=64)
    model = checkpoint(tmp_path, "fp8", blocks)
    assert deploy(model, "h100") == 3
    assert "has blocks of 128 x 128 only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scheme", "algorithm"),
    [
        ("fp8-static", "FP8"),
        ("nvfp4", "NVFP4"),
        ("w4a16", "W4A16_AWQ"),
        ("mxfp4afp8", "W4A8_MXFP4_FP8"),
    ],
)
def test_written_modelopt_checkpoint_has_the_tensors_of_its_loader(
    tmp_path: Path, scheme: str, algorithm: str
) -> None:
    """What `llmkit quantize` writes: names, dtypes, shapes, equal scales, hf_quant_config.json."""
    dense = tiny_checkpoint(tmp_path / "dense", hidden_size=64, intermediate_size=128)
    out = tmp_path / "out"
    words = ["--method", "rtn", "--scheme", scheme, "--format", "modelopt", "--kv", "fp8"]
    samples = ["--samples", "2", "--seq-len", "32", "--no-eval", "--device", "cpu", "--quiet"]
    assert run(["quantize", str(dense), *words, *samples, "-o", str(out)]) == 0
    check_tensors(out, algorithm)
    quantization = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert quantization.keys() <= set(FACTS["quantization"])
    assert quantization["quant_algo"] == algorithm
    assert quantization["kv_cache_quant_algo"] == "FP8"
    names = open_checkpoint(out).tensor_names
    for scale in FACTS["kv_scales"]:
        assert f"model.layers.1.self_attn.{scale}" in names
    gpu = "h200" if algorithm == "W4A16_AWQ" else "b200"
    assert deploy(out, gpu, "--quiet") == 0


@pytest.mark.parametrize(
    ("algorithm", "fact"),
    [
        ("FP8", "FP8"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("FP8_PB_WO", "FP8_BLOCK_SCALES"),
        ("NVFP4", "NVFP4"),
    ],
)
def test_modelopt_tensors_have_the_shapes_of_its_loader(
    tmp_path: Path, algorithm: str, fact: str
) -> None:
    config = QuantizationConfig("modelopt", ALGORITHMS[algorithm])
    path = quantized_checkpoint(tmp_path / "m", config)
    check_tensors(path, fact)


def check_tensors(path: Path, algorithm: str) -> None:
    facts = dict(FACTS["linear"][algorithm])
    same: list[str] = facts.pop("same_in_fused", [])
    opened = open_checkpoint(path)
    spec = checkpoint_spec(opened)
    found = 0
    values: dict[tuple[str, str], set[float]] = {}
    for parameter, packed in checkpoint_tensors(spec, opened.quantization).values():
        if not packed.is_quantized or packed.suffix != "weight":
            continue
        found += 1
        for name in parameter.source_names:
            module = name.removesuffix(".weight")
            (source,) = parameter.sources_in(name)
            stored = {
                one.removeprefix(f"{module}."): opened.read(one)
                for one in opened.tensor_names
                if one.startswith(f"{module}.") and not one.endswith(("k_scale", "v_scale"))
            }
            wanted = dict(facts)
            if len(parameter.sources) > 1:
                wanted.pop("pre_quant_scale", None)  # of linears that it loads alone
            assert stored.keys() == wanted.keys()
            for suffix, (dtype, shape) in wanted.items():
                assert str(stored[suffix].dtype) == DTYPES[dtype]
                sizes = {
                    "out": source.shape[0],
                    "in": source.shape[1],
                    "group_size": packed.group_size,
                }
                assert_shape(tuple(stored[suffix].shape), shape, sizes)
                if suffix in same:
                    key = (parameter.name, suffix)
                    values.setdefault(key, set()).add(float(stored[suffix]))
    assert found >= 7
    assert all(len(scales) == 1 for scales in values.values())
    assert bool(values) is bool(same)


DTYPES = {
    "F8_E4M3": "torch.float8_e4m3fn",
    "F32": "torch.float32",
    "BF16": "torch.bfloat16",
    "U8": "torch.uint8",
}


def assert_shape(found: tuple[int, ...], wanted: list[Any], sizes: dict[str, int]) -> None:
    if not wanted:
        assert math.prod(found) == 1
        return
    expected = []
    for size in wanted:
        name, _, divisor = str(size).partition("/")
        number = sizes[divisor] if divisor in sizes else int(divisor or 1)
        expected.append(-(-sizes[name] // number) if name in sizes else size)
    assert list(found) == expected
