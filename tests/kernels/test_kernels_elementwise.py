"""The small Triton kernels against torch: by the interpreter, and compiled for two GPUs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.elementwise_cases import (
    NORM_SHAPES,
    TOLERANCES,
    add_norm_arguments,
)
from support.triton_checks import compiled_for, interpreted

from llmkit.kernels import elementwise
from llmkit.kernels.elementwise import (
    Activation,
    act,
    act_and_mul,
    add_layer_norm,
    add_residual,
    add_rms_norm,
    layer_norm,
    rms_norm,
    xielu,
)

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
KernelResults = dict[str, list[tuple[tuple[Any, ...], Any]]]


def kernel_calls() -> list[tuple[Any, ...]]:
    """The name of each function that launches a kernel, and its arguments."""
    calls: list[tuple[Any, ...]] = []
    for rows, size, dtype in NORM_SHAPES:
        hidden, update, scale, weight, eps = add_norm_arguments(rows, size, dtype)
        calls.append(("add_rms_norm_triton", hidden, update, scale, weight, eps))
        bias = random(size).to(dtype) if rows != 3 else None
        calls.append(("add_layer_norm_triton", hidden + 1, update, scale, weight, bias, eps))
    for dtype in (torch.float32, torch.float16):
        for rows, size in ((1, 1536), (5, 100)):
            x = (random(rows, 2 * size, seed=2) * 4).to(dtype)
            x[0, :3] = torch.tensor([90.0, -90.0, 0.0])
            x[0, 3] = torch.nan
            for activation in ACTIVATIONS:
                calls.append(("act_and_mul_triton", x, activation))
                calls.append(("act_triton", x, activation))
        for size in (5, 3000):
            x = xielu_inputs(size).to(dtype)
            x[-1] = torch.nan
            calls.append(("xielu_triton", x, *xielu_parameters()))
        for rows, size, limit in ((1, 1536, 7.0), (5, 100, 3.0)):
            x = random(rows, 2 * size, seed=4).mul(6).to(dtype)
            x[0, :3] = torch.tensor([90.0, -90.0, float("nan")])
            calls.append(("swiglu_clamped_triton", x, limit, 1.702))
    return calls


@pytest.fixture(scope="module")
def kernel_results(
    tmp_path_factory: pytest.TempPathFactory,
) -> KernelResults:
    """Arguments and result of each call, by function; from one interpreter, which starts slowly."""
    calls = kernel_calls()
    folder = tmp_path_factory.mktemp("interpreted")
    outputs = interpreted("support.elementwise_cases", "run_elementwise", calls, folder)
    results: KernelResults = {}
    for (name, *arguments), output in zip(calls, outputs, strict=True):
        results.setdefault(name, []).append((tuple(arguments), output))
    return results


def test_add_rms_norm_matches_torch(kernel_results: KernelResults) -> None:
    for call, got in kernel_results["add_rms_norm_triton"]:
        with torch.enable_grad():  # torch's own form
            expected = add_rms_norm(*call)
        limit = TOLERANCES[call[0].dtype]
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=limit, rtol=limit)


@pytest.mark.parametrize("grad", [False, True])
def test_add_rms_norm_without_update_or_weight(grad: bool) -> None:
    hidden, update, scale, weight, eps = add_norm_arguments(5, 100, torch.float32)
    with torch.set_grad_enabled(grad):
        total = add_residual(hidden, update, scale)
        torch.testing.assert_close(total, hidden + 0.4 * update)
        for given, wanted in (
            ((None, weight), (hidden, rms_norm(hidden, weight, eps))),
            ((update, None), (total, total)),
            ((update, weight), (total, rms_norm(total, weight, eps))),
        ):
            for ours, theirs in zip(
                add_rms_norm(hidden, given[0], scale, given[1], eps), wanted, strict=True
            ):
                assert torch.equal(ours, theirs)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_norm_in_float64(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    x = x.double()
    centered = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centered * centered).sum(-1, keepdim=True) / x.shape[-1]
    normed = centered / (variance + eps).sqrt() * weight.double()
    return normed if bias is None else normed + bias.double()


@pytest.mark.parametrize("grad", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (2, 3, 64), (40, 1001)])
def test_layer_norm_on_a_cpu(shape: tuple[int, ...], biased: bool, grad: bool) -> None:
    x = random(*shape) + 3
    weight = random(shape[-1], seed=1)
    bias = random(shape[-1], seed=2) if biased else None
    with torch.set_grad_enabled(grad):
        y = layer_norm(x, weight, bias, 1e-5)
        half = layer_norm(x.half(), weight.half(), None if bias is None else bias.half(), 1e-5)
    expected = layer_norm_in_float64(x, weight, bias, 1e-5)
    torch.testing.assert_close(y.double(), expected, atol=3e-6, rtol=3e-6)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("grad", [False, True])
def test_add_layer_norm_without_update_weight_or_bias(grad: bool) -> None:
    hidden, update, scale, weight, eps = add_norm_arguments(5, 100, torch.float32)
    bias = random(100)
    with torch.set_grad_enabled(grad):
        total = add_residual(hidden, update, scale)
        for used_update, used_weight, used_bias, before in (
            (None, weight, bias, hidden),
            (update, None, None, total),
            (update, weight, None, total),
            (update, weight, bias, total),
        ):
            after = before
            if used_weight is not None:
                after = layer_norm_in_float64(before, used_weight, used_bias, eps).float()
            ours = add_layer_norm(hidden, used_update, scale, used_weight, used_bias, eps)
            assert torch.equal(ours[0], before)
            torch.testing.assert_close(ours[1], after, atol=2e-6, rtol=2e-6)


def test_add_layer_norm_matches_torch(kernel_results: KernelResults) -> None:
    for call, (total, normed) in kernel_results["add_layer_norm_triton"]:
        hidden, update, scale, weight, bias, eps = call
        limit = TOLERANCES[hidden.dtype]
        expected = (hidden.double() + scale * update.double()).to(hidden.dtype)
        torch.testing.assert_close(total, expected, atol=limit, rtol=limit)
        after = layer_norm_in_float64(total, weight, bias, eps).to(hidden.dtype)
        torch.testing.assert_close(normed, after, atol=limit, rtol=limit)


def act_in_float64(x: torch.Tensor, activation: str) -> torch.Tensor:
    x = x.double()
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    if activation == "gelu":
        return x * torch.special.erfc(-x / 2**0.5) / 2
    if activation == "gelu_tanh":
        return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    return torch.where(x < 0, 0.0, x * x)


EDGES = torch.tensor([0.0, -0.0, 100, -100, 1e-30, 88, -88, 20, -5.5, 1e-6, -1e-6])


@pytest.mark.parametrize("grad", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1, 16, 1003, 24000])
def test_act_on_a_cpu(size: int, activation: Activation, grad: bool) -> None:
    x = random(size) * 4
    x[: len(EDGES)] = EDGES[:size]
    with torch.set_grad_enabled(grad):
        y = act(x.view(1, size), activation)
        assert y.shape == (1, size)
        expected = act_in_float64(x, activation)
        torch.testing.assert_close(y[0].double(), expected, atol=1e-6, rtol=1e-6)
        x[-1] = torch.nan
        assert act(x, activation).isnan().nonzero().tolist() == [[size - 1]]


@pytest.mark.parametrize("grad", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 16), (3, 44), (3, 48), (130, 3072)])
def test_act_and_mul_on_a_cpu(shape: tuple[int, int], activation: Activation, grad: bool) -> None:
    """Compiled, except where no whole vectors of eight are left, and in torch."""
    x = random(*shape) * 4
    x[0, :8] = EDGES[:8]
    gate, up = x.double().chunk(2, -1)
    with torch.set_grad_enabled(grad):
        y = act_and_mul(x, activation)
    expected = act_in_float64(gate, activation) * up
    limit = 5e-6 if grad else 1e-6  # torch's error function is less exact
    torch.testing.assert_close(y.double(), expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_kernels_match_torch(activation: Activation, kernel_results: KernelResults) -> None:
    compared = 0
    for name in ("act_triton", "act_and_mul_triton"):
        for (x, used), got in kernel_results[name]:
            if used != activation:
                continue
            compared += 1
            gate, up = x.double().chunk(2, -1)
            expected = act_in_float64(x if name == "act_triton" else gate, activation)
            if name == "act_and_mul_triton":
                expected *= up
            limit = 2e-3 if x.dtype == torch.float16 else 1e-5
            torch.testing.assert_close(
                got, expected.to(x.dtype), rtol=limit, atol=1e-5, equal_nan=True
            )
    assert compared == 8


def xielu_parameters(alpha_p: float = 0.3, alpha_n: float = -0.7) -> list[torch.Tensor]:
    """Two of one dimension and two of none, as in Apertus' checkpoints."""
    alphas = [torch.tensor([alpha_p]), torch.tensor([alpha_n])]
    return [*alphas, torch.tensor(0.5), torch.tensor(-1e-6)]


