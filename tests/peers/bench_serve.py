"""`make bench-serve`: llmkit's server beside vLLM and llama.cpp on a CPU, with the same requests.

The model is SmolLM2-135M-Instruct. All servers run at once and are measured in turn, in reverse
order on odd rounds, because the speed of shared machines changes within minutes. The servers that
are not measured are stopped (SIGSTOP), so that their idle threads take no processor time.

    python tests/peers/bench_serve.py [--servers SERVER ...] [--only REGEX] [--rounds 3]
        [--scenarios NAME ...] [--limit N] [--work DIR] [--llamacpp DIR] [--busy N ...] [--cpus N]

A SERVER is `llmkit=KIND|DIR` (bf16, fp32, w8a8, int8, int4; int8 and int4 also with `-fp32` or
`-int8` after them), `vllm=fp32|bf16|DIR` or `llamacpp=f32|f16|bf16|q8_0|q4_0|q4_k_m`. Words after
a blank are more options of the server's command, as in "llamacpp=q4_0 --kv-unified". README.md
defines the kinds and the metrics.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch
from peer_servers import PeerServer, PeerSetup, make_server, start
from serve_report import SCENARIO_NAMES, report

from common import ROOT, real_model
from llmkit.bench.bench_metrics import calculate_metrics, require_complete
from llmkit.bench.environment import describe_environment
from llmkit.bench.peak_performance import measure_bandwidth
from llmkit.bench.workload import SCENARIOS, Lengths, WorkloadRequest, builtin_prompt_text
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmkit.common.errors import LlmkitError
from llmkit.kernels.cpu import cpu_kernels

SERVERS = (
    "llmkit=bf16",
    "llmkit=w8a8",
    "llmkit=int4",
    "llmkit=int4-int8",
    "vllm=bf16",
    "llamacpp=f16",
    "llamacpp=q8_0",
    "llamacpp=q4_0",
)
SEED = 20260721
BUSY_PROGRAM = "while True: pass"
Round = dict[str, tuple[WorkloadRequest, ...]]


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


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that compute all the time, outside the servers' CPU limit."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY_PROGRAM]))
            stack.callback(process.kill)  # runs before Popen waits for the end
        yield


def positive_cpus(text: str) -> float:
    """A number of CPUs."""
    cpus = float(text)
    if not cpus > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of CPUs")
    return cpus


def parse_arguments() -> argparse.Namespace:
    """The command line."""
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
        "--busy",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="processes that compute beside the servers; '0 1' measures alone and beside one,"
        " in turn (default 0)",
    )
    parser.add_argument(
        "--cpus",
        type=positive_cpus,
        metavar="N",
        help="run each server in a cgroup with a quota of so many CPUs, as 1.5",
    )
    return parser.parse_args()


def main() -> int:
    """Command line; 1 when a run failed."""
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    setup = PeerSetup(arguments.work, arguments.llamacpp, arguments.cpus)
    wanted = [
        name
        for name in arguments.servers
        if any(re.search(arguments.only, f"{name}: {s}") for s in arguments.scenarios)
    ]
    tokenizer = load_tokenizer(open_checkpoint(real_model(arguments.work)))
    stream = tokenizer.encode(builtin_prompt_text(), add_special_tokens=False)
    # The prefix cache must not know the text that was sent beside other busy processes.
    texts = {
        key: make_round(tokenizer, stream, number)
        for number, key in enumerate(product(range(arguments.rounds), arguments.busy))
    }
    cpu_kernels.use_threads()  # with which this process measures the memory's bandwidth
    results: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "environment": describe_environment("cpu", torch.float32),
        "cpu_level": cpu_kernels.level(),
        "cpus": arguments.cpus,
        "bandwidths": [],  # bytes per second, one for each round
        "servers": {},
        "runs": [],
    }
    for number in (signal.SIGTERM, signal.SIGHUP):
        # An exit runs the handlers that stop the servers.
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with ExitStack() as stack:
        servers = []
        for name in wanted:
            server = make_server(name, setup)
            stack.callback(server.stop)
            results["servers"][name] = start(server, next(iter(texts.values()))["warmup"])
            servers.append(server)
        for number in range(arguments.rounds):
            if "single" in arguments.scenarios:
                results["bandwidths"].append(measure_bandwidth("cpu"))
            for scenario, busy in product(arguments.scenarios, arguments.busy):
                requests = texts[number, busy][scenario][: arguments.limit]
                with busy_processes(busy):
                    for server in servers if number % 2 == 0 else servers[::-1]:
                        if not re.search(arguments.only, f"{server.name}: {scenario}"):
                            continue
                        run = {"server": server.name, "scenario": scenario, "round": number}
                        run |= {"busy": busy, **measure(server, scenario, requests)}
                        results["runs"].append(run)
                        facts = results["servers"][server.name]
                        facts["peak_bytes"] = server.peak_bytes
                        if server.limit is not None:
                            facts["cpu_stat"] = server.limit.statistics()
                        save(results, arguments.work)
                        print_run(run)
    print(report(results))
    return int(any("error" in run for run in results["runs"]))


def save(results: dict[str, Any], work: Path) -> None:
    """Write the results so far."""
    (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def print_run(run: dict[str, Any]) -> None:
    """One line about a run that has ended."""
    beside = f" beside {run['busy']} busy" if run["busy"] else ""
    speed = run.get("error")
    if speed is None:
        speed = f"{run['output_tps']:.1f} tokens/s in {run['wall_s']:.1f} s"
    print(f"round {run['round']}, {run['scenario']}{beside}, {run['server']}: {speed}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LlmkitError as error:
        sys.exit(f"{error}")
