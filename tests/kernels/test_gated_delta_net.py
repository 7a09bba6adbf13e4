"""The gated delta rule: its forms against transformers', however a sequence is cut into steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gated_delta_cases import Inputs, Steps, run_delta_rule
from support.triton_checks import SHARED_BYTES, compiled_for, interpreted
from transformers.models.qwen3_next import modeling_qwen3_next

from llmkit.kernels import gated_delta_net, gated_delta_net_triton
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.gated_delta_net import (
    gated_delta_rule_reference,
    gated_delta_rule_torch,
    gated_rms_norm,
)
from llmkit.kernels.recurrent_state import CHUNK_TOKENS, NO_ROW, RecurrentBatch, RecurrentState

GatedDeltaRule = Callable[..., torch.Tensor]
NUM_ROWS = 8


@dataclass(frozen=True)
class Compiled:
    """A function at one level of the compiled kernels."""

    level: str
    run: GatedDeltaRule = gated_delta_net.gated_delta_rule

    def __call__(self, *arguments: Any) -> torch.Tensor:
        assert cpu_kernels.library is not None
        cpu_kernels.library.set_level(self.level)
        try:
            return self.run(*arguments)
        finally:
            cpu_kernels.library.set_level(cpu_kernels.levels()[-1])

    @property
    def __name__(self) -> str:
        return self.level


COMPILED = [Compiled(level) for level in cpu_kernels.levels()]
FORMS = [gated_delta_rule_reference, gated_delta_rule_torch, *COMPILED]


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    assert cpu_kernels.library is not None
    before = cpu_kernels.library.num_threads()
    cpu_kernels.library.set_num_threads(request.param)
    yield request.param
    cpu_kernels.library.set_num_threads(before)


@dataclass(frozen=True)
class Layer:
    """The sizes and parameters of a layer, and inputs of its recurrence."""

    k_heads: int = 2
    v_heads: int = 4
    k_dim: int = 16
    v_dim: int = 24
    seed: int = 0

    def inputs(self, num_tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """qkv and ba."""
        generator = torch.Generator().manual_seed(seed)
        width = 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim
        qkv = torch.randn(num_tokens, width, generator=generator)
        return qkv, torch.randn(num_tokens, 2 * self.v_heads, generator=generator)

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """A_log, dt_bias and the number of key heads."""
        generator = torch.Generator().manual_seed(self.seed)
        A_log = torch.rand(self.v_heads, generator=generator).mul(4).log()
        return A_log, torch.randn(self.v_heads, generator=generator) - 2, self.k_heads

    def state(self, num_rows: int = NUM_ROWS, fill: float = 0.0) -> RecurrentState:
        shape = num_rows, self.v_heads, self.k_dim, self.v_dim
        return RecurrentState(torch.empty(num_rows, 0, 0), torch.full(shape, fill))

    def oracle(
        self, qkv: torch.Tensor, ba: torch.Tensor, initial: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' outputs [T, Hv, V], and the state after the last token [Hv, K, V]."""
        A_log, dt_bias, _ = self.parameters()
        keys = self.k_heads * self.k_dim
        q, k, v = qkv[None].split((keys, keys, self.v_heads * self.v_dim), -1)
        b, a = ba[None].chunk(2, -1)
        out, state = modeling_qwen3_next.torch_recurrent_gated_delta_rule(
            q.unflatten(2, (-1, self.k_dim)),
            k.unflatten(2, (-1, self.k_dim)),
            v.unflatten(2, (-1, self.v_dim)),
            g=-A_log.exp() * torch.nn.functional.softplus(a + dt_bias),
            beta=b.sigmoid(),
            initial_state=None if initial is None else initial[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return out[0], state[0]


def close(found: torch.Tensor, expected: torch.Tensor, limit: float = 2e-5) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


def run_in_steps(
    rule: GatedDeltaRule,
    layer: Layer,
    qkv: torch.Tensor,
    ba: torch.Tensor,
    state: RecurrentState,
    step: int,
) -> torch.Tensor:
    """A sequence in steps of so many tokens. Its state is in row 3."""
    outputs = []
    for begin in range(0, len(qkv), step):
        part = slice(begin, begin + step)
        num_tokens = len(qkv[part])
        batch = RecurrentBatch.build([num_tokens], [3 if begin else NO_ROW], [[(num_tokens, 3)]])
        outputs.append(rule(qkv[part], ba[part], *layer.parameters(), state, batch))
    return torch.cat(outputs)


@pytest.mark.parametrize("rule", FORMS)
@pytest.mark.parametrize("step", [1, 7, 64, 130])
@torch.inference_mode()
def test_gated_delta_rule_equals_transformers(rule: GatedDeltaRule, step: int) -> None:
    layer = Layer()
    qkv, ba = layer.inputs(130)
    state = layer.state()
    expected, final = layer.oracle(qkv, ba)
    close(run_in_steps(rule, layer, qkv, ba, state, step), expected)
    close(state.state[3], final)
    assert not state.state[:3].any() and not state.state[4:].any()


def mixed_batch(
    rule: GatedDeltaRule, layer: Layer, state: RecurrentState, lens: Sequence[int] = (70, 1, 3, 5)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A prompt with two checkpoints, a decode, draft tokens, and a sequence that keeps nothing."""
    writes = [[(64, 0), (70, 1)], [(1, 2)], [(1, 3), (2, 4), (3, 5)], []]
    batch = RecurrentBatch.build(lens, [NO_ROW, 2, 3, 6], writes)
    qkv, ba = layer.inputs(sum(lens))
    return rule(qkv, ba, *layer.parameters(), state, batch), qkv, ba


@pytest.mark.parametrize("rule", FORMS)
@torch.inference_mode()
def test_gated_delta_rule_reads_and_writes_rows(rule: GatedDeltaRule) -> None:
    layer = Layer()
    state = layer.state()
    state.state.normal_(generator=torch.Generator().manual_seed(2))
    before = state.state.clone()
    out, qkv, ba = mixed_batch(rule, layer, state)

    def oracle(begin: int, end: int, initial: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        initial_state = None if initial is None else before[initial]
        return layer.oracle(qkv[begin:end], ba[begin:end], initial_state)

    for begin, end, initial in ((0, 70, None), (70, 71, 2), (71, 74, 3), (74, 79, 6)):
        close(out[begin:end], oracle(begin, end, initial)[0])
    ends = [(0, 64, None), (0, 70, None), (70, 71, 2), (71, 72, 3), (71, 73, 3), (71, 74, 3)]
    for row, part in enumerate(ends):
        close(state.state[row], oracle(*part)[1])
    assert torch.equal(state.state[6:], before[6:])


@pytest.mark.parametrize("rule", FORMS)
@torch.inference_mode()
def test_gated_delta_rule_decodes_a_batch(rule: GatedDeltaRule) -> None:
    layer = Layer(k_heads=3, v_heads=3)
    state = layer.state()
    state.state.normal_(generator=torch.Generator().manual_seed(2))
    before = state.state.clone()
    batch = RecurrentBatch.build([1, 1, 1], [4, NO_ROW, 1], [[(1, 4)], [(1, 0)], [(1, 2), (1, 1)]])
    qkv, ba = layer.inputs(3)
    out = rule(qkv, ba, *layer.parameters(), state, batch)
    for i, (initial, rows) in enumerate([(before[4], [4]), (None, [0]), (before[1], [1, 2])]):
        expected, after = layer.oracle(qkv[i : i + 1], ba[i : i + 1], initial)
        close(out[i : i + 1], expected)
        for row in rows:
            close(state.state[row], after)


@pytest.mark.parametrize("rule", FORMS)
@torch.inference_mode()
def test_gated_delta_rule_keeps_nan_in_its_sequence(rule: GatedDeltaRule) -> None:
    layer = Layer()
    clean = layer.state(fill=0.5)
    expected, *_ = mixed_batch(rule, layer, clean)
    state = layer.state(fill=0.5)
    state.state[[0, 1, 2, 4, 5, 7]] = torch.nan  # row 2 is the only one of them that is read
    out, *_ = mixed_batch(rule, layer, state)
    assert out[70].isnan().all()
    assert torch.equal(out[:70], expected[:70])
    assert torch.equal(out[71:], expected[71:])
    assert state.state[2].isnan().all()
    for row in (0, 1, 3, 4, 5, 6):
        assert torch.equal(state.state[row], clean.state[row])


@pytest.mark.parametrize("rule", FORMS)
@torch.inference_mode()
def test_gated_delta_rule_needs_no_rows_for_fresh_batches(rule: GatedDeltaRule) -> None:
    """As in calibration; a sequence may have no tokens."""
    layer = Layer()
    qkv, ba = layer.inputs(13)
    batch = RecurrentBatch.fresh(np.array([9, 0, 4]), torch.device("cpu"))
    out = rule(qkv, ba, *layer.parameters(), layer.state(num_rows=0), batch)
    close(out[:9], layer.oracle(qkv[:9], ba[:9])[0])
    close(out[9:], layer.oracle(qkv[9:], ba[9:])[0])


LAYERS = [Layer(), Layer(3, 3, 17, 37), Layer(1, 2, 128, 128)]


@pytest.mark.parametrize("rule", COMPILED)
@pytest.mark.parametrize("layer", LAYERS)
@torch.inference_mode()
def test_gated_delta_rule_compiled_does_not_depend_on_steps(
    rule: GatedDeltaRule, layer: Layer, num_threads: int
) -> None:
    qkv, ba = layer.inputs(70)
    expected, final = layer.oracle(qkv, ba)
    found = []
    for step in (70, 1, 7, 64):
        state = layer.state()
        out = run_in_steps(rule, layer, qkv, ba, state, step)
        found.append((out, state.state[3]))
    close(found[0][0], expected)
    close(found[0][1], final)
    for out, last in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(last, found[0][1])


@pytest.mark.parametrize("rule", COMPILED)
@torch.inference_mode()
def test_gated_delta_rule_compiled_does_not_depend_on_the_batch(
    rule: GatedDeltaRule, num_threads: int
) -> None:
    layer = Layer()
    state = layer.state()
    state.state.normal_(generator=torch.Generator().manual_seed(2))
    alone = RecurrentState(state.conv, state.state.clone())
    out, qkv, ba = mixed_batch(rule, layer, state)
    parts = [
        (slice(0, 70), NO_ROW, [(64, 0), (70, 1)]),
        (slice(70, 71), 2, [(1, 2)]),
        (slice(71, 74), 3, [(1, 3), (2, 4), (3, 5)]),
        (slice(74, 79), 6, []),
    ]
    for tokens, initial_row, writes in parts:
        num_tokens = tokens.stop - tokens.start
        batch = RecurrentBatch.build([num_tokens], [initial_row], [writes])
        found = rule(qkv[tokens], ba[tokens], *layer.parameters(), alone, batch)
        assert torch.equal(found, out[tokens])
    assert torch.equal(alone.state, state.state)


@pytest.mark.skipif(not COMPILED, reason=f"compiled kernels: {cpu_kernels.status()}")
@torch.inference_mode()
def test_gated_delta_rule_and_norm_are_recorded() -> None:
    """What a decode step replays reads rows and inputs anew."""
    layer = Layer()
    parameters = layer.parameters()
    state = layer.state()
    batch = RecurrentBatch.build([1, 1], [0, 1], [[(1, 0)], [(1, 1)]])
    qkv, ba = layer.inputs(2)
    z, weight = torch.randn(2, layer.v_heads, layer.v_dim), torch.randn(layer.v_dim)
    with cpu_kernels.recording() as recorder:
        out = gated_delta_net.gated_delta_rule(qkv, ba, *parameters, state, batch)
        normed = gated_rms_norm(out, z, weight, 1e-6)
    program = recorder.program()
    qkv.copy_(layer.inputs(2, seed=5)[0])
    batch.initial_rows[1] = NO_ROW
    batch.write_rows[:] = [2, 3]
    again = RecurrentState(state.conv, state.state.clone())
    assert cpu_kernels.library is not None
    cpu_kernels.library.run(program)
    expected = gated_delta_net.gated_delta_rule(qkv, ba, *parameters, again, batch)
    assert torch.equal(out, expected)
    assert torch.equal(normed, gated_rms_norm(expected, z, weight, 1e-6))
    assert torch.equal(state.state, again.state)
    assert state.state[2].any()


@pytest.mark.parametrize("lens", [[9], [5, 4], [1] * 9])
def test_gated_delta_rule_has_gradients(lens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_delta_net, "CHUNK_TOKENS", 4)
    layer = Layer()
    qkv, ba = layer.inputs(9)
    A_log, dt_bias, k_heads = layer.parameters()
    batch = RecurrentBatch.fresh(np.array(lens), torch.device("cpu"))
    gradients = []
    for rule in (gated_delta_rule_reference, gated_delta_net.gated_delta_rule):
        leaves = [leaf.clone().requires_grad_() for leaf in (qkv, ba, A_log, dt_bias)]
        out = rule(*leaves, k_heads, layer.state(num_rows=0), batch)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for expected, found in zip(*gradients, strict=True):
        assert expected is not None
        assert found is not None
        assert expected.any() or max(lens) == 1  # one token from zeros has no decay
        close(found, expected, 1e-4)


# A decode, draft tokens, a prompt with a checkpoint and two copies of its end, a prompt that is not
# kept, and a sequence without tokens.
MIXED: Steps = (
    [1, 3, 70, 20, 0],
    [0, 1, 2, NO_ROW, NO_ROW],
    [[(1, 0)], [(1, 1), (3, 3)], [(65, 4), (70, 2), (70, 5)], [], []],
)
LONG: Steps = ([150], [NO_ROW], [[(40, 0), (150, 1)]])
IN_GRAPH: Steps = ([1, 18, 0], [0, 2, NO_ROW], [[(1, 0)], [(5, 3), (18, 2)], []])
TritonCall = tuple[Inputs, torch.Tensor, Steps, bool]


def triton_call(
    layer: Layer,
    steps: Steps,
    dtype: torch.dtype = torch.float32,
    *,
    in_graph: bool = False,
    equal_keys: bool = False,
) -> TritonCall:
    """Arguments of `run_delta_rule` after the first. equal_keys: and betas and decays near 1."""
    qkv, ba = layer.inputs(sum(steps[0]))
    if equal_keys:
        qkv[:] = qkv[:1]
        ba[:, : layer.v_heads] = 6
        ba[:, layer.v_heads :] = -6
    states = layer.state().state.normal_(generator=torch.Generator().manual_seed(2))
    return (qkv.to(dtype), ba.to(dtype), *layer.parameters()), states, steps, in_graph


def with_nan(call: TritonCall) -> TritonCall:
    """The same with NaN in rows of states, of which only row 0 is read, and in a prompt."""
    (qkv, *rest), states, *steps = call
    qkv = qkv.clone()
    qkv[30] = torch.nan
    states = states.clone()
    states[[0, 3, 4, 5, 7]] = torch.nan
    return (qkv, *rest), states, *steps


@pytest.fixture(scope="module")
def triton_results(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[Any, tuple[torch.Tensor, ...]]]:
    """Calls of the delta rule's kernels, the last one the first one with NaN, and of the norm's.

    With what they returned.
    """
    small = Layer(1, 2, 16, 20)
    calls = [
        triton_call(small, MIXED),
        triton_call(Layer(1, 1, 16, 16), MIXED, torch.float16),
        triton_call(small, IN_GRAPH, in_graph=True),
        triton_call(Layer(1, 1, 24, 33), LONG, equal_keys=True),
        with_nan(triton_call(small, MIXED)),
    ]
    x, z, module = norm_case(torch.float16)
    norm_call = (x, z, module.weight.detach(), 1e-6)
    folder = tmp_path_factory.mktemp("triton")
    arguments = [*((call, None) for call in calls), (None, norm_call)]
    results = interpreted("support.gated_delta_cases", "run_case", arguments, folder)
    return list(zip([*calls, norm_call], results, strict=True))


def test_gated_delta_rule_kernels_equal_the_reference(triton_results: list[Any]) -> None:
    for (inputs, states, steps, _), (out, after) in triton_results[:-2]:
        expected, expected_after = run_delta_rule("reference", inputs, states, steps)
        limit = 2e-5 if out.dtype == torch.float32 else 2e-3
        close(out.float(), expected.float(), limit)
        close(after, expected_after, limit)
        assert torch.equal(after[6:], states[6:])


def test_gated_delta_rule_kernels_keep_nan_in_their_sequence(triton_results: list[Any]) -> None:
    _, (expected, expected_after) = triton_results[0]
    _, (out, after) = triton_results[-2]
    has_nan = torch.zeros(len(out), dtype=torch.bool)
    has_nan[0] = True  # the decode that reads row 0
    has_nan[4:74] = True  # the prompt with token 30
    assert torch.equal(out[~has_nan], expected[~has_nan])
    assert out[0].isnan().all()
    assert out[30:74].isnan().all()
    for row in (1, 3):
        assert torch.equal(after[row], expected_after[row])


def test_gated_rms_norm_kernel_equals_the_reference(triton_results: list[Any]) -> None:
    (x, z, weight, eps), (y,) = triton_results[-1]
    close(y.float(), gated_rms_norm(x.float(), z.float(), weight, eps), 2e-3)


DELTA_SIZES = {"K": 128, "V": 128, "PADDED_K": 128, "BLOCK_V": 32, "EPS": 1e-6}
CHUNK_SIZES = DELTA_SIZES | {"CHUNK": CHUNK_TOKENS, "PRECISION": "tf32"}
DELTA_KERNELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "_delta_tokens_kernel": (DELTA_SIZES | {"MAX_TOKENS": 16}, {}),
    "_delta_chunks_kernel": (CHUNK_SIZES | {"PADDED_V": 128}, {"num_warps": 8}),
    "_delta_states_kernel": (CHUNK_SIZES, {"num_stages": 2}),
}
FLOATS = {"A_log", "dt_bias", "state", "decays"}
MODEL_DTYPE = {"qkv", "ba", "out", "of_state", "added", "attention"}
INTEGERS = {"qkv_stride", "ba_stride", "row_stride", "num_k_heads", "num_v_heads"}


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "_delta_chunks_kernel",
        "_delta_states_kernel",
        pytest.param("_delta_tokens_kernel", marks=pytest.mark.slow),
    ],
)
def test_gated_delta_rule_kernel_compiles(name: str, capability: int, tmp_path: Path) -> None:
    kernel = getattr(gated_delta_net_triton, name)
    constants, options = DELTA_KERNELS[name]

    def kind(argument: str) -> str:
        if argument in FLOATS:
            return "*fp32"
        if argument in MODEL_DTYPE:
            return "*bf16"
        return "i32" if argument in INTEGERS else "*i32"

    names = set(kernel.arg_names) - constants.keys()
    arguments = {name: kind(name) for name in sorted(names, key=kernel.arg_names.index)}
    compiled = compiled_for(capability, kernel, arguments, constants, tmp_path, **options)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= SHARED_BYTES[89]  # that of all GPUs from sm_80 on
    if capability == 90:
        assert ("HGMMA" in compiled.code) == (name != "_delta_tokens_kernel")


def norm_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 10, 3, 24, generator=generator).to(dtype)
    module = modeling_qwen3_next.Qwen3NextRMSNormGated(24, eps=1e-6).to(dtype)
    module.weight.data.copy_(torch.randn(24, generator=generator))
    return x, z, module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_gated_rms_norm_equals_transformers(dtype: torch.dtype) -> None:
    limit = 1e-6 if dtype == torch.float32 else 2e-2  # transformers rounds between the steps
    x, z, module = norm_case(dtype)
    close(gated_rms_norm(x, z, module.weight, 1e-6), module(x, z), limit)
    x, z = x.flatten(0, 1), z.flatten(0, 1)
    close(gated_rms_norm(x, z, module.weight, 1e-6), module(x, z), limit)


@pytest.mark.parametrize("level", cpu_kernels.levels())
@torch.inference_mode()
def test_gated_rms_norm_reads_a_part_of_rows(level: str) -> None:
    """The gate is a part of a projection's output."""
    x, z, module = norm_case(torch.float32)
    projected = torch.cat((torch.full((10, 7), torch.nan), z.flatten(1)), 1)
    gate = projected[:, 7:].unflatten(1, (3, 24))
    norm = Compiled(level, gated_rms_norm)
    close(norm(x, gate, module.weight, 1e-6), module(x, z), 1e-6)
