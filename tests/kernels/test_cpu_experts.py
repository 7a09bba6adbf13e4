"""The compiled router and experts against torch's, at every level of instructions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cpu_levels import computing_at

from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_experts import MAX_EXPERTS, CpuExperts
from llmkit.kernels.cpu.cpu_kernels import PackedWeight
from llmkit.kernels.cpu.cpu_linear import CpuLinear
from llmkit.kernels.elementwise import act, act_and_mul, apply_gate, cat_heads, swiglu_clamped
from llmkit.model.linear import pack_weight
from llmkit.model.router import select_experts
from llmkit.model.spec import MoeSpec
from llmkit.quant.grid import round_to_nearest

pytestmark = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)


@pytest.fixture(autouse=True, params=cpu_kernels.levels() or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test at every level that this processor has."""
    with computing_at(request.param), torch.inference_mode():
        yield


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MOE = MoeSpec(num_experts=8, num_experts_per_tok=3, intermediate_size=1, norm_topk_prob=True)
ROUTERS: dict[str, tuple[dict[str, Any], bool, bool]] = {  # with a correction bias, with scales
    "softmax": ({}, False, False),
    "not normalized": ({"norm_topk_prob": False}, False, False),
    "sigmoid": ({"scoring": "sigmoid"}, False, False),
    "sigmoid, bias": ({"scoring": "sigmoid", "routed_scaling_factor": 2.5}, True, False),
    "softmax, bias": ({}, True, False),
    "softcap": ({"scoring": "sigmoid", "router_logit_softcapping": 1.5}, True, False),
    "groups": ({"scoring": "sigmoid", "num_groups": 4, "topk_groups": 2}, True, False),
    "groups by their best": (
        {"num_groups": 4, "topk_groups": 2, "group_score": "max"},
        False,
        False,
    ),
    "scales": ({}, False, True),
    "odd": ({"num_experts": 37, "num_experts_per_tok": 37}, False, False),
    "one": ({"num_experts": 1, "num_experts_per_tok": 1}, False, False),
    "most": ({"num_experts": MAX_EXPERTS, "num_experts_per_tok": 8}, True, False),
    "groups of 128": (
        {"num_experts": 256, "num_groups": 2, "topk_groups": 1, "num_experts_per_tok": 8},
        True,
        True,
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_cpu_router_chooses_and_weights_as_torch(name: str, monkeypatch: Any) -> None:
    changes, has_bias, has_scales = ROUTERS[name]
    moe = replace(MOE, **changes)
    bias = random(moe.num_experts, seed=1) * 0.3 if has_bias else None
    scales = random(moe.num_experts, seed=2) if has_scales else None
    logits = random(40, moe.num_experts, seed=3) * 2
    weights, ids = select_experts(logits, moe, bias, scales)
    one_by_one = [select_experts(logits[t : t + 1], moe, bias, scales) for t in range(len(logits))]
    assert torch.equal(weights, torch.cat([pair[0] for pair in one_by_one]))
    assert torch.equal(ids, torch.cat([pair[1] for pair in one_by_one]))
    monkeypatch.setattr(cpu_kernels, "library", None)
    expected_weights, expected_ids = select_experts(logits, moe, bias, scales)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7)


def test_cpu_router_takes_the_first_of_equal_experts() -> None:
    _, ids = select_experts(torch.zeros(2, 8), MOE, None)
    assert ids.tolist() == [[0, 1, 2]] * 2
    grouped = replace(MOE, num_groups=4, topk_groups=2, num_experts_per_tok=4)
    bias = torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1])
    assert select_experts(torch.zeros(1, 8), grouped, bias)[1].tolist() == [[2, 3, 6, 7]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_cpu_router_keeps_nan_and_valid_ids(scoring: Any) -> None:
    moe = replace(MOE, scoring=scoring, num_groups=4, topk_groups=2)
    logits = random(3, 8)
    clean, clean_ids = select_experts(logits, moe, None)
    logits[1, 5] = float("nan")
    weights, ids = select_experts(logits, moe, None)
    assert weights[1].isnan().all()
    assert sorted(set(ids[1].tolist())) == sorted(ids[1].tolist())
    assert 0 <= ids.min() <= ids.max() < 8
    assert torch.equal(weights[::2], clean[::2])
    assert torch.equal(ids[::2], clean_ids[::2])


WEIGHTS: dict[str, Scheme | torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": Scheme(8),
    "int4": Scheme(4, 32, symmetric=False),
    "int4 symmetric": Scheme(4, 32),
    "fp4": None,
}
HIDDEN, INTERMEDIATE, EXPERTS = 96, 160, 6


def expert_linears(
    weight: Scheme | torch.dtype | None,
    rows: int,
    columns: int,
    has_bias: bool,
    inputs: Any,
    seed: int,
) -> list[CpuLinear]:
    found = []
    for expert in range(EXPERTS):
        values = random(rows, columns, seed=seed + expert) / columns**0.5
        bias = random(rows, seed=seed + 50 + expert) if has_bias else None
        if weight is None:
            codes = ((values * 1e4).int() % 16).to(torch.uint8)
            scales = values[:, ::32].abs() / 4
            packed = PackedWeight.pack(codes, scales, four_bit_type="fp4")
        elif isinstance(weight, Scheme):
            packed = pack_weight(round_to_nearest(values, weight, torch.float32))
        else:
            packed = pack_weight(values.to(weight))
        found.append(CpuLinear([packed], bias, inputs=inputs))
    return found


def by_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    first: list[CpuLinear],
    down: list[CpuLinear],
    activation: str,
) -> torch.Tensor:
    """The same by calls of the linear kernel, one token and expert at a time, added in torch."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(*(torch.arange(n) for n in ids.shape)).tolist():
        expert = int(ids[token, slot])
        y = first[expert](x[token : token + 1])
        if activation == "relu2":
            y = act(y, "relu2")
        elif activation == "swiglu_clamped":
            y = swiglu_clamped(y, 0.7, 1.5)
        else:
            y = act_and_mul(y, activation)  # type: ignore[arg-type]
        out[token] += weights[token, slot].double() * down[expert](y)[0].double()
    return out


def choices(tokens: int, per: int, seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    ids = random(tokens, EXPERTS, seed=seed).topk(per).indices
    return ids, random(tokens, per, seed=seed + 1)


@pytest.mark.parametrize("inputs", ["float32", "int8", "bfloat16"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_cpu_experts_match_single_linears_and_do_not_depend_on_the_batch(
    name: str, inputs: Any
) -> None:
    first = expert_linears(WEIGHTS[name], 2 * INTERMEDIATE, HIDDEN, True, inputs, 100)
    down = expert_linears(WEIGHTS[name], HIDDEN, INTERMEDIATE, True, inputs, 300)
    if inputs not in [one.only_segment[2] for one in first if one.only_segment]:
        pytest.skip("inputs of this type are for other weights or levels")
    experts = CpuExperts(first, down, gated=True, activation="silu")
    x = random(23, HIDDEN)
    ids, weights = choices(23, 3)
    y = experts(x, ids, weights)
    for begin, end in ((0, 1), (4, 9), (22, 23)):
        part = experts(x[begin:end], ids[begin:end], weights[begin:end])
        assert torch.equal(part, y[begin:end])
    order = torch.arange(22, -1, -1)
    assert torch.equal(experts(x[order], ids[order], weights[order]), y[order])
    expected = by_experts(x, ids, weights, first, down, "silu")
    assert (y.double() - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu2", "swiglu_clamped"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_cpu_experts_with_each_activation(activation: str, has_bias: bool) -> None:
    gated = activation != "relu2"
    rows = INTERMEDIATE * (2 if gated else 1)
    first = expert_linears(torch.float32, rows, HIDDEN, has_bias, "float32", 100)
    down = expert_linears(torch.float32, HIDDEN, INTERMEDIATE, has_bias, "float32", 300)
    experts = CpuExperts(first, down, gated=gated, activation=activation, swiglu=(0.7, 1.5))
    x = random(5, HIDDEN)
    ids, weights = choices(5, 2)
    expected = by_experts(x, ids, weights, first, down, activation)
    y = experts(x, ids, weights)
    assert (y.double() - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_cpu_experts_on_other_ranks_add_nothing() -> None:
    first = expert_linears(torch.bfloat16, 2 * INTERMEDIATE, HIDDEN, True, "float32", 100)
    down = expert_linears(torch.bfloat16, HIDDEN, INTERMEDIATE, True, "float32", 300)
    x = random(7, HIDDEN)
    ids, weights = choices(7, 4)
    total = torch.zeros(x.shape)
    for held in (range(2), range(2, 6)):
        mine = [
            [one if i in held else None for i, one in enumerate(all_)] for all_ in (first, down)
        ]
        total += CpuExperts(mine[0], mine[1], gated=True, activation="silu")(x, ids, weights)
    together = CpuExperts(first, down, gated=True, activation="silu")(x, ids, weights)
    torch.testing.assert_close(total, together, rtol=1e-5, atol=1e-5)
    none = CpuExperts([None] * 6, [None] * 6, gated=True, activation="silu")(x, ids, weights)
    assert torch.equal(none, torch.zeros(x.shape))


def test_cpu_experts_run_many_tokens_in_parts() -> None:
    """A part has at most EXPERTS_BYTES of intermediate results: 2048 tokens of this width."""
    hidden, intermediate = 1024, 512
    first = [CpuLinear([pack_weight(random(2 * intermediate, hidden) / 32)])]
    down = [CpuLinear([pack_weight(random(hidden, intermediate, seed=1) / 32)])]
    experts = CpuExperts(first, down, gated=True, activation="silu")
    x = random(1, hidden).expand(4200, hidden).contiguous()
    x[-1] *= 0.5
    ids = torch.zeros(4200, 2, dtype=torch.int64)
    y = experts(x, ids, torch.full((4200, 2), 0.5))
    assert torch.equal(y[:-1], y[:1].expand(4199, hidden))
    assert torch.equal(y[-1:], experts(x[-1:], ids[-1:], torch.full((1, 2), 0.5)))


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "softplus"])
@pytest.mark.parametrize("columns", [1, 37])
def test_cpu_gates_match_torch(activation: Any, columns: int, monkeypatch: Any) -> None:
    x = random(9, 37)
    gate = (random(9, 40, seed=1) * 12)[:, :columns]
    y = apply_gate(x, gate, activation)
    monkeypatch.setattr(cpu_kernels, "library", None)
    torch.testing.assert_close(y, apply_gate(x, gate, activation), rtol=2e-6, atol=1e-12)


def test_cpu_heads_are_joined_as_torch_joins_them(monkeypatch: Any) -> None:
    qkv = random(5, 6, 7)
    joined = cat_heads((qkv, qkv[:, 4:]))
    monkeypatch.setattr(cpu_kernels, "library", None)
    assert torch.equal(joined, cat_heads((qkv, qkv[:, 4:])))
