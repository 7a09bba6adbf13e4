"""Short convolutions against transformers': cut in every way, at every level, in Triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cpu_levels import computing_at
from support.recurrent_cases import (
    TOKENS,
    Conv,
    StateShape,
    assert_same,
    copy_of,
    ragged_batch,
    run_in_pieces,
    sequences_of,
)
from transformers.models.lfm2.configuration_lfm2 import Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_fn

from llmkit.kernels.causal_conv import causal_conv, causal_conv_torch, gated_short_conv
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState

needs_library = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)
WIDTHS = (4, 3, 6)


@pytest.fixture(autouse=True, params=[*cpu_kernels.levels(), "torch"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run each test in torch, and at every level that this processor has."""
    with computing_at(request.param), torch.no_grad():
        yield request.param


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("silu", [True, False])
def test_causal_conv_equals_that_of_transformers(width: int, silu: bool) -> None:
    conv = Conv(width, bias=silu)
    state = conv.shape.states()
    batch = RecurrentBatch.build([TOKENS], [-1], [[(TOKENS, 1)]])
    y = causal_conv(conv.x, conv.weight, conv.bias, state, batch, silu)
    activation = "silu" if silu else None
    expected = causal_conv1d_fn(conv.x.T[None], conv.weight, conv.bias, activation)[0].T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.conv[1], conv.x[1 - width :])


