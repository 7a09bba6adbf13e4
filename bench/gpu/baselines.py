"""Throughput of llmkit beside other engines (the baselines): the part `rivals` of `make gpu`.

Every engine serves random weights in a real shape and gets the same requests, all at once, each
with its own defaults, in its own process, and after a warm-up run. For few requests, transformers
runs with a static cache and `torch.compile(mode="reduce-overhead")`; for many, its continuous
batching. vLLM is measured where it is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmkit.bench.gpu.decode_steps import new_engine
from llmkit.bench.gpu.figure_log import FigureLog, NotInstalledError, PartOptions, is_installed
from llmkit.bench.gpu.model_shapes import (
    MODEL_CONFIGS,
    WEIGHT_SCHEMES,
    random_model,
    tiny_config,
)
from llmkit.model.families import model_spec
from llmkit.runtime.engine.sampling_params import SamplingParams

Prompts = list[list[int]]
# What a config.json says of weights: the formats of WEIGHT_SCHEMES.
QUANTIZATION_CONFIGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 8,
                        "type": "float",
                        "strategy": "channel",
                        "symmetric": True,
                        "dynamic": False,
                    },
                    "input_activations": {
                        "num_bits": 8,
                        "type": "float",
                        "strategy": "token",
                        "symmetric": True,
                        "dynamic": True,
                    },
                }
            },
        }
    },
    "int4": {
        "quantization_config": {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        }
    },
}
# The names of transformers' block size option: since 5.18, and before.
BLOCK_SIZE_OPTIONS = ("page_size", "block_size")


@dataclass(frozen=True)
class Workload:
    """A model of random weights, and requests of one length."""

    config: dict[str, Any]  # config.json
    device: str
    requests: int
    prompt: int  # tokens of each prompt
    output: int  # tokens of each answer, sampled greedily, with no early end
    weights: str = "bf16"  # a key of WEIGHT_SCHEMES
    # Numbers of requests, up to `requests`, that the same engine runs one after the other; none:
    # `requests`.
    counts: tuple[int, ...] = ()

    def prompts(self, seed: int, count: int | None = None) -> Prompts:
        """Random token ids. Another seed gives other prompts, so that no prefix cache helps.

        count: of prompts; None: `requests`.
        """
        generator = torch.Generator().manual_seed(seed)
        number = self.requests if count is None else count
        return torch.randint(
            0, self.config["vocab_size"], (number, self.prompt), generator=generator
        ).tolist()


def llmkit(work: Workload) -> Callable[[Prompts], int]:
    """Makes the engine. Returns a function that runs prompts and returns the number of tokens."""
    device = torch.device(work.device)
    max_model_len = work.prompt + work.output
    scheme = WEIGHT_SCHEMES[work.weights]
    model = random_model(model_spec(work.config), torch.bfloat16, device, scheme)
    engine = new_engine(model, max_model_len, work.requests)
    sampling = SamplingParams(temperature=0.0, max_tokens=work.output, ignore_eos=True)
    return lambda prompts: sum(map(len, engine.generate(prompts, sampling)))


def _transformers_model(work: Workload) -> Any:
    # Imported only in the subprocess that measures it.
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**work.config)
    load: Any = AutoModelForCausalLM.from_config
    with torch.device(work.device):
        return load(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def transformers_static(work: Workload) -> Callable[[Prompts], int]:
    """See `llmkit`. `generate` with a static cache and a compiled decode step."""
    # Imported only in the subprocess that measures it.
    from transformers import CompileConfig, GenerationConfig

    model = _transformers_model(work)
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=work.output,
        min_new_tokens=work.output,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="static",
        compile_config=CompileConfig(mode="reduce-overhead"),
    )

    def run(prompts: Prompts) -> int:
        ids = torch.tensor(prompts, device=work.device)
        output = model.generate(ids, generation, attention_mask=torch.ones_like(ids))
        return int((output.shape[1] - ids.shape[1]) * len(ids))

    return run


def transformers(work: Workload) -> Callable[[Prompts], int]:
    """See `llmkit`. It uses `generate_batch`, with SDPA or an installed flash attention."""
    # Imported only in the subprocess that measures it.
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _transformers_model(work)
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=work.output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    settings = None
    if work.device == "cpu":  # the default would fill the memory
        blocks = work.requests * (1 + -(-(work.prompt + work.output) // 256))
        size_option = next(
            name for name in BLOCK_SIZE_OPTIONS if hasattr(ContinuousBatchingConfig, name)
        )
        size: dict[str, Any] = {size_option: 256}
        settings = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=512, **size)

    def run(prompts: Prompts) -> int:
        outputs = model.generate_batch(prompts, generation, settings, persistent_manager=True)
        return sum(len(output.generated_tokens) for output in outputs.values())

    return run


def vllm(work: Workload) -> Callable[[Prompts], int]:
    """See `llmkit`."""
    # Imported only in the subprocess that measures it; vLLM is optional.
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(
        json.dumps(work.config | {"torch_dtype": "bfloat16"} | QUANTIZATION_CONFIGS[work.weights]),
        encoding="utf-8",
    )
    engine = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_num_seqs=work.requests,
        max_model_len=work.prompt + work.output,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=work.output, ignore_eos=True, detokenize=False
    )

    def run(prompts: Prompts) -> int:
        outputs = engine.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


ENGINES: dict[str, Callable[[Workload], Callable[[Prompts], int]]] = {
    "llmkit": llmkit,
    "transformers_static": transformers_static,
    "transformers": transformers,
    "vllm": vllm,
}
# The module that an engine needs.
MODULES = {"transformers_static": "transformers", "transformers": "transformers", "vllm": "vllm"}
# Engines that are measured for each number of requests.
ENGINES_FOR = {
    1: ("llmkit", "transformers_static", "vllm"),
    16: ("llmkit", "transformers_static", "vllm"),
    64: ("llmkit", "transformers", "vllm"),
    256: ("llmkit", "vllm"),
}
MODELS = ("Qwen3-0.6B", "Llama-3.1-8B")
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 256
ENGINE_S = 60.0  # a guess of the time of one engine
MAX_ENGINE_S = 150.0  # one that takes longer is given up


def measure(log: FigureLog, options: PartOptions) -> None:
    """Measure every engine with every number of requests."""
    prompt = 5 if options.is_tiny else PROMPT_TOKENS
    output = 4 if options.is_tiny else OUTPUT_TOKENS
    for model in MODELS[:1] if options.is_tiny else MODELS:
        config = tiny_config(MODEL_CONFIGS[model]) if options.is_tiny else MODEL_CONFIGS[model]
        for requests, engines in ENGINES_FOR.items():
            if options.is_tiny and requests > 1:
                continue
            work = Workload(config, options.device.type, requests, prompt, output)
            for engine in engines:
                name = f"{model}, {requests} requests; {engine}"
                run = partial(_measure_engine, log, model, engine, work)
                log.measure("throughput", name, run, needs_s=1 if options.is_tiny else ENGINE_S)


def _measure_engine(log: FigureLog, model: str, engine: str, work: Workload) -> dict[str, Any]:
    found = measure_in_subprocess(engine, work, min(MAX_ENGINE_S, max(log.time_left_s, 1.0)))
    return {"model": model, "engine": engine, "requests": work.requests, **found}


def measure_engine(engine: str, work: Workload) -> dict[str, Any]:
    """Output tokens per second of an engine in this process, and the seconds until it was warm.

    With several numbers of requests, `output_tps_N` is the rate of N requests.
    """
    start_s = time.perf_counter()
    run = ENGINES[engine](work)
    run(work.prompts(seed=1))
    found = {"warm_after_s": time.perf_counter() - start_s}
    for count in work.counts or (work.requests,):
        if count < work.requests:
            run(work.prompts(1, count)[::-1])  # its own graphs and kernels
        start_s = time.perf_counter()
        tokens = run(work.prompts(2 + count, count))
        seconds = time.perf_counter() - start_s
        if tokens != count * work.output:
            raise RuntimeError(f"{engine} gave {tokens} tokens and not {count} x {work.output}")
        found[f"output_tps_{count}" if work.counts else "output_tps"] = tokens / seconds
    return found


def measure_in_subprocess(engine: str, work: Workload, timeout_s: float) -> dict[str, Any]:
    """Run `measure_engine` in a subprocess.

    Raises NotInstalledError, and RuntimeError with the last line of its messages.
    """
    module = MODULES.get(engine)
    if module is not None and not is_installed(module):
        raise NotInstalledError(f"{module} is not installed")
    command = [sys.executable, "-m", "llmkit.bench.gpu.baselines", engine, json.dumps(asdict(work))]
    try:
        process = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took more than {timeout_s:.0f} s") from None
    if process.returncode:
        sys.stderr.write(process.stderr[-4000:])
        raise RuntimeError((process.stderr.strip().splitlines() or ["no error message"])[-1])
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure one engine in this process: JSON on stdout."""
    parser = argparse.ArgumentParser(
        prog="python -m llmkit.bench.gpu.baselines", description=main.__doc__
    )
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("workload", help="the fields of Workload, as JSON")
    arguments = parser.parse_args()
    work = Workload(**json.loads(arguments.workload))
    sys.stdout.write(json.dumps(measure_engine(arguments.engine, work)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
