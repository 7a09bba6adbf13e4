"""Norm tuning: trains the norms of a quantized model to predict what the unquantized one predicts.

The idea is that of Norm Tweaking (Li et al., 2023, arXiv 2309.02784): a norm's weight corrects what
quantized weights change, and stays in 16 bits anyway. There each layer is tuned by itself. Here all
norms are trained together, with the mean KL divergence from the unquantized model as the loss, as
the scales of EfficientQAT (Chen et al., 2024, arXiv 2407.11062) are in its second phase.

One decoder layer is in memory at a time, forwards and backwards.

Legend: T tokens of a step, H hidden size, L tokens of a window, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import log_softmax

from llmkit.common.progress import Progress
from llmkit.kernels.cpu.packed_cache import unpack_blocks
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.parameter import Parameter
from llmkit.model.spec import ModelSpec
from llmkit.quant.algorithm import NormTuning
from llmkit.quant.auto_round import LearningLinear, StraightThroughQuant, multiplies_bfloat16
from llmkit.quant.layer_stream import LayerInputs, LayerStream, MicroBatch, StoredTensor
from llmkit.quant.memory_estimate import HEAD_TOKENS

BETAS = (0.9, 0.99)  # of Adam
JUDGED_STEPS = 4  # the result is judged on the windows of this many steps


def is_tuned_norm(parameter: Parameter) -> bool:
    """Whether a parameter is the weight of a norm of a layer, or of the one after the layers."""
    is_norm = parameter.name.endswith("norm.weight") and len(parameter.shape) == 1
    return is_norm and (parameter.name.startswith("layers.") or parameter.name == "norm.weight")


def tune_norms(
    source: LayerStream,
    written: LayerStream,
    windows: torch.Tensor,
    targets: Sequence[MicroBatch],
    start: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    settings: NormTuning,
    progress: Progress,
    folder: Path | None = None,
) -> dict[str, torch.Tensor]:
    """The tuned weights of norms, by parameter, as a checkpoint stores them.

    source: the unquantized model. written: the quantized one.
    windows: token windows [n, L]. targets: the unquantized model's hidden states after the last
        layer, for these windows.
    start, dtypes: the weights, float32 on the device, and what they are stored in, by parameter.
    folder: for hidden states; None keeps them in memory.

    They are `start` when the KL divergence did not fall.
    """
    progress.start("tune norms", settings.steps, "steps")
    model = _TunedModel(source, written, start, dtypes, folder)
    steps = model.steps(windows, targets, settings.tokens)
    judged = steps[:JUDGED_STEPS]
    loss_before = model.loss(judged)
    optimizer = torch.optim.Adam(
        [
            {"params": [value], "lr": settings.rate * _magnitude(value, written.spec)}
            for value in model.norms.values()
        ],
        betas=BETAS,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(settings.steps):
        if not order:
            order = torch.randperm(len(steps), generator=generator).tolist()
        loss = model.backward(steps[order.pop()])
        optimizer.step()
        schedule.step()
        progress.advance(1, f"mean KL {loss:.4f}")
    loss_after = model.loss(judged)
    progress.finish()
    if not loss_after < loss_before:
        return dict(start)
    return {name: value.detach() for name, value in model.norms.items()}


def _magnitude(weight: torch.Tensor, spec: ModelSpec) -> float:
    """The root of the mean square of what a norm multiplies by."""
    return (weight.detach() + spec.norm_offset).square().mean().sqrt().item()


@dataclass(frozen=True)
class _Step:
    """What a step runs on."""

    embedded: MicroBatch
    # The unquantized model's hidden states, and the first token and the number of tokens there.
    targets: Sequence[MicroBatch]
    first: int
    num_tokens: int

    def target(self) -> torch.Tensor:
        """The unquantized model's hidden states after the last layer, [T, H] on the CPU."""
        parts = []
        first = 0
        for micro_batch in self.targets:
            begin = max(self.first - first, 0)
            end = min(self.first + self.num_tokens - first, micro_batch.num_tokens)
            if begin < end:
                parts.append(micro_batch.hidden[begin:end])
            first += micro_batch.num_tokens
        return torch.cat(parts)


