"""Mixtures of experts, shared by the tests under the interpreter and on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llmkit.kernels.elementwise import gated
from llmkit.kernels.experts import Experts, shelve, side_by_side
from llmkit.model.decoder import DecoderLayer


@dataclass(frozen=True)
class Mixture:
    """Some tokens, and experts of which a rank holds `held` from `first` on."""

    tokens: int
    per: int
    count: int
    hidden: int
    inner: int
    first: int = 0
    held: int = 0  # 0: all
    gelu: bool = False
    spread: bool = True  # or all tokens choose the same

    @property
    def label(self) -> str:
        """The name of the test."""
        part = f", {self.held} from {self.first}" if self.held else ""
        flags = f"{', gelu' * self.gelu}{', one place' * (not self.spread)}"
        return f"{self.tokens} tokens, {self.per} of {self.count}{part}, {self.hidden} x {self.inner}{flags}"


MIXTURES = [
    Mixture(1, 2, 8, 64, 96),
    Mixture(5, 8, 20, 96, 72),
    Mixture(3, 1, 1, 64, 64),
    Mixture(40, 2, 4, 72, 40, gelu=True),
    Mixture(33, 2, 3, 128, 130, spread=False),
    Mixture(300, 4, 6, 64, 48),
    Mixture(700, 2, 8, 48, 32, first=2, held=3),
    Mixture(2, 2, 8, 64, 64, first=6, held=2),
]

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, bool]


def mixture_arguments(case: Mixture, dtype: torch.dtype, seed: int = 0) -> Arguments:
    """Of `mixed`."""
    draw, held = torch.Generator().manual_seed(seed), case.held or case.count
    x = torch.randn(case.tokens, case.hidden, generator=draw)
    scores = torch.rand(case.tokens if case.spread else 1, case.count, generator=draw).expand(case.tokens, -1)
    weights, chosen = scores.topk(case.per)
    gate_up = torch.randn(held, 2 * case.inner, case.hidden, generator=draw) / case.hidden**0.5
    down = torch.randn(held, case.hidden, case.inner, generator=draw) / case.inner**0.5
    return (x.to(dtype), chosen.contiguous(), weights.contiguous(), gate_up.to(dtype), down.to(dtype), case.first,
            case.count, case.gelu)  # fmt: skip


def mixed(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    first: int, count: int, gelu: bool,
) -> torch.Tensor:  # fmt: skip
    """By the kernels."""
    names = [f"mlp.experts.{first + i}.{kind}.weight" for i in range(len(down)) for kind in ("gate_up", "down")]
    shelves: dict[str, list[torch.Tensor]] = {}
    parts = [part for pair in zip(gate_up, down, strict=True) for part in pair]
    put = [shelve(shelves, name, part, len(down)) for name, part in zip(names, parts, strict=True)]
    stacks = side_by_side(put[::2]), side_by_side(put[1::2])
    assert stacks[0] is not None and stacks[1] is not None
    return Experts(stacks[0], stacks[1], first, count, gelu)(x, chosen, weights)


def expected(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    first: int, count: int, gelu: bool,
) -> torch.Tensor:  # fmt: skip
    """In float64, choice by choice."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, place in torch.cartesian_prod(*map(torch.arange, chosen.shape)).view(-1, 2).tolist():
        expert = int(chosen[token, place]) - first
        if 0 <= expert < len(down):
            both = (x[token].double() @ gate_up[expert].double().T)[None]
            inner = gated(both, "gelu_tanh" if gelu else "silu")
            out[token] += weights[token, place].double() * (inner @ down[expert].double().T)[0]
    return out


def interpreted_mixed(*arguments: Any) -> torch.Tensor:
    """`mixed`, with the tiles of a Hopper GPU."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    return mixed(*arguments)


def put_together(layer: DecoderLayer) -> None:
    """Lay its experts side by side, as the loader does on a GPU."""
    names, shelves = [name for name in layer.linears if ".experts." in name], dict[str, list[torch.Tensor]]()
    for name in names:
        layer.linears[name].weight = shelve(shelves, name, layer.linears[name].weight, len(names) // 2)
    layer.__dict__.pop("together", None)
