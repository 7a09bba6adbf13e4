"""Runs a model one decoder layer at a time: only a layer and the hidden states are in memory.

Legend: T tokens of a micro-batch, H hidden size, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.output_directory import write_errors
from llmkit.checkpoint.tensor_reader import read_range, tensor_bytes
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.full_forward import make_batch
from llmkit.model.language_model import scratch_kv_caches
from llmkit.model.linear import ActivationQuant
from llmkit.model.parameter_table import Parameter, parameters
from llmkit.model.rope import CosSin
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import read_activation_quant, read_parameter

# A micro-batch has at most this many tokens, unless one window is longer.
BATCH_TOKENS = 4096
# The widest activation of a micro-batch has at most this many elements (256 MiB), unless that of
# one window has more.
BATCH_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class BatchContext:
    """What micro-batches of one size share: positions, attention inputs, scratch KV caches."""

    cos_sin: Mapping[str, CosSin]
    batch: AttentionBatch
    caches: Sequence[KVCache]  # one for each layer

    @property
    def device(self) -> torch.device:
        """The device of the layers."""
        return self.caches[0].kv.device


class MicroBatch:
    """Some windows on their way through the layers.

    `hidden` is the output of the last layer that ran, float32 [T, H] on the CPU. It lies in `file`
    when there is one, else in memory.
    """

    def __init__(
        self, hidden: torch.Tensor, context: BatchContext, file: Path | None = None
    ) -> None:
        self.context = context
        self.shape = hidden.shape
        self._file = file
        self._hidden: torch.Tensor | None = None
        self.hidden = hidden

    def snapshot(self) -> MicroBatch:
        """A copy of the current hidden states, kept while this micro-batch runs through a layer."""
        file = self._file.with_suffix(".before") if self._file is not None else None
        return MicroBatch(self.hidden, self.context, file)

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.shape[0]

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states; every use reads the file when there is one."""
        if self._hidden is not None:
            return self._hidden
        assert self._file is not None
        data = read_range(self._file, 0, self._file.stat().st_size)
        return data.view(torch.float32).reshape(self.shape)

    @hidden.setter
    def hidden(self, value: torch.Tensor) -> None:
        if self._file is None:
            self._hidden = value
            return
        with write_errors(self._file):
            self._file.write_bytes(tensor_bytes(value.contiguous()))


