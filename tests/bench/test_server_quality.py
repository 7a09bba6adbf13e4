"""The quality of servers, from their log probabilities of prompts, and of sharded checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.server_process import LlmkitServer, serving
from support.tiny_models import tiny_checkpoint

from llmkit.bench.bench_metrics import QUALITY_BOUND_METRICS, QUALITY_METRICS
from llmkit.bench.bench_options import BenchOptions
from llmkit.bench.bench_report import TargetReport
from llmkit.bench.load_client import query_server
from llmkit.bench.run_bench import bench
from llmkit.bench.server_quality import (
    PromptLogprobs,
    PromptLogprobsClient,
    detect_prompt_logprobs_api,
    score_prompt_logprobs,
)
from llmkit.bench.unsharded_view import unsharded
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.cli import main
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.shard.shard_checkpoint import shard

OPTIONS = BenchOptions(speed=False, windows=2, window_tokens=48, device="cpu")
pytestmark = pytest.mark.usefixtures("short_builtin_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_checkpoint(path / "a", seed=0)
    tiny_checkpoint(path / "b", seed=1)
    return path


@pytest.fixture(scope="module")
def server_of_b(folder: Path) -> Iterator[LlmkitServer]:
    with serving(folder / "log", folder / "b") as running:
        yield running


def measured(*targets: object, options: BenchOptions = OPTIONS) -> list[TargetReport]:
    return bench([str(target) for target in targets], options, SilentProgress()).targets


class TestServers:
    def test_perplexity_is_exact_and_kl_a_bound(
        self, folder: Path, server_of_b: LlmkitServer
    ) -> None:
        _, exact = measured(folder / "a", folder / "b")
        gates = ("mean_kl_bound>0", "top1>=0", "perplexity>=baseline*0")
        _, served = measured(folder / "a", server_of_b.url, options=replace(OPTIONS, gates=gates))
        assert served.kind == "url"
        assert served.metrics.keys() == {"perplexity", *QUALITY_BOUND_METRICS}
        assert served.metrics["perplexity"] == pytest.approx(exact.metrics["perplexity"], rel=1e-4)
        # The last place of a window counts for models at hand only: 47 of 48 are the same.
        assert 0 < served.metrics["mean_kl_bound"] < 1.05 * exact.metrics["mean_kl"]
        assert served.metrics["max_kl_bound"] <= exact.metrics["max_kl"] * 1.0001
        assert served.metrics["top1"] == pytest.approx(exact.metrics["top1"], abs=0.03)
        assert "mean_kl" in " ".join(served.absent)

    def test_server_matches_its_checkpoint(self, folder: Path, server_of_b: LlmkitServer) -> None:
        for pair in ((folder / "b", server_of_b.url), (server_of_b.url, folder / "b")):
            base, other = measured(*pair)
            assert other.metrics["max_kl_bound"] == pytest.approx(0, abs=1e-5)
            assert other.metrics["top1"] == 1
            assert base.metrics["perplexity"] == pytest.approx(
                other.metrics["perplexity"], rel=1e-5
            )

    def test_servers_are_compared_without_a_checkpoint(
        self, folder: Path, server_of_b: LlmkitServer
    ) -> None:
        options = replace(OPTIONS, tokenizer=str(folder / "a"), baseline=server_of_b.url)
        base, other = measured(f"{server_of_b.url}/v1", options=options)
        assert other.metrics["perplexity"] == base.metrics["perplexity"]
        assert other.metrics["max_kl_bound"] == pytest.approx(0, abs=1e-5)

    def test_echo_gives_the_same_perplexity_and_no_tokens(
        self, folder: Path, server_of_b: LlmkitServer
    ) -> None:
        found = query_server(server_of_b.url)
        assert detect_prompt_logprobs_api(found) == "ids"
        windows = torch.arange(20, 84).reshape(2, 32)
        by_ids, _ = score_prompt_logprobs(
            PromptLogprobsClient(found, "ids").prompt_logprobs(windows), None, windows
        )
        by_echo, _ = score_prompt_logprobs(
            PromptLogprobsClient(found, "echo").prompt_logprobs(windows), None, windows
        )
        assert by_echo == {"perplexity": pytest.approx(by_ids["perplexity"], rel=1e-6)}
        assert (
            score_prompt_logprobs(
                PromptLogprobsClient(found, "echo").prompt_logprobs(windows),
                PromptLogprobsClient(found, "ids").prompt_logprobs(windows),
                windows,
            )[0]
            == by_echo
        )

    def test_gate_on_an_unknown_kl_is_refused(
        self, folder: Path, server_of_b: LlmkitServer
    ) -> None:
        with pytest.raises(UsageError, match="on mean_kl, which is not measured for"):
            measured(folder / "a", server_of_b.url, options=replace(OPTIONS, gates=("mean_kl<=1",)))


@pytest.mark.parametrize("seed", range(3))
def test_divergence_bound_is_below_the_kl_divergence(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    window = torch.randint(0, 40, (1, 9), generator=generator)
    p, q = torch.randn(2, 9, 40, generator=generator).double() * 2

    def top_logprobs(logits: torch.Tensor, count: int) -> PromptLogprobs:
        every = torch.log_softmax(logits[:-1], -1)
        logs, tokens = every.topk(count)
        return PromptLogprobs(every.gather(1, window[0, 1:, None])[:, 0], tokens, logs)

    logs_p = torch.log_softmax(p[:-1], -1)
    logs_q = torch.log_softmax(q[:-1], -1)
    exact = float((logs_p.exp() * (logs_p - logs_q)).sum(-1).mean())
    bounds = []
    for mine, base in (
        (top_logprobs(q, 40), p),
        (top_logprobs(q, 10), p),
        (top_logprobs(q, 3), p),
        (q, top_logprobs(p, 10)),
        (top_logprobs(q, 5), top_logprobs(p, 5)),
    ):
        figures, base_perplexity = score_prompt_logprobs(iter([mine]), iter([base]), window)
        bounds.append(figures["mean_kl_bound"])
        assert figures["top1"] == float((p[:-1].argmax(-1) == q[:-1].argmax(-1)).double().mean())
        assert base_perplexity is not None
    assert bounds[0] == pytest.approx(exact, rel=1e-4), "all tokens are known"
    assert bounds[2] <= bounds[1] <= bounds[0], "fewer tokens, a lower bound"
    assert all(0 <= bound <= exact * 1.0001 for bound in bounds)


class TestLayouts:
    @pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
    def test_sharded_checkpoint_scores_as_the_unsharded_one(
        self, folder: Path, tmp_path: Path, tp: int, pp: int
    ) -> None:
        shard(str(folder / "b"), tmp_path / "parts", tp, pp)
        _, together, parts = measured(folder / "a", folder / "b", tmp_path / "parts")
        assert {name: parts.metrics[name] for name in ("perplexity", *QUALITY_METRICS)} == {
            name: together.metrics[name] for name in ("perplexity", *QUALITY_METRICS)
        }

    def test_sharded_int4_checkpoint_reads_as_the_unsharded_one(
        self, folder: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "int4"
        quantize = [
            "quantize",
            str(folder / "b"),
            "--method",
            "rtn",
            "--group-size",
            "32",
            "-o",
            str(out),
        ]
        assert main.run([*quantize, "--no-eval", "-q"]) == 0
        shard(str(out), tmp_path / "parts", 2, 1)
        original = open_checkpoint(out)
        joined = unsharded(open_checkpoint(tmp_path / "parts"))
        assert joined.tensors.keys() == original.tensors.keys()
        for name in original.tensors:
            assert torch.equal(joined.read(name), original.read(name)), name
        assert unsharded(original) is original

    def test_missing_ranks_are_refused(self, folder: Path, tmp_path: Path) -> None:
        shard(str(folder / "b"), tmp_path / "parts", 2, 1)
        next((tmp_path / "parts").glob("*.safetensors")).unlink()
        with pytest.raises(InputError, match="safetensors"):
            measured(tmp_path / "parts")
