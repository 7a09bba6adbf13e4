"""Logistic regression with a ridge penalty, for soft labels, and its out-of-sample predictions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FOLDS = 5
_STEPS = 60  # of Newton's method, which needs about ten
_TOLERANCE = 1e-9
_LEAST_STD = 1e-9  # a feature with less spread says nothing


@dataclass(frozen=True)
class LogisticFit:
    """P = 1 / (1 + exp(-(bias + features @ weights))), features in their own units."""

    bias: float
    weights: Array  # [F]

    def predict(self, features: Array) -> Array:
        """Probabilities [n] for features [n, F]."""
        return _sigmoid(self.bias + features @ self.weights)


def fit_logistic(features: Array, labels: Array, ridge: float) -> LogisticFit:
    """Fit features [n, F] to labels [n] from 0 to 1, by Newton's method.

    ridge: the penalty on the squared weights of standardized features (Hastie, Tibshirani and
    Friedman, The Elements of Statistical Learning, 2nd ed., section 4.4).
    """
    mean = features.mean(0)
    std = features.std(0)
    std = np.where(std < _LEAST_STD, np.inf, std)
    count, width = features.shape
    design = np.concatenate([np.ones((count, 1)), (features - mean) / std], axis=1)
    penalty = np.full(width + 1, ridge)
    penalty[0] = 1e-6  # keeps the bias finite where all labels are alike
    weights = np.zeros(width + 1)
    for _ in range(_STEPS):
        predicted = _sigmoid(design @ weights)
        gradient = design.T @ (predicted - labels) + penalty * weights
        spread = np.maximum(predicted * (1 - predicted), 1e-6)
        hessian = (design * spread[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        # A step that is too long overshoots where the labels can be separated.
        length = float(np.abs(step).max())
        weights = weights - step * min(1.0, 5.0 / max(length, 1e-12))
        if length < _TOLERANCE:
            break
    scaled = weights[1:] / std
    return LogisticFit(float(weights[0] - scaled @ mean), scaled)


def held_out_predictions(features: Array, labels: Array, ridge: float, seed: int) -> Array:
    """Predictions [n], each by a fit without a fifth of the prompts to which it belongs."""
    count = len(labels)
    fold = np.random.default_rng(seed).permutation(count) % FOLDS
    predictions = np.zeros(count)
    for number in range(FOLDS):
        held_out = fold == number
        fit = fit_logistic(features[~held_out], labels[~held_out], ridge)
        predictions[held_out] = fit.predict(features[held_out])
    return predictions


def best_ridge(features: Array, labels: Array, ridges: tuple[float, ...], seed: int) -> float:
    """The ridge whose held-out predictions have the lowest cross-entropy."""

    def cross_entropy(ridge: float) -> float:
        p = np.clip(held_out_predictions(features, labels, ridge, seed), 1e-6, 1 - 1e-6)
        return float(-(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean())

    return min(ridges, key=cross_entropy)


def _sigmoid(scores: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
