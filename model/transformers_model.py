"""The fallback: a model that runs by transformers' own modeling code, with paged attention.

Legend: T tokens of a step, H hidden, N query heads, K key-value heads, D head_dim. The tokens of a
step are one row of a batch for transformers. Which of them belong to which sequence is known only
to the attention function.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig
from transformers.utils import logging

from llmkit.kernels.attention import paged_attention
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.decoder import SINGLE_RANK
from llmkit.model.language_model import LayerCache, empty_kv_cache
from llmkit.model.linear import ActivationQuant, Linear
from llmkit.model.parallel_group import ParallelGroup, mask_padding
from llmkit.model.spec import ModelSpec
from llmkit.model.transformers_ranks import connect_modules, shrink_parameters
from llmkit.model.transformers_spec import build_model, split_head

PAGED_ATTENTION = "llmkit_paged"


@dataclass(frozen=True)
class Step:
    """What the attention functions of all layers need in a step."""

    spec: ModelSpec
    batch: AttentionBatch
    caches: Sequence[LayerCache]


# The step that runs. Not every model passes unknown keyword arguments on to its attention.
_step: ContextVar[Step] = ContextVar("_step")


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls.

    query: [1, N, T, D]; key, value: [1, K, T, D]; s_aux: attention sinks, [N].
    Returns [1, T, N, D].
    """
    step = _step.get()
    index: int = module.layer_idx  # type: ignore[assignment]
    cache = step.caches[index]
    assert isinstance(cache, KVCache), "the fallback has attention only"
    metadata = step.batch.metadata(step.spec.layers[index].sliding_window)
    dtype = value.dtype
    kv = torch.cat((key[0], value[0])).to(dtype).transpose(0, 1)  # [T, 2K, D]
    cache.store(kv.contiguous(), metadata.slot_mapping)
    q = query[0].transpose(0, 1).to(dtype).contiguous()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.float()
    return paged_attention(q, cache, metadata, scale, softcap, sinks)[None], None


ALL_ATTENTION_FUNCTIONS.register(PAGED_ATTENTION, _paged_attention)


