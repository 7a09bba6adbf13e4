"""The metrics of played sessions, beside those of their requests."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.bench.agentic.client_work import work_metrics
from llmkit.bench.agentic.ideal_prefix_cache import ideal_cached_tokens
from llmkit.bench.agentic.play_sessions import PlayedSessions
from llmkit.bench.bench_metrics import latency_statistics


def session_metrics(
    played: PlayedSessions, block_size: int | None, reports_cached: bool
) -> dict[str, float]:
    """The AGENT_METRICS of a complete run.

    block_size: of the server's prefix cache; None: the prompts' token ids are not known, and so not
    what an infinite cache finds. reports_cached: whether the server says what it found.
    """
    ttfos_s = [turn.timeline.ttfo_s for turn in played.turns]
    known_s = [ttfo_s for ttfo_s in ttfos_s if ttfo_s is not None]
    metrics: dict[str, float] = latency_statistics("ttfo", known_s)
    metrics["ttfo_share"] = len(known_s) / len(ttfos_s)
    metrics |= _session_latencies(played.session_s)
    metrics["sessions"] = len(played.session_s)
    metrics["session_rate"] = len(played.session_s) / played.wall_s
    metrics |= work_metrics(played.work_s, played.wall_s, len(played.turns))
    if block_size is None:
        return metrics
    prompt_tokens = sum(turn.timeline.prompt_tokens for turn in played.turns)
    ideal_tokens = ideal_cached_tokens(played.sent_requests(), block_size)
    metrics["ideal_cached_tokens"] = ideal_tokens
    metrics["ideal_hit_rate"] = ideal_tokens / prompt_tokens
    if reports_cached and ideal_tokens:
        cached_tokens = sum(turn.timeline.cached_tokens for turn in played.turns)
        metrics["prefix_hits_of_ideal"] = cached_tokens / ideal_tokens
    return metrics


def _session_latencies(session_s: Sequence[float]) -> dict[str, float]:
    """As `latency_statistics`, in seconds: a session takes minutes."""
    milliseconds = latency_statistics("session", session_s)
    return {f"{name.removesuffix('_ms')}_s": value / 1000 for name, value in milliseconds.items()}
