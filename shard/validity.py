"""Which tensor-parallel sizes a model can be split into, and the arithmetic of those it cannot."""

from __future__ import annotations

from llmkit.checkpoint.quantized import PackedTensor, QuantizationConfig
from llmkit.model.layout import VOCAB_MULTIPLE, Split
from llmkit.model.loader import stored_tensors
from llmkit.model.spec import ModelSpec

UNITS = {"heads": "heads", "kv_heads": "KV heads", "features": "features"}
# The checkpoint module's last name, how it splits, how it is packed, its group size.
Rule = tuple[str, Split, PackedTensor | None, int]


def valid_tp(spec: ModelSpec, quantization: QuantizationConfig | None) -> list[int]:
    """The tensor-parallel sizes from 1 to the number of heads that divide every tensor of the model."""
    rules = _rules(spec, quantization)
    return [tp for tp in range(1, spec.heads + 1) if _refusal(rules, tp) is None]


def explain_tp(spec: ModelSpec, quantization: QuantizationConfig | None, tp: int) -> str | None:
    """None when the model can be split over `tp` ranks; else the arithmetic and the sizes that work for the model.

    "down_proj: 29568/2 = 115.5 groups of 128; TP 1, 3, 7 work"
    """
    refusal = _refusal(_rules(spec, quantization), tp)
    if refusal is None:
        return None
    works = valid_tp(spec, quantization)
    return f"{refusal}; TP {', '.join(map(str, works))} work{'s' * (len(works) == 1)}"


def _rules(spec: ModelSpec, quantization: QuantizationConfig | None) -> list[Rule]:
    """The distinct rules of the parameter table: layers repeat them."""
    rules: dict[Rule, Rule] = {}
    for stored in stored_tensors(spec, quantization).values():
        for part in stored.parts:
            module = part.tensor.split(".")[-2]
            size = stored.scheme.group_size if stored.scheme else -1
            rule = (module, part.split, stored.packed, size)
            rules.setdefault(rule, rule)
    return list(rules.values())


def _refusal(rules: list[Rule], tp: int) -> str | None:
    for module, split, packed, size in rules:
        if not split.fits(tp):
            if split.kind == "kv_heads" and tp > split.count:
                return f"{module}: {tp}/{split.count} = {_number(tp / split.count)} ranks per KV head"
            return f"{module}: {split.count}/{tp} = {_number(split.count / tp)} {UNITS[split.kind]}"
        if packed is not None and split.kind == "vocab" and split.padded_rows(tp) * tp != split.count:
            what = f"{_number(split.count / tp)} packed rows, no multiple of {VOCAB_MULTIPLE}"
            return f"{module}: {split.count}/{tp} = {what}"
        axis = None if packed is None else packed.out if split.dim == 0 else packed.in_
        if axis is None or split.kind == "replicated" or tp == 1:
            continue
        start, stop = split.interval(0, tp)
        per = axis[1]
        if (stop - start) % per:
            grouped = split.dim == 1 and per == size
            what = f"{_number((stop - start) / per)} {'groups' if grouped else 'packed words'} of {per}"
            if split.kind == "kv_heads" and tp > split.count:
                return f"{module}: one KV head of {split.unit} = {what}"
            return f"{module}: {split.count * split.unit}/{tp} = {what}"
    return None


def _number(value: float) -> str:
    """At most three decimals, none of them trailing zeros: "115.5", "170.667", "16"."""
    return f"{value:.3f}".rstrip("0").rstrip(".")
