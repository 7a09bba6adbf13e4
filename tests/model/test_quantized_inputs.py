"""Decoders of 8-bit linear layers as they run on a GPU, with Triton kernels interpreted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_families import family_oracle
from support.triton_checks import interpreted
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.kernels import elementwise
from llmkit.kernels.activation_quant import FP8, quantize_per_token
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.fp8_block_linear import Fp8BlockLinear
from llmkit.kernels.input_quant import InputQuant
from llmkit.kernels.w8a8_linear import W8A8Linear
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.linear import Linear, PackedLinear, common_input_quant
from llmkit.model.lora import LinearWithLora, LoraManager
from llmkit.model.weight_loader import load_model

GROUP = 32
MODULES = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
PRODUCTS = ("linear", "_int_mm", "_scaled_mm")
NUM_LAYERS = 2
# Launches in a layer beside those of attention, before and after, as docs/performance.md has them.
LAUNCHES = {"dense": (7, 7), "fp8": (11, 8), "int8": (15, 12), "fp8 blocks": (11, 8)}


def w8a8(weight: torch.Tensor, dtype: torch.dtype) -> W8A8Linear:
    q, scales = quantize_per_token(weight, "int8" if dtype == torch.int8 else "fp8")
    return W8A8Linear(q.to(dtype), scales, None)


def fp8_blocks(weight: torch.Tensor) -> Fp8BlockLinear:
    columns = weight.shape[1]
    groups = pad(weight, (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    q, scales = quantize_per_token(groups, "fp8")
    return Fp8BlockLinear(q.flatten(1)[:, :columns].to(FP8), scales.squeeze(-1), GROUP)


KERNELS: dict[str, Callable[[torch.Tensor], W8A8Linear | Fp8BlockLinear]] = {
    "fp8": lambda weight: w8a8(weight, FP8),
    "int8": lambda weight: w8a8(weight, torch.int8),
    "fp8 blocks": fp8_blocks,
}


@dataclass
class Found:
    """The logits of two steps, and their launches by kernel."""

    logits: torch.Tensor
    launches: dict[str, int]


def run(path: str, kind: str) -> tuple[Found, Found]:
    """With inputs quantized in kernels of their own, and in the kernels before."""
    cpu_kernels.library = None
    model = load_model(open_checkpoint(Path(path)), torch.float32)
    assert isinstance(model, Decoder)
    del model.layers[NUM_LAYERS:]
    if kind in KERNELS:
        for layer in model.layers:
            for module in MODULES:
                weight = layer.linears[module].weight
                layer.linears[module] = PackedLinear(KERNELS[kind](weight), tuple(weight.shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise, "runs_triton", lambda _: True)
        patch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda _: type("", (), {"multi_processor_count": 4}),
        )
        fused = steps(model)
        patch.setattr(PackedLinear, "input_quant", None)
        return steps(model), fused


@torch.inference_mode()
def steps(model: Decoder) -> Found:
    """A prompt of 3 tokens, and a decode step."""
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, model.spec.vocab_size, (4,), generator=draw)
    caches = [model.new_kv_cache(2, 16) for _ in model.layers]
    logits = []
    launches: Counter[str] = Counter()
    with count_launches(launches):
        for start, stop in ((0, 3), (3, 4)):
            batch = AttentionBatch.build([stop - start], [stop], {None: [[1]]}, 16)
            hidden = model(tokens[start:stop], torch.arange(start, stop), batch, caches)
            logits.append(model.logits(hidden))
    return Found(torch.cat(logits), dict(launches))


@contextmanager
def count_launches(launches: Counter[str]) -> Iterator[None]:
    """Count Triton's launches and torch's matrix products, the model's head not included."""
    from triton.runtime.interpreter import GridExecutor

    original = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches[self.fn.__name__] += 1
        return original(self, *args, **kwargs)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.overloadpacket.__name__
            if name in PRODUCTS:
                launches[name] += 1
            return func(*args, **kwargs or {})

    with pytest.MonkeyPatch.context() as patch, Products():
        patch.setattr(GridExecutor, "__call__", call)
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Found, Found]]:
    folder = tmp_path_factory.mktemp("models")
    family_oracle("llama", folder / "llama")
    kinds = ["dense", *KERNELS]
    calls = [(str(folder / "llama"), kind) for kind in kinds]
    results = interpreted("model.test_quantized_inputs", "run_plain", calls, folder)
    return dict(zip(kinds, results, strict=True))


