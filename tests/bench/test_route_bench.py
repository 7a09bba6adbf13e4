"""The fit and the curve of `llmkit bench route`, and its prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llmkit.bench.routing.calibrate_route import parse_tiers
from llmkit.bench.routing.fit_logistic import fit_logistic, held_out_predictions
from llmkit.bench.routing.route_curve import (
    RouteOutcomes,
    area_under_roc,
    threshold_for_share,
)
from llmkit.bench.routing.route_prompts import is_right, read_prompts
from llmkit.common.errors import InputError, UsageError


def test_logistic_fit_minimizes_the_penalized_loss() -> None:
    """torch's L-BFGS finds the same minimum of the same loss."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 3)) * [1, 5, 0.1] + [0, 3, -2]
    labels = 1 / (1 + np.exp(-(features @ [1.0, -0.4, 3.0]))) * 0.9
    fit = fit_logistic(features, labels, ridge=2.0)
    standard = torch.tensor((features - features.mean(0)) / features.std(0))
    target = torch.tensor(labels)
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-10)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = weights[0] + standard @ weights[1:]
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, target, reduction="sum"
        )
        value = value + weights[1:].square().sum()  # half of the ridge of 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    expected = torch.sigmoid(weights[0] + standard @ weights[1:]).detach().numpy()
    assert np.abs(fit.predict(features) - expected).max() < 1e-5


def test_logistic_fit_survives_what_can_be_separated_and_what_is_constant() -> None:
    features = np.array([[0.0, 1.0]] * 10 + [[1.0, 1.0]] * 10)
    labels = np.array([0.0] * 10 + [1.0] * 10)
    predicted = fit_logistic(features, labels, ridge=1.0).predict(features)
    assert predicted[0] < 0.3 and predicted[-1] > 0.7
    alike = fit_logistic(features, np.ones(20), ridge=1.0).predict(features)
    assert np.isfinite(alike).all() and alike.min() > 0.9


def test_held_out_predictions_do_not_know_their_labels() -> None:
    generator = np.random.default_rng(1)
    features = generator.normal(size=(400, 50))
    labels = generator.integers(0, 2, 400).astype(float)
    held_out = held_out_predictions(features, labels, 1.0, seed=0)
    fitted = fit_logistic(features, labels, 1.0).predict(features)
    assert area_under_roc(fitted, labels == 1) > 0.65, "noise can be learned by heart"
    assert abs(area_under_roc(held_out, labels == 1) - 0.5) < 0.1


def outcomes() -> RouteOutcomes:
    small = np.array([1.0, 1.0, 0.0, 0.0])
    ones = np.ones(4)
    return RouteOutcomes(small, ones, 0 * ones + 0.1, 0 * ones + 0.05, ones)


def test_route_curve_has_its_known_points() -> None:
    case = outcomes()
    best = case.oracle((0.0, 0.25, 0.5, 1.0))
    assert [point.quality for point in best] == [0.5, 0.75, 1.0, 1.0]
    assert [point.gap for point in best] == [0.0, 0.5, 1.0, 1.0]
    assert best[0].cost == pytest.approx(0.1)
    assert best[2].cost == pytest.approx((2 * 0.1 + 2 * 1.05) / 4)
    drawn = case.random((0.0, 0.5, 1.0))
    assert [point.gap for point in drawn] == [0.0, 0.5, 1.0]
    assert drawn[2].cost == 1.0, "a request that is sent at random asks one tier only"
    worst = case.curve(-case.small_quality, (0.5,))
    assert worst[0].quality == 0.5
    same = RouteOutcomes(*[np.ones(4)] * 5)
    assert math.isnan(same.oracle((0.5,))[0].gap), "there is no gap"


def test_threshold_never_exceeds_the_share() -> None:
    scores = np.array([0.1, 0.2, 0.2, 0.2, 0.9])
    for share in (0.05, 0.2, 0.4, 0.5, 0.8, 0.99):
        assert (scores < threshold_for_share(scores, share)).mean() <= share
    assert threshold_for_share(scores, 0.2) == 0.2
    assert (scores < threshold_for_share(scores, 1.0)).all()


def test_builtin_questions_have_answers() -> None:
    prompts = read_prompts("builtin")
    assert len(prompts) == len({prompt.question for prompt in prompts}) == 171
    assert all(is_right(reference, (reference,)) for p in prompts for reference in p.references)
    assert is_right("The capital is PARIS.", ("Paris",))
    assert not is_right("Parisian", ("Paris",)) and not is_right("", ("Paris",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ", line 2: not JSON"),
        ("[]", ", line 2 is not an object"),
        ('{"text": "a"}', ", line 2 has neither `prompt` nor `messages`"),
        ('{"prompt": "a", "reference": 3}', ", line 2: reference is wrong"),
        ('{"prompt": "a"}', "has 2 prompts"),
    ],
)
def test_route_prompts_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + f"\n{line}\n")
    with pytest.raises(InputError) as error:
        read_prompts(str(path))
    assert message in str(error.value)


def test_route_tiers_are_two_with_names() -> None:
    tiers = parse_tiers(["cheap=org/a", "https://host/v1"])
    assert [(tier.name, tier.reference) for tier in tiers] == [
        ("cheap", "org/a"),
        ("large", "https://host/v1"),
    ]
    for words in (["a=x"], ["a=x", "a=y"], ["a=x", "b=y", "c=z"], ["=x", "b=y"]):
        with pytest.raises(UsageError):
            parse_tiers(words)
