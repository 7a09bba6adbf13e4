"""Quality of what is no whole checkpoint at hand: servers, by what they tell of prompts, and sharded checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serving import ServerProcess, serving
from tiny import tiny_checkpoint

from llmkit.bench.bench import BenchOptions, bench
from llmkit.bench.load import find_server
from llmkit.bench.metrics import BOUNDS, QUALITY
from llmkit.bench.quality_url import Asked, Told, score_told, way_to_ask
from llmkit.bench.report import TargetReport
from llmkit.bench.whole import whole
from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.checkpoint.progress import SilentProgress
from llmkit.checkpoint.source import open_checkpoint
from llmkit.cli import main
from llmkit.shard.shard import shard

OPTIONS = BenchOptions(speed=False, windows=2, window_tokens=48, device="cpu")
pytestmark = pytest.mark.usefixtures("short_builtin_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_checkpoint(path / "a", seed=0)
    tiny_checkpoint(path / "b", seed=1)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    """Serves b."""
    with serving(folder / "log", folder / "b") as running:
        yield running


def measured(*targets: object, options: BenchOptions = OPTIONS) -> list[TargetReport]:
    return bench([str(target) for target in targets], options, SilentProgress()).targets


class TestServers:
    def test_perplexity_is_exact_and_kl_a_bound(self, folder: Path, server: ServerProcess) -> None:
        _, exact = measured(folder / "a", folder / "b")
        gates = ("mean_kl_bound>0", "top1>=0", "perplexity>=baseline*0")
        _, told = measured(folder / "a", server.url, options=replace(OPTIONS, gates=gates))
        assert told.kind == "url"
        assert told.metrics.keys() == {"perplexity", *BOUNDS}
        assert told.metrics["perplexity"] == pytest.approx(exact.metrics["perplexity"], rel=1e-4)
        # The last place of a window counts for models at hand only: 47 of 48 are the same.
        assert 0 < told.metrics["mean_kl_bound"] < 1.05 * exact.metrics["mean_kl"]
        assert told.metrics["max_kl_bound"] <= exact.metrics["max_kl"] * 1.0001
        assert told.metrics["top1"] == pytest.approx(exact.metrics["top1"], abs=0.03)
        assert "mean_kl" in " ".join(told.absent)

    def test_a_server_is_no_further_from_its_checkpoint_than_nothing(self, folder: Path, server: ServerProcess) -> None:
        for pair in ((folder / "b", server.url), (server.url, folder / "b")):
            base, other = measured(*pair)
            assert other.metrics["max_kl_bound"] == pytest.approx(0, abs=1e-5)
            assert other.metrics["top1"] == 1
            assert base.metrics["perplexity"] == pytest.approx(other.metrics["perplexity"], rel=1e-5)

    def test_without_a_checkpoint(self, folder: Path, server: ServerProcess) -> None:
        options = replace(OPTIONS, tokenizer=str(folder / "a"), baseline=server.url)
        base, other = measured(f"{server.url}/v1", options=options)
        assert other.metrics["perplexity"] == base.metrics["perplexity"]
        assert other.metrics["max_kl_bound"] == pytest.approx(0, abs=1e-5)

    def test_echo_gives_the_same_perplexity_and_no_tokens(self, folder: Path, server: ServerProcess) -> None:
        found = find_server(server.url)
        assert way_to_ask(found) == "ids"
        windows = torch.arange(20, 84).reshape(2, 32)
        by_ids, _ = score_told(Asked(found, "ids").told(windows), None, windows)
        by_echo, _ = score_told(Asked(found, "echo").told(windows), None, windows)
        assert by_echo == {"perplexity": pytest.approx(by_ids["perplexity"], rel=1e-6)}
        assert score_told(Asked(found, "echo").told(windows), Asked(found, "ids").told(windows), windows)[0] == by_echo

    def test_a_gate_on_what_a_server_cannot_tell(self, folder: Path, server: ServerProcess) -> None:
        with pytest.raises(UsageError, match="on mean_kl, which is not measured for"):
            measured(folder / "a", server.url, options=replace(OPTIONS, gates=("mean_kl<=1",)))


@pytest.mark.parametrize("seed", range(3))
def test_what_is_told_bounds_the_divergence_from_below(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    window = torch.randint(0, 40, (1, 9), generator=generator)
    p, q = torch.randn(2, 9, 40, generator=generator).double() * 2

    def told(logits: torch.Tensor, count: int) -> Told:
        every = torch.log_softmax(logits[:-1], -1)
        logs, tokens = every.topk(count)
        return Told(every.gather(1, window[0, 1:, None])[:, 0], tokens, logs)

    logs_p, logs_q = torch.log_softmax(p[:-1], -1), torch.log_softmax(q[:-1], -1)
    exact = float((logs_p.exp() * (logs_p - logs_q)).sum(-1).mean())
    bounds = []
    for mine, base in ((told(q, 40), p), (told(q, 10), p), (told(q, 3), p), (q, told(p, 10)), (told(q, 5), told(p, 5))):
        figures, base_perplexity = score_told(iter([mine]), iter([base]), window)
        bounds.append(figures["mean_kl_bound"])
        assert figures["top1"] == float((p[:-1].argmax(-1) == q[:-1].argmax(-1)).double().mean())
        assert base_perplexity is not None
    assert bounds[0] == pytest.approx(exact, rel=1e-4), "all tokens are told of"
    assert bounds[2] <= bounds[1] <= bounds[0], "fewer tokens, a lower bound"
    assert all(0 <= bound <= exact * 1.0001 for bound in bounds)


class TestLayouts:
    @pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
    def test_a_layout_scores_what_its_whole_does(self, folder: Path, tmp_path: Path, tp: int, pp: int) -> None:
        shard(str(folder / "b"), tmp_path / "parts", tp, pp)
        _, together, parts = measured(folder / "a", folder / "b", tmp_path / "parts")
        assert {name: parts.metrics[name] for name in ("perplexity", *QUALITY)} == {
            name: together.metrics[name] for name in ("perplexity", *QUALITY)
        }

    def test_of_int4_too(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "int4"
        quantize = ["quantize", str(folder / "b"), "--method", "rtn", "--group-size", "32", "-o", str(out)]
        assert main.run([*quantize, "--no-eval", "-q"]) == 0
        shard(str(out), tmp_path / "parts", 2, 1)
        original, joined = open_checkpoint(out), whole(open_checkpoint(tmp_path / "parts"))
        assert joined.tensors.keys() == original.tensors.keys()
        for name in original.tensors:
            assert torch.equal(joined.read(name), original.read(name)), name
        assert whole(original) is original

    def test_ranks_that_are_not_all_there(self, folder: Path, tmp_path: Path) -> None:
        shard(str(folder / "b"), tmp_path / "parts", 2, 1)
        next((tmp_path / "parts").glob("*.safetensors")).unlink()
        with pytest.raises(InputError, match="safetensors"):
            measured(tmp_path / "parts")
