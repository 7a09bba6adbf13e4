"""`make bench-serve`: llmkit's server beside vLLM and llama.cpp on this CPU, SmolLM2-135M-Instruct, the same requests.

All servers are up at once and are measured in turn, in reverse order on odd rounds, because shared machines drift
within minutes. Those whose turn it is not are stopped (SIGSTOP), so that threads that spin while idle cost nobody.

    python tests/peers/bench_serve.py [--servers SERVER ...] [--only REGEX] [--rounds 3] [--scenarios NAME ...]
        [--limit N] [--work DIR] [--llamacpp DIR]

A SERVER is `llmkit=fp32|int8|w8a8|int4|DIR`, `vllm=fp32|bf16|DIR` or `llamacpp=f32|q8_0|q4_0`; what follows it after a
blank goes to the server's command, as in "llamacpp=q4_0 --kv-unified". README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from common import ROOT, llmkit, peer_python, real_model, table

from llmkit.bench.environment import describe_environment
from llmkit.bench.load import find_server
from llmkit.bench.memory import memory_bytes
from llmkit.bench.metrics import medians, require_complete, summarize
from llmkit.bench.targets import ServedTarget
from llmkit.bench.workload import SCENARIOS, WARMUP, Lengths, WorkloadRequest, builtin_text
from llmkit.checkpoint.errors import LlmkitError
from llmkit.checkpoint.source import open_checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer

SERVERS = ("llmkit=fp32", "llmkit=w8a8", "llmkit=int4", "vllm=fp32", "llamacpp=f32", "llamacpp=q4_0")
SHOWN = ("single", "batch", "online", "prefix")
SEED = 20260721
MIB = 1 << 20
CORES = sorted(os.sched_getaffinity(0))
NAME = "smollm2"
SEQUENCES, CONTEXT = 64, 2048  # of vLLM
SLOTS, SLOT_TOKENS = 32, 1024  # of llama.cpp
# Options of `llmkit quantize`; speed does not depend on how well the codes were chosen. llama.cpp's files, too, have
# an output projection of 8 bits.
QUANTIZED = {
    "int8": ("--method", "int8", "--lm-head", "8"),
    "w8a8": ("--method", "int8", "--activations", "--samples", "8", "--seq-len", "512", "--lm-head", "8"),
    "int4": ("--method", "rtn", "--lm-head", "8"),
}
# What is compared, by title: the scenario, the figure, and whether it is its inverse that the title names.
COMPARED = {
    "single, output tokens/s": ("single", "output_tps", False),
    "single, decode tokens/s": ("single", "tpot_mean_ms", True),
    "batch, output tokens/s": ("batch", "output_tps", False),
    "online, output tokens/s": ("online", "output_tps", False),
    "online, TTFT p99": ("online", "ttft_p99_ms", False),
    "prefix, output tokens/s": ("prefix", "output_tps", False),
}
Round = dict[str, tuple[WorkloadRequest, ...]]


class PeerServer(ServedTarget):
    """A server of whatever program, which can be put to sleep. `{port}` in its command stands for the port."""

    def __init__(self, name: str, command: Sequence[object], settings: dict[str, str], log: Path) -> None:
        """settings: environment variables of its own; what it says goes to the file `log`."""
        super().__init__(name, NAME, SLOT_TOKENS)
        self.words, self.settings = [str(word) for word in command], settings
        self._log.close()
        self._log = log.open("w+b")

    def command(self, port: int) -> list[str]:
        """See `ServedTarget.command`."""
        return [word.replace("{port}", str(port)) for word in self.words]

    def environment(self) -> dict[str, str]:
        """Every server chooses its threads itself."""
        inherited = {k: v for k, v in super().environment().items() if not k.startswith(("OMP_", "MKL_", "KMP_"))}
        return inherited | {"HF_HUB_OFFLINE": "1"} | self.settings

    @property
    def peak_bytes(self) -> int:
        """The most memory that was seen so far, between runs."""
        return self._peak_bytes

    def memory_bytes(self) -> int:
        """What it has now."""
        return memory_bytes(self._process.pid) if self._process else 0

    def pause(self) -> None:
        """Stop every process of the server."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run, and return when it answers. Raises ShortageError when it does not."""
        assert self.server
        self._signal(signal.SIGCONT)
        find_server(self.server.url)

    def stop(self) -> dict[str, float]:
        """See `ServedTarget.stop`."""
        self._signal(signal.SIGCONT)
        return super().stop()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)  # it leads a session of its own


def make_server(name: str, arguments: argparse.Namespace) -> PeerServer:
    """The server that a word of `--servers` describes; its model is made first where it is missing."""
    what, *options = shlex.split(name)
    program, _, kind = what.partition("=")
    maker = {"llmkit": llmkit_server, "vllm": vllm_server, "llamacpp": llamacpp_server}.get(program)
    if maker is None or not kind:
        raise SystemExit(f"{name}: llmkit=, vllm= or llamacpp= and a kind was expected")
    command, settings = maker(kind, arguments)
    log = arguments.work / f"{re.sub(r'[^a-z0-9_]+', '-', name.lower()).strip('-')}.log"
    return PeerServer(name, [*command, *options], settings, log)