def xielu_in_float64(x: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    alpha_p, alpha_n, beta, eps = (float(parameter) for parameter in parameters)
    alpha_p = math.log1p(math.exp(alpha_p))
    alpha_n = beta + math.log1p(math.exp(alpha_n))
    x = x.double()
    negative = alpha_n * (x.clamp(max=eps).expm1() - x)
    return torch.where(x > 0, alpha_p * x * x, negative) + beta * x


def xielu_inputs(size: int) -> torch.Tensor:
    x = random(size) * 3
    edges = torch.tensor([0.0, 1e-7, -1e-7, -1e-6, -1e-4, -0.69, -0.71, -90.0, 40.0, -1e-2])
    x[: len(edges)] = edges[:size]
    return x


@pytest.mark.parametrize("grad", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("size", [3, 8, 1003, 24000])
def test_xielu_on_a_cpu(size: int, grad: bool) -> None:
    x = xielu_inputs(size)
    with torch.set_grad_enabled(grad):
        for parameters in (xielu_parameters(), xielu_parameters(25.0, -8.0)):
            y = xielu(x.view(1, size), *parameters)[0]
            expected = xielu_in_float64(x, parameters)
            torch.testing.assert_close(y.double(), expected, atol=2e-6, rtol=2e-6)
        x[-1] = torch.nan
        assert xielu(x, *parameters).isnan().nonzero().tolist() == [[size - 1]]


def test_xielu_is_transformers_activation() -> None:
    """In float32 and in 16 bits, whose parameters are rounded as a checkpoint's are."""
    from transformers.activations import XIELUActivation

    x = xielu_inputs(300)
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 3e-2)):
        theirs = XIELUActivation(dtype=dtype)
        with torch.no_grad():
            y = xielu(x.to(dtype), theirs.alpha_p, theirs.alpha_n, theirs.beta, theirs.eps)
            expected = theirs._xielu_python(x.to(dtype))
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, atol=limit, rtol=limit)


