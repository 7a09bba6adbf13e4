"""What drafts tokens for a model: a smaller model, an EAGLE-3 head, or the model's own MTP head."""

from __future__ import annotations

from typing import NamedTuple

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.draft_head_spec import (
    check_draft_head,
    eagle3_model_spec,
    is_eagle3,
    mtp_model_spec,
    with_dense_modules,
    with_own_embedding,
)
from llmkit.model.families import checkpoint_spec, require_native
from llmkit.model.parameter_table import embedding_tensor
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.shard.rank_part import draft_head_part

LEAVE_OUT = "Leave out --draft-model to draft from the text itself"


class DraftSource(NamedTuple):
    """A checkpoint with what drafts, and its spec: `ModelSpec.draft_head` is set for a head."""

    checkpoint: Checkpoint
    spec: ModelSpec


def open_draft(
    checkpoint: Checkpoint, spec: ModelSpec, options: EngineOptions
) -> DraftSource | None:
    """What drafts for a model or a rank's part of it; None without speculation, and where its text
    or a later pipeline stage does.

    checkpoint: the whole model's; of a sharded one with the tensors that no rank loads.
    Raises InputError when it cannot draft for the model.
    """
    if options.draft_model is not None:
        if options.speculation.method != "ngram":
            raise InputError(
                f"--speculate {options.speculate} with --draft-model {options.draft_model}",
                "One of them was expected: both say what drafts",
                "Give --speculate a number of tokens, or leave out --draft-model",
            )
        _require_full_attention(spec, "--draft-model", LEAVE_OUT)
        return _open_draft_model(options.draft_model, spec)
    if options.speculation.method != "mtp":
        return None
    return _open_mtp_head(checkpoint, spec)


def _open_mtp_head(checkpoint: Checkpoint, spec: ModelSpec) -> DraftSource | None:
    require_native(spec, "--speculate mtp")
    others = "Use --speculate ngram or suffix, or --draft-model"
    full_model = spec.full_model
    _require_full_attention(spec, "--speculate mtp", others)
    head = mtp_model_spec(full_model, checkpoint.tensor_shapes)
    if head is None:
        raise InputError(
            f"--speculate mtp: {checkpoint.reference} has no MTP head",
            "A layer with eh_proj after the last one, or modules named mtp were expected",
            others,
        )
    checkpoint = with_dense_modules(checkpoint, head)
    check_draft_head(checkpoint, head)
    if not spec.is_last_stage:
        return None
    if not (spec.is_first_stage or full_model.tie_word_embeddings):
        # The last stage has the model's embedding only if it is tied to the output.
        head = with_own_embedding(head, embedding_tensor(full_model))
    if spec.rank is None:
        return DraftSource(checkpoint, head)
    part = draft_head_part(checkpoint, head, spec.rank)
    return DraftSource(part.checkpoint, part.spec)


def _open_draft_model(reference: str, spec: ModelSpec) -> DraftSource:
    draft = open_checkpoint(reference, warn_of_edits=False)
    draft.require_unsharded()
    if is_eagle3(draft.config):
        require_native(spec, f"the EAGLE-3 head {reference}")
        head = eagle3_model_spec(draft, spec)
        draft = with_dense_modules(draft, head)
        check_draft_head(draft, head)
        return DraftSource(draft, head)
    draft_spec = checkpoint_spec(draft)
    check_checkpoint(draft, draft_spec)
    if draft_spec.vocab_size != spec.vocab_size:
        raise InputError(
            f"the draft model {reference} has {draft_spec.vocab_size} tokens and the model "
            f"{spec.vocab_size}",
            "A draft model with the same tokenizer was expected",
            "Choose a smaller model of the same family, or leave out --draft-model to draft from "
            "the text itself",
        )
    if draft_spec.recurrent is not None:
        raise InputError(
            f"the draft model {reference} has recurrent layers, whose states it could not take "
            "back when tokens are rejected",
            "A draft model with attention in all layers was expected",
            f"Choose another one, or {LEAVE_OUT[0].lower()}{LEAVE_OUT[1:]}",
        )
    return DraftSource(draft, draft_spec)


def _require_full_attention(spec: ModelSpec, option: str, todo: str) -> None:
    if None not in spec.sliding_windows:
        raise InputError(
            f"{option} is not possible with a model whose layers all have a sliding window",
            "A model with full attention was expected",
            todo,
        )
