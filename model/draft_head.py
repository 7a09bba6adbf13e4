"""A draft head: from a model's hidden states and the next tokens to the tokens after those.

Legend: T tokens of a step, H hidden size of the head, V vocabulary size of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.common.errors import InputError
from llmkit.common.options import CpuActivations
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.elementwise import cat_heads, rms_norm
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.logits_tables import MASKED_LOGIT
from llmkit.model.decoder import Decoder, DecoderLayer, norm_weight
from llmkit.model.language_model import LayerCache
from llmkit.model.linear import Linear
from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.rope import CosSin, RotaryEmbedding
from llmkit.model.spec import DraftHeadSpec, ModelSpec
from llmkit.model.token_embedding import TokenEmbedding
from llmkit.model.weight_loader import LoadedWeights, load_weights


class DraftHead:
    """An MTP or EAGLE-3 head (`DraftHeadSpec`). It shares embedding and output with its model.

    weights: of the head's parameter table. target: the model that it drafts for. token_ids: int64,
    the model's token of each of the head's; None: they are the same.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: LoadedWeights,
        target: Decoder,
        token_ids: torch.Tensor | None = None,
    ) -> None:
        assert spec.draft_head is not None
        self.spec = spec
        self.head: DraftHeadSpec = spec.draft_head
        self.target = target
        target.aux_layers = self.head.aux_layers
        self.parallel_group: ParallelGroup = target.parallel_group
        self.device = target.device
        self.dtype = target.dtype
        tensors, activation_quant, linears = weights
        self._norms = {
            name: norm_weight(tensors.pop(f"mtp.{name}.weight"), spec)
            for name in ("embed_norm", "hidden_norm")
            if f"mtp.{name}.weight" in tensors
        }
        fc = linears.pop("mtp.fc", None)
        if fc is None:
            fc = Linear(tensors.pop("mtp.fc.weight"), None, activation_quant.get("mtp.fc"))
        self._fc = fc
        self._has_own_head = "lm_head" in linears or "lm_head.weight" in tensors
        self.embed_tokens = target.embed_tokens
        if "embed.weight" in tensors:
            self.embed_tokens = TokenEmbedding(spec, tensors, self.dtype, target.parallel_group)
        self._decoder = Decoder(spec, tensors, activation_quant, linears, target.parallel_group)
        self._token_ids = None if token_ids is None else token_ids.to(self.device)
        self.aux_hidden_states: dict[int, torch.Tensor] = {}  # no head reads this one's layer
        # The hidden states [T, H] that the next step reads: `__call__` takes no more inputs than
        # other models do, so that the same graphs run it.
        self.hidden_states = torch.zeros(0, spec.hidden_size, dtype=self.dtype, device=self.device)

    @property
    def ropes(self) -> dict[str, RotaryEmbedding]:
        """See `Decoder.ropes`."""
        return self._decoder.ropes

    @property
    def layers(self) -> list[DecoderLayer]:
        """Its decoder layer."""
        return self._decoder.layers

    def reserve(self, num_tokens: int) -> None:
        """Make `hidden_states` large enough for steps of so many tokens."""
        if len(self.hidden_states) == num_tokens:
            return
        shape = (num_tokens, self.spec.hidden_size)
        self.hidden_states = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head reads of the model's hidden states: [T, C] -> [T, H].

        hidden: those after the last norm for an MTP head, and those of all `aux_layers` side by
        side for an EAGLE-3 head.
        """
        return self._fc(hidden) if self.head.method == "eagle3" else hidden

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """Run a step on the first T rows of `hidden_states`. For the inputs see `LanguageModel`.

        tokens: for each hidden state the token after it. positions: those of the hidden states.
        Returns what the head reads in their place for the next drafts, [T, H].
        """
        embedded, _ = self.embed(tokens)
        return self.run_layers(embedded, self.cos_sin(positions), batch, caches)

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The embeddings [T, H] of tokens; see `Decoder.embed`."""
        return self.embed_tokens(tokens), None

    def cos_sin(self, positions: torch.Tensor) -> dict[str, CosSin]:
        """See `Decoder.cos_sin`."""
        return self._decoder.cos_sin(positions)

    def run_layers(
        self,
        embedded: torch.Tensor,
        cos_sin: Mapping[str, CosSin],
        batch: AttentionBatch,
        caches: Sequence[LayerCache],
        per_layer_inputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Decoder.run_layers`. embedded: [T, H], from `embed`; no head has other inputs."""
        hidden = self.hidden_states[: len(embedded)]
        return self._run(embedded, hidden, cos_sin, batch, caches)

    def forward_embedded(
        self,
        embedded: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """`__call__` on the embeddings [T, H] of the tokens and on hidden states [T, H]."""
        return self._run(embedded, hidden, self.cos_sin(positions), batch, caches)

    def _run(
        self,
        embedded: torch.Tensor,
        hidden: torch.Tensor,
        cos_sin: Mapping[str, CosSin],
        batch: AttentionBatch,
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        normed = self._norm(hidden, self._norms["hidden_norm"])
        if self.head.method == "mtp":
            embedded = self._norm(embedded, self._norms["embed_norm"])
            projected = self._fc(_side_by_side(embedded, normed))
            return self._decoder.run_layers(projected, cos_sin, batch, caches)
        (layer,) = self.layers
        embedded = self._norm(embedded, layer.norms["attn_norm"])
        update = layer.attend(_side_by_side(embedded, normed), cos_sin, batch, caches[0])
        # Kernels may add to the residual in place, and the hidden states are an input.
        residual = normed if self.head.norm_before_residual else _side_by_side(hidden)
        return layer.add_update(*layer.mlp_block(residual, update, None))

    def draft_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head reads for the next drafts, [T, H]. hidden: as `__call__` returns them."""
        return hidden

    def logits(self, hidden: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[n, H] -> [n, V] of `dtype`. hidden: as `__call__` returns them."""
        if self.head.method == "eagle3":
            hidden = self._norm(hidden, self._decoder.final_norm)
        if not self._has_own_head:
            return self.target.logits(hidden, dtype)
        own = self._decoder.head(hidden).to(dtype)
        if self._token_ids is None:
            return own
        # Samplers take a logit that is not finite for an error.
        masked = max(MASKED_LOGIT, torch.finfo(own.dtype).min)
        logits = own.new_full((len(own), self.spec.vocab_size), masked)
        return logits.index_copy_(1, self._token_ids, own)

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int = 16,
        kv_cache_dtype: str | None = None,
        layer_spec: ModelSpec | None = None,
    ) -> KVCache:
        """See `Decoder.new_kv_cache`."""
        return self._decoder.new_kv_cache(num_blocks, block_size, kv_cache_dtype, layer_spec)

    def weights(self) -> tuple[list[Linear], list[torch.Tensor]]:
        """Its own linear layers, and its other tensors."""
        linears, others = self._decoder.weights()
        if not self._has_own_head:
            linears.remove(self._decoder.head)
        others += self._norms.values()
        if self.embed_tokens is not self.target.embed_tokens:
            others.append(self.embed_tokens.table)
        return [*linears, self._fc], others

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self.spec.rms_norm_eps)


def _side_by_side(*parts: torch.Tensor) -> torch.Tensor:
    """A copy of [T, C] each, joined along C, by a kernel that can be recorded."""
    return cat_heads([part[:, None] for part in parts]).flatten(1)


def load_draft_head(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    target: Decoder,
    *,
    packed: bool = False,
    cpu_activations: CpuActivations = "float32",
    weight_dtype: torch.dtype | None = None,
) -> DraftHead:
    """Load the head of `mtp_model_spec` or `eagle3_model_spec`, which must be checked already.

    packed, cpu_activations, weight_dtype: see `load_model`. Raises InputError for tokens that the
    model lacks.
    """
    weights = load_weights(
        checkpoint,
        spec,
        target.dtype,
        target.device,
        packed=packed,
        cpu_activations=cpu_activations,
        weight_dtype=weight_dtype,
    )
    token_ids = None
    if spec.draft_head is not None and "d2t" in checkpoint.tensors:
        token_ids = _target_token_ids(checkpoint, spec)
    return DraftHead(spec, weights, target, token_ids)


def _target_token_ids(checkpoint: Checkpoint, spec: ModelSpec) -> torch.Tensor:
    """The model's token of each token of an EAGLE-3 head; checkpoints have the differences."""
    assert spec.draft_head is not None
    differences = checkpoint.read("d2t").long()
    num_tokens = spec.draft_head.draft_vocab_size
    token_ids = torch.arange(num_tokens)
    if differences.shape == token_ids.shape:
        token_ids = token_ids + differences
        if int(token_ids.min()) >= 0 and int(token_ids.max()) < spec.vocab_size:
            return token_ids
    raise InputError(
        f"{checkpoint.reference}: the tensor d2t names tokens that the model does not have",
        f"{num_tokens} differences that lead to tokens 0 to {spec.vocab_size - 1} were expected",
    )
