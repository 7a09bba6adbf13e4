"""From a checkpoint to the runtime: what it must hold by the parameter table, and reading it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from llmkit.checkpoint.compressed_tensors import KINDS
from llmkit.checkpoint.dtypes import FLOATS
from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.formats import format_of
from llmkit.checkpoint.quantized import PackedTensor, QuantizationConfig, QuantizedWeight, Scheme
from llmkit.checkpoint.reading import CHUNK_BYTES, row_chunks
from llmkit.checkpoint.source import Checkpoint
from llmkit.kernels.experts import shelve
from llmkit.model.decoder import ALONE, Decoder
from llmkit.model.device import to_device
from llmkit.model.families import model_spec
from llmkit.model.layout import Parameter, Part, ignored_tensor, parameters
from llmkit.model.linear import Linear, Rounding, gpu_capability, serving_linear, suits_gpu
from llmkit.model.ranks import Ranks
from llmkit.model.spec import ModelSpec

PACKERS = 4  # threads that pack weights while the next are read


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a checkpoint of a spec and a quantization must have."""

    name: str
    dtype: str | None  # as in a safetensors header; None: any of FLOATS
    shape: tuple[int, ...]
    parameter: Parameter
    parts: tuple[Part, ...]  # the parts of the parameter that lie in it, by their rows of the dense tensor
    dense: tuple[int, ...]  # the shape of the dense tensor it stands for
    packed: PackedTensor | None = None  # None: it is that dense tensor
    scheme: Scheme | None = None  # of the packed weight it belongs to


def scheme_of(parameter: Parameter, tensor: str, quantization: QuantizationConfig | None) -> Scheme | None:
    """How this checkpoint tensor of the parameter is quantized; None when it is not."""
    if quantization is None or not (parameter.linear or parameter.head):
        return None
    return quantization.scheme_of(tensor.removesuffix(".weight"))


def stored_tensors(spec: ModelSpec, quantization: QuantizationConfig | None) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, in the table's order."""
    stored: dict[str, StoredTensor] = {}
    for parameter in parameters(spec):
        for tensor in parameter.tensors:
            parts = tuple(part for part in parameter.parts if part.tensor == tensor)
            dense = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            scheme = scheme_of(parameter, tensor, quantization)
            if quantization is None or scheme is None:
                stored[tensor] = StoredTensor(tensor, None, dense, parameter, parts, dense)
                continue
            module = tensor.removesuffix(".weight")
            for packed in format_of(quantization).tensors(scheme, dense[0], dense[1]):
                name = f"{module}.{packed.suffix}"
                stored[name] = StoredTensor(name, packed.dtype, packed.shape, parameter, parts, dense, packed, scheme)
        for tensor in kv_scales(parameter, quantization).values():
            stored[tensor] = StoredTensor(tensor, "F32", (1,), parameter, (Part(tensor, (1,)),), (1,))
    return stored


def kv_scales(parameter: Parameter, quantization: QuantizationConfig | None) -> dict[str, str]:
    """The checkpoint's scales of an 8-bit KV cache by runtime name, for the parameter that makes keys and values."""
    if quantization is None or not quantization.kv or not parameter.name.endswith(".attn.qkv.weight"):
        return {}
    attention = parameter.tensors[0].removesuffix(".weight").rpartition(".")[0]
    prefix = parameter.module.removesuffix("qkv")
    return {f"{prefix}{name}": f"{attention}.{name}_scale" for name in ("k", "v")}


def check_checkpoint(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raises InputError unless the checkpoint has exactly the table's tensors, with their shapes and dtypes."""
    expected = stored_tensors(spec, checkpoint.quantization)
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise InputError(
            f"{checkpoint.reference} lacks {_some(missing)}",
            f"All {len(expected)} tensors of a {spec.architecture} were expected",
            "Download the checkpoint again, or check that config.json belongs to it",
        )
    extra = [name for name in checkpoint.tensors if name not in expected and not ignored_tensor(spec, name)]
    if extra:
        raise InputError(
            f"{checkpoint.reference} has {_some(extra)} that no part of a {spec.architecture} uses",
            "Only tensors of the architecture were expected",
            "Check that config.json belongs to it",
        )
    for name, want in expected.items():
        got = checkpoint.tensors[name]
        if got.shape != want.shape:
            raise InputError(f"tensor {name} has shape {list(got.shape)}", f"Shape {list(want.shape)} was expected")
        dtypes = FLOATS if want.dtype is None or want.dtype in FLOATS else (want.dtype,)
        if got.dtype not in dtypes:
            raise InputError(f"tensor {name} has dtype {got.dtype}", f"Dtype {' or '.join(dtypes)} was expected")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:5])}{more})"