def run_plain(path: str, kind: str) -> Any:
    """`run` in types that `torch.load` reads."""
    return [(found.logits, found.launches) for found in run(path, kind)]


@pytest.mark.parametrize("kind", ["dense", *KERNELS])
def test_decoder_gives_the_same_bits_with_inputs_quantized_by_the_kernel_before(
    kind: str, found: dict[str, Any]
) -> None:
    (separate, before), (fused, after) = found[kind]
    assert torch.equal(separate, fused)
    assert separate.isfinite().all()
    heads = 2  # a step ends with the last norm and the head
    per_layer = [(sum(run.values()) - 2 * heads) / 2 / NUM_LAYERS for run in (before, after)]
    # The first layer's first norm has nothing to add. It is torch's, and quantizes nothing.
    first = 1 / NUM_LAYERS
    expected = LAUNCHES[kind]
    assert per_layer[0] == expected[0] - first
    assert per_layer[1] == expected[1] - first + (first if kind != "dense" else 0)


def test_decoder_quantizes_only_what_all_readers_quantize_alike() -> None:
    weight = torch.randn(64, 64)
    fp8 = PackedLinear(w8a8(weight, FP8), (64, 64))
    other = PackedLinear(w8a8(weight, FP8), (64, 64))
    int8 = PackedLinear(w8a8(weight, torch.int8), (64, 64))
    dense = Linear(weight)
    blocks = PackedLinear(fp8_blocks(weight), (64, 64))
    assert common_input_quant([fp8, other]) == InputQuant(FP8)
    assert common_input_quant([blocks]) == InputQuant(FP8, GROUP)
    for readers in ([], [dense], [fp8, dense], [dense, fp8], [fp8, int8], [fp8, blocks]):
        assert common_input_quant(readers) is None


def test_decoder_hands_on_no_quantized_inputs_in_a_step_with_adapters() -> None:
    manager = LoraManager.__new__(LoraManager)
    manager.active_rows = []
    manager.rows_of_slots = None
    base = PackedLinear(w8a8(torch.randn(64, 64), FP8), (64, 64))
    adapted = LinearWithLora(base, manager, None)
    assert adapted.input_quant == InputQuant(FP8)
    manager.active_rows = [(1, slice(0, 1))]
    assert adapted.input_quant is None
    manager.active_rows = []
    manager.rows_of_slots = torch.ones(1, 1, 1, dtype=torch.bool)
    assert adapted.input_quant is None


@pytest.mark.parametrize(
    ("is_moe", "parallel_mlp", "parallel_block", "after_attn_norm", "after_mlp_norm"),
    [
        (False, False, False, True, True),
        (True, False, False, True, False),  # a router reads it
        (True, True, False, True, True),
        (False, False, True, False, True),  # the MLP is dense, and reads attention's input
        (True, False, True, False, False),
    ],
)
def test_decoder_layer_knows_who_reads_a_norm(
    is_moe: bool,
    parallel_mlp: bool,
    parallel_block: bool,
    after_attn_norm: bool,
    after_mlp_norm: bool,
) -> None:
    layer = DecoderLayer.__new__(DecoderLayer)
    fp8 = PackedLinear(w8a8(torch.randn(64, 64), FP8), (64, 64))
    int8 = PackedLinear(w8a8(torch.randn(64, 64), torch.int8), (64, 64))
    layer.linears = {"attn.qkv": fp8, "mlp.gate_up": int8, "mlp.router": Linear(torch.zeros(1))}
    moe = SimpleNamespace(parallel_mlp=parallel_mlp)
    layer.layer = SimpleNamespace(is_moe=is_moe)  # type: ignore[assignment]
    layer.spec = SimpleNamespace(moe=moe, parallel_block=parallel_block)  # type: ignore[assignment]
    assert (layer._input_quant("attn_norm") is not None) == after_attn_norm
    assert (layer._input_quant("mlp_norm") is not None) == after_mlp_norm
