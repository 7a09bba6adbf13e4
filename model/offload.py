"""Layers whose linears lie in host memory: each layer's are copied to the device while the one before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from llmkit.model.decoder import DecoderLayer
from llmkit.model.linear import Linear, PackedLinear

ALIGNED, PIECE = 256, 64 << 20  # bytes; pinned memory comes in powers of two


class Offload:
    """Takes the linears' tensors from the layers and gives them views of two buffers on the device, by turns.

    cuda: `torch.cuda`, whose streams and events order copies and kernels.
    """

    def __init__(self, layers: Sequence[DecoderLayer], device: torch.device, cuda: Any = torch.cuda) -> None:
        sizes = [[-(-value.nbytes // ALIGNED) * ALIGNED for *_, value in _tensors(layer)] for layer in layers]
        self._device, self._cuda, self._stream = device, cuda, cuda.Stream(device)
        self._buffers = [torch.empty(max(map(sum, sizes)), dtype=torch.uint8, device=device) for _ in layers[:2]]
        self._ready, self._held = [cuda.Event() for _ in self._buffers], [-1, -1]  # the layers that are in them
        self._host: list[Sequence[torch.Tensor]] = []  # of each layer, in pieces
        for index, (layer, own) in enumerate(zip(layers, sizes, strict=True)):
            host = torch.empty(sum(own), dtype=torch.uint8)
            for (owner, name, value), start in zip(_tensors(layer), accumulate(own, initial=0), strict=False):
                _view(host, start, value).copy_(value)
                setattr(owner, name, _view(self._buffers[index % 2], start, value))
            pieces = host.split(PIECE)
            self._host.append([piece.pin_memory() for piece in pieces] if device.type == "cuda" else pieces)
            layer.present = partial(self._present, index)

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


def to_host(linear: Linear) -> Linear:
    """The same linear, its weight in host memory."""
    for owner, name, value in list(_own(linear)):
        setattr(owner, name, value.cpu())
    return linear


def _tensors(layer: DecoderLayer) -> list[tuple[object, str, torch.Tensor]]:
    return [found for linear in layer.linears.values() for found in _own(linear)]


def _own(linear: Linear) -> Iterator[tuple[object, str, torch.Tensor]]:
    """Where a linear holds its weight, and the parts of it: biases stay where they are."""
    owner = linear.product if isinstance(linear, PackedLinear) else linear
    for name, value in list(vars(owner).items()):
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            yield owner, name, value


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape, dtype and order of dimensions in the buffer's bytes from `start`."""
    order = torch.empty_like(like, device="meta").stride()
    return buffer[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, order)
