"""The tensors that a checkpoint must hold, from the parameter table and the quantization config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.checkpoint.block_scales import covered_block_shape
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import FLOATS
from llmkit.checkpoint.quantized_formats import packed_tensors
from llmkit.checkpoint.quantized_weight import PackedTensor, QuantizationConfig, Scheme
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import is_carried, is_redundant, parameters
from llmkit.model.spec import ModelSpec


def scheme_of(
    parameter: Parameter, tensor: str, quantization: QuantizationConfig | None
) -> Scheme | None:
    """How the checkpoint tensor `tensor` of a parameter is quantized; None when it is not."""
    if quantization is None or not (parameter.is_linear or parameter.is_lm_head):
        return None
    if parameter.expert_slice(tensor) is not None and quantization.format != "mxfp4":
        # Other formats are of linear layers. All experts of a layer in one tensor are none.
        return None
    module = tensor.removesuffix(".weight")
    if parameter.is_lm_head and "lm_head" in quantization.ignore:
        return None  # configs say "lm_head", whatever the name of the module
    return quantization.scheme_of(module)


def checkpoint_tensors(
    spec: ModelSpec, quantization: QuantizationConfig | None
) -> dict[str, tuple[Parameter, PackedTensor]]:
    """Every tensor of a checkpoint by name, with its row of the parameter table, in table order.

    A tensor that is not quantized gets a PackedTensor, too, with one element per dense element.
    """
    found: dict[str, tuple[Parameter, PackedTensor]] = {}
    for parameter in parameters(spec):
        for source_name in parameter.source_names:
            part = parameter.expert_slice(source_name)
            if part is not None and part.index > 0:
                continue  # the tensor was found for the first of its experts
            for packed in _stored_tensors(parameter, source_name, quantization):
                found[packed.name] = parameter, packed
        for name in kv_scales(parameter, quantization).values():
            scale = PackedTensor("", "F32", (1,), None, None, scale="positive", name=name)
            found[name] = parameter, scale
    return found


def _stored_tensors(
    parameter: Parameter, source_name: str, quantization: QuantizationConfig | None
) -> list[PackedTensor]:
    """What a checkpoint stores in place of the dense tensor `source_name`."""
    sources = parameter.sources_in(source_name)
    shape = sources[0].shape
    if shape:
        shape = (sum(source.shape[0] for source in sources), *shape[1:])
    scheme = scheme_of(parameter, source_name, quantization)
    part = parameter.expert_slice(source_name)
    if quantization is None or scheme is None:
        # Only a split along the columns reads where they are, in a tensor of three dimensions too.
        columns = (max(1, sources[0].split.dim), 1) if len(shape) > 1 else None
        suffix = source_name.rpartition(".")[2]
        dense = PackedTensor(suffix, "", shape, (0, 1), columns)
        if part is not None and part.transposed:
            dense = replace(dense, shape=shape[::-1], out=(1, 1), in_=(0, 1))
        if part is not None:
            dense = dense.over_experts(part.num_experts)
        return [replace(dense, name=source_name, source_name=source_name, source_shape=shape)]
    stored = []
    module = source_name.removesuffix(".weight")
    for packed in packed_tensors(quantization, module, scheme, shape[0], shape[1]):
        if packed.covers and scheme.block_rows > 0 and len(sources) == 1:
            # A rank's slice may begin within a block: it covers one more then.
            covered = covered_block_shape(scheme, sources[0].start, (shape[0], shape[1]))
            packed = replace(packed, shape=covered)
        if part is not None:
            packed = packed.over_experts(part.num_experts)
        stored.append(
            replace(
                packed,
                name=packed_name(source_name, packed.suffix),
                source_name=source_name,
                source_shape=shape,
                group_size=scheme.group_size,
            )
        )
    return stored


def packed_name(source_name: str, suffix: str) -> str:
    """The name of a tensor that is stored in place of the dense tensor `source_name`.

    "down_proj.weight" and "qweight" make "down_proj.qweight", as a linear module names its tensors.
    Experts in one tensor are no module: "experts.down_proj" and "blocks" make
    "experts.down_proj_blocks".
    """
    module = source_name.removesuffix(".weight")
    return f"{source_name}_{suffix}" if module == source_name else f"{module}.{suffix}"


def with_pre_quant_scales(quantization: QuantizationConfig, spec: ModelSpec) -> QuantizationConfig:
    """A config for writing, with the layers that have a `pre_quant_scale` in its format.

    In Model-Optimizer's INT4, readers need it for every linear that they fuse with no other.
    """
    if quantization.format != "modelopt":
        return quantization
    modules = []
    for parameter in parameters(spec):
        scheme = scheme_of(parameter, parameter.source_names[0], quantization)
        if scheme is not None and scheme.kind == "int" and len(parameter.sources) == 1:
            modules.append(parameter.source_names[0].removesuffix(".weight"))
    return replace(quantization, pre_quant_scales=tuple(modules))


def kv_scales(parameter: Parameter, quantization: QuantizationConfig | None) -> dict[str, str]:
    """The checkpoint's scale tensors of an 8-bit KV cache, by runtime name.

    {"layers.0.attn.k": "model.layers.0.self_attn.k_scale", ...} for the QKV weight, which computes
    keys and values; {} for all other parameters.
    """
    if (
        quantization is None
        or not quantization.kv
        or not parameter.name.endswith(".attn.qkv.weight")
    ):
        return {}
    attention = parameter.source_names[0].removesuffix(".weight").rpartition(".")[0]
    prefix = parameter.module.removesuffix("qkv")
    names = zip(("k", "v"), quantization.kv_scales, strict=True)
    return {f"{prefix}{name}": f"{attention}.{scale}" for name, scale in names}


def check_checkpoint(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raises InputError unless a checkpoint has exactly the tensors of `checkpoint_tensors`.

    Names, shapes and dtypes are compared; no tensor is read.
    """
    _check_stacked_experts(checkpoint, spec)
    expected = checkpoint_tensors(spec, checkpoint.quantization)
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise InputError(
            f"{checkpoint.reference} lacks {_list_tensors(missing)}",
            f"All {len(expected)} tensors of a {spec.architecture} were expected",
            "Download the checkpoint again, or check that config.json belongs to it",
        )
    extra = [
        name
        for name in checkpoint.tensors
        if not (name in expected or is_redundant(spec, name) or is_carried(spec, name))
    ]
    _check_dense_modules(checkpoint, spec, extra, expected)
    if extra:
        raise InputError(
            f"{checkpoint.reference} has {_list_tensors(extra)}"
            f" that no part of a {spec.architecture} uses",
            "Only tensors of the architecture were expected",
            "Check that config.json belongs to it",
        )
    for name, (_, packed) in expected.items():
        info = checkpoint.tensors[name]
        if not packed.accepts(info.shape):
            raise InputError(
                f"tensor {name} has shape {list(info.shape)}",
                f"Shape {list(packed.shape)} was expected",
            )
        is_float = not packed.dtype or packed.dtype in FLOATS
        dtypes: tuple[str, ...] = FLOATS if is_float else (packed.dtype,)
        if packed.dtype == "U8" and packed.suffix.endswith("scale"):
            dtypes = ("U8", "F8_E8M0")  # powers of two, which newer writers store with their type
        if info.dtype not in dtypes:
            raise InputError(
                f"tensor {name} has dtype {info.dtype}",
                f"Dtype {' or '.join(dtypes)} was expected",
            )


