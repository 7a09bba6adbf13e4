"""How much memory a run needs, from shapes alone."""

from __future__ import annotations

import math

import psutil
import torch

from llmkit.checkpoint.errors import ShortageError
from llmkit.model.layout import Parameter, parameters
from llmkit.model.spec import ModelSpec
from llmkit.quant.stream import BATCH_TOKENS

FLOAT = 4  # bytes of the float32 that everything is computed in
_BASE = 256 * 2**20  # libraries, the tokenizer, small change


def tensor_bytes(spec: ModelSpec) -> int:
    """The peak of casting and rounding: the largest tensor, as read, in float32, as codes and while rounding."""
    return _BASE + 4 * FLOAT * max(math.prod(row.shape) for row in parameters(spec))


def layer_bytes(spec: ModelSpec, seq_len: int) -> int:
    """The peak of running one layer at a time, the largest micro-batch and the embedding included; no hidden states."""
    rows = parameters(spec)
    layer = max(sum(map(_elements, _layer(rows, index))) for index in range(len(spec.layers)))
    ends = sum(_elements(row) for row in rows if not row.name.startswith("layers."))
    widest = max(row.shape[0] for row in rows if row.linear)
    batch = max(BATCH_TOKENS, seq_len)
    running = layer + batch * (4 * spec.hidden + 3 * widest)
    return _BASE + FLOAT * max(running, 2 * ends, ends + 4 * seq_len * spec.vocab)


def gptq_bytes(spec: ModelSpec) -> int:
    """What GPTQ needs beyond `layer_bytes`: the Hessians of a stage and the working copies of one weight."""
    rows = parameters(spec)
    stage = working = codes = 0
    for index in range(len(spec.layers)):
        linears = [row for row in _layer(rows, index) if row.linear]
        kinds: dict[str, int] = {}
        for row in linears:
            kind = row.module.rpartition(".")[2]
            kinds[kind] = kinds.get(kind, 0) + row.shape[1] ** 2
        stage = max(stage, *kinds.values())
        working = max(working, *(3 * _elements(row) + 5 * row.shape[1] ** 2 for row in linears))
        codes = max(codes, sum(map(_elements, linears)))
    return FLOAT * (stage + working) + codes


def hidden_bytes(spec: ModelSpec, samples: int, seq_len: int) -> int:
    """The hidden states of all calibration windows."""
    return FLOAT * samples * seq_len * spec.hidden


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; of the machine for a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return psutil.virtual_memory().available


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


def _layer(rows: list[Parameter], index: int) -> list[Parameter]:
    return [row for row in rows if row.name.startswith(f"layers.{index}.")]


def _elements(row: Parameter) -> int:
    return math.prod(row.shape)
