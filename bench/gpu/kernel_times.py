"""Times of single kernels beside their bytes and operations: the part `kernels` of `make gpu`.

Shapes are those of Llama-3.1-8B and Qwen3-0.6B. Beside llmkit's kernels stand others where they are
installed: FlashAttention-3, Humming, FlashInfer's sampling; and PyTorch's own: cuBLAS for dense
weights, `_weight_int4pack_mm`, scaled dot product attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from llmkit.bench.gpu.figure_log import FigureLog, NotInstalledError, PartOptions, is_installed
from llmkit.bench.gpu.model_shapes import (
    BLOCK_SIZE,
    WEIGHT_SCHEMES,
    product_type,
    random_weight,
    scale_bytes,
)
from llmkit.bench.gpu.timing import kernel_ms
from llmkit.kernels import flash_attention, sampling, sampling_triton
from llmkit.kernels import paged_attention as triton_attention
from llmkit.kernels.attention import paged_attention, rope_and_cache
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.elementwise import act_and_mul, add_rms_norm
from llmkit.kernels.fused_experts import FusedExperts
from llmkit.kernels.input_quant import quantize_input
from llmkit.kernels.kv_cache import KV_CACHE_DTYPES, KVCache
from llmkit.kernels.w8a8_linear import W8A8Linear
from llmkit.model.linear import ActivationQuant, Linear, serving_linear

Launch = Callable[[], object]
HEADS = 32
KV_HEADS = 8
DIM = 128
GROUP_SIZE = 128
LLMKIT = "llmkit"
FLOAT_FORMATS = ("fp8-blocks", "mxfp8", "mxfp4", "nvfp4")  # of WEIGHT_SCHEMES
UNPADDED = "not padded to 17 rows"
# [out, in] of the linear layers, by model and layer.
LINEAR_SHAPES: dict[tuple[str, str], tuple[int, int]] = {
    ("Llama-3.1-8B", "gate_up"): (28672, 4096),
    ("Llama-3.1-8B", "down"): (4096, 14336),
    ("Llama-3.1-8B", "qkv"): (6144, 4096),
    ("Llama-3.1-8B", "o_proj"): (4096, 4096),
    ("Llama-3.1-8B", "lm_head"): (128256, 4096),
    ("Qwen3-0.6B", "gate_up"): (6144, 1024),
    ("Qwen3-0.6B", "down"): (1024, 3072),
    ("Qwen3-0.6B", "qkv"): (4096, 1024),
    ("Qwen3-0.6B", "o_proj"): (1024, 2048),
    ("Qwen3-0.6B", "lm_head"): (151936, 1024),
}
VOCAB_SIZES = {"Llama-3.1-8B": 128256, "Qwen3-0.6B": 151936}


@dataclass(frozen=True)
class KernelCase:
    """A launch that is timed."""

    figure: str  # "linear", "attention", ...
    case: str  # what is computed: the same for all implementations
    implementation: str  # "llmkit" or another
    bytes: int  # read and written
    flops: dict[str, float]  # by the type of the inputs
    make: Callable[[], Launch]  # a `functools.partial` that launches the kernel

    @property
    def name(self) -> str:
        """Its name in figures."""
        return f"{self.case}; {self.implementation}"


@dataclass(frozen=True)
class Setting:
    """Where the cases run."""

    device: torch.device
    scale: int = 1  # divides all sizes, to try it on a CPU

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and dense weights."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def randn(self, *shape: int) -> torch.Tensor:
        """Random inputs."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def measure(log: FigureLog, options: PartOptions) -> None:
    """Measure every case; each is a CUDA graph of many launches."""
    setting = Setting(options.device, 64 if options.is_tiny else 1)
    for case in kernel_cases(setting):
        log.measure(
            case.figure, case.name, partial(time_case, case, setting, 2 if options.is_tiny else 10)
        )


def time_case(case: KernelCase, setting: Setting, repeats: int) -> dict[str, Any]:
    """The time of a launch of this case."""
    with torch.inference_mode():
        run = case.make()
        ms = kernel_ms(run, case.bytes, setting.device, repeats)
    return {
        "case": case.case,
        "implementation": case.implementation,
        "bytes": case.bytes,
        "flops": case.flops,
        "ms": ms,
    }


