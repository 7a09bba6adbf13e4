"""Models larger than the GPU: linears of the last layers lie in host memory, each layer's copied while another runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from llmkit.checkpoint.errors import InputError, ShortageError
from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.text import bytes_text
from llmkit.model.decoder import DecoderLayer
from llmkit.model.layout import Parameter, parameters
from llmkit.model.linear import PackedLinear
from llmkit.model.spec import ModelSpec
from llmkit.runtime.memory import free_bytes, weight_bytes

ALIGNED, PIECE = 256, 64 << 20  # bytes; pinned memory comes in powers of two


@dataclass(frozen=True)
class HostLayers:
    """The last layers of a model on a GPU, so many, whose linears lie in host memory."""

    layers: int = 0
    bytes: int = 0  # of these linears
    buffers: int = 0  # bytes on the GPU, for two layers


def host_layers(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device, limit: int
) -> HostLayers:
    """Those that fit into `limit` bytes; 0: none. Raises ShortageError, and InputError for less than a layer."""
    if not limit:
        return HostLayers()
    if device.type == "cpu":
        raise ShortageError("--cpu-offload needs a CUDA device", todo="Leave it out: the CPU holds all weights here")
    rows: dict[int, list[Parameter]] = {index: [] for index in range(len(spec.layers))}
    for row in parameters(spec):
        if row.name.startswith("layers.") and len(row.shape) == 2:
            rows[int(row.name.split(".")[1])].append(row)
    sizes = [weight_bytes(checkpoint, spec, dtype, device, rows[index]) for index in reversed(rows)]
    totals = [total for total in accumulate(sizes) if total <= limit]
    if not totals:
        raise InputError(f"--cpu-offload {bytes_text(limit)} is less than a layer", f"One needs {bytes_text(sizes[0])}")
    if totals[-1] > (free := free_bytes(torch.device("cpu"), 1.0)):
        raise ShortageError(
            f"--cpu-offload needs {bytes_text(totals[-1])} of host memory", f"There are {bytes_text(free)}"
        )
    return HostLayers(len(totals), totals[-1], 2 * max(sizes[: len(totals)]))


class Offload:
    """Takes the linears' tensors from the layers and gives them views of two buffers on the device, by turns.

    cuda: `torch.cuda`, whose streams and events order copies and kernels.
    """

    def __init__(self, layers: Sequence[DecoderLayer], device: torch.device, cuda: Any = torch.cuda) -> None:
        sizes = [[-(-value.nbytes // ALIGNED) * ALIGNED for *_, value in _weights(layer)] for layer in layers]
        self._device, self._cuda, self._stream = device, cuda, cuda.Stream(device)
        self._buffers = [torch.empty(max(map(sum, sizes)), dtype=torch.uint8, device=device) for _ in layers[:2]]
        self._ready, self._held = [cuda.Event() for _ in self._buffers], [-1, -1]  # the layers that are in them
        self._host: list[Sequence[torch.Tensor]] = []  # of each layer, in pieces
        for index, (layer, own) in enumerate(zip(layers, sizes, strict=True)):
            host = torch.empty(sum(own), dtype=torch.uint8)
            for (owner, name, value), start in zip(_weights(layer), accumulate(own, initial=0), strict=False):
                _view(host, start, value).copy_(value)
                setattr(owner, name, _view(self._buffers[index % 2], start, value))
            pieces = host.split(PIECE)
            self._host.append([piece.pin_memory() for piece in pieces] if device.type == "cuda" else pieces)
            layer.present = partial(self._present, index)
        for index in range(len(self._buffers)):
            self._fetch(index)

    @contextmanager
    def _present(self, index: int) -> Iterator[None]:
        """Within, kernels find the weights of that layer; afterwards the next that has its buffer is fetched."""
        turn = index % 2
        if self._held[turn] != index:
            self._fetch(index)
        self._cuda.current_stream(self._device).wait_event(self._ready[turn])
        yield
        following = index + 2 if index + 2 < len(self._host) else turn
        if following != index:
            self._fetch(following)

    def _fetch(self, index: int) -> None:
        turn, start = index % 2, 0
        self._stream.wait_stream(self._cuda.current_stream(self._device))  # until the buffer is no longer read
        with self._cuda.stream(self._stream):
            for piece in self._host[index]:
                self._buffers[turn][start : start + len(piece)].copy_(piece, non_blocking=True)
                start += len(piece)
            self._ready[turn].record(self._stream)
        self._held[turn] = index


def _weights(layer: DecoderLayer) -> Iterator[tuple[object, str, torch.Tensor]]:
    """The objects that hold a layer's weights, the names of their attributes, and what those are."""
    for linear in layer.linears.values():
        owner = linear.product if isinstance(linear, PackedLinear) else linear
        for name, value in list(vars(owner).items()):
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                yield owner, name, value


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape, dtype and order of dimensions in the buffer's bytes from `start`."""
    order = torch.empty_like(like, device="meta").stride()
    return buffer[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, order)
