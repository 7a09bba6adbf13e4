"""A mixture of experts in three kernel launches on a GPU, without a synchronization with the host.

Legend: T tokens, C experts chosen for each token, E experts on this rank, H hidden,
I intermediate. Choice t * C + c is the c-th expert of token t.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.elementwise import clamped_swiglu
from llmkit.kernels.float_bits import e2m1, e4m3_times_2_to_minus_8, scale_of_byte
from llmkit.kernels.input_quant import InputQuant, quantize_input
from llmkit.kernels.triton_support import (
    device_capability,
    is_amd,
    jit,
    multiplies_from_shared_memory,
    tl,
)

# Each entry: the largest average number of choices per expert, then BM, BN and BK of a tile, warps
# and stages.
TILES = ((16, 16, 64, 128, 4, 4), (64, 64, 128, 64, 8, 4), (1 << 30, 128, 256, 64, 8, 3))
MAX_AMD_STAGES = 3  # the shared memory of a compute unit of gfx90a and gfx942 is 64 KiB


@dataclass(frozen=True)
class FusedExperts:
    """The experts [first, first + E) of a layer with `count` experts.

    gate_up: [E, 2I, H] and down: [E, H, I], each expert's weight contiguous; or in FP4: uint8
    [E, 2I, H / 2] and [E, H, I / 2], with their scales, uint8 [E, 2I, groups of H] and [E, H,
    groups of I]; or in FP8: e4m3 with scales, float32 [E, groups of H, 2I] and [E, groups of I, H].
    group_size: of FP8, as `Fp8BlockLinear` takes it; 0 for others. input_quant: how the inputs of
    FP8 weights are quantized; None: they are not.
    gate_up_factors, down_factors: of FP4 whose scales are e4m3, float32 [E, 2I] and [E, H], see
    `Fp4Expert`; None: scales are e8m0.
    gate_up_bias: [E, 2I]; down_bias: [E, H].
    swiglu: limit and alpha of `elementwise.swiglu_clamped`, in place of silu and gelu.
    relu2: the activation of experts without a gate, relu(x)^2. `gate_up` and what belongs to it
    then have I rows in place of 2I.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    first: int
    count: int
    gelu: bool
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_up_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None
    swiglu: tuple[float, float] | None = None
    group_size: int = 0
    input_quant: InputQuant | None = None
    relu2: bool = False
    gate_up_factors: torch.Tensor | None = None
    down_factors: torch.Tensor | None = None

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts that are on this rank: [T, H].

        x: [T, H]; topk_ids: int64 [T, C]; topk_weights: float32 [T, C].
        """
        num_experts, hidden, intermediate = self.down.shape
        if self.down_scales is not None and not self.group_size:
            intermediate *= 2
        first_activation = 2 if self.gelu else 1
        if self.swiglu is not None:
            first_activation = 3
        if self.relu2:
            first_activation = 4
        limit, alpha = self.swiglu or (0.0, 0.0)
        num_choices = topk_ids.numel()
        x = x.contiguous()
        order = topk_ids.new_empty(num_choices, dtype=torch.int32)
        counts = topk_ids.new_empty(num_experts, dtype=torch.int32)
        activated = x.new_empty(num_choices, intermediate)
        outputs = x.new_zeros(num_choices, hidden)
        BM, BN, BK, warps, stages = _tile(
            num_choices / self.count,
            (0, 0) if self.group_size else device_capability(x.device),
        )
        if is_amd():
            stages = min(stages, MAX_AMD_STAGES)
        max_tiles = num_choices // BM + min(num_experts, num_choices)
        padded_experts = 1 << (num_experts - 1).bit_length()
        with torch.cuda.device_of(x):
            _sort_by_expert_kernel[(num_experts,)](
                topk_ids, order, counts, num_choices, self.first, CHUNK=1024
            )
            for rows, weight, scales, factors, bias, y, activation in (
                (
                    x,
                    self.gate_up,
                    self.gate_up_scales,
                    self.gate_up_factors,
                    self.gate_up_bias,
                    activated,
                    first_activation,
                ),
                (
                    activated,
                    self.down,
                    self.down_scales,
                    self.down_factors,
                    self.down_bias,
                    outputs,
                    0,
                ),
            ):
                is_gated = activation > 0 and not self.relu2
                tile_outputs = BN // 2 if is_gated else BN
                row_scales = None
                if self.input_quant is not None:
                    quantized = quantize_input(rows, self.input_quant)
                    rows = quantized.values
                    row_scales = quantized.scales
                elif self.group_size:
                    weight = weight.view(torch.uint8)
                _fused_moe_kernel[max_tiles, -(-y.shape[1] // tile_outputs)](
                    rows,
                    weight,
                    y,
                    order,
                    counts,
                    topk_weights,
                    scales,
                    factors,
                    row_scales,
                    bias,
                    limit,
                    alpha,
                    weight.stride(0),
                    num_experts,
                    y.shape[1],
                    rows.shape[1],
                    TOP_K=topk_ids.shape[1],
                    ACTIVATION=activation,
                    GATED=is_gated,
                    PADDED_EXPERTS=padded_experts,
                    BM=BM,
                    BN=tile_outputs,
                    BK=BK,
                    GROUP=self.group_size or _fp4_group(weight, scales),
                    FP4=scales is not None and not self.group_size,
                    num_warps=warps,
                    num_stages=stages,
                )
        return outputs.view(*topk_ids.shape, hidden).sum(1)


def _fp4_group(weight: torch.Tensor, scales: torch.Tensor | None) -> int:
    """The size of groups of a weight in FP4, whose bytes hold two values; 0 for dense ones."""
    return 0 if scales is None else 2 * weight.shape[2] // scales.shape[2]


def _tile(choices_per_expert: float, capability: tuple[int, int]) -> tuple[int, ...]:
    """The entry of TILES for this number of choices per expert, without that number.

    The last entry needs a GPU that multiplies from shared memory. FP8 needs twice as many
    registers, for the sum of a group, and never takes it: its capability is (0, 0).
    """
    for max_choices, *tile in TILES[:-2]:
        if choices_per_expert <= max_choices:
            return tuple(tile)
    max_choices, *tile = TILES[-2]
    if choices_per_expert <= max_choices or not multiplies_from_shared_memory(capability[0]):
        return tuple(tile)
    return TILES[-1][1:]


def copy_to_expert_stack(
    expert_stacks: dict[str, list[torch.Tensor]], name: str, weight: torch.Tensor, count: int
) -> torch.Tensor:
    """Copy an expert's weight next to those of the layer's other experts, and return the copy.

    Call it for the `count` experts of a layer in order.
    name: the weight's name ("layers.3.mlp.experts.5.down.weight").
    expert_stacks: the free places for each stack. Pass the same mapping to every call.
    """
    stack_name = re.sub(r"\.experts\.\d+", "", name)
    free_places = expert_stacks.setdefault(stack_name, [])
    if not free_places:
        free_places.extend(weight.new_empty(count, *weight.shape))
    return free_places.pop(0).copy_(weight)


def stack_experts(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """View weights [out, in] that lie in one storage at equal distances as one [E, out, in].

    Returns None for other weights.
    """
    first = weights[0]
    last = weights[-1]
    distance = max(0, last.storage_offset() - first.storage_offset())
    step = distance // max(1, len(weights) - 1)
    stack = first.as_strided((len(weights), *first.shape), (step, *first.stride()))
    for place, weight in zip(stack, weights, strict=True):
        if place.data_ptr() != weight.data_ptr() or place.shape != weight.shape:
            return None
    return stack


def supports(weight: torch.Tensor) -> bool:
    """Whether `FusedExperts` takes these weights: 16-bit, FP4 or FP8, on a GPU."""
    is_known = weight.element_size() == 2 or weight.dtype in (torch.uint8, FP8)
    return tl is not None and weight.is_cuda and is_known


@jit
def _sort_by_expert_kernel(
    topk_ids: tl.tensor,
    order: tl.tensor,
    counts: tl.tensor,
    num_choices: tl.tensor,
    first: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """A program writes one expert's choices to `order`, after those of all previous experts."""
    expert = tl.program_id(0)
    begin = 0
    count = 0
    for writes in tl.static_range(2):  # first find `begin`, then write
        for start in tl.range(0, num_choices, CHUNK):
            choice = start + tl.arange(0, CHUNK)
            inside = choice < num_choices
            chosen = tl.load(topk_ids + choice, mask=inside, other=-1) - first
            if writes:
                own = ((chosen == expert) & inside).to(tl.int32)
                tl.store(order + begin + count + tl.cumsum(own, 0) - 1, choice, mask=own > 0)
                count += tl.sum(own, 0)
            else:
                begin += tl.sum(((chosen >= 0) & (chosen < expert) & inside).to(tl.int32), 0)
    tl.store(counts + expert, count)