def llmkit_server(kind: str, arguments: argparse.Namespace) -> tuple[list[object], dict[str, str]]:
    """`llmkit serve` of the source or of a checkpoint quantized from it."""
    model = real_model(arguments.work)
    if kind in QUANTIZED:
        source, model = model, arguments.work / f"llmkit-{kind}"
        if not model.exists():
            llmkit("quantize", source, *QUANTIZED[kind], "--no-eval", "--quiet", "--output", model)
    elif kind != "fp32":
        model = folder(kind)
    command = [sys.executable, "-m", "llmkit.cli.main", "serve", model, "--served-model-name", NAME]
    return [*command, "--host", "127.0.0.1", "--port", "{port}"], {}


def vllm_server(kind: str, arguments: argparse.Namespace) -> tuple[list[object], dict[str, str]]:
    """`vllm serve`, compiled as is its default, bound to all cores, with the libraries that it asks for."""
    python = peer_python("vllm")
    dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(kind)
    model = real_model(arguments.work) if dtype else folder(kind)
    preloaded = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), python.parents[1] / "lib" / "libiomp5.so"]
    settings = {
        "LD_PRELOAD": ":".join(map(str, preloaded)),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, CORES)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    command = [python.parent / "vllm", "serve", model, "--served-model-name", NAME, "--dtype", dtype or "float32"]
    limits = ["--max-model-len", CONTEXT, "--max-num-seqs", SEQUENCES]
    return [*command, *limits, "--host", "127.0.0.1", "--port", "{port}"], settings


def llamacpp_server(kind: str, arguments: argparse.Namespace) -> tuple[list[object], dict[str, str]]:
    """`llama-server` with a slot for every client. Its cache is per slot unless --kv-unified is given."""
    programs = arguments.llamacpp / "build" / "bin"
    if not (programs / "llama-server").exists():
        raise SystemExit(f"{programs / 'llama-server'} is missing; make {arguments.llamacpp}/.ready makes it")
    model = gguf(kind, arguments)
    threads = ["--threads", len(CORES), "--parallel", SLOTS, "--ctx-size", SLOTS * SLOT_TOKENS, "--no-kv-unified"]
    listen = ["--host", "127.0.0.1", "--port", "{port}", "--no-webui"]
    return [programs / "llama-server", "--model", model, "--alias", NAME, *threads, *listen], {}


def gguf(kind: str, arguments: argparse.Namespace) -> Path:
    """The model as llama.cpp's own tools write it: f32 from the checkpoint, any other type from that."""
    out = arguments.work / f"{kind}.gguf"
    if out.exists():
        return out
    partial = out.with_suffix(".partial")
    if kind == "f32":  # vLLM's environment has what the script imports
        script = arguments.llamacpp / "src" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
        command = [peer_python("vllm"), script, real_model(arguments.work), "--outtype", "f32", "--outfile", partial]
    else:
        command = [arguments.llamacpp / "build" / "bin" / "llama-quantize", gguf("f32", arguments), partial, kind]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind}.gguf could not be made:\n{done.stderr[-3000:]}")
    return partial.rename(out)


def folder(kind: str) -> Path:
    """A checkpoint directory that the user names."""
    if not Path(kind).is_dir():
        raise SystemExit(f"{kind} is neither a known kind nor a directory")
    return Path(kind).resolve()


