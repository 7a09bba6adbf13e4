"""How often the draft of a model's MTP head is the token that the model itself would choose.

Measured on whole windows of text: for each token, the draft of the token after the next one is
compared with the model's most probable one. That is the acceptance rate of the first draft token
in greedy decoding, if the text were the model's own.
"""

from __future__ import annotations

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.common.errors import InputError
from llmkit.model.decoder import Decoder
from llmkit.model.draft_head import DraftHead, load_draft_head
from llmkit.model.draft_head_spec import check_draft_head, mtp_model_spec, with_dense_modules
from llmkit.model.full_forward import make_batch
from llmkit.model.language_model import scratch_layer_caches
from llmkit.model.spec import ModelSpec


class DraftAcceptance:
    """Counts the drafts of the MTP head of `checkpoint` that are right.

    spec: that of the head. The head is read once the rest of the model is not in memory.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._head: DraftHead | None = None
        self._num_accepted = 0
        self._num_drafts = 0

    @property
    def rate(self) -> float:
        """The share of drafts that are the model's own choice."""
        return self._num_accepted / max(1, self._num_drafts)

    @torch.no_grad()
    def count(
        self, decoder: Decoder, embedded: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Count the drafts of a window of L tokens.

        decoder: with the output projection. embedded: [L, H], of the tokens. hidden: [L, H] after
        the last norm. logits: [L, V].
        """
        if self._head is None or self._head.target is not decoder:
            self._head = load_draft_head(self._checkpoint, self._spec, decoder)
        head = self._head
        positions, batch = make_batch(decoder, [len(hidden) - 1])
        caches = scratch_layer_caches(head, self._spec, batch.num_blocks, batch.block_size)
        next_tokens = embedded[1:].to(decoder.device)
        output = head.forward_embedded(next_tokens, hidden[:-1], positions, batch, caches)
        drafts = head.logits(output).argmax(dim=-1)
        self._num_accepted += int((drafts == logits[1:].argmax(dim=-1)).sum())
        self._num_drafts += len(drafts)


def measurable_head(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[Checkpoint, ModelSpec] | None:
    """The MTP head of a checkpoint and its spec; None when it has none that is complete."""
    if spec.transformers is not None:
        return None
    head = mtp_model_spec(spec, checkpoint.tensor_shapes)
    if head is None:
        return None
    checkpoint = with_dense_modules(checkpoint, head)
    try:
        check_draft_head(checkpoint, head)
    except InputError:  # it is carried all the same
        return None
    return checkpoint, head