class _TunedModel:
    """The quantized model with trainable norms, and the unquantized model's predictions."""

    def __init__(
        self,
        source: LayerStream,
        written: LayerStream,
        start: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        folder: Path | None,
    ) -> None:
        self.norms = {name: value.clone() for name, value in start.items()}
        self._dtypes = dtypes
        # The norms as the checkpoint stores them: the model computes with these.
        self._stored: dict[str, torch.Tensor] = {}
        self._round_norms()
        self._stream = written.with_values(self._stored)
        self._source_head = source.decoder_without_layers(with_head=True)
        self._folder = folder
        self._uses_bfloat16 = multiplies_bfloat16(written.device)

    def steps(
        self, windows: torch.Tensor, targets: Sequence[MicroBatch], tokens: int
    ) -> list[_Step]:
        """Steps of about `tokens` tokens, which together have all windows."""
        steps = []
        first = 0
        for embedded in self._stream.embed(windows, tokens, self._folder):
            steps.append(_Step(embedded, targets, first, embedded.num_tokens))
            first += embedded.num_tokens
        return steps

    def _round_norms(self) -> None:
        for name, value in self.norms.items():
            self._stored[name] = value.to(self._dtypes[name], copy=True).float().requires_grad_()

    @torch.no_grad()
    def loss(self, steps: Sequence[_Step]) -> float:
        """The mean KL divergence over the tokens of some steps."""
        self._round_norms()
        total = 0.0
        num_tokens = 0
        for step in steps:
            hidden, _ = self._forward(step.embedded)
            total += self._head_loss(hidden, step.target()).item() * step.num_tokens
            num_tokens += step.num_tokens
        return total / num_tokens

    def backward(self, step: _Step) -> float:
        """Give the norms the gradients of a step's mean KL divergence. Returns it.

        The gradients pass through the rounding of the norms.
        """
        self._round_norms()
        with torch.no_grad():
            hidden, layer_inputs = self._forward(step.embedded)
        hidden.requires_grad_()
        with torch.enable_grad():
            loss = self._head_loss(hidden, step.target())
        gradient = hidden.grad
        for index in reversed(range(len(self._stream.spec.layers))):
            assert gradient is not None
            gradient = self._layer_backward(index, layer_inputs[index].read(), gradient)
        for name, value in self.norms.items():
            value.grad = self._stored[name].grad
        return loss.item()

    def _forward(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, list[StoredTensor]]:
        """The hidden states [T, H] after the last layer, and the inputs of all layers."""
        self._running = micro_batch.snapshot()
        layer_inputs = []
        for index in range(len(self._stream.spec.layers)):
            file = self._folder / f"input-{index}.bin" if self._folder is not None else None
            layer_inputs.append(StoredTensor(self._running.hidden, file))
            self._stream.run_layer(self._layer(index), [self._running])
        return self._running.hidden.to(self._stream.device), layer_inputs

    def _layer(self, index: int) -> DecoderLayer:
        """A layer that passes gradients through the rounding of inputs."""
        layer = self._stream.layer(index)
        for name, linear in layer.linears.items():
            layer.linears[name] = LearningLinear(linear, uses_bfloat16=self._uses_bfloat16)
        for name, quant in layer.activation_quant.items():
            layer.activation_quant[name] = StraightThroughQuant(**vars(quant))
        return layer

    def _layer_backward(
        self, index: int, layer_input: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """From the gradient [T, H] of a layer's output to that of its input."""
        with torch.enable_grad():
            layer = self._layer(index)
            hidden = layer_input.to(self._stream.device).detach().requires_grad_()
            output = layer(hidden, *_inputs_with_gradients(self._running, index))
            output.backward(gradient)
        assert hidden.grad is not None
        return hidden.grad

    def _head_loss(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean KL divergence of the predictions from the unquantized model's.

        hidden, target: the last hidden states [T, H]. Computes gradients where they are enabled.
        """
        total = hidden.new_zeros(())
        head = self._stream.decoder_without_layers(with_head=True)
        for start in range(0, len(hidden), HEAD_TOKENS):
            rows = slice(start, start + HEAD_TOKENS)
            with torch.no_grad():
                expected = self._log_probs(self._source_head, target[rows].to(hidden.device))
            predicted = self._log_probs(head, hidden[rows])
            kl = (expected.exp() * (expected - predicted)).sum() / len(hidden)
            if torch.is_grad_enabled():
                kl.backward()
            total += kl.detach()
        return total

    def _log_probs(self, head: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        """The log probabilities [n, V] of the next token from last hidden states [n, H]."""
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self._uses_bfloat16):
            logits = head.logits(head.normalize(hidden))
        return log_softmax(logits.float(), dim=-1)


def _inputs_with_gradients(micro_batch: MicroBatch, index: int) -> LayerInputs:
    """What a layer reads besides the hidden states, with a new KV cache for keys with gradients.

    It is not packed, because torch computes with it.
    """
    inputs = micro_batch.layer_inputs(index)
    if not isinstance(inputs.cache, KVCache):
        return inputs
    kv = inputs.cache.kv
    if micro_batch.kept_kv(index) is None:
        kv = torch.zeros_like(kv)
    elif inputs.cache.is_packed:
        kv = unpack_blocks(kv)
    return inputs._replace(cache=KVCache(kv.clone()))
