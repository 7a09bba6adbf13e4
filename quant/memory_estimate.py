"""Estimates a run's memory from shapes alone."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable

import psutil
import torch

from llmkit.checkpoint.tensor_reader import CHUNK_BYTES
from llmkit.common.errors import ShortageError
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.quant.calibrate_layer import RECORDED_BYTES
from llmkit.quant.layer_stream import BATCH_ELEMENTS, BATCH_TOKENS

FLOAT_BYTES = 4  # everything is computed in float32
# Per-layer inputs are kept once for each distinct token of a text. English text of a usual size
# repeats its tokens at least as often as this.
TOKENS_PER_DISTINCT_TOKEN = 4
_BASE_BYTES = 512 * 2**20  # libraries, the tokenizer and small buffers
# The tokens that sensitivities are measured on, and the hidden states of all variants of the model.
SENSITIVITY_TOKENS = 256
VARIANT_BYTES = 2**30
# Copies of a layer's weights in learned rounding: the weights, gradients, curvatures and what
# autograd keeps.
_AUTO_ROUND_COPIES = 14
HEAD_TOKENS = 512  # whose logits are in memory at a time while norms are tuned


def casting_bytes(quantized: Iterable[Parameter]) -> int:
    """The peak of casting and rounding without calibration, a chunk at a time.

    It holds some float32 chunks, and the quantized values of the largest quantized parameter while
    they are collected and packed.
    """
    largest = max((_num_elements(parameter) for parameter in quantized), default=0)
    return _BASE_BYTES + 10 * CHUNK_BYTES + 4 * largest


def evaluation_bytes(spec: ModelSpec, seq_len: int) -> int:
    """The peak of computing the logits of windows of `seq_len` tokens, a layer at a time.

    Hidden states are not included.
    """
    layer_elements = max(_total_elements(layer) for layer in _layers(spec))
    # Of the tables of per-layer inputs, only the rows of the text's tokens are in memory.
    not_in_layers = [
        row for row in parameters(spec) if not row.name.startswith(("layers.", "per_layer."))
    ]
    running_layer = layer_elements + _activation_elements(spec, seq_len)
    computing_logits = _total_elements(not_in_layers) + 4 * seq_len * spec.vocab_size
    return _BASE_BYTES + 2 * CHUNK_BYTES + FLOAT_BYTES * max(running_layer, computing_logits)


def calibration_bytes(
    spec: ModelSpec,
    seq_len: int,
    *,
    hessians: bool,
    auto_round: bool,
    prefetch: bool,
    asymmetric: bool = False,
) -> int:
    """The peak of quantizing a layer at a time. Hidden states are not included.

    In memory are the layer and its quantized values, and the largest of three things: its
    activations, the factor of a Hessian, and a copy of a weight.

    hessians: the Hessians of one sublayer's linears are in memory too.
    auto_round: the Hessians of all its linears and several copies of its weights are in memory too.
    prefetch: the next layer is in memory too.
    asymmetric: the unquantized layer and a residual for each Hessian are in memory too.
    """
    embedding = [row for row in parameters(spec) if row.name == "embed.weight"]
    peak = FLOAT_BYTES * _total_elements(embedding)
    for layer in _layers(spec):
        linears = [parameter for parameter in layer if parameter.is_linear]
        # By sublayer, "attn" or "mlp".
        hessian_elements: dict[str, int] = {}
        working = 0
        for parameter in linears:
            sublayer = parameter.module.split(".")[2]
            hessian = hessians * parameter.shape[1] ** 2
            kept = (1 + asymmetric) * hessian
            hessian_elements[sublayer] = hessian_elements.get(sublayer, 0) + kept
            working = max(working, (1 + asymmetric) * hessian, _num_elements(parameter))
        activations = _activation_elements(spec, seq_len)
        rounding = max(hessian_elements.values()) + max(working, activations)
        quantized = _total_elements(linears)
        learning = 0
        if auto_round:
            learning = sum(hessian_elements.values()) + _AUTO_ROUND_COPIES * quantized
        layers = (1 + prefetch + asymmetric) * _total_elements(layer)
        peak = max(peak, quantized + FLOAT_BYTES * (layers + max(rounding, learning)))
    return _BASE_BYTES + 2 * CHUNK_BYTES + peak


def norm_tuning_bytes(spec: ModelSpec, tokens: int) -> int:
    """The peak of tuning the norms with steps of `tokens`, a layer at a time, with gradients.

    In memory are the inputs of all layers, both models' output projections, and what a layer or the
    logits of some tokens keep for the gradients.
    """
    layer_elements = max(_total_elements(layer) for layer in _layers(spec))
    layer = 2 * layer_elements + 3 * _activation_elements(spec, tokens)
    head = [row for row in parameters(spec) if row.name in ("embed.weight", "lm_head.weight")]
    logits = 2 * _total_elements(head) + 6 * min(tokens, HEAD_TOKENS) * spec.vocab_size
    layer_inputs = len(spec.layers) * tokens * spec.hidden_size
    return _BASE_BYTES + 2 * CHUNK_BYTES + FLOAT_BYTES * (layer_inputs + layer + logits)


def sensitivity_bytes(spec: ModelSpec, num_candidates: int, hessians: bool) -> int:
    """The peak of measuring what each of some schemes costs at each linear.

    A layer is in memory with the quantized values of all schemes, and then the logits of two models
    on the measured tokens; and the hidden states of all variants.
    """
    layer_bytes = 0
    for layer in _layers(spec):
        linears = [parameter for parameter in layer if parameter.is_linear]
        # A quantizer consumes a copy of one of them.
        squares = [parameter.shape[1] ** 2 for parameter in linears]
        statistics = hessians * (sum(squares) + 2 * max(squares, default=0))
        quantized = num_candidates * 2 * _total_elements(linears)
        dense = (
            2 * _total_elements(layer) + statistics + _activation_elements(spec, SENSITIVITY_TOKENS)
        )
        layer_bytes = max(layer_bytes, quantized + FLOAT_BYTES * dense)
    head = [row for row in parameters(spec) if row.name in ("embed.weight", "lm_head.weight")]
    logits_bytes = FLOAT_BYTES * (_total_elements(head) + 4 * SENSITIVITY_TOKENS * spec.vocab_size)
    return _BASE_BYTES + 2 * CHUNK_BYTES + VARIANT_BYTES + max(layer_bytes, logits_bytes)


def fallback_bytes(spec: ModelSpec, num_models: int, seq_len: int) -> int:
    """The peak of running whole models at once on a window, as the fallback does.

    In memory are the models, the Hessians and quantized values of a layer, and the logits.
    """
    layers = []
    for layer in _layers(spec):
        linears = [parameter for parameter in layer if parameter.is_linear]
        hessians = sum(parameter.shape[1] ** 2 for parameter in linears)
        layers.append(2 * hessians + _total_elements(linears))
    activations = seq_len * (4 * spec.hidden_size + 2 * spec.intermediate_size)
    model = _total_elements(parameters(spec))
    others = max(layers) + activations + 4 * seq_len * spec.vocab_size
    return _BASE_BYTES + 2 * CHUNK_BYTES + FLOAT_BYTES * (num_models * model + others)


def hidden_bytes(spec: ModelSpec, samples: int, seq_len: int) -> int:
    """The hidden states of all calibration windows, and what later layers read besides them."""
    kv = sum(spec.kv_elements_of_layer(index) for index in spec.kv_source_layers)
    per_layer_inputs = len(spec.layers) * spec.per_layer_input_size // TOKENS_PER_DISTINCT_TOKEN
    return FLOAT_BYTES * samples * seq_len * (spec.hidden_size + kv + per_layer_inputs)


def recorded_bytes(spec: ModelSpec, samples: int, seq_len: int) -> int:
    """The inputs of a sublayer's last linear, as far as they are recorded."""
    widest = max(parameter.shape[1] for parameter in parameters(spec) if parameter.is_linear)
    return min(RECORDED_BYTES, FLOAT_BYTES * samples * seq_len * widest)


