"""How much memory a run needs, from shapes alone."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable

import psutil
import torch

from llmkit.checkpoint.errors import ShortageError
from llmkit.checkpoint.reading import CHUNK_BYTES
from llmkit.model.layout import Parameter, parameters
from llmkit.model.spec import ModelSpec
from llmkit.quant.stream import BATCH_ELEMENTS, BATCH_TOKENS

FLOAT = 4  # bytes of the float32 that everything is computed in
_BASE = 512 * 2**20  # libraries, the tokenizer, small change
_LEARNT = 10  # copies of a layer's weights while their rounding is learnt: themselves, gradients, what autograd keeps


def tensor_bytes(quantized: Iterable[Parameter]) -> int:
    """The peak of casting and rounding a chunk at a time: some chunks in float32, and the codes of the largest of
    the quantized parameters, as they are collected and packed."""
    return _BASE + 10 * CHUNK_BYTES + 4 * max(map(_elements, quantized), default=0)


def running_bytes(spec: ModelSpec, seq_len: int) -> int:
    """The peak of running one layer at a time for the logits of windows of `seq_len` tokens; no hidden states."""
    ends = sum(_elements(row) for row in parameters(spec) if not row.name.startswith("layers."))
    most = max(sum(map(_elements, layer)) for layer in _layers(spec))
    return _BASE + 2 * CHUNK_BYTES + FLOAT * max(most + _activations(spec, seq_len), ends + 4 * seq_len * spec.vocab)


def calibrating_bytes(spec: ModelSpec, seq_len: int, *, hessians: bool, learn: bool, ahead: bool) -> int:
    """The peak of quantizing one layer at a time; no hidden states. Beside the layer and its codes there are its
    activations, or the factor of a Hessian or a copy of a weight; with `hessians` those of half the layer; with
    `learn` those of all of it, and its weights several times; with `ahead` the next layer."""
    embedding = sum(_elements(row) for row in parameters(spec) if row.name == "embed.weight")
    most = FLOAT * embedding
    for layer in _layers(spec):
        linears = [row for row in layer if row.linear]
        halves: dict[str, int] = {}
        for row in linears:
            half = row.module.split(".")[2]  # "attn" or "mlp"
            halves[half] = halves.get(half, 0) + hessians * row.shape[1] ** 2
        working = max(max(hessians * row.shape[1] ** 2, _elements(row)) for row in linears)
        rounding = max(halves.values()) + max(working, _activations(spec, seq_len))
        learning = sum(halves.values()) + _LEARNT * sum(map(_elements, linears)) if learn else 0
        codes = sum(map(_elements, linears))
        most = max(most, codes + FLOAT * ((1 + ahead) * sum(map(_elements, layer)) + max(rounding, learning)))
    return _BASE + 2 * CHUNK_BYTES + most


def hidden_bytes(spec: ModelSpec, samples: int, seq_len: int) -> int:
    """The hidden states of all calibration windows."""
    return FLOAT * samples * seq_len * spec.hidden


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; of the machine for a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return psutil.virtual_memory().available


def give_back() -> None:
    """Hand freed memory back to the system: glibc keeps what was in pieces below 32 MiB, after a run through a wide
    layer hundreds of MiB. Nothing where the C library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_memory(need: int, per_sample: int, samples: int, have: int, calibrated: bool) -> None:
    """Raises ShortageError when `need` bytes are more than `have`, with the option that fits."""
    if need <= have:
        return
    fitting = samples - math.ceil((need - have) / per_sample) if calibrated and per_sample else 0
    if fitting >= 1:
        todo = f"Use --samples {fitting}"
    else:
        todo = "Use --method rtn, which needs one tensor at a time" if calibrated else "Use a machine with more memory"
    raise ShortageError(
        f"quantizing needs {need} bytes of memory ({need / 2**30:.1f} GiB), {have} ({have / 2**30:.1f} GiB) are free",
        todo=todo,
    )


def _activations(spec: ModelSpec, seq_len: int) -> int:
    """Elements of the largest micro-batch within a layer."""
    widest = max(row.shape[0] for row in parameters(spec) if row.linear)
    return max(seq_len, min(BATCH_TOKENS, BATCH_ELEMENTS // widest)) * (4 * spec.hidden + 2 * widest)


def _layers(spec: ModelSpec) -> list[list[Parameter]]:
    """The parameters of every decoder layer."""
    rows = parameters(spec)
    return [[row for row in rows if row.name.startswith(f"layers.{index}.")] for index in range(len(spec.layers))]


def _elements(row: Parameter) -> int:
    return math.prod(row.shape)
