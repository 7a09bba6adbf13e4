"""Checks of the tensors that a checkpoint stores for a quantized weight: their shapes and scales.

Every format's `unpack` calls `check_stored`, and `llmkit shard` calls `check_scales` for the scales
that it copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from llmkit.checkpoint.quantized_weight import PackedTensor, ScaleRule
from llmkit.common.errors import InputError

E8M0_NAN = 255
_EXPECTED: dict[ScaleRule, str] = {
    "finite": "Finite numbers were expected",
    "not negative": "Finite numbers of at least 0 were expected",
    "positive": "Finite numbers above 0 were expected",
}
_TODO = "Download the checkpoint again or get it from its maker"


def check_stored(expected: Iterable[PackedTensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError for a stored tensor of another shape, and for scales that are none.

    expected: see `QuantizedFormat.tensors`. tensors: the stored ones by suffix.
    """
    for packed in expected:
        found = tensors[packed.suffix]
        if not packed.accepts(tuple(found.shape)):
            raise InputError(
                f"{packed.suffix} has shape {list(found.shape)}",
                f"{list(packed.shape)} was expected",
            )
        if packed.scale:
            check_scales(packed.suffix, found, packed.scale)


def check_scales(name: str, scales: torch.Tensor, rule: ScaleRule) -> None:
    """Raises InputError for scales that are not finite, or that break the rule.

    name: of the tensor, for the error. scales: floats of any dtype, or bytes of e8m0.
    """
    if not scales.numel():
        return
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        _check_e8m0(name, scales.view(torch.uint8))
        return
    if scales.dtype == torch.float8_e4m3fn:
        scales = scales.float()
    low, high = scales.aminmax()  # NaN where one of the scales is
    if bool(_keeps(low, rule) & (high < torch.inf)):
        return
    bad = ~(_keeps(scales, rule) & (scales < torch.inf))
    first = scales[bad].flatten()[0].item()
    raise InputError(
        f"{int(bad.sum())} of {scales.numel()} values of {name} are no scales, such as {first}",
        _EXPECTED[rule],
        _TODO,
    )


def _keeps(scales: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """Which scales are large enough, bool. NaN is not."""
    if rule == "positive":
        return scales > 0
    if rule == "not negative":
        return scales >= 0
    return scales > -torch.inf


def _check_e8m0(name: str, encoded: torch.Tensor) -> None:
    """encoded: uint8. All bytes but one stand for positive numbers."""
    if bool(encoded.max() != E8M0_NAN):
        return
    num_bad = int((encoded == E8M0_NAN).sum())
    raise InputError(
        f"{num_bad} of {encoded.numel()} values of {name} are {E8M0_NAN}, not a number",
        f"Scales from 0 to {E8M0_NAN - 1} were expected",
        _TODO,
    )
