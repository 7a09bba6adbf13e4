"""On a CUDA device: short convolutions and Mamba 2 against torch in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.recurrent_cases import Conv, Scan, copy_of, ragged_steps

from llmkit.kernels.causal_conv import (
    causal_conv,
    causal_conv_torch,
    gated_short_conv,
    gated_short_conv_torch,
)
from llmkit.kernels.mamba2 import gated_group_rms_norm, mamba2_scan, mamba2_scan_torch
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NUM_TOKENS = 700
# Heads, head_dim, state_size, groups: those of Granite 4 and Nemotron-H, and odd ones.
SIZES = ((8, 64, 128, 1), (16, 64, 128, 8), (4, 100, 72, 2))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Which the kernels do not give."""
    with torch.inference_mode():
        yield


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """To the precision of the dtype, of values of the size that most of them have."""
    error = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 2e-4}[dtype]
    scale = expected.square().mean().sqrt().item()
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=error, atol=4 * error * scale)


def on_device(state: RecurrentState, dtype: torch.dtype) -> RecurrentState:
    return RecurrentState(state.conv.to(DEVICE, dtype), state.state.to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_causal_conv_on_gpu(gated: bool, dtype: torch.dtype) -> None:
    conv = Conv(3 if gated else 4, gated=gated, num_tokens=NUM_TOKENS)
    parameters = (conv.x, conv.weight, conv.bias)
    x, weight, bias = (None if part is None else part.to(dtype) for part in parameters)
    assert x is not None
    assert weight is not None
    states = on_device(conv.shape.states(), dtype)
    reference = copy_of(RecurrentState(states.conv.float().cpu(), states.state.cpu()))
    steps = ragged_steps(NUM_TOKENS)
    batch = RecurrentBatch.build(*steps, device=DEVICE)
    host_batch = RecurrentBatch.build(*steps)
    wide = (x.float(), weight.float(), None if bias is None else bias.float())
    narrow = (x.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE))
    if gated:
        y = gated_short_conv(*narrow, states, batch)
        expected = gated_short_conv_torch(*wide, reference, host_batch)
    else:
        y = causal_conv(*narrow, states, batch, silu=True)
        expected = causal_conv_torch(*wide, reference, host_batch, silu=True)
    assert y.dtype == dtype
    assert_near(y, expected, dtype)
    assert_near(states.conv, reference.conv, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mamba2_scan_on_gpu(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    scan = Scan(sizes, num_tokens=NUM_TOKENS)
    xbc, dt = scan.xbc.to(dtype), scan.dt.to(dtype)
    parameters = (scan.A_log, scan.D, scan.dt_bias)
    states = on_device(scan.shape.states(), dtype)
    reference = copy_of(scan.shape.states())
    steps = ragged_steps(NUM_TOKENS)
    y = mamba2_scan(
        xbc.to(DEVICE),
        dt.to(DEVICE),
        *(parameter.to(DEVICE) for parameter in parameters),
        scan.n_groups,
        scan.limit,
        states,
        RecurrentBatch.build(*steps, device=DEVICE),
    )
    expected = mamba2_scan_torch(
        xbc.float(),
        dt.float(),
        *parameters,
        scan.n_groups,
        scan.limit,
        reference,
        RecurrentBatch.build(*steps),
    )
    assert y.dtype == dtype
    assert_near(y, expected, dtype)
    assert_near(states.state, reference.state, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_group_norm_on_gpu(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 70, 3072, generator=draw).to(dtype)
    weight = torch.randn(3072, generator=draw).to(dtype)
    for num_groups in (1, 8):
        arguments = (x.to(DEVICE), gate.to(DEVICE), weight.to(DEVICE), 1e-5, num_groups)
        expected = gated_group_rms_norm(x.float(), gate.float(), weight.float(), 1e-5, num_groups)
        assert_near(gated_group_rms_norm(*arguments), expected, dtype)
