"""The tensor- and expert-parallel sizes that divide a model, and why others do not."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from llmkit.checkpoint.quantized_weight import QuantizationConfig
from llmkit.model.checkpoint_tensors import checkpoint_tensors
from llmkit.model.parameter import SourceTensor
from llmkit.model.spec import ModelSpec
from llmkit.model.split import VOCAB_MULTIPLE, Split

UNIT_NAMES = {
    "heads": "heads",
    "kv_heads": "KV heads",
    "key_heads": "key heads",
    "features": "features",
}


@dataclass(frozen=True)
class _SplitRule:
    """How tensors of one kind are split. All layers and experts share the same few rules."""

    module: str  # the last part of the module's name in the checkpoint, "q_proj"
    split: Split
    out: tuple[int, int | Fraction] | None  # see PackedTensor
    in_: tuple[int, int | Fraction] | None
    is_quantized: bool
    group_size: int
    is_expert: bool
    covers: bool  # see PackedTensor
    # Where the second of several projections in a tensor begins; 0: there is one. Only for tensors
    # with `covers`.
    second_start: int


def expert_count(spec: ModelSpec) -> int:
    """The number of experts of an MoE layer; 0 for a dense model."""
    return spec.moe.num_experts if spec.moe and any(layer.is_moe for layer in spec.layers) else 0


def valid_tp(spec: ModelSpec, quantization: QuantizationConfig | None, ep: int = 1) -> list[int]:
    """The tensor-parallel sizes, up to the number of heads, that divide every tensor of the model.

    The experts are divided over `ep` groups. The list is empty when no size works.
    """
    if spec.transformers is not None and spec.transformers.tp_refusal:
        return [1]
    rules = _split_rules(spec, quantization)
    return [
        tp
        for tp in range(ep, spec.num_heads + 1, ep)
        if _explain_experts(spec, tp, ep) is None and _explain(rules, tp, ep) is None
    ]


def valid_ep(spec: ModelSpec, quantization: QuantizationConfig | None, tp: int) -> list[int]:
    """The expert-parallel sizes that work with `tp`."""
    return _valid_ep(spec, _split_rules(spec, quantization), tp)


def valid_layouts(spec: ModelSpec, quantization: QuantizationConfig | None) -> dict[int, list[int]]:
    """The EP sizes that work with each TP size, for TP sizes up to the number of heads."""
    rules = _split_rules(spec, quantization)
    layouts = {tp: _valid_ep(spec, rules, tp) for tp in range(1, spec.num_heads + 1)}
    return {tp: sizes for tp, sizes in layouts.items() if sizes}


def explain_tp(
    spec: ModelSpec, quantization: QuantizationConfig | None, tp: int, ep: int = 1
) -> str | None:
    """Why `tp` ranks do not divide the model, and the sizes that do; None when they divide it.

    For example "down_proj: 29568/2 = 115.5 groups of 128; TP 1, 3, 7 work"
    """
    refusal = _explain(_split_rules(spec, quantization), tp, ep)
    if refusal is None:
        return None
    return f"{refusal}; {_sizes_that_work('TP', valid_tp(spec, quantization, ep))}"


def explain_ep(
    spec: ModelSpec, quantization: QuantizationConfig | None, tp: int, ep: int
) -> str | None:
    """Why `ep` does not divide `tp` ranks or the experts, and the sizes that do; None when it does.

    For example "6/4 = 1.5 experts; EP 1, 2 work with TP 4"
    """
    if tp % ep:
        refusal: str | None = f"{tp}/{ep} = {_format_number(tp / ep)} tensor-parallel ranks"
    else:
        refusal = _explain_experts(spec, tp, ep)
    if refusal is None:
        return None
    return f"{refusal}; {_sizes_that_work('EP', valid_ep(spec, quantization, tp))} with TP {tp}"


def _valid_ep(spec: ModelSpec, rules: list[_SplitRule], tp: int) -> list[int]:
    divisors = [
        ep for ep in range(1, tp + 1) if tp % ep == 0 and not _explain_experts(spec, tp, ep)
    ]
    return [ep for ep in divisors if _explain(rules, tp, ep) is None]


def _sizes_that_work(name: str, sizes: list[int]) -> str:
    if not sizes:
        return f"no {name} works"
    return f"{name} {', '.join(map(str, sizes))} work{'s' if len(sizes) == 1 else ''}"


def _explain_experts(spec: ModelSpec, tp: int, ep: int) -> str | None:
    """Why `ep` does not divide the experts; None when it does."""
    count = expert_count(spec)
    if ep == 1:
        return None
    if count and count % ep == 0:
        if spec.moe is not None and spec.moe.expert_stack is not None and ep < tp:
            return (
                f"the checkpoint stores all experts in one tensor, which can be split over"
                f" {ep} groups or {tp} ranks, but not over both"
            )
        return None
    if spec.transformers is not None:
        return f"transformers' tp_plan of {spec.architecture} splits every expert over all ranks"
    if not count:
        return f"{spec.architecture} has no experts"
    return f"{count}/{ep} = {_format_number(count / ep)} experts"


def _split_rules(spec: ModelSpec, quantization: QuantizationConfig | None) -> list[_SplitRule]:
    """The distinct rules of the checkpoint's tensors."""
    rules: dict[_SplitRule, None] = {}
    for parameter, packed in checkpoint_tensors(spec, quantization).values():
        for source in parameter.sources_in(packed.source_name):
            rule = _SplitRule(
                source.name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2],
                source.tensor_split,
                packed.out,
                packed.in_,
                packed.is_quantized,
                packed.group_size,
                parameter.expert is not None,
                packed.covers,
                _second_start(source) if packed.covers else 0,
            )
            rules[rule] = None
    return list(rules)


