"""The one decoder: every supported family, configured by its spec.

Legend: T tokens of a step, H hidden, N heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import embedding, linear

from llmkit.kernels.activation import gated
from llmkit.kernels.attention import AttentionBatch, paged_attention, store_kv
from llmkit.kernels.norm import rms_norm
from llmkit.kernels.rope import rotate
from llmkit.model.linear import Linear, Rounding
from llmkit.model.rope import Rotation, make_ropes
from llmkit.model.spec import ModelSpec

KvCache = tuple[torch.Tensor, torch.Tensor]  # k, v: [blocks, block_size, K, D]


class DecoderLayer:
    """One layer, built from the tensors of the parameter table's rows `layers.<index>.*`.

    tensors: the runtime tensors by name without that prefix ("attn.qkv.weight"). rounding: by module name, what is
    rounded on the way: the inputs of a linear, "attn.k" and "attn.v" before they go into the cache. `linears` holds
    the linear layers by module name ("attn.qkv", "mlp.down", "mlp.experts.3.gate_up").
    """

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        tensors: Mapping[str, torch.Tensor],
        rounding: Mapping[str, Rounding] | None = None,
    ) -> None:
        self.spec, self.layer = spec, spec.layers[index]
        self.rounding = dict(rounding or {})
        self.linears: dict[str, Linear] = {}
        self.norms: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and tensor.dim() == 2:
                self.linears[module] = Linear(tensor, tensors.get(f"{module}.bias"), self.rounding.get(module))
            elif kind == "weight":
                self.norms[module] = tensor + spec.norm_offset if spec.norm_offset else tensor

    def __call__(
        self,
        hidden: torch.Tensor,
        rotations: Mapping[str, Rotation],
        batch: AttentionBatch,
        cache: KvCache,
    ) -> torch.Tensor:
        """hidden: [T, H] in and out. Writes the step's keys and values into `cache`."""
        return self.mlp_block(self.attention_block(hidden, rotations, batch, cache))

    def attention_block(
        self,
        hidden: torch.Tensor,
        rotations: Mapping[str, Rotation],
        batch: AttentionBatch,
        cache: KvCache,
    ) -> torch.Tensor:
        """The first half of the layer, norms and residual included."""
        spec = self.spec
        qkv = self.linears["attn.qkv"](self._norm(hidden, "attn_norm"))
        q_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        q, k, v = qkv.split((q_size, kv_size, kv_size), dim=-1)
        if spec.qk_norm == "full":
            q, k = self._norm(q, "attn.q_norm"), self._norm(k, "attn.k_norm")
        q, k, v = (t.reshape(len(t), -1, spec.head_dim) for t in (q, k, v))
        if spec.qk_norm == "head":
            q, k = self._norm(q, "attn.q_norm"), self._norm(k, "attn.k_norm")
        if self.layer.rope is not None:
            cos, sin = rotations[self.layer.rope]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (rounded(t) if (rounded := self.rounding.get(name)) else t for name, t in (("attn.k", k), ("attn.v", v)))
        store_kv(k, v, *cache, batch.slots)
        seen = paged_attention(
            q, *cache, batch, spec.attention_scale, self.layer.window, spec.attention_softcap
        ).flatten(1)
        return self._add(hidden, self.linears["attn.o"](seen), "attn_post_norm")

    def mlp_block(self, hidden: torch.Tensor) -> torch.Tensor:
        """The second half of the layer, norms and residual included."""
        x = self._norm(hidden, "mlp_norm")
        return self._add(hidden, self._experts(x) if self.layer.moe else self._mlp(x, "mlp"), "mlp_post_norm")

    def _mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.linears[f"{name}.down"](gated(self.linears[f"{name}.gate_up"](x), self.spec.activation))

    def _experts(self, x: torch.Tensor) -> torch.Tensor:
        """Each token through its `per_token` most probable experts, weighted by the router."""
        experts = self.spec.experts
        assert experts is not None
        scores = self.linears["mlp.router"](x).float().softmax(-1)
        weights, chosen = scores.topk(experts.per_token, dim=-1)
        if experts.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            answer = self._mlp(x[tokens], f"mlp.experts.{expert}")
            out.index_add_(0, tokens, answer * weights[tokens, place, None].to(x.dtype))
        return out

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.norms.get(name)
        return x if weight is None else rms_norm(x, weight, self.spec.norm_eps)

    def _add(self, hidden: torch.Tensor, update: torch.Tensor, norm: str) -> torch.Tensor:
        update = self._norm(update, norm)
        return hidden + (update * self.spec.residual_scale if self.spec.residual_scale != 1.0 else update)


class Decoder:
    """A whole model.

    tensors: the runtime tensors by the names of the parameter table, all of one dtype on one device. The
    mapping is emptied as the tensors are taken, so that nothing is held twice. rounding: by runtime module
    ("layers.3.attn.qkv"), as DecoderLayer has it.
    """

    def __init__(
        self, spec: ModelSpec, tensors: dict[str, torch.Tensor], rounding: Mapping[str, Rounding] | None = None
    ) -> None:
        self.spec = spec
        rounding = rounding or {}
        self.embedding = tensors.pop("embed.weight")
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.head = self.embedding if spec.tied else tensors.pop("lm_head.weight")
        self.final_norm = tensors.pop("norm.weight") + spec.norm_offset
        self.layers = []
        for index in range(len(spec.layers)):
            prefix = f"layers.{index}."
            names = [name for name in tensors if name.startswith(prefix)]
            own = {name.removeprefix(prefix): tensors.pop(name) for name in names}
            rounded = {name.removeprefix(prefix): how for name, how in rounding.items() if name.startswith(prefix)}
            self.layers.append(DecoderLayer(spec, index, own, rounded))
        assert not tensors, f"tensors that no module takes: {sorted(tensors)[:5]}"
        self.ropes = make_ropes(spec, self.device)

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[KvCache],
    ) -> torch.Tensor:
        """tokens, positions: int64 [T]; caches: one per layer. Returns hidden states [T, H] after the last norm."""
        hidden = self.embed_tokens(tokens)
        rotations = self.rotations(positions)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, rotations, batch, cache)
        return rms_norm(hidden, self.final_norm, self.spec.norm_eps)

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, H]"""
        hidden = embedding(tokens, self.embedding)
        return hidden * self.spec.embedding_scale if self.spec.embedding_scale != 1.0 else hidden

    def rotations(self, positions: torch.Tensor) -> dict[str, Rotation]:
        """The cosines and sines of a step, for every rotary embedding of the model."""
        return {name: rope(positions) for name, rope in self.ropes.items()}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> float32 [n, vocab]"""
        logits = linear(hidden, self.head).float()
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return torch.tanh(logits / cap) * cap if cap is not None else logits

    def new_cache(self, blocks: int, block_size: int = 16) -> KvCache:
        """One layer's empty cache, in the model's dtype and on its device."""
        shape = (blocks, block_size, self.spec.kv_heads, self.spec.head_dim)
        k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return k, v