def test_gated_short_conv_equals_that_of_lfm2() -> None:
    config = Lfm2Config(
        hidden_size=40,
        conv_L_cache=3,
        conv_bias=True,
        num_hidden_layers=1,
        layer_types=["conv"],
    )
    torch.manual_seed(0)
    module = Lfm2ShortConv(config, 0)
    hidden = torch.randn(TOKENS, 40)
    state = StateShape(3, 40).states()
    batch = RecurrentBatch.build([TOKENS], [-1], [[]])
    y = gated_short_conv(
        module.in_proj(hidden), module.conv.weight[:, 0], module.conv.bias, state, batch
    )
    torch.testing.assert_close(module.out_proj(y), module(hidden[None])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_causal_conv_does_not_depend_on_cuts(gated: bool, level: str) -> None:
    conv = Conv(gated=gated)
    whole = conv.shape.states()
    expected = run_in_pieces(conv, whole, [TOKENS])
    for lengths in ([1, 89], [7, 83], [64, 26], [2, 3, 85], [1] * TOKENS):
        state = conv.shape.states()
        assert_same(run_in_pieces(conv, state, lengths), expected, level)
        assert torch.equal(state.conv[3], whole.conv[3])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gated", [False, True])
def test_causal_conv_does_not_depend_on_other_sequences(
    width: int, gated: bool, level: str
) -> None:
    conv = Conv(width, gated=gated)
    together = conv.shape.states()
    before = copy_of(together)
    batch = ragged_batch(TOKENS)
    y = conv(slice(None), together, batch)
    alone = copy_of(before)
    for tokens, own in sequences_of(batch):
        assert_same(conv(tokens, alone, own), y[tokens], level)
    assert torch.equal(alone.conv, together.conv)
    assert not torch.equal(together.conv[:10], before.conv[:10])
    assert torch.equal(together.conv[10:], before.conv[10:])


@pytest.mark.parametrize("end", [1, 2, 3, 5])
def test_causal_conv_writes_inputs_at_positions(end: int) -> None:
    """A write after fewer tokens than the state has takes older inputs from the initial row."""
    conv = Conv()
    state = conv.shape.states()
    inputs = torch.cat((state.conv[3].clone(), conv.x))
    batch = RecurrentBatch.build([8], [3], [[(end, 1), (8, 3)]])
    conv(slice(0, 8), state, batch)
    assert torch.equal(state.conv[1], inputs[end : end + 3])
    assert torch.equal(state.conv[3], inputs[8:11])


def test_causal_conv_keeps_nan_within_its_sequence(level: str) -> None:
    conv = Conv()
    state = conv.shape.states()
    batch = ragged_batch(TOKENS)
    expected = conv(slice(None), copy_of(state), batch)
    first, decode, drafts, last = (tokens for tokens, _ in sequences_of(batch))
    conv.x = conv.x.clone()
    conv.x[decode] = torch.nan
    state.conv[[0, 1, 2, 9, 10, 11]] = torch.nan  # rows that are not read
    state.conv[5] = torch.nan
    y = conv(slice(None), state, batch)
    assert y[decode].isnan().all()
    assert y[drafts].isnan()[:3].all()
    assert_same(y[drafts][3], expected[drafts][3], level)
    assert_same(y[first], expected[first], level)
    assert_same(y[last], expected[last], level)
    assert not state.conv[[0, 1, 2, 9]].isnan().any()


def test_causal_conv_passes_gradients() -> None:
    conv = Conv(bias=True)
    state = conv.shape.states()
    batch = RecurrentBatch.build([50, 40], [-1, -1], [[], []])
    x = conv.x.clone().requires_grad_()
    weight = conv.weight.clone().requires_grad_()
    with torch.enable_grad():
        causal_conv(x, weight, conv.bias, state, batch, silu=True).square().sum().backward()
    got = x.grad, weight.grad
    x.grad = weight.grad = None
    with torch.enable_grad():
        parts = [
            causal_conv1d_fn(part.T[None], weight, conv.bias, "silu")[0].T
            for part in x.split([50, 40])
        ]
        torch.cat(parts).square().sum().backward()
    for actual, expected in zip(got, (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_causal_conv_computes_16_bits_in_float32() -> None:
    conv = Conv(3)
    state = conv.shape.states()
    half = RecurrentState(state.conv.bfloat16(), state.state)
    batch = ragged_batch(TOKENS)
    bias = None if conv.bias is None else conv.bias.bfloat16()
    y = causal_conv(conv.x.bfloat16(), conv.weight.bfloat16(), bias, half, batch, silu=True)
    assert y.dtype == half.conv.dtype == torch.bfloat16
    expected = causal_conv_torch(
        conv.x.bfloat16().float(),
        conv.weight.bfloat16().float(),
        None if bias is None else bias.float(),
        RecurrentState(state.conv.bfloat16().float(), state.state),
        batch,
        silu=True,
    )
    assert torch.equal(y, expected.bfloat16())


@needs_library
def test_causal_conv_can_be_recorded(level: str) -> None:
    """A recorded step reads the inputs, rows and states that are there when it is repeated."""
    if level == "torch":
        return
    conv = Conv()
    state = conv.shape.states()
    conv.x = conv.x[:2].clone()
    batch = RecurrentBatch.build([1, 1], [0, 1], [[(1, 0)], [(1, 1)]])
    with cpu_kernels.recording() as recorder:
        y = conv(slice(None), state, batch)
    program = recorder.program()
    conv.x.mul_(-2)
    batch.initial_rows[:] = (5, -1)
    batch.write_rows[:] = (6, 7)
    expected_state = copy_of(state)
    expected = conv(slice(None), expected_state, batch)
    assert cpu_kernels.library is not None
    cpu_kernels.library.run(program)
    assert torch.equal(y, expected)
    assert torch.equal(state.conv, expected_state.conv)


@needs_library
def test_causal_conv_threads_give_the_same_bits(level: str) -> None:
    if level == "torch":
        return
    assert cpu_kernels.library is not None
    conv = Conv(gated=True)
    batch = ragged_batch(TOKENS)
    results = []
    count = cpu_kernels.library.num_threads()
    try:
        for num_threads in (1, 3):
            cpu_kernels.library.set_num_threads(num_threads)
            state = conv.shape.states()
            results.append((conv(slice(None), state, batch), state.conv))
    finally:
        cpu_kernels.library.set_num_threads(count)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
