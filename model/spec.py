"""`ModelSpec` describes a model for the decoder, the parameter table and the planners.

Most fields that exist in Hugging Face configs have the same name here. The other fields say how a
family differs from Llama.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmkit.checkpoint.hf_config import RopeSpec
from llmkit.model.split import REPLICATED, Split

# What mixes the tokens of a layer. "none": the layer has only an MLP or experts.
Mixer = Literal["attention", "mla", "gated_delta_net", "mamba2", "short_conv", "none"]
ATTENTION_MIXERS: tuple[Mixer, ...] = ("attention", "mla")  # they cache something of each token
Activation = Literal["silu", "gelu_tanh", "gelu", "relu2", "xielu", "swiglu_clamped"]


@dataclass(frozen=True)
class LayerSpec:
    """The settings that differ from layer to layer."""

    sliding_window: int | None = None  # in tokens; None: the layer attends to the whole context
    rope: str | None = "global"  # key into ModelSpec.ropes; None: no position encoding
    is_moe: bool = False  # the layer has experts in place of one MLP
    # Sizes of this layer; None: those of the model.
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    # The layer has no keys and values of its own. It reads those of the layer that is so many
    # layers before it. 0: it has its own.
    kv_shared_layer_offset: int = 0
    k_eq_v: bool = False  # there is no v_proj: values are keys before their norm
    mixer: Mixer = "attention"
    has_mlp: bool = True  # or experts

    @property
    def is_recurrent(self) -> bool:
        """Whether it keeps a recurrent state of each sequence."""
        return self.mixer not in (*ATTENTION_MIXERS, "none")


@dataclass(frozen=True)
class ExpertStack:
    """How a checkpoint stores all experts of a layer in one tensor, [experts, out, in].

    There is one tensor for gate and up, and one for down, and as many for their biases.
    """

    gate_up: str = "experts.gate_up_proj"  # the tensors, without the module of the MoE
    up: str = "experts.up_proj"  # in place of `gate_up`, of experts without a gate
    down: str = "experts.down_proj"
    bias_suffix: str = "_bias"
    interleaved: bool = False  # rows of gate and up alternate; otherwise all of gate come first
    transposed: bool = False  # dense weights are stored as [experts, in, out]


@dataclass(frozen=True)
class MoeSpec:
    """The mixture of experts of a model.

    `module`, `gate`, `up`, `down`, `router`, `correction_bias`, `shared_expert` and
    `shared_expert_gate` are names in the family's checkpoint tensors.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int  # of one expert
    norm_topk_prob: bool  # the scores of the chosen experts are scaled to a sum of one
    module: str = "mlp"  # or "block_sparse_moe"
    gate: str = "gate_proj"  # or "w1"
    up: str = "up_proj"  # or "w3"
    down: str = "down_proj"  # or "w2"
    experts: str = "experts"  # the module of the experts that are stored one by one
    expert_stack: ExpertStack | None = None  # None: a checkpoint stores experts one by one
    expert_bias: bool = False  # the linears of experts have biases
    router: str = "gate"  # the linear that computes the logits of the experts
    router_bias: bool = False
    float32_router: bool = False  # logits in float32, whatever the dtype of the model
    scoring: Literal["softmax", "sigmoid"] = "softmax"  # from logits to scores
    router_logit_softcapping: float | None = None
    # A tensor [num_experts] that is added to the scores to choose experts, but not to weight them.
    correction_bias: str | None = None
    correction_bias_shape: tuple[int, ...] = ()  # in the checkpoint; (): [num_experts]
    # The experts form groups. Only those of the `topk_groups` best groups may be chosen.
    num_groups: int = 1
    topk_groups: int = 1
    # A group is as good as the sum of its two best scores, or as its best one (DeepSeek V2).
    group_score: Literal["top2", "max"] = "top2"
    routed_scaling_factor: float = 1.0  # multiplies the output of the experts
    # The layer has its MLP, too. Router and experts read the hidden state before the MLP's norm,
    # each with norms of their own, and the outputs of both are added (Gemma 4).
    parallel_mlp: bool = False
    shared_intermediate_size: int = 0  # of the expert that every token uses; 0: there is none
    shared_expert: str = "shared_experts"  # its module
    shared_gate_up: str = "gate_up_proj"  # its gate and up; only with `ModelSpec.fused_gate_up`
    shared_down: str = "down_proj"
    shared_expert_gate: str | None = None  # a linear whose sigmoid multiplies its output
    # Experts read and compute vectors of this size: one linear of the layer makes them of its
    # input, and another the update of their sum (Nemotron 3 Super). 0: they have the hidden size.
    latent_size: int = 0


