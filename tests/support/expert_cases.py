"""Cases for mixtures of experts, for the interpreter and for a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llmkit.kernels.elementwise import Activation, act, act_and_mul
from llmkit.kernels.fused_experts import FusedExperts, copy_to_expert_stack, stack_experts
from llmkit.model.decoder import DecoderLayer


@dataclass(frozen=True)
class MoeCase:
    """Some tokens, and experts of which a rank holds `held` from `first` on."""

    tokens: int
    per: int
    count: int
    hidden: int
    inner: int
    first: int = 0
    held: int = 0  # 0: all
    activation: Activation = "silu"  # "relu2": of experts without a gate
    spread: bool = True  # or all tokens choose the same

    @property
    def label(self) -> str:
        """The name of the test."""
        part = f", {self.held} from {self.first}" if self.held else ""
        activation = "" if self.activation == "silu" else f", {self.activation}"
        flags = f"{activation}{', one place' * (not self.spread)}"
        experts = f"{self.per} of {self.count}{part}"
        return f"{self.tokens} tokens, {experts}, {self.hidden} x {self.inner}{flags}"


GPT_OSS_LIMIT = 1.0
GPT_OSS_ALPHA = 1.702
MOE_CASES = [
    MoeCase(1, 2, 8, 64, 96),
    MoeCase(5, 8, 20, 96, 72),
    MoeCase(3, 1, 1, 64, 64),
    MoeCase(40, 2, 4, 72, 40, activation="gelu_tanh"),
    MoeCase(150, 2, 4, 72, 40, activation="relu2"),
    MoeCase(33, 2, 3, 128, 130, spread=False),
    MoeCase(300, 4, 6, 64, 48),
    MoeCase(700, 2, 8, 48, 32, first=2, held=3),
    MoeCase(2, 2, 8, 64, 64, first=6, held=2),
]

Arguments = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, Activation
]


def moe_arguments(case: MoeCase, dtype: torch.dtype, seed: int = 0) -> Arguments:
    """Of `run_fused_experts`."""
    draw = torch.Generator().manual_seed(seed)
    held = case.held or case.count
    x = torch.randn(case.tokens, case.hidden, generator=draw)
    scores = torch.rand(case.tokens if case.spread else 1, case.count, generator=draw).expand(
        case.tokens, -1
    )
    weights, chosen = scores.topk(case.per)
    rows = case.inner if case.activation == "relu2" else 2 * case.inner
    gate_up = torch.randn(held, rows, case.hidden, generator=draw) / case.hidden**0.5
    down = torch.randn(held, case.hidden, case.inner, generator=draw) / case.inner**0.5
    return (
        x.to(dtype),
        chosen.contiguous(),
        weights.contiguous(),
        gate_up.to(dtype),
        down.to(dtype),
        case.first,
        case.count,
        case.activation,
    )


def run_fused_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    first: int,
    count: int,
    activation: Activation,
) -> torch.Tensor:
    """By the kernels."""
    names = [
        f"mlp.experts.{first + i}.{kind}.weight"
        for i in range(len(down))
        for kind in ("gate_up", "down")
    ]
    expert_stacks: dict[str, list[torch.Tensor]] = {}
    parts = [part for pair in zip(gate_up, down, strict=True) for part in pair]
    put = [
        copy_to_expert_stack(expert_stacks, name, part, len(down))
        for name, part in zip(names, parts, strict=True)
    ]
    stacks = stack_experts(put[::2]), stack_experts(put[1::2])
    assert stacks[0] is not None and stacks[1] is not None
    experts = FusedExperts(
        *stacks,
        first,
        count,
        gelu=activation == "gelu_tanh",
        relu2=activation == "relu2",
    )
    return experts(x, chosen, weights)


def expected(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    first: int,
    count: int,
    activation: Activation,
) -> torch.Tensor:
    """In float64, choice by choice."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, place in torch.cartesian_prod(*map(torch.arange, chosen.shape)).view(-1, 2).tolist():
        expert = int(chosen[token, place]) - first
        if 0 <= expert < len(down):
            both = (x[token].double() @ gate_up[expert].double().T)[None]
            inner = (
                act(both, activation) if activation == "relu2" else act_and_mul(both, activation)
            )
            out[token] += weights[token, place].double() * (inner @ down[expert].double().T)[0]
    return out


def run_gpt_oss_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    stacks: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    biases: tuple[torch.Tensor, torch.Tensor],
    first: int,
    count: int,
    factors: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """By the kernels, with the tiles of a Hopper GPU. scales: of stacks in FP4."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    experts = FusedExperts(
        *stacks,
        first,
        count,
        False,
        *biases,
        *scales,
        swiglu=(GPT_OSS_LIMIT, GPT_OSS_ALPHA),
        gate_up_factors=factors[0],
        down_factors=factors[1],
    )
    return experts(x, chosen, weights)


def run_fused_experts_interpreted(*arguments: Any) -> torch.Tensor:
    """`run_fused_experts`, with the tiles of a Hopper GPU."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    return run_fused_experts(*arguments)


def stack_layer_experts(layer: DecoderLayer) -> None:
    """Lay its experts side by side, as the loader does on a GPU."""
    names = [name for name in layer.linears if ".experts." in name]
    expert_stacks = dict[str, list[torch.Tensor]]()
    for name in names:
        layer.linears[name].weight = copy_to_expert_stack(
            expert_stacks, name, layer.linears[name].weight, len(names) // 2
        )
    layer.__dict__.pop("fused_experts", None)