def available_bytes(device: torch.device) -> int:
    """The free memory of a GPU, or of the machine for a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return psutil.virtual_memory().available


def trim_heap() -> None:
    """Return freed memory to the system; does nothing where the C library has no malloc_trim.

    glibc keeps freed pieces below 32 MiB. After a wide layer has run, these are hundreds of MiB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_memory(
    needed: int, bytes_per_sample: int, samples: int, free: int, calibrated: bool
) -> None:
    """Raises ShortageError, with an option that fits, when more than `free` bytes are needed.

    bytes_per_sample: the memory of one calibration window; 0 when fewer windows would not help.
    """
    if needed <= free:
        return
    fitting_samples = 0
    if calibrated and bytes_per_sample:
        fitting_samples = samples - math.ceil((needed - free) / bytes_per_sample)
    if fitting_samples >= 1:
        todo = f"Use --samples {fitting_samples}"
    elif calibrated:
        todo = "Use --method rtn, which needs one tensor at a time"
    else:
        todo = "Use a machine with more memory"
    raise ShortageError(
        f"quantizing needs {needed} bytes of memory ({needed / 2**30:.1f} GiB), "
        f"{free} ({free / 2**30:.1f} GiB) are free",
        todo=todo,
    )


def _activation_elements(spec: ModelSpec, seq_len: int) -> int:
    """The elements of the largest micro-batch within a layer."""
    widest = max(parameter.shape[0] for parameter in parameters(spec) if parameter.is_linear)
    num_tokens = max(seq_len, min(BATCH_TOKENS, BATCH_ELEMENTS // widest))
    return num_tokens * (4 * spec.hidden_size + 2 * widest)


def _layers(spec: ModelSpec) -> list[list[Parameter]]:
    """The parameters of every decoder layer."""
    rows = parameters(spec)
    return [
        [row for row in rows if row.name.startswith(f"layers.{index}.")]
        for index in range(len(spec.layers))
    ]


def _total_elements(rows: Iterable[Parameter]) -> int:
    return sum(_num_elements(parameter) for parameter in rows)


def _num_elements(parameter: Parameter) -> int:
    return math.prod(parameter.shape)
