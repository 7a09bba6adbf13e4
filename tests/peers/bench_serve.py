"""`make bench-serve`: llmkit's server beside vLLM and llama.cpp on a CPU, with the same requests.

The model is SmolLM2-135M-Instruct. All servers run at once and are measured in turn, in reverse
order on odd rounds, because the speed of shared machines changes within minutes. The servers that
are not measured are stopped (SIGSTOP), so that their idle threads take no processor time.

    python tests/peers/bench_serve.py [--servers SERVER ...] [--only REGEX] [--rounds 3]
        [--scenarios NAME ...] [--limit N] [--work DIR] [--llamacpp DIR] [--busy N]

A SERVER is `llmkit=fp32|int8|w8a8|int4|DIR`, `vllm=fp32|bf16|DIR` or `llamacpp=f32|q8_0|q4_0`.
Words after a blank are more options of the server's command, as in "llamacpp=q4_0 --kv-unified".
README.md defines the metrics.
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
from llmkit.bench.backends import ServedBackend
from llmkit.bench.bench_metrics import calculate_metrics, median_metrics, require_complete
from llmkit.bench.environment import describe_environment
from llmkit.bench.host_memory import memory_bytes
from llmkit.bench.load_client import query_server
from llmkit.bench.workload import SCENARIOS, WARMUP, Lengths, WorkloadRequest, builtin_prompt_text
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmkit.common.errors import LlmkitError

SERVERS = (
    "llmkit=fp32",
    "llmkit=w8a8",
    "llmkit=int4",
    "vllm=fp32",
    "llamacpp=f32",
    "llamacpp=q4_0",
)
SCENARIO_NAMES = ("single", "batch", "online", "prefix")
SEED = 20260721
MIB = 1 << 20
CORES = sorted(os.sched_getaffinity(0))
NAME = "smollm2"
# vLLM's --max-num-seqs and --max-model-len.
VLLM_MAX_NUM_SEQS = 64
VLLM_MAX_MODEL_LEN = 2048
# llama.cpp's --parallel, and the context of each slot.
LLAMACPP_SLOTS = 32
SLOT_TOKENS = 1024
# Options of `llmkit quantize`. Speed does not depend on the quality of the calibration. llama.cpp's
# files have an 8-bit output projection too.
QUANTIZE_OPTIONS = {
    "int8": ("--method", "int8", "--lm-head", "8"),
    "w8a8": (
        "--method",
        "int8",
        "--activations",
        "--samples",
        "8",
        "--seq-len",
        "512",
        "--lm-head",
        "8",
    ),
    "int4": ("--method", "rtn", "--lm-head", "8"),
}
# The comparisons, by title: the scenario, the metric, and whether lower values are better.
COMPARISONS = {
    "single, output tokens/s": ("single", "output_tps", False),
    "single, decode tokens/s": ("single", "tpot_mean_ms", True),
    "batch, output tokens/s": ("batch", "output_tps", False),
    "online, output tokens/s": ("online", "output_tps", False),
    "online, TTFT p99": ("online", "ttft_p99_ms", False),
    "prefix, output tokens/s": ("prefix", "output_tps", False),
}
Round = dict[str, tuple[WorkloadRequest, ...]]


class PeerServer(ServedBackend):
    """A server of any program, which can be paused. `{port}` in its command is the port."""

    def __init__(
        self, name: str, command: Sequence[object], settings: dict[str, str], log: Path
    ) -> None:
        """settings: more environment variables. log: the file for its stderr."""
        super().__init__(name, NAME, SLOT_TOKENS)
        self.words = [str(word) for word in command]
        self.settings = settings
        self.stderr_file.close()
        self.stderr_file = log.open("w+b")

    def command(self, port: int) -> list[str]:
        """See `ServedBackend.command`."""
        return [word.replace("{port}", str(port)) for word in self.words]

    def environment(self) -> dict[str, str]:
        """The server's environment, without settings of threads: every server uses its default."""
        inherited = {
            k: v
            for k, v in super().environment().items()
            if not k.startswith(("OMP_", "MKL_", "KMP_"))
        }
        return inherited | {"HF_HUB_OFFLINE": "1"} | self.settings

    def memory_bytes(self) -> int:
        """The server's memory now."""
        return memory_bytes(self.process.pid) if self.process else 0

    def pause(self) -> None:
        """Stop every process of the server."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the server and wait for an answer. Raises ShortageError without one."""
        assert self.server
        self._signal(signal.SIGCONT)
        query_server(self.server.url)

    def stop(self) -> dict[str, float]:
        """See `ServedBackend.stop`."""
        self._signal(signal.SIGCONT)
        return super().stop()

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)  # the server leads a process group


