"""Plans a run: everything that is known before any weight is read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.output_directory import check_output
from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.writer import (
    HeaderFunction,
    plan_files,
    planned_bytes,
    safetensors_header,
)
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import Progress
from llmkit.model.checkpoint_tensors import check_checkpoint, scheme_of
from llmkit.model.dequantized_checkpoint import dequantized_checkpoint
from llmkit.model.device import resolve_device
from llmkit.model.draft_head_spec import mtp_model_spec
from llmkit.model.families import FALLBACK, checkpoint_spec, require_native
from llmkit.model.parameter_table import embedding_tensor, parameters
from llmkit.model.pruned_experts import KeptExperts, with_pruned_experts
from llmkit.model.spec import ATTENTION_MIXERS, ModelSpec
from llmkit.model.unstacked_experts import with_unstacked_experts
from llmkit.quant import memory_estimate as memory
from llmkit.quant.algorithm import Algorithm, Quantizer
from llmkit.quant.calibration_size import (
    MIN_TOKENS,
    MIN_WINDOWS,
    default_seq_len,
    default_windows,
)
from llmkit.quant.expert_pruning import num_kept_experts
from llmkit.quant.gguf_plan import GgufPlan, make_gguf_plan
from llmkit.quant.gguf_quantizer import GgufQuantizer
from llmkit.quant.gptq import GptqQuantizer
from llmkit.quant.grid import RangeSearch
from llmkit.quant.methods import (
    Method,
    MethodOptions,
    build_quantization_config,
    ignored_modules,
    with_mixed_schemes,
)
from llmkit.quant.number_formats import NUMBER_FORMATS
from llmkit.quant.output_layout import carried_modules, planned_tensors, unquantized_dtype
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantized_source import QuantizedSource, quantized_source_of
from llmkit.quant.round_to_nearest import RtnQuantizer
from llmkit.quant.scheme_candidates import LinearUnit, check_target_bits, linear_units
from llmkit.quant.target_engines import (
    ANYWHERE,
    Target,
    check_engine,
    fast_schemes,
    parse_target,
)
from llmkit.quant.time_estimate import Work, estimate_seconds, measure_speed
from llmkit.quant.token_windows import EVALUATION_TOKENS

MIN_SEQ_LEN = 16  # tokens; shorter windows are useless for calibration


def method_options(options: QuantizeOptions) -> MethodOptions:
    """The part of the options that says how weights are stored."""
    return MethodOptions(
        options.method,
        options.bits,
        options.group_size,
        options.format,
        options.symmetric,
        options.activations,
        options.static_activations,
        options.kv,
        options.mixed,
        options.effort,
        options.lm_head,
        options.scheme,
        options.damp,
    )


def check_options(options: QuantizeOptions) -> None:
    """Raises UsageError for values out of range and for conflicting options."""
    method_options(options).check()
    for name, value, minimum in (
        ("samples", options.samples, 1),
        ("seq-len", options.seq_len, MIN_SEQ_LEN),
        ("eval-windows", options.eval_windows, 1),
    ):
        if value is not None and value < minimum:
            raise UsageError(f"--{name} is {value}", f"At least {minimum} was expected")
    if options.damp is not None and not 0 < options.damp <= 1:
        raise UsageError(f"--damp is {options.damp}", "A share above 0 and up to 1 was expected")
    if options.target_kl is not None and options.target_bits is not None:
        raise UsageError(
            "--target-kl and --target-bits were both given", "One of them was expected"
        )
    for name, bound in (
        ("target-kl", options.target_kl),
        ("max-kl", options.max_kl),
        ("max-ppl-ratio", options.max_ppl_ratio),
        ("min-acceptance", options.min_acceptance),
    ):
        if bound is None:
            continue
        if not bound > 0:
            raise UsageError(f"--{name} is {bound}", "A number above 0 was expected")
        if not options.evaluate:
            raise UsageError(
                f"--{name} needs the evaluation that --no-eval leaves out",
                todo="Leave out --no-eval",
            )
    if options.target_bits is not None and not 1 <= options.target_bits <= 16:
        raise UsageError(
            f"--target-bits is {options.target_bits:g}", "1 to 16 bits per weight were expected"
        )


@dataclass(frozen=True)
class WholeSource:
    """A source of which some experts are dropped."""

    checkpoint: Checkpoint
    spec: ModelSpec
    num_kept: int  # experts of a layer that stay

    def pruned(self, kept: KeptExperts) -> Checkpoint:
        """The source with the experts `kept` of each layer."""
        return with_pruned_experts(self.checkpoint, self.spec, kept)

    def first_experts(self) -> dict[int, range]:
        """The first experts of each layer, until it is known which ones stay."""
        layers = enumerate(self.spec.layers)
        return {index: range(self.num_kept) for index, layer in layers if layer.is_moe}


@dataclass(frozen=True)
class QuantizePlan:
    """A checked run: what is read, how it is quantized and what is written."""

    source: Checkpoint
    spec: ModelSpec
    out: Path
    options: QuantizeOptions
    quantization: QuantizationConfig | None  # None: a cast
    tensors: list[TensorInfo]  # of the output
    files: dict[str, list[TensorInfo]]  # the output's tensors by safetensors file
    device: torch.device
    seq_len: int  # tokens of a calibration window
    quantized_source: QuantizedSource | None = None  # None: the source is not quantized
    candidates: tuple[str, ...] = ()  # the schemes that mixed precision chooses from
    gguf: GgufPlan | None = None  # None: the output is in safetensors files
    # The source with all of its experts, where some are dropped. `source` has those that stay, or
    # the first ones, until the calibration text tells which ones stay.
    whole_source: WholeSource | None = None

    @property
    def method(self) -> Method:
        """The method's row of METHODS."""
        return method_options(self.options).method_row

    @property
    def bits(self) -> int:
        """The bits of a weight without an override."""
        return method_options(self.options).chosen_bits

    @property
    def calibrated(self) -> bool:
        """Whether the model runs on calibration text."""
        return method_options(self.options).calibrated or self.options.mixed

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is read."""
        return self.calibrated or self.whole_source is not None

    @property
    def reference(self) -> tuple[Checkpoint, ModelSpec]:
        """What the output is compared with: the source with all of its experts."""
        if self.whole_source is not None:
            return self.whole_source.checkpoint, self.whole_source.spec
        return self.source, self.spec

    def with_kept_experts(self, kept: KeptExperts) -> QuantizePlan:
        """The plan for the experts `kept` of each layer."""
        assert self.whole_source is not None
        return dataclasses.replace(self, source=self.whole_source.pruned(kept))

    @property
    def headers(self) -> HeaderFunction:
        """What makes the headers of the weight files."""
        return safetensors_header if self.gguf is None else self.gguf.headers

    @property
    def algorithm(self) -> Algorithm:
        """How a calibrated run quantizes the layers."""
        if self.gguf is not None:
            damp = method_options(self.options).dampening_frac
            return Algorithm(
                GgufQuantizer(self.gguf.types, self.gguf.export.places, dampening_frac=damp)
            )
        return _with_input_stats(_algorithm(self.options, self.spec), self.candidates)

    @property
    def rounding_search(self) -> RangeSearch | None:
        """The search of a run without calibration."""
        return method_options(self.options).rounding_search

    @property
    def samples(self) -> int:
        """The calibration windows of a calibrated run."""
        assert self.options.samples is not None, "make_plan chooses it"
        return self.options.samples

    @property
    def dtype(self) -> str:
        """The dtype of the unquantized tensors, as in a safetensors header."""
        return unquantized_dtype(self.source, self.method.dtype)

    @property
    def eval_window_tokens(self) -> int:
        """The tokens of an evaluation window."""
        return min(EVALUATION_TOKENS, self.spec.max_position_embeddings)

    @cached_property
    def units(self) -> list[LinearUnit]:
        """The linears that mixed precision chooses schemes for."""
        assert self.quantization is not None
        options = method_options(self.options)
        return linear_units(self.spec, self.quantization, self.candidates, options)

    @property
    def sensitivity_quantizer(self) -> Quantizer:
        """What quantizes a linear alone. The layers before it have no errors to correct."""
        quantizer = self.algorithm.quantizer
        return quantizer.asymmetric(0.0) if isinstance(quantizer, GptqQuantizer) else quantizer

    def with_schemes(self, schemes: Mapping[str, Scheme | None]) -> QuantizePlan:
        """The plan with other schemes for some linears, by runtime module; None: 16 bits."""
        assert self.quantization is not None
        return _with_quantization(self, with_mixed_schemes(self.quantization, self.spec, schemes))

    def memory_bytes(self, offload: bool = False) -> int:
        """The peak memory of the run. offload: the hidden states lie on disk."""
        quantized = [
            parameter
            for parameter in parameters(self.spec)
            if scheme_of(parameter, parameter.source_names[0], self.quantization)
        ]
        peak = memory.casting_bytes(quantized)
        if self.spec.transformers is not None:
            if self.calibrated:
                hidden = memory.hidden_bytes(self.spec, self.samples, self.seq_len)
                peak = max(peak, memory.fallback_bytes(self.spec, 1, self.seq_len) + hidden)
            if self.options.evaluate:
                models = memory.fallback_bytes(self.spec, 2, self.eval_window_tokens)
                peak = max(peak, models)
            return peak
        if self.options.evaluate:
            peak = max(peak, memory.evaluation_bytes(self.spec, self.eval_window_tokens))
        if self.candidates:
            hessians = "hessian" in self.sensitivity_quantizer.required_stats
            sensitivity = memory.sensitivity_bytes(self.spec, len(self.candidates), hessians)
            if hessians:
                sensitivity += memory.hidden_bytes(self.spec, self.samples, self.seq_len)
            peak = max(peak, sensitivity)
        if self.calibrated:
            algorithm = self.algorithm
            layer = memory.calibration_bytes(
                self.spec,
                self.seq_len,
                hessians="hessian" in algorithm.required_stats,
                auto_round=algorithm.auto_round is not None,
                prefetch=self.device.type == "cuda",
                asymmetric=algorithm.is_asymmetric,
            )
            if algorithm.norm_tuning is not None:
                tokens = max(algorithm.norm_tuning.tokens, self.seq_len)
                layer = max(layer, memory.norm_tuning_bytes(self.spec, tokens))
            if algorithm.quantizer.true_sequential and self.device.type == "cpu":
                layer += memory.recorded_bytes(self.spec, self.samples, self.seq_len)
            # With the hidden states on disk, one window at a time is in memory.
            windows = 1 if offload else self.samples
            windows *= algorithm.num_hidden_states
            peak = max(peak, layer + memory.hidden_bytes(self.spec, windows, self.seq_len))
        return peak

    def offloads(self) -> bool:
        """Whether the hidden states of the calibration text lie on disk."""
        if self.options.offload != "auto":
            return self.options.offload == "disk"
        return self.calibrated and self.memory_bytes() > memory.available_bytes(self.device)


def make_plan(source: str, out: Path, options: QuantizeOptions, progress: Progress) -> QuantizePlan:
    """Open the source, check it and the options, and plan the output. Nothing is written.

    Raises UsageError, InputError, ShortageError (disk, device) and OutputError as `quantize` does.
    """
    check_options(options)
    target = parse_target(options.engine)
    candidates = _candidates(options, target)
    device = resolve_device(options.device)
    checkpoint = open_checkpoint(source, dequantize_gguf=True)
    method = method_options(options)
    checkpoint.require_unsharded()
    spec = checkpoint_spec(checkpoint)
    _check_fallback(spec, options)
    _check_classifier(spec, options)
    if options.kv and not any(layer.mixer in ATTENTION_MIXERS for layer in spec.layers):
        raise InputError(
            f"--kv {options.kv} is not possible with {spec.architecture}",
            "A model that caches keys and values: this one has no attention",
            "Leave out --kv",
        )
    if options.kv and spec.mla is not None:
        raise InputError(
            f"--kv {options.kv} is not possible with {spec.architecture}",
            "A model that caches keys and values: this one caches a latent for each token",
            "Leave out --kv",
        )
    check_checkpoint(checkpoint, spec)
    quantized_source = quantized_source_of(checkpoint)
    if checkpoint.quantization is not None:
        checkpoint = dequantized_checkpoint(checkpoint, spec)
    if quantized_source is not None:
        for text in quantized_source.messages(method.chosen_format is None, options.kv):
            progress.message(text)
    stored = checkpoint
    if method.chosen_format is not None or options.prune_experts is not None:
        checkpoint = with_unstacked_experts(checkpoint, spec)
        spec = checkpoint_spec(checkpoint)
    unstacks_experts = checkpoint is not stored
    if options.lm_head is not None and spec.tie_word_embeddings:
        # The output projection gets separate tensors; the embedding is not quantized.
        checkpoint = checkpoint.with_untied_embeddings(
            embedding_tensor(spec), f"{spec.lm_head_name}.weight"
        )
        spec = checkpoint_spec(checkpoint)
    whole_source = None
    if options.prune_experts is not None:
        whole_source = _whole_source(checkpoint, spec, options.prune_experts)
        checkpoint = whole_source.pruned(whole_source.first_experts())
        spec = checkpoint_spec(checkpoint)
    layers = _layer_range(options.layers, len(spec.layers))
    ignore = ignored_modules(spec, options.keep, layers)
    quantization = build_quantization_config(spec, method, ignore)
    if quantization is not None:
        carried = carried_modules(checkpoint, spec)
        quantization = dataclasses.replace(quantization, carried=carried)
    if quantization is not None and options.method in ("gptq", "auto"):
        quantization = dataclasses.replace(quantization, damp=method.dampening_frac)
    check_engine(target, quantization, spec, unstacks_experts)
    out = out.expanduser().absolute()
    wanted_seq_len = options.seq_len or default_seq_len(options.samples, device)
    options = dataclasses.replace(options, seq_len=wanted_seq_len)
    seq_len = min(wanted_seq_len, spec.max_position_embeddings)
    needs_text = method.calibrated or options.mixed or whole_source is not None
    if options.samples is None and needs_text:
        options = dataclasses.replace(options, samples=default_windows(spec, seq_len, device))
    plan = QuantizePlan(
        checkpoint,
        spec,
        out,
        options,
        None,
        [],
        {},
        device,
        seq_len,
        quantized_source,
        candidates,
        whole_source=whole_source,
    )
    if method.chosen_format == "gguf":
        plan = dataclasses.replace(plan, gguf=_gguf_plan(plan, quantization, ignore))
    plan = _with_quantization(plan, quantization)
    if options.target_bits is not None:
        check_target_bits(plan.units, options.target_bits)
    check_output(plan.out, checkpoint.path, planned_bytes(plan.files, plan.headers))
    if plan.gguf is not None and (note := plan.gguf.replaced_note()):
        progress.message(note)
    if spec.transformers is not None:
        progress.message(FALLBACK)
    if options.device == "auto" and device.type == "cpu":
        progress.message("no CUDA device: running on the CPU")
    if plan.needs_text and seq_len < wanted_seq_len:
        progress.message(
            f"calibration windows have {seq_len} tokens: the model has no more positions"
        )
    return plan


def _candidates(options: QuantizeOptions, target: Target | None) -> tuple[str, ...]:
    """The schemes that mixed precision chooses from; none without it.

    Raises UsageError when the method can choose values for none of them.
    """
    if not options.mixed:
        return ()
    method = method_options(options).method_row
    fast = fast_schemes(target, options.activations)
    names = tuple(name for name in fast if name in method.schemes or name in ANYWHERE)
    if not names:
        raise UsageError(
            f"--method {options.method} chooses values for none of {', '.join(fast)}, which"
            f" {options.engine} runs fast",
            todo="Use --method gptq or rtn",
        )
    return names


def _with_input_stats(algorithm: Algorithm, candidates: Sequence[str]) -> Algorithm:
    """The algorithm, which collects what stored scales of inputs need, if a candidate has one."""
    needs_scale = any(NUMBER_FORMATS[name].scheme.has_input_scale for name in candidates)
    if isinstance(algorithm.quantizer, RtnQuantizer) and needs_scale:
        quantizer = dataclasses.replace(
            algorithm.quantizer, required_stats=frozenset({"magnitudes"})
        )
        return dataclasses.replace(algorithm, quantizer=quantizer)
    return algorithm


def _algorithm(options: QuantizeOptions, spec: ModelSpec) -> Algorithm:
    is_native = spec.transformers is None
    return method_options(options).algorithm(is_native=is_native)


def _whole_source(checkpoint: Checkpoint, spec: ModelSpec, share: float) -> WholeSource:
    """The source, of which a share of the experts is dropped. Raises as `num_kept_experts` does."""
    whole = WholeSource(checkpoint, spec, num_kept_experts(spec.moe, share))
    head = mtp_model_spec(spec, checkpoint.tensor_shapes)
    if head is not None and any(layer.is_moe for layer in head.layers):
        raise InputError(
            f"{checkpoint.reference} has an MTP head with experts of its own, and config.json has"
            " one number of experts for both",
            "A model without such a head was expected",
            "Leave out --prune-experts",
        )
    return whole


def _check_fallback(spec: ModelSpec, options: QuantizeOptions) -> None:
    """Raises InputError for options that need a native family, when the model has none."""
    method = method_options(options)
    algorithm = _algorithm(options, spec) if method.calibrated else None
    for name, is_used in (
        ("--require-native", options.require_native),
        ("--kv", bool(options.kv)),
        ("--target-kl or --target-bits", options.mixed),
        ("--prune-experts", options.prune_experts is not None),
        (f"--effort {options.effort}", algorithm is not None and algorithm.auto_round is not None),
        ("smoothing of inputs", algorithm is not None and algorithm.smoother is not None),
        (
            "--lm-head with a tied embedding",
            options.lm_head is not None and spec.tie_word_embeddings,
        ),
    ):
        if is_used:
            require_native(spec, name)
    if method.method_row.schemes and not any(row.is_linear for row in parameters(spec)):
        raise InputError(
            f"{spec.architecture} has no linear layers of the class nn.Linear to quantize",
            todo="Cast it with --method bf16 or fp16",
        )


def _check_classifier(spec: ModelSpec, options: QuantizeOptions) -> None:
    """Raises InputError for options that need a model that generates text, when it classifies."""
    if not spec.num_labels:
        return
    for name, is_used, todo in (
        ("measuring the quality of", options.evaluate, "Add --no-eval"),
        ("--target-bits for", options.target_bits is not None, "Leave it out"),
        ("--lm-head for", options.lm_head is not None, "Leave it out"),
    ):
        if is_used:
            raise InputError(
                f"{name} a {spec.architecture} is not possible: it has a classification head in"
                " place of an output projection",
                "A model that generates text",
                todo,
            )


def _gguf_plan(
    plan: QuantizePlan, quantization: QuantizationConfig | None, ignore: Sequence[str]
) -> GgufPlan:
    """The GGUF file of a run. Raises InputError for models that it cannot hold."""
    require_native(plan.spec, "--format gguf")
    preset = plan.dtype
    if quantization is not None and quantization.scheme is not None:
        preset = quantization.scheme.preset
    return make_gguf_plan(plan.source, plan.spec, preset, plan.dtype, ignore)


def _with_quantization(plan: QuantizePlan, quantization: QuantizationConfig | None) -> QuantizePlan:
    """The plan with a quantization, and the tensors and files that follow from it."""
    if plan.gguf is not None:
        infos = list(plan.gguf.infos)
        return dataclasses.replace(
            plan, quantization=quantization, tensors=infos, files={plan.gguf.file: infos}
        )
    tensors = planned_tensors(plan.source, plan.spec, quantization, plan.method.dtype)
    return dataclasses.replace(
        plan, quantization=quantization, tensors=tensors, files=plan_files(tensors)
    )


def _layer_range(text: str | None, num_layers: int) -> range | None:
    """The decoder layers of "A-B" or "A"; None for all.

    Raises UsageError for any other text and for layers that the model does not have.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match:
        first = int(match[1])
        last = int(match[2] or match[1])
        if first <= last < num_layers:
            return range(first, last + 1)
    raise UsageError(
        f"--layers is {text}", f"A-B was expected, with A and B from 0 to {num_layers - 1}"
    )


