"""From token ids to the input of the first layer, and to what the others read of each token.

Legend: T tokens of a step, H hidden size, P `ModelSpec.per_layer_input_size`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import embedding, linear

from llmkit.kernels.elementwise import rms_norm
from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.spec import ModelSpec


class TokenEmbedding:
    """The embedding and, in Gemma 4, a second one that gives every layer a vector of each token.

    tensors: the runtime tensors of the model. Those of the embeddings are removed from the mapping.
    Stages of a pipeline after the first have none, or only the table of a tied output projection.
    dtype: of the hidden states. The tables may have another one.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: dict[str, torch.Tensor],
        dtype: torch.dtype,
        parallel_group: ParallelGroup,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.parallel_group = parallel_group
        self.table = tensors.pop("embed.weight", torch.empty(0, dtype=dtype))
        self.per_layer = {
            name: tensors.pop(f"per_layer.{name}.weight")
            for name in ("embed", "projection", "norm")
            if f"per_layer.{name}.weight" in tensors
        }
        self.multiplier = self._rounded(spec.embedding_multiplier)
        self.per_layer_multiplier = self._rounded(spec.per_layer_input_size**0.5)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, H]"""
        hidden = self._lookup(tokens, self.table)
        return hidden if self.multiplier == 1.0 else hidden * self.multiplier

    def per_layer_inputs(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
        """What each layer reads of each token beside the hidden state, [T, layers, P].

        It is the sum of a row of the second embedding and of a projection of the first one's, so it
        depends on the token only. hidden: [T, H], as `__call__` returns it.
        None for models without a second embedding.
        """
        if not self.per_layer:
            return None
        size = self.spec.per_layer_input_size
        rows = self._lookup(tokens, self.per_layer["embed"]) * self.per_layer_multiplier
        projected = linear(hidden, self.per_layer["projection"]) * self.spec.hidden_size**-0.5
        normed: torch.Tensor = rms_norm(
            projected.unflatten(-1, (-1, size)), self.per_layer["norm"], self.spec.rms_norm_eps
        )
        inputs: torch.Tensor = (normed + rows.unflatten(-1, (-1, size))) * 2.0**-0.5
        return inputs

    def _lookup(self, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The rows of a table that is split over the ranks by the vocabulary."""
        group = self.parallel_group
        if group.tp_size == 1:
            return embedding(tokens, table).to(self.dtype)
        rows = tokens - group.vocab_start
        is_here = (rows >= 0) & (rows < len(table))
        partial = embedding(rows.where(is_here, 0), table).to(self.dtype)
        rows_of_all: torch.Tensor = group.all_reduce(partial * is_here[:, None])
        return rows_of_all

    def _rounded(self, factor: float) -> float:
        """A factor of embeddings as the family's own code has it."""
        if not self.spec.rounds_embedding_multiplier:
            return factor
        return torch.tensor(factor, dtype=self.dtype).item()
