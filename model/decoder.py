"""The one decoder: every supported family, configured by its spec.

Legend: T tokens of a step, H hidden, N heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import chain

import torch
from torch.nn.functional import embedding

from llmkit.kernels.attention import CODES, AttentionBatch, KvCache, paged_attention, place
from llmkit.kernels.elementwise import add, add_norm, gated, rms_norm
from llmkit.kernels.experts import Experts, side_by_side, suits
from llmkit.kernels.jit import runs_triton
from llmkit.model.device import untouched_zeros
from llmkit.model.linear import Linear, Rounding
from llmkit.model.ranks import Ranks
from llmkit.model.rope import Rotation, make_ropes
from llmkit.model.spec import ModelSpec

ALONE = Ranks()
NEVER = -1e30  # the logit of a token that there is not: less than any, and finite


class DecoderLayer:
    """One layer, built from the tensors of the parameter table's rows `layers.<index>.*`.

    tensors: the runtime tensors by name without that prefix ("attn.qkv.weight"). rounding: by module name, what is
    rounded on the way: the inputs of a linear, "attn.k" and "attn.v" before they go into the cache. `linears` holds
    the linear layers by module name ("attn.qkv", "mlp.down", "mlp.experts.3.gate_up"): those given, which are packed,
    and dense ones of the tensors.
    """

    def __init__(
        self, spec: ModelSpec, index: int, tensors: Mapping[str, torch.Tensor],
        rounding: Mapping[str, Rounding] | None = None, linears: Mapping[str, Linear] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.spec, self.layer, self.ranks = spec, spec.layers[index], ranks
        self.rounding = dict(rounding or {})
        self.linears: dict[str, Linear] = dict(linears or {})
        self.norms: dict[str, torch.Tensor] = {}
        self.adapted = False  # in the step under way, some rows by an adapter
        self.present: Callable[[], AbstractContextManager[None]] = nullcontext  # within it the weights are there
        for name, tensor in tensors.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and tensor.dim() == 2:
                self.linears[module] = Linear(tensor, tensors.get(f"{module}.bias"), self.rounding.get(module))
            elif kind == "weight":
                self.norms[module] = tensor + spec.norm_offset if spec.norm_offset else tensor

    def __call__(
        self, hidden: torch.Tensor, rotations: Mapping[str, Rotation], batch: AttentionBatch, cache: KvCache
    ) -> torch.Tensor:
        """hidden: [T, H] in and out. Writes the step's keys and values into `cache`."""
        return add(*self.advance(hidden, None, rotations, batch, cache), self.spec.residual_scale)

    def attention_block(
        self, hidden: torch.Tensor, rotations: Mapping[str, Rotation], batch: AttentionBatch, cache: KvCache
    ) -> torch.Tensor:
        """The first half of the layer, norms and residual included."""
        update = self._attend(self._norm(hidden, "attn_norm"), rotations, batch, cache)
        return add(hidden, update, self.spec.residual_scale)

    def mlp_block(self, hidden: torch.Tensor) -> torch.Tensor:
        """The second half of the layer, norms and residual included."""
        return add(hidden, self._feed(self._norm(hidden, "mlp_norm")), self.spec.residual_scale)

    def advance(
        self, hidden: torch.Tensor, update: torch.Tensor | None, rotations: Mapping[str, Rotation],
        batch: AttentionBatch, cache: KvCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The layer on `hidden` and what is yet to be added to it; gives the same two. So sums meet their norms."""
        scale, eps = self.spec.residual_scale, self.spec.norm_eps
        with self.present():
            hidden, x = add_norm(hidden, update, scale, self.norms.get("attn_norm"), eps)
            update = self._attend(x, rotations, batch, cache)
            hidden, x = add_norm(hidden, update, scale, self.norms.get("mlp_norm"), eps)
            return hidden, self._feed(x)

    def _attend(
        self, x: torch.Tensor, rotations: Mapping[str, Rotation], batch: AttentionBatch, cache: KvCache
    ) -> torch.Tensor:
        """What attention adds to the residual stream."""
        spec, norms, rounding = self.spec, None, None
        qkv = self.linears["attn.qkv"](x).view(len(x), -1, spec.head_dim)  # [T, N + 2K, D]
        if spec.qk_norm == "full":
            qkv = self._norm_qk(qkv)
        elif spec.qk_norm == "head":
            norms = self.norms["attn.q_norm"], self.norms["attn.k_norm"]
        if cache.coded and cache.scales is None:
            cache = KvCache(cache.kv, stored=self._kv_scale)
        elif not cache.coded and "attn.k" in self.rounding:
            rounding = self.rounding["attn.k"], self.rounding["attn.v"]
        group, rotation = batch.of(self.layer.window), rotations[self.layer.rope] if self.layer.rope else None
        q = place(qkv, spec.heads, norms, spec.norm_eps, rotation, cache, group.slots, rounding)
        seen = paged_attention(q, cache, group, spec.attention_scale, spec.attention_softcap)
        return self._norm(self.ranks.sum(self.linears["attn.o"](seen.flatten(1))), "attn_post_norm")

    def _feed(self, x: torch.Tensor) -> torch.Tensor:
        """What the MLP or the experts add to the residual stream."""
        update = self._experts(x) if self.layer.moe else self._mlp(x, "mlp")
        return self._norm(self.ranks.sum(update), "mlp_post_norm")

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
        if runs_triton(x) and not self.adapted and self.together is not None:
            return self.together(x, chosen, weights)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            if f"mlp.experts.{expert}.down" not in self.linears:  # another rank's
                continue
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            self.chosen = tokens  # adapters ask which rows of the step an expert's linears get
            answer = self._mlp(x[tokens], f"mlp.experts.{expert}")
            out.index_add_(0, tokens, answer * weights[tokens, place, None].to(x.dtype))
        return out

    @cached_property
    def together(self) -> Experts | None:
        """The experts it holds as one, where a GPU can run them so: then the host need not see who is chosen."""
        experts = self.spec.experts
        held = [e for e in range(experts.count if experts else 0) if f"mlp.experts.{e}.down" in self.linears]
        parts = [[self.linears[f"mlp.experts.{e}.{kind}"] for e in held] for kind in ("gate_up", "down")]
        if experts is None or any(one.bias is not None or one.rounding for one in chain(*parts)):
            return None
        up, down = (side_by_side([one.weight for one in part]) if held else None for part in parts)
        if up is None or down is None or not suits(up):
            return None
        return Experts(up, down, held[0], experts.count, self.spec.activation == "gelu_tanh")

    def stores_scales(self, kv_dtype: str) -> bool:
        """Whether the checkpoint has scales for a cache of this kind."""
        wanted = {"int8": "int", "fp8": "float"}[kv_dtype]
        return all(
            (how := self.rounding.get(name)) is not None and how.kind == wanted and how.scale is not None
            for name in ("attn.k", "attn.v")
        )

    @cached_property
    def _kv_scale(self) -> torch.Tensor:
        """The stored scales of an 8-bit cache, float32 [2K, 1, 1]."""
        scales = [how.scale for name in ("attn.k", "attn.v") if (how := self.rounding[name]).scale is not None]
        return torch.cat(scales).float().repeat_interleave(self.spec.kv_heads)[:, None, None]

    def _norm_qk(self, qkv: torch.Tensor) -> torch.Tensor:
        """[T, N + 2K, D] with queries and keys normalised, all heads at once."""
        q, k, v = qkv.split((self.spec.heads, self.spec.kv_heads, self.spec.kv_heads), dim=1)
        normed = self._norm_all(q.flatten(1), "attn.q_norm"), self._norm_all(k.flatten(1), "attn.k_norm")
        return torch.cat((*normed, v.flatten(1)), dim=1).view_as(qkv)

    def _norm_all(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """`_norm` over all ranks' columns; heads that several ranks have count for each, which changes no mean."""
        if self.ranks.size == 1:
            return self._norm(x, name)
        wide = x.float()
        mean = self.ranks.sum(wide.square().sum(-1, keepdim=True)) / (x.shape[-1] * self.ranks.size)
        return (wide * torch.rsqrt(mean + self.spec.norm_eps) * self.norms[name].float()).to(x.dtype)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.norms.get(name)
        return x if weight is None else rms_norm(x, weight, self.spec.norm_eps)


class Decoder:
    """A whole model.

    tensors: the runtime tensors by the names of the parameter table, on one device and of one dtype, but for the
    embedding, which may be of any. The mapping is emptied as the tensors are taken, so that nothing is held twice.
    rounding, linears: by runtime module ("layers.3.attn.qkv", "lm_head"), as DecoderLayer has them. Of a rank's part
    all ranks run the same steps, in which they meet by `ranks`.
    """

    def __init__(
        self, spec: ModelSpec, tensors: dict[str, torch.Tensor], rounding: Mapping[str, Rounding] | None = None,
        linears: Mapping[str, Linear] | None = None, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.spec, self.ranks = spec, ranks
        rounding, linears = rounding or {}, linears or {}
        some = next(tensor for name, tensor in tensors.items() if name != "embed.weight")
        self.dtype, self.device = some.dtype, some.device
        absent = some.new_empty(0)  # in the place of what other pipeline stages have
        self.embedding = tensors.pop("embed.weight", absent)
        head = linears.get("lm_head")
        if head is None:
            weight = self.embedding if spec.tied else tensors.pop("lm_head.weight", absent)
            head = Linear(weight, None, rounding.get("lm_head"))
        self.head = head
        self.final_norm = tensors.pop("norm.weight", absent) + spec.norm_offset
        self.layers = []
        for index in range(len(spec.layers)):
            prefix = f"layers.{index}."
            names = [name for name in tensors if name.startswith(prefix)]
            own = {name.removeprefix(prefix): tensors.pop(name) for name in names}
            rounded = {name.removeprefix(prefix): how for name, how in rounding.items() if name.startswith(prefix)}
            packed = {name.removeprefix(prefix): one for name, one in linears.items() if name.startswith(prefix)}
            self.layers.append(DecoderLayer(spec, index, own, rounded, packed, ranks))
        assert not tensors, f"tensors that no module takes: {sorted(tensors)[:5]}"
        self.ropes = make_ropes(spec, self.device)

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, caches: Sequence[KvCache]
    ) -> torch.Tensor:
        """tokens, positions: int64 [T]; caches: one per layer. Returns hidden states [T, H] after the last norm.

        A pipeline stage takes them from the one before and hands on what its last layer gives.
        """
        if self.spec.begins:
            hidden = self.embed_tokens(tokens)
        else:
            hidden = self.ranks.receive(len(tokens), self.spec.hidden, self.dtype, self.device)
        hidden = self.run_layers(hidden, self.rotations(positions), batch, caches)
        if not self.spec.ends:
            self.ranks.send(hidden)
        return hidden

    def run_layers(
        self, hidden: torch.Tensor, rotations: Mapping[str, Rotation], batch: AttentionBatch, caches: Sequence[KvCache]
    ) -> torch.Tensor:
        """[T, H] embedded tokens -> [T, H] after the last norm."""
        update, weight = None, self.final_norm if self.spec.ends else None
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, update = layer.advance(hidden, update, rotations, batch, cache)
        return add_norm(hidden, update, self.spec.residual_scale, weight, self.spec.norm_eps)[1]

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, H]"""
        if self.ranks.size == 1:
            hidden = embedding(tokens, self.embedding).to(self.dtype)
        else:  # each rank has the rows of its own tokens
            rows = tokens - self.ranks.first
            own = (rows >= 0) & (rows < len(self.embedding))
            found = embedding(rows.where(own, 0), self.embedding).to(self.dtype)
            hidden = self.ranks.sum(found * own[:, None])
        return hidden * self.spec.embedding_scale if self.spec.embedding_scale != 1.0 else hidden

    def rotations(self, positions: torch.Tensor) -> dict[str, Rotation]:
        """The cosines and sines of a step, for every rotary embedding of the model."""
        return {name: rope(positions) for name, rope in self.ropes.items()}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> float32 [n, vocab], of a rank the columns of its own tokens."""
        logits = self.head(hidden).float()
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        if (cap := self.spec.logit_softcap) is not None:
            logits = torch.tanh(logits / cap) * cap
        if (padding := self.ranks.first + self.spec.vocab - self.spec.whole.vocab) > 0:
            logits[:, max(0, self.spec.vocab - padding) :] = NEVER
        return logits

    def new_cache(self, blocks: int, block_size: int = 16, kv_dtype: str | None = None) -> KvCache:
        """One layer's empty cache, in the model's dtype or in 8-bit codes ("int8" or "fp8"), on its device.

        Codes have the checkpoint's scales when it has some of this kind, and else one for each token and head.
        """
        shape = (2 * self.spec.kv_heads, blocks, block_size)
        dtype = CODES[kv_dtype] if kv_dtype else self.dtype
        kv = untouched_zeros((*shape, self.spec.head_dim), dtype, self.device)
        if kv_dtype is None or all(layer.stores_scales(kv_dtype) for layer in self.layers):
            return KvCache(kv)
        return KvCache(kv, untouched_zeros((*shape, 1), torch.float32, self.device))
