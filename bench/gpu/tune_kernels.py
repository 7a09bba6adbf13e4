"""`llmkit doctor --tune MODEL`: measures configurations of Triton kernels for a model's shapes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from llmkit.bench.gpu.decode_steps import BLOCK_SIZE, random_weight, time_ms
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.errors import ShortageError
from llmkit.kernels import paged_attention, quantized_linear, triton_support, tuned_configs
from llmkit.kernels.attention import paged_attention_reference
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.quantized_linear import WeightOnlyLinear
from llmkit.kernels.tuned_configs import Config, Shape, Tunable
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.families import checkpoint_spec
from llmkit.model.linear import PackedLinear, serving_linear
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import can_stay_packed
from llmkit.runtime.engine_plan import resolve_dtype

ROWS = (1, 32, 64, 128, 256, 512)  # numbers of inputs, one for each class of shapes
CONTEXT = 4096  # tokens
# The largest allowed error of a kernel's results, as a share of the largest value.
MAX_ERRORS = {
    torch.bfloat16: 1.2e-2,
    torch.float16: 2e-3,
    torch.float32: 1e-4,
}
CACHE_BYTES = 256 << 20  # larger than the GPU's caches: writing it clears them
Clock = Callable[[Callable[[], object]], float]  # milliseconds


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
    ) -> None:
        """run: launches the kernel. expected: its result in float32.

        max_error: of a result, as a share of the largest expected value.
        """
        self.kernel = kernel
        self.run = run
        self.expected = expected
        self.max_error = max_error
        self.clock = clock
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
                if config not in self.times:
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
                error = (self.run().float() - self.expected).abs()
                is_right = bool((error <= self.max_error * self.expected.abs().max()).all())
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


@torch.inference_mode()
def tune(checkpoint: Checkpoint, report_progress: Callable[[str], None]) -> list[TuningResult]:
    """Find the best configurations for a model's linear layers and attention, and store them.

    report_progress: gets a line before each problem. Raises ShortageError without a CUDA device or
    Triton.
    """
    if not torch.cuda.is_available() or triton_support.triton is None:
        raise ShortageError(
            "--tune, and PyTorch sees no CUDA device that Triton runs on",
            "An NVIDIA GPU, its driver and triton",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = resolve_dtype("auto", checkpoint, device)
    spec = checkpoint_spec(checkpoint)
    cache_filler = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)

    def clock(run: Callable[[], object]) -> float:
        return time_ms(run, device, 20, before=cache_filler.zero_)

    results: list[TuningResult] = []
    for query_len in (1, CONTEXT):
        report_progress(f"attention, {query_len} new tokens")
        results += tune_attention(spec, query_len, dtype, device, clock)
    for scheme, shape in weight_only_weights(checkpoint, spec, dtype, device):
        report_progress(f"linear {list(shape)}, {scheme.bits} bits, groups of {scheme.group_size}")
        layer = serving_linear([random_weight(shape, scheme, device)], None, None, dtype, device)
        if isinstance(layer, PackedLinear) and isinstance(layer.kernel, WeightOnlyLinear):
            results += tune_weight_only_linear(layer.kernel, shape[1], dtype, device, clock)
    save_results(results, tuned_configs.user_file())
    return results


def weight_only_weights(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> list[tuple[Scheme, tuple[int, int]]]:
    """The distinct schemes and shapes [out, in] of the weights that `WeightOnlyLinear` serves."""
    weights: dict[tuple[Scheme, tuple[int, int]], None] = {}
    for row in parameters(spec):
        scheme = scheme_of(row, row.source_names[0], checkpoint.quantization)
        if (
            scheme
            and scheme.inputs == "none"
            and can_stay_packed(device, row, checkpoint.quantization, dtype)
        ):
            weights[scheme, (row.shape[0], row.shape[1])] = None
    return list(weights)


def tune_weight_only_linear(
    kernel: WeightOnlyLinear,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
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
            x = torch.randn(rows, in_features, device=device).to(dtype)
            expected = linear(x.float(), dense_weight)
            search = ConfigSearch(
                quantized_linear.TILE, partial(kernel, x), expected, MAX_ERRORS[dtype], clock
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
        config = (max(fused_rows, ROWS[1] if len(ROWS) > 1 else fused_rows),)
        name = quantized_linear.FUSED_ROWS.name(shapes[0], device)
        default = (quantized_linear.MAX_FUSED_ROWS,)
        results.append(TuningResult(name, config, fused_ms, default, None, len(ROWS), 0))
    return results


def tune_attention(
    spec: ModelSpec, query_len: int, dtype: torch.dtype, device: torch.device, clock: Clock
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
