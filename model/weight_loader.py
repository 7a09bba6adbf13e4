"""Reads the weights of a checkpoint into a `Decoder`, one row of the parameter table at a time."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from llmkit.checkpoint.block_scales import realign_block_scales, realigned_scheme
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.quantized_formats import format_of, packed_tensors, read_input_scale
from llmkit.checkpoint.quantized_weight import (
    PRE_QUANT_SCALE,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.checkpoint.stored_tensors import check_scales
from llmkit.checkpoint.tensor_reader import CHUNK_BYTES, row_chunks
from llmkit.common.errors import InputError
from llmkit.common.options import CpuActivations
from llmkit.kernels.fused_experts import copy_to_expert_stack
from llmkit.model.checkpoint_tensors import (
    check_checkpoint,
    kv_scales,
    packed_name,
    scheme_of,
)
from llmkit.model.decoder import SINGLE_RANK, Decoder
from llmkit.model.device import upload
from llmkit.model.families import checkpoint_spec
from llmkit.model.language_model import LanguageModel
from llmkit.model.linear import (
    ActivationQuant,
    Linear,
    gpu_capability,
    held_dtype,
    serving_linear,
    supported_on_gpu,
)
from llmkit.model.mla import LatentLinear
from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.parameter import Parameter, SourceTensor
from llmkit.model.parameter_table import LATENT_LINEARS, parameters
from llmkit.model.spec import ModelSpec

NUM_PACKING_THREADS = 4  # threads that pack weights while the next weights are read
# Linear layers that no quantizer packs. A CPU multiplies them by inputs in float32.
SMALL_LINEARS = (
    "mlp.router.weight",
    "mlp.shared_expert_gate.weight",
    *(f"mlp.{module}.weight" for module in LATENT_LINEARS),
    "attn.gate.weight",
    "gdn.ba.weight",
    "per_layer.gate.weight",
    "per_layer.projection.weight",
)


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    packed: bool = False,
    spec: ModelSpec | None = None,
    parallel_group: ParallelGroup = SINGLE_RANK,
    offloaded: int = 0,
    cpu_activations: CpuActivations = "float32",
    weight_dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Load a model on one device.

    packed: for serving. Linears keep the packed form that `serving_linear` chooses. Otherwise all
    weights are dense in `dtype`, as calibration needs them.
    spec: the spec of a rank (see `rank_spec`), to load its share of a checkpoint that was checked
    already. None: check the checkpoint and load the full model.
    parallel_group: the ranks that the model communicates with.
    offloaded: the number of last layers whose linears stay in host memory.
    cpu_activations: with `packed`, what a CPU rounds the inputs of linears to (`serving_linear`).
    weight_dtype: with `packed`, what a CPU rounds linears and embeddings to (`held_dtype`). None:
    `dtype`, which is that of hidden states and of all other weights.

    At most about NUM_PACKING_THREADS weights are in memory both as stored and packed.
    Raises InputError when the checkpoint does not match its config.json.
    """
    if spec is None:
        spec = checkpoint_spec(checkpoint)
        check_checkpoint(checkpoint, spec)
    tensors, activation_quant, linears = load_weights(
        checkpoint, spec, dtype, device, packed, offloaded, cpu_activations, weight_dtype
    )
    if spec.transformers is not None:
        # transformers' modeling code takes seconds to import, and only the fallback needs it.
        from llmkit.model.transformers_model import TransformersModel

        return TransformersModel(spec, tensors, activation_quant, linears, dtype, parallel_group)
    return Decoder(spec, tensors, activation_quant, linears, parallel_group)


class LoadedWeights(NamedTuple):
    """The weights of a model, as `Decoder` takes them."""

    tensors: dict[str, torch.Tensor]
    activation_quant: dict[str, ActivationQuant]
    linears: dict[str, Linear]


