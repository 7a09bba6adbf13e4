"""Other engines beside this one on the same device: random weights in real shapes, the same requests, all at once.

`make gpu` runs it as `python -m llmkit.bench.rivals`. transformers' continuous batching is always measured, vLLM where
it is installed, each with what it chooses itself, in a process of its own and after a run that warms it.
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

from llmkit.bench.steps import BLOCK, SHAPES, random_model
from llmkit.model.families import model_spec
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import EngineConfig, SamplingParams

Prompts = list[list[int]]
SIZES = ("page_size", "block_size")  # tokens of a block, as transformers calls them now and did before 5.18


@dataclass(frozen=True)
class Workload:
    """A model of random weights in bfloat16, and requests of one length."""

    config: dict[str, Any]  # config.json
    device: str
    requests: int
    prompt: int  # tokens
    output: int  # tokens, greedily chosen, never ended early

    def prompts(self, seed: int) -> Prompts:
        """Token ids, others for every seed, so that nothing is found in a prefix cache."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.config["vocab_size"], (self.requests, self.prompt), generator=generator).tolist()


def llmkit(work: Workload) -> Callable[[Prompts], int]:
    """Each engine: makes it, and returns what answers all prompts and says how many tokens that were."""
    device, longest = torch.device(work.device), work.prompt + work.output
    model = random_model(model_spec(work.config), torch.bfloat16, device)
    config = EngineConfig(
        longest, work.requests * -(-longest // BLOCK), device, model.dtype, max_num_seqs=work.requests,
        block_size=BLOCK, prefix_cache=False, ahead=device.type == "cuda",
    )  # fmt: skip
    engine = Engine(model, config)
    sampling = SamplingParams(temperature=0.0, max_tokens=work.output, ignore_eos=True)
    return lambda prompts: sum(map(len, engine.generate(prompts, sampling)))


def transformers(work: Workload) -> Callable[[Prompts], int]:
    """See `llmkit`: `generate_batch`, with SDPA or the flash attention that it finds."""
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    config = AutoConfig.for_model(**work.config)
    load: Any = AutoModelForCausalLM.from_config
    with torch.device(work.device):
        model = load(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=work.output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    settings = None
    if work.device == "cpu":  # whose memory it would fill
        blocks = work.requests * (1 + -(-(work.prompt + work.output) // 256))
        size: dict[str, Any] = {next(name for name in SIZES if hasattr(ContinuousBatchingConfig, name)): 256}
        settings = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=512, **size)

    def run(prompts: Prompts) -> int:
        answers = model.generate_batch(prompts, generation, settings, persistent_manager=True)
        return sum(len(answer.generated_tokens) for answer in answers.values())

    return run


def vllm(work: Workload) -> Callable[[Prompts], int]:
    """See `llmkit`."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(work.config | {"torch_dtype": "bfloat16"}), encoding="utf-8")
    engine = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_num_seqs=work.requests,
        max_model_len=work.prompt + work.output, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=work.output, ignore_eos=True, detokenize=False)

    def run(prompts: Prompts) -> int:
        answers = engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    return run


ENGINES: dict[str, Callable[[Workload], Callable[[Prompts], int]]] = {
    "llmkit": llmkit,
    "transformers": transformers,
    "vllm": vllm,
}


def measure(engine: str, work: Workload) -> dict[str, Any]:
    """Output tokens a second of an engine in this process, and the seconds until it was ready."""
    began = time.perf_counter()
    run = ENGINES[engine](work)
    run(work.prompts(seed=1))
    ready, began = time.perf_counter() - began, time.perf_counter()
    tokens = run(work.prompts(seed=2))
    seconds = time.perf_counter() - began
    if tokens != work.requests * work.output:
        raise RuntimeError(f"{engine} gave {tokens} tokens and not {work.requests} x {work.output}")
    return {"output_tps": tokens / seconds, "warm_after_s": ready}


def measure_apart(engine: str, work: Workload, timeout_s: float) -> dict[str, Any]:
    """The same in a process of its own; what went wrong instead, where it did."""
    if importlib.util.find_spec(engine) is None and engine != "llmkit":
        return {"skipped": "it is not installed"}
    command = [sys.executable, "-m", "llmkit.bench.rivals", "--one", engine, json.dumps(asdict(work))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)  # noqa: S603
    except subprocess.TimeoutExpired:
        return {"failed": f"it took more than {timeout_s:.0f} s"}
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        return {"failed": (done.stderr.strip().splitlines() or ["without a word"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure the engines one after the other; a table on stderr, JSON on stdout."""
    parser = argparse.ArgumentParser(prog="python -m llmkit.bench.rivals", description=main.__doc__)
    models = ["Qwen3-0.6B", "Llama-3.1-8B"]
    parser.add_argument("--models", nargs="+", default=models, choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--requests", nargs="+", type=int, default=[64], metavar="N", help="at once; default: 64")
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--output", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument("--layers", type=int, help="only so many, for a try on a CPU (default: all)")
    parser.add_argument("--timeout", type=float, default=90, help="seconds for each engine and workload (default: 90)")
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
            work = Workload(SHAPES[name] | layers, arguments.device, requests, arguments.prompt, arguments.output)
            for engine in ENGINES:
                found = measure_apart(engine, work, arguments.timeout)
                rows.append({"model": name, "engine": engine, "requests": requests} | found)
                figure = f"{found['output_tps']:10.0f} tokens/s" if "output_tps" in found else "; ".join(found.values())
                sys.stderr.write(f"{name:14} {requests:4} requests  {engine:12} {figure}\n")
    figures = {"prompt_tokens": arguments.prompt, "output_tokens": arguments.output, "rows": rows}
    sys.stdout.write(json.dumps({"torch": torch.__version__} | figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
