"""Mamba 2's scan against transformers': cut in every way, at every level, in Triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cpu_levels import computing_at
from support.recurrent_cases import (
    SIZES,
    TOKENS,
    Scan,
    assert_same,
    copy_of,
    ragged_batch,
    run_in_pieces,
    sequences_of,
)
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridRMSNormGated,
)
from transformers.models.mamba2.modeling_mamba2 import (
    MambaRMSNormGated,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.mamba2 import gated_group_rms_norm
from llmkit.kernels.recurrent_state import RecurrentBatch

needs_library = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)


@pytest.fixture(autouse=True, params=[*cpu_kernels.levels(), "torch"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run each test in torch, and at every level that this processor has."""
    with computing_at(request.param), torch.no_grad():
        yield request.param


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def transformers_scan(
    scan: Scan, state: torch.Tensor, end: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs and the last state [H, N, P] of the chunkwise form."""
    x, B, C = (part[None, :end] for part in scan.parts)
    y, last = mamba2_chunk_scan(
        x,
        scan.dt[None, :end],
        -scan.A_log.exp(),
        B,
        C,
        chunk_size=16,
        D=scan.D,
        dt_bias=scan.dt_bias,
        initial_states=state.mT[None],
        dt_softplus=True,
        dt_limit=scan.limit,
        return_final_states=True,
    )
    return y[0], last[0].mT


@pytest.mark.parametrize("sizes", SIZES)
def test_mamba2_scan_equals_that_of_transformers(sizes: tuple[int, int, int, int]) -> None:
    scan = Scan(sizes)
    state = scan.shape.states()
    expected, last = transformers_scan(scan, state.state[2])
    _, middle = transformers_scan(scan, state.state[2], 37)
    batch = RecurrentBatch.build([TOKENS], [2], [[(37, 1), (TOKENS, 2)]])
    assert_close(scan(slice(None), state, batch), expected)
    assert_close(state.state[2], last)
    assert_close(state.state[1], middle)


def test_mamba2_scan_of_one_token_equals_that_of_transformers() -> None:
    scan = Scan()
    scan.limit = (0.0, float("inf"))  # transformers does not clamp here
    state = scan.shape.states()
    expected_state = state.state[2:3].mT.clone()
    x, B, C = (part[:1] for part in scan.parts)
    shape = (1, scan.heads, scan.head_dim)
    expected = mamba2_selective_state_update(
        expected_state,
        x,
        scan.dt[:1, :, None].expand(shape),
        -scan.A_log.exp()[:, None, None].expand(*shape[1:], scan.state_size),
        B,
        C,
        scan.D[:, None].expand(shape[1:]),
        dt_bias=scan.dt_bias[:, None].expand(shape[1:]),
        dt_softplus=True,
    )
    y = scan(slice(0, 1), state, RecurrentBatch.build([1], [2], [[(1, 4)]]))
    assert_close(y, expected)
    assert_close(state.state[4], expected_state[0].mT)


def test_mamba2_scan_equals_the_recurrence_in_batches() -> None:
    for sizes in SIZES:
        scan = Scan(sizes)
        state = scan.shape.states()
        expected_state = copy_of(state)
        batch = ragged_batch(TOKENS)
        expected = scan.reference(slice(None), expected_state, batch)
        assert_close(scan(slice(None), state, batch), expected)
        assert_close(state.state, expected_state.state)


@pytest.mark.parametrize("sizes", SIZES)
def test_mamba2_scan_does_not_depend_on_cuts(sizes: tuple[int, int, int, int], level: str) -> None:
    scan = Scan(sizes)
    whole = scan.shape.states()
    expected = run_in_pieces(scan, whole, [TOKENS])
    for lengths in ([1, 89], [7, 83], [64, 26], [2, 3, 85], [1] * TOKENS):
        state = scan.shape.states()
        y = run_in_pieces(scan, state, lengths)
        assert_same(y, expected, level)
        assert_same(state.state[3], whole.state[3], level)


@pytest.mark.parametrize("sizes", SIZES)
def test_mamba2_scan_does_not_depend_on_other_sequences(
    sizes: tuple[int, int, int, int], level: str
) -> None:
    scan = Scan(sizes)
    together = scan.shape.states()
    before = copy_of(together)
    batch = ragged_batch(TOKENS)
    y = scan(slice(None), together, batch)
    alone = copy_of(before)
    for tokens, own in sequences_of(batch):
        assert_same(scan(tokens, alone, own), y[tokens], level)
    assert_same(alone.state, together.state, level)
    assert not torch.equal(together.state[:10], before.state[:10])
    assert torch.equal(together.state[10:], before.state[10:])
    assert torch.equal(together.state[2], together.state[9])  # two writes after the same token


def test_mamba2_scan_keeps_nan_within_its_sequence(level: str) -> None:
    scan = Scan()
    state = scan.shape.states()
    batch = ragged_batch(TOKENS)
    expected = scan(slice(None), copy_of(state), batch)
    first, decode, drafts, last = (tokens for tokens, _ in sequences_of(batch))
    scan.xbc = scan.xbc.clone()
    scan.xbc[decode] = torch.nan
    scan.dt[drafts] = torch.nan
    state.state[[0, 1, 2, 9, 10, 11]] = torch.nan  # rows that are not read
    y = scan(slice(None), state, batch)
    assert y[decode].isnan().all()
    assert y[drafts].isnan().all()
    assert_same(y[first], expected[first], level)
    assert_same(y[last], expected[last], level)
    assert not state.state[[0, 1, 2, 9]].isnan().any()


def test_mamba2_scan_clamps_and_takes_extreme_time_steps() -> None:
    scan = Scan()
    scan.A_log[0] = 5.0
    scan.dt[::3] = 40.0
    scan.dt[1::3] = -100.0
    batch = RecurrentBatch.build([TOKENS], [0], [[(TOKENS, 0)]])
    for limit in ((0.0, float("inf")), (0.001, 0.1)):
        scan.limit = limit
        state = scan.shape.states()
        expected, last = transformers_scan(scan, state.state[0])
        y = scan(slice(None), state, batch)
        assert y.isfinite().all()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(state.state[0], last, rtol=1e-4, atol=1e-4)


def test_mamba2_scan_passes_gradients() -> None:
    scan = Scan(SIZES[1])
    state = scan.shape.states()
    batch = RecurrentBatch.build([50, 40], [-1, -1], [[], []])
    names = ("xbc", "dt", "A_log", "D", "dt_bias")
    for name in names:
        setattr(scan, name, getattr(scan, name).clone().requires_grad_())
    with torch.enable_grad():
        y = scan(slice(None), state, batch)
        got = torch.autograd.grad(y.square().sum(), [getattr(scan, name) for name in names])
        parts = []
        for begin, end in ((0, 50), (50, 90)):
            x, B, C = (part[None, begin:end] for part in scan.parts)
            A = -scan.A_log.exp()
            dt = scan.dt[None, begin:end]
            parts.append(
                mamba2_chunk_scan(
                    x,
                    dt,
                    A,
                    B,
                    C,
                    16,
                    D=scan.D,
                    dt_bias=scan.dt_bias,
                    dt_softplus=True,
                    dt_limit=scan.limit,
                )[0]
            )
        expected = torch.autograd.grad(
            torch.cat(parts).square().sum(), [getattr(scan, name) for name in names]
        )
    for actual, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@needs_library
def test_mamba2_scan_can_be_recorded(level: str) -> None:
    """A recorded step reads the inputs, rows and states that are there when it is repeated."""
    if level == "torch":
        return
    scan = Scan()
    state = scan.shape.states()
    scan.xbc = scan.xbc[:2].clone()
    scan.dt = scan.dt[:2].clone()
    batch = RecurrentBatch.build([1, 1], [0, 1], [[(1, 0)], [(1, 1)]])
    with cpu_kernels.recording() as recorder:
        y = scan(slice(None), state, batch)
    program = recorder.program()
    scan.xbc.mul_(-2)
    scan.dt.add_(1)
    batch.initial_rows[:] = (5, -1)
    batch.write_rows[:] = (6, 7)
    expected_state = copy_of(state)
    expected = scan(slice(None), expected_state, batch)
    assert cpu_kernels.library is not None
    cpu_kernels.library.run(program)
    assert torch.equal(y, expected)
    assert torch.equal(state.state, expected_state.state)


@needs_library
def test_mamba2_threads_give_the_same_bits(level: str) -> None:
    if level == "torch":
        return
    assert cpu_kernels.library is not None
    scan = Scan()
    batch = ragged_batch(TOKENS)
    results = []
    count = cpu_kernels.library.num_threads()
    try:
        for num_threads in (1, 3):
            cpu_kernels.library.set_num_threads(num_threads)
            state = scan.shape.states()
            results.append((scan(slice(None), state, batch), state.state))
    finally:
        cpu_kernels.library.set_num_threads(count)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize(
    "family", [MambaRMSNormGated, GraniteMoeHybridRMSNormGated, NemotronHRMSNormGated]
)
def test_gated_group_norm_equals_that_of_transformers(
    family: type[torch.nn.Module], level: str
) -> None:
    draw = torch.Generator().manual_seed(1)
    for size, num_groups in ((96, 1), (96, 4), (75, 3)):
        x = torch.randn(5, size, generator=draw)
        gate = torch.randn(5, size + 9, generator=draw)[:, 4 : size + 4] * 3
        module = family(size, size // num_groups, eps=1e-5)
        module.weight.copy_(torch.randn(size, generator=draw))
        y = gated_group_rms_norm(x, gate, module.weight, 1e-5, num_groups)
        assert_close(y, module(x, gate))
        alone = gated_group_rms_norm(x[3:4], gate[3:4], module.weight, 1e-5, num_groups)
        assert_same(alone[0], y[3], level)


def test_gated_group_norm_may_come_before_the_gate() -> None:
    draw = torch.Generator().manual_seed(2)
    x, gate = torch.randn(2, 5, 96, generator=draw)
    module = FalconH1RMSNormGated(96, 1e-5, n_groups=4, norm_before_gate=True)
    module.weight.copy_(torch.randn(96, generator=draw))
    y = gated_group_rms_norm(x, gate, module.weight, 1e-5, 4, norm_before_gate=True)
    assert_close(y, module(x, gate))
    only_gate = gated_group_rms_norm(x, gate, None, 1e-5)
    assert_close(only_gate, x * torch.nn.functional.silu(gate))
