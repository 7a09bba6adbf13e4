"""Measuring configurations of Triton kernels for the shapes of a model: `llmkit doctor --tune MODEL`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import linear

from llmkit.bench.steps import BLOCK, random_weight, time_ms
from llmkit.checkpoint.errors import ShortageError
from llmkit.checkpoint.quantized import Scheme
from llmkit.checkpoint.source import Checkpoint
from llmkit.kernels import jit, paged, quantized_linear, tuning
from llmkit.kernels.attention import AttentionBatch, KvCache, paged_attention_reference
from llmkit.kernels.quantized_linear import GroupedProduct
from llmkit.kernels.tuning import Config, Shape, Tunable
from llmkit.model.families import model_spec
from llmkit.model.layout import parameters
from llmkit.model.linear import PackedLinear, serving_linear
from llmkit.model.loader import packs_on, scheme_of
from llmkit.model.spec import ModelSpec
from llmkit.runtime.load import resolve_dtype

ROWS = (1, 32, 64, 128, 256, 512)  # of inputs: one of each class of shapes
CONTEXT = 4096  # tokens
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-4}  # of errors, shares of the largest value
CACHE_BYTES = 256 << 20  # that push everything else out of the caches
KERNELS: dict[Tunable, tuple[ModuleType, str]] = {
    quantized_linear.TILE: (quantized_linear, "_grouped_product"),
    paged.TILE: (paged, "_attend"),
}
Clock = Callable[[Callable[[], object]], float]  # milliseconds


@dataclass(frozen=True)
class Tuned:
    """What was found for a class of shapes."""

    name: str  # of the entry, see `tuning`
    config: Config
    ms: float
    safe: Config  # what runs without an entry
    safe_ms: float | None  # None: it was refused, like others
    tried: int
    refused: int  # they failed, spilled registers, needed more shared memory than there is, or gave other results


class _Watched:
    """A kernel, and how many registers its launches have spilled."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.spilled = kernel, 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel[grid](*arguments, **options)
            self.spilled += getattr(compiled, "n_spills", 0)  # the interpreter compiles nothing

        return launch


class Trials:
    """A kernel's configurations on one problem.

    run: launches it, anew each time; expected: what it should give, float32, up to `limit` of the largest value.
    """

    def __init__(
        self, kernel: Tunable, run: Callable[[], torch.Tensor], expected: torch.Tensor, limit: float, clock: Clock
    ) -> None:
        self.kernel, self.run, self.expected, self.limit, self.clock = kernel, run, expected, limit, clock
        self.shape: Shape = ()  # the class of shapes, and
        self.safe: Config = ()  # what runs without an entry: as the kernel says
        with self._tried(None):
            run()
        self.times: dict[Config, float | None] = {}  # None: refused

    def search(self) -> float | None:
        """The best time: from the safe configuration, each number in turn is set to the best of its choices.

        None when all were refused.
        """
        best = self.safe
        for place, choices in enumerate(self.kernel.choices):
            line = [best, *((*best[:place], choice, *best[place + 1 :]) for choice in choices)]
            for config in line:
                if config not in self.times:
                    self.times[config] = self._measure(config)
            best = min(line, key=lambda config: self._ms(config))
        return None if self._ms(best) == math.inf else self._ms(best)

    def result(self, device: torch.device) -> Tuned:
        """What a search has found."""
        best = min(self.times, key=self._ms)
        refused = sum(ms is None for ms in self.times.values())
        name, safe_ms = self.kernel.name(self.shape, device), self.times.get(self.safe)
        return Tuned(name, best, self._ms(best), self.safe, safe_ms, len(self.times), refused)

    def _ms(self, config: Config) -> float:
        ms = self.times.get(config)
        return math.inf if ms is None else ms

    def _measure(self, config: Config) -> float | None:
        from triton.errors import TritonError

        module, name = KERNELS[self.kernel]
        watched = _Watched(getattr(module, name))
        setattr(module, name, watched)
        try:
            with self._tried(config):
                right = (self.run().float() - self.expected).abs() <= self.limit * self.expected.abs().max()
                return self.clock(self.run) if bool(right.all()) and not watched.spilled else None
        except TritonError:  # it cannot be compiled, or needs more shared memory than there is
            return None
        finally:
            setattr(module, name, watched.kernel)

    @contextmanager
    def _tried(self, config: Config | None) -> Iterator[None]:
        def trial(shape: Shape, safe: Config) -> Config:
            self.shape, self.safe = shape, safe
            return config or safe

        with _instead(self.kernel, trial):
            yield


@contextmanager
def _instead(kernel: Tunable, trial: Callable[[Shape, Config], Config]) -> Iterator[None]:
    """Within, `trial` chooses the kernel's configurations."""
    tuning.trials[kernel.kernel] = trial
    try:
        yield
    finally:
        del tuning.trials[kernel.kernel]


