"""`llmkit doctor --tune MODEL`: measures configurations of Triton kernels for a model's shapes.

The shapes are enough: no weights are read. It is also the part `tune` of `make gpu`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from llmkit.bench.gpu.figure_log import FigureLog, NotInstalledError, PartOptions
from llmkit.bench.gpu.model_shapes import (
    BLOCK_SIZE,
    MODEL_CONFIGS,
    WEIGHT_SCHEMES,
    random_weight,
    tiny_config,
)
from llmkit.bench.gpu.timing import time_ms
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.errors import InputError, ShortageError
from llmkit.kernels import (
    humming_linear,
    paged_attention,
    quantized_linear,
    triton_support,
    tuned_configs,
)
from llmkit.kernels.activation_quant import fake_quantize_per_token
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.attention_reference import paged_attention_reference
from llmkit.kernels.humming_linear import HUMMING, LIBRARY, OURS, HummingLinear
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.quantized_linear import Fp4Linear, WeightOnlyLinear, WordsLinear
from llmkit.kernels.tuned_configs import Config, Shape, Tunable
from llmkit.kernels.w8a8_linear import MIN_FP8_ROWS, W8A8Linear
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.families import checkpoint_spec, model_spec
from llmkit.model.linear import (
    ActivationQuant,
    PackedLinear,
    gpu_capability,
    gpu_kernel_type,
    serving_linear,
)
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import can_stay_packed
from llmkit.runtime.engine_plan import resolve_dtype

# Numbers of inputs, one for each of `WeightOnlyLinear`'s classes of shapes. Few rows are one class.
ROWS = (1, 16, 32, 64, 128, 256, 512)
MIN_FUSED_ROWS = min(quantized_linear.FUSED_ROWS.choices[0])
LIBRARY_ROWS = (1, 16, 64, 256)  # numbers of inputs with which libraries are compared
CONTEXT = 4096  # tokens
# The largest allowed error of a kernel's results, as a share of the largest value.
MAX_ERRORS = {
    torch.bfloat16: 1.2e-2,
    torch.float16: 2e-3,
    torch.float32: 1e-4,
}
CACHE_BYTES = 256 << 20  # larger than the GPU's caches: writing it clears them
Clock = Callable[[Callable[[], object]], float]  # milliseconds
WeightShape = tuple[Scheme, tuple[int, int]]  # of a weight [out, in]
TUNED_MODELS = ("Llama-3.1-8B", "Qwen3-0.6B")  # by `make gpu`
COMPILE_SHARE = 0.4  # of the part's time, in which all cores compile
TUNED_FILE = "tuned.json"


def never() -> bool:
    """A time that is not limited."""
    return False


@dataclass(frozen=True)
class TuningResult:
    """The best configuration for a class of shapes."""

    name: str  # of the entry, see `tuned_configs`
    config: Config
    ms: float
    safe: Config  # the default, which runs without an entry
    safe_ms: float | None  # None: the default was refused
    tried: int
    # Refused configurations failed, spilled registers, needed too much shared memory, or gave
    # wrong results.
    refused: int


class ConfigSearch:
    """Searches the fastest configuration of a kernel on one problem."""

    def __init__(
        self,
        kernel: Tunable,
        run: Callable[[], torch.Tensor],
        expected: torch.Tensor,
        max_error: float,
        clock: Clock,
        is_over: Callable[[], bool] = never,
    ) -> None:
        """run: launches the kernel. expected: its result in float32.

        max_error: of a result, as a share of the largest expected value. is_over: says when to end
        the search with the best configuration so far.
        """
        self.kernel = kernel
        self.run = run
        self.expected = expected
        self.max_error = max_error
        self.clock = clock
        self.is_over = is_over
        # The kernel gives its class of shapes and its default when it asks for a configuration.
        self.shape: Shape = ()
        self.default: Config = ()
        with self._use_config(None):
            run()
        self.times: dict[Config, float | None] = {}  # milliseconds; None: refused

    def search(self) -> float | None:
        """The best time in milliseconds; None when all configurations were refused.

        It begins with the default and sets one number after the other to its best choice.
        """
        best = self.default
        for index, choices in enumerate(self.kernel.choices):
            candidates = [best]
            candidates += [(*best[:index], choice, *best[index + 1 :]) for choice in choices]
            for config in candidates:
                if config not in self.times and not (self.times and self.is_over()):
                    self.times[config] = self._measure(config)
            best = min(candidates, key=self._ms)
        return None if self._ms(best) == math.inf else self._ms(best)

    def result(self, device: torch.device) -> TuningResult:
        """The result of a search."""
        best = min(self.times, key=self._ms)
        refused = sum(ms is None for ms in self.times.values())
        name = self.kernel.name(self.shape, device)
        default_ms = self.times.get(self.default)
        return TuningResult(
            name, best, self._ms(best), self.default, default_ms, len(self.times), refused
        )

    def _ms(self, config: Config) -> float:
        ms = self.times.get(config)
        return math.inf if ms is None else ms

    def _measure(self, config: Config) -> float | None:
        """The time of a configuration; None: it is refused."""
        # Triton is missing on machines without a GPU.
        from triton.errors import TritonError

        try:
            with self._use_config(config), _count_spills(self.kernel) as spills:
                is_right = _is_right(self.run(), self.expected, self.max_error)
                return self.clock(self.run) if is_right and not any(spills) else None
        except TritonError:  # it cannot be compiled, or needs too much shared memory
            return None

    @contextmanager
    def _use_config(self, config: Config | None) -> Iterator[None]:
        """Within the block the kernel runs with `config`, or with its default."""

        def choose(shape: Shape, default: Config) -> Config:
            self.shape = shape
            self.default = default
            return config or default

        with _override_config(self.kernel, choose):
            yield


@contextmanager
def _override_config(kernel: Tunable, choose: Callable[[Shape, Config], Config]) -> Iterator[None]:
    """Within the block `choose` returns the kernel's configurations."""
    tuned_configs.trials[kernel.kernel] = choose
    try:
        yield
    finally:
        del tuned_configs.trials[kernel.kernel]


