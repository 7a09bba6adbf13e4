"""What a token mixer with a recurrent state is, and what it reads of its decoder layer."""

from __future__ import annotations

from typing import Protocol

import torch

from llmkit.kernels.input_quant import LinearInput
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState
from llmkit.model.linear import Linear
from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.spec import ModelSpec


class MixerLayer(Protocol):
    """What a mixer reads of its `DecoderLayer`. Linear layers may be replaced between steps.

    vectors: the other parameters, by name within the layer ("gdn.A_log"). The weight of a
    convolution is one of them, [channels, width].
    """

    spec: ModelSpec
    linears: dict[str, Linear]
    norms: dict[str, torch.Tensor]
    vectors: dict[str, torch.Tensor]
    parallel_group: ParallelGroup


class RecurrentMixer(Protocol):
    """Mixes the tokens of a step with what its state keeps of the tokens before them."""

    def __call__(
        self, layer: MixerLayer, x: LinearInput, batch: RecurrentBatch, state: RecurrentState
    ) -> torch.Tensor:
        """x: [T, H], normalized. Returns the update of the residual, [T, H].

        A rank has some of the heads: its update is a part of the sum over the ranks.
        """
