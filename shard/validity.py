"""Which tensor- and expert-parallel sizes a model can be split into, and the arithmetic of those it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.checkpoint.quantized import PackedTensor, QuantizationConfig
from llmkit.model.layout import VOCAB_MULTIPLE, Split
from llmkit.model.loader import stored_tensors
from llmkit.model.spec import ModelSpec

UNITS = {"heads": "heads", "kv_heads": "KV heads", "features": "features"}


@dataclass(frozen=True)
class _Rule:
    """How some tensors of the checkpoint split."""

    module: str  # the last name of the checkpoint's module
    split: Split
    packed: PackedTensor | None
    group_size: int
    of_expert: bool


def expert_count(spec: ModelSpec) -> int:
    """The experts of a layer that has some; 0 for a dense model."""
    return spec.experts.count if spec.experts and any(layer.moe for layer in spec.layers) else 0


def valid_tp(spec: ModelSpec, quantization: QuantizationConfig | None, ep: int = 1) -> list[int]:
    """The tensor-parallel sizes from 1 to the number of heads that divide every tensor of the model.

    With experts divided over `ep` of the ranks; none when there is no such size.
    """
    if _expert_refusal(spec, ep):
        return []
    rules = _rules(spec, quantization)
    return [tp for tp in range(ep, spec.heads + 1, ep) if _refusal(rules, tp, ep) is None]


def valid_ep(spec: ModelSpec, quantization: QuantizationConfig | None, tp: int) -> list[int]:
    """The expert-parallel sizes that work with `tp`."""
    return _valid_ep(spec, _rules(spec, quantization), tp)


def valid_layouts(spec: ModelSpec, quantization: QuantizationConfig | None) -> dict[int, list[int]]:
    """The tensor-parallel sizes up to the number of heads that work, and the expert-parallel sizes with each."""
    rules = _rules(spec, quantization)
    found = {tp: _valid_ep(spec, rules, tp) for tp in range(1, spec.heads + 1)}
    return {tp: sizes for tp, sizes in found.items() if sizes}


def explain_tp(spec: ModelSpec, quantization: QuantizationConfig | None, tp: int, ep: int = 1) -> str | None:
    """None when the model can be split over `tp` ranks; else the arithmetic and the sizes that work for the model.

    "down_proj: 29568/2 = 115.5 groups of 128; TP 1, 3, 7 work"
    """
    refusal = _refusal(_rules(spec, quantization), tp, ep)
    return refusal and f"{refusal}; {_works('TP', valid_tp(spec, quantization, ep))}"


def explain_ep(spec: ModelSpec, quantization: QuantizationConfig | None, tp: int, ep: int) -> str | None:
    """None when `ep` divides `tp` ranks and the experts; else the arithmetic and the sizes that work with `tp`.

    "6/4 = 1.5 experts; EP 1, 2 work"
    """
    refusal = f"{tp}/{ep} = {_number(tp / ep)} tensor-parallel ranks" if tp % ep else _expert_refusal(spec, ep)
    return refusal and f"{refusal}; {_works('EP', valid_ep(spec, quantization, tp))} with TP {tp}"


def _valid_ep(spec: ModelSpec, rules: list[_Rule], tp: int) -> list[int]:
    divisors = [ep for ep in range(1, tp + 1) if tp % ep == 0 and not _expert_refusal(spec, ep)]
    return [ep for ep in divisors if _refusal(rules, tp, ep) is None]


def _works(name: str, sizes: list[int]) -> str:
    return f"{name} {', '.join(map(str, sizes))} work{'s' * (len(sizes) == 1)}" if sizes else f"no {name} works"


def _expert_refusal(spec: ModelSpec, ep: int) -> str | None:
    count = expert_count(spec)
    if ep == 1 or (count and count % ep == 0):
        return None
    return f"{count}/{ep} = {_number(count / ep)} experts" if count else f"{spec.architecture} has no experts"


def _rules(spec: ModelSpec, quantization: QuantizationConfig | None) -> list[_Rule]:
    """The distinct rules of the parameter table: layers and experts repeat them."""
    rules: dict[_Rule, None] = {}
    for stored in stored_tensors(spec, quantization).values():
        for part in stored.parts:
            size = stored.scheme.group_size if stored.scheme else -1
            expert = stored.parameter.expert is not None
            rules[_Rule(part.tensor.split(".")[-2], part.split, stored.packed, size, expert)] = None
    return list(rules)


def _refusal(rules: list[_Rule], tp: int, ep: int) -> str | None:
    return next((found for rule in rules if (found := _refused(rule, tp // ep if rule.of_expert else tp))), None)


def _refused(rule: _Rule, tp: int) -> str | None:
    """What of the rule does not divide by `tp`."""
    module, split, packed = rule.module, rule.split, rule.packed
    if not split.fits(tp):
        if split.kind == "kv_heads" and tp > split.count:
            return f"{module}: {tp}/{split.count} = {_number(tp / split.count)} ranks per KV head"
        return f"{module}: {split.count}/{tp} = {_number(split.count / tp)} {UNITS[split.kind]}"
    if packed is not None and split.kind == "vocab" and split.padded_rows(tp) * tp != split.count:
        what = f"{_number(split.count / tp)} packed rows, no multiple of {VOCAB_MULTIPLE}"
        return f"{module}: {split.count}/{tp} = {what}"
    axis = None if packed is None else packed.out if split.dim == 0 else packed.in_
    if axis is None or split.kind == "replicated" or tp == 1:
        return None
    start, stop = split.interval(0, tp)
    per = axis[1]
    if (stop - start) % per == 0:
        return None
    grouped = split.dim == 1 and per == rule.group_size
    what = f"{_number((stop - start) / per)} {'groups' if grouped else 'packed words'} of {per}"
    if split.kind == "kv_heads" and tp > split.count:
        return f"{module}: one KV head of {split.unit} = {what}"
    return f"{module}: {split.count * split.unit}/{tp} = {what}"


def _number(value: float) -> str:
    """At most three decimals, none of them trailing zeros: "115.5", "170.667", "16"."""
    return f"{value:.3f}".rstrip("0").rstrip(".")