def read_parameter(
    checkpoint: Checkpoint, parameter: Parameter, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """One runtime tensor: its parts dequantized, fused in order and cast."""
    dense: dict[str, torch.Tensor] = {}
    for tensor in parameter.tensors:
        stored = _read_quantized(checkpoint, parameter, tensor, device)
        dense[tensor] = _read_as(checkpoint, tensor, dtype, device) if stored is None else stored.dequantize()
    parts = [dense[part.tensor][part.row : part.row + part.shape[0]] for part in parameter.parts]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _read_quantized(
    checkpoint: Checkpoint, parameter: Parameter, tensor: str, device: torch.device | str
) -> QuantizedWeight | None:
    """A tensor of the parameter as it is quantized; None when it is not."""
    quantization = checkpoint.quantization
    scheme = scheme_of(parameter, tensor, quantization)
    if quantization is None or scheme is None:
        return None
    layout, module = format_of(quantization), tensor.removesuffix(".weight")
    rows = sum(part.shape[0] for part in parameter.parts if part.tensor == tensor)
    packed = layout.tensors(scheme, rows, parameter.parts[0].shape[1])
    read = {p.suffix: to_device(checkpoint.read(f"{module}.{p.suffix}"), device) for p in packed}
    return layout.unpack(scheme, read)


def packs_on(
    gpu: torch.device | str, parameter: Parameter, quantization: QuantizationConfig | None, dtype: torch.dtype
) -> bool:
    """Whether a CUDA device holds the weight as it is stored: not an expert's, nor one of several schemes."""
    scheme, *others = {scheme_of(parameter, tensor, quantization) for tensor in parameter.tensors}
    if scheme is None or others or ".experts." in parameter.name:
        return False
    return suits_gpu(scheme, parameter.shape, dtype, gpu_capability(gpu))


def _read_stored(
    checkpoint: Checkpoint, parameter: Parameter, device: torch.device | str
) -> list[torch.Tensor | QuantizedWeight]:
    """The parts of a runtime weight as they are stored."""
    stored: dict[str, torch.Tensor | QuantizedWeight] = {}
    for tensor in parameter.tensors:
        quantized = _read_quantized(checkpoint, parameter, tensor, device)
        stored[tensor] = to_device(checkpoint.read(tensor), device) if quantized is None else quantized
    parts: list[torch.Tensor | QuantizedWeight] = []
    for part in parameter.parts:
        weight, rows = stored[part.tensor], slice(part.row, part.row + part.shape[0])
        parts.append(weight.rows(rows) if isinstance(weight, QuantizedWeight) else weight[rows])
    return parts


def _read_as(checkpoint: Checkpoint, tensor: str, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A tensor in another dtype, cast some rows at a time: an embedding is never there twice."""
    info = checkpoint.tensors[tensor]
    if info.torch_dtype == dtype or info.nbytes <= CHUNK_BYTES:
        return to_device(checkpoint.read(tensor), device)
    result = torch.empty(info.shape, dtype=dtype, device=device)
    for start, stop in row_chunks(info, CHUNK_BYTES):
        result[start:stop] = to_device(checkpoint.read_slice(tensor, [(start, stop)], 0), device)
    return result


def read_rounding(
    checkpoint: Checkpoint, parameter: Parameter, device: torch.device | str = "cpu"
) -> dict[str, Rounding]:
    """What the checkpoint says is rounded at a parameter, by runtime module: its inputs, the keys and values it makes.

    Raises InputError when tensors that are run as one linear have inputs of different schemes.
    """
    quantization = checkpoint.quantization
    found: dict[str, Rounding] = {}
    for name, tensor in kv_scales(parameter, quantization).items():
        found[name] = Rounding(KINDS[quantization.kv], checkpoint.read(tensor).float().to(device))  # type: ignore[union-attr]
    schemes = {tensor: scheme_of(parameter, tensor, quantization) for tensor in parameter.tensors}
    inputs = {(scheme.kind, scheme.inputs) if scheme else ("", "none") for scheme in schemes.values()}
    if len(inputs) > 1:
        raise InputError(
            f"{checkpoint.reference}: the inputs of {', '.join(schemes)} are rounded in different ways",
            "Linears that read the same inputs were expected to round them alike",
        )
    ((kind, how),) = inputs
    if how == "token":
        found[parameter.module] = Rounding(kind)
    elif how == "tensor":
        names = [f"{tensor.removesuffix('.weight')}.input_scale" for tensor in parameter.tensors]
        scales = torch.cat([checkpoint.read(name).float() for name in names])
        found[parameter.module] = Rounding(kind, scales.amax(dim=0, keepdim=True).to(device))
    return found


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu", *, packed: bool = False,
    spec: ModelSpec | None = None, ranks: Ranks = ALONE, offloaded: int = 0,
) -> Decoder:  # fmt: skip
    """The whole model on one device. At most PACKERS weights are held in another form than their last.

    packed: for serving, linears of the forms that `serving_linear` chooses, and not dense ones of `dtype`, which
    calibration reads. spec, ranks: of a checked one that may have a rank's part (see `rank_spec`), to meet the others.
    offloaded: so many of the last layers' linears are left in host memory.
    Raises InputError when the checkpoint does not fit its own config.
    """
    if spec is None:
        check_checkpoint(checkpoint, spec := model_spec(checkpoint.config))
    cpu = torch.device(device).type == "cpu"
    away = tuple(f"layers.{len(spec.layers) - place}." for place in range(1, offloaded + 1))
    rows = {row.name: row for row in parameters(spec) if not _added_elsewhere(spec, row)}
    tensors: dict[str, torch.Tensor] = {}
    shelves, held = dict[str, list[torch.Tensor]](), len({row.expert for row in rows.values()} - {None})
    rounding: dict[str, Rounding] = {}
    linears: dict[str, Future[Linear]] = {}
    with ThreadPoolExecutor(PACKERS) as pool:
        packing: deque[Future[Linear]] = deque()
        for row in rows.values():
            rounding |= read_rounding(checkpoint, row, device)
            where = "cpu" if row.name.startswith(away) and len(row.shape) == 2 else device
            if packed and cpu and row.name == "embed.weight":  # looked up as it is stored, when that is smaller
                (table,) = _read_stored(checkpoint, row, device)
                assert isinstance(table, torch.Tensor)
                tensors[row.name] = table if table.dtype.itemsize < dtype.itemsize else table.to(dtype)
                if spec.tied and spec.ends:
                    linears["lm_head"] = pool.submit(serving_linear, [table], None, None, dtype)
            elif packed and (
                (row.linear or row.head) if cpu else packs_on(device, row, checkpoint.quantization, dtype)
            ):
                parts, bias = _read_stored(checkpoint, row, where), rows.get(f"{row.module}.bias")
                added = read_parameter(checkpoint, bias, dtype, device) if bias else None
                linears[row.module] = pool.submit(serving_linear, parts, added, rounding.get(row.module), dtype, device)
                packing.append(linears[row.module])
                if len(packing) > PACKERS:
                    packing.popleft().result()
            elif row.module not in linears:  # a bias there has been read with its weight
                tensors[row.name] = read_parameter(checkpoint, row, dtype, where)
                if row.expert is not None and row.linear and where is device and not cpu:
                    tensors[row.name] = shelve(shelves, row.name, tensors[row.name], held)
        return Decoder(spec, tensors, rounding, {name: one.result() for name, one in linears.items()}, ranks)


def _added_elsewhere(spec: ModelSpec, row: Parameter) -> bool:
    """Whether it is a bias of a sum over ranks, which the first of them adds."""
    return spec.rank is not None and spec.rank.rank > 0 and row.name.endswith((".attn.o.bias", ".mlp.down.bias"))
