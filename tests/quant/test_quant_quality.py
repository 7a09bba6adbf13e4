"""Quality figures against direct formulas."""

from __future__ import annotations

import math

import pytest
import torch

from llmkit.quant import output_quality
from llmkit.quant.output_quality import score_logits


def logits(seed: int, count: int = 3, length: int = 40, vocab: int = 50) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, vocab, generator=generator) * 2 for _ in range(count)]


WINDOWS = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(9))


def test_score_logits_follows_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        output_quality, "_CHUNK_ELEMENTS", 7 * 50
    )  # 7 rows at a time: windows end within a chunk
    model = logits(0)
    reference = logits(1)
    got = score_logits(model, reference, WINDOWS)
    p, q = (torch.stack(values).double().log_softmax(-1) for values in (reference, model))
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    assert got.mean_kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert got.p99_kl == pytest.approx(
        kl.sort().values[math.ceil(0.99 * len(kl)) - 1].item(), rel=1e-5
    )
    assert got.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    for values, perplexity in ((q, got.perplexity), (p, got.reference_perplexity)):
        targets = values[:, :-1].gather(2, WINDOWS[:, 1:, None])
        assert perplexity == pytest.approx(math.exp(-targets.mean().item()), rel=1e-5)
    assert got.tokens == 120


def test_score_logits_of_a_model_and_itself_is_perfect() -> None:
    got = score_logits(logits(0), logits(0), WINDOWS)
    assert (got.mean_kl, got.p99_kl, got.top1) == (0.0, 0.0, 1.0)
    assert got.perplexity == got.reference_perplexity


def test_score_logits_without_a_reference_gives_only_perplexity() -> None:
    got = score_logits(logits(0), None, WINDOWS)
    assert got.perplexity == score_logits(logits(0), logits(1), WINDOWS).perplexity
    assert (got.reference_perplexity, got.mean_kl, got.p99_kl, got.top1) == (None, None, None, None)


def test_perplexity_of_a_hopeless_model_is_finite() -> None:
    sure = torch.full((1, 4, 8), -1e6)
    sure[:, :, 0] = 0
    assert score_logits(list(sure), None, torch.full((1, 4), 3)).perplexity == math.exp(700)
