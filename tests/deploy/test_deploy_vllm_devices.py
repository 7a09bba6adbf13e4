"""`llmkit deploy vllm --device`: which checkpoints vLLM's plugins load, and what is written."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.quantized_files import quantized_checkpoint

from llmkit.checkpoint.modelopt_format import ALGORITHMS
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, Scheme
from llmkit.cli.main import run
from llmkit.deploy.loadable_checkpoints import scheme_name
from llmkit.deploy.vllm_devices import ACCELERATORS, DEVICES, GIB
from llmkit.quant.number_formats import NUMBER_FORMATS
from llmkit.shard.layout_capacity import plan_report
from llmkit.shard.shard_checkpoint import open_source

FACTS = yaml.safe_load((Path(__file__).parents[1] / "data" / "vllm_plugins.yaml").read_text())
# vLLM's names of llmkit's formats, by device.
METHODS = {
    "tpu": {"awq": "auto_awq", "mxfp4": "gpt_oss_mxfp4", "modelopt": "modelopt_fp4"},
    "hpu": {"awq": "awq_hpu", "gptq": "gptq_hpu", "mxfp4": "gpt_oss_mxfp4"},
    "neuron": {},
}
W4A16 = Scheme(4, 32)
FP8 = Scheme(8, kind="float", inputs="token")
NVFP4 = ALGORITHMS["NVFP4"]
Read = pytest.CaptureFixture[str]


def checkpoint(path: Path, name: Format, scheme: Scheme, **config: Any) -> Path:
    return quantized_checkpoint(path / "m", QuantizationConfig(name, scheme), config=config)


def deploy(model: Path, *words: str) -> int:
    sizes = ["--tokens", "64", "--gpus-per-node", "4"]
    return run(["deploy", "vllm", str(model), *sizes, *words])


@pytest.mark.parametrize("name", ["tpu", "hpu", "neuron"])
def test_formats_of_a_device_are_those_of_its_plugin(name: Any) -> None:
    engine = DEVICES[name].engine
    known = FACTS[name]["supported_quantization"]
    for one in engine.formats:
        assert METHODS[name].get(one.format, one.format) in known
        assert set(one.schemes) <= set(NUMBER_FORMATS)
        if "--quantization" in one.arguments:
            assert one.arguments[1] in known
    assert engine.source.split()[0] in FACTS[name]["source"]


def test_architectures_of_neuron_become_its_model_types() -> None:
    for name in DEVICES["neuron"].engine.architectures or ():
        model_type = name.removesuffix("ForCausalLM").lower()
        assert {"qwen3moe": "qwen3_moe"}.get(model_type, model_type) in FACTS["neuron"][
            "model_types"
        ]


def test_memory_of_tpus_is_that_of_their_plugin() -> None:
    tpus = {key: one.memory_gib for key, one in ACCELERATORS.items() if one.device == "tpu"}
    assert tpus == FACTS["tpu"]["hbm_gib"]


@pytest.mark.parametrize("name", list(NUMBER_FORMATS))
def test_scheme_name_is_the_option_that_makes_it(name: str) -> None:
    number_format = NUMBER_FORMATS[name]
    assert scheme_name(number_format.scheme) == name
    assert scheme_name(number_format.scheme_in("modelopt")) == name


LOADED: list[tuple[str, Format, Scheme, list[str], str]] = [
    ("gaudi3", "awq", Scheme(4, 32, symmetric=False), ["--quantization", "awq_hpu"], ""),
    ("gaudi2", "gptq", W4A16, ["--quantization", "gptq_hpu"], ""),
    ("gaudi3", "compressed-tensors", W4A16, [], ""),
    ("gaudi3", "modelopt", ALGORITHMS["FP8"], [], ""),
    ("v6e", "compressed-tensors", FP8, [], "MODEL_IMPL_TYPE=vllm"),
    ("v6e", "modelopt", NVFP4, [], "MODEL_IMPL_TYPE=vllm"),
    ("v5e", "awq", Scheme(4, 32, symmetric=False), [], "MODEL_IMPL_TYPE=vllm"),
]


@pytest.mark.parametrize(("gpu", "name", "scheme", "arguments", "variable"), LOADED)
def test_quantized_checkpoint_that_the_plugin_loads_gets_what_it_needs(
    tmp_path: Path,
    capsys: Read,
    gpu: str,
    name: Format,
    scheme: Scheme,
    arguments: list[str],
    variable: str,
) -> None:
    model = checkpoint(tmp_path, name, scheme)
    assert deploy(model, "--gpu", gpu, "--json") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["device"] == ACCELERATORS[gpu].device
    assert "needs no other engine" not in captured.err
    text = document["text"]
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    command = shlex.split(text.splitlines()[-1])
    assert command[:4] == ["exec", "vllm", "serve", str(model)]
    assert ("--quantization" in command) is bool(arguments)
    if arguments:
        assert command[command.index("--quantization") :][:2] == arguments
    assert (f"export {variable}\n" in text) is bool(variable)


REFUSED: list[tuple[str, Format, Scheme, str, str]] = [
    ("trn2", "awq", Scheme(4, 32, symmetric=False), "w4a16 in the awq format", "--method bf16"),
    ("inf2", "compressed-tensors", FP8, "fp8 in the compressed-tensors format", "--method bf16"),
    (
        "v6e",
        "modelopt",
        ALGORITHMS["FP8"],
        "fp8-static in the modelopt format",
        "llmkit convert MODEL --format compressed-tensors -o DIR",
    ),
    (
        "v5e",
        "gptq",
        W4A16,
        "w4a16 in the gptq format",
        "llmkit convert MODEL --format awq -o DIR",
    ),
    (
        "gaudi3",
        "compressed-tensors",
        NVFP4,
        "nvfp4 in the compressed-tensors format",
        "llmkit quantize MODEL --method fp8 -o DIR",
    ),
    (
        "gaudi3",
        "compressed-tensors",
        Scheme(8, 32),
        "w8a16 in the compressed-tensors format",
        "llmkit quantize MODEL --method fp8 -o DIR",
    ),
]


@pytest.mark.parametrize(("gpu", "name", "scheme", "what", "todo"), REFUSED)
def test_quantized_checkpoint_that_the_plugin_does_not_load_is_refused_with_a_way_out(
    tmp_path: Path,
    capsys: Read,
    gpu: str,
    name: Format,
    scheme: Scheme,
    what: str,
    todo: str,
) -> None:
    model = checkpoint(tmp_path, name, scheme)
    assert deploy(model, "--gpu", gpu) == 3
    text = capsys.readouterr().err
    assert f"does not load {what}. It loads 16 bits" in text
    command = todo.replace("MODEL", str(model))
    assert command in text
    assert FACTS[ACCELERATORS[gpu].device]["source"].split()[0] in text


@pytest.mark.parametrize(("gpu", "name", "scheme", "what", "todo"), [REFUSED[1], REFUSED[2]])
def test_way_out_makes_a_checkpoint_that_the_plugin_loads(
    tmp_path: Path,
    capsys: Read,
    gpu: str,
    name: Format,
    scheme: Scheme,
    what: str,
    todo: str,
) -> None:
    model = checkpoint(tmp_path, name, scheme)
    assert deploy(model, "--gpu", gpu) == 3
    found = re.search("`llmkit (.*) -o DIR`", capsys.readouterr().err)
    assert found is not None
    words = shlex.split(found[1])
    out = tmp_path / "out"
    device = ["--device", "cpu"] if words[0] == "quantize" else []
    assert run([*words, "-o", str(out), *device, "--quiet"]) == 0
    assert deploy(out, "--gpu", gpu, "--quiet") == 0


def test_architecture_that_neuron_does_not_have_is_refused(tmp_path: Path, capsys: Read) -> None:
    config = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
    model = checkpoint(tmp_path, "compressed-tensors", FP8, **config)
    assert deploy(model, "--gpu", "trn2") == 3
    assert "vLLM on Neuron has no SmolLM3ForCausalLM. One of DbrxFor" in capsys.readouterr().err


def test_neuron_gets_a_batch_that_its_kv_cache_holds(model: Path, capsys: Read) -> None:
    words = ["--gpu", "trn1", "--max-model-len", "16", "--json"]
    assert deploy(model, *words) == 0
    command = shlex.split(json.loads(capsys.readouterr().out)["text"].splitlines()[-1])
    options = dict(itertools.pairwise(command))
    assert options["--max-num-seqs"] == "4" and "--no-enable-prefix-caching" in command
    assert run(["deploy", "vllm", str(model), *words, "--tokens", "4096"]) == 0
    assert "--max-num-seqs 32" in json.loads(capsys.readouterr().out)["text"]


def test_layout_counts_the_cores_of_a_chip(
    model: Path, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chip of two cores holds what does not fit on one rank."""
    memory = plan_report(open_source(str(model)), 1)["ranks"][0]["bytes"]
    size = ["--gpu", f"{memory}B", "--gpus-per-node", "1", "--device", "neuron"]
    assert run(["deploy", "vllm", str(model), "--tokens", "64", *size]) == 3
    assert "do not fit on one node" in capsys.readouterr().err
    two_cores = ACCELERATORS["inf2"]._replace(memory_gib=memory / GIB)
    monkeypatch.setitem(ACCELERATORS, "inf2", two_cores)
    one_chip = ["--gpu", "inf2", "--gpus-per-node", "1", "--json"]
    assert run(["deploy", "vllm", str(model), "--tokens", "64", *one_chip]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["tp"], document["pp"], document["nodes"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("gpu", "resource", "selector"),
    [
        ("trn2", "aws.amazon.com/neuron", None),
        ("gaudi3", "habana.ai/gaudi", None),
        (
            "v6e",
            "google.com/tpu",
            {
                "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
                "cloud.google.com/gke-tpu-topology": "2x2",
            },
        ),
    ],
)
def test_objects_ask_for_the_resource_of_the_device(
    model: Path, capsys: Read, gpu: str, resource: str, selector: dict[str, str] | None
) -> None:
    for form in ("lws", "kserve"):
        assert deploy(model, "--gpu", gpu, "--form", form, "--image", "registry/vllm:1") == 0
        document, *_ = yaml.safe_load_all(capsys.readouterr().out)
        spec = document["spec"]
        if form == "lws":
            pod = spec["leaderWorkerTemplate"]["leaderTemplate"]["spec"]
        else:
            pod = spec["template"]
        (container,) = pod["containers"]
        assert container["resources"] == {"limits": {resource: "4"}}
        assert container["image"] == "registry/vllm:1"
        assert pod.get("nodeSelector") == selector


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--gpu", "gaudi2", "--device", "tpu"], "--gpu gaudi2 goes with --device hpu, not tpu"),
        (["--gpu", "trn1", "--device", "cuda"], "--gpu trn1 goes with --device neuron, not cuda"),
        (["--gpu", "h100", "--device", "neuron"], "--gpu h100 is not known for --device neuron"),
        (["--gpu", "v5p", "--gpus-per-node", "8"], "no host of tpu-v5p-slice has 8 chips"),
        (["--gpu", "gaudi3", "--form", "ray"], "--form ray: Ray Serve LLM places models"),
    ],
)
def test_device_and_options_that_do_not_go_together_are_refused(
    model: Path, capsys: Read, words: list[str], what: str
) -> None:
    assert run(["deploy", "vllm", str(model), "--tokens", "64", *words]) == 2
    assert what in capsys.readouterr().err
