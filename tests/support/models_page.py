"""Writes docs/models.md, the table of models: `python -m support.models_page FILE` in tests/.

The tables are made from the families, the wrappers and the parity tests. The names that people know
models by, and those of variants with limits of their own, are the only words written by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import transformers

from llmkit.checkpoint.gguf_architectures import ARCHITECTURES, VARIANTS
from llmkit.model.families import SUPPORTED, model_spec
from llmkit.model.gguf_export import SAME_DECODER
from llmkit.model.spec import ModelSpec
from llmkit.model.wrappers import WRAPPERS
from llmkit.runtime.server.text.tool_dialects import DIALECTS
from support import tiny_wrappers
from support.model_coverage import PeerList, coverage, peer_lists, refusals
from support.tiny_families import COMMON, FAMILIES

# What people call the models of an architecture; of several spellings, the first.
MODEL_NAMES = {
    "LlamaForCausalLM": "Llama 1 to 3.3, SmolLM 1 and 2, Yi, R1-Distill-Llama",
    "MistralForCausalLM": "Mistral 7B, Nemo, Small 3 (24B)",
    "Qwen2ForCausalLM": "Qwen 2, 2.5, QwQ, R1-Distill-Qwen",
    "Qwen3ForCausalLM": "Qwen 3",
    "Phi3ForCausalLM": "Phi-3, 3.5-mini, Phi-4, Phi-4-mini",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3 270M, 1B",
    "GraniteForCausalLM": "Granite 3.0 to 3.3",
    "GraniteSWAForCausalLM": "Granite Swash 2B",
    "Olmo2ForCausalLM": "OLMo 2",
    "SmolLM3ForCausalLM": "SmolLM3",
    "GemmaForCausalLM": "Gemma 1, CodeGemma",
    "VaultGemmaForCausalLM": "VaultGemma 1B",
    "MinistralForCausalLM": "Ministral 8B (2410)",
    "Ministral3ForCausalLM": "Ministral 3, text only",
    "Olmo3ForCausalLM": "OLMo 3",
    "GlmForCausalLM": "GLM-4 9B, GLM-Edge",
    "Glm4ForCausalLM": "GLM-4-0414, GLM-Z1",
    "Ernie4_5ForCausalLM": "ERNIE 4.5 0.3B",
    "HeliumForCausalLM": "Helium 1",
    "SeedOssForCausalLM": "Seed-OSS 36B",
    "HunYuanDenseV1ForCausalLM": "Hunyuan 0.5B to 7B",
    "Exaone4ForCausalLM": "EXAONE 4.0",
    "CohereForCausalLM": "Command R, R+, Aya Expanse",
    "Cohere2ForCausalLM": "Command R7B, Command A",
    "HyperCLOVAXForCausalLM": "HyperCLOVA X SEED Think 14B",
    "Starcoder2ForCausalLM": "StarCoder 2",
    "ArceeForCausalLM": "AFM 4.5B",
    "Jais2ForCausalLM": "Jais 2",
    "NemotronForCausalLM": "Nemotron-4, Minitron",
    "StableLmForCausalLM": "StableLM 3B, StableLM 2",
    "ApertusForCausalLM": "Apertus",
    "InternLM3ForCausalLM": "InternLM 3",
    "IQuestCoderForCausalLM": "IQuest-Coder V1",
    "GptOssForCausalLM": "gpt-oss 20B, 120B",
    "MixtralForCausalLM": "Mixtral 8x7B, 8x22B",
    "Qwen3MoeForCausalLM": "Qwen 3 30B-A3B, 235B-A22B, Qwen3-Coder",
    "Qwen2MoeForCausalLM": "Qwen 1.5 MoE, Qwen 2 57B-A14B",
    "OlmoeForCausalLM": "OLMoE",
    "FlexOlmoForCausalLM": "FlexOlmo",
    "MellumForCausalLM": "Mellum 2",
    "Glm4MoeForCausalLM": "GLM-4.5, 4.6, 4.7",
    "Dots1ForCausalLM": "dots.llm1",
    "SolarOpenForCausalLM": "Solar Open 100B",
    "ExaoneMoeForCausalLM": "K-EXAONE 236B",
    "MiniMaxM2ForCausalLM": "MiniMax-M2",
    "Ernie4_5_MoeForCausalLM": "ERNIE 4.5 21B-A3B, 300B-A47B",
    "HunYuanMoEV1ForCausalLM": "Hunyuan A13B",
    "HYV3ForCausalLM": "Hy3",
    "AfmoeForCausalLM": "Trinity",
    "GraniteMoeForCausalLM": "Granite 3 1B-A400M, 3B-A800M",
    "GraniteMoeSharedForCausalLM": "Granite MoE with a shared expert",
    "GraniteMoeSWAForCausalLM": "Granite Swash 3B-A600M",
    "LagunaForCausalLM": "Laguna",
    "Qwen3NextForCausalLM": "Qwen3-Next 80B-A3B, Qwen3-Coder-Next",
    "Qwen3_5ForCausalLM": "Qwen 3.5, text only",
    "Qwen3_5MoeForCausalLM": "Qwen 3.5 MoE, text only",
    "Mamba2ForCausalLM": "Mamba 2, Mamba-Codestral 7B",
    "NemotronHForCausalLM": "Nemotron-H, Nemotron Nano 2, Nemotron 3",
    "BambaForCausalLM": "Bamba 9B",
    "GraniteMoeHybridForCausalLM": "Granite 4.0, 4.0-H",
    "Lfm2ForCausalLM": "LFM2 350M to 2.6B",
    "Lfm2MoeForCausalLM": "LFM2 8B-A1B",
    "DeepseekV2ForCausalLM": "DeepSeek V2, V2-Lite, Coder V2",
    "DeepseekV3ForCausalLM": "DeepSeek V3, R1, V3.1, Kimi K2, Moonlight",
    "Glm4MoeLiteForCausalLM": "GLM-4.7-Flash",
    "Mistral4ForCausalLM": "Mistral Small 4, text only",
    "Gemma4ForCausalLM": "Gemma 4, text only",
    "Gemma3ForConditionalGeneration": "Gemma 3 4B, 12B, 27B",
    "Gemma4ForConditionalGeneration": "Gemma 4",
    "Mistral3ForConditionalGeneration": "Mistral Small 3.1 to 4, Ministral 3",
    "Kimi_K25ForConditionalGeneration": "Kimi K2.5, K2.6",
    "LlavaForConditionalGeneration": "LLaVA 1.5",
    "LlavaNextForConditionalGeneration": "LLaVA 1.6",
    "LlavaOnevisionForConditionalGeneration": "LLaVA-OneVision",
    "InternVLForConditionalGeneration": "InternVL 3, 3.5 (-HF)",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3-VL 30B-A3B, 235B-A22B",
    "Qwen3_5ForConditionalGeneration": "Qwen 3.5 9B, 27B",
    "Qwen3_5MoeForConditionalGeneration": "Qwen 3.5 35B-A3B",
    "Idefics3ForConditionalGeneration": "Idefics 3",
    "SmolVLMForConditionalGeneration": "SmolVLM 1 and 2",
}
# The models of an architecture whose limits differ, by parity test.
MODELS_OF_TEST = {
    "gemma4": "E2B, E4B",
    "gemma4-moe": "26B-A4B",
    "gemma4-dense": "31B",
    "nemotron-h": "H, Nano 2",
    "nemotron-3": "3 Nano",
    "nemotron-3-latent": "3 Super",
    "granite-hybrid": "350M, 1B, Micro",
    "granite-hybrid-moe": "Tiny, Small",
}

HEAD = """# Models