def make_server(name: str, arguments: argparse.Namespace) -> PeerServer:
    """The server of a `--servers` value. Its model is created first when it is missing."""
    server, *options = shlex.split(name)
    program, _, kind = server.partition("=")
    maker = {"llmkit": llmkit_server, "vllm": vllm_server, "llamacpp": llamacpp_server}.get(program)
    if maker is None or not kind:
        raise SystemExit(f"{name}: llmkit=, vllm= or llamacpp= and a kind was expected")
    command, settings = maker(kind, arguments)
    log = arguments.work / f"{re.sub(r'[^a-z0-9_]+', '-', name.lower()).strip('-')}.log"
    return PeerServer(name, [*command, *options], settings, log)


def llmkit_server(kind: str, arguments: argparse.Namespace) -> tuple[list[object], dict[str, str]]:
    """`llmkit serve` with the source model or a checkpoint quantized from it."""
    model = real_model(arguments.work)
    if kind in QUANTIZE_OPTIONS:
        source = model
        model = arguments.work / f"llmkit-{kind}"
        if not model.exists():
            llmkit(
                "quantize",
                source,
                *QUANTIZE_OPTIONS[kind],
                "--no-eval",
                "--quiet",
                "--output",
                model,
            )
    elif kind != "fp32":
        model = folder(kind)
    command = [sys.executable, "-m", "llmkit.cli.main", "serve", model, "--served-model-name", NAME]
    return [*command, "--host", "127.0.0.1", "--port", "{port}"], {}


def vllm_server(kind: str, arguments: argparse.Namespace) -> tuple[list[object], dict[str, str]]:
    """`vllm serve` with its default compilation, bound to all cores, with the libraries that it
    recommends."""
    python = peer_python("vllm")
    dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(kind)
    model = real_model(arguments.work) if dtype else folder(kind)
    preloaded = [
        *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"),
        python.parents[1] / "lib" / "libiomp5.so",
    ]
    settings = {
        "LD_PRELOAD": ":".join(map(str, preloaded)),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, CORES)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    command = [
        python.parent / "vllm",
        "serve",
        model,
        "--served-model-name",
        NAME,
        "--dtype",
        dtype or "float32",
    ]
    limits = ["--max-model-len", VLLM_MAX_MODEL_LEN, "--max-num-seqs", VLLM_MAX_NUM_SEQS]
    return [*command, *limits, "--host", "127.0.0.1", "--port", "{port}"], settings


def llamacpp_server(
    kind: str, arguments: argparse.Namespace
) -> tuple[list[object], dict[str, str]]:
    """`llama-server` with one slot for each client.

    The cache belongs to a slot unless --kv-unified is given.
    """
    programs = arguments.llamacpp / "build" / "bin"
    if not (programs / "llama-server").exists():
        raise SystemExit(
            f"{programs / 'llama-server'} is missing; make {arguments.llamacpp}/.ready makes it"
        )
    model = gguf(kind, arguments)
    threads = [
        "--threads",
        len(CORES),
        "--parallel",
        LLAMACPP_SLOTS,
        "--ctx-size",
        LLAMACPP_SLOTS * SLOT_TOKENS,
        "--no-kv-unified",
    ]
    listen = ["--host", "127.0.0.1", "--port", "{port}", "--no-webui"]
    return [programs / "llama-server", "--model", model, "--alias", NAME, *threads, *listen], {}