def kernel_cases(setting: Setting) -> Iterator[KernelCase]:
    """All cases, the most important ones first."""
    yield from sampling_cases(setting, "Llama-3.1-8B", (1, 64, 256))
    yield from linear_cases(setting, "Llama-3.1-8B", (1, 16, 64, 256))
    yield from attention_cases(setting)
    yield from linear_cases(setting, "Qwen3-0.6B", (1, 64))
    yield from linear_cases(setting, "Llama-3.1-8B", (2048,), layers=("gate_up", "o_proj"))
    yield from linear_cases(
        setting, "Llama-3.1-8B", (1, 16, 256), ("gate_up", "o_proj"), FLOAT_FORMATS
    )
    yield from elementwise_cases(setting)
    yield from sampling_cases(setting, "Qwen3-0.6B", (64,))
    yield from expert_cases(setting)


def linear_cases(
    setting: Setting,
    model: str,
    all_rows: tuple[int, ...],
    layers: tuple[str, ...] = (),
    all_weights: tuple[str, ...] = ("int4", "fp8", "bf16"),
) -> Iterator[KernelCase]:
    """Linear layers of a model. `lm_head` is never quantized.

    layers: only these; (): all. all_weights: keys of WEIGHT_SCHEMES.
    """
    for (of_model, layer), shape in LINEAR_SHAPES.items():
        if of_model != model or (layers and layer not in layers):
            continue
        out_features, in_features = (size // setting.scale for size in shape)
        for rows in all_rows:
            for weights in ("bf16",) if layer == "lm_head" else all_weights:
                scheme = WEIGHT_SCHEMES[weights]
                bits = 16 if scheme is None else scheme.bits
                num_bytes = out_features * in_features * bits // 8
                if scheme is not None:
                    num_bytes += out_features * scheme.groups(in_features) * scale_bytes(scheme)
                num_bytes += 2 * rows * (in_features + out_features)
                flops = {product_type(weights): 2.0 * rows * out_features * in_features}
                case = f"{model} {layer} [{out_features}, {in_features}], {weights}, {rows} rows"
                size = (out_features, in_features)
                for name, make in LINEAR_IMPLEMENTATIONS[weights].items():
                    if name in ("tinygemm", UNPADDED) and rows > 16:
                        continue
                    yield KernelCase(
                        "linear", case, name, num_bytes, flops, partial(make, setting, size, rows)
                    )


@cache
def _layer(setting: Setting, size: tuple[int, int], weights: str) -> Any:
    scheme = WEIGHT_SCHEMES[weights]
    if scheme is None:
        return Linear(setting.randn(*size))
    weight = random_weight(size, scheme, setting.device)
    activation_quant = ActivationQuant.of(scheme)
    return serving_linear([weight], None, activation_quant, setting.dtype, setting.device)


def _llmkit_linear(weights: str, setting: Setting, size: tuple[int, int], rows: int) -> Launch:
    if _layer.cache_info().currsize > 2:
        _layer.cache_clear()
    return partial(_layer(setting, size, weights), setting.randn(rows, size[1]))


def _unpadded_fp8(setting: Setting, size: tuple[int, int], rows: int) -> Launch:
    """Without more rows than there are inputs: cuBLAS then chooses other kernels."""
    kernel = getattr(_layer(setting, size, "fp8"), "kernel", None)
    if not isinstance(kernel, W8A8Linear):
        raise NotInstalledError("it needs a GPU with FP8 products")
    return partial(_multiply_unpadded, kernel, setting.randn(rows, size[1]))


def _multiply_unpadded(kernel: W8A8Linear, x: torch.Tensor) -> torch.Tensor:
    return kernel(quantize_input(x, replace(kernel.input_quant, min_rows=1)))


def _tinygemm(setting: Setting, size: tuple[int, int], rows: int) -> Launch:
    if setting.device.type != "cuda":
        raise NotInstalledError("it needs a CUDA device")
    packed = torch.randint(0, 255, (size[0], size[1] // 2), device="cuda").to(torch.uint8)
    weight = torch._convert_weight_to_int4pack(packed, 8)
    scales = torch.ones(
        size[1] // GROUP_SIZE, size[0], 2, device=setting.device, dtype=torch.bfloat16
    )
    x = setting.randn(rows, size[1])
    return partial(torch._weight_int4pack_mm, x, weight, GROUP_SIZE, scales)


def _humming(setting: Setting, size: tuple[int, int], rows: int) -> Launch:
    if not is_installed("humming"):
        raise NotInstalledError("humming-kernels is not installed")
    layer = import_module("humming.layer").HummingLayer(
        shape_n=size[0],
        shape_k=size[1],
        weight_config={"dtype": "int4", "group_size": GROUP_SIZE},
        torch_dtype=torch.bfloat16,
    )
    layer = layer.to(setting.device)
    layer.load_from_unquantized(setting.randn(*size))
    layer.transform()
    return partial(layer, setting.randn(rows, size[1]))


LINEAR_IMPLEMENTATIONS: dict[str, dict[str, Callable[[Setting, tuple[int, int], int], Launch]]] = {
    "bf16": {f"{LLMKIT} (cuBLAS)": partial(_llmkit_linear, "bf16")},
    "fp8": {LLMKIT: partial(_llmkit_linear, "fp8"), UNPADDED: _unpadded_fp8},
    "int4": {
        LLMKIT: partial(_llmkit_linear, "int4"),
        "tinygemm": _tinygemm,
        "Humming": _humming,
    },
    **{weights: {LLMKIT: partial(_llmkit_linear, weights)} for weights in FLOAT_FORMATS},
}


def attention_cases(setting: Setting) -> Iterator[KernelCase]:
    """Decode steps, also with one long context among short ones, and a prefill."""
    for query_len, contexts, kv_cache_dtype in (
        (1, [1024] * 64, None),
        (1, [1024] * 256, None),
        (1, [1024], None),
        (1, [1024] * 64, "fp8"),
        (1, [32768] + [256] * 63, None),
        (2048, [2048], None),
        (1, [32768], None),
    ):
        contexts = [max(16, context // setting.scale) for context in contexts]
        contexts = contexts[: max(2, len(contexts) // setting.scale)]
        query_len = min(query_len, min(contexts))
        tokens = sum(contexts)
        element_bytes = 1 if kv_cache_dtype else 2
        num_bytes = tokens * 2 * KV_HEADS * DIM * element_bytes
        num_bytes += 2 * 2 * len(contexts) * query_len * HEADS * DIM
        attended = sum(query_len * n - query_len * (query_len - 1) // 2 for n in contexts)
        flops = {"bf16": 4.0 * HEADS * DIM * attended}
        mixed = "" if len(set(contexts)) == 1 else f", one of {max(contexts)}"
        case = f"{len(contexts)} x {query_len} queries, context {contexts[-1]}{mixed}"
        if kv_cache_dtype:
            case += f", {kv_cache_dtype} KV"
        for name, implementation in ATTENTION_IMPLEMENTATIONS.items():
            make = partial(implementation, setting, query_len, contexts, kv_cache_dtype)
            yield KernelCase("attention", case, name, num_bytes, flops, make)


def _attention_inputs(
    setting: Setting, query_len: int, contexts: list[int], kv_cache_dtype: str | None
) -> tuple[Any, ...]:
    tables = []
    used = 0
    for context in contexts:
        blocks = -(-context // BLOCK_SIZE)
        tables.append(list(range(used, used + blocks)))
        used += blocks
    batch = AttentionBatch.build(
        [query_len] * len(contexts), contexts, {None: tables}, BLOCK_SIZE, setting.device
    )
    shape = (2 * KV_HEADS, used, BLOCK_SIZE)
    kv = setting.randn(*shape, DIM)
    scales = None
    if kv_cache_dtype:
        kv = kv.to(KV_CACHE_DTYPES[kv_cache_dtype])
        scales = torch.full((*shape, 1), 0.01, device=setting.device)
    q = setting.randn(len(contexts) * query_len, HEADS, DIM)
    return q, KVCache(kv, scales), batch.metadata(None), DIM**-0.5


def _served_attention(setting: Setting, *shape: Any) -> Launch:
    return partial(paged_attention, *_attention_inputs(setting, *shape))


def _triton_attention(setting: Setting, *shape: Any) -> Launch:
    arguments = _attention_inputs(setting, *shape)
    if not triton_attention.supports(*arguments[:2]):
        raise NotInstalledError("the Triton kernel does not run here")
    attention: Callable[..., object] = triton_attention.attention
    return partial(attention, *arguments, None)


def _flash_attention(setting: Setting, *shape: Any) -> Launch:
    arguments = _attention_inputs(setting, *shape)
    if not flash_attention.supports(*arguments[:2]):
        raise NotInstalledError("no FlashAttention-3 runs here for this cache")
    attention: Callable[..., object] = flash_attention.attention
    return partial(attention, *arguments, None)


def _torch_attention(
    setting: Setting, query_len: int, contexts: list[int], kv_cache_dtype: str | None
) -> Launch:
    """Without pages: keys and values of one sequence are together in memory."""
    if len(set(contexts)) > 1 or kv_cache_dtype or query_len == 1:
        raise NotInstalledError("it does not compute this")
    batch = len(contexts)
    q = setting.randn(batch, HEADS, query_len, DIM)
    k, v = (setting.randn(batch, KV_HEADS, contexts[0], DIM) for _ in range(2))
    return partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)


ATTENTION_IMPLEMENTATIONS: dict[str, Callable[..., Launch]] = {
    f"{LLMKIT} (as served)": _served_attention,
    f"{LLMKIT} (Triton)": _triton_attention,
    "FlashAttention-3": _flash_attention,
    "torch SDPA": _torch_attention,
}


def sampling_cases(setting: Setting, model: str, batches: tuple[int, ...]) -> Iterator[KernelCase]:
    """Sampling from the logits of a decode graph, greedy and with top-k and top-p."""
    vocab_size = VOCAB_SIZES[model] // setting.scale
    for batch in batches:
        for is_greedy in (True, False):
            kind = "greedy" if is_greedy else "top-k 50, top-p 0.95"
            for name, implementation in SAMPLING_IMPLEMENTATIONS.items():
                if is_greedy and name == "FlashInfer":
                    continue
                yield KernelCase(
                    "sampling",
                    f"{model} [{batch}, {vocab_size}], {kind}",
                    name,
                    2 * batch * vocab_size,
                    {},
                    partial(implementation, setting, batch, vocab_size, is_greedy),
                )


def _llmkit_sampling(setting: Setting, batch: int, vocab_size: int, is_greedy: bool) -> Launch:
    device = setting.device
    logits = 2 * setting.randn(batch, vocab_size)
    arguments = (
        torch.full((batch,), 0.0 if is_greedy else 0.8, device=device),
        torch.full((batch,), 0 if is_greedy else 50, device=device),
        torch.full((batch,), 1.0 if is_greedy else 0.95, device=device),
        torch.zeros(batch, device=device),
        torch.arange(batch, device=device),
        torch.ones(batch, dtype=torch.int64, device=device),
    )
    on_gpu = device.type == "cuda"
    return partial(sampling_triton.sample if on_gpu else sampling.sample, logits, *arguments)


def _torch_sampling(setting: Setting, batch: int, vocab_size: int, is_greedy: bool) -> Launch:
    logits = 2 * setting.randn(batch, vocab_size)
    return partial(torch.argmax, logits, -1) if is_greedy else partial(sample_with_torch, logits)


def sample_with_torch(logits: torch.Tensor) -> torch.Tensor:
    """Top-k 50, then top-p 0.95 of those, as PyTorch's operators do it."""
    values, tokens = (logits.float() / 0.8).topk(50)
    probs = values.softmax(-1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= 0.95, 0.0)
    choice = (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)
    return tokens.gather(-1, choice)[:, 0]


def _flashinfer_sampling(setting: Setting, batch: int, vocab_size: int, is_greedy: bool) -> Launch:
    if not is_installed("flashinfer"):
        raise NotInstalledError("flashinfer is not installed")
    sample = import_module("flashinfer.sampling").top_k_top_p_sampling_from_logits
    return partial(sample, 2 * torch.randn(batch, vocab_size, device=setting.device), 50, 0.95)


SAMPLING_IMPLEMENTATIONS: dict[str, Callable[[Setting, int, int, bool], Launch]] = {
    LLMKIT: _llmkit_sampling,
    "torch": _torch_sampling,
    "FlashInfer": _flashinfer_sampling,
}


def elementwise_cases(setting: Setting) -> Iterator[KernelCase]:
    """The kernels between the linear layers of Llama-3.1-8B. Their inputs fit into the L2 cache."""
    hidden = 4096 // setting.scale
    intermediate = 14336 // setting.scale
    qkv_size = (HEADS + 2 * KV_HEADS) * DIM
    for rows in (1, 64, 256):
        for name, num_bytes, make in (
            ("residual sum and norm", 8 * rows * hidden, _add_norm),
            ("gated activation", 6 * rows * intermediate, _activation),
            ("QK norm, rotation and cache", 4 * rows * qkv_size, _rope_cache),
        ):
            size = intermediate if make is _activation else hidden
            yield KernelCase(
                "elementwise",
                f"{name}, {rows} rows",
                LLMKIT,
                num_bytes,
                {},
                partial(make, setting, rows, size),
            )


def _add_norm(setting: Setting, rows: int, hidden: int) -> Launch:
    weight = torch.ones(hidden, dtype=setting.dtype, device=setting.device)
    x, update = (setting.randn(rows, hidden) for _ in range(2))
    return partial(add_rms_norm, x, update, 1.0, weight, 1e-5)


def _activation(setting: Setting, rows: int, intermediate: int) -> Launch:
    return partial(act_and_mul, setting.randn(rows, 2 * intermediate), "silu")


def _rope_cache(setting: Setting, rows: int, _: int) -> Launch:
    blocks = -(-rows // BLOCK_SIZE)
    cache = KVCache(setting.randn(2 * KV_HEADS, blocks, BLOCK_SIZE, DIM))
    heads = setting.randn(rows, HEADS + 2 * KV_HEADS, DIM)
    norms = (torch.ones(DIM, dtype=setting.dtype, device=setting.device),) * 2
    cos_sin = (torch.ones(rows, 1, DIM, device=setting.device),) * 2
    slots = torch.arange(rows, device=setting.device)
    return partial(rope_and_cache, heads, HEADS, norms, 1e-5, cos_sin, cache, slots)


def expert_cases(setting: Setting) -> Iterator[KernelCase]:
    """The experts of a layer of Qwen3-30B-A3B, all equally likely. They need a GPU."""
    num_experts = 128
    top_k = 8
    weight_elements = 3 * 2048 * 768
    for tokens in (1, 32, 128, 2048):
        read = num_experts * (1 - (1 - top_k / num_experts) ** tokens)
        num_bytes = int(read * weight_elements * 2) + 4 * tokens * 2048
        yield KernelCase(
            "experts",
            f"Qwen3-30B-A3B, {tokens} tokens",
            LLMKIT,
            num_bytes,
            {"bf16": 2.0 * tokens * top_k * weight_elements},
            partial(_experts, setting, num_experts, top_k, tokens),
        )


def _experts(setting: Setting, num_experts: int, top_k: int, tokens: int) -> Launch:
    if setting.device.type != "cuda":
        raise NotInstalledError("it needs a CUDA device")
    up = setting.randn(num_experts, 2 * 768, 2048)
    down = setting.randn(num_experts, 2048, 768)
    experts = FusedExperts(up, down, 0, num_experts, gelu=False)
    weights, expert_ids = torch.rand(tokens, num_experts, device=setting.device).topk(top_k)
    return partial(experts, setting.randn(tokens, 2048), expert_ids, weights)
