"""KL of mixed precision beside one scheme for all layers, on held-out text of two kinds.

The sensitivity is measured for 4-bit integers; 8-bit ones count as a 250th of it. Weights are
rounded to nearest. All choices run through the model together, so that it is read once.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import tempfile
from pathlib import Path

import torch

from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.progress import SilentProgress
from llmkit.model.linear import ActivationQuant
from llmkit.quant import layer_sensitivity
from llmkit.quant.algorithm import QuantizeJob
from llmkit.quant.calibration_text import builtin_text
from llmkit.quant.input_stats import InputStats
from llmkit.quant.layer_sensitivity import LayerSensitivity, SchemeCost, measure_sensitivity
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.quantize_linear import quantize_linear
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_plan import make_plan
from llmkit.quant.round_to_nearest import RtnQuantizer
from llmkit.quant.scheme_candidates import UNQUANTIZED, LinearUnit
from llmkit.quant.scheme_search import Choice, SchemeSearch
from llmkit.quant.token_windows import evaluation_windows

UNIFORM = ("w4a16", "fp8", "w8a16")
KL_OF_8_BITS = 1 / 250  # of that of 4 bits
LOGIT_TOKENS = 256  # whose logits are in memory together


def sensitivity(
    stream: LayerStream, units: list[LinearUnit], windows: torch.Tensor
) -> list[LayerSensitivity]:
    """What 4-bit and 8-bit integers cost at each unit."""
    of_4_bits = [
        dataclasses.replace(unit, schemes={"w4a16": unit.schemes["w4a16"]}) for unit in units
    ]
    found = measure_sensitivity(stream, of_4_bits, RtnQuantizer(), windows, SilentProgress())
    layers = []
    for unit, layer in zip(units, found.layers, strict=True):
        kl = layer.costs["w4a16"].kl * KL_OF_8_BITS
        cost = SchemeCost(unit.stored_bits("w8a16"), kl, unit.schemes["w8a16"])
        layers.append(dataclasses.replace(layer, costs={**layer.costs, "w8a16": cost}))
    return layers


@torch.no_grad()
def divergences(
    stream: LayerStream,
    units: list[LinearUnit],
    choices: dict[str, Choice],
    windows: torch.Tensor,
) -> dict[str, list[float]]:
    """The mean KL of each choice on each window of [n, L]."""
    quantizer = RtnQuantizer()
    (base,) = stream.embed(windows, windows.numel())
    runs = {name: base.snapshot() for name in choices}
    for index in range(len(stream.spec.layers)):
        layer = stream.layer(index)
        dense = {name: linear.weight for name, linear in layer.linears.items()}
        for name, choice in choices.items():
            for unit in units:
                if unit.layer != index or choice[unit.name] == UNQUANTIZED:
                    continue
                for target in unit.targets(choice[unit.name]):
                    stats = InputStats(dense[target.name].shape[1], frozenset())
                    job = QuantizeJob(target, dense[target.name], stats)
                    weight = quantize_linear(quantizer, job).weight
                    linear = layer.linears[target.name]
                    linear.weight = weight.dequantize()
                    linear.activation_quant = ActivationQuant.of(target.scheme, weight.input_scale)
            stream.run_layer(layer, [runs[name]])
            for linear_name, linear in layer.linears.items():
                linear.weight = dense[linear_name]
                linear.activation_quant = None
        stream.run_layer(layer, [base])
    decoder = stream.decoder_without_layers(with_head=True)

    def log_probs(hidden: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(decoder.logits(decoder.normalize(hidden)), dim=-1)

    length = windows.shape[1]
    totals = {name: [0.0] * len(windows) for name in choices}
    for start in range(0, windows.numel(), LOGIT_TOKENS):
        part = slice(start, start + LOGIT_TOKENS)
        reference = log_probs(base.hidden[part])
        probs = reference.exp()
        for name, run in runs.items():
            difference = reference - log_probs(run.hidden[part])
            totals[name][start // length] += (probs * difference).sum().item() / length
    return totals


def main() -> None:
    """Print a row for each choice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--bits", type=float, nargs="+", default=[5.5, 6.0, 6.5, 7.0])
    parser.add_argument("--tokens", type=int, default=256, help="of each text")
    parser.add_argument("--sensitivity-tokens", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = QuantizeOptions("rtn", target_bits=8.5, engine="vllm@h100", device="cpu")
        out = Path(folder) / "out"
        plan = make_plan(arguments.model, out, options, SilentProgress())
    tokenizer = load_tokenizer(plan.source)
    stream = LayerStream.from_checkpoint(plan.source, plan.spec)

    def window(text: str, length: int) -> torch.Tensor:
        return torch.tensor(tokenizer.encode(text)[:length]).view(1, -1)

    layer_sensitivity.SENSITIVITY_TOKENS = arguments.sensitivity_tokens
    calibration = window(builtin_text()[20_000:40_000], arguments.sensitivity_tokens)
    layers = sensitivity(stream, plan.units, calibration)
    choices: dict[str, Choice] = {
        name: {unit.name: name for unit in plan.units} for name in UNIFORM
    }
    for bits in arguments.bits:
        choices[f"mix, {bits:g}"] = SchemeSearch(layers, target_bits=bits).next_choice()
    code = inspect.getsource(argparse)[30_000:]
    prose = evaluation_windows(tokenizer, 1, arguments.tokens)
    windows = torch.cat((prose, window(code, arguments.tokens)))
    units = {unit.name: unit for unit in plan.units}
    num_weights = sum(unit.num_weights for unit in plan.units)
    print(
        "| choice | bits per weight | linears, MiB | KL, prose | KL, code |\n|---|---|---|---|---|"
    )
    for name, kl in divergences(stream, plan.units, choices, windows).items():
        stored = sum(units[unit].stored_bits(choice) for unit, choice in choices[name].items())
        figures = " | ".join(f"{value:.4f}" for value in kl)
        print(f"| {name} | {stored / num_weights:.2f} | {stored / 2**23:.1f} | {figures} |")


if __name__ == "__main__":
    main()
