"""One run of `--mode agentic`: plays a trace on a server and calculates what bench reports."""

from __future__ import annotations

import re

from llmkit.bench.agentic.agent_metrics import session_metrics
from llmkit.bench.agentic.play_sessions import AgentLoad, play_sessions, tokenize_prompts
from llmkit.bench.bench_metrics import RunResult
from llmkit.bench.load_client import Server, read_metrics, run_counts

BLOCK_SIZE = 16  # tokens; llmkit's, and vLLM's on a GPU
# vLLM tells its block size as a label.
_BLOCK_SIZE = re.compile(r'^[a-z]+:cache_config_info\{.*\bblock_size="([1-9][0-9]*)"', re.MULTILINE)


def run_sessions(server: Server, load: AgentLoad) -> RunResult:
    """Play a trace on a server. The timelines are in the order of the answers.

    When a turn fails the run ends there, and only the timelines are set.
    """
    metrics_before = read_metrics(server)
    played = play_sessions(server, load)
    metrics_text = read_metrics(server)
    timelines = [turn.timeline for turn in played.turns]
    if any(timeline.error is not None for timeline in timelines):
        return RunResult(played.wall_s, timelines, played.client_cpu_s)
    notes = []
    block_size: int | None = server_block_size(metrics_text)
    if not load.trace.sends_tokens and not tokenize_prompts(server, played):
        block_size = None
        notes.append(
            f"{server.url} does not tell the tokens of a chat's prompt at /tokenize: its ideal"
            " prefix hits are not known"
        )
    reports_cached = any(turn.answer.cached_tokens is not None for turn in played.turns)
    if not reports_cached:
        notes.append(
            f"{server.url} does not tell how many prompt tokens were cached (vLLM does with"
            " --enable-prompt-tokens-details)"
        )
    return RunResult(
        played.wall_s,
        timelines,
        played.client_cpu_s,
        *run_counts(metrics_before, metrics_text),
        session_metrics=session_metrics(played, block_size, reports_cached),
        notes=notes,
    )


def server_block_size(metrics_text: str | None) -> int:
    """The block size of a server's prefix cache by its /metrics, or else BLOCK_SIZE."""
    match = _BLOCK_SIZE.search(metrics_text or "")
    return int(match[1]) if match else BLOCK_SIZE
