"""Mixtures of experts on a CPU: the router's choice, and the experts, by the compiled kernels.

Legend: T tokens, E experts, k experts of a token, H hidden, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import ACTIVATIONS, SWIGLU_CLAMPED, address
from llmkit.kernels.cpu.cpu_linear import CpuLinear

MAX_EXPERTS = 1024  # of a layer
LINEAR_FIELDS = 12  # of a linear layer of an expert; see ExpertLinear in cpu_kernels.h


def select_experts(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    expert_scales: torch.Tensor | None,
    num_experts_per_tok: int,
    *,
    num_groups: int,
    topk_groups: int,
    scoring: str,
    normalize: bool,
    group_max: bool,
    softcap: float | None,
    scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `router.select_experts`. logits: contiguous float32 [T, E], at most MAX_EXPERTS."""
    assert cpu_kernels.library is not None
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, num_experts_per_tok)
    ids = torch.empty(num_tokens, num_experts_per_tok, dtype=torch.int64)
    cpu_kernels.library.select_experts(
        logits.data_ptr(),
        address(correction_bias),
        address(expert_scales),
        weights.data_ptr(),
        ids.data_ptr(),
        num_tokens,
        num_experts,
        num_experts_per_tok,
        num_groups,
        topk_groups,
        scoring == "sigmoid",
        normalize,
        group_max,
        softcap or 0.0,
        scaling_factor,
    )
    return weights, ids


class CpuExperts:
    """The experts of a layer: sum over a token's experts of weight * down(act(gate_up(x))).

    gate_up, down: the linear layers of each expert; None: the expert is on another rank. An MLP
    without a gate has `up` in the place of `gate_up`.
    """

    def __init__(
        self,
        gate_up: Sequence[CpuLinear | None],
        down: Sequence[CpuLinear | None],
        *,
        gated: bool,
        activation: str,
        swiglu: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """activation: of `cpu_kernels.ACTIVATIONS`, or "swiglu_clamped". swiglu: limit, alpha."""
        self._linears = torch.zeros(len(down), 2, LINEAR_FIELDS, dtype=torch.int64)
        self._kept: list[object] = []  # what the addresses point to
        self._gated = gated
        is_clamped = activation == "swiglu_clamped"
        self._activation = SWIGLU_CLAMPED if is_clamped else ACTIVATIONS[activation]
        self._swiglu = swiglu
        self._intermediate_size = 0
        for expert, pair in enumerate(zip(gate_up, down, strict=True)):
            for which, linear in enumerate(pair):
                if linear is None:
                    continue
                self._linears[expert, which] = torch.tensor(linear.fields)
                self._kept.append(linear)
                if which == 1:
                    self._intermediate_size = linear.in_features

    @staticmethod
    def supports(linears: Sequence[CpuLinear | None]) -> bool:
        """Whether each of these linears of experts has one weight."""
        few = len(linears) <= MAX_EXPERTS
        return few and all(one is None or one.only_segment is not None for one in linears)

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """x: contiguous float32 [T, H]; topk_ids: int64 [T, k]; topk_weights: float32 [T, k].

        Returns [T, H]. A token's outputs are added in the order of its ids.
        """
        assert cpu_kernels.library is not None
        y = torch.empty_like(x)
        num_tokens, hidden_size = x.shape
        cpu_kernels.library.experts(
            x.data_ptr(),
            y.data_ptr(),
            topk_ids.data_ptr(),
            topk_weights.data_ptr(),
            num_tokens,
            topk_ids.shape[1],
            hidden_size,
            self._intermediate_size,
            self._linears.data_ptr(),
            len(self._linears),
            self._gated,
            self._activation,
            *self._swiglu,
        )
        return y
