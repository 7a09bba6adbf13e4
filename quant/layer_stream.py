"""Runs a model one decoder layer at a time: only a layer and the hidden states are in memory.

Some layers read more than hidden states: keys and values of an earlier layer, and a vector of each
token (Gemma 4). A micro-batch keeps what later layers still read of it.

Legend: T tokens of a micro-batch, H hidden size, L tokens of a window, U distinct tokens of a text,
P `ModelSpec.per_layer_input_size`, K key-value heads, D head_dim.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.output_directory import write_errors
from llmkit.checkpoint.tensor_reader import CHUNK_BYTES, read_range, row_chunks, tensor_bytes
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.decoder import SINGLE_RANK, TABLES, Decoder, DecoderLayer
from llmkit.model.full_forward import make_batch
from llmkit.model.language_model import LayerCache, scratch_layer_caches
from llmkit.model.linear import ActivationQuant
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.rope import CosSin
from llmkit.model.spec import ModelSpec
from llmkit.model.token_embedding import TokenEmbedding
from llmkit.model.weight_loader import read_activation_quant, read_parameter
from llmkit.quant.draft_acceptance import DraftAcceptance

# A micro-batch has at most this many tokens, unless one window is longer.
BATCH_TOKENS = 4096
# The widest activation of a micro-batch has at most this many elements (256 MiB), unless that of
# one window has more.
BATCH_ELEMENTS = 1 << 26
# Tokens that are embedded at a time.
EMBEDDED_TOKENS = 1024


@dataclass(frozen=True)
class BatchContext:
    """What micro-batches of one size share: positions, attention inputs, scratch caches."""

    spec: ModelSpec
    cos_sin: Mapping[str, CosSin]
    batch: AttentionBatch
    caches: Sequence[LayerCache]  # one for each layer

    @property
    def device(self) -> torch.device:
        """The device of the layers."""
        return self.batch.device

    def kv_source(self, index: int) -> int:
        """The layer whose keys and values a layer reads."""
        return index - self.spec.layers[index].kv_shared_layer_offset


class LayerInputs(NamedTuple):
    """What a decoder layer reads besides the hidden states."""

    cos_sin: Mapping[str, CosSin]
    batch: AttentionBatch
    cache: LayerCache
    per_layer_input: torch.Tensor | None  # [T, P]


class StoredTensor:
    """A tensor on the CPU. It lies in `file` when there is one, else in memory."""

    def __init__(self, value: torch.Tensor, file: Path | None) -> None:
        self.shape = value.shape
        self._file = file
        self._value = value if file is None else None
        if file is not None:
            with write_errors(file):
                file.write_bytes(tensor_bytes(value.contiguous()))

    def read(self) -> torch.Tensor:
        """The tensor, float32; every call reads the file when there is one."""
        if self._value is not None:
            return self._value
        assert self._file is not None
        data = read_range(self._file, 0, self._file.stat().st_size)
        return data.view(torch.float32).reshape(self.shape)


class MicroBatch:
    """Some windows on their way through the layers."""

    def __init__(
        self,
        hidden: torch.Tensor,
        context: BatchContext,
        file: Path | None = None,
        token_rows: torch.Tensor | None = None,
        per_layer_inputs: torch.Tensor | None = None,
    ) -> None:
        """hidden: float32 [T, H] on the CPU. file: where hidden states lie, else in memory.

        per_layer_inputs: what the layers read of each distinct token, float32 [layers, U, P] on the
        CPU; token_rows: the row of each token there, int64 [T].
        """
        self.context = context
        self._file = file
        self._hidden = StoredTensor(hidden, file)
        self._token_rows = token_rows
        self._per_layer_inputs = per_layer_inputs
        # The keys and values that later layers read, [2K, blocks, block_size, D], by layer.
        self._kv: dict[int, StoredTensor] = {}

    def snapshot(self) -> MicroBatch:
        """A copy of the current state, kept while this micro-batch runs through a layer."""
        file = self._file.with_suffix(".before") if self._file is not None else None
        copy = MicroBatch(self.hidden, self.context, file, self._token_rows, self._per_layer_inputs)
        copy._kv = dict(self._kv)
        return copy

    @property
    def num_tokens(self) -> int:
        """T"""
        return self._hidden.shape[0]

    @property
    def first_tokens(self) -> list[int]:
        """The row of each window's first token."""
        lengths = self.context.batch.query_lens.tolist()
        return list(accumulate(lengths[:-1], initial=0))

    @property
    def hidden(self) -> torch.Tensor:
        """The output of the last layer that ran, float32 [T, H] on the CPU."""
        return self._hidden.read()

    @hidden.setter
    def hidden(self, value: torch.Tensor) -> None:
        self._hidden = StoredTensor(value, self._file)

    def layer_inputs(self, index: int) -> LayerInputs:
        """What a layer reads besides the hidden states.

        The scratch cache then holds the keys and values that the layer has from this micro-batch.
        """
        context = self.context
        cache = context.caches[index]
        kv = self.kept_kv(index)
        if kv is not None and isinstance(cache, KVCache):
            cache.kv.copy_(kv)
        per_layer_input = self.per_layer_input(index)
        if per_layer_input is not None:
            per_layer_input = per_layer_input.to(context.device)
        return LayerInputs(context.cos_sin, context.batch, cache, per_layer_input)

    def kept_kv(self, index: int) -> torch.Tensor | None:
        """The keys and values that a layer reads, if they are kept (see `advance`)."""
        kept = self._kv.get(self.context.kv_source(index))
        return None if kept is None else kept.read()

    def per_layer_input(self, index: int) -> torch.Tensor | None:
        """What a layer reads of each token, [T, P] on the CPU."""
        if self._per_layer_inputs is None:
            return None
        return self._per_layer_inputs[index][self._token_rows]

    def advance(self, index: int, run: Callable[[torch.Tensor, LayerInputs], torch.Tensor]) -> None:
        """Run a layer, or a part of it. Keys and values that later layers read are kept.

        run: returns the new hidden states [T, H] on the device.
        """
        inputs = self.layer_inputs(index)
        self.hidden = run(self.hidden.to(self.context.device), inputs).cpu()
        if isinstance(inputs.cache, KVCache) and index in self.context.spec.kv_source_layers:
            file = self._file
            if file is not None:
                file = file.with_name(f"{file.name}.kv-{index}")
            self._kv[index] = StoredTensor(inputs.cache.kv.to("cpu", copy=True), file)


