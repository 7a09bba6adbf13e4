"""`ModelSpec`: everything the decoder, the parameter table and the planners need to know of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmkit.checkpoint.config import RopeSpec


@dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer."""

    window: int | None = None  # sliding window in tokens; None: the whole context
    rope: str | None = "global"  # key into ModelSpec.ropes; None: no position encoding
    moe: bool = False


@dataclass(frozen=True)
class ExpertSpec:
    """A mixture of experts; the tensor names are those of the family's checkpoints."""

    count: int
    per_token: int
    intermediate: int
    normalize: bool  # the chosen experts' probabilities are made to add up to one
    block: str  # "mlp" or "block_sparse_moe"
    gate: str  # an expert's tensors: "gate_proj" or "w1", ...
    up: str
    down: str


@dataclass(frozen=True)
class RankSpec:
    """What of a model a rank holds: a share of each tensor, over `tp` ranks, of the layers of a pipeline stage.

    Experts are divided over `ep` groups of tp / ep neighbouring ranks, and each is split over the ranks of its group.
    """

    whole: ModelSpec
    rank: int  # among the tp
    tp: int
    ep: int
    first: int  # its layers among the whole model's: [first, stop)
    stop: int


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer, or a rank's part of one. Sizes are in elements, positions in tokens."""

    architecture: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    ropes: dict[str, RopeSpec] = field(hash=False)
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # Gemma multiplies by (1 + weight)
    norm_before: bool = True  # a norm on what a block reads
    norm_after: bool = False  # a norm on what a block adds
    qk_norm: Literal["none", "head", "full"] = "none"  # over head_dim, or over all heads at once
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_checkpoint: bool = False  # the checkpoint itself stores qkv_proj and gate_up_proj (Phi-3)
    tied: bool = False
    attention_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    experts: ExpertSpec | None = None
    rank: RankSpec | None = None  # of a part, whose sizes, layers and vocabulary are then the rank's own

    @property
    def whole(self) -> ModelSpec:
        """The model that it is a part of."""
        return self if self.rank is None else self.rank.whole

    @property
    def begins(self) -> bool:
        """Whether it has the first layer, and so the embedding."""
        return self.rank is None or self.rank.first == 0

    @property
    def ends(self) -> bool:
        """Whether it has the last layer, and so the output projection."""
        return self.rank is None or self.rank.stop == len(self.whole.layers)

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of K and V one token needs over all layers (multiply by the cache's element size)."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim

    def kv_bytes_per_token(self, itemsize: int, own_scales: bool = False) -> int:
        """Bytes of K and V of one token over all layers, `itemsize` each; with a scale for every head if `own_scales`,
        as an 8-bit cache has them when the checkpoint stores none."""
        return self.kv_elements_per_token * itemsize + own_scales * 4 * (self.kv_elements_per_token // self.head_dim)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of the layers, in their order; each has block tables of its own."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    def rope_offset(self, total_tokens: int) -> int:
        """What to add to the positions of a request that will reach `total_tokens`, prompt and output.

        Positions from `max_positions` on stand for the long factors of LongRoPE; 0 for other models.
        """
        for rope in self.ropes.values():
            if rope.long_frequencies and total_tokens > rope.original_positions:
                return self.max_positions
        return 0