@contextmanager
def _count_spills(kernel: Tunable) -> Iterator[list[int]]:
    """The number of spilled registers of each launch within the block."""
    spills: list[int] = []

    def count(compiled: object) -> None:
        # The interpreter compiles nothing.
        spills.append(getattr(compiled, "n_spills", 0))

    tuned_configs.launch_observers[kernel.kernel] = count
    try:
        yield spills
    finally:
        del tuned_configs.launch_observers[kernel.kernel]


@dataclass(frozen=True)
class TuningTarget:
    """The shapes for which kernels are tuned."""

    spec: ModelSpec
    dtype: torch.dtype
    weights: list[WeightShape]  # see `tuned_weights`

    def problems(self) -> list[tuple[str, Problem]]:
        """What is tuned, with a name for people."""
        problems: list[tuple[str, Problem]] = [
            (f"attention, {query_len} new tokens", partial(tune_attention, self.spec, query_len))
            for query_len in (1, CONTEXT)
        ]
        for scheme, shape in self.weights:
            kind = f"{scheme.bits} bits, groups of {scheme.group_size}"
            if scheme.kind == "float":
                kind = "FP8" if scheme.scale_format == "float" else scheme.label.split(",")[0]
            name = f"linear {list(shape)}, {kind}"
            problems.append((name, partial(tune_weight, scheme, shape)))
            # After the weight's own problem, whose best tiles are used by then.
            if _has_library(scheme, shape, self.dtype):
                name = f"w4a16 library, {name}"
                problems.append((name, partial(tune_library, scheme, shape)))
        return problems


# Of tune_attention, tune_weight and tune_library: dtype, device, clock and is_over.
Problem = Callable[[torch.dtype, torch.device, Clock, Callable[[], bool]], "list[TuningResult]"]