def load_weights(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    packed: bool = False,
    offloaded: int = 0,
    cpu_activations: CpuActivations = "float32",
    weight_dtype: torch.dtype | None = None,
) -> LoadedWeights:
    """Load the weights of the parameter table of `spec`; see `load_model`."""
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    is_cpu = torch.device(device).type == "cpu"
    num_layers = len(spec.layers)
    offloaded_layers = tuple(
        f"layers.{index}." for index in range(num_layers - offloaded, num_layers)
    )
    rows = {row.name: row for row in parameters(spec) if not _is_added_by_other(spec, row)}
    num_experts = len({row.expert for row in rows.values()} - {None})
    can_pack_small = packed and is_cpu and dtype == torch.float32 and spec.transformers is None
    tensors: dict[str, torch.Tensor] = {}
    expert_stacks: dict[str, list[torch.Tensor]] = {}
    activation_quant: dict[str, ActivationQuant] = {}
    linears: dict[str, Future[Linear]] = {}
    with ThreadPoolExecutor(NUM_PACKING_THREADS) as pool:
        packing: deque[Future[Linear]] = deque()
        for row in rows.values():
            activation_quant |= read_activation_quant(checkpoint, row, device)
            is_offloaded = row.name.startswith(offloaded_layers) and len(row.shape) == 2
            row_device = "cpu" if is_offloaded else device
            is_in_layer = row.name.startswith("layers.")
            is_small = can_pack_small and is_in_layer and row.name.endswith(SMALL_LINEARS)
            if is_cpu:
                stays_packed = is_small or (packed and (row.is_linear or row.is_lm_head))
            else:
                stays_packed = packed and can_stay_packed(
                    device, row, checkpoint.quantization, dtype
                )
                if row.expert is not None and is_offloaded:
                    stays_packed = False
            if packed and is_cpu and row.name in ("embed.weight", "per_layer.embed.weight"):
                # An embedding is held in a smaller type than `dtype` where it can be.
                (table,) = _read_held(checkpoint, row, weight_dtype)
                assert isinstance(table, torch.Tensor)
                is_smaller = table.dtype.itemsize < dtype.itemsize
                tensors[row.name] = table if is_smaller else table.to(dtype)
                is_head = row.name == "embed.weight" and spec.tie_word_embeddings
                if is_head and spec.is_last_stage:
                    linears["lm_head"] = pool.submit(
                        serving_linear,
                        [table],
                        None,
                        None,
                        dtype,
                        cpu_activations=cpu_activations,
                    )
            elif packed and row.name.endswith("attn.kv_b.weight"):
                if is_cpu:
                    (weight,) = _read_held(checkpoint, row, weight_dtype)
                else:
                    (weight,) = _read_stored(checkpoint, row, device)
                if isinstance(weight, QuantizedWeight):
                    weight = weight.dequantize()
                linears[row.module] = pool.submit(LatentLinear, weight, spec, dtype)
            elif stays_packed:
                if is_cpu and not is_small:
                    weights = _read_held(checkpoint, row, weight_dtype)
                else:
                    weights = _read_stored(checkpoint, row, row_device)
                bias_row = rows.get(f"{row.module}.bias")
                bias = read_parameter(checkpoint, bias_row, dtype, device) if bias_row else None
                linears[row.module] = pool.submit(
                    serving_linear,
                    weights,
                    bias,
                    activation_quant.get(row.module),
                    dtype,
                    device,
                    "float32" if is_small else cpu_activations,
                    row.expert is not None,
                )
                packing.append(linears[row.module])
                if len(packing) > NUM_PACKING_THREADS:
                    packing.popleft().result()
            elif row.module not in linears or not row.name.endswith(".bias"):
                # The bias of a packed linear was read with its weight.
                tensors[row.name] = read_parameter(checkpoint, row, dtype, row_device)
                is_expert = row.expert is not None and row.is_linear
                if is_expert and not is_cpu and not is_offloaded:
                    tensors[row.name] = copy_to_expert_stack(
                        expert_stacks, row.name, tensors[row.name], num_experts
                    )
        loaded = {name: linear.result() for name, linear in linears.items()}
    return LoadedWeights(tensors, activation_quant, loaded)


