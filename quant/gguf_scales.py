"""Finds the scales and minima of GGUF's quantized types by weighted least squares.

A group's scale is searched over candidates around its range. Each rounds the weights, and the scale
(and minimum) that fit the rounded values best are solved for. K types then store these scales in 6
or 8 bits: for each group the neighbouring units are tried, and the super-block's own scales are
solved again.

Legend: R rows of a chunk, B blocks and G groups of a row, S groups of a block, g values of a group.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llmkit.checkpoint.gguf_blocks import GgufBlocks, GgufType, concatenate

_CHUNK_ELEMENTS = 1 << 19  # weights whose scales are searched at a time
# Candidates for a scale, as the number of steps that its range has more (or less) than values.
_EXTRA_STEPS = tuple(0.1 * step for step in range(-9, 14))
_REFITS = 3  # of a scale to the values that it rounds to
_SUPER_REFITS = 3  # of a super-block's scales to those of its groups
_TINY = 1e-30


def fit_blocks(
    weight: torch.Tensor, kind: GgufType, importance: torch.Tensor | None = None
) -> GgufBlocks:
    """Quantize a float32 weight [out, in] to the nearest values, whose scales are searched.

    importance: what a squared error of each column costs, [in]; None: of a weight's own size.
    `in` must be a multiple of the type's block.
    """
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    return concatenate([_fit_chunk(chunk, kind, importance) for chunk in weight.split(rows)])


def _fit_chunk(weight: torch.Tensor, kind: GgufType, importance: torch.Tensor | None) -> GgufBlocks:
    x = weight.unflatten(1, (-1, kind.group))  # [R, G, g]
    cost = _cost(x, importance)
    if kind.has_min:
        scale, minimum = _search_with_minimum(x, cost, kind)
    else:
        scale, minimum = _search(x, cost, kind), None
    if kind.max_scale:
        return _fit_super_blocks(x, cost, kind, scale, minimum)
    d = _rounded(scale)
    d_min = None if minimum is None else _rounded(minimum)
    return GgufBlocks(kind, _quantize(x, kind, d, d_min).flatten(1), d, d_min)


def _cost(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """What a squared error of each weight costs, [R, G, g].

    Large weights are worth more than small ones, by their size beside the mean of the row.
    """
    mean_square = x.square().mean((1, 2), keepdim=True)
    if importance is None:
        return x.square() + mean_square
    weights: torch.Tensor = importance.float().unflatten(0, (-1, x.shape[2]))
    return weights * (x.square() + mean_square).sqrt()


def _search(x: torch.Tensor, cost: torch.Tensor, kind: GgufType) -> torch.Tensor:
    """The scales [R, G] of values around zero. A negative scale has one more value above zero."""
    extreme = x.gather(2, x.abs().argmax(2, keepdim=True))
    best = torch.zeros_like(extreme)
    best_gain = torch.zeros_like(extreme)
    weighted = cost * x
    below = kind.zero - kind.min_q
    above = kind.max_q - kind.zero
    steps = [-(below + extra) for extra in _EXTRA_STEPS]
    if above != below:
        steps += [above + extra for extra in _EXTRA_STEPS]
    inverse_extreme = torch.where(extreme.abs() > _TINY, 1 / extreme, 0.0)
    for step in steps:
        q = (x * (step * inverse_extreme)).round_().clamp_(-below, above)
        best, best_gain = _better(best, best_gain, weighted, cost, q)
    for _ in range(_REFITS):
        q = (x * _inverse(best)).round_().clamp_(-below, above)
        best, best_gain = _better(best, best_gain, weighted, cost, q)
    return best.squeeze(2)


def _better(
    best: torch.Tensor,
    best_gain: torch.Tensor,
    weighted: torch.Tensor,
    cost: torch.Tensor,
    q: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale that fits values q, where it lowers the error more than the best one so far."""
    product = (weighted * q).sum(2, keepdim=True)
    square = (cost * q * q).sum(2, keepdim=True)
    scale = torch.where(square > _TINY, product / square, 0.0)
    gain = product * scale
    is_better = gain > best_gain
    return torch.where(is_better, scale, best), torch.where(is_better, gain, best_gain)