class LayerStream:
    """A model whose layers are read when they run.

    read: returns a parameter's runtime tensor in float32 on `device`.
    activation_quant: returns the activation quantization of a parameter's modules, by name.
    """

    def __init__(
        self,
        spec: ModelSpec,
        read: Callable[[Parameter], torch.Tensor],
        device: torch.device | str = "cpu",
        activation_quant: Callable[[Parameter], dict[str, ActivationQuant]] = lambda parameter: {},
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.read = read
        self.activation_quant = activation_quant
        self._parameters = parameters(spec)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, spec: ModelSpec, device: torch.device | str = "cpu"
    ) -> LayerStream:
        """A stream of a checkpoint's layers, dequantized when it is quantized."""

        def read(parameter: Parameter) -> torch.Tensor:
            return read_parameter(checkpoint, parameter, torch.float32, device)

        def activation_quant(parameter: Parameter) -> dict[str, ActivationQuant]:
            return read_activation_quant(checkpoint, parameter, device)

        return cls(spec, read, device, activation_quant)

    def layer_parameters(self, index: int) -> list[Parameter]:
        """The rows of the parameter table that belong to a layer."""
        prefix = f"layers.{index}."
        return [parameter for parameter in self._parameters if parameter.name.startswith(prefix)]

    def layer(self, index: int) -> DecoderLayer:
        """Read a layer."""
        prefix = f"layers.{index}."
        tensors: dict[str, torch.Tensor] = {}
        activation_quant: dict[str, ActivationQuant] = {}
        for parameter in self.layer_parameters(index):
            tensors[parameter.name.removeprefix(prefix)] = self.read(parameter)
            for name, quant in self.activation_quant(parameter).items():
                activation_quant[name.removeprefix(prefix)] = quant
        return DecoderLayer(self.spec, index, tensors, activation_quant)

    @torch.no_grad()
    def embed(
        self, windows: torch.Tensor, batch_tokens: int | None = None, folder: Path | None = None
    ) -> list[MicroBatch]:
        """Embed token windows [n, L] as micro-batches for the first layer.

        Their hidden states lie in files of `folder` when it is given.
        """
        if batch_tokens is None:
            linears = [parameter for parameter in self._parameters if parameter.is_linear]
            widest = max((linear.shape[0] for linear in linears), default=1)
            batch_tokens = min(BATCH_TOKENS, BATCH_ELEMENTS // widest)
        decoder = self.decoder_without_layers(with_head=False)
        length = windows.shape[1]
        contexts: dict[int, BatchContext] = {}
        batches: list[MicroBatch] = []
        for chunk in windows.split(max(1, batch_tokens // length)):
            count = len(chunk)
            if count not in contexts:
                contexts[count] = self._batch_context(decoder, count, length)
            file = folder / f"hidden-{len(batches)}.bin" if folder is not None else None
            hidden = decoder.embed_tokens(chunk.flatten().to(self.device)).cpu()
            batches.append(MicroBatch(hidden, contexts[count], file))
        return batches

    def batch_context(self, count: int, length: int) -> BatchContext:
        """The context of a micro-batch of `count` windows of `length` tokens."""
        return self._batch_context(self.decoder_without_layers(with_head=False), count, length)

    def _batch_context(self, decoder: Decoder, count: int, length: int) -> BatchContext:
        positions, batch = make_batch(decoder, [length] * count)
        caches = scratch_kv_caches(decoder, self.spec, batch.num_blocks, batch.block_size)
        return BatchContext(decoder.cos_sin(positions), batch, caches)

    @torch.no_grad()
    def run_layer(self, layer: DecoderLayer, batches: list[MicroBatch]) -> None:
        """Run micro-batches through a layer."""
        for micro_batch in batches:
            context = micro_batch.context
            hidden = micro_batch.hidden.to(context.device)
            cache = context.caches[layer.index]
            hidden = layer(hidden, context.cos_sin, context.batch, cache)
            micro_batch.hidden = hidden.cpu()

    @torch.no_grad()
    def logits(
        self, windows: torch.Tensor, advance: Callable[[], None] = lambda: None
    ) -> Iterator[torch.Tensor]:
        """The logits, float32 [L, vocab], of each token window of [n, L].

        `advance` is called after every layer, to report progress.
        """
        batches = self.embed(windows)
        for index in range(len(self.spec.layers)):
            self.run_layer(self.layer(index), batches)
            advance()
        decoder = self.decoder_without_layers(with_head=True)
        for micro_batch in batches:
            for hidden in micro_batch.hidden.split(windows.shape[1]):
                yield decoder.logits(decoder.normalize(hidden.to(self.device)))

    def decoder_without_layers(self, with_head: bool) -> Decoder:
        """The decoder with no layers, and with the output projection only if `with_head`."""
        # A tied decoder needs no lm_head tensor.
        tied = self.spec.tie_word_embeddings or not with_head
        spec = replace(self.spec, layers=(), tie_word_embeddings=tied)
        names = {"embed.weight", "norm.weight", "norm.bias"}
        if not tied:
            names.add("lm_head.weight")
        tensors: dict[str, torch.Tensor] = {}
        activation_quant: dict[str, ActivationQuant] = {}
        for parameter in self._parameters:
            if parameter.name in names:
                tensors[parameter.name] = self.read(parameter)
                activation_quant |= self.activation_quant(parameter)
        return Decoder(spec, tensors, activation_quant)


def prefetch_layers(
    read: Callable[[int], DecoderLayer], indices: Sequence[int], *, prefetch: bool
) -> Iterator[DecoderLayer]:
    """Yield read(index) of every index.

    With `prefetch`, a thread reads the next layer while the caller uses the current one.
    """
    if not prefetch or not indices:
        yield from map(read, indices)
        return
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(read, indices[0])
        for next_index in indices[1:]:
            layer = future.result()
            future = pool.submit(read, next_index)
            yield layer
            del layer  # a held reference would keep three layers in memory
        yield future.result()