def _is_added_by_other(spec: ModelSpec, row: Parameter) -> bool:
    """Whether it is the bias of a row-parallel linear, and another rank adds it."""
    rank = spec.rank
    if rank is None:
        return False
    if row.expert is not None:  # only the ranks of its group compute an expert
        is_first = rank.tp_rank % (rank.tp_size // rank.ep_size) == 0
    else:
        is_first = rank.tp_rank == 0
    return not is_first and row.is_added_once


def read_parameter(
    checkpoint: Checkpoint,
    parameter: Parameter,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """One dense runtime tensor: its sources are dequantized, concatenated and cast to `dtype`."""
    if parameter.is_float32:
        dtype = torch.float32
    dense: dict[str, torch.Tensor] = {}
    for name in parameter.source_names:
        quantized = read_quantized(checkpoint, parameter, name, device)
        if quantized is None:
            dense[name] = _read_cast(checkpoint, parameter, name, dtype, device)
        else:
            dense[name] = quantized.dequantize()
    if not parameter.shape:
        return dense[parameter.source_names[0]].to(dtype)
    parts = [source.rows_of(dense[source.name]) for source in parameter.sources]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.to(dtype)


def read_source(checkpoint: Checkpoint, parameter: Parameter, source: SourceTensor) -> torch.Tensor:
    """The rows of a parameter that come from one checkpoint tensor, dense, on the CPU."""
    quantized = read_quantized(checkpoint, parameter, source.name, "cpu")
    if quantized is not None:
        return quantized.select(source.rows_of).dequantize()
    return source.rows_of(_read_part(checkpoint, parameter, source.name, source.name))


def read_quantized(
    checkpoint: Checkpoint, parameter: Parameter, tensor: str, device: torch.device | str
) -> QuantizedWeight | None:
    """The quantized weight of a source tensor; None when it is not quantized."""
    quantization = checkpoint.quantization
    scheme = scheme_of(parameter, tensor, quantization)
    if quantization is None or scheme is None:
        return None
    sources = parameter.sources_in(tensor)
    shape = (sum(source.shape[0] for source in sources), parameter.shape[1])
    stored = {}
    for packed in packed_tensors(quantization, tensor.removesuffix(".weight"), scheme, *shape):
        name = packed_name(tensor, packed.suffix)
        values = upload(_read_part(checkpoint, parameter, tensor, name), device)
        if packed.covers:
            values = realign_block_scales(values, scheme, sources[0].start, shape)
        stored[packed.suffix] = values
    scale = stored.pop(PRE_QUANT_SCALE, None)
    try:
        weight = format_of(quantization).unpack(realigned_scheme(scheme, sources[0].start), stored)
        if scale is not None:
            check_scales(PRE_QUANT_SCALE, scale, "positive")
            # Ones change nothing, and would cost a product.
            weight.pre_quant_scale = None if bool((scale == 1).all()) else scale
        return weight
    except InputError as error:
        what = f"{checkpoint.reference}: {tensor}: {error.what}"
        raise InputError(what, error.expected, error.todo) from error


def can_stay_packed(
    gpu: torch.device | str,
    parameter: Parameter,
    quantization: QuantizationConfig | None,
    dtype: torch.dtype,
) -> bool:
    """Whether a GPU multiplies with the packed weight as it is stored.

    Experts that are neither in FP4 nor in FP8 with groups, and weights whose sources have different
    schemes, are dequantized.
    """
    schemes = {scheme_of(parameter, name, quantization) for name in parameter.source_names}
    scheme = next(iter(schemes))
    if scheme is None or len(schemes) > 1:
        return False
    scheme = realigned_scheme(scheme, parameter.sources[0].start)
    is_expert = parameter.expert is not None
    return supported_on_gpu(scheme, parameter.shape, dtype, gpu_capability(gpu), is_expert)


def _read_stored(
    checkpoint: Checkpoint, parameter: Parameter, device: torch.device | str
) -> list[torch.Tensor | QuantizedWeight]:
    """The sources of a runtime weight in their stored form, dense or quantized."""
    stored: dict[str, torch.Tensor | QuantizedWeight] = {}
    for name in parameter.source_names:
        quantized = read_quantized(checkpoint, parameter, name, device)
        if quantized is None:
            stored[name] = upload(_read_part(checkpoint, parameter, name, name), device)
        else:
            stored[name] = quantized
    weights: list[torch.Tensor | QuantizedWeight] = []
    for source in parameter.sources:
        weight = stored[source.name]
        if isinstance(weight, QuantizedWeight):
            weights.append(weight.select(source.rows_of))
        else:
            weights.append(source.rows_of(weight))
    return weights


def _read_held(
    checkpoint: Checkpoint, parameter: Parameter, weight_dtype: torch.dtype
) -> list[torch.Tensor | QuantizedWeight]:
    """The sources of a runtime weight in the types that a CPU holds them in (`held_dtype`)."""
    wanted = torch.float32 if parameter.is_float32 else weight_dtype
    return [
        weight.to(held_dtype(weight.dtype, wanted)) if isinstance(weight, torch.Tensor) else weight
        for weight in _read_stored(checkpoint, parameter, "cpu")
    ]


def _read_part(
    checkpoint: Checkpoint, parameter: Parameter, source_name: str, name: str
) -> torch.Tensor:
    """What a parameter uses of a stored tensor: all of it, or the part of one expert.

    name: of the stored tensor: `source_name`, or one that is stored in its place.
    """
    part = parameter.expert_slice(source_name)
    if part is None:
        return checkpoint.read(name)
    matrix = checkpoint.read_slice(name, [(part.index, part.index + 1)], 0)[0]
    if part.transposed and name == source_name:
        matrix = matrix.T.contiguous()
    return matrix


def _read_cast(
    checkpoint: Checkpoint,
    parameter: Parameter,
    tensor: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """A tensor cast to `dtype` in chunks, so that a large embedding is never in memory twice.

    A small tensor is not cast: the caller casts it.
    """
    info = checkpoint.tensors[tensor]
    is_part = parameter.expert_slice(tensor) is not None
    if info.torch_dtype == dtype or info.nbytes <= CHUNK_BYTES or is_part:
        return upload(_read_part(checkpoint, parameter, tensor, tensor), device)
    result = torch.empty(info.shape, dtype=dtype, device=device)
    for start, stop in row_chunks(info, CHUNK_BYTES):
        result[start:stop] = upload(checkpoint.read_slice(tensor, [(start, stop)], 0), device)
    return result


def read_activation_quant(
    checkpoint: Checkpoint, parameter: Parameter, device: torch.device | str = "cpu"
) -> dict[str, ActivationQuant]:
    """How the checkpoint quantizes the inputs of a parameter and the keys and values it computes.

    The result is by runtime module: {"layers.0.attn.qkv": ..., "layers.0.attn.k": ...}.
    Raises InputError when the sources of one runtime linear quantize their inputs differently.
    """
    quantization = checkpoint.quantization
    found: dict[str, ActivationQuant] = {}
    if quantization is not None:
        for name, tensor in kv_scales(parameter, quantization).items():
            scale = read_kv_scale(checkpoint, tensor).to(device)
            found[name] = ActivationQuant(quantization.kv, scale)
    schemes = {name: scheme_of(parameter, name, quantization) for name in parameter.source_names}
    # All sources read the same columns.
    start = parameter.sources[0].start
    inputs = {_with_inputs_only(scheme, start) for scheme in schemes.values()}
    if len(inputs) > 1:
        raise InputError(
            f"{checkpoint.reference}: the inputs of {', '.join(schemes)}"
            " are rounded in different ways",
            "Linears that read the same inputs were expected to round them alike",
        )
    (scheme,) = inputs
    if scheme is None:
        return found
    input_scale: torch.Tensor | None = None
    if scheme.has_input_scale:
        scales = [_read_input_scale(checkpoint, name, scheme) for name in schemes]
        input_scale = torch.cat(scales).amax(dim=0, keepdim=True).to(device)
    activation_quant = ActivationQuant.of(scheme, input_scale)
    if activation_quant is not None:
        found[parameter.module] = activation_quant
    return found


def read_kv_scale(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A stored scale of keys or values, float32 [1]. Raises InputError as `check_scales`."""
    scale = checkpoint.read(name).float().reshape(1)
    try:
        check_scales(name, scale, "positive")
    except InputError as error:
        raise InputError(
            f"{checkpoint.reference}: {error.what}", error.expected, error.todo
        ) from error
    return scale


def _read_input_scale(checkpoint: Checkpoint, name: str, scheme: Scheme) -> torch.Tensor:
    """The stored scale of the inputs of the weight `name`, float32 [1]."""
    assert checkpoint.quantization is not None
    return read_input_scale(
        checkpoint.quantization.format,
        scheme,
        lambda suffix: checkpoint.read(packed_name(name, suffix)),
    )


def _with_inputs_only(scheme: Scheme | None, start: tuple[int, int]) -> Scheme | None:
    """What the scheme of a weight that begins at `start` says of inputs; None: nothing."""
    if scheme is None or scheme.input_type is None:
        return None
    has_groups = scheme.inputs == "group"
    return Scheme(
        8,
        realigned_scheme(scheme, start).group_size if has_groups else -1,
        inputs=scheme.inputs,
        scale_format=scheme.scale_format,
        input_type=scheme.input_type,
    )
