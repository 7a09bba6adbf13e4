"""Throughput of llmkit beside other engines (the baselines) on the same device.

Every engine serves random weights in a real shape and gets the same requests, all at once.
transformers' continuous batching is always measured, vLLM where it is installed, each with its own
defaults, in its own process, and after a warm-up run. `make gpu` runs it as
`python -m llmkit.bench.gpu.baselines`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.bench.gpu.decode_steps import BLOCK_SIZE, MODEL_CONFIGS, random_model
from llmkit.model.families import model_spec
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.sampling_params import SamplingParams

Prompts = list[list[int]]
# The names of transformers' block size option: since 5.18, and before.
BLOCK_SIZE_OPTIONS = ("page_size", "block_size")


@dataclass(frozen=True)
class Workload:
    """A model of random weights in bfloat16, and requests of one length."""

    config: dict[str, Any]  # config.json
    device: str
    requests: int
    prompt: int  # tokens of each prompt
    output: int  # tokens of each answer, sampled greedily, with no early end

    def prompts(self, seed: int) -> Prompts:
        """Random token ids. Another seed gives other prompts, so that no prefix cache helps."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(
            0, self.config["vocab_size"], (self.requests, self.prompt), generator=generator
        ).tolist()


def llmkit(work: Workload) -> Callable[[Prompts], int]:
    """Makes the engine. Returns a function that runs prompts and returns the number of tokens."""
    device = torch.device(work.device)
    max_model_len = work.prompt + work.output
    model = random_model(model_spec(work.config), torch.bfloat16, device)
    config = EngineConfig(
        max_model_len,
        work.requests * -(-max_model_len // BLOCK_SIZE),
        device,
        model.dtype,
        max_num_seqs=work.requests,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        async_scheduling=device.type == "cuda",
    )
    engine = Engine(model, config)
    sampling = SamplingParams(temperature=0.0, max_tokens=work.output, ignore_eos=True)
    return lambda prompts: sum(map(len, engine.generate(prompts, sampling)))


def transformers(work: Workload) -> Callable[[Prompts], int]:
    """See `llmkit`. It uses `generate_batch`, with SDPA or an installed flash attention."""
    # Imported only in the subprocess that measures it.
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    config = AutoConfig.for_model(**work.config)
    load: Any = AutoModelForCausalLM.from_config
    with torch.device(work.device):
        model = load(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
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
        json.dumps(work.config | {"torch_dtype": "bfloat16"}), encoding="utf-8"
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
    "transformers": transformers,
    "vllm": vllm,
}


def measure(engine: str, work: Workload) -> dict[str, Any]:
    """Output tokens per second of an engine in this process, and the seconds until it was warm."""
    start_s = time.perf_counter()
    run = ENGINES[engine](work)
    run(work.prompts(seed=1))
    warm_after_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    tokens = run(work.prompts(seed=2))
    seconds = time.perf_counter() - start_s
    if tokens != work.requests * work.output:
        raise RuntimeError(f"{engine} gave {tokens} tokens and not {work.requests} x {work.output}")
    return {"output_tps": tokens / seconds, "warm_after_s": warm_after_s}


def measure_in_subprocess(engine: str, work: Workload, timeout_s: float) -> dict[str, Any]:
    """Run `measure` in a subprocess. Returns its result, or "skipped" or "failed" with a reason."""
    if importlib.util.find_spec(engine) is None and engine != "llmkit":
        return {"skipped": "it is not installed"}
    module = [sys.executable, "-m", "llmkit.bench.gpu.baselines"]
    command = [*module, "--one", engine, json.dumps(asdict(work))]
    try:
        process = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"it took more than {timeout_s:.0f} s"}
    if process.returncode:
        sys.stderr.write(process.stderr[-4000:])
        return {"failed": (process.stderr.strip().splitlines() or ["no error message"])[-1]}
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure the engines one after the other: a table on stderr, JSON on stdout."""
    parser = argparse.ArgumentParser(
        prog="python -m llmkit.bench.gpu.baselines", description=main.__doc__
    )
    models = ["Qwen3-0.6B", "Llama-3.1-8B"]
    parser.add_argument(
        "--models", nargs="+", default=models, choices=list(MODEL_CONFIGS), metavar="NAME"
    )
    parser.add_argument(
        "--requests", nargs="+", type=int, default=[64], metavar="N", help="at once; default: 64"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--output", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument(
        "--layers", type=int, help="number of layers, to try it on a CPU (default: all)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=90,
        help="seconds for each engine and workload (default: 90)",
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "WORKLOAD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        engine, work = arguments.one
        sys.stdout.write(json.dumps(measure(engine, Workload(**json.loads(work)))) + "\n")
        return 0
    rows = []
    for name in arguments.models:
        layers = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
        for requests in arguments.requests:
            work = Workload(
                MODEL_CONFIGS[name] | layers,
                arguments.device,
                requests,
                arguments.prompt,
                arguments.output,
            )
            for engine in ENGINES:
                found = measure_in_subprocess(engine, work, arguments.timeout)
                rows.append({"model": name, "engine": engine, "requests": requests} | found)
                if "output_tps" in found:
                    figure = f"{found['output_tps']:10.0f} tokens/s"
                else:
                    figure = "; ".join(found.values())
                sys.stderr.write(f"{name:14} {requests:4} requests  {engine:12} {figure}\n")
    figures = {"prompt_tokens": arguments.prompt, "output_tokens": arguments.output, "rows": rows}
    sys.stdout.write(json.dumps({"torch": torch.__version__} | figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