def _check_dense_modules(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    extra: Sequence[str],
    expected: Mapping[str, tuple[Parameter, PackedTensor]],
) -> None:
    """Raises InputError for tensors of quantized weights that are read as dense ones."""
    quantization = checkpoint.quantization
    if quantization is None:
        return
    found: dict[str, list[str]] = {"config": [], "model": []}
    for name in extra:
        module = name.rpartition(".")[0]
        row = expected.get(f"{module}.weight")
        if row is not None and not row[1].is_quantized:
            is_listed = quantization.scheme_of(module) is None
            found["config" if is_listed else "model"].append(name)
    if found["config"]:
        raise InputError(
            f"{checkpoint.reference} has {_list_tensors(found['config'])} of quantized layers, and"
            " the quantization_config in config.json says that these layers are not quantized",
            "A config that belongs to the tensors was expected",
            "Download config.json again",
        )
    if found["model"]:
        which = "These layers of a"
        if spec.transformers is not None:
            which = "Only linear layers may be quantized where transformers' own code runs the"
            which += " model (the fallback). Experts and routers of a"
        raise InputError(
            f"{checkpoint.reference} has {_list_tensors(found['model'])} of quantized layers that"
            " run only as dense ones",
            f"{which} {spec.architecture} were expected in 16 or 32 bits",
            "Choose a checkpoint that leaves them dense",
        )


def _check_stacked_experts(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raises InputError for quantized tensors of all experts of a layer, in other formats."""
    quantization = checkpoint.quantization
    if quantization is None or quantization.format == "mxfp4":
        return
    for parameter in parameters(spec):
        for source in parameter.sources:
            if source.expert is None or not parameter.is_linear:
                continue
            info = checkpoint.tensors.get(source.name)
            if info is None or info.dtype not in FLOATS:
                found = "is absent" if info is None else f"has dtype {info.dtype}"
                raise InputError(
                    f"{checkpoint.reference}: {source.name} {found}. It holds all experts of a"
                    f" layer, and config.json says that linear layers are quantized in the format"
                    f" {quantization.format}",
                    "Experts one by one, in mxfp4 or not quantized were expected",
                    "Choose a checkpoint whose experts are quantized one by one",
                )


def carried_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, TensorInfo]:
    """The tensors of parts that do not run, in the order of the checkpoint."""
    if not spec.carried:
        return {}
    if checkpoint.layout is not None and checkpoint.manifest is not None:
        files = checkpoint.layout.get("carried_files", ())
        sharded = {}
        for key, entry in checkpoint.manifest["tensors"].items():
            name = key.partition("::")[2]
            if entry["file"] in files:
                sharded[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]))
        return sharded
    expected = checkpoint_tensors(spec, checkpoint.quantization)
    return {
        name: info
        for name, info in checkpoint.tensors.items()
        if is_carried(spec, name) and name not in expected
    }


def carried_summary(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Any] | None:
    """How many carried tensors there are, their bytes and prefixes; None when there are none."""
    tensors = carried_tensors(checkpoint, spec)
    if not tensors:
        return None
    prefixes = [
        prefix.removesuffix(".")
        for prefix in spec.carried
        if any(name.startswith(prefix) for name in tensors)
    ]
    return {
        "tensors": len(tensors),
        "bytes": sum(info.nbytes for info in tensors.values()),
        "prefixes": prefixes,
    }


def _list_tensors(names: Sequence[str]) -> str:
    """Tensor names for a message, "7 tensors (a, b, c, d, e and 2 more)"."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:5])}{more})"