class TransformersModel:
    """A model that runs by transformers' own modeling code. It is a `LanguageModel`.

    tensors: the runtime tensors by the names of the parameter table, on one device. Tensors are
    removed from the mapping as they are used.
    activation_quant: how the inputs of linear layers are quantized, by runtime module.
    linears: the packed linear layers by runtime module ("layers.3.mlp.up_proj", "lm_head").
    dtype: of the hidden states, and of the tensors but for the embedding.
    parallel_group: the ranks of the model. All ranks run the same steps.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: dict[str, torch.Tensor],
        activation_quant: Mapping[str, ActivationQuant],
        linears: Mapping[str, Linear],
        dtype: torch.dtype,
        parallel_group: ParallelGroup = SINGLE_RANK,
    ) -> None:
        assert spec.transformers is not None
        self.spec = spec
        self.parallel_group = parallel_group
        self.dtype = dtype
        self.device = tensors["embed.weight"].device
        self.model = build_model(spec.transformers.config, PAGED_ATTENTION, self.dtype)
        self.layers: list[nn.Module] = [
            self.model.get_submodule(name) for name in spec.transformers.layers
        ]
        if spec.rank is not None:
            shrink_parameters(self.model, spec.rank)
        self._rows = {row.name: row for row in spec.transformers.tensors}
        self._load_tensors(tensors)
        self._make_buffers()
        self.model.tie_weights()
        self.linears = dict(linears)
        for module, quant in activation_quant.items():
            if module not in self.linears:
                dense = self.linear(module)
                self.linears[module] = Linear(dense.weight, dense.bias, quant)
        for module, linear in self.linears.items():
            self.replace_linear(module, linear)
        # The embedding may have a smaller dtype than the model.
        self.model.get_input_embeddings().register_forward_hook(
            lambda _module, _inputs, output: output.to(self.dtype)
        )
        if spec.rank is not None:
            connect_modules(self.model, spec.rank, parallel_group)
        self.model.requires_grad_(False)
        self.decoder, self._given = split_head(self.model)

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """See `LanguageModel`."""
        with self.step(batch, caches):
            output = self.decoder(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False
            )
        hidden: torch.Tensor = output[0][0]
        return hidden

    @contextmanager
    def step(self, batch: AttentionBatch, caches: Sequence[LayerCache]) -> Iterator[None]:
        """Inside the `with` block, the layers attend to the sequences of `batch`."""
        token = _step.set(Step(self.spec, batch, caches))
        try:
            yield
        finally:
            _step.reset(token)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel`. The model's own code scales and caps them."""
        self._given.hidden = hidden[None]
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        logits: torch.Tensor = self.model(input_ids=token, use_cache=False).logits
        self._given.hidden = None
        return mask_padding(logits[0].float(), self.spec, self.parallel_group)

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int = 16,
        kv_cache_dtype: str | None = None,
        layer_spec: ModelSpec | None = None,
    ) -> KVCache:
        """See `LanguageModel`."""
        return empty_kv_cache(
            self,
            layer_spec or self.spec,
            num_blocks,
            block_size,
            kv_cache_dtype,
            has_static_scales=False,
        )

    def weights(self) -> tuple[list[Linear], list[torch.Tensor]]:
        """See `LanguageModel`."""
        ours = {
            id(parameter) for linear in self.linears.values() for parameter in linear.parameters()
        }
        others = [
            tensor
            for tensor in (*self.model.parameters(), *self.model.buffers())
            if id(tensor) not in ours
        ]
        others += [*self.decoder.parameters(), *self.decoder.buffers()]
        return list(self.linears.values()), others

    def linear(self, module: str) -> nn.Linear | Linear:
        """A linear layer by its runtime module."""
        if module == "lm_head":
            head: nn.Linear | Linear = self.model.get_output_embeddings()
            return head
        parent, attribute = self._place(module)
        linear: nn.Linear | Linear = getattr(parent, attribute)
        return linear

    def replace_linear(self, module: str, linear: Linear) -> None:
        """Put a linear layer of ours in the place of transformers'."""
        if module == "lm_head":
            self.model.set_output_embeddings(linear)
        else:
            parent, attribute = self._place(module)
            setattr(parent, attribute, linear)

    def _place(self, module: str) -> tuple[nn.Module, str]:
        """The module that holds a runtime module of a layer, and its attribute there."""
        _, index, name = module.split(".", 2)
        parent, _, attribute = name.rpartition(".")
        return self.layers[int(index)].get_submodule(parent), attribute

    def _load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put tensors into the model. transformers converts those that it holds in another form."""
        to_convert: dict[int | None, dict[str, torch.Tensor]] = defaultdict(dict)
        for name in list(tensors):
            row = self._rows[name]
            tensor = tensors.pop(name)
            if row.parameter is None:
                to_convert[row.layer][row.source] = tensor
                continue
            module_name, _, attribute = row.parameter.rpartition(".")
            module = self.model.get_submodule(module_name)
            if attribute in module._parameters:
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(module, attribute, tensor)
        if not to_convert:
            return
        mapping: Any = get_model_conversion_mapping(self.model)
        config = LoadStateDictConfig(
            device_map={"": self.device}, dtype=self.dtype, weight_mapping=mapping
        )
        shows_progress = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            for layer in list(to_convert):
                convert_and_load_state_dict_in_model(self.model, to_convert.pop(layer), config)
        finally:
            if shows_progress:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]

    def _make_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds, such as RoPE frequencies."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor._is_hf_initialized = True
        for name, buffer in list(self.model.named_non_persistent_buffers()):
            parent, _, attribute = name.rpartition(".")
            empty = torch.empty_like(buffer, device=self.device)
            self.model.get_submodule(parent)._buffers[attribute] = empty
        self.model.initialize_weights()
