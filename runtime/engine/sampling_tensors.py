"""The sampling parameters of a step as tensors."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from llmkit.kernels.device_copy import to_device
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


def num_packed_values(num_rows: int) -> int:
    """int64 values for three int64 and three float32 parameters of each row."""
    return 9 * _aligned(num_rows) // 2


def packed_views(values: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first int64 values: float32 [3, rows] and int64 [3, rows].

    They are temperature, top_p and min_p; and top_k, seeds and counters. Where `values` is aligned
    to 16 bytes, each of the six is, too: Triton compiles another kernel for other alignments.
    """
    size = 3 * _aligned(num_rows)
    integers = values[:size].view(3, -1)[:, :num_rows]
    floats = values[size:].view(torch.float32)[:size].view(3, -1)[:, :num_rows]
    return floats, integers


def _aligned(num_rows: int) -> int:
    """Rows for which float32 values take a multiple of 16 bytes."""
    return -(-num_rows // 4) * 4


def sampling_tensors_on_device(
    sampling: SamplingTensors, num_sampled: SequenceOf[int], device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Parameters and counters for `kernels.sampling_triton.sample`, after one copy to the device.

    num_sampled: of each row, the output tokens before the one that is sampled.
    """
    num_rows = len(num_sampled)
    host = torch.zeros(num_packed_values(num_rows), dtype=torch.int64)
    floats, integers = packed_views(host, num_rows)
    torch.stack((sampling.temperature, sampling.top_p, sampling.min_p), out=floats)
    torch.stack((sampling.top_k, sampling.seeds, torch.tensor(num_sampled)), out=integers)
    floats, integers = packed_views(to_device(host, device), num_rows)
    temperature, top_p, min_p = floats
    top_k, seeds, counters = integers
    return temperature, top_k, top_p, min_p, seeds, counters


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
            shares = [(p.temperature, p.top_p, p.min_p) for p, _ in params]
            # Parameters may be integers; there may be no sequence.
            floats = torch.tensor(shares, dtype=torch.float32).view(-1, 3).T
            numbers = [(p.top_k, seed) for p, seed in params]
            integers = torch.tensor(numbers, dtype=torch.int64).view(-1, 2).T
            self._params = params
            self._tensors = SamplingTensors(
                temperature=floats[0],
                top_k=integers[0],
                top_p=floats[1],
                min_p=floats[2],
                seeds=integers[1],
            )
        return self._tensors