def _search_with_minimum(
    x: torch.Tensor, cost: torch.Tensor, kind: GgufType
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and what is subtracted, [R, G]. K types store no negative minimum."""
    total = cost.sum(2, keepdim=True)
    weighted = cost * x
    sum_x = weighted.sum(2, keepdim=True)
    lowest = x.amin(2, keepdim=True)
    if kind.max_scale:
        lowest = lowest.clamp(max=0)
    span = x.amax(2, keepdim=True) - lowest
    best_scale = torch.zeros_like(span)
    best_offset = lowest.clone()
    best_error = torch.full_like(span, torch.inf)

    def consider(scale: torch.Tensor, offset: torch.Tensor) -> None:
        """Fit the scale and the offset to the values that these two round to."""
        nonlocal best_scale, best_offset, best_error
        q = ((x - offset) * _inverse(scale)).round_().clamp_(0, kind.max_q)
        weighted_q = cost * q
        sum_q = weighted_q.sum(2, keepdim=True)
        sum_qq = (weighted_q * q).sum(2, keepdim=True)
        sum_xq = (weighted * q).sum(2, keepdim=True)
        determinant = total * sum_qq - sum_q * sum_q
        is_solvable = determinant > _TINY
        inverse = torch.where(is_solvable, 1 / determinant, 0.0)
        fitted = (total * sum_xq - sum_x * sum_q) * inverse
        new_offset = (sum_qq * sum_x - sum_q * sum_xq) * inverse
        mean = torch.where(total > _TINY, sum_x / total, lowest)
        new_offset = torch.where(is_solvable, new_offset, mean)
        if kind.max_scale:  # no offset above zero: the scale alone
            alone = torch.where(sum_qq > _TINY, sum_xq / sum_qq, 0.0)
            is_above = new_offset > 0
            fitted = torch.where(is_above, alone, fitted)
            new_offset = torch.where(is_above, torch.zeros_like(new_offset), new_offset)
        error = (q.mul_(fitted).add_(new_offset).sub_(x).square_().mul_(cost)).sum(2, keepdim=True)
        is_better = (error < best_error) & (fitted >= 0)
        best_scale = torch.where(is_better, fitted, best_scale)
        best_offset = torch.where(is_better, new_offset, best_offset)
        best_error = torch.where(is_better, error, best_error)

    for extra in _EXTRA_STEPS:
        consider(span / (kind.max_q + extra), lowest)
    for _ in range(_REFITS):
        consider(best_scale, best_offset)
    return best_scale.squeeze(2), -best_offset.squeeze(2)


def _fit_super_blocks(
    x: torch.Tensor,
    cost: torch.Tensor,
    kind: GgufType,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
) -> GgufBlocks:
    """Blocks whose groups have scales in units of d."""
    groups = kind.block // kind.group
    lowest_unit = 0 if kind.has_min else -kind.max_scale
    by_block = scale.unflatten(1, (-1, groups))
    largest = by_block.gather(2, by_block.abs().argmax(2, keepdim=True)).squeeze(2)
    d = _rounded(largest / kind.max_scale)
    d_min = None
    minima = None
    if minimum is not None:
        d_min = _rounded(minimum.unflatten(1, (-1, groups)).amax(2) / kind.max_scale)
        minima = _units(minimum, d_min, groups, 0, kind.max_scale)
    units = _units(scale, d, groups, lowest_unit, kind.max_scale)
    weight = GgufBlocks(kind, torch.empty(0), d, d_min, units.short(), _short(minima))
    best = weight.with_values(_quantize_groups(x, weight))
    best_error = _errors(x, cost, best)
    for _ in range(_SUPER_REFITS):
        weight = _best_units(x, cost, best, lowest_unit)
        weight = _refit(x, cost, weight, groups)
        weight = weight.with_values(_quantize_groups(x, weight))
        error = _errors(x, cost, weight)
        best, best_error = _better_blocks(best, best_error, weight, error, groups)
    return best


def _best_units(
    x: torch.Tensor, cost: torch.Tensor, weight: GgufBlocks, lowest_unit: int
) -> GgufBlocks:
    """The weight with the best of the neighbouring units of each group's scale and minimum."""
    assert weight.scales is not None
    best = weight
    best_error = _group_errors(x, cost, weight)
    shifts = (-1, 0, 1)
    for shift in shifts:
        scales = (weight.scales + shift).clamp_(lowest_unit, weight.type.max_scale)
        for minimum_shift in shifts if weight.minima is not None else (0,):
            minima = weight.minima
            if minima is not None:
                minima = (minima + minimum_shift).clamp_(0, weight.type.max_scale)
            if not shift and not minimum_shift:
                continue
            tried = replace(weight, scales=scales, minima=minima)
            tried = tried.with_values(_quantize_groups(x, tried))
            error = _group_errors(x, cost, tried)
            is_better = error < best_error
            best_error = torch.where(is_better, error, best_error)
            best = _where_groups(is_better, tried, best)
    return best


def _where_groups(condition: torch.Tensor, first: GgufBlocks, second: GgufBlocks) -> GgufBlocks:
    """The units and values of `first` where the condition [R, G] holds, else of `second`."""
    assert first.scales is not None and second.scales is not None
    size = first.type.group
    q = torch.where(
        condition.unsqueeze(2),
        first.q.unflatten(1, (-1, size)),
        second.q.unflatten(1, (-1, size)),
    ).flatten(1)
    minima = None
    if first.minima is not None and second.minima is not None:
        minima = torch.where(condition, first.minima, second.minima)
    scales = torch.where(condition, first.scales, second.scales)
    return replace(second, q=q, scales=scales, minima=minima)


def _refit(x: torch.Tensor, cost: torch.Tensor, weight: GgufBlocks, groups: int) -> GgufBlocks:
    """The weight with the d and d_min that fit its units and values best."""
    assert weight.scales is not None
    kind = weight.type
    q = weight.q.float().unflatten(1, (-1, kind.group)) - kind.zero
    a = q * weight.scales.unsqueeze(2)
    aa, ax = (_block_sums(cost * a * other, groups) for other in (a, x))
    if weight.d_min is None or weight.minima is None:
        d = torch.where(aa > _TINY, ax / aa, weight.d)
        return replace(weight, d=_rounded(d))
    b = -weight.minima.float().unsqueeze(2)
    ab, bb, bx = (_block_sums(cost * b * other, groups) for other in (a, b.expand_as(x), x))
    determinant = aa * bb - ab * ab
    is_solvable = determinant > 1e-6 * aa * bb
    inverse = torch.where(is_solvable, 1 / determinant, 0.0)
    d = torch.where(is_solvable, (ax * bb - bx * ab) * inverse, weight.d)
    d_min = torch.where(is_solvable, (bx * aa - ax * ab) * inverse, weight.d_min)
    return replace(weight, d=_rounded(d), d_min=_rounded(d_min))


def _better_blocks(
    best: GgufBlocks, best_error: torch.Tensor, other: GgufBlocks, error: torch.Tensor, groups: int
) -> tuple[GgufBlocks, torch.Tensor]:
    """The blocks of `other` where its errors [R, B] are smaller."""
    is_better = error < best_error
    merged = _where_groups(is_better.repeat_interleave(groups, 1), other, best)
    d_min = best.d_min
    if d_min is not None and other.d_min is not None:
        d_min = torch.where(is_better, other.d_min, d_min)
    d = torch.where(is_better, other.d, best.d)
    return replace(merged, d=d, d_min=d_min), torch.where(is_better, error, best_error)


def _quantize(
    x: torch.Tensor, kind: GgufType, scale: torch.Tensor, minimum: torch.Tensor | None
) -> torch.Tensor:
    """The nearest values, uint8 [R, G, g], with scales and minima [R, G]."""
    shifted = x if minimum is None else x + minimum.unsqueeze(2)
    q = (shifted * _inverse(scale).unsqueeze(2)).round_().add_(kind.zero)
    return q.clamp_(kind.min_q, kind.max_q).to(torch.uint8)


def _quantize_groups(x: torch.Tensor, weight: GgufBlocks) -> torch.Tensor:
    minimum = weight.group_minima if weight.type.has_min else None
    return _quantize(x, weight.type, weight.group_scales, minimum).flatten(1)


def _group_errors(x: torch.Tensor, cost: torch.Tensor, weight: GgufBlocks) -> torch.Tensor:
    """What the errors of each group cost, [R, G]."""
    dense: torch.Tensor = weight.dequantize().unflatten(1, (-1, weight.type.group))
    return dense.sub_(x).square_().mul_(cost).sum(2)


def _errors(x: torch.Tensor, cost: torch.Tensor, weight: GgufBlocks) -> torch.Tensor:
    """What the errors of each block cost, [R, B]."""
    groups = weight.type.block // weight.type.group
    errors: torch.Tensor = _group_errors(x, cost, weight).unflatten(1, (-1, groups))
    return errors.sum(2)


def _block_sums(values: torch.Tensor, groups: int) -> torch.Tensor:
    """The sums of blocks [R, B] of values [R, G, g]."""
    sums: torch.Tensor = values.sum(2).unflatten(1, (-1, groups))
    return sums.sum(2)


def _units(
    values: torch.Tensor, d: torch.Tensor, groups: int, lowest: int, highest: int
) -> torch.Tensor:
    """Values [R, G] in units of d [R, B]."""
    by_block: torch.Tensor = values.unflatten(1, (-1, groups))
    units = (by_block * _inverse(d).unsqueeze(2)).round_()
    return units.clamp_(lowest, highest).flatten(1)


def _short(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.short()


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 where it is 0."""
    return torch.where(scale.abs() > _TINY, 1 / scale, 0.0)


def _rounded(scale: torch.Tensor) -> torch.Tensor:
    """The nearest float16, as float32."""
    limit = torch.finfo(torch.float16).max
    return scale.clamp(-limit, limit).half().float()
