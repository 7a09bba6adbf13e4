"""The rows of the parameter table for a draft head, beside those of its decoder layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmkit.model.parameter import Parameter, SourceTensor, linear_rows
from llmkit.model.spec import DraftHeadSpec, ModelSpec
from llmkit.model.split import REPLICATED, Split

FIRST_LAYER = (0,)


def draft_head_rows(
    spec: ModelSpec, head: DraftHeadSpec, layer_rows: Iterable[Parameter]
) -> Iterator[Parameter]:
    """The rows of a draft head. What it shares with its model has none."""
    size = spec.hidden_size
    vocab = Split("vocab", 0, spec.vocab_size)
    if head.embed is not None:
        embedding = SourceTensor(f"{head.embed}.weight", (spec.vocab_size, size), vocab)
        yield Parameter("embed.weight", (embedding,), FIRST_LAYER)
    norms = {"mtp.hidden_norm": head.hidden_norm}
    if head.method == "mtp":  # that of an EAGLE-3 head is the layer's own norm
        norms["mtp.embed_norm"] = head.embed_norm
    for name, module in norms.items():
        norm = SourceTensor(f"{module}.weight", (size,))
        yield Parameter(f"{name}.weight", (norm,), FIRST_LAYER)
    num_columns = 2 * size
    if head.method == "eagle3":
        num_columns = len(head.aux_layers) * head.target_hidden_size
    yield from linear_rows(
        "mtp.fc", head.fc, (size, num_columns), REPLICATED, False, FIRST_LAYER, None
    )
    yield from layer_rows
    norm = SourceTensor(f"{head.norm}.weight", (size,))
    yield Parameter("norm.weight", (norm,), FIRST_LAYER)
    if head.lm_head is not None:
        output = SourceTensor(
            f"{head.lm_head}.weight",
            (head.draft_vocab_size, size),
            Split("vocab", 0, head.draft_vocab_size),
        )
        yield Parameter("lm_head.weight", (output,), FIRST_LAYER)