def test_xielu_kernel_matches_torch(kernel_results: KernelResults) -> None:
    for (x, *parameters), got in kernel_results["xielu_triton"]:
        expected = xielu_in_float64(x, parameters).to(x.dtype)
        limit = TOLERANCES[x.dtype]
        torch.testing.assert_close(got, expected, atol=limit, rtol=limit, equal_nan=True)


def swiglu_clamped_in_float64(x: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    gate, up = x.double().chunk(2, -1)
    gate = torch.where(gate > limit, limit, gate)
    up = torch.where(up.abs() > limit, up.sign() * limit, up)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (3, 100), (130, 3072)])
def test_swiglu_clamped_on_a_cpu(shape: tuple[int, int], grad: bool) -> None:
    """Compiled, and in torch."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 6
    x[0, :8] = torch.tensor([0.0, -0.0, 100, -100, 1e-30, 7, -7, 20])
    x[0, -8:] = torch.tensor([0.0, -0.0, 100, -100, 1e-30, 7, -7, 20])
    with torch.set_grad_enabled(grad):
        for limit, alpha in ((7.0, 1.702), (2.5, 1.0)):
            out = elementwise.swiglu_clamped(x, limit, alpha)
            expected = swiglu_clamped_in_float64(x, limit, alpha)
            torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
        x[0, 1] = torch.nan
        x[0, -2] = torch.nan
        out = elementwise.swiglu_clamped(x, 7.0)
        assert out[0, 1].isnan() and out[0, -2].isnan() and out[0, 0].isfinite()


def test_swiglu_clamped_kernel_matches_torch(kernel_results: KernelResults) -> None:
    for (x, limit, alpha), got in kernel_results["swiglu_clamped_triton"]:
        expected = swiglu_clamped_in_float64(x, limit, alpha).to(x.dtype)
        limit = 2e-3 if x.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(got, expected, rtol=limit, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("capability", "tile", "warps", "subtract_mean", "biased"),
    [
        (90, 1024, 2, False, False),
        (90, 4096, 8, True, True),
        (90, elementwise.MAX_HIDDEN, 16, False, False),
        (80, 1024, 2, True, False),
        (80, 4096, 8, False, False),
        (80, elementwise.MAX_HIDDEN, 16, True, True),
    ],
)
def test_add_norm_kernel_compiles(
    capability: int, tile: int, warps: int, subtract_mean: bool, biased: bool, tmp_path: Path
) -> None:
    kinds = dict.fromkeys(("residual", "update", "weight", "total", "normed"), "*bf16")
    kinds |= {"scale": "fp32", "eps": "fp32", "size": "i32"}
    kinds["num_scales"] = "i32"
    constants: dict[str, object] = {"TILE": tile, "SUBTRACT_MEAN": subtract_mean}
    constants |= {
        "normed_scales": None,
        "static_scale": None,
        "GROUP": 0,
        "MAX_VALUE": 0.0,
        "E8M0": False,
    }
    if biased:
        kinds["bias"] = "*bf16"
    else:
        constants["bias"] = None
    kernel = elementwise._add_norm_kernel
    compiled = compiled_for(capability, kernel, kinds, constants, tmp_path, num_warps=warps)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 1024


@pytest.mark.parametrize(
    ("capability", "activation"),
    [(80, "silu"), (80, "gelu_tanh"), *((90, activation) for activation in ACTIVATIONS)],
)
def test_act_and_mul_kernel_compiles(capability: int, activation: str, tmp_path: Path) -> None:
    types = {"gate_up": "*bf16", "y": "*bf16", "size": "i32"}
    constants = {"ACTIVATION": activation, "TILE": 1024}
    kernel = elementwise._act_and_mul_kernel
    assert compiled_for(capability, kernel, types, constants, tmp_path).stack_bytes == 0


def test_act_and_xielu_kernels_compile(tmp_path: Path) -> None:
    types = {"x": "*bf16", "y": "*bf16", "size": "i32"}
    constants: dict[str, object] = {"TILE": 1024}
    of_act = constants | {"ACTIVATION": "gelu"}
    assert compiled_for(90, elementwise._act_kernel, types, of_act, tmp_path).stack_bytes == 0
    types |= dict.fromkeys(("alpha_p", "alpha_n", "beta", "eps"), "*fp32")
    assert compiled_for(90, elementwise._xielu_kernel, types, constants, tmp_path).stack_bytes == 0


def test_swiglu_clamped_kernel_compiles(tmp_path: Path) -> None:
    types = {"gate_up": "*bf16", "y": "*bf16", "size": "i32", "limit": "fp32", "alpha": "fp32"}
    kernel = elementwise._swiglu_clamped_kernel
    assert compiled_for(90, kernel, types, {"TILE": 1024}, tmp_path).stack_bytes == 0