def _second_start(source: SourceTensor) -> int:
    """Where another projection begins in the source's tensor, as far as the source says; 0: none.

    A source after the first says where it begins itself.
    """
    if source.block_step:  # slices have whole blocks of all projections
        return 0
    split = source.split
    return split.count * split.unit if split.parts > 1 else source.first_row


def _explain(rules: list[_SplitRule], tp: int, ep: int) -> str | None:
    """Why the first rule that does not divide fails; None when all rules divide."""
    for rule in rules:
        refusal = _explain_rule(rule, tp // ep if rule.is_expert else tp)
        if refusal is not None:
            return refusal
    return None


def _explain_rule(rule: _SplitRule, tp: int) -> str | None:
    """Why the rule's tensors do not divide over `tp` ranks; None when they do."""
    split = rule.split
    has_replicated_kv_heads = split.kind == "kv_heads" and tp > split.count
    if not split.divides_over(tp):
        if has_replicated_kv_heads:
            ranks_per_head = _format_number(tp / split.count)
            return f"{rule.module}: {tp}/{split.count} = {ranks_per_head} ranks per KV head"
        units = f"{_format_number(split.count / tp)} {UNIT_NAMES[split.kind]}"
        return f"{rule.module}: {split.count}/{tp} = {units}"
    if not rule.is_quantized:
        return None
    if split.kind == "vocab" and split.padded_rows(tp) * tp != split.count:
        rows = f"{_format_number(split.count / tp)} packed rows, no multiple of {VOCAB_MULTIPLE}"
        return f"{rule.module}: {split.count}/{tp} = {rows}"
    axis = rule.out if split.dim == 0 else rule.in_
    if axis is None or split.kind == "replicated" or tp == 1:
        return None
    start, stop = split.interval(0, tp)
    dense_per_element = axis[1]
    if rule.covers:
        # A slice may begin inside a block, but slices of several projections do not join there.
        if not rule.second_start or tp == 1:
            return None
        if rule.second_start % dense_per_element:
            blocks = f"{_format_number(rule.second_start / dense_per_element)} blocks of"
            return f"{rule.module}: a projection in it begins at {blocks} {dense_per_element} rows"
    if (stop - start) % dense_per_element == 0:
        return None
    is_group = split.dim == 1 and dense_per_element == rule.group_size
    # A word has 2 to 16 values, and a block more rows.
    unit = "groups" if is_group else "packed words" if dense_per_element <= 16 else "blocks"
    elements = f"{_format_number((stop - start) / dense_per_element)} {unit} of {dense_per_element}"
    if isinstance(dense_per_element, Fraction):
        size = dense_per_element.numerator  # values that fill whole words
        elements = f"{_format_number((stop - start) / size)} times {size} packed values"
    if has_replicated_kv_heads:
        return f"{rule.module}: one KV head of {split.unit} = {elements}"
    return f"{rule.module}: {split.count * split.unit}/{tp} = {elements}"


def _format_number(value: float | Fraction) -> str:
    """At most three decimals, without trailing zeros: "115.5", "170.667", "16"."""
    return f"{float(value):.3f}".rstrip("0").rstrip(".")