`llmkit inspect MODEL` says how a checkpoint runs and why: natively, by the fallback, or not at all.

```text
  model            SmolLM2-135M-Instruct.gguf (gguf)
  architecture     LlamaForCausalLM, 134.5 million parameters
  runs             native: a family of llmkit's own
```

- **Native**: one decoder runs the families of the first table, and everything works with each of
  them: `serve`, `bench`, prefix cache, speculative decoding, and what the table says.
  MTP heads draft (`serve --speculate mtp`) for DeepSeek V3, GLM-4.5 and later, Qwen3-Next,
  Qwen3.5 and Nemotron 3.
- **Multimodal**: the text model of the architectures of the second table is native. Towers and
  projectors do not run. `quantize`, `shard` and `shard merge` carry them byte for byte, so that
  the result is the multimodal model that it was. A request with an image is refused.
- **Fallback**: other models run by the modeling code of transformers, where it allows that.
  `--require-native` refuses them.

`make docs` writes this page from the tables in the code. A parity test compares logits with
transformers on a tiny random model: whole prompts, decoding through the cache, and mixed batches.
The tests of a row are `pytest tests/model/test_model_families.py -k NAME`, and
`pytest tests/model/test_wrappers.py -k NAME` for multimodal models.
"""

NOTES = """The words of the table:

- **quantize** *all*: every [method](quantize.md).
- **shard** lists what `shard` and `serve` split over ranks: tensors (TP), layers (PP), experts
  (EP). The sizes must divide the model; `llmkit inspect` shows those that do. Gemma 4's E2B and E4B
  have fewer stages than layers: a layer that reads keys of an earlier one is in its stage.
- **LoRA** *no experts*: adapters of attention and MLP work, and those of experts are refused.
- **GGUF** is the architecture's name in the [GGUF files](formats.md#gguf) that are read and
  written; *written*: such a file is read as another family's.
- **Tool calls** depend on the chat template, not on the architecture
  ([serve](serve.md#chat-template)). {num_dialects} dialects are parsed: {dialects}.
- **Nemotron-H**: time steps have the limits that the config names, as in NVIDIA's code.
  transformers 5.23 clamps them to `time_step_min` in prompts.
- **The stored format** is another matter: [formats](formats.md) lists those that are read, NVFP4,
  MXFP4 and FP8 among them.
"""

FALLBACK = """## Fallback

A causal language model that is in no table runs by transformers' own modeling code, with paged
attention registered as its attention function and llmkit's linears in place of its `nn.Linear`s.
The conditions: transformers has the class, every layer calls the registered attention
function once, attention is causal (within a window at most), and the past is keys and values.
Remote code is never run.

| | fallback |
|---|---|
| serve, bench | chunked prompts, prefix cache, speculative decoding, 8-bit KV cache |
| quantize | `rtn`, `int8`, `fp8` and `gptq` of its `nn.Linear`s |
| shard, several ranks | `--tp`, if transformers' class has a tp_plan; `llmkit inspect` says so |
| not possible | `--pp`, `--ep`, LoRA, `--cpu-offload`, `awq`, `--effort max`, `--kv`, mixed bits |
| tests | `tests/model/test_transformers_fallback.py`, `tests/shard/test_shard_fallback.py` |

A tp_plan says which linears are split by output features (`colwise`) or by input features
(`rowwise`). The vocabulary is split as in native models, and heads are never cut. A plan with a
style that has no such meaning for a checkpoint tensor is refused, with the names of both.
"""

COVERAGE_HEAD = """## Beside other programs

The architectures that other programs list in their sources, and how llmkit runs them.
`make coverage-models` reads the lists again. The fallback decides about a tiny model of
transformers {version}; its tests compare some of those models with transformers.

| program | list | architectures | native | fallback | not at all |
|---|---|---|---|---|---|
"""


def models_page() -> str:
    """The contents of docs/models.md."""
    return tables_section() + "\n" + coverage_section()


def tables_section() -> str:
    """The page without the comparison, which takes seconds to compute."""
    native = _table(
        ("architecture", "models", "quantize", "shard", "LoRA", "GGUF", "parity tests"),
        [_native_row(names) for names in native_architectures().values()],
    )
    multimodal = _table(
        ("architecture", "models", "text model", "carried", "parity tests"),
        [_wrapper_row(architecture) for architecture in WRAPPERS],
    )
    names = [dialect.name for dialect in DIALECTS]
    notes = NOTES.format(num_dialects=len(names), dialects=", ".join(f"`{n}`" for n in names))
    return "\n".join(
        [
            HEAD,
            f"## Native\n\n{native}\n{notes}",
            f"## Multimodal\n\nThe limits are those of the text model.\n\n{multimodal}",
            FALLBACK,
        ]
    )


def coverage_section() -> str:
    """The comparison with the lists of other programs."""
    lists = peer_lists()
    rows = []
    for peer in lists:
        ways = [coverage(architecture)[0] for architecture in peer.architectures]
        numbers = [len(ways), *(ways.count(way) for way in ("native", "fallback", "no"))]
        rows.append(
            f"| {peer.name} {peer.version} | {peer.source} | {' | '.join(map(str, numbers))} |\n"
        )
    head = COVERAGE_HEAD.format(version=transformers.__version__)
    return head + "".join(rows) + "\n" + _remaining(lists[0])


def native_architectures() -> dict[str, list[str]]:
    """The architectures of native families by model_type. Those in MODEL_NAMES come first."""
    found: dict[str, list[str]] = {}
    for architecture in sorted(SUPPORTED, key=lambda name: name not in MODEL_NAMES):
        found.setdefault(SUPPORTED[architecture][0], []).append(architecture)
    return found


def parity_tests(architecture: str) -> list[str]:
    """The names of the parity tests of an architecture."""
    if architecture in WRAPPERS:
        model_type = WRAPPERS[architecture].model_type
        return [name for name, row in tiny_wrappers.WRAPPERS.items() if row[0] == model_type]
    model_type = SUPPORTED[architecture][0]
    return [name for name, row in FAMILIES.items() if row[0] == model_type]


def spec_of(name: str, architecture: str) -> ModelSpec:
    """The spec of the tiny model of a parity test of a native family."""
    model_type, differences = FAMILIES[name]
    config = transformers.AutoConfig.for_model(model_type, **(COMMON | differences)).to_dict()
    return model_spec(config | {"architectures": [architecture]})


def _native_row(names: Sequence[str]) -> list[str]:
    architecture = names[0]
    tests = parity_tests(architecture)
    specs = {name: spec_of(name, architecture) for name in tests}
    return [
        _code(names),
        MODEL_NAMES[architecture],
        "all",
        _by_limits(specs, _shard_cell),
        _by_limits(specs, _lora_cell),
        ", ".join(_gguf_names(architecture)),
        _code(tests),
    ]


def _gguf_names(architecture: str) -> list[str]:
    rows = list(ARCHITECTURES.items())
    rows += [(name, row) for name, variants in VARIANTS.items() for row in variants.values()]
    read = [name for name, row in rows if row.architecture == architecture]
    model_type = SUPPORTED[architecture][0]
    other = SAME_DECODER.get(model_type)
    written = [f"{name} (written)" for name, row in rows if row.model_type == other]
    return list(dict.fromkeys([*read, *written]))


def _by_limits(specs: dict[str, ModelSpec], cell: Callable[[ModelSpec], str]) -> str:
    """What a cell says of all models of an architecture, or of each where limits differ."""
    found: dict[str, list[str]] = {}
    for name, spec in specs.items():
        found.setdefault(cell(spec), []).append(name)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(
        f"{', '.join(MODELS_OF_TEST[name] for name in names)}: {text}"
        for text, names in found.items()
    )


def _shard_cell(spec: ModelSpec) -> str:
    kinds = ["TP", "PP"]
    if spec.moe is not None:
        kinds.append("EP")
    return ", ".join(kinds)


def _lora_cell(spec: ModelSpec) -> str:
    is_stacked = spec.moe is not None and spec.moe.expert_stack is not None
    return "no experts" if is_stacked else "all linears"


def _wrapper_row(architecture: str) -> list[str]:
    wrapper = WRAPPERS[architecture]
    families = {wrapper.families.get(name, name) for name in wrapper.text_types}
    texts = [names[0] for kind, names in native_architectures().items() if kind in families]
    return [
        f"`{architecture}`",
        MODEL_NAMES[architecture],
        _code(texts),
        _code(wrapper.carried),
        _code(parity_tests(architecture)),
    ]


def _remaining(peer: PeerList) -> str:
    """A program's architectures that are not native, with the reasons."""
    fallback = {
        name: coverage(name)[1] for name in peer.architectures if coverage(name)[0] == "fallback"
    }
    rows = [
        ["fallback, TP", _code([name for name, refusal in fallback.items() if not refusal])],
        ["fallback, one rank", _code([name for name, refusal in fallback.items() if refusal])],
    ]
    rows += [[reason, _code(names)] for reason, names in refusals(peer.architectures).items()]
    table = _table(("why", "architectures"), rows)
    return f"The architectures of {peer.name}'s list that are not native:\n\n{table}"


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return "".join([lines[0], "|" + "---|" * len(head) + "\n", *lines[1:]])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    Path(sys.argv[1]).write_text(models_page())