@dataclass(frozen=True)
class MlaSpec:
    """The multi-head latent attention of a model (DeepSeek V2, arXiv 2405.04434, section 2.1)."""

    q_lora_rank: int | None  # of the queries' compressed form; None: one linear computes them
    kv_lora_rank: int
    qk_nope_head_dim: int  # of a head's queries and keys, without a position
    qk_rope_head_dim: int  # of their rotated part, which the keys of all heads share
    v_head_dim: int
    norm_eps: float = 1e-6  # of the norms of the compressed forms

    @property
    def qk_head_dim(self) -> int:
        """The size of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """What is cached of each token: the compressed keys and values, and the rotated keys."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class GatedDeltaNetSpec:
    """The gated delta net layers of a model (Qwen3-Next, Qwen3.5; arXiv 2412.06464)."""

    num_k_heads: int  # queries, too
    num_v_heads: int  # a multiple of num_k_heads
    head_k_dim: int
    head_v_dim: int
    conv_kernel_size: int
    # The checkpoint has one linear for queries, keys, values and gates, and one for beta and decay.
    # Their rows are those of one key head after the other (Qwen3-Next).
    fused_projections: bool = False
    # The checkpoint has beta and decay quantized. llmkit's quantizers leave them in 16 bits.
    quantized_gates: bool = False

    def of_rank(self, tp: int) -> GatedDeltaNetSpec:
        """The share of one of `tp` ranks: key heads, with the value heads that read them."""
        return replace(self, num_k_heads=self.num_k_heads // tp, num_v_heads=self.num_v_heads // tp)

    @property
    def conv_channels(self) -> int:
        """The channels of the convolution: queries, keys and values."""
        return 2 * self.num_k_heads * self.head_k_dim + self.num_v_heads * self.head_v_dim

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """The state of a sequence, [heads, K, V]."""
        return self.num_v_heads, self.head_k_dim, self.head_v_dim


@dataclass(frozen=True)
class Mamba2Spec:
    """The Mamba 2 layers of a model (arXiv 2405.21060)."""

    num_heads: int
    head_dim: int
    n_groups: int  # heads of a group share B and C
    state_size: int
    conv_kernel_size: int
    conv_bias: bool = True
    proj_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    gated_norm: bool = True  # the output is normalized after the gate
    norm_groups: int = 1  # the norm is over each of so many equal parts of the output

    def of_rank(self, tp: int) -> Mamba2Spec:
        """The share of one of `tp` ranks: heads with their group, which ranks may share."""
        return replace(
            self,
            num_heads=self.num_heads // tp,
            n_groups=max(1, self.n_groups // tp),
            norm_groups=max(1, self.norm_groups // tp),
        )

    @property
    def intermediate_size(self) -> int:
        """The features of all heads."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """The channels of the convolution: x, B and C."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """The state of a sequence, [heads, state_size, head_dim]."""
        return self.num_heads, self.state_size, self.head_dim


@dataclass(frozen=True)
class ShortConvSpec:
    """The gated short convolutions of a model (LFM2)."""

    channels: int
    conv_kernel_size: int
    bias: bool = False

    def of_rank(self, tp: int) -> ShortConvSpec:
        """The share of one of `tp` ranks."""
        return replace(self, channels=self.channels // tp)

    @property
    def conv_channels(self) -> int:
        """The channels of the convolution."""
        return self.channels

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """There is no state besides the last inputs of the convolution."""
        return 0, 0, 0


RecurrentSpec = GatedDeltaNetSpec | Mamba2Spec | ShortConvSpec


@dataclass(frozen=True)
class DraftHeadSpec:
    """A small head that drafts tokens from the hidden states of a model.

    For each token it reads the model's hidden state of the token before, and the token's embedding.
    An MTP head (arXiv 2412.19437, section 2.2) is a part of the model: it projects both and runs a
    decoder layer. An EAGLE-3 head (arXiv 2503.01840) is a checkpoint of its own: it projects hidden
    states of several layers, and its attention reads both side by side.

    `layers`, `embed_norm`, `hidden_norm`, `fc` and `norm` are modules of the checkpoint.
    """

    method: Literal["mtp", "eagle3"]
    # Its decoder layers: "model.layers.46", "mtp.layers.0" or "midlayer". There is one but for
    # Nemotron-H, whose layers have one block each.
    layers: tuple[str, ...]
    layer_specs: tuple[LayerSpec, ...]
    embed_norm: str
    hidden_norm: str
    fc: str  # what projects: embedding and hidden state in "mtp", hidden states in "eagle3"
    norm: str  # before the output projection
    # The rest is of "eagle3" only.
    # The layers of the model whose inputs `fc` reads; the number of layers: the last one's output.
    aux_layers: tuple[int, ...] = ()
    target_hidden_size: int = 0  # of the model
    norm_before_residual: bool = False  # the residual is the normalized hidden state
    embed: str | None = None  # its own embedding; None: the model's
    lm_head: str | None = None  # its own output projection; None: the model's
    draft_vocab_size: int = 0  # rows of its output projection


@dataclass(frozen=True)
class RankSpec:
    """The share of a model that one rank holds: the layers of its stage, a slice of each tensor.

    The `tp_size` ranks of a stage form `ep_size` groups of neighbouring ranks. A group holds an
    equal share of the experts, and splits each of them over its tp_size / ep_size ranks.
    """

    full_model: ModelSpec
    tp_rank: int
    tp_size: int
    ep_size: int
    first_layer: int  # its layers in the full model: [first_layer, end_layer)
    end_layer: int


@dataclass(frozen=True)
class TransformersTensor:
    """A checkpoint tensor of a model that runs by transformers' own modeling code."""

    name: str  # of the runtime tensor, "layers.3.attn.c_proj.weight"
    source: str  # in the checkpoint, "transformer.h.3.attn.c_proj.weight"
    # The parameter or buffer of transformers' model that it is; None: transformers makes one out of
    # several checkpoint tensors, as it does for experts.
    parameter: str | None
    shape: tuple[int, ...]
    layer: int | None
    is_linear: bool  # the weight of an nn.Linear of a layer
    is_float32: bool  # kept in float32 whatever the dtype of the model
    split: Split = REPLICATED  # over tensor-parallel ranks, as the model's tp_plan says


@dataclass(frozen=True)
class TransformersSpec:
    """What the fallback through transformers needs besides the sizes in `ModelSpec`."""

    config: dict[str, Any] = field(hash=False)  # config.json
    layers: tuple[str, ...]  # transformers' names of the layers' modules
    tensors: tuple[TransformersTensor, ...]
    tied: tuple[str, ...]  # the names of tensors that repeat others; checkpoints may have them
    tp_refusal: str  # why the tensors cannot be split over ranks; "" when they can


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer, or the share of one that a rank holds.

    In the spec of a rank (see `rank_spec`), the numbers of heads, features, layers and vocabulary
    rows are those of the rank.
    """

    architecture: str  # "LlamaForCausalLM"
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int  # the longest context, in tokens
    layers: tuple[LayerSpec, ...]
    ropes: dict[str, RopeSpec] = field(hash=False)
    rms_norm_eps: float = 1e-6  # of layer norms too
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0  # Gemma multiplies by (1 + weight)
    pre_norm: bool = True  # attention and MLP read a normalized hidden state
    post_norm: bool = False  # the output of attention and MLP is normalized before the residual add
    # Attention and MLP read the same normalized hidden state, and both outputs are added to it.
    parallel_block: bool = False
    # Over head_dim, over head_dim with weights for each head, or over all heads at once.
    qk_norm: Literal["none", "head", "each_head", "full"] = "none"
    norm_after_rope: bool = False  # the QK norm comes after RoPE
    rope_interleaved: bool = False  # RoPE rotates dimensions 2i and 2i + 1 rather than i and i + R
    # A linear of attention's input whose activation multiplies attention's output: one value for
    # each element, or one for each head.
    attention_gate: Literal["none", "element", "head"] = "none"
    # q_proj has the gate of each head's elements after the head's query (Qwen3-Next).
    fused_q_gate: bool = False
    attention_gate_activation: Literal["sigmoid", "softplus"] = "sigmoid"
    # A learned logit for each query head joins the softmax's sum (see `paged_attention`).
    attention_sinks: bool = False
    v_norm: bool = False  # values are normalized over head_dim, without a weight
    activation: Activation = "silu"
    swiglu_limit: float = 0.0  # of "swiglu_clamped"; see `elementwise.swiglu_clamped`
    swiglu_alpha: float = 1.702
    gated_mlp: bool = True  # act(gate) * up; otherwise act(up)
    qkv_bias: bool = False
    o_proj_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False  # the checkpoint stores qkv_proj (Phi-3)
    fused_gate_up: bool = False  # the checkpoint stores gate_up_proj (Phi-3, GLM)
    # Names of modules in the checkpoint that differ from Llama's: {"mlp_norm": "ffn_norm"}. The
    # keys are those of `parameter.MODULES`.
    module_names: dict[str, str] = field(default_factory=dict, hash=False)
    # What the names of the embedding, the layers and the last norm begin with in the checkpoint.
    tensor_prefix: str = "model"
    lm_head_name: str = "lm_head"  # the output projection's module in the checkpoint
    # What the names of carried tensors begin with: parts that this model does not run, such as a
    # vision tower or an MTP head (`mtp`). Outputs get them byte for byte.
    carried: tuple[str, ...] = ()
    tie_word_embeddings: bool = False
    # Rows of the classification head, which such a model has in place of the output projection; 0:
    # the model generates text (see classifiers.py).
    num_labels: int = 0
    # A second embedding gives every layer a vector of this size for each token (Gemma 4); 0: none.
    per_layer_input_size: int = 0
    layer_scalar: bool = False  # a number multiplies the output of each layer
    attention_scale: float = 1.0  # multiplies the attention scores
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    # The factors of embeddings are rounded to the dtype of the model first, as Gemma's code does.
    rounds_embedding_multiplier: bool = False
    residual_multiplier: float = 1.0
    logit_scale: float = 1.0  # multiplies the logits
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None  # of the layers whose mixer is "mla"
    recurrent: RecurrentSpec | None = None  # of the layers whose mixer is recurrent
    mtp: DraftHeadSpec | None = None  # the model's own draft head, whose tensors are carried
    # Set for a draft head: this is a model of its layers, and the rest is of its model.
    draft_head: DraftHeadSpec | None = None
    rank: RankSpec | None = None  # None: this is the full model
    # Set for the fallback: the model runs by transformers' own modeling code.
    transformers: TransformersSpec | None = None

    @property
    def full_model(self) -> ModelSpec:
        """The spec of the full model that this rank holds a share of."""
        return self if self.rank is None else self.rank.full_model

    @property
    def is_first_stage(self) -> bool:
        """Whether it has the first layer, and so the embedding."""
        return self.rank is None or self.rank.first_layer == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it has the last layer, and so the output projection."""
        return self.rank is None or self.rank.end_layer == len(self.full_model.layers)

    @property
    def kv_source_layers(self) -> frozenset[int]:
        """The layers whose keys and values later layers read, too."""
        return frozenset(
            index - layer.kv_shared_layer_offset
            for index, layer in enumerate(self.layers)
            if layer.kv_shared_layer_offset
        )

    @property
    def stage_starts(self) -> tuple[int, ...]:
        """The layers with which a pipeline stage after the first one can begin.

        Such a layer, and those after it, read no keys and values of the layers before it.
        """
        first_source = len(self.layers)
        starts = []
        for index in reversed(range(1, len(self.layers))):
            first_source = min(first_source, index - self.layers[index].kv_shared_layer_offset)
            if first_source >= index:
                starts.append(index)
        return tuple(reversed(starts))

    @property
    def splits_attention(self) -> bool:
        """Whether a tensor-parallel rank holds only some of the heads of attention.

        In the fallback, some models' ranks hold all of them.
        """
        return self.transformers is None or any(
            tensor.split.kind in ("heads", "kv_heads") for tensor in self.transformers.tensors
        )

    @property
    def kv_elements_per_token(self) -> int:
        """The elements of K and V of one token over all layers."""
        return sum(self.kv_elements_of_layer(index) for index in range(len(self.layers)))

    def kv_elements_of_layer(self, index: int) -> int:
        """The elements of K and V of one token in a layer."""
        layer = self.layers[index]
        if layer.mixer == "mla":
            assert self.mla is not None
            return self.mla.latent_dim
        if layer.kv_shared_layer_offset or layer.mixer != "attention":
            return 0
        spec = self.for_layer(index)
        return 2 * spec.num_kv_heads * spec.head_dim

    @property
    def num_recurrent_layers(self) -> int:
        """How many layers keep a recurrent state of each sequence."""
        return sum(layer.is_recurrent for layer in self.layers)

    def recurrent_bytes_per_sequence(self, itemsize: int) -> int:
        """The bytes of the recurrent states of a sequence over all layers.

        itemsize: bytes of an element of the model. State matrices are in float32.
        """
        return sum(
            self.recurrent_bytes_of_layer(index, itemsize) for index in range(len(self.layers))
        )

    def recurrent_bytes_of_layer(self, index: int, itemsize: int) -> int:
        """The bytes of the recurrent state of a sequence in a layer."""
        if self.recurrent is None or not self.layers[index].is_recurrent:
            return 0
        conv = (self.recurrent.conv_kernel_size - 1) * self.recurrent.conv_channels
        heads, keys, values = self.recurrent.state_shape
        return conv * itemsize + heads * keys * values * 4

    def for_layer(self, index: int) -> ModelSpec:
        """The spec with the sizes of a layer, if they differ from those of the model."""
        layer = self.layers[index]
        sizes = {
            name: getattr(layer, name)
            for name in ("num_heads", "num_kv_heads", "head_dim", "intermediate_size")
            if getattr(layer, name) is not None
        }
        return replace(self, **sizes) if sizes else self

    def kv_bytes_per_token(self, itemsize: int, per_token_head_scales: bool = False) -> int:
        """The bytes of K and V of one token over all layers.

        itemsize: bytes of one element.
        per_token_head_scales: an 8-bit cache also stores a float32 scale for each token and head.
        It does so where the checkpoint has no KV scales.
        """
        num_bytes = 0
        for index in range(len(self.layers)):
            elements = self.kv_elements_of_layer(index)
            num_bytes += elements * itemsize
            if per_token_head_scales:
                num_bytes += 4 * (elements // self.for_layer(index).head_dim)
        return num_bytes

    @property
    def scales_logits(self) -> bool:
        """Whether the outputs of the LM head are multiplied or capped."""
        return self.logit_scale != 1.0 or self.final_logit_softcapping is not None

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """The distinct sliding windows of the layers, in layer order.

        Each of them has separate block tables. A model without attention has those of full
        attention, whose blocks hold nothing, so that it has prefixes as others have.
        """
        windows = (layer.sliding_window for layer in self.layers if layer.mixer in ATTENTION_MIXERS)
        return tuple(dict.fromkeys(windows)) or (None,)

    def rope_offset(self, total_tokens: int) -> int:
        """The offset to add to the positions of a request of `total_tokens`, prompt and output.

        It is 0, except for long requests of LongRoPE models. There it is `max_position_embeddings`,
        which selects the long factors (see `RotaryEmbedding`).
        """
        for rope in self.ropes.values():
            if rope.long_inv_freq and total_tokens > rope.original_max_position_embeddings:
                return self.max_position_embeddings
        return 0
