"""What a rank of a model that runs by transformers' own modeling code does as its tp_plan says.

Its parameters have the rank's sizes, and modules exchange their inputs or outputs with the other
ranks. The styles of a tp_plan are those of transformers' distributed/tensor_parallel.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.spec import RankSpec
from llmkit.model.transformers_tp_plan import axis_of, module_style

GATHERED_STYLES = {"colwise_gather_output", "colwise_rep", "embedding_colwise"}
# Each rank computes with some of the input's features, and the outputs are summed.
SPLIT_INPUT_STYLES = {"rowwise_split_input", "rowwise_rep"}
SUMMED_STYLES = {"rowwise", *SPLIT_INPUT_STYLES, "moe_tp_experts", "all_reduce"}


def shrink_parameters(model: Any, rank: RankSpec) -> None:
    """Give the parameters of a model on the meta device the sizes that a rank holds."""
    for name, parameter in list(model.named_parameters()):
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        axis = axis_of(model.tp_plan, name, parameter)
        if axis is not None:
            shape = list(parameter.shape)
            shape[axis.dim] //= rank.tp_size
            smaller = nn.Parameter(parameter.new_empty(shape), requires_grad=False)
            setattr(module, attribute, smaller)
        is_summed = module_style(model.tp_plan, module_name) in SUMMED_STYLES
        if is_summed and attribute == "bias" and rank.tp_rank > 0:
            module.bias = None  # the first rank adds it


def connect_modules(model: Any, rank: RankSpec, group: ParallelGroup) -> None:
    """Let the modules of a rank exchange inputs and outputs with those of the other ranks.

    The output projection does not: a rank computes the logits of its part of the vocabulary.
    """
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        style = module_style(model.tp_plan, name)
        if module is head:
            continue
        if style == "embedding_rowwise":
            _connect_embedding(module, group)
        elif style in SUMMED_STYLES | GATHERED_STYLES:
            parent, _, attribute = name.rpartition(".")
            setattr(
                model.get_submodule(parent), attribute, ParallelModule(module, style, rank, group)
            )


class ParallelModule(nn.Module):
    """A module with a style of SUMMED_STYLES or GATHERED_STYLES, on one rank."""

    def __init__(self, module: nn.Module, style: str, rank: RankSpec, group: ParallelGroup) -> None:
        super().__init__()
        self.module = module
        self.style = style
        self.rank = rank
        self.group = group

    @property
    def weight(self) -> torch.Tensor:
        """The rank's part of the weight. Some modeling code reads its dtype."""
        return self.module.weight  # type: ignore[return-value]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: the input of the whole module, or the rank's part of it for the style "rowwise"."""
        if self.style in SPLIT_INPUT_STYLES:
            x = x.chunk(self.rank.tp_size, -1)[self.rank.tp_rank].contiguous()
        output = self.module(x, *args, **kwargs)
        if self.style in GATHERED_STYLES:
            return self.group.all_gather(output)
        return self.group.all_reduce(output)


def _connect_embedding(embedding: nn.Module, group: ParallelGroup) -> None:
    """Let an embedding that has the rows of a part of the vocabulary take tokens of all of it."""
    num_rows = len(embedding.weight)  # type: ignore[arg-type]
    is_here = torch.empty(0)  # which tokens of the step have a row here

    def to_rows(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        nonlocal is_here
        rows = args[0] - group.vocab_start
        is_here = (rows >= 0) & (rows < num_rows)
        return rows.where(is_here, 0)

    def sum_rows(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return group.all_reduce(output * is_here[..., None])

    embedding.register_forward_pre_hook(to_rows)
    embedding.register_forward_hook(sum_rows)
