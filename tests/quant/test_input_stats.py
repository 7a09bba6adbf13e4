"""The statistics of linears' inputs: the weight of the first token of each window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny_models as tiny

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.quant.calibrate_layer import collect_input_stats, sublayers
from llmkit.quant.input_stats import FIRST_TOKEN_WEIGHT, InputStats
from llmkit.quant.layer_stream import LayerStream


def weighted_hessian(inputs: torch.Tensor, first_tokens: list[int]) -> torch.Tensor:
    """2 X'WX / sum(W) of the inputs X [T, in], where W holds the tokens' weights."""
    weights = torch.ones(len(inputs))
    weights[first_tokens] = FIRST_TOKEN_WEIGHT
    return 2 * inputs.T @ (inputs * weights.unsqueeze(1)) / weights.sum()


def test_first_tokens_count_more() -> None:
    """Added in parts, one without a first token, the statistics are those of all inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs, dense_inputs = torch.randn(2, 90, 8, generator=generator)
    stats = InputStats(8, {"hessian", "residual"})
    stats.add(inputs[:50], dense_inputs[:50], [0, 25])
    stats.add(inputs[50:60], dense_inputs[50:60])
    stats.add(inputs[60:], dense_inputs[60:], [0])
    assert stats.hessian is not None and stats.residual is not None
    firsts = [0, 25, 60]
    torch.testing.assert_close(stats.hessian, weighted_hessian(inputs, firsts))
    weights = torch.ones(90)
    weights[firsts] = FIRST_TOKEN_WEIGHT
    moved = (dense_inputs - inputs) * weights.unsqueeze(1)
    torch.testing.assert_close(stats.residual, 2 * moved.T @ inputs / weights.sum())
    torch.testing.assert_close(stats.mean_abs, inputs.abs().mean(0))
    assert stats.num_tokens == 90


def test_a_clone_goes_on_where_the_original_was() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 8, generator=generator)
    stats = InputStats(8, {"hessian"})
    stats.add(inputs[:20], first_tokens=[0])
    copy = stats.clone()
    copy.add(inputs[20:], first_tokens=[0])
    assert copy.hessian is not None
    torch.testing.assert_close(copy.hessian, weighted_hessian(inputs, [0, 20]))


@pytest.mark.parametrize("tokens_at_once", [16, 32, 48])
def test_every_window_has_a_first_token(tmp_path: Path, tokens_at_once: int) -> None:
    """The Hessian of a layer does not depend on how many windows are in a micro-batch."""
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "model", num_hidden_layers=1))
    stream = LayerStream.from_checkpoint(checkpoint, checkpoint_spec(checkpoint))
    windows = torch.randint(0, tiny.VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    batches = stream.embed(windows, tokens_at_once)
    layer = stream.layer(0)
    attention, _ = sublayers(layer)
    name = "attn.qkv"
    seen: list[torch.Tensor] = []
    hook = layer.linears[name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stats = collect_input_stats(layer, attention, [name], batches, {"hessian"})[name]
    hook.remove()
    assert stats.hessian is not None
    torch.testing.assert_close(stats.hessian, weighted_hessian(torch.cat(seen), [0, 16, 32]))


def test_tokens_of_an_expert_count_alike(tmp_path: Path) -> None:
    """An expert reads some of the tokens, and which of them are first is not known."""
    source = tiny.tiny_checkpoint(tmp_path / "model", "qwen3_moe", num_hidden_layers=1)
    checkpoint = open_checkpoint(source)
    stream = LayerStream.from_checkpoint(checkpoint, checkpoint_spec(checkpoint))
    windows = torch.randint(0, tiny.VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    batches = stream.embed(windows, 48)
    layer = stream.layer(0)
    _, mlp = sublayers(layer)
    name = next(name for name in layer.linears if name.endswith("gate_up"))
    seen: list[torch.Tensor] = []
    hook = layer.linears[name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stats = collect_input_stats(layer, mlp, [name], batches, {"hessian"})[name]
    hook.remove()
    (inputs,) = seen
    assert 0 < len(inputs) < 48
    assert stats.hessian is not None
    torch.testing.assert_close(stats.hessian, weighted_hessian(inputs, []))
