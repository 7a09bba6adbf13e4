"""Models larger than the GPU: the linear weights of the last layers stay in host memory.

Each layer's weights are copied to the GPU while the layer before it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.common.errors import InputError, ShortageError
from llmkit.common.formatting import bytes_text
from llmkit.kernels.humming_linear import HummingLinear
from llmkit.model.decoder import DecoderLayer
from llmkit.model.linear import PackedLinear
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.runtime.memory_plan import free_bytes, weight_bytes

ALIGNMENT = 256  # bytes
PINNED_PIECE_BYTES = 64 << 20  # PyTorch rounds pinned allocations up to a power of two


@dataclass(frozen=True)
class OffloadPlan:
    """How many of a model's last layers keep their linear weights in host memory."""

    num_layers: int = 0
    weight_bytes: int = 0  # of these linear weights
    buffer_bytes: int = 0  # on the GPU, for two layers


def plan_offload(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device, limit: int
) -> OffloadPlan:
    """Offload as many of the last layers as fit into `limit` bytes of host memory; 0: none.

    Raises InputError for a limit below one layer, and ShortageError without a GPU or enough host
    memory.
    """
    if not limit:
        return OffloadPlan()
    if device.type == "cpu":
        raise ShortageError(
            "--cpu-offload needs a CUDA device", todo="Leave it out: the CPU holds all weights here"
        )
    matrices: dict[int, list[Parameter]] = {index: [] for index in range(len(spec.layers))}
    for row in parameters(spec):
        stays = row.name.endswith("attn.kv_b.weight")  # attention reads it in another form
        if row.name.startswith("layers.") and len(row.shape) == 2 and not stays:
            matrices[int(row.name.split(".")[1])].append(row)
    # From the last layer to the first.
    layer_bytes = [
        weight_bytes(checkpoint, spec, dtype, device, matrices[index])
        for index in reversed(matrices)
    ]
    totals = [total for total in accumulate(layer_bytes) if total <= limit]
    if not totals:
        raise InputError(
            f"--cpu-offload {bytes_text(limit)} is less than a layer",
            f"One needs {bytes_text(layer_bytes[0])}",
        )
    num_layers = len(totals)
    offloaded_bytes = totals[-1]
    free = free_bytes(torch.device("cpu"), 1.0)
    if offloaded_bytes > free:
        raise ShortageError(
            f"--cpu-offload needs {bytes_text(offloaded_bytes)} of host memory",
            f"There are {bytes_text(free)}",
        )
    return OffloadPlan(num_layers, offloaded_bytes, 2 * max(layer_bytes[:num_layers]))


class WeightOffload:
    """Moves the linear weights of layers to host memory.

    The layers use two buffers on the device in turn. While one layer runs, the weights of the next
    are copied into the other buffer.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], device: torch.device, cuda: Any = torch.cuda
    ) -> None:
        """cuda: `torch.cuda`, whose streams and events order copies and kernels."""
        sizes = [[_aligned(tensor.nbytes) for *_, tensor in _weights(layer)] for layer in layers]
        buffer_bytes = max(map(sum, sizes))
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, device=device) for _ in layers[:2]
        ]
        self._copied = [cuda.Event() for _ in self._buffers]  # the last copy into each buffer
        self._layer_in_buffer = [-1, -1]
        self._host: list[Sequence[torch.Tensor]] = []  # the bytes of each layer, in pieces
        for index, (layer, layer_sizes) in enumerate(zip(layers, sizes, strict=True)):
            host = torch.empty(sum(layer_sizes), dtype=torch.uint8)
            starts = accumulate(layer_sizes, initial=0)
            for (owner, name, tensor), start in zip(_weights(layer), starts, strict=False):
                _view(host, start, tensor).copy_(tensor)
                setattr(owner, name, _view(self._buffers[index % 2], start, tensor))
            pieces: Sequence[torch.Tensor] = host.split(PINNED_PIECE_BYTES)
            if device.type == "cuda":
                pieces = [piece.pin_memory() for piece in pieces]
            self._host.append(pieces)
            layer.weights_on_device = partial(self._weights_on_device, index)
        for index in range(len(self._buffers)):
            self._start_copy(index)

    @contextmanager
    def _weights_on_device(self, index: int) -> Iterator[None]:
        """Kernels launched inside the `with` block find the layer's weights in its buffer.

        When the block ends, the copy of the next layer into the same buffer starts.
        """
        buffer = index % 2
        if self._layer_in_buffer[buffer] != index:  # after a step that failed
            self._start_copy(index)
        self._cuda.current_stream(self._device).wait_event(self._copied[buffer])
        yield
        next_index = index + 2
        if next_index >= len(self._host):
            next_index = buffer  # the first layer of the next step
        if next_index != index:
            self._start_copy(next_index)

    def _start_copy(self, index: int) -> None:
        buffer = index % 2
        start = 0
        # The kernels of the last layer may still read the buffer.
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            for piece in self._host[index]:
                stop = start + len(piece)
                self._buffers[buffer][start:stop].copy_(piece, non_blocking=True)
                start = stop
            self._copied[buffer].record(self._stream)
        self._layer_in_buffer[buffer] = index


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _weights(layer: DecoderLayer) -> Iterator[tuple[object, str, torch.Tensor]]:
    """The matrices of a layer: the owner, the name of the attribute, and the tensor."""
    for linear in layer.linears.values():
        owner: object = linear.kernel if isinstance(linear, PackedLinear) else linear
        if isinstance(owner, HummingLinear):
            owner = owner.layer
        for name, value in list(vars(owner).items()):
            if isinstance(value, torch.Tensor) and value.dim() > 1 and not value.is_meta:
                yield owner, name, value


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """A view of the bytes of `buffer` from `start` that looks like the tensor `like`.

    It has the same shape, dtype and order of dimensions.
    """
    order = torch.empty_like(like, device="meta").stride()
    return buffer[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, order)