def make_round(tokenizer: Tokenizer, stream: list[int], number: int) -> Round:
    """The requests of a round, cut from the tokens `stream` of a text.

    Rounds have the same lengths and other text, so that no prefix cache answers a repetition.
    """
    random = Random(SEED + 1000 * (number + 1))

    def cut(length: int, head: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Tokens of the text after `head`, such that their own text has these tokens: it is a prompt as well."""
        while True:
            start = random.randrange(len(stream) - length)
            ids = [*head, *stream[start : start + length]]
            text = tokenizer.decode(ids, skip_special_tokens=False)
            if tokenizer.encode(text, add_special_tokens=False) == ids:
                return tuple(ids)

    def requests(name: str, lengths: Lengths, head: tuple[int, ...] = ()) -> tuple[WorkloadRequest, ...]:
        return tuple(
            WorkloadRequest(f"{name}-{number}-{index}", cut(prompt, head), output)
            for index, (prompt, output) in enumerate(lengths)
        )

    mixed = SCENARIOS["online"].lengths(Random(SEED))
    online, common = requests("online", mixed), cut(512)
    return {
        "warmup": requests("warmup", [(64, 16)] * 4),
        "single": requests("single", [(128, 128)] * 4),
        "batch": requests("batch", mixed[:32]),
        "online": online,
        "prefix": requests("prefix", [(32, 32)] * 32, common),
    }


def start(server: PeerServer, warmup: Sequence[WorkloadRequest]) -> dict[str, Any]:
    """Start a server, warm it up and put it to sleep: seconds until its first health, memory at that moment."""
    facts: dict[str, Any] = {"command": shlex.join(server.words), "settings": server.settings}
    facts |= server.start() | {"ready_bytes": server.memory_bytes(), "peak_bytes": server.peak_bytes}
    print(f"{server.name}: ready in {facts['ready_s']:.1f} s, {facts['ready_bytes'] / MIB:.0f} MiB", flush=True)
    timelines = server.run(warmup, WARMUP.clients).timelines
    require_complete(timelines, server.name, WARMUP.name)
    server.pause()
    return facts


def measure(server: PeerServer, scenario: str, requests: Sequence[WorkloadRequest]) -> dict[str, Any]:
    """The figures of one run, or `error` when a request failed."""
    try:
        server.resume()
        run = server.run(requests, SCENARIOS[scenario].clients)
        require_complete(run.timelines, server.name, scenario)
        return summarize(run.timelines, run.wall_s)
    except LlmkitError as error:
        return {"error": str(error)}
    finally:
        server.pause()


def figures_of(runs: Sequence[dict[str, Any]], server: str, scenario: str) -> dict[int, dict[str, float]]:
    """The figures of a server's complete runs of a scenario, by round."""
    return {
        run["round"]: {name: value for name, value in run.items() if not isinstance(value, str)}
        for run in runs
        if (run["server"], run["scenario"]) == (server, scenario) and "error" not in run
    }


def report(results: dict[str, Any]) -> str:
    """Three tables: servers, medians over the rounds, and each server of llmkit against each rival."""
    servers, runs = results["servers"], results["runs"]
    facts = [
        [name, f"{one['ready_s']:.1f}", f"{one['ready_bytes'] / MIB:.0f}", f"{one['peak_bytes'] / MIB:.0f}"]
        for name, one in servers.items()
    ]
    rows, ratios = [], []
    for scenario, name in product(SHOWN, servers):
        if rounds := figures_of(runs, name, scenario):
            one = medians(list(rounds.values()))
            shown = (one["output_tps"], one["ttft_mean_ms"], one["ttft_p99_ms"], one.get("tpot_mean_ms", 0.0))
            rows.append([scenario, name, *(f"{value:.1f}" for value in shown), f"{one['cached_tokens']:.0f}"])
    rivals = [name for name in servers if not name.startswith("llmkit=")]
    for name, (title, (scenario, figure, inverse)) in product(servers, COMPARED.items()):
        ours, cells = figures_of(runs, name, scenario), []
        if name in rivals or not ours:
            continue
        for rival in rivals:
            theirs = figures_of(runs, rival, scenario)
            pairs = [(ours[number][figure], theirs[number][figure]) for number in ours if number in theirs]
            found = [b / a if inverse else a / b for a, b in pairs]
            cells.append(f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else "")
        ratios.append([name, title, *cells])
    return "\n\n".join(
        (
            table(("server", "ready, s", "memory when ready, MiB", "peak, MiB"), facts),
            table(("", "", "output tokens/s", "TTFT mean, ms", "TTFT p99, ms", "TPOT, ms", "cached tokens"), rows),
            table(("", "times that of", *rivals), ratios),
        )
    )


def main() -> int:
    """Command line; 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", nargs="+", default=SERVERS, metavar="SERVER")
    parser.add_argument("--only", default="", help="a regular expression: what to run, as 'vllm=fp32: single'")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions with other text (default 3)")
    parser.add_argument("--scenarios", nargs="+", choices=SHOWN, default=SHOWN)
    parser.add_argument("--limit", type=int, help="only the first so many requests of each scenario")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench-serve", help="folder for models, logs and results")
    parser.add_argument("--llamacpp", type=Path, default=ROOT / ".llamacpp", help="folder of its sources and build")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    wanted = [
        name
        for name in arguments.servers
        if any(re.search(arguments.only, f"{name}: {s}") for s in arguments.scenarios)
    ]
    tokenizer = load_tokenizer(open_checkpoint(real_model(arguments.work)))
    stream = tokenizer.encode(builtin_text(), add_special_tokens=False)
    rounds = [make_round(tokenizer, stream, number) for number in range(arguments.rounds)]
    results: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "environment": describe_environment("cpu", torch.float32),
        "servers": {},
        "runs": [],
    }
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that servers are stopped
    with ExitStack() as stack:
        servers = [make_server(name, arguments) for name in wanted]
        for server in servers:
            stack.callback(server.stop)
            results["servers"][server.name] = start(server, rounds[0]["warmup"])
        for number, scenario in product(range(arguments.rounds), arguments.scenarios):
            for server in servers if number % 2 == 0 else servers[::-1]:
                if not re.search(arguments.only, f"{server.name}: {scenario}"):
                    continue
                figures = measure(server, scenario, rounds[number][scenario][: arguments.limit])
                results["runs"].append({"server": server.name, "scenario": scenario, "round": number, **figures})
                results["servers"][server.name]["peak_bytes"] = server.peak_bytes
                (arguments.work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
                said = figures.get("error") or f"{figures['output_tps']:.1f} tokens/s in {figures['wall_s']:.1f} s"
                print(f"round {number}, {scenario}, {server.name}: {said}", flush=True)
    print(report(results))
    return int(any("error" in run for run in results["runs"]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LlmkitError as error:
        sys.exit(f"{error}")
