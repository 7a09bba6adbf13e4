"""The one decoder: every supported family, configured by its spec.

Legend: T tokens of a step, H hidden, N query heads, K key-value heads, D head_dim. Modules have the
names of the parameter table ("layers.3.attn.qkv", "lm_head").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch

from llmkit.kernels.attention import paged_attention, rope_and_cache
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_experts import CpuExperts
from llmkit.kernels.cpu.cpu_linear import CpuLinear
from llmkit.kernels.cpu.cpu_mlp import CpuMlp
from llmkit.kernels.elementwise import (
    act,
    act_and_mul,
    act_and_mul_quantized,
    add_layer_norm,
    add_norm_quantized,
    add_residual,
    add_rms_norm,
    apply_gate,
    cat_heads,
    layer_norm,
    rms_norm,
    swiglu_clamped,
    xielu,
)
from llmkit.kernels.fp4_expert import Fp4Expert
from llmkit.kernels.fp8_block_linear import Fp8BlockLinear
from llmkit.kernels.fused_experts import FusedExperts, stack_experts
from llmkit.kernels.fused_experts import supports as supports_fused_experts
from llmkit.kernels.input_quant import InputQuant, LinearInput
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.latent_cache import LatentCache
from llmkit.kernels.triton_support import runs_triton
from llmkit.model.language_model import LayerCache, empty_kv_cache
from llmkit.model.linear import ActivationQuant, Linear, PackedLinear, common_input_quant
from llmkit.model.mla import mla_mixer
from llmkit.model.parallel_group import ParallelGroup, mask_padding
from llmkit.model.parameter_table import LATENT_LINEARS, XIELU_PARAMETERS
from llmkit.model.recurrent_mixers import RECURRENT_MIXERS
from llmkit.model.rope import CosSin, make_rotary_embeddings
from llmkit.model.router import select_experts
from llmkit.model.spec import ModelSpec
from llmkit.model.token_embedding import TokenEmbedding

SINGLE_RANK = ParallelGroup()
# The tables that are looked up by token. They may have another dtype than the model.
TABLES = ("embed.weight", "per_layer.embed.weight")
# The norms of mixers' outputs: their weight has no offset (`ModelSpec.norm_offset`).
MIXER_NORMS = ("gdn.norm", "mamba.norm")
# The linear whose inputs, latents, are never rounded (see mla.py).
UNROUNDED_INPUTS = "attn.kv_b"
# The linears that read the norm before a mixer.
MIXER_INPUTS = (
    "attn.qkv",
    "attn.qkv_a",
    "attn.gate",
    "gdn.qkvz",
    "gdn.ba",
    "mamba.in_proj",
    "conv.in_proj",
)
MIXER_OUTPUTS = ("attn.o", "gdn.out", "mamba.out", "conv.out")

_Value = TypeVar("_Value")


class DecoderLayer:
    """One layer: attention and an MLP, or a mixture of experts.

    tensors: the layer's runtime tensors, by name without the prefix `layers.<index>.`
    ("attn.qkv.weight").
    linears: the packed linear layers by module name ("attn.qkv", "mlp.down",
    "mlp.experts.3.gate_up"). The other linear layers are made from `tensors`.
    activation_quant: how the inputs of a linear layer are quantized, by module name. "attn.k" and
    "attn.v" say how keys and values are quantized before they are stored.
    """

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        tensors: Mapping[str, torch.Tensor],
        activation_quant: Mapping[str, ActivationQuant] | None = None,
        linears: Mapping[str, Linear] | None = None,
        parallel_group: ParallelGroup = SINGLE_RANK,
    ) -> None:
        self.index = index
        self.spec = spec.for_layer(index)
        self.layer = spec.layers[index]
        self.parallel_group = parallel_group
        self.activation_quant = dict(activation_quant or {})
        self.linears: dict[str, Linear] = dict(linears or {})
        self.norms: dict[str, torch.Tensor] = {}
        # `LoraManager.activate` sets it during a step in which some rows have an adapter.
        self.has_lora_rows = False
        # The rows of the step that the current expert computes. `_moe` sets them for the expert's
        # `LinearWithLora`.
        self.expert_rows = torch.empty(0, dtype=torch.int64)
        # Calibration sets it to see what experts compute: it is called with an expert's number, its
        # outputs [n, H] and their weights [n, 1]. Kernels of several experts do not run then.
        self.expert_observer: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None
        self._cpu_mlps: dict[str, CpuMlp | None] = {}  # by module; see `_cpu_mlp`
        # The layer runs inside this context. Weight offloading replaces it with one that copies the
        # layer's weights to the device.
        self.weights_on_device: Callable[[], AbstractContextManager[None]] = nullcontext
        self.norm_biases: dict[str, torch.Tensor] = {}
        # The other parameters, by name within the layer ("mlp.router.correction_bias").
        self.vectors: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            module, _, kind = name.rpartition(".")
            if module.endswith("norm"):
                if kind == "bias":
                    self.norm_biases[module] = tensor
                else:
                    is_plain = module in MIXER_NORMS
                    self.norms[module] = tensor if is_plain else norm_weight(tensor, spec)
            elif module.endswith(".conv"):  # [channels, 1, width] of a convolution
                self.vectors[name] = tensor.flatten(1) if kind == "weight" else tensor
            elif kind == "weight":
                bias = tensors.get(f"{module}.bias")
                is_rounded = module != UNROUNDED_INPUTS
                quant = self.activation_quant.get(module) if is_rounded else None
                self.linears[module] = Linear(tensor, bias, quant)
            elif kind != "bias":
                self.vectors[name] = tensor

    def __call__(
        self,
        hidden: torch.Tensor,
        cos_sin: Mapping[str, CosSin],
        batch: AttentionBatch,
        cache: LayerCache,
        per_layer_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer. hidden: [T, H] in and out; the other inputs: see `attention_block`."""
        return self.add_update(
            *self.forward_with_residual(hidden, None, cos_sin, batch, cache, per_layer_input)
        )

    def forward_with_residual(
        self,
        residual: torch.Tensor,
        update: torch.Tensor | None,
        cos_sin: Mapping[str, CosSin],
        batch: AttentionBatch,
        cache: LayerCache,
        per_layer_input: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer. The residual addition is deferred, so that it fuses with the next norm.

        residual: [T, H]. update: [T, H], the output of the previous layer's MLP, which is not yet
        added to `residual`; None: there is nothing to add. The other inputs: see `attention_block`.
        Returns the new residual, and the output of this layer's MLP.
        """
        with self.weights_on_device():
            if self.spec.parallel_block:
                residual, x = self._add_norm(residual, update, "attn_norm")
                update = self._mix_tokens(x, cos_sin, batch, cache)
                return residual, add_residual(update, self._mlp_or_moe(x, residual), 1.0)
            residual, update = self.attention_block(residual, update, cos_sin, batch, cache)
            return self.mlp_block(residual, update, per_layer_input)

    def attention_block(
        self,
        residual: torch.Tensor,
        update: torch.Tensor | None,
        cos_sin: Mapping[str, CosSin],
        batch: AttentionBatch,
        cache: LayerCache,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The first half of the layer; see `forward_with_residual`.

        cache: where the step's keys and values, or its recurrent states, are written. A layer that
        has no keys and values of its own reads those that an earlier layer has written there.
        """
        if self.layer.mixer == "none":
            return residual, update
        residual, x = self._add_norm(residual, update, "attn_norm")
        return residual, self._mix_tokens(x, cos_sin, batch, cache)

    def attend(
        self,
        x: LinearInput,
        cos_sin: Mapping[str, CosSin],
        batch: AttentionBatch,
        cache: LayerCache,
    ) -> torch.Tensor:
        """What attention adds to the residual, [T, H]. x: its input [T, C], already normalized.

        For the others see `attention_block`.
        """
        return self._mix_tokens(x, cos_sin, batch, cache)

    def mlp_block(
        self,
        residual: torch.Tensor,
        update: torch.Tensor | None,
        per_layer_input: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The second half of the layer; see `forward_with_residual`.

        per_layer_input: [T, P], what the layer reads of each token, see
        `ModelSpec.per_layer_input_size`.
        """
        if not self.layer.has_mlp:
            return residual, update
        residual, x = self._add_norm(residual, update, "mlp_norm")
        return self._after_mlp(residual, self._mlp_or_moe(x, residual), per_layer_input)

    def finish_attention(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The hidden states [T, H] after the layer's first half.

        residual: its input, [T, H]. x: [T, in], what its last linear reads.
        """
        (output,) = [name for name in MIXER_OUTPUTS if name in self.linears]
        update = self.parallel_group.all_reduce(self.linears[output](x))
        return self.add_update(residual, self._norm(update, "attn_post_norm"))

    def finish_mlp(
        self, residual: torch.Tensor, x: torch.Tensor, per_layer_input: torch.Tensor | None
    ) -> torch.Tensor:
        """The hidden states [T, H] after the layer's second half, which is not a mixture.

        residual: its input, [T, H]. x: [T, in], what its last linear reads.
        """
        update = self.parallel_group.all_reduce(self.linears["mlp.down"](x))
        update = self._norm(update, "mlp_post_norm")
        return self.add_update(*self._after_mlp(residual, update, per_layer_input))

    def _after_mlp(
        self, residual: torch.Tensor, update: torch.Tensor, per_layer_input: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The results of `mlp_block`. update: [T, H], the output of the MLP or the mixture."""
        if not self.spec.layer_scalar:
            return residual, update
        hidden = self.add_update(residual, update)
        if per_layer_input is not None:
            update = self._per_layer_update(hidden, per_layer_input)
            hidden = add_residual(hidden, update, 1.0)
        scalar = self.vectors["layer_scalar"]
        return apply_gate(hidden, scalar.expand(len(hidden), 1), "identity"), None

    def add_update(self, residual: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor:
        """The hidden states [T, H] whose addition a block has deferred."""
        if update is None:
            return residual
        return add_residual(residual, update, self.spec.residual_multiplier)

    def _per_layer_update(
        self, hidden: torch.Tensor, per_layer_input: torch.Tensor
    ) -> torch.Tensor:
        """What the layer's own input of each token [T, P] adds to the hidden states [T, H]."""
        activation = self.spec.activation
        assert activation != "xielu" and activation != "swiglu_clamped"
        gate = act(self.linears["per_layer.gate"](hidden), activation)
        projected = self.linears["per_layer.projection"](
            apply_gate(gate, per_layer_input, "identity")
        )
        return self._norm(projected, "per_layer.norm")

    def _mix_tokens(
        self,
        x: LinearInput,
        cos_sin: Mapping[str, CosSin],
        batch: AttentionBatch,
        cache: LayerCache,
    ) -> torch.Tensor:
        """Attention, or what the layer has in its place.

        x: [T, H], normalized. Returns the update of the residual, [T, H].
        """
        if isinstance(cache, KVCache):
            return self._attention(x, cos_sin, batch, cache)
        if isinstance(cache, LatentCache):
            update = self.parallel_group.all_reduce(mla_mixer(self, x, cos_sin, batch, cache))
            return self._norm(update, "attn_post_norm")
        mix = RECURRENT_MIXERS[self.layer.mixer]
        update = self.parallel_group.all_reduce(mix(self, x, batch.recurrent, cache))
        return self._norm(update, "attn_post_norm")

    def _attention(
        self,
        x: LinearInput,
        cos_sin: Mapping[str, CosSin],
        batch: AttentionBatch,
        cache: KVCache,
    ) -> torch.Tensor:
        """x: [T, H], normalized. Returns the update of the residual, [T, H]."""
        spec = self.spec
        metadata = batch.metadata(self.layer.sliding_window)
        qkv = self.linears["attn.qkv"](x).view(len(x), -1, spec.head_dim)  # [T, N + 2K, D]
        gate = None
        if spec.fused_q_gate:
            gate = qkv[:, -spec.num_heads :]
            qkv = qkv[:, : -spec.num_heads]
        elif spec.attention_gate != "none":
            gate = self.linears["attn.gate"](x)
        if self.layer.k_eq_v:
            qkv = cat_heads((qkv, qkv[:, spec.num_heads :]))
        if spec.v_norm and not self.layer.kv_shared_layer_offset:
            qkv = self._normalize_values(qkv)
        norms = None
        if spec.qk_norm == "full":
            qkv = self._full_qk_norm(qkv)
        elif spec.qk_norm != "none":
            q_norm = self.norms["attn.q_norm"]
            norms = q_norm, self.norms.get("attn.k_norm", q_norm)
        kv_quant = None
        if cache.quantized and cache.scales is None:
            cache = replace(cache, static_scales=self._kv_scales)
        elif not cache.quantized and "attn.k" in self.activation_quant:
            kv_quant = self.activation_quant["attn.k"], self.activation_quant["attn.v"]
        rope = cos_sin[self.layer.rope] if self.layer.rope else None
        q = rope_and_cache(
            qkv,
            spec.num_heads,
            norms,
            spec.rms_norm_eps,
            None if rope is None else (rope.cos, rope.sin),
            None if self.layer.kv_shared_layer_offset else cache,
            metadata.slot_mapping,
            kv_quant,
            interleaved=spec.rope_interleaved,
            norm_after_rope=spec.norm_after_rope,
            query_scale=None if rope is None else rope.query_scale,
            norm_subtracts_mean=spec.norm == "layer",
        )
        out = paged_attention(
            q,
            cache,
            metadata,
            spec.attention_scale,
            spec.attn_logit_softcapping,
            self.vectors.get("attn.sinks"),
        )
        if gate is not None:
            out = self._gated(out, gate)
        update = self.parallel_group.all_reduce(self.linears["attn.o"](out.flatten(1)))
        return self._norm(update, "attn_post_norm")

    def _normalize_values(self, qkv: torch.Tensor) -> torch.Tensor:
        """[T, N + 2K, D] with the values divided by their root mean square over D.

        The values of `qkv` may be overwritten.
        """
        first_value_head = (self.spec.num_heads + qkv.shape[1]) // 2
        values = qkv[:, first_value_head:]
        if cpu_kernels.supports(qkv):
            cpu_kernels.norm_heads_(values, self._head_of_ones, self.spec.rms_norm_eps, False)
            return qkv
        normed = rms_norm(values.contiguous(), qkv.new_ones(qkv.shape[-1]), self.spec.rms_norm_eps)
        return torch.cat((qkv[:, :first_value_head], normed), dim=1)

    @cached_property
    def _head_of_ones(self) -> torch.Tensor:
        """Weights [D] of a norm that has none."""
        return torch.ones(self.spec.head_dim)

    def _gated(self, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Attention's output [T, N, D], multiplied by the gate.

        gate: one value for each element, [T, N, D] or [T, N * D], or one for each head, [T, N].
        """
        activation = self.spec.attention_gate_activation
        if self.spec.attention_gate == "head":
            return apply_gate(out.flatten(0, 1), gate.view(-1, 1), activation).view_as(out)
        return apply_gate(out.flatten(1), gate.flatten(1), activation).view_as(out)

    def _mlp_or_moe(self, x: LinearInput, residual: torch.Tensor) -> torch.Tensor:
        """x: [T, H], the residual normalized. Returns the update of the residual, [T, H]."""
        moe = self.spec.moe
        if moe is not None and moe.parallel_mlp and self.layer.is_moe:
            update = self._mlp_beside_experts(x, residual)
        else:
            update = self._moe(x) if self.layer.is_moe else self._mlp(x, "mlp")
            update = self.parallel_group.all_reduce(update)
        return self._norm(update, "mlp_post_norm")

    def _mlp_beside_experts(self, x: LinearInput, residual: torch.Tensor) -> torch.Tensor:
        """The sum of the MLP of x and of the experts of the residual, [T, H] (Gemma 4)."""
        moe = self.spec.moe
        assert moe is not None
        group = self.parallel_group
        from_mlp = self._norm(group.all_reduce(self._mlp(x, "mlp")), "mlp.post_mlp_norm")
        router_input = rms_norm(residual, self._router_scale, self.spec.rms_norm_eps)
        logits = self.linears["mlp.router"](router_input)
        expert_scales = self.vectors["mlp.router.per_expert_scale"]
        weights, ids = select_experts(logits, moe, None, expert_scales)
        experts = self._experts(self._norm(residual, "mlp.pre_experts_norm"), ids, weights)
        from_experts = self._norm(group.all_reduce(experts), "mlp.post_experts_norm")
        return add_residual(from_mlp, from_experts, 1.0)

    @cached_property
    def _router_scale(self) -> torch.Tensor:
        """The weight [H] of the norm before the router (Gemma 4)."""
        factor: float = self.spec.hidden_size**-0.5
        return self.vectors["mlp.router.scale"] * factor

    def _mlp(self, x: LinearInput, module: str) -> torch.Tensor:
        activation = self.spec.activation
        down = self.linears[f"{module}.down"]
        y: LinearInput
        cpu_mlp = None if self.has_lora_rows else self._cpu_mlp(module)
        if cpu_mlp is not None and cpu_mlp.takes(x):
            return cpu_mlp(x)
        if self.spec.gated_mlp:
            y = self._act_and_mul(self.linears[f"{module}.gate_up"](x), down.input_quant)
        elif activation == "xielu":
            parameters = [self.vectors[f"{module}.act.{name}"] for name in XIELU_PARAMETERS]
            y = xielu(self.linears[f"{module}.up"](x), *parameters)
        else:
            assert activation != "swiglu_clamped"
            y = act(self.linears[f"{module}.up"](x), activation)
        return down(y)

    def _cpu_mlp(self, module: str) -> CpuMlp | None:
        """A gated MLP as one compiled kernel; None where its weights do not allow it."""
        if module not in self._cpu_mlps:
            spec = self.spec
            mlp = None
            if spec.gated_mlp and spec.activation != "xielu":
                gate_up = _cpu_kernel(self.linears[f"{module}.gate_up"])
                down = _cpu_kernel(self.linears[f"{module}.down"])
                if gate_up is not None and down is not None and CpuMlp.supports(gate_up, down):
                    swiglu = spec.swiglu_limit, spec.swiglu_alpha
                    mlp = CpuMlp(gate_up, down, spec.activation, swiglu)
            self._cpu_mlps[module] = mlp
        return self._cpu_mlps[module]

    def _act_and_mul(self, gate_up: torch.Tensor, quant: InputQuant | None) -> LinearInput:
        """The activation of a gated MLP: [T, 2I] -> [T, I], quantized if possible."""
        spec = self.spec
        if spec.activation == "swiglu_clamped":
            return swiglu_clamped(gate_up, spec.swiglu_limit, spec.swiglu_alpha)
        assert spec.activation != "xielu"
        if quant is not None:
            return act_and_mul_quantized(gate_up, spec.activation, quant)
        return act_and_mul(gate_up, spec.activation)

    def _moe(self, x: LinearInput) -> torch.Tensor:
        """The outputs of each token's best experts, weighted by the router, and the shared one."""
        moe = self.spec.moe
        assert moe is not None and isinstance(x, torch.Tensor)
        router = self.linears["mlp.router"]
        topk_weights, topk_ids = select_experts(
            router(x.to(router.weight.dtype)), moe, self.vectors.get("mlp.router.correction_bias")
        )
        if moe.latent_size:
            before, after = (self.linears[f"mlp.{module}"] for module in LATENT_LINEARS)
            experts = after(self._experts(before(x), topk_ids, topk_weights))
        else:
            experts = self._experts(x, topk_ids, topk_weights)
        if not moe.shared_intermediate_size:
            return experts
        return add_residual(experts, self._shared_expert(x), 1.0)

    def _shared_expert(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the expert that every token uses, [T, H]."""
        out = self._mlp(x, "mlp.shared_expert")
        gate = self.linears.get("mlp.shared_expert_gate")
        return out if gate is None else apply_gate(out, gate(x), "sigmoid")

    def _experts(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum of the chosen experts' outputs of each token, [T, H]."""
        may_fuse = not self.has_lora_rows and self.expert_observer is None
        if runs_triton(x) and may_fuse and self.fused_experts is not None:
            return self.fused_experts(x, topk_ids, topk_weights)
        if (
            cpu_kernels.supports(x)
            and x.is_contiguous()
            and may_fuse
            and self.cpu_experts is not None
        ):
            return self.cpu_experts(x, topk_ids, topk_weights)
        out = torch.zeros_like(x)
        for expert in topk_ids.unique().tolist():
            module = f"mlp.experts.{expert}"
            if f"{module}.down" not in self.linears:  # on another rank
                continue
            tokens, choice = (topk_ids == expert).nonzero(as_tuple=True)
            self.expert_rows = tokens
            expert_out = self._mlp(x[tokens], module)
            weights = topk_weights[tokens, choice, None].to(x.dtype)
            if self.expert_observer is not None:
                self.expert_observer(expert, expert_out, weights)
            out.index_add_(0, tokens, expert_out * weights)
        return out

    @cached_property
    def fused_experts(self) -> FusedExperts | None:
        """This rank's experts as one kernel; None where the GPU or the weights do not allow it.

        With this kernel, the host does not wait for the ids of the chosen experts.
        """
        spec = self.spec
        moe = spec.moe
        activations = ("silu", "gelu_tanh", "swiglu_clamped") if spec.gated_mlp else ("relu2",)
        if moe is None or spec.activation not in activations:
            return None
        modules = [f"mlp.experts.{expert}" for expert in range(moe.num_experts)]
        is_local = [f"{module}.down" in self.linears for module in modules]
        local = [expert for expert in range(moe.num_experts) if is_local[expert]]
        if not local:
            return None
        first = "gate_up" if spec.gated_mlp else "up"
        gate_up = [self.linears[f"{modules[expert]}.{first}"] for expert in local]
        down = [self.linears[f"{modules[expert]}.down"] for expert in local]
        linears = gate_up + down
        if any(linear.activation_quant for linear in linears):
            return None
        if any(linear.pre_quant_scale is not None for linear in linears):
            return None
        fp4 = _stack_fp4(gate_up), _stack_fp4(down)
        fp8 = _stack_fp8(gate_up), _stack_fp8(down)
        group_size = 0
        input_quant: InputQuant | None = None
        scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        factors: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        gate_up_stack: torch.Tensor | None
        down_stack: torch.Tensor | None
        if fp4[0] is not None and fp4[1] is not None:
            gate_up_stack = fp4[0].blocks
            down_stack = fp4[1].blocks
            scales = fp4[0].scales, fp4[1].scales
            factors = fp4[0].factors, fp4[1].factors
        elif fp8[0] is not None and fp8[1] is not None:
            if fp8[0].group_size != fp8[1].group_size:
                return None
            gate_up_stack = fp8[0].q
            down_stack = fp8[1].q
            scales = fp8[0].scales, fp8[1].scales
            group_size = fp8[0].group_size
            input_quant = fp8[0].input_quant
        else:
            gate_up_stack = stack_experts([linear.weight for linear in gate_up])
            down_stack = stack_experts([linear.weight for linear in down])
        if gate_up_stack is None or down_stack is None or not supports_fused_experts(gate_up_stack):
            return None
        is_clamped = spec.activation == "swiglu_clamped"
        return FusedExperts(
            gate_up_stack,
            down_stack,
            local[0],
            moe.num_experts,
            spec.activation == "gelu_tanh",
            _stack_biases(gate_up),
            _stack_biases(down),
            *scales,
            swiglu=(spec.swiglu_limit, spec.swiglu_alpha) if is_clamped else None,
            group_size=group_size,
            input_quant=input_quant,
            relu2=spec.activation == "relu2",
            gate_up_factors=factors[0],
            down_factors=factors[1],
        )

    @cached_property
    def cpu_experts(self) -> CpuExperts | None:
        """This rank's experts as one compiled kernel; None where their weights do not allow it."""
        moe = self.spec.moe
        spec = self.spec
        if moe is None or spec.activation == "xielu":
            return None
        first = "gate_up" if spec.gated_mlp else "up"
        kernels: dict[str, list[CpuLinear | None]] = {}
        for part in (first, "down"):
            kernels[part] = []
            for expert in range(moe.num_experts):
                linear = self.linears.get(f"mlp.experts.{expert}.{part}")
                kernels[part].append(None if linear is None else _cpu_kernel(linear))
                if linear is not None and kernels[part][-1] is None:
                    return None
            if not CpuExperts.supports(kernels[part]):
                return None
        return CpuExperts(
            kernels[first],
            kernels["down"],
            gated=spec.gated_mlp,
            activation=spec.activation,
            swiglu=(spec.swiglu_limit, spec.swiglu_alpha),
        )

    def has_kv_scales(self, kv_cache_dtype: str | None) -> bool:
        """Whether the checkpoint has scales for a cache of this dtype in this layer."""
        for name in ("attn.k", "attn.v"):
            quant = self.activation_quant.get(name)
            if quant is None or quant.value_type != kv_cache_dtype or quant.scale is None:
                return False
        return True

    @cached_property
    def _kv_scales(self) -> torch.Tensor:
        """The checkpoint's scales of an 8-bit cache, float32 [2K, 1, 1]."""
        scales = []
        for name in ("attn.k", "attn.v"):
            scale = self.activation_quant[name].scale
            assert scale is not None
            scales.append(scale)
        return torch.cat(scales).float().repeat_interleave(self.spec.num_kv_heads)[:, None, None]

    def _full_qk_norm(self, qkv: torch.Tensor) -> torch.Tensor:
        """[T, N + 2K, D] with queries and keys each normalized over all their heads at once.

        The values of `qkv` may be overwritten.
        """
        spec = self.spec
        q_norm, k_norm = (self.norms[f"attn.{name}_norm"] for name in "qk")
        if (
            self.parallel_group.tp_size == 1
            and cpu_kernels.supports(qkv)
            and q_norm.dtype == k_norm.dtype == qkv.dtype
        ):
            # All heads of a token as one long head.
            ends = (0, spec.num_heads, spec.num_heads + spec.num_kv_heads)
            for (begin, end), weight in zip(pairwise(ends), (q_norm, k_norm), strict=True):
                heads = qkv[:, begin:end].flatten(1)[:, None]
                cpu_kernels.norm_heads_(heads, weight, spec.rms_norm_eps, spec.norm == "layer")
            return qkv
        q, k, v = qkv.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        q = self._norm_over_ranks(q.flatten(1), "attn.q_norm")
        k = self._norm_over_ranks(k.flatten(1), "attn.k_norm")
        return torch.cat((q, k, v.flatten(1)), dim=1).view_as(qkv)

    def _norm_over_ranks(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """`_norm` over the columns of all ranks.

        A KV head that several ranks hold is counted once per rank. All heads are then counted
        equally often, so that the mean is the same.
        """
        group = self.parallel_group
        if group.tp_size == 1:
            return self._norm(x, name)
        wide = x.float()
        square_sum = group.all_reduce(wide.square().sum(-1, keepdim=True))
        mean = square_sum / (x.shape[-1] * group.tp_size)
        normed = wide * torch.rsqrt(mean + self.spec.rms_norm_eps) * self.norms[name].float()
        return normed.to(x.dtype)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Apply the norm `name`. Returns x itself when the model has no such norm."""
        weight = self.norms.get(name)
        if weight is None:
            return x
        if self.spec.norm == "layer":
            return layer_norm(x, weight, self.norm_biases.get(name), self.spec.rms_norm_eps)
        return rms_norm(x, weight, self.spec.rms_norm_eps)

    def _add_norm(
        self, residual: torch.Tensor, update: torch.Tensor | None, name: str
    ) -> tuple[torch.Tensor, LinearInput]:
        """The sum of the residual and the scaled update, and the sum after the norm `name`.

        The normalized sum is quantized if possible, where all that read it quantize it alike.
        """
        spec = self.spec
        weight = self.norms.get(name)
        bias = self.norm_biases.get(name)
        quant = self._input_quant(name)
        if quant is None:
            return _add_norm(spec, residual, update, weight, bias)
        return add_norm_quantized(
            residual,
            update,
            spec.residual_multiplier,
            weight,
            bias,
            spec.rms_norm_eps,
            quant,
            subtract_mean=spec.norm == "layer",
        )

    def _input_quant(self, norm: str) -> InputQuant | None:
        """How the linear layers that read a norm's output quantize it, if all do it alike."""
        moe = self.spec.moe
        names = list(MIXER_INPUTS) if norm == "attn_norm" else []
        if norm == "mlp_norm" or self.spec.parallel_block:
            if self.layer.is_moe and not (moe is not None and moe.parallel_mlp):
                return None  # router and experts read it as it is
            names += ["mlp.gate_up", "mlp.up"]
        return common_input_quant([self.linears[name] for name in names if name in self.linears])


class Decoder:
    """A model, or the part of one that a rank holds.

    tensors: the runtime tensors by the names of the parameter table, on one device and of one
    dtype; only TABLES may have another dtype. Tensors are removed from the mapping as they
    are used, so that it keeps no second reference to them.
    activation_quant, linears: by runtime module ("layers.3.attn.qkv", "lm_head"); see
    `DecoderLayer`.
    parallel_group: the ranks of the model. All ranks run the same steps.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: dict[str, torch.Tensor],
        activation_quant: Mapping[str, ActivationQuant] | None = None,
        linears: Mapping[str, Linear] | None = None,
        parallel_group: ParallelGroup = SINGLE_RANK,
    ) -> None:
        self.spec = spec
        self.parallel_group = parallel_group
        activation_quant = activation_quant or {}
        linears = linears or {}
        example = next(tensor for name, tensor in tensors.items() if name not in TABLES)
        self.dtype = example.dtype
        self.device = example.device
        missing = example.new_empty(0)  # stands for tensors that only other pipeline stages hold
        self.embed_tokens = TokenEmbedding(spec, tensors, self.dtype, parallel_group)
        head = linears.get("lm_head")
        if spec.num_labels:
            head = Linear(tensors.pop("score.weight", missing), None)
        elif head is None:
            if spec.tie_word_embeddings:
                weight = self.embedding
            else:
                weight = tensors.pop("lm_head.weight", missing)
            head = Linear(weight, None, activation_quant.get("lm_head"))
        self.head = head
        self.final_norm = norm_weight(tensors.pop("norm.weight", missing), spec)
        self.final_norm_bias = tensors.pop("norm.bias", None)
        self.layers = []
        for index in range(len(spec.layers)):
            prefix = f"layers.{index}."
            layer_tensors = _with_prefix(tensors, prefix)
            for name in layer_tensors:
                del tensors[prefix + name]
            self.layers.append(
                DecoderLayer(
                    spec,
                    index,
                    layer_tensors,
                    _with_prefix(activation_quant, prefix),
                    _with_prefix(linears, prefix),
                    parallel_group,
                )
            )
        assert not tensors, f"tensors that no module takes: {sorted(tensors)[:5]}"
        self.ropes = make_rotary_embeddings(spec, self.device)
        # The layers whose inputs a draft head reads (`DraftHeadSpec.aux_layers`), set by it; and by
        # layer these inputs in the last step, [T, H] each.
        self.aux_layers: tuple[int, ...] = ()
        self.aux_hidden_states: dict[int, torch.Tensor] = {}

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """Run a step. tokens, positions: int64 [T]; caches: one for each layer.

        Returns hidden states [T, H] after the last norm. A pipeline stage receives its input from
        the stage before it and sends its output to the next.
        """
        hidden, per_layer_inputs = self._embed_or_receive(tokens)
        hidden = self.run_layers(hidden, self.cos_sin(positions), batch, caches, per_layer_inputs)
        if not self.spec.is_last_stage:
            self._send(hidden, per_layer_inputs)
        return hidden

    def run_layers(
        self,
        hidden: torch.Tensor,
        cos_sin: Mapping[str, CosSin],
        batch: AttentionBatch,
        caches: Sequence[LayerCache],
        per_layer_inputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, H] embedded tokens -> [T, H] after the last norm.

        per_layer_inputs: [T, layers, P]; see `TokenEmbedding.per_layer_inputs`.
        """
        residual = hidden
        update = None
        aux_hidden_states: dict[int, torch.Tensor] = {}
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            if index in self.aux_layers:
                aux_hidden_states[index] = _copied_sum(layer, residual, update)
            own_input = None if per_layer_inputs is None else per_layer_inputs[:, index]
            residual, update = layer.forward_with_residual(
                residual, update, cos_sin, batch, cache, own_input
            )
        if len(self.layers) in self.aux_layers:
            aux_hidden_states[len(self.layers)] = _copied_sum(self.layers[-1], residual, update)
        self.aux_hidden_states = aux_hidden_states
        return self.normalize(residual, update)

    def normalize(self, residual: torch.Tensor, update: torch.Tensor | None = None) -> torch.Tensor:
        """The last norm of the sum, [T, H]; only the sum before the last pipeline stage."""
        final_norm = self.final_norm if self.spec.is_last_stage else None
        _, hidden = _add_norm(self.spec, residual, update, final_norm, self.final_norm_bias)
        return hidden

    def draft_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a draft head reads of the last step, [T, C]. hidden: [T, H], the step's result."""
        if not self.aux_layers:
            return hidden
        return torch.cat([self.aux_hidden_states[layer] for layer in self.aux_layers], dim=1)

    @property
    def embedding(self) -> torch.Tensor:
        """The embedding table, [vocabulary rows, H]; empty on stages that do not hold it."""
        return self.embed_tokens.table

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The first layer's input [T, H], and per-layer inputs [T, layers, P] or None."""
        hidden = self.embed_tokens(tokens)
        return hidden, self.embed_tokens.per_layer_inputs(tokens, hidden)

    def _embed_or_receive(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stage's input: hidden states [T, H], and per-layer inputs [T, layers, P] or None."""
        spec = self.spec
        if spec.is_first_stage:
            return self.embed(tokens)
        assert spec.rank is not None
        # Those of this stage's layers and of the later stages' layers.
        num_layers = len(spec.full_model.layers) - spec.rank.first_layer
        sizes = (spec.hidden_size, num_layers * spec.per_layer_input_size)
        received = self.parallel_group.receive(len(tokens), sum(sizes), self.dtype, self.device)
        if not spec.per_layer_input_size:
            return received, None
        hidden, per_layer_inputs = received.split(sizes, dim=1)
        return hidden, per_layer_inputs.unflatten(1, (num_layers, -1))

    def _send(self, hidden: torch.Tensor, per_layer_inputs: torch.Tensor | None) -> None:
        """Send the stage's output, and the per-layer inputs of later layers, to the next stage.

        They are sent because the tables that they are looked up in are most of such a model.
        """
        if per_layer_inputs is not None:
            of_later_layers = per_layer_inputs[:, len(self.layers) :].flatten(1)
            hidden = torch.cat((hidden, of_later_layers), dim=1)
        self.parallel_group.send(hidden)

    def cos_sin(self, positions: torch.Tensor) -> dict[str, CosSin]:
        """The cosines and sines of a step, for every rotary embedding of the model."""
        return {name: rope(positions) for name, rope in self.ropes.items()}

    def logits(
        self,
        hidden: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[n, H] -> [n, vocab] of `dtype`; a rank computes only its part of the vocabulary.

        A model with a classification head computes the logits of all labels, [n, num_labels].
        out: [n, vocab] of `dtype`: gets the logits, and is returned. On a GPU, the product of a
        dense head writes to it. Others have their own memory, and are copied.
        """
        spec = self.spec
        if out is not None:
            is_product = type(self.head) is Linear and not spec.scales_logits
            if out.is_cuda and is_product and hidden.dtype == self.head.weight.dtype == dtype:
                return mask_padding(self.head.forward_into(hidden, out), spec, self.parallel_group)
            return out.copy_(self.logits(hidden, dtype))
        if spec.num_labels:  # its weight is float32
            return self.head(hidden.float()).to(dtype)
        logits = self.head(hidden).to(dtype)
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        softcap = spec.final_logit_softcapping
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return mask_padding(logits, spec, self.parallel_group)

    def weights(self) -> tuple[list[Linear], list[torch.Tensor]]:
        """Its linear layers, and its other tensors."""
        linears = [self.head]
        others = [self.embedding, self.final_norm, *self.embed_tokens.per_layer.values()]
        for layer in self.layers:
            linears += layer.linears.values()
            for vectors in (layer.norms, layer.norm_biases, layer.vectors):
                others += vectors.values()
        return linears, others

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int = 16,
        kv_cache_dtype: str | None = None,
        layer_spec: ModelSpec | None = None,
    ) -> KVCache:
        """A layer's empty cache on the model's device.

        layer_spec: the spec with the layer's sizes; None: those of the model.
        kv_cache_dtype: a name in KV_CACHE_DTYPES, or None for the model's dtype. An 8-bit cache
        uses the checkpoint's scales if there are any for this dtype, otherwise a scale per token
        and head.
        """
        has_static_scales = all(
            layer.has_kv_scales(kv_cache_dtype)
            for layer in self.layers
            if layer.layer.mixer == "attention"
        )
        return empty_kv_cache(
            self,
            layer_spec or self.spec,
            num_blocks,
            block_size,
            kv_cache_dtype,
            has_static_scales=has_static_scales,
        )


def _copied_sum(
    layer: DecoderLayer, residual: torch.Tensor, update: torch.Tensor | None
) -> torch.Tensor:
    """The hidden states [T, H] between two layers, which later layers do not overwrite."""
    return residual.clone() if update is None else layer.add_update(residual, update)


def norm_weight(weight: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """What a norm multiplies by. A sum with the offset is in float32, where it is exact."""
    return weight.float() + spec.norm_offset if spec.norm_offset else weight


def _add_norm(
    spec: ModelSpec,
    residual: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + residual_multiplier * update, [T, H], and the norm of the sum."""
    scale = spec.residual_multiplier
    if spec.norm == "layer" and weight is not None:
        return add_layer_norm(residual, update, scale, weight, bias, spec.rms_norm_eps)
    return add_rms_norm(residual, update, scale, weight, spec.rms_norm_eps)


def _stack_biases(linears: Sequence[Linear]) -> torch.Tensor | None:
    """The biases of experts as one tensor [E, out]; None where they have none."""
    owners = [_fp4_kernel(linear) or _fp8_kernel(linear) or linear for linear in linears]
    biases = [owner.bias for owner in owners if owner.bias is not None]
    return torch.stack(biases) if biases else None


def _cpu_kernel(linear: Linear) -> CpuLinear | None:
    """The compiled kernel of a linear layer that takes its inputs as they are; None for others."""
    if not isinstance(linear, PackedLinear):
        return None
    if linear.activation_quant is not None or linear.pre_quant_scale is not None:
        return None
    return linear.kernel if isinstance(linear.kernel, CpuLinear) else None


def _fp4_kernel(linear: Linear) -> Fp4Expert | None:
    """The kernel of an expert's linear layer with a weight in FP4 on a GPU; None for others."""
    kernel = linear.kernel if isinstance(linear, PackedLinear) else None
    return kernel if isinstance(kernel, Fp4Expert) else None


def _fp8_kernel(linear: Linear) -> Fp8BlockLinear | None:
    """The kernel of a linear layer with a weight in FP8 blocks on a GPU; None for others."""
    kernel = linear.kernel if isinstance(linear, PackedLinear) else None
    return kernel if isinstance(kernel, Fp8BlockLinear) else None


class _Fp4Stack(NamedTuple):
    """The weights of experts in FP4, [E, ...]; see `FusedExperts`."""

    blocks: torch.Tensor
    scales: torch.Tensor
    factors: torch.Tensor | None


def _stack_fp4(linears: Sequence[Linear]) -> _Fp4Stack | None:
    """Put the weights of experts next to each other; None unless all are in the same FP4.

    Afterwards the linear layers use the copies, so that no weight is in memory twice.
    """
    found = [_fp4_kernel(linear) for linear in linears]
    kernels = [kernel for kernel in found if kernel is not None]
    forms = {(kernel.group_size, kernel.factors is None) for kernel in kernels}
    if len(kernels) < len(linears) or len(forms) > 1:
        return None
    factors = [kernel.factors for kernel in kernels if kernel.factors is not None]
    stack = _Fp4Stack(
        torch.stack([kernel.blocks for kernel in kernels]),
        torch.stack([kernel.scales for kernel in kernels]),
        torch.stack(factors) if factors else None,
    )
    for index, kernel in enumerate(kernels):
        kernel.blocks = stack.blocks[index]
        kernel.scales = stack.scales[index]
        if stack.factors is not None:
            kernel.factors = stack.factors[index]
    return stack


class _Fp8Stack(NamedTuple):
    """The weights of experts in FP8, [E, ...]; see `FusedExperts`."""

    q: torch.Tensor
    scales: torch.Tensor
    group_size: int
    input_quant: InputQuant | None


def _stack_fp8(linears: Sequence[Linear]) -> _Fp8Stack | None:
    """Put the weights of experts next to each other; None unless all are in equal FP8 blocks.

    Afterwards the linear layers use the copies, so that no weight is in memory twice.
    """
    found = [_fp8_kernel(linear) for linear in linears]
    kernels = [kernel for kernel in found if kernel is not None]
    forms = {(kernel.group_size, kernel.input_quant) for kernel in kernels}
    if len(kernels) < len(linears) or len(forms) > 1:
        return None
    stack = _Fp8Stack(
        torch.stack([kernel.q for kernel in kernels]),
        torch.stack([kernel.scales for kernel in kernels]),
        kernels[0].group_size,
        kernels[0].input_quant,
    )
    for index, kernel in enumerate(kernels):
        kernel.q = stack.q[index]
        kernel.scales = stack.scales[index]
    return stack


def _with_prefix(values: Mapping[str, _Value], prefix: str) -> dict[str, _Value]:
    """The entries whose name begins with the prefix. The prefix is removed from the names."""
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }
