"""The shortest possible time of a step: its bytes and operations at a machine's ceilings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from llmkit.bench.gpu.model_shapes import WEIGHT_SCHEMES, product_type, scale_bytes
from llmkit.bench.model_costs import attention_elements
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec

DENSE_BYTES = 2  # of a weight, key or value that is not quantized


@dataclass(frozen=True)
class Ceilings:
    """What a machine does at most."""

    name: str
    bytes_per_s: float  # read and written by a large copy
    # Of large matrix products, by the type of their inputs: "bf16", "fp8", "int8".
    flops_per_s: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, num_bytes: float, flops: Mapping[str, float]) -> float:
        """The larger time of the bytes and of the operations. Unknown rates are left out."""
        compute_s = sum(
            count / self.flops_per_s[inputs]
            for inputs, count in flops.items()
            if self.flops_per_s.get(inputs)
        )
        return max(num_bytes / self.bytes_per_s, compute_s)


# A copy at 4.3 TB/s and products at 790 TFLOP/s were measured on one; 8 bits are twice as fast.
H200 = Ceilings("H200", 4.3e12, {"bf16": 790e12, "fp8": 1580e12, "int8": 1580e12})


@dataclass(frozen=True)
class StepCost:
    """What a step reads, and its operations by the type of the inputs."""

    bytes: float
    flops: dict[str, float]


def step_cost(
    spec: ModelSpec,
    weights: str,
    num_sequences: int,
    query_len: int,
    context: int,
    kv_element_bytes: float = DENSE_BYTES,
) -> StepCost:
    """The cost of a step that computes the last `query_len` of each sequence's `context` tokens.

    weights: a key of WEIGHT_SCHEMES; experts and the head are not quantized. Of a mixture of
    experts, it counts the experts that the tokens choose when all are equally likely.
    """
    scheme = WEIGHT_SCHEMES[weights]
    tokens = num_sequences * query_len
    experts_per_token = 1.0  # share of all experts
    experts_read = 1.0
    if spec.moe is not None:
        experts_per_token = spec.moe.num_experts_per_tok / spec.moe.num_experts
        experts_read = 1 - (1 - experts_per_token) ** tokens
    num_bytes = float(spec.vocab_size * spec.hidden_size * DENSE_BYTES)
    inputs = product_type(weights)
    flops = {"bf16": 0.0, inputs: 0.0}
    flops["bf16"] = 2.0 * num_sequences * spec.vocab_size * spec.hidden_size
    for row in parameters(spec):
        if not row.is_linear:
            continue
        size = prod(row.shape)
        if row.expert is not None:
            num_bytes += size * DENSE_BYTES * experts_read
            flops["bf16"] += 2.0 * size * tokens * experts_per_token
        elif scheme is None:
            num_bytes += size * DENSE_BYTES
            flops["bf16"] += 2.0 * size * tokens
        else:
            num_bytes += size * scheme.bits / 8
            num_bytes += row.shape[0] * scheme.groups(row.shape[1]) * scale_bytes(scheme)
            flops[inputs] += 2.0 * size * tokens
    num_bytes += num_sequences * context * spec.kv_elements_per_token * kv_element_bytes
    attended = query_len * context - query_len * (query_len - 1) // 2  # pairs of a sequence
    queries = sum(attention_elements(spec, index) for index in range(len(spec.layers)))
    flops["bf16"] += 4.0 * num_sequences * attended * queries
    num_bytes += 2 * num_sequences * spec.recurrent_bytes_per_sequence(DENSE_BYTES)
    return StepCost(num_bytes, flops)