class LayerStream:
    """A model whose layers are read when they run.

    read: returns a parameter's runtime tensor in float32 on `device`.
    activation_quant: returns the activation quantization of a parameter's modules, by name.
    read_embeddings: returns rows of an embedding in float32 on `device`, by ascending token ids;
    only `embed` needs it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        read: Callable[[Parameter], torch.Tensor],
        device: torch.device | str = "cpu",
        activation_quant: Callable[[Parameter], dict[str, ActivationQuant]] = lambda parameter: {},
        read_embeddings: Callable[[Parameter, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.read = read
        self.activation_quant = activation_quant
        self.read_embeddings = read_embeddings
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

        def read_rows(parameter: Parameter, token_ids: torch.Tensor) -> torch.Tensor:
            return _read_rows(checkpoint, parameter, token_ids).to(device)

        return cls(spec, read, device, activation_quant, read_rows)

    def with_values(self, values: Mapping[str, torch.Tensor]) -> LayerStream:
        """The same model with other values, float32 on the device, for some parameters by name."""

        def read(parameter: Parameter) -> torch.Tensor:
            value = values.get(parameter.name)
            return self.read(parameter) if value is None else value

        return LayerStream(
            self.spec, read, self.device, self.activation_quant, self.read_embeddings
        )

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
        token_ids, token_rows = windows.unique(return_inverse=True)
        embeddings, per_layer_inputs = self._embed_tokens(token_ids, folder)
        length = windows.shape[1]
        contexts: dict[int, BatchContext] = {}
        batches: list[MicroBatch] = []
        for window_rows in token_rows.split(max(1, batch_tokens // length)):
            count = len(window_rows)
            if count not in contexts:
                contexts[count] = self.batch_context(count, length)
            file = folder / f"hidden-{len(batches)}.bin" if folder is not None else None
            rows = window_rows.flatten()
            batches.append(
                MicroBatch(embeddings[rows], contexts[count], file, rows, per_layer_inputs)
            )
        return batches

    def _embed_tokens(
        self, token_ids: torch.Tensor, folder: Path | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The embeddings [U, H] and the per-layer inputs [layers, U, P] of U ascending token ids.

        Both depend on the token only. Only rows of these tokens are read, which for Gemma 4 is much
        less than the tables. The per-layer inputs are mapped from a file of `folder` when it is
        given.
        """
        assert self.read_embeddings is not None
        rows = {row.name: row for row in self._parameters if not row.name.startswith("layers.")}
        projection = {
            name: self.read(row)
            for name, row in rows.items()
            if name.startswith("per_layer.") and name not in TABLES
        }
        embeddings = torch.empty(len(token_ids), self.spec.hidden_size)
        per_layer_inputs = None
        if self.spec.per_layer_input_size:
            shape = (len(self.spec.layers), len(token_ids), self.spec.per_layer_input_size)
            per_layer_inputs = _empty(shape, folder / "per-layer.bin" if folder else None)
        for start in range(0, len(token_ids), EMBEDDED_TOKENS):
            part = slice(start, start + EMBEDDED_TOKENS)
            tables = {
                name: self.read_embeddings(rows[name], token_ids[part])
                for name in TABLES
                if name in rows
            }
            embed = TokenEmbedding(self.spec, tables | projection, torch.float32, SINGLE_RANK)
            tokens = torch.arange(len(token_ids[part]), device=self.device)
            hidden = embed(tokens)
            embeddings[part] = hidden.cpu()
            inputs = embed.per_layer_inputs(tokens, hidden)
            if per_layer_inputs is not None and inputs is not None:
                per_layer_inputs[:, part] = inputs.transpose(0, 1).cpu()
        return embeddings, per_layer_inputs

    def batch_context(self, count: int, length: int) -> BatchContext:
        """The context of a micro-batch of `count` windows of `length` tokens."""
        decoder = self.decoder_without_layers(with_head=False)
        positions, batch = make_batch(decoder, [length] * count)
        caches = scratch_layer_caches(decoder, self.spec, batch.num_blocks, batch.block_size)
        return BatchContext(self.spec, decoder.cos_sin(positions), batch, caches)

    @torch.no_grad()
    def run_layer(self, layer: DecoderLayer, batches: list[MicroBatch]) -> None:
        """Run micro-batches through a layer."""
        for micro_batch in batches:
            micro_batch.advance(layer.index, lambda hidden, inputs: layer(hidden, *inputs))

    @torch.no_grad()
    def logits(
        self,
        windows: torch.Tensor,
        advance: Callable[[], None] = lambda: None,
        acceptance: DraftAcceptance | None = None,
    ) -> Iterator[torch.Tensor]:
        """The logits, float32 [L, vocab], of each token window of [n, L].

        `advance` is called after every layer, to report progress. acceptance: counts the drafts of
        the model's MTP head.
        """
        batches = self.embed(windows)
        # A layer may write to its input.
        embedded = [batch.hidden.clone() if acceptance else batch.hidden[:0] for batch in batches]
        for index in range(len(self.spec.layers)):
            self.run_layer(self.layer(index), batches)
            advance()
        decoder = self.decoder_without_layers(with_head=True)
        for micro_batch, of_batch in zip(batches, embedded, strict=True):
            of_windows = of_batch.split(windows.shape[1])
            for index, hidden in enumerate(micro_batch.hidden.split(windows.shape[1])):
                normed = decoder.normalize(hidden.to(self.device))
                logits = decoder.logits(normed)
                if acceptance is not None:
                    acceptance.count(decoder, of_windows[index], normed, logits)
                yield logits

    def decoder_without_layers(self, with_head: bool) -> Decoder:
        """The decoder with neither layers nor embedding; with the output projection if asked."""
        spec = replace(self.spec, layers=())
        names = {"norm.weight", "norm.bias"}
        if with_head:
            names.add("embed.weight" if spec.tie_word_embeddings else "lm_head.weight")
        tensors: dict[str, torch.Tensor] = {}
        activation_quant: dict[str, ActivationQuant] = {}
        for parameter in self._parameters:
            if parameter.name in names:
                tensors[parameter.name] = self.read(parameter)
                activation_quant |= self.activation_quant(parameter)
        return Decoder(spec, tensors, activation_quant)


def _read_rows(
    checkpoint: Checkpoint, parameter: Parameter, token_ids: torch.Tensor
) -> torch.Tensor:
    """The rows [n, columns] of an embedding for ascending token ids, float32.

    The rows between them are read too, a chunk at a time.
    """
    (name,) = parameter.source_names
    rows = []
    for start, stop in row_chunks(checkpoint.tensors[name], CHUNK_BYTES):
        ids = token_ids[(token_ids >= start) & (token_ids < stop)]
        if len(ids):
            first = int(ids[0])
            chunk = checkpoint.read_slice(name, [(first, int(ids[-1]) + 1)], 0)
            rows.append(chunk[ids - first].float())
    return torch.cat(rows)


def _empty(shape: tuple[int, ...], file: Path | None) -> torch.Tensor:
    """A float32 tensor, mapped from a new file when one is given."""
    if file is None:
        return torch.empty(shape)
    num_elements = math.prod(shape)
    with write_errors(file), file.open("wb") as opened:
        # Without its blocks, a full disk would kill the process when it writes to the mapping.
        os.posix_fallocate(opened.fileno(), 0, num_elements * torch.float32.itemsize)
    return torch.from_file(str(file), shared=True, size=num_elements).view(shape)


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