@torch.inference_mode()
def tune(model: str, report_progress: Callable[[str], None]) -> list[TuningResult]:
    """Find the best configurations for a model's linear layers and attention, and store them.

    model: a checkpoint, a config.json, or a name in MODEL_CONFIGS. report_progress: gets a line
    before each problem. Raises ShortageError without a CUDA device or Triton, InputError for a
    config that is none.
    """
    if not torch.cuda.is_available() or triton_support.triton is None:
        raise ShortageError(
            "--tune, and PyTorch sees no CUDA device that Triton runs on",
            "An NVIDIA GPU, its driver and triton",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    target = tuning_target(model, device)
    clock = gpu_clock(device)
    results: list[TuningResult] = []
    for name, problem in target.problems():
        report_progress(name)
        found = problem(target.dtype, device, clock, never)
        save_results(found, tuned_configs.user_file())  # at once: an interrupt loses nothing
        results += found
    return results


def tuning_target(model: str, device: torch.device) -> TuningTarget:
    """The shapes of a checkpoint, of a config.json, or of a name in MODEL_CONFIGS."""
    if model in MODEL_CONFIGS and not Path(model).exists():
        return shapes_target(MODEL_CONFIGS[model])
    if model.endswith(".json"):
        try:
            config = json.loads(Path(model).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{model} is no config.json: {error}") from error
        return shapes_target(config)
    checkpoint = open_checkpoint(model)
    dtype = resolve_dtype("auto", checkpoint, device)
    spec = checkpoint_spec(checkpoint)
    return TuningTarget(spec, dtype, tuned_weights(checkpoint, spec, dtype, device))


def shapes_target(config: dict[str, Any], scheme: Scheme | None = None) -> TuningTarget:
    """The shapes of a config.json in bfloat16, with weights in 4 bits by 128, and in FP8."""
    spec = model_spec(config)
    schemes = [scheme] if scheme else [WEIGHT_SCHEMES["int4"], WEIGHT_SCHEMES["fp8"]]
    weights: dict[WeightShape, None] = {}
    for one in schemes:
        assert one is not None
        for row in parameters(spec):
            if row.is_linear and row.expert is None and row.shape[1] % max(one.group_size, 1) == 0:
                weights[one, (row.shape[0], row.shape[1])] = None
    return TuningTarget(spec, torch.bfloat16, list(weights))


def gpu_clock(device: torch.device) -> Clock:
    """Times launches whose operands are not in the L2 cache."""
    cache_filler = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    return lambda run: time_ms(run, device, 20, before=cache_filler.zero_)


def measure(log: FigureLog, options: PartOptions) -> None:
    """Tune the shapes of TUNED_MODELS, as far as the time allows.

    First all cores compile: otherwise one core would compile nearly all the time.
    """
    with torch.inference_mode():
        _measure(log, options)


def _measure(log: FigureLog, options: PartOptions) -> None:
    device = options.device
    on_gpu = device.type == "cuda" and triton_support.triton is not None
    figures = [
        (f"{model}, {name}", target.dtype, problem)
        for model, target in _part_targets(options)
        for name, problem in target.problems()
    ]
    if on_gpu and any(not log.has("tuned", name) for name, *_ in figures):
        compile_with_all_cores(log, options, len(figures))
    clock: Clock = gpu_clock(device) if on_gpu else lambda run: 1.0

    def run_problem(dtype: torch.dtype, problem: Problem) -> dict[str, Any]:
        if not on_gpu:
            raise NotInstalledError("tuning needs a CUDA device and Triton")
        results = problem(dtype, device, clock, lambda: log.time_left_s < 2)
        for path in (options.results / TUNED_FILE, tuned_configs.user_file()):
            save_results(results, path)
        return {"entries": [asdict(result) for result in results]}

    for name, dtype, problem in figures:
        log.measure("tuned", name, partial(run_problem, dtype, problem), needs_s=3)


def _part_targets(options: PartOptions) -> list[tuple[str, TuningTarget]]:
    configs = {model: MODEL_CONFIGS[model] for model in TUNED_MODELS}
    if options.is_tiny:
        configs = {model: tiny_config(config) for model, config in configs.items()}
    return [(model, shapes_target(config)) for model, config in configs.items()]


def compile_with_all_cores(log: FigureLog, options: PartOptions, num_problems: int) -> None:
    """Fill Triton's cache on disk with the configurations that the searches begin with."""
    end_s = time.monotonic() + COMPILE_SHARE * log.time_left_s
    workers = min(num_problems, max(1, len(os.sched_getaffinity(0)) - 1))
    command = [sys.executable, "-m", "llmkit.bench.gpu.tune_kernels", str(options.results)]
    processes = [
        subprocess.Popen([*command, str(worker), str(workers)])  # noqa: S603
        for worker in range(workers)
    ]
    try:
        for process in processes:
            while process.poll() is None and time.monotonic() < end_s:
                log.heartbeat()
                time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()


@torch.inference_mode()
def compile_problems(options: PartOptions, worker: int, workers: int) -> None:
    """Compile the part's problems of one worker: searches in which every time is the same."""
    problems = [
        (target.dtype, problem)
        for _, target in _part_targets(options)
        for _, problem in target.problems()
    ]
    for dtype, problem in problems[worker::workers]:
        problem(dtype, options.device, lambda run: 1.0, never)


def tune_weight(
    scheme: Scheme,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    is_over: Callable[[], bool] = never,
) -> list[TuningResult]:
    """Tune the linear layer of a weight of this scheme and shape [out, in]."""
    kind = gpu_kernel_type(scheme, shape, dtype, gpu_capability(device))
    if kind not in (WeightOnlyLinear, Fp4Linear) and not (kind is W8A8Linear and scheme.is_fp8):
        return []  # its kernel has no configurations
    quant = ActivationQuant.of(scheme)
    with _override_config(LIBRARY, lambda shape, default: (OURS,)):
        layer = serving_linear([random_weight(shape, scheme, device)], None, quant, dtype, device)
    assert isinstance(layer, PackedLinear)
    if isinstance(layer.kernel, W8A8Linear):
        return tune_fp8_rows(layer.kernel, dtype, device, clock, is_over)
    assert isinstance(layer.kernel, WordsLinear)
    return tune_weight_only_linear(layer.kernel, shape[1], dtype, device, clock, is_over)


def tune_library(
    scheme: Scheme,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    is_over: Callable[[], bool] = never,
) -> list[TuningResult]:
    """Find whether humming-kernels multiplies a weight [out, in] faster than our kernel.

    A weight is held once, for all numbers of inputs. So the geometric means over LIBRARY_ROWS are
    compared, in which each number of inputs counts alike.
    """
    kind = gpu_kernel_type(scheme, shape, dtype, gpu_capability(device))
    if kind is None or not _has_library(scheme, shape, dtype) or is_over():
        return []
    weight = random_weight(shape, scheme, device)
    weight = replace(weight, scales=weight.scales * (1 + torch.rand_like(weight.scales)))
    if not scheme.symmetric:
        weight = replace(weight, zeros=torch.randint_like(weight.zeros, 1 << scheme.bits))
    dense = weight.dequantize().float()
    inputs = [torch.randn(rows, shape[1], device=device).to(dtype) for rows in LIBRARY_ROWS]
    keys: list[Shape] = []
    times: dict[Config, float] = {}
    for choice in (OURS, HUMMING):

        def choose(key: Shape, default: Config, choice: int = choice) -> Config:
            keys.append(key)
            return (choice,)

        with _override_config(LIBRARY, choose):
            layer = serving_linear([weight], None, None, dtype, device)
        assert isinstance(layer, PackedLinear)
        kernel = layer.kernel
        # Where the library fails, our kernel is in its place.
        if isinstance(kernel, HummingLinear) is (choice == HUMMING) and all(
            _is_right(kernel(x), linear(x.float(), dense), MAX_ERRORS[dtype]) for x in inputs
        ):
            logs = [math.log(clock(partial(kernel, x))) for x in inputs]
            times[choice,] = math.exp(sum(logs) / len(logs))
    if not times:
        return []
    best = min(times, key=times.__getitem__)
    name = LIBRARY.name(keys[0], device)
    refused = 2 - len(times)
    return [TuningResult(name, best, times[best], (OURS,), times.get((OURS,)), 2, refused)]


def _has_library(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether there is a library to compare with our kernel."""
    return (
        scheme.kind == "int"
        and scheme.inputs == "none"
        and humming_linear.supports(shape, scheme.bits, scheme.group_size, dtype)
    )


def _is_right(result: torch.Tensor, expected: torch.Tensor, max_error: float) -> bool:
    """max_error: the largest allowed one, as a share of the largest expected value."""
    error = (result.float() - expected).abs()
    return bool((error <= max_error * expected.abs().max()).all())


def tune_fp8_rows(
    kernel: W8A8Linear,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    is_over: Callable[[], bool] = never,
) -> list[TuningResult]:
    """Find whether few FP8 rows are padded. Products of 1 and of 16 rows are timed together."""
    inputs = [torch.randn(rows, len(kernel.q), device=device).to(dtype) for rows in (1, 16)]
    weight = (kernel.q.float() * kernel.scales).T
    quantized = fake_quantize_per_token(torch.cat(inputs).float(), "fp8")
    search = ConfigSearch(
        MIN_FP8_ROWS,
        lambda: torch.cat([kernel(x) for x in inputs]),
        linear(quantized, weight),
        MAX_ERRORS[dtype],
        clock,
        is_over,
    )
    return [] if search.search() is None else [search.result(device)]


def tuned_weights(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> list[WeightShape]:
    """The distinct schemes and shapes [out, in] of the weights whose kernels are tuned.

    These are the weights of `WeightOnlyLinear`, and those in FP8 with a scale for each row.
    """
    weights: dict[tuple[Scheme, tuple[int, int]], None] = {}
    for row in parameters(spec):
        scheme = scheme_of(row, row.source_names[0], checkpoint.quantization)
        if (
            scheme
            and (scheme.inputs == "none" or (scheme.is_fp8 and scheme.inputs != "group"))
            and can_stay_packed(device, row, checkpoint.quantization, dtype)
        ):
            weights[scheme, (row.shape[0], row.shape[1])] = None
    return list(weights)


def tune_weight_only_linear(
    kernel: WordsLinear,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    is_over: Callable[[], bool] = never,
) -> list[TuningResult]:
    """Find the best tile for each class of rows, and the largest class in which the kernel wins.

    It is compared with dequantizing the weight and multiplying densely.
    """
    dense_weight = kernel.dequantize(in_features, torch.float32)
    results: list[TuningResult] = []
    fused_rows = 0  # the most rows so far at which the kernel is faster
    fused_ms = 0.0
    shapes: list[Shape] = []

    def keep_default(shape: Shape, default: Config) -> Config:
        shapes.append(shape)
        return default

    with _override_config(quantized_linear.FUSED_ROWS, keep_default):
        for index, rows in enumerate(ROWS):
            if results and is_over():
                break
            x = torch.randn(rows, in_features, device=device).to(dtype)
            expected = linear(x.float(), dense_weight)
            search = ConfigSearch(
                quantized_linear.TILE,
                partial(kernel, x),
                expected,
                MAX_ERRORS[dtype],
                clock,
                is_over,
            )
            ms = search.search()
            if ms is not None:
                results.append(search.result(device))
            dense_ms = clock(
                lambda x=x: linear(x, kernel.dequantize(in_features, dtype))  # type: ignore[misc]
            )
            previous_rows = ROWS[index - 1] if index else 0
            if ms is not None and ms <= dense_ms and fused_rows == previous_rows:
                fused_rows = rows
                fused_ms = ms
    if fused_rows:
        config = (max(fused_rows, MIN_FUSED_ROWS),)
        name = quantized_linear.FUSED_ROWS.name(shapes[0], device)
        default = (quantized_linear.MAX_FUSED_ROWS,)
        results.append(TuningResult(name, config, fused_ms, default, None, len(ROWS), 0))
    return results


def tune_attention(
    spec: ModelSpec,
    query_len: int,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    is_over: Callable[[], bool] = never,
) -> list[TuningResult]:
    """Tune decode steps (`query_len` 1), or prefill steps of one prompt of `query_len` tokens."""
    window = None if None in spec.sliding_windows else spec.sliding_windows[0]
    context = min(CONTEXT, spec.max_position_embeddings)
    num_sequences = 32 if query_len == 1 else 1
    query_len = min(query_len, context)
    blocks = -(-context // BLOCK_SIZE)  # of a sequence
    block_tables = [range(s * blocks, (s + 1) * blocks) for s in range(num_sequences)]
    batch = AttentionBatch.build(
        [query_len] * num_sequences,
        [context] * num_sequences,
        {window: block_tables},
        BLOCK_SIZE,
        device,
    )
    shape = (2 * spec.num_kv_heads, blocks * num_sequences, BLOCK_SIZE, spec.head_dim)
    cache = KVCache(torch.randn(shape, device=device).to(dtype))
    q = torch.randn(num_sequences * query_len, spec.num_heads, spec.head_dim, device=device)
    q = q.to(dtype)
    arguments = (
        q,
        cache,
        batch.metadata(window),
        spec.attention_scale,
        spec.attn_logit_softcapping,
    )
    if not paged_attention.supports(q, cache):
        return []
    expected = paged_attention_reference(*arguments).float()
    search = ConfigSearch(
        paged_attention.TILE,
        partial(paged_attention.attention, *arguments),
        expected,
        MAX_ERRORS[dtype],
        clock,
        is_over,
    )
    return [] if search.search() is None else [search.result(device)]


def save_results(results: Sequence[TuningResult], path: Path) -> None:
    """Add entries to a file of configurations. The file is replaced atomically."""
    tuned = tuned_configs.read_configs(path) | {result.name: result.config for result in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f"{path.name}.{os.getpid()}")
    partial_file.write_text(
        json.dumps({"format": tuned_configs.FORMAT, "tuned": tuned}, indent=1), encoding="utf-8"
    )
    partial_file.replace(path)
    tuned_configs.read_configs.cache_clear()
    tuned_configs.measured_config.cache_clear()


def main() -> int:
    """Compile, for `compile_with_all_cores`: the results' folder, this worker, all workers."""
    results, worker, workers = sys.argv[1:]
    options = PartOptions(torch.device("cuda"), Path(results))
    compile_problems(options, int(worker), int(workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
