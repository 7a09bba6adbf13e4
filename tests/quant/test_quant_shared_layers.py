"""`quantize` of layers that read keys of earlier layers and a vector of each token (Gemma 4)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import VOCAB
from support.tiny_quantized import piece_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.progress import SilentProgress
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.weight_loader import load_model
from llmkit.quant import layer_stream, methods
from llmkit.quant.algorithm import AutoRound
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.memory_estimate import hidden_bytes
from llmkit.quant.output_quality import score_logits
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

pytestmark = pytest.mark.usefixtures("short_builtin_text")

BASE = QuantizeOptions(
    "gptq", group_size=16, samples=3, seq_len=64, eval_windows=2, device="cpu", evaluate=False
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return piece_checkpoint("shared keys, input of each layer", tmp_path_factory.mktemp("model"))


@pytest.fixture
def one_window_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of one window, which share the scratch caches."""
    monkeypatch.setattr(layer_stream, "BATCH_TOKENS", 1)


@pytest.fixture
def short_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "AutoRound", partial(AutoRound, steps=4))


def run(source: Path, out: Path, options: QuantizeOptions) -> dict[str, Any]:
    return dict(quantize(str(source), str(out), options, SilentProgress()))


def windows(count: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(1))


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("one_window_each")
def test_layer_stream_gives_transformers_logits_of_shared_layers(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    spec = checkpoint_spec(checkpoint)
    assert spec.kv_source_layers == {0, 1}
    assert spec.per_layer_input_size
    streamed = torch.stack(list(LayerStream.from_checkpoint(checkpoint, spec).logits(windows())))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        wanted = oracle(windows(), use_cache=False).logits
    torch.testing.assert_close(streamed, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("one_window_each")
def test_micro_batch_keeps_only_keys_that_later_layers_read(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    spec = checkpoint_spec(checkpoint)
    stream = LayerStream.from_checkpoint(checkpoint, spec)
    batches = stream.embed(windows(), folder=tmp_path)
    for index in range(len(spec.layers)):
        stream.run_layer(stream.layer(index), batches)
    kept = {file.name for file in tmp_path.iterdir()}
    assert kept == {"per-layer.bin"} | {
        f"hidden-{batch}.bin{suffix}" for batch in range(3) for suffix in ("", ".kv-0", ".kv-1")
    }
    in_memory = stream.embed(windows())
    for index in range(len(spec.layers)):
        stream.run_layer(stream.layer(index), in_memory)
    for on_disk, other in zip(batches, in_memory, strict=True):
        assert torch.equal(on_disk.hidden, other.hidden)


def test_embed_reads_rows_of_the_texts_tokens_only(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_stream, "EMBEDDED_TOKENS", 2)
    monkeypatch.setattr(layer_stream, "CHUNK_BYTES", 1 << 12)
    checkpoint = open_checkpoint(source)
    spec = checkpoint_spec(checkpoint)
    stream = LayerStream.from_checkpoint(checkpoint, spec)
    tokens = torch.tensor([[7, 500, 7, 9, 500, 31]])
    (batch,) = stream.embed(tokens)
    model = load_model(checkpoint, torch.float32)
    hidden = model.embed_tokens(tokens[0])
    assert torch.equal(batch.hidden, hidden)
    wanted = model.embed_tokens.per_layer_inputs(tokens[0], hidden)
    for index in range(len(spec.layers)):
        torch.testing.assert_close(batch.per_layer_input(index), wanted[:, index])
    assert batch._per_layer_inputs.shape == (4, 4, 8), "of 4 distinct tokens"


@pytest.mark.usefixtures("one_window_each")
@pytest.mark.parametrize(
    "options",
    [
        replace(BASE, effort="max"),
        replace(BASE, method="auto"),
        replace(BASE, method="awq"),
        replace(BASE, method="fp8", group_size=None, static_activations=True, kv="fp8"),
        replace(BASE, target_bits=6.0),
    ],
    ids=["gptq, learned rounding", "auto", "awq", "static fp8", "mixed precision"],
)
def test_quantize_measures_what_the_loaded_output_computes(
    source: Path, tmp_path: Path, short_learning: None, options: QuantizeOptions
) -> None:
    report = run(source, tmp_path / "out", replace(options, evaluate=True))
    scored: list[tuple[Any, ...]] = []
    models = [
        load_model(open_checkpoint(path), torch.float32) for path in (tmp_path / "out", source)
    ]
    text = windows()
    streams = []
    for path in (tmp_path / "out", source):
        checkpoint = open_checkpoint(path)
        streams.append(LayerStream.from_checkpoint(checkpoint, checkpoint_spec(checkpoint)))
    for stream, model in zip(streams, models, strict=True):
        streamed = list(stream.logits(text))
        loaded = list(window_logits(model, text))
        torch.testing.assert_close(torch.stack(streamed), torch.stack(loaded), atol=1e-4, rtol=1e-4)
        scored.append((streamed, loaded))
    quality = score_logits(scored[0][1], scored[1][1], text)
    assert 0 < report["quality"]["mean_kl"] < 0.5
    assert 0 < quality.mean_kl < 0.5  # type: ignore[operator]
    layers = {entry["name"].split(".")[1] for entry in report["linears"]}
    assert layers == {"0", "1", "2", "3"}


@pytest.mark.usefixtures("one_window_each")
def test_quantize_with_hidden_states_on_disk_gives_the_same_bytes(
    source: Path, tmp_path: Path, short_learning: None
) -> None:
    options = replace(BASE, effort="max", samples=2)
    run(source, tmp_path / "memory", options)
    run(source, tmp_path / "disk", replace(options, offload="disk"))
    assert weights(tmp_path / "memory") == weights(tmp_path / "disk")
    files = [sorted(file.name for file in (tmp_path / at).iterdir()) for at in ("disk", "memory")]
    assert files[0] == files[1]


class StopInLayer(SilentProgress):
    """Interrupts a run when it has quantized some layers."""

    def __init__(self, num_layers: int) -> None:
        self.left = num_layers
        self.stage = ""

    def start(self, stage: str, total: int, unit: str) -> None:
        self.stage = stage

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n * (self.stage == "quantize")
        if not self.left:
            raise KeyboardInterrupt


def test_resume_of_shared_layers_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """Their keys come from layers that the interrupted run has quantized."""
    options = replace(BASE, effort="fast")
    run(source, tmp_path / "whole", options)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(source), str(tmp_path / "out"), options, StopInLayer(3))
    run(source, tmp_path / "out", options)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_static_kv_scales_of_shared_layers_serve(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", replace(BASE, format="compressed-tensors", kv="fp8"))
    options = EngineOptions(device="cpu", kv_cache_memory=1 << 20, kv_cache_dtype="fp8")
    engine = load_engine(tmp_path / "out", options)
    assert engine.model.new_kv_cache(1, kv_cache_dtype="fp8").scales is None
    (answer,) = engine.generate(
        [[5, 6, 7, 8] * 8], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    )
    assert len(answer) == 4


def test_hidden_bytes_count_what_later_layers_read(source: Path) -> None:
    spec = checkpoint_spec(open_checkpoint(source))
    keys_and_values = 2 * 2 * 16 + 2 * 2 * 32
    per_layer_inputs = 4 * 8 // 4
    assert hidden_bytes(spec, 2, 3) == 4 * 2 * 3 * (64 + keys_and_values + per_layer_inputs)


def test_snapshot_shares_keys_and_keeps_its_hidden_states(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    stream = LayerStream.from_checkpoint(checkpoint, checkpoint_spec(checkpoint))
    (batch,) = stream.embed(windows(1))
    for index in (0, 1):
        stream.run_layer(stream.layer(index), [batch])
    copy = batch.snapshot()
    before = batch.hidden.clone()
    layer = stream.layer(2)
    stream.run_layer(layer, [batch])
    assert torch.equal(copy.hidden, before)
    stream.run_layer(layer, [copy])
    assert torch.equal(copy.hidden, batch.hidden)
