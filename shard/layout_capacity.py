"""`llmkit shard plan`: the weight bytes of each rank, the KV cache that fits, and valid layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmkit.common.errors import InputError, UsageError
from llmkit.shard.shard_checkpoint import plan_source, validated_spec
from llmkit.shard.shard_source import ShardSource
from llmkit.shard.valid_layouts import valid_layouts

MIB = 2**20
NODE_TOKENS = 65_536  # tokens of KV cache that a node must have room for
STATE_REQUESTS = 256  # whose recurrent states are in memory; the default of --max-num-seqs
NO_LIMIT = 1 << 30  # tokens that fit where no layer keeps keys and values
# The share of GPU memory for weights and KV cache. `llmkit serve` and vLLM have the same default.
UTILIZATION = 0.9


class Gpu(NamedTuple):
    """A GPU model: memory as nvidia-smi reports it, peak rates from the data sheet."""

    memory_mib: int
    flops_per_s: float  # of dense 16-bit matrix products
    bytes_per_s: float  # memory bandwidth


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
    """The key of GPUS for a name or its beginning. Raises UsageError when none or several match."""
    matches = [key for key in GPUS if key == name.lower()]
    if not matches:
        matches = [key for key in GPUS if key.startswith(f"{name.lower()}-")]
    if len(matches) != 1:
        raise UsageError(
            f"--gpu {name} is not known",
            f"One of {', '.join(matches or GPUS)}, or a size like 48GiB",
        )
    return matches[0]


def gpu_bytes(name: str) -> int:
    """The memory of a GPU of GPUS. Raises UsageError for an unknown one."""
    return GPUS[gpu_name(name)].memory_mib * MIB


def plan_report(
    source: ShardSource,
    tp: int,
    pp: int = 1,
    ep: int = 1,
    pp_layers: Sequence[int] = (),
    memory: int | None = None,
) -> dict[str, Any]:
    """The plan's figures (see `ShardPlan.to_json`) and the sizes that work, as a JSON document.

    When the sizes do not divide the model, `refusal` says why, and the plan's figures are absent.

    memory: bytes of each rank's GPU. With it, each rank has `tokens`: the size of the KV cache that
    fits beside the weights in UTILIZATION of the memory. Sliding windows are counted as full
    context, and activations are not counted.
    Raises InputError for a bad source, UsageError for sizes that contradict each other.
    """
    works = working_sizes(source)
    max_pp = len(validated_spec(source).stage_starts) + 1
    return {
        **layout_figures(source, tp, pp, ep, pp_layers, memory),
        "works": works,
        "max_pp": max_pp,
    }


def working_sizes(source: ShardSource) -> list[dict[str, Any]]:
    """The TP sizes that work, each with the EP sizes that work with it."""
    layouts = valid_layouts(validated_spec(source), source.checkpoint.quantization)
    works: list[dict[str, Any]] = [{"tp": tp, "ep": ep_sizes} for tp, ep_sizes in layouts.items()]
    # Act-order can rule out every split of the input features. Planning one split shows whether it
    # does.
    smallest = next((size for size in works if size["tp"] > 1), None)
    try:
        if smallest is None:
            plan_source(source, 1)
        else:
            plan_source(source, smallest["tp"], 1, smallest["ep"][-1])
    except InputError:
        works = [size for size in works if size["tp"] == 1]
    return works


def layout_figures(
    source: ShardSource,
    tp: int,
    pp: int = 1,
    ep: int = 1,
    pp_layers: Sequence[int] = (),
    memory: int | None = None,
) -> dict[str, Any]:
    """The figures of one layout: `plan_report` without the sizes that work."""
    try:
        figures = plan_source(source, tp, pp, ep, pp_layers).to_json()
    except InputError as error:
        refusal = ". ".join(filter(None, (error.what, error.expected)))
        return {"tp": tp, "pp": pp, "ep": ep, "refusal": refusal}
    if memory is not None:
        for rank in figures["ranks"]:
            rank["tokens"] = _tokens_that_fit(
                rank, max(0, int(memory * UTILIZATION) - rank["bytes"])
            )
        tokens = min(rank["tokens"] for rank in figures["ranks"])
        figures |= {"tokens": tokens, "memory_bytes": memory, "utilization": UTILIZATION}
    return {**figures, "refusal": None}


def _tokens_that_fit(rank: Mapping[str, int], cache_bytes: int) -> int:
    """The tokens of a KV cache beside the recurrent states of STATE_REQUESTS requests.

    The states get at most half of the memory.
    """
    states = min(cache_bytes // 2, STATE_REQUESTS * rank["state_bytes_per_request"])
    if rank["kv_bytes_per_token"]:
        return (cache_bytes - states) // rank["kv_bytes_per_token"]
    return NO_LIMIT if states < cache_bytes // 2 or not states else 0


def nodes_report(source: ShardSource, memory: int, gpus_per_node: int) -> dict[str, Any]:
    """The number of nodes that the model needs: {"node": {..., "nodes": 2}}.

    The KV cache must hold NODE_TOKENS tokens, or the model's context where that is shorter. `nodes`
    is 0 when the model does not fit on any number of nodes.
    """
    tokens = min(NODE_TOKENS, validated_spec(source).max_position_embeddings)
    try:
        tp, pp = smallest_layout(source, memory, gpus_per_node, tokens)
        layout = {"tp": tp, "pp": pp, "nodes": max(1, -(-tp * pp // gpus_per_node))}
    except InputError:
        layout = {"nodes": 0}
    return {"node": {"gpus": gpus_per_node, "tokens": tokens, **layout}}


def smallest_layout(
    source: ShardSource, memory: int, gpus_per_node: int, tokens: int
) -> tuple[int, int]:
    """The smallest TP and PP that hold the model and a KV cache of `tokens` tokens.

    memory: bytes of each GPU.
    On one node, TP is the smallest size that fits. On several nodes, TP is the largest size within
    a node, and PP spans the nodes. Raises InputError when no layout fits.
    """
    tp_sizes = [size["tp"] for size in working_sizes(source) if size["tp"] <= gpus_per_node]
    max_tp = tp_sizes[-1]

    def fits(tp: int, pp: int) -> bool:
        figures = layout_figures(source, tp, pp, memory=memory)
        return not figures["refusal"] and figures["tokens"] >= tokens

    for tp in tp_sizes:
        if fits(tp, 1):
            return tp, 1
    for pp in range(2, len(validated_spec(source).stage_starts) + 2):
        if fits(max_tp, pp):
            return max_tp, pp
    raise InputError(
        f"{tokens:,} tokens and the weights do not fit on nodes of"
        f" {gpus_per_node} x {memory / 2**30:.0f} GiB",
        f"Tried: TP {max_tp} on each node, with a pipeline over up to as many nodes as layers",
        "Name a larger GPU, more of them a node, or fewer --tokens",
    )
