"""Short convolutions and Mamba 2 in Triton: interpreted against torch, and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.recurrent_cases import Conv, Scan, StateShape, Steps, copy_of, ragged_steps
from support.triton_checks import SHARED_BYTES, compiled_for, interpreted

from llmkit.kernels import causal_conv_triton, mamba2_triton
from llmkit.kernels.causal_conv import causal_conv_torch, gated_short_conv_torch
from llmkit.kernels.mamba2 import gated_group_rms_norm, mamba2_scan_torch
from llmkit.kernels.recurrent_state import NO_ROW, RecurrentBatch, RecurrentState

DECODES: Steps = ([1, 1, 3], [4, NO_ROW, 5], [[(1, 4)], [(1, 2)], [(1, 6), (2, 7), (3, 8)]])
# A long sequence in its own row, one that is not kept, and a NaN in the one between them.
LONG: Steps = ([70, 1, 19], [3, 4, NO_ROW], [[(20, 2), (70, 3)], [(1, 4)], []])
Call = tuple[str, tuple[Any, ...], tuple[torch.Tensor, torch.Tensor], Steps, bool]


def conv_call(conv: Conv, steps: Steps, dtype: torch.dtype = torch.float32) -> Call:
    channels = slice(0, 150)
    num_tokens = sum(steps[0])
    x = conv.x[:num_tokens]
    x = x.unflatten(1, (3, -1))[:, :, channels].flatten(1) if conv.gated else x[:, channels]
    bias = None if conv.bias is None else conv.bias[channels].to(dtype)
    state = StateShape(conv.weight.shape[1], 150).states()
    arguments = (x.to(dtype), conv.weight[channels].to(dtype), bias)
    name = "gated_short_conv" if conv.gated else "causal_conv"
    return name, arguments, (state.conv.to(dtype), state.state), steps, False


def scan_call(
    scan: Scan, steps: Steps, dtype: torch.dtype = torch.float32, in_graph: bool = False
) -> Call:
    num_tokens = sum(steps[0])
    xbc, dt = (part[:num_tokens].to(dtype) for part in (scan.xbc, scan.dt))
    arguments = (xbc, dt, scan.A_log, scan.D, scan.dt_bias, scan.n_groups, scan.limit)
    state = scan.shape.states()
    return "mamba2_scan", arguments, (state.conv[:, :, :0], state.state), steps, in_graph


def calls_of_scan() -> list[Call]:
    small, odd = Scan((2, 32, 16, 1)), Scan((4, 20, 9, 2))
    return [
        scan_call(small, LONG),
        scan_call(odd, ragged_steps(90)),
        scan_call(small, LONG, torch.bfloat16),
        scan_call(odd, DECODES),
        scan_call(small, ([20, 0], [1, NO_ROW], [[(1, 1), (20, 2)], []]), in_graph=True),
    ]


def calls_of_conv() -> list[Call]:
    return [
        conv_call(Conv(4), ragged_steps(60)),
        conv_call(Conv(3, gated=True), LONG, torch.bfloat16),
        conv_call(Conv(3, gated=True, bias=False), DECODES),
        conv_call(Conv(6), DECODES, torch.bfloat16),
    ]


def calls_of_norm() -> list[Call]:
    draw = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 3, 90, generator=draw)
    weight = torch.randn(90, generator=draw)
    no_states = (torch.empty(0), torch.empty(0))
    return [
        ("gated_group_rms_norm", arguments, no_states, DECODES, False)
        for arguments in (
            (x, gate[:, :90], weight, 1e-5, 1, False),
            (x.bfloat16(), gate.bfloat16(), weight.bfloat16(), 1e-5, 3, False),
            (x, gate, weight, 1e-5, 3, True),
            (x, gate, None, 1e-5, 1, False),
        )
    ]


def run_torch(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    name, arguments, states, steps, _ = call
    state = copy_of(RecurrentState(*states))
    batch = RecurrentBatch.build(*steps)
    with torch.no_grad():
        if name == "mamba2_scan":
            y = mamba2_scan_torch(*arguments, state, batch)
        elif name == "gated_group_rms_norm":
            y = gated_group_rms_norm(*arguments)
        elif name == "gated_short_conv":
            y = gated_short_conv_torch(*arguments, state, batch)
        else:
            y = causal_conv_torch(*arguments, state, batch, silu=True)
    return y, state.conv, state.state


def call_with_nan() -> Call:
    """LONG, with NaN in the second sequence and in rows that are not read."""
    name, arguments, (conv, state), steps, in_graph = calls_of_scan()[0]
    xbc, *others = arguments
    xbc = xbc.clone()
    xbc[70] = torch.nan
    state = state.clone()
    state[[0, 1, 2, 5, 6]] = torch.nan
    return name, (xbc, *others), (conv, state), steps, in_graph


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[Call, tuple[torch.Tensor, ...]]]:
    """Of all calls, from one process: it takes seconds to start."""
    calls = [*calls_of_conv(), *calls_of_scan(), *calls_of_norm(), call_with_nan()]
    folder = tmp_path_factory.mktemp("interpreted")
    found = interpreted("support.recurrent_cases", "run_triton", list(calls), folder)
    return list(zip(calls, found, strict=True))


def test_recurrent_kernels_equal_torch(
    results: list[tuple[Call, tuple[torch.Tensor, ...]]],
) -> None:
    for call, got in results[:-1]:
        wide = call[1][0].dtype == torch.float32
        limit = {"rtol": 1e-4, "atol": 2e-4} if wide else {"rtol": 0.02, "atol": 0.06}
        for actual, expected in zip(got, run_torch(call), strict=True):
            torch.testing.assert_close(actual, expected, **limit)


def test_mamba2_kernels_keep_nan_within_its_sequence(
    results: list[tuple[Call, tuple[torch.Tensor, ...]]],
) -> None:
    expected, _, expected_state = results[len(calls_of_conv())][1]
    y, _, state = results[-1][1]
    assert y[70].isnan().all()
    assert torch.equal(y[:70], expected[:70])
    assert torch.equal(y[71:], expected[71:])
    assert torch.equal(state[2:4], expected_state[2:4])


POINTERS = {
    "*fp32": ("A_log", "D", "dt_bias", "states"),
    "*i32": (
        *("query_start_loc", "initial_rows", "write_starts", "write_ends", "write_rows"),
        *("sequences", "segment_starts", "first_writes", "num_writes"),
        *("chunk_starts", "first_tokens", "num_tokens"),
    ),
}
NUMBERS = {"min_dt": "fp32", "max_dt": "fp32", "eps": "fp32"} | dict.fromkeys(
    ("x_stride", "xbc_stride", "dt_stride", "gate_stride", "num_channels", "num_sequences"), "i32"
)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (90, torch.bfloat16),
        pytest.param(80, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(89, torch.float16, marks=pytest.mark.slow),
        pytest.param(80, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_recurrent_kernels_compile(capability: int, dtype: torch.dtype, tmp_path: Path) -> None:
    tiles = mamba2_triton.chunk_tiles(dtype)
    names_of_dtypes = {
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.float32: "*fp32",
    }
    kinds = NUMBERS | {name: kind for kind, names in POINTERS.items() for name in names}
    kinds["before"] = names_of_dtypes[tiles.dtype]
    sizes = {"HEADS": 48, "HEAD_DIM": 64, "STATE_SIZE": 128, "GROUPS": 1, "PADDED_SIZE": 128}
    sizes |= {"MAX_TOKENS": 16, "COLUMNS": 32, "CHUNK": 64, "PRECISION": tiles.precision}
    states = sizes | {"COLUMNS": tiles.state_elements // 128}
    outputs = sizes | {"COLUMNS": tiles.output_columns, "STATE_TILE": tiles.state_tile}
    conv = {"WIDTH": 4, "STATE_TILE": 4, "SILU": True, "GATED": False, "CHANNELS": 128}
    norm = {"SIZE": 8192, "GROUP_SIZE": 8192, "WEIGHT_STRIDE": 8192}
    norm |= {"NORM_BEFORE_GATE": False, "TILE": 8192}
    gpu = mamba2_triton
    for kernel, constants, warps in (
        (causal_conv_triton._causal_conv_kernel, conv | {"TOKENS": 16}, 4),
        (causal_conv_triton._causal_conv_kernel, conv | {"TOKENS": 1}, 4),
        (gpu._scan_tokens_kernel, sizes, 4),
        (gpu._chunk_states_kernel, states, tiles.state_warps),
        (gpu._chunk_outputs_kernel, outputs, 8),
        (gpu._gated_group_norm_kernel, norm, 8),
    ):
        arguments = [name for name in kernel.arg_names if not name.isupper() or name == "D"]
        compiled = compiled_for(
            capability,
            kernel,
            {name: kinds.get(name, names_of_dtypes[dtype]) for name in arguments},
            {name: constants[name] for name in kernel.arg_names if name not in arguments},
            tmp_path,
            num_warps=warps,
        )
        assert compiled.stack_bytes == 0, kernel.__name__
        assert compiled.shared_bytes <= SHARED_BYTES[89]  # that of all GPUs from sm_80 on
