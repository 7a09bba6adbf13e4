"""Towers, projectors and MTP layers go through quantize, shard and merge byte for byte."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.gguf_families import convert_family
from support.tiny_families import family_oracle
from support.tiny_models import tiny_checkpoint
from support.tiny_wrappers import save_wrapper, tiny_wrapper, wrapper_logits

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.common.progress import SilentProgress
from llmkit.model.checkpoint_tensors import carried_tensors, check_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.weight_loader import load_model
from llmkit.quant.inspect_checkpoint import inspect_checkpoint
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_report import Report
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.engine_plan import plan_engine
from llmkit.shard.merge import merge
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.shard_plan import CARRIED_FILE
from llmkit.shard.verify import verify

TOKENS = torch.randint(3, 512, (24,), generator=torch.Generator().manual_seed(1))
GLM: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
CALIBRATED: dict[str, Any] = {"samples": 4, "seq_len": 32, "group_size": 32}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("bf16", {}),
    "fp8": ("fp8", {}),
    "gptq": ("gptq", CALIBRATED),
    "awq": ("awq", CALIBRATED),
    "mixed": ("rtn", {"target_bits": 9.0, **CALIBRATED}),
}

pytestmark = pytest.mark.usefixtures("short_builtin_text")


def add_mtp_layer(path: Path) -> Path:
    """Give a checkpoint a layer that predicts a second token, as GLM-4.5 and DeepSeek-V3 have it.

    Its tensors have many dtypes and shapes, and names as those of the layers before.
    """
    file = path / "model.safetensors"
    tensors = load_file(file)
    layer = "model.layers.2"
    copied = {
        name.replace("model.layers.1", layer): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.layers.1.")
    }
    mtp = {
        f"{layer}.eh_proj.weight": torch.randn(64, 128),
        f"{layer}.enorm.weight": torch.randn(64).bfloat16(),
        f"{layer}.shared_head.norm.weight": torch.randn(64).half(),
        f"{layer}.scale": torch.tensor(0.5),
        f"{layer}.fp8.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
        f"{layer}.position_ids": torch.arange(7),
    }
    save_file(tensors | copied | mtp, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    wrapper = tiny_wrapper("gemma3", torch.bfloat16)
    with torch.no_grad():  # a value that no cast may touch
        wrapper.model.vision_tower.embeddings.patch_embedding.weight.fill_(float("nan"))
    return {
        "wrapper": save_wrapper(wrapper, folder / "wrapper", hub_names=True),
        "mtp": add_mtp_layer(tiny_checkpoint(folder / "mtp", "glm4_moe", dtype="float32", **GLM)),
    }


def hashes(path: Path) -> dict[str, str]:
    """The SHA-256 of the carried tensors of an unsharded checkpoint."""
    checkpoint = open_checkpoint(path)
    tensors = carried_tensors(checkpoint, checkpoint_spec(checkpoint))
    return {
        name: hashlib.sha256(checkpoint.read_bytes(info, 0, info.nbytes)).hexdigest()
        for name, info in tensors.items()
    }


def run(source: Path, out: Path, method: str, **options: Any) -> Report:
    plain = QuantizeOptions(method, evaluate=False, device="cpu")
    return quantize(str(source), str(out), dataclasses.replace(plain, **options), SilentProgress())


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("wrapper", method) for method in METHODS), ("mtp", "bf16"), ("mtp", "gptq")],
)
def test_carried_tensors_have_the_same_bytes_after_quantize_shard_and_merge(
    sources: dict[str, Path], name: str, method: str, tmp_path: Path
) -> None:
    source = sources[name]
    before = hashes(source)
    assert len(before) > 10
    kind, options = METHODS[method]
    report = run(source, tmp_path / "out", kind, **options)
    assert report["carried"]["tensors"] == len(before)
    assert hashes(tmp_path / "out") == before
    plan = shard(tmp_path / "out", tmp_path / "ranks", 2, 2 if method == "bf16" else 1)
    assert plan.to_json()["carried"]["bytes"] == report["carried"]["bytes"]
    result = verify(tmp_path / "ranks")
    assert result.ok, result.problems
    assert result.files == len(plan.ranks) + 1
    merge(tmp_path / "ranks", tmp_path / "merged")
    assert hashes(tmp_path / "merged") == before
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_carried_tensors_are_stored_once_and_not_loaded(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["wrapper"]
    shard(source, tmp_path / "ranks", 2)
    carried = load_file(tmp_path / "ranks" / CARRIED_FILE)
    assert carried.keys() == hashes(source).keys()
    ranks = [load_file(file) for file in (tmp_path / "ranks").glob("rank-*.safetensors")]
    assert len(ranks) == 2
    assert not any(carried.keys() & rank.keys() for rank in ranks)
    sharded = open_checkpoint(tmp_path / "ranks")
    facts = inspect_checkpoint(sharded)["carried"]
    assert facts == inspect_checkpoint(open_checkpoint(source))["carried"]
    assert facts["tensors"] == len(carried)
    assert facts["bytes"] == sum(tensor.nbytes for tensor in carried.values())
    assert facts["prefixes"] == ["vision_tower", "multi_modal_projector"]
    options = EngineOptions(device="cpu", max_model_len=64, max_num_seqs=1)
    text_bytes = plan_engine(open_checkpoint(source), options).memory.weight_bytes
    stripped = tmp_path / "text"
    stripped.mkdir()
    for file in source.iterdir():
        (stripped / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in carried}
    save_file(kept, stripped / "model.safetensors", {"format": "pt"})
    assert plan_engine(open_checkpoint(stripped), options).memory.weight_bytes == text_bytes
    # A rank that lost the file of carried tensors is incomplete, and says so.
    (tmp_path / "ranks" / CARRIED_FILE).unlink()
    with pytest.raises(InputError, match=CARRIED_FILE):
        merge(tmp_path / "ranks", tmp_path / "merged")


def test_carried_tensors_of_an_interrupted_run_are_completed(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmkit.quant import quantize_checkpoint

    source = sources["wrapper"]
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(quantize_checkpoint, "round_parameters", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", "fp8")
    run(source, tmp_path / "out", "fp8", resume=True)
    run(source, tmp_path / "whole", "fp8")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def load_in_transformers(path: Path) -> Any:
    """The multimodal model, which must have exactly the checkpoint's tensors."""
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(
        path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded


@pytest.mark.parametrize("name", ["gemma3", "qwen2-vl", "qwen3.5-moe"])
def test_carried_model_loads_in_transformers_as_the_same_class(name: str, tmp_path: Path) -> None:
    """The cast of a bfloat16 model changes nothing: also the merged result has equal logits."""
    model = tiny_wrapper(name, torch.bfloat16)
    source = save_wrapper(model, tmp_path / "source", hub_names=True)
    run(source, tmp_path / "out", "bf16")
    shard(tmp_path / "out", tmp_path / "ranks", 2)
    merge(tmp_path / "ranks", tmp_path / "merged")
    loaded = load_in_transformers(tmp_path / "merged")
    original = load_in_transformers(source)
    assert type(loaded) is type(original) is type(model)
    assert torch.equal(wrapper_logits(loaded, TOKENS), wrapper_logits(original, TOKENS))
    before = dict(model.named_parameters())
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter, before[key]), key
    for file in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("hub_names", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_carried_modules_are_ignored_under_the_names_of_other_readers(
    name: str, hub_names: bool, tmp_path: Path
) -> None:
    """The quantization config names transformers' modules, whatever names the checkpoint has.

    vLLM's have other prefixes. Both compare names exactly, or with `re.match` after "re:".
    """
    model = tiny_wrapper(name, torch.bfloat16)
    source = save_wrapper(model, tmp_path / "source", hub_names)
    run(source, tmp_path / "out", "fp8", keep=r"layers\.1\.mlp\.down_proj")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ignore = config["quantization_config"]["ignore"]

    def is_ignored(module: str) -> bool:
        return any(
            re.match(entry[3:], module) if entry.startswith("re:") else entry == module
            for entry in ignore
        )

    linears = [key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    quantized = [module for module in linears if not is_ignored(module)]
    layers = [module for module in linears if "language_model.layers" in module]
    assert len(layers) == 14 and len(linears) > 16
    kept = "model.language_model.layers.1.mlp.down_proj"
    assert quantized == [module for module in layers if module != kept]

    def vllm_name(module: str) -> str:
        if module == "lm_head":
            return "language_model.lm_head"
        renamed = module.replace("model.language_model.", "language_model.model.")
        return renamed.removeprefix("model.")

    assert [module for module in linears if not is_ignored(vllm_name(module))] == quantized


@pytest.mark.parametrize("tied", [True, False])
def test_carried_wrapper_with_a_quantized_lm_head(tied: bool, tmp_path: Path) -> None:
    """Mistral 3's flag says tied where nothing else does, but the output has an lm_head."""
    source = save_wrapper(tiny_wrapper("mistral3", torch.bfloat16), tmp_path / "source", True)
    name = "language_model.lm_head.weight"
    if not tied:
        tensors = load_file(source / "model.safetensors")
        tensors[name] = torch.randn(512, 64).bfloat16()
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (source / "config.json").write_text(json.dumps(config))
    run(source, tmp_path / "out", "rtn", group_size=32, lm_head=8)
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = checkpoint_spec(checkpoint)
    check_checkpoint(checkpoint, spec)
    assert not spec.tie_word_embeddings
    assert f"{name}_packed" in checkpoint.tensors
    original = load_model(open_checkpoint(source), torch.float32)
    logits = next(window_logits(load_model(checkpoint, torch.float32), TOKENS[None]))
    expected = next(window_logits(original, TOKENS[None]))
    assert torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] > 0.9


def test_carried_wrapper_is_served_on_two_ranks_as_on_one(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    shard(sources["wrapper"], tmp_path / "ranks", 2)
    answers = []
    for path in (sources["wrapper"], tmp_path / "ranks"):
        engine = load_engine(str(path), EngineOptions(device="cpu", max_model_len=64))
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        answers.append(engine.generate([TOKENS.tolist()], sampling))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("method", "dtype"), [("int8", torch.bfloat16), ("fp16", torch.half)])
def test_carried_tensors_of_a_gguf_file_are_stored_in_16_bits(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A GGUF file is read as float32, whatever it stores."""
    family_oracle("glm4-moe", tmp_path)
    vector = np.array([1.5, -2.25, 1e5, *range(29)], np.float32)  # one is too large for float16
    extra = {
        f"model.layers.4.{module}.weight": vector
        for module in ("enorm", "hnorm", "shared_head.norm", "input_layernorm")
    }
    extra["model.layers.4.eh_proj.weight"] = np.ones((32, 64), np.float32)
    keys = {"block_count": 5, "nextn_predict_layers": 1}
    source = convert_family(tmp_path, tmp_path / "model.gguf", extra=extra, **keys)
    options = QuantizeOptions(method=method, device="cpu", evaluate=False)
    report = quantize(str(source), str(tmp_path / "out"), options, SilentProgress())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    limit = torch.finfo(dtype).max
    expected = torch.from_numpy(vector).clamp(-limit, limit).to(dtype)
    assert {tensors[name].dtype for name in extra} == {dtype}
    assert torch.equal(tensors["model.layers.4.hnorm.weight"], expected)
    assert report["carried"]["bytes"] == sum(2 * tensor.size for tensor in extra.values())
    assert len(report["overflows"]) == (4 if dtype == torch.half else 0)


def test_carried_tensors_need_the_configs_word(tmp_path: Path) -> None:
    """Layers after the last one are only carried where the config counts them."""
    path = add_mtp_layer(tiny_checkpoint(tmp_path / "model"))
    checkpoint = open_checkpoint(path)
    check_checkpoint(checkpoint, checkpoint_spec(checkpoint))
    del checkpoint.config["num_nextn_predict_layers"]
    with pytest.raises(
        InputError, match=r"model\.layers\.2\..* that no part of a LlamaForCausalLM"
    ):
        check_checkpoint(checkpoint, checkpoint_spec(checkpoint))