@torch.inference_mode()
def tune(checkpoint: Checkpoint, told: Callable[[str], None]) -> list[Tuned]:
    """Measure what a model's linears and attention run fastest with, and keep it in the user's file.

    told: gets a line before each. Raises ShortageError without a CUDA device and Triton.
    """
    if not torch.cuda.is_available() or jit.triton is None:
        raise ShortageError(
            "--tune, and PyTorch sees no CUDA device that Triton runs on", "An NVIDIA GPU, its driver and triton"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    dtype, spec = resolve_dtype("auto", checkpoint, device), model_spec(checkpoint.config)
    other = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)

    def clock(run: Callable[[], object]) -> float:
        return time_ms(run, device, 20, other.zero_)

    found: list[Tuned] = []
    for new in (1, CONTEXT):
        told(f"attention, {new} new tokens")
        found += tune_attention(spec, new, dtype, device, clock)
    for scheme, shape in weights(checkpoint, spec, dtype, device):
        told(f"linear {list(shape)}, {scheme.bits} bits, groups of {scheme.group_size}")
        layer = serving_linear([random_weight(shape, scheme, device)], None, None, dtype, device)
        if isinstance(layer, PackedLinear) and isinstance(layer.product, GroupedProduct):
            found += tune_product(layer.product, shape[1], dtype, device, clock)
    keep(found, tuning.user_file())
    return found


def weights(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> list[tuple[Scheme, tuple[int, int]]]:
    """Schemes and shapes [out, in] of the weights that `GroupedProduct` multiplies with, once each."""
    found: dict[tuple[Scheme, tuple[int, int]], None] = {}
    for row in parameters(spec):
        scheme = scheme_of(row, row.tensors[0], checkpoint.quantization)
        if scheme and scheme.inputs == "none" and packs_on(device, row, checkpoint.quantization, dtype):
            found[scheme, (row.shape[0], row.shape[1])] = None
    return list(found)


def tune_product(
    product: GroupedProduct, columns: int, dtype: torch.dtype, device: torch.device, clock: Clock
) -> list[Tuned]:
    """Its tiles for every class of numbers of rows, and up to how many rows it beats the dense product."""
    dense, found, most, most_ms = product.dequantize(columns, torch.float32), list[Tuned](), 0, 0.0
    classes: list[Shape] = []

    def trial(shape: Shape, safe: Config) -> Config:
        classes.append(shape)
        return safe

    with _instead(quantized_linear.MOST_ROWS, trial):
        for rows in ROWS:
            x = torch.randn(rows, columns, device=device).to(dtype)
            expected = linear(x.float(), dense)
            trials = Trials(quantized_linear.TILE, partial(product, x), expected, LIMITS[dtype], clock)
            ms = trials.search()
            if ms is not None:
                found.append(trials.result(device))
            dense_ms = clock(lambda x=x: linear(x, product.dequantize(columns, dtype)))  # type: ignore[misc]
            if ms is not None and ms <= dense_ms and most == max((r for r in ROWS if r < rows), default=0):
                most, most_ms = rows, ms
    if most:
        config, name = (max(most, ROWS[1]),), quantized_linear.MOST_ROWS.name(classes[0], device)
        found.append(Tuned(name, config, most_ms, (quantized_linear.CROSSOVER,), None, len(ROWS), 0))
    return found


def tune_attention(spec: ModelSpec, new: int, dtype: torch.dtype, device: torch.device, clock: Clock) -> list[Tuned]:
    """Of steps of one query a sequence, or of one prompt of `new` tokens."""
    window = None if None in spec.windows else spec.windows[0]
    context, sequences = min(CONTEXT, spec.max_positions), 32 if new == 1 else 1
    new, per = min(new, context), -(-context // BLOCK)
    tables = [range(s * per, (s + 1) * per) for s in range(sequences)]
    batch = AttentionBatch.build([new] * sequences, [context] * sequences, {window: tables}, BLOCK, device)
    shape = (2 * spec.kv_heads, per * sequences, BLOCK, spec.head_dim)
    cache = KvCache(torch.randn(shape, device=device).to(dtype))
    q = torch.randn(sequences * new, spec.heads, spec.head_dim, device=device).to(dtype)
    arguments = q, cache, batch.of(window), spec.attention_scale, spec.attention_softcap
    if not paged.attends(q, cache):
        return []
    expected = paged_attention_reference(*arguments).float()
    trials = Trials(paged.TILE, partial(paged.attention, *arguments), expected, LIMITS[dtype], clock)
    return [] if trials.search() is None else [trials.result(device)]


def keep(found: Sequence[Tuned], path: Path) -> None:
    """Add entries to a file of them, which is there as a whole at any time."""
    tuned = tuning.entries(path) | {one.name: one.config for one in found}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f"{path.name}.{os.getpid()}")
    partial_file.write_text(json.dumps({"format": tuning.FORMAT, "tuned": tuned}, indent=1), encoding="utf-8")
    partial_file.replace(path)
    tuning.entries.cache_clear()
    tuning._measured.cache_clear()
