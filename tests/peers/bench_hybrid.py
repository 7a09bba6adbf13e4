"""Hybrid models beside transformers' own modeling code and vLLM, and a conversation's second turn.

    python tests/peers/bench_hybrid.py [--work DIR] [--rounds 3] [--threads N]

The models have random weights and about 100 million parameters: a Qwen3.5 (gated delta nets) and a
Granite 4 hybrid (Mamba 2) in bfloat16, and for the second turns a Llama of the same sizes. llmkit
runs in this process as `llmkit serve` would; transformers runs the checkpoint in bfloat16 and,
since that is slow on some processors, in float32: the faster one counts. vLLM's CPU build runs the
Granite, where its environment (`make .venv-vllm/.ready`) exists; its Qwen3.5 needs torchvision,
which has no CPU build. They take turns, in reverse order on odd rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from common import PEERS, ROOT, table
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.part_loader import StartupReport, load_part

VOCABULARY = 16384
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5": (
        "qwen3_5_text",
        {
            "linear_num_value_heads": 12,
            "linear_num_key_heads": 12,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
    ),
    "Granite 4": (
        "granitemoehybrid",
        {
            "layer_types": (["mamba"] * 5 + ["attention"]) * 2,
            "mamba_n_heads": 24,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 2048,
            "position_embedding_type": "nope",
        },
    ),
    "Llama": ("llama", {}),
}
OF_VLLM = ("Granite 4",)
# By name: the number of requests, the tokens of a prompt and of an answer.
SCENARIOS = {
    "decode, 1 request": (1, 16, 48),
    "decode, 8 requests": (8, 16, 48),
    "prefill, 512 tokens": (1, 512, 1),
}


def make_model(name: str, folder: Path) -> Path:
    """A checkpoint with random weights; it is kept for the next run."""
    path = folder / name.replace(" ", "-").lower()
    if not (path / "config.json").exists():
        kind, own = MODELS[name]
        config = transformers.AutoConfig.for_model(kind, **(SIZES | own))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{name}: {millions:.0f} million parameters")
        model.save_pretrained(path)
    return path


def load_engine(path: Path) -> Engine:
    """The checkpoint as `llmkit serve` runs it on a CPU."""
    checkpoint = open_checkpoint(path)
    options = EngineOptions(device="cpu", max_model_len=4096, max_num_seqs=32)
    report = StartupReport()
    part = load_part(checkpoint, checkpoint_spec(checkpoint), options, report)
    return part.make_engine(report, Engine)


def prompts_of(requests: int, tokens: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (requests, tokens), generator=generator).tolist()


def run_engine(engine: Engine, prompts: list[list[int]], output_tokens: int) -> float:
    """The seconds until all answers are complete."""
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    start = time.perf_counter()
    engine.generate(prompts, sampling)
    return time.perf_counter() - start


@torch.inference_mode()
def run_transformers(model: Any, prompts: list[list[int]], output_tokens: int) -> float:
    """The seconds until all answers are complete."""
    start = time.perf_counter()
    model.generate(
        input_ids=torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
        max_new_tokens=output_tokens,
        min_new_tokens=output_tokens,
        do_sample=False,
    )
    return time.perf_counter() - start


class Vllm:
    """The checkpoint in vLLM's CPU build, in a process and an environment of its own."""

    def __init__(self, path: Path) -> None:
        python = ROOT / ".venv-vllm" / "bin" / "python"
        command = [str(python), str(PEERS / "vllm_speed.py"), str(path.resolve())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        while self._line() != "loaded":
            pass

    def run(self, prompts: list[list[int]], output_tokens: int) -> float:
        """The seconds until all answers are complete."""
        assert self._process.stdin is not None
        request = {"prompts": prompts, "output_tokens": output_tokens}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("vllm_speed.py ended")
        return line.strip()


def speeds_of(name: str, path: Path, rounds: int) -> list[list[str]]:
    """The rows of one model."""
    engine = load_engine(path)
    has_vllm = name in OF_VLLM and (ROOT / ".venv-vllm" / ".ready").exists()
    vllm = Vllm(path) if has_vllm else None
    oracles = {
        dtype: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        for dtype in (torch.bfloat16, torch.float32)
    }
    rows = []
    for scenario, (requests, prompt_tokens, output_tokens) in SCENARIOS.items():
        runners = {"llmkit": lambda p, n=output_tokens: run_engine(engine, p, n)}
        for dtype, oracle in oracles.items():
            runners[str(dtype).removeprefix("torch.")] = lambda p, n=output_tokens, oracle=oracle: (
                run_transformers(oracle, p, n)
            )
        if vllm is not None:
            runners["vllm"] = lambda p, n=output_tokens, vllm=vllm: vllm.run(p, n)
        seconds: dict[str, list[float]] = {runner: [] for runner in runners}
        for number in range(-1, rounds):  # the first round warms up
            for runner in list(runners)[:: -1 if number % 2 else 1]:
                # Other prompts each time: llmkit would find the last ones in its prefix cache.
                prompts = prompts_of(requests, prompt_tokens, seed=100 + number)
                spent = runners[runner](prompts)
                if number >= 0:
                    seconds[runner].append(spent)
        tokens = requests * (output_tokens if output_tokens > 1 else prompt_tokens)
        speeds = {runner: tokens / median(spent) for runner, spent in seconds.items()}
        rival = max(("bfloat16", "float32"), key=lambda dtype: speeds[dtype])

        def times(of: str, seconds: dict[str, list[float]] = seconds) -> str:
            pairs = zip(seconds["llmkit"], seconds[of], strict=True)
            return f"{median(theirs / ours for ours, theirs in pairs):.1f}"

        cells = [f"{speeds['llmkit']:.1f}", f"{speeds[rival]:.1f} ({rival})", times(rival)]
        cells += [f"{speeds['vllm']:.1f}", times("vllm")] if vllm is not None else ["", ""]
        rows.append([name, scenario, *cells])
    if vllm is not None:
        vllm.close()
    return rows


def second_turns(name: str, path: Path, rounds: int) -> list[str]:
    """A row: the milliseconds to the first token of a conversation's first and second turn."""
    engine = load_engine(path)
    firsts = []
    seconds = []
    cached_shares = []
    for number in range(-1, rounds):
        (history,) = prompts_of(1, 1024, seed=number + 500)
        first = run_engine(engine, [history], 1)
        sampling = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
        history += engine.generate([history], sampling)[0]
        history += prompts_of(1, 24, seed=number + 900)[0]
        queries, hits = engine.scheduler.num_prefix_queries, engine.scheduler.num_prefix_hits
        second = run_engine(engine, [history], 1)
        if number >= 0:
            firsts.append(first)
            seconds.append(second)
            possible = (len(history) - 1) // 16 * 16
            cached_shares.append((engine.scheduler.num_prefix_hits - hits) / possible)
        assert engine.scheduler.num_prefix_queries > queries
    return [
        name,
        f"{1e3 * median(firsts):.0f}",
        f"{1e3 * median(seconds):.0f}",
        f"{median(firsts) / median(seconds):.1f}",
        f"{100 * median(cached_shares):.0f} %",
    ]


def main() -> None:
    """Measure, and print both tables: medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".bench-hybrid"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    arguments.work.mkdir(parents=True, exist_ok=True)
    paths = {name: make_model(name, arguments.work) for name in MODELS}
    rows = []
    for name in ("Qwen3.5", "Granite 4"):
        rows += speeds_of(name, paths[name], arguments.rounds)
    header = ["model", "scenario", "llmkit, tokens/s", "transformers, tokens/s", "times"]
    header += ["vLLM bf16, tokens/s", "times"]
    print(table(header, rows))
    turns = [second_turns(name, path, arguments.rounds) for name, path in paths.items()]
    header = ["model", "first turn, ms", "second turn, ms", "times", "of the possible blocks"]
    print(table(header, turns))


if __name__ == "__main__":
    main()