def gguf(kind: str, arguments: argparse.Namespace) -> Path:
    """The model in llama.cpp's format, written by its own tools.

    f32 is converted from the checkpoint, and other types are quantized from f32.
    """
    out = arguments.work / f"{kind}.gguf"
    if out.exists():
        return out
    partial = out.with_suffix(".partial")
    if kind == "f32":  # vLLM's environment has the modules that the script imports
        script = arguments.llamacpp / "src" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
        command = [
            peer_python("vllm"),
            script,
            real_model(arguments.work),
            "--outtype",
            "f32",
            "--outfile",
            partial,
        ]
    else:
        command = [
            arguments.llamacpp / "build" / "bin" / "llama-quantize",
            gguf("f32", arguments),
            partial,
            kind,
        ]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{kind}.gguf could not be made:\n{process.stderr[-3000:]}")
    return partial.rename(out)


def folder(kind: str) -> Path:
    """A checkpoint directory that the user names."""
    if not Path(kind).is_dir():
        raise SystemExit(f"{kind} is neither a known kind nor a directory")
    return Path(kind).resolve()


def make_round(tokenizer: Tokenizer, stream: list[int], number: int) -> Round:
    """The requests of a round, with spans of a text's tokens (`stream`) as prompts.

    Rounds have the same lengths and other text, so that no prefix cache helps.
    """
    random = Random(SEED + 1000 * (number + 1))

    def cut(length: int, head: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A random span after `head`.

        Decoding and encoding the tokens gives them again, so that they can be sent as text too.
        """
        while True:
            start = random.randrange(len(stream) - length)
            ids = [*head, *stream[start : start + length]]
            text = tokenizer.decode(ids, skip_special_tokens=False)
            if tokenizer.encode(text, add_special_tokens=False) == ids:
                return tuple(ids)

    def requests(
        name: str, lengths: Lengths, head: tuple[int, ...] = ()
    ) -> tuple[WorkloadRequest, ...]:
        return tuple(
            WorkloadRequest(f"{name}-{number}-{index}", cut(prompt, head), output)
            for index, (prompt, output) in enumerate(lengths)
        )

    mixed = SCENARIOS["online"].draw_lengths(Random(SEED))
    online = requests("online", mixed)
    common = cut(512)
    return {
        "warmup": requests("warmup", [(64, 16)] * 4),
        "single": requests("single", [(128, 128)] * 4),
        "batch": requests("batch", mixed[:32]),
        "online": online,
        "prefix": requests("prefix", [(32, 32)] * 32, common),
    }


def start(server: PeerServer, warmup: Sequence[WorkloadRequest]) -> dict[str, Any]:
    """Start a server, warm it up and pause it. Returns the seconds and the memory until it was
    ready."""
    facts: dict[str, Any] = {"command": shlex.join(server.words), "settings": server.settings}
    facts |= server.start() | {
        "ready_bytes": server.memory_bytes(),
        "peak_bytes": server.peak_bytes,
    }
    print(
        f"{server.name}: ready in {facts['ready_s']:.1f} s, {facts['ready_bytes'] / MIB:.0f} MiB",
        flush=True,
    )
    timelines = server.run(warmup, WARMUP.max_concurrency).timelines
    require_complete(timelines, server.name, WARMUP.name)
    server.pause()
    return facts


def measure(
    server: PeerServer, scenario: str, requests: Sequence[WorkloadRequest]
) -> dict[str, Any]:
    """The metrics of one run, or `error` when a request failed."""
    try:
        server.resume()
        run = server.run(requests, SCENARIOS[scenario].max_concurrency)
        require_complete(run.timelines, server.name, scenario)
        return calculate_metrics(run.timelines, run.wall_s)
    except LlmkitError as error:
        return {"error": str(error)}
    finally:
        server.pause()


def metrics_by_round(
    runs: Sequence[dict[str, Any]], server: str, scenario: str
) -> dict[int, dict[str, float]]:
    """The metrics of a server's complete runs of a scenario, by round."""
    return {
        run["round"]: {name: value for name, value in run.items() if not isinstance(value, str)}
        for run in runs
        if (run["server"], run["scenario"]) == (server, scenario) and "error" not in run
    }


def report(results: dict[str, Any]) -> str:
    """Three tables: servers, medians over the rounds, and llmkit's servers over the baselines."""
    servers = results["servers"]
    runs = results["runs"]
    facts = [
        [
            name,
            f"{one['ready_s']:.1f}",
            f"{one['ready_bytes'] / MIB:.0f}",
            f"{one['peak_bytes'] / MIB:.0f}",
        ]
        for name, one in servers.items()
    ]
    rows = []
    ratios = []
    for scenario, name in product(SCENARIO_NAMES, servers):
        if rounds := metrics_by_round(runs, name, scenario):
            one = median_metrics(list(rounds.values()))
            shown = (
                one["output_tps"],
                one["ttft_mean_ms"],
                one["ttft_p99_ms"],
                one.get("tpot_mean_ms", 0.0),
            )
            rows.append(
                [
                    scenario,
                    name,
                    *(f"{value:.1f}" for value in shown),
                    f"{one['cached_tokens']:.0f}",
                ]
            )
    baselines = [name for name in servers if not name.startswith("llmkit=")]
    for name, (title, (scenario, metric, inverse)) in product(servers, COMPARISONS.items()):
        own_rounds = metrics_by_round(runs, name, scenario)
        cells = []
        if name in baselines or not own_rounds:
            continue
        for baseline in baselines:
            baseline_rounds = metrics_by_round(runs, baseline, scenario)
            pairs = [
                (own_rounds[number][metric], baseline_rounds[number][metric])
                for number in own_rounds
                if number in baseline_rounds
            ]
            found = [b / a if inverse else a / b for a, b in pairs]
            cells.append(
                f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""
            )
        ratios.append([name, title, *cells])
    return "\n\n".join(
        (
            table(("server", "ready, s", "memory when ready, MiB", "peak, MiB"), facts),
            table(
                (
                    "",
                    "",
                    "output tokens/s",
                    "TTFT mean, ms",
                    "TTFT p99, ms",
                    "TPOT, ms",
                    "cached tokens",
                ),
                rows,
            ),
            table(("", "times that of", *baselines), ratios),
        )
    )


def main() -> int:
    """Command line; 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", nargs="+", default=SERVERS, metavar="SERVER")
    parser.add_argument(
        "--only", default="", help="a regular expression: what to run, as 'vllm=fp32: single'"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="repetitions with other text (default 3)"
    )
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIO_NAMES, default=SCENARIO_NAMES)
    parser.add_argument("--limit", type=int, help="use only the first requests of each scenario")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / ".bench-serve",
        help="folder for models, logs and results",
    )
    parser.add_argument(
        "--llamacpp", type=Path, default=ROOT / ".llamacpp", help="folder of its sources and build"
    )
    parser.add_argument(
        "--busy", type=int, default=0, help="processes that compute beside the servers (default 0)"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    wanted = [
        name
        for name in arguments.servers
        if any(re.search(arguments.only, f"{name}: {s}") for s in arguments.scenarios)
    ]
    tokenizer = load_tokenizer(open_checkpoint(real_model(arguments.work)))
    stream = tokenizer.encode(builtin_prompt_text(), add_special_tokens=False)
    rounds = [make_round(tokenizer, stream, number) for number in range(arguments.rounds)]
    results: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "environment": describe_environment("cpu", torch.float32),
        "servers": {},
        "runs": [],
    }
    for number in (signal.SIGTERM, signal.SIGHUP):
        # An exit runs the handlers that stop the servers.
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with ExitStack() as stack:
        servers = [make_server(name, arguments) for name in wanted]
        for server in servers:
            stack.callback(server.stop)
            results["servers"][server.name] = start(server, rounds[0]["warmup"])
        for _ in range(arguments.busy):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(neighbour.kill)
        for number, scenario in product(range(arguments.rounds), arguments.scenarios):
            for server in servers if number % 2 == 0 else servers[::-1]:
                if not re.search(arguments.only, f"{server.name}: {scenario}"):
                    continue
                metrics = measure(server, scenario, rounds[number][scenario][: arguments.limit])
                results["runs"].append(
                    {"server": server.name, "scenario": scenario, "round": number, **metrics}
                )
                results["servers"][server.name]["peak_bytes"] = server.peak_bytes
                (arguments.work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
                outcome = (
                    metrics.get("error")
                    or f"{metrics['output_tps']:.1f} tokens/s in {metrics['wall_s']:.1f} s"
                )
                print(f"round {number}, {scenario}, {server.name}: {outcome}", flush=True)
    print(report(results))
    return int(any("error" in run for run in results["runs"]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LlmkitError as error:
        sys.exit(f"{error}")