@jit
def _fused_moe_kernel(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    order: tl.tensor,
    counts: tl.tensor,
    topk_weights: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    row_scales: tl.tensor,
    bias: tl.tensor,
    limit: tl.tensor,
    alpha: tl.tensor,
    expert_stride: tl.tensor,
    num_experts: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FP4: tl.constexpr,
) -> None:
    """A program computes BN outputs for BM choices of one expert.

    ACTIVATION 1 (silu), 2 (gelu), 3 (clamped SwiGLU) or 4 (squared ReLU): the first product. x has
    a row per token, w is gate_up, and the rows of y are in the order of `order`. GATED: w has the
    rows of the gate, then those of up; not with ACTIVATION 4.
    ACTIVATION 0: the second product. The rows of x are in the order of `order`, w is down, and y
    has a row per choice, weighted by the router.
    GROUP: of a weight in FP8, or with FP4 in FP4; 0 for others.
    FP8: scales are float32. row_scales: of x in FP8. Without them, x has the model's dtype and w
    holds the bits of e4m3.
    FP4: scales are bytes: e8m0, or with `factors` e4m3. The bytes of w hold two columns each. They
    are multiplied by even and odd columns of x in two products.
    """
    e = tl.arange(0, PADDED_EXPERTS)
    tile = tl.program_id(0)
    # Find the expert of this tile: the first whose cumulative number of tiles is above `tile`.
    count = tl.load(counts + e, mask=e < num_experts, other=0)
    tiles = tl.cdiv(count, BM)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if expert >= num_experts:
        return
    begin = tl.sum(tl.where(e < expert, count, 0), 0)
    tile_of_expert = tile - tl.sum(tl.where(e < expert, tiles, 0), 0)
    position = begin + tile_of_expert * BM + tl.arange(0, BM)
    valid = (position < begin + tl.sum(tl.where(e == expert, count, 0), 0))[:, None]
    choice = tl.load(order + position[:, None], mask=valid, other=0).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    k = tl.arange(0, BK)
    row = choice // TOP_K if ACTIVATION else position.to(tl.int64)[:, None]
    expert_row = expert.to(tl.int64) * (N * 2 if GATED else N)
    weight = w + expert.to(tl.int64) * expert_stride
    total = tl.zeros((BM, BN), tl.float32)  # of the gate, or of down
    up = tl.zeros((BM, BN), tl.float32)
    if GROUP > 0 and not FP4:
        num_groups = tl.cdiv(K, GROUP)
        num_rows = N * 2 if GATED else N
        scale_at = scales + expert_row * num_groups + n
        for group in tl.range(0, num_groups):
            column = group * GROUP + tl.arange(0, GROUP)
            part_mask = valid & (column < K)[None, :]
            part = tl.load(x + row * K + column[None, :], mask=part_mask, other=0.0)
            at = weight + n.to(tl.int64) * K + column[:, None]
            inside = (column < K)[:, None] & (n < N)
            factor = 1.0
            if row_scales is not None:
                factor = tl.load(row_scales + row * num_groups + group, mask=valid, other=0.0)
            group_at = scale_at + group * num_rows
            total += _fp8_product(part, at, group_at, inside, n < N) * factor
            if GATED:
                up += _fp8_product(part, at + N * K, group_at + N, inside, n < N) * factor
    elif FP4:
        SCALES: tl.constexpr = "e8m0" if factors is None else "e4m3"
        pair = tl.arange(0, BK // 2)
        for start in tl.range(0, K // 2, BK // 2):
            byte = start + pair
            inside = (byte < K // 2)[:, None] & (n < N)
            part_at = x + row * K + 2 * byte[None, :]
            part_mask = valid & (byte < K // 2)[None, :]
            even = tl.load(part_at, mask=part_mask, other=0.0)
            odd = tl.load(part_at + 1, mask=part_mask, other=0.0)
            at = n.to(tl.int64) * (K // 2) + byte[:, None]
            scale_at = scales + (expert_row + n) * (K // GROUP) + (byte // (GROUP // 2))[:, None]
            low, high = _load_fp4(weight + at, scale_at, inside, SCALES, even.dtype)
            total = tl.dot(even, low, total, input_precision="ieee")
            total = tl.dot(odd, high, total, input_precision="ieee")
            if GATED:
                up_at = weight + at + N * (K // 2)
                up_scale_at = scale_at + N * (K // GROUP)
                low, high = _load_fp4(up_at, up_scale_at, inside, SCALES, even.dtype)
                up = tl.dot(even, low, up, input_precision="ieee")
                up = tl.dot(odd, high, up, input_precision="ieee")
        if factors is not None:
            total *= tl.load(factors + expert_row + n, mask=n < N, other=0.0)
            if GATED:
                up *= tl.load(factors + expert_row + N + n, mask=n < N, other=0.0)
    else:
        for start in tl.range(0, K, BK):
            column = start + k
            part_mask = valid & (column < K)[None, :]
            part = tl.load(x + row * K + column[None, :], mask=part_mask, other=0.0)
            at = weight + n.to(tl.int64) * K + column[:, None]
            inside = (column < K)[:, None] & (n < N)
            total = tl.dot(part, tl.load(at, mask=inside, other=0.0), total, input_precision="ieee")
            if GATED:
                up_weight = tl.load(at + N * K, mask=inside, other=0.0)
                up = tl.dot(part, up_weight, up, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + expert_row + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + expert_row + N + n, mask=n < N, other=0.0).to(tl.float32)
    if ACTIVATION:
        dtype: tl.constexpr = y.dtype.element_ty
        gate = total.to(dtype).to(tl.float32)  # rounded like the output of a linear layer
        row = position.to(tl.int64)[:, None]
        up = up.to(dtype).to(tl.float32)
        if ACTIVATION == 4:
            total = tl.maximum(gate, 0.0) * tl.maximum(gate, 0.0)
        elif ACTIVATION == 3:
            total = clamped_swiglu(gate, up, limit, alpha)
        else:
            inner = gate
            if ACTIVATION == 2:  # see `elementwise._act_and_mul_kernel`
                inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
            total = gate * up / (1 + tl.exp(-inner))
    else:
        row = choice
        total = total * tl.load(topk_weights + choice, mask=valid, other=0.0)
    tl.store(y + row * N + n, total.to(y.dtype.element_ty), mask=valid & (n < N))


@jit
def _fp8_product(
    part: tl.tensor, at: tl.tensor, scale_at: tl.tensor, inside: tl.tensor, is_output: tl.tensor
) -> tl.tensor:
    """The product of a group's inputs with weights in FP8, times the weights' scales."""
    scale = tl.load(scale_at, mask=is_output, other=0.0)
    if part.dtype == at.dtype.element_ty:  # both in FP8
        sums = tl.dot(part, tl.load(at, mask=inside, other=0.0))
    else:
        bits = tl.load(at, mask=inside, other=0).to(tl.int16)
        values = e4m3_times_2_to_minus_8(bits).to(part.dtype)
        sums = tl.dot(part, values, input_precision="ieee")
        scale *= 256.0
    return sums * scale


@jit
def _load_fp4(
    at: tl.tensor,
    scale_at: tl.tensor,
    inside: tl.tensor,
    SCALES: tl.constexpr,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The weights in the low and in the high halves of bytes, times their scales."""
    packed = tl.load(at, mask=inside, other=0).to(tl.int32)
    scale = scale_of_byte(tl.load(scale_at, mask=inside, other=0), SCALES)
    low = (e2m1(packed & 15) * scale).to(dtype)
    high = (e2m1(packed >> 4) * scale).to(dtype)
    return low, high
