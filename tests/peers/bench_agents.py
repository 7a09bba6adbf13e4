"""`make bench-agents`: agents' sessions on llmkit and on vLLM, on a CPU, in turn.

    python tests/peers/bench_agents.py [--sessions 200] [--concurrency 8] [--rounds 1]
        [--servers SERVER ...] [--work DIR]

A generated trace (`llmkit bench trace`) of sessions with tools, think time and sub-agents is played
on both servers with SmolLM2-135M-Instruct, with the same lengths and text; histories are the
servers' own answers. Both run at once; the one that is not measured is stopped (SIGSTOP). Prints a
table of latencies and of prefix hits, ideal and real, in each server's own block size. Exit code 1
when a server found 1 % more than an infinite cache could have: then the ideal is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

from clients import TEMPLATE
from peer_servers import PeerServer, PeerSetup, make_server, start

from common import ROOT, real_model, table
from llmkit.bench.agentic.agent_workload import AgentWorkload, build_agent_workload
from llmkit.bench.agentic.generate_trace import generate_trace
from llmkit.bench.agentic.read_trace import HASH_BLOCK_TOKENS, read_agent_trace
from llmkit.bench.agentic.trace_options import TraceOptions
from llmkit.bench.bench_metrics import calculate_metrics, median_metrics, require_complete
from llmkit.bench.prompt_dataset import load_prompt_dataset
from llmkit.bench.workload import Scenario
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import LlmkitError

VLLM_OPTIONS = "--enable-auto-tool-choice --tool-call-parser hermes --enable-prompt-tokens-details"
SERVERS = ("llmkit=bf16", f"vllm=fp32 {VLLM_OPTIONS}", f"vllm=bf16 {VLLM_OPTIONS}")
SEED = 20261123
ROWS = {
    "wall time, s": "wall_s",
    "requests": "requests",
    "prompt tokens": "prompt_tokens",
    "output tokens/s": "output_tps",
    "TTFT p50, ms": "ttft_p50_ms",
    "TTFT p99, ms": "ttft_p99_ms",
    "first output token p50, ms": "ttfo_p50_ms",
    "TPOT mean, ms": "tpot_mean_ms",
    "session p50, s": "session_p50_s",
    "session p99, s": "session_p99_s",
    "prefix hits, ideal": "ideal_hit_rate",
    "prefix hits, real": "cache_hit_rate",
    "of the ideal ones": "prefix_hits_of_ideal",
}
SHARES = ("ideal_hit_rate", "cache_hit_rate", "prefix_hits_of_ideal")


def make_workload(arguments: argparse.Namespace) -> AgentWorkload:
    """The trace, written to the folder of work, and its loads. All requests fit 2,048 tokens."""
    file = arguments.work / "trace.jsonl"
    options = TraceOptions(
        file,
        sessions=arguments.sessions,
        turns=(2, 4),
        agents=2,
        tools=3,
        system_tokens=200,
        user_tokens=(10, 60),
        result_tokens=(20, 80),
        output_tokens=(8, 16),
        think_time=0.2,
        branches=0.1,
        seed=SEED,
    )
    made = generate_trace(options)
    file.write_bytes(made.to_jsonl())
    print(
        f"{made.num_sessions} sessions, {made.num_branches} branches, {made.num_turns} requests,"
        f" {made.output_tokens} output tokens",
        flush=True,
    )
    tokenizer = load_tokenizer(open_checkpoint(real_model(arguments.work)))
    scenario = Scenario("agents", arguments.concurrency, lambda _: [], "agents")
    return build_agent_workload(
        read_agent_trace(str(file)),
        [scenario],
        load_prompt_dataset("builtin", tokenizer, SEED),
        tokenizer,
        HASH_BLOCK_TOKENS,
        rounds=arguments.rounds,
        seed=SEED,
    )


def measure(server: PeerServer, workload: AgentWorkload, number: int) -> dict[str, float]:
    """The metrics of a round. Raises InputError when a request failed."""
    server.resume()
    try:
        run = server.run_sessions(workload.loads[number]["agents"])
    finally:
        server.pause()
    require_complete(run.timelines, server.name, "agents")
    for note in run.notes:
        print(f"{server.name}: {note}", flush=True)
    return calculate_metrics(run.timelines, run.wall_s) | run.session_metrics


def report(rounds: dict[str, list[dict[str, float]]]) -> str:
    """A table with a column for each server."""
    medians = {name: median_metrics(metrics) for name, metrics in rounds.items()}
    rows = []
    for title, metric in ROWS.items():
        cells = []
        for metrics in medians.values():
            value = metrics.get(metric)
            if value is None:
                cells.append("-")
            else:
                cells.append(f"{value:.1%}" if metric in SHARES else f"{value:,.1f}")
        rows.append([title, *cells])
    return table(["", *(name.split()[0] for name in medians)], rows)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=8, help="sessions at once (default 8)")
    parser.add_argument("--rounds", type=int, default=1, help="with other text (default 1)")
    parser.add_argument("--servers", nargs="+", default=SERVERS, metavar="SERVER")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench-agents")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    template = arguments.work / "tools.jinja"
    template.write_text(TEMPLATE)
    workload = make_workload(arguments)
    setup = PeerSetup(arguments.work)
    rounds: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        servers = []
        for name in arguments.servers:
            server = make_server(f"{name} --chat-template {template}", setup)
            stack.callback(server.stop)
            start(server, workload.warmup)
            servers.append(server)
        for number in range(arguments.rounds):
            for server in servers if number % 2 == 0 else servers[::-1]:
                metrics = measure(server, workload, number)
                rounds.setdefault(server.name, []).append(metrics)
                print(f"{server.name}: {metrics['wall_s']:.1f} s", flush=True)
                (arguments.work / "results.json").write_text(json.dumps(rounds, indent=1))
    print(report(rounds))
    best = [max(m.get("prefix_hits_of_ideal", 0.0) for m in found) for found in rounds.values()]
    return int(max(best) > 1.01)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LlmkitError as error:
        sys.exit(f"{error}")
