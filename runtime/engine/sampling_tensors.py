"""The sampling parameters of a step as tensors."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.sequence import Sequence


class SamplingTensors(NamedTuple):
    """The sampling parameters of each sampled row, [n] each, on the CPU.

    They are in the order of `kernels.sampling.sample`.
    """

    temperature: torch.Tensor  # float32
    top_k: torch.Tensor  # int64
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32
    seeds: torch.Tensor  # int64


class SamplingTensorCache:
    """Makes the sampling tensors of a step.

    Most steps have the same sequences as the one before and reuse its tensors.
    """

    def __init__(self) -> None:
        self._params: list[tuple[SamplingParams, int]] = []
        self._tensors: SamplingTensors | None = None

    def get(self, sequences: SequenceOf[Sequence]) -> SamplingTensors:
        """The sampling tensors of `sequences`, one row each."""
        params = [(sequence.request.sampling_params, sequence.seed) for sequence in sequences]
        if self._tensors is None or params != self._params:
            floats = torch.tensor([(p.temperature, p.top_p, p.min_p) for p, _ in params]).T
            integers = torch.tensor([(p.top_k, seed) for p, seed in params]).T
            self._params = params
            self._tensors = SamplingTensors(
                temperature=floats[0],
                top_k=integers[0],
                top_p=floats[1],
                min_p=floats[2],
                seeds=integers[1],
            )
        return self._tensors