def plan_summary(plan: QuantizePlan) -> dict[str, Any]:
    """What a dry run reports."""
    speed = measure_speed(plan.device)
    seconds = estimate_seconds(plan.spec, _work(plan), speed)
    cheaper = [
        (words, estimate_seconds(plan.spec, _work(other), speed))
        for words, other in _cheaper_plans(plan)
    ]
    files = {
        file: sum(tensor.nbytes for tensor in plan.headers(tensors)[1].values())
        for file, tensors in plan.files.items()
    }
    return {
        "files": files,
        "tensors": len(plan.tensors),
        "checkpoint_bytes": sum(files.values()),
        "memory_bytes": plan.memory_bytes(plan.offloads()),
        "offload": plan.offloads(),
        "memory_available_bytes": memory.available_bytes(plan.device),
        "disk_bytes": planned_bytes(plan.files, plan.headers),
        "samples": plan.samples if plan.needs_text else None,
        "seq_len": plan.seq_len if plan.needs_text else None,
        "seconds": seconds,
        # Only what saves a tenth of the time or more.
        "cheaper": [
            {"options": words, "seconds": less} for words, less in cheaper if less <= 0.9 * seconds
        ],
    }


def _work(plan: QuantizePlan) -> Work:
    """What the time of a run depends on."""
    options = plan.options
    eval_windows = options.eval_windows if options.evaluate else 0
    if not plan.calibrated:
        return Work(plan.source.weight_bytes, eval_windows=eval_windows)
    return Work(
        plan.source.weight_bytes,
        plan.samples * plan.seq_len,
        plan.algorithm,
        searches=method_options(options).searches,
        eval_windows=eval_windows,
    )


def _cheaper_plans(plan: QuantizePlan) -> Iterator[tuple[str, QuantizePlan]]:
    """Plans that take less time, with the options that lead to them; the best quality first."""
    if not plan.calibrated:
        return
    efforts = ["max", "high", "normal", "fast"]
    useful = method_options(plan.options).useful_efforts
    lower_efforts = [
        effort for effort in efforts[efforts.index(plan.options.effort) + 1 :] if effort in useful
    ]
    fewer = min(plan.samples, math.ceil(MIN_TOKENS / plan.seq_len))
    fewer = max(fewer, min(plan.samples, MIN_WINDOWS))
    changes: list[dict[str, Any]] = [{"effort": effort} for effort in lower_efforts]
    if fewer < plan.samples:
        less_text = {"samples": fewer, "seq_len": plan.seq_len}
        changes.append(less_text)
        changes += [less_text | {"effort": effort} for effort in lower_efforts[-1:]]
    for change in changes:
        words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items())
        yield words, dataclasses.replace(plan, options=dataclasses.replace(plan.options, **change))
