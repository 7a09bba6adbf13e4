"""Norm tuning: gradients layer by layer are those of the whole model, and the loss gets lower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support import tiny_models as tiny
from torch.nn.functional import kl_div, log_softmax

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.progress import SilentProgress
from llmkit.model.families import model_spec
from llmkit.model.linear import ActivationQuant
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.quant import norm_tuning
from llmkit.quant.algorithm import NormTuning
from llmkit.quant.grid import round_to_nearest
from llmkit.quant.layer_stream import LayerStream, MicroBatch
from llmkit.quant.norm_tuning import is_tuned_norm, tune_norms

GATED_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
SETTINGS = NormTuning(steps=24, tokens=128, rate=0.02)
SILENT = SilentProgress()


@dataclass
class Models:
    """A tiny model, the same model with coarse weights, its norms, and text."""

    source: LayerStream
    written: LayerStream
    norms: dict[str, torch.Tensor]
    windows: torch.Tensor  # [24, 32]
    targets: list[MicroBatch]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return dict.fromkeys(self.norms, torch.bfloat16)

    def loss(self, norms: dict[str, torch.Tensor], windows: torch.Tensor) -> float:
        """The mean KL divergence from the source on token windows [n, 32]."""
        stream = self.written.with_values(norms)
        pairs = zip(self.source.logits(windows), stream.logits(windows), strict=True)
        losses = [
            kl_div(
                log_softmax(found, -1),
                log_softmax(wanted, -1),
                log_target=True,
                reduction="batchmean",
            )
            for wanted, found in pairs
        ]
        return torch.stack(losses).mean().item()


def models(tmp_path: Path, architecture: str, bits: int = 3) -> Models:
    sizes = GATED_DELTA_NET if architecture == "qwen3_5_text" else {}
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "model", architecture, **sizes))
    spec = model_spec(checkpoint.config)
    source = LayerStream.from_checkpoint(checkpoint, spec)

    def read(parameter: Parameter) -> torch.Tensor:
        value = source.read(parameter)
        if not parameter.is_linear or not parameter.name.startswith("layers."):
            return value
        return round_to_nearest(value, Scheme(bits, -1), torch.float16).dequantize()

    written = LayerStream(spec, read, read_embeddings=source.read_embeddings)
    norms = {
        parameter.name: source.read(parameter)
        for parameter in parameters(spec)
        if is_tuned_norm(parameter)
    }
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, tiny.VOCAB, (24, 32), generator=generator)
    targets = source.embed(windows, 256)
    for index in range(len(spec.layers)):
        source.run_layer(source.layer(index), targets)
    return Models(source, written, norms, windows, targets)


def tuned(
    found: Models, settings: NormTuning, folder: Path | None = None
) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return tune_norms(
            found.source,
            found.written,
            found.windows,
            found.targets,
            found.norms,
            found.dtypes,
            settings,
            SILENT,
            folder,
        )


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_5_text", "mixtral"])
def test_norm_gradients_are_those_of_the_whole_model(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_tuning, "multiplies_bfloat16", lambda device: False)
    found = models(tmp_path, architecture)
    rounded = {name: value.bfloat16().float() for name, value in found.norms.items()}
    tuning = norm_tuning._TunedModel(found.source, found.written, rounded, found.dtypes, None)
    (step, *_) = tuning.steps(found.windows[:4], found.targets, 128)
    loss = tuning.backward(step)

    leaves = {name: value.clone().requires_grad_() for name, value in rounded.items()}
    stream = found.written.with_values(leaves)
    running = stream.embed(found.windows[:4], 128)[0]
    hidden = running.hidden
    for index in range(len(stream.spec.layers)):
        inputs = norm_tuning._inputs_with_gradients(running, index)
        hidden = stream.layer(index)(hidden, *inputs)
    head = stream.decoder_without_layers(with_head=True)
    predicted = log_softmax(head.logits(head.normalize(hidden)), -1)
    wanted = torch.cat(list(found.source.logits(found.windows[:4])))
    expected = kl_div(predicted, log_softmax(wanted, -1), log_target=True, reduction="sum") / 128
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert set(tuning.norms) == {name for name in leaves if leaves[name].grad is not None}
    for name, leaf in leaves.items():
        gradient = tuning.norms[name].grad
        assert gradient is not None and leaf.grad is not None
        assert bool(leaf.grad.any()), name
        torch.testing.assert_close(gradient, leaf.grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_tuned_norms_bring_other_text_closer_to_the_source(
    tmp_path: Path, architecture: str
) -> None:
    found = models(tmp_path, architecture)
    norms = tuned(found, SETTINGS)
    held_out = torch.randint(0, tiny.VOCAB, (8, 32), generator=torch.Generator().manual_seed(1))
    before = found.loss(found.norms, held_out)
    assert found.loss(norms, held_out) < 0.95 * before
    assert set(norms) == set(found.norms)
    assert all(not torch.equal(norms[name], found.norms[name]) for name in norms)


def test_tuned_norms_are_the_same_again_and_with_hidden_states_on_disk(tmp_path: Path) -> None:
    found = models(tmp_path, "llama")
    settings = replace(SETTINGS, steps=4)
    norms = tuned(found, settings)
    folder = tmp_path / "hidden"
    folder.mkdir()
    again = tuned(found, settings, folder)
    assert all(torch.equal(norms[name], again[name]) for name in norms)


@pytest.mark.parametrize(
    "settings", [replace(SETTINGS, steps=2, rate=1e-12), replace(SETTINGS, steps=8, rate=50.0)]
)
def test_norms_stay_when_tuning_does_not_help(tmp_path: Path, settings: NormTuning) -> None:
    found = models(tmp_path, "llama")
    norms = tuned(found, settings)
    assert all(norms[name] is found.norms[name] for name in norms)


def test_step_targets_are_those_of_its_windows(tmp_path: Path) -> None:
    """Micro-batches of the targets have other sizes than steps."""
    found = models(tmp_path, "llama")
    tuning = norm_tuning._TunedModel(found.source, found.written, found.norms, found.dtypes, None)
    steps = tuning.steps(found.windows, found.targets, 96)
    assert [step.num_tokens for step in steps] == [96] * 8
    whole = torch.cat([micro_batch.hidden for micro_batch in found.targets])
    assert torch.equal(torch.cat([step.target() for step in steps]), whole)


def test_gradients_pass_through_the_rounding_of_inputs_and_keys(tmp_path: Path) -> None:
    found = models(tmp_path, "llama")
    quant = ActivationQuant("int8")

    def rounding(parameter: Parameter) -> dict[str, ActivationQuant]:
        names = [parameter.module] if parameter.is_linear else []
        names += [f"{name[:-4]}.{part}" for name in names if name.endswith(".qkv") for part in "kv"]
        return dict.fromkeys(names, quant)

    read = found.written
    rounding_stream = LayerStream(
        read.spec, read.read, activation_quant=rounding, read_embeddings=read.read_embeddings
    )
    gradients: list[dict[str, torch.Tensor | None]] = []
    streams: Sequence[LayerStream] = (read, rounding_stream)
    for stream in streams:
        tuning = norm_tuning._TunedModel(found.source, stream, found.norms, found.dtypes, None)
        tuning.backward(tuning.steps(found.windows, found.targets, 256)[0])
        gradients.append({name: value.grad for name, value in tuning.norms.items()})
    for name, plain in gradients[0].items():
        rounded = gradients[1][name]
        assert plain is not None and rounded is not None
        assert torch.cosine_similarity(plain, rounded, dim=0).item() > 0.9, name
