"""`llmkit shard plan`: what the ranks of a layout hold, what fits beside it on a GPU, and which layouts there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.shard.shard import checked_spec, plan_source
from llmkit.shard.source import Source
from llmkit.shard.validity import valid_layouts

MIB = 2**20
NODE_TOKENS = 65_536  # of keys and values, that a node has to have room for
UTILIZATION = 0.9  # of a GPU's memory for weights and KV cache, as `llmkit serve` and vLLM take it


class Gpu(NamedTuple):
    """Of one kind of GPU: memory in MiB as nvidia-smi tells it, and peaks as its data sheet does."""

    memory_mib: int
    flops_per_s: float  # of dense 16-bit products
    bytes_per_s: float  # of its memory


GPUS = {
    "a10-24": Gpu(23_028, 125e12, 0.600e12),
    "a100-40": Gpu(40_960, 312e12, 1.555e12),
    "a100-80": Gpu(81_920, 312e12, 2.039e12),
    "a6000-48": Gpu(49_140, 155e12, 0.768e12),
    "b200-180": Gpu(183_359, 2250e12, 8.0e12),
    "h100-80": Gpu(81_559, 989e12, 3.35e12),
    "h200-141": Gpu(143_771, 989e12, 4.8e12),
    "l4-24": Gpu(23_034, 121e12, 0.300e12),
    "l40s-48": Gpu(46_068, 362e12, 0.864e12),
    "rtx3090-24": Gpu(24_576, 71e12, 0.936e12),
    "rtx4090-24": Gpu(24_564, 165e12, 1.008e12),
    "rtx5090-32": Gpu(32_607, 210e12, 1.792e12),
    "t4-16": Gpu(15_360, 65e12, 0.320e12),
    "v100-32": Gpu(32_768, 125e12, 0.900e12),
}


def gpu_name(name: str) -> str:
    """The GPU of the table that is meant by a name or the beginning of one. Raises UsageError for none or several."""
    found = [known for known in GPUS if known == name.lower()] or [k for k in GPUS if k.startswith(f"{name.lower()}-")]
    if len(found) != 1:
        raise UsageError(f"--gpu {name} is not known", f"One of {', '.join(found or GPUS)}, or a size like 48GiB")
    return found[0]


def gpu_bytes(name: str) -> int:
    """The memory of a GPU of the table. Raises UsageError for another."""
    return GPUS[gpu_name(name)].memory_mib * MIB


def plan_report(
    source: Source, tp: int, pp: int = 1, ep: int = 1, pp_layers: Sequence[int] = (), memory: int | None = None
) -> dict[str, Any]:
    """The plan's figures (see `ShardPlan.to_json`) and the sizes that work, JSON-ready.

    What does not divide is told in `refusal`, and the plan's own figures are then left out. With `memory` bytes on
    each rank's GPU, `tokens` of a rank are those whose keys and values fit beside its weights in UTILIZATION of it;
    a sliding window counts as the whole context, and what activations take is not counted. Raises InputError for a
    source that is bad, UsageError for sizes that contradict each other.
    """
    works, max_pp = working_sizes(source), len(checked_spec(source).layers)
    return {**layout_figures(source, tp, pp, ep, pp_layers, memory), "works": works, "max_pp": max_pp}


def working_sizes(source: Source) -> list[dict[str, Any]]:
    """Each TP that works, and the EPs that do with it."""
    layouts = valid_layouts(checked_spec(source), source.checkpoint.quantization)
    works: list[dict[str, Any]] = [{"tp": size, "ep": with_it} for size, with_it in layouts.items()]
    try:  # the least split there is: what act-order has mixed cannot have a larger one either
        plan_source(source, *next(((one["tp"], 1, one["ep"][-1]) for one in works if one["tp"] > 1), (1,)))
    except InputError:
        works = [one for one in works if one["tp"] == 1]
    return works


def layout_figures(
    source: Source, tp: int, pp: int = 1, ep: int = 1, pp_layers: Sequence[int] = (), memory: int | None = None
) -> dict[str, Any]:
    """`plan_report` of one layout, without the sizes that work."""
    try:
        made = plan_source(source, tp, pp, ep, pp_layers).to_json()
    except InputError as error:
        refusal = ". ".join(filter(None, (error.what, error.expected)))
        return {"tp": tp, "pp": pp, "ep": ep, "refusal": refusal}
    if memory is not None:
        for rank in made["ranks"]:
            rank["tokens"] = max(0, int(memory * UTILIZATION) - rank["bytes"]) // rank["kv_bytes_per_token"]
        tokens = min(rank["tokens"] for rank in made["ranks"])
        made |= {"tokens": tokens, "memory_bytes": memory, "utilization": UTILIZATION}
    return {**made, "refusal": None}


def nodes_report(source: Source, memory: int, gpus_per_node: int) -> dict[str, Any]:
    """`node`: on how many nodes of so many GPUs the model fits with NODE_TOKENS, or its context; 0: on none."""
    tokens = min(NODE_TOKENS, checked_spec(source).max_positions)
    try:
        tp, pp = smallest_layout(source, memory, gpus_per_node, tokens)
        found = {"tp": tp, "pp": pp, "nodes": max(1, -(-tp * pp // gpus_per_node))}
    except InputError:
        found = {"nodes": 0}
    return {"node": {"gpus": gpus_per_node, "tokens": tokens, **found}}


def smallest_layout(source: Source, memory: int, gpus_per_node: int, tokens: int) -> tuple[int, int]:
    """TP and PP of the fewest GPUs of `memory` bytes that hold the model and keys and values of so many tokens.

    On one node TP is the least that fits; on several it is the most that a node has, and PP goes over nodes. Raises
    InputError when no layout does.
    """
    sizes = [one["tp"] for one in working_sizes(source) if one["tp"] <= gpus_per_node]

    def fits(tp: int, pp: int) -> bool:
        figures = layout_figures(source, tp, pp, memory=memory)
        return not figures["refusal"] and figures["tokens"] >= tokens

    for tp in sizes:
        if fits(tp, 1):
            return tp, 1
    for pp in range(2, len(checked_spec(source).layers) + 1):
        if fits(sizes[-1], pp):
            return sizes[-1], pp
    raise InputError(
        f"{tokens:,} tokens and the weights do not fit on nodes of {gpus_per_node} x {memory / 2**30:.0f} GiB",
        f"With TP {sizes[-1]} on each node, over as many nodes as there are layers",
        "Name a larger GPU, more of them a node, or fewer --tokens",
    )
