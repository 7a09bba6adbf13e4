"""Which checkpoints an engine loads, as tables, and the way out for one that it does not load."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.modelopt_format import algorithm_of
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, Scheme
from llmkit.common.errors import InputError
from llmkit.quant.number_formats import NUMBER_FORMATS

# What makes a checkpoint in 16 bits, which every engine loads.
DEQUANTIZE = "--method bf16 --no-eval"


@dataclass(frozen=True)
class LoadableFormat:
    """A quantized format that an engine loads, and the schemes of it, as `--scheme` names them."""

    format: Format
    schemes: tuple[str, ...]
    # What the engine's command needs for it.
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    group_sizes: tuple[int, ...] = ()  # of integers, that it has kernels for; (): all


@dataclass(frozen=True)
class Engine:
    """An engine on a kind of hardware, and what it loads beside 16 bits.

    remedy: options of `llmkit quantize` for a checkpoint that it loads.
    """

    name: str
    formats: tuple[LoadableFormat, ...] = ()
    remedy: str = DEQUANTIZE
    # The names of classes in `architectures` of config.json; None: all.
    architectures: frozenset[str] | None = field(default=None, repr=False)
    # The engine whose sources say so, and its version.
    source: str = ""


def scheme_name(scheme: Scheme) -> str:
    """The name of a scheme for `llmkit quantize --scheme`, or its description.

    Sizes of groups and zero points are not part of the name.
    """
    if scheme.preset:
        return scheme.preset.lower()
    for name, number_format in NUMBER_FORMATS.items():
        known = number_format.scheme
        if known.preset or (known.block_rows > 1) != (scheme.block_rows > 1):
            continue
        if _values(known) == _values(scheme):
            return name
    return scheme.label


def check_loads(engine: Engine, model: str, checkpoint: Checkpoint) -> LoadableFormat | None:
    """The format of a quantized checkpoint that the engine loads; None for one in 16 bits.

    model: the name in the command of the way out. Raises InputError, with a reason and that
    command, for a checkpoint that the engine does not load.
    """
    _check_architecture(engine, model, checkpoint)
    if checkpoint.file_format == "gguf":
        raise InputError(
            f"{engine.name} does not load .gguf files",
            _expected(engine),
            f"Run `llmkit quantize {shlex.quote(model)} {DEQUANTIZE} -o DIR`",
        )
    quantization = checkpoint.quantization
    if quantization is None:
        return None
    loadable = next((one for one in engine.formats if one.format == quantization.format), None)
    names = [scheme_name(scheme) for scheme in quantization.schemes]
    if loadable is not None and set(names) <= set(loadable.schemes):
        return loadable
    refused = next((one for one in names if loadable is None or one not in loadable.schemes), "")
    raise InputError(
        f"{engine.name} does not load {refused} in the {quantization.format} format",
        _expected(engine),
        _way_out(engine, model, quantization),
    )


def _values(scheme: Scheme) -> tuple[object, ...]:
    return (scheme.bits, scheme.kind, scheme.inputs, scheme.input_type, scheme.scale_format)


def _check_architecture(engine: Engine, model: str, checkpoint: Checkpoint) -> None:
    names = checkpoint.config.get("architectures")
    architecture = str(names[0]) if isinstance(names, Sequence) and names else ""
    if engine.architectures is not None and architecture not in engine.architectures:
        raise InputError(
            f"{engine.name} has no {architecture or 'model of an unnamed architecture'}",
            f"One of {', '.join(sorted(engine.architectures))} was expected ({engine.source})",
            f"`llmkit serve {shlex.quote(model)}` may have it",
        )


def _expected(engine: Engine) -> str:
    formats = [f"{one.format} ({', '.join(one.schemes)})" for one in engine.formats]
    return f"It loads {', '.join(['16 bits', *formats])}, by the sources of {engine.source}"


def _way_out(engine: Engine, model: str, quantization: QuantizationConfig) -> str:
    """The command that converts the checkpoint without a loss, or else one that makes another."""
    quoted = shlex.quote(model)
    for one in engine.formats:
        if all(_converts(scheme, one) for scheme in quantization.schemes):
            return f"Run `llmkit convert {quoted} --format {one.format} -o DIR`"
    hint = "" if engine.remedy == DEQUANTIZE else ", with the original model if there is one"
    return f"Run `llmkit quantize {quoted} {engine.remedy} -o DIR`{hint}"


def _converts(scheme: Scheme, loadable: LoadableFormat) -> bool:
    """Whether `llmkit convert` writes the scheme in a format, and the engine loads that."""
    name = scheme_name(scheme)
    if name not in loadable.schemes:
        return False
    sizes = loadable.group_sizes if scheme.kind == "int" else ()
    if sizes and scheme.group_size not in sizes:
        return False
    if loadable.format == "modelopt":
        return algorithm_of(scheme) is not None
    return loadable.format in NUMBER_FORMATS[name].formats
