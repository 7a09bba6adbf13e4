"""The calibration windows of a run, and what the report says about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import Progress
from llmkit.quant.calibration_text import BUILTIN, SELF, load_text, windows_sha256
from llmkit.quant.generated_text import GenerateFn, generated_windows
from llmkit.quant.quantize_plan import QuantizePlan
from llmkit.quant.token_windows import calibration_windows

# Characters of calibration text that are read per token needed, so that the seed has a choice.
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class CalibrationData:
    """Token windows to calibrate on."""

    windows: torch.Tensor  # int64 [n, L]
    info: dict[str, Any]  # for the report and the manifest


def load_calibration_data(
    plan: QuantizePlan, tokenizer: Tokenizer, generate: GenerateFn | None, progress: Progress
) -> CalibrationData:
    """Read the calibration text of a plan and cut it into windows, or let the model write it."""
    if plan.options.calibration == SELF:
        return _generate_calibration_data(plan, tokenizer, generate, progress)
    options = plan.options

    def render(messages: list[dict[str, Any]]) -> str:
        return tokenizer.render_chat(messages, add_generation_prompt=False)

    limit = plan.samples * plan.seq_len * _CHARACTERS_PER_TOKEN
    text = load_text(options.calibration, render if tokenizer.chat_template else None, limit)
    is_builtin = options.calibration == BUILTIN
    windows = calibration_windows(
        tokenizer, text, is_builtin, plan.samples, plan.seq_len, options.seed
    )
    largest_id = int(windows.max())
    if largest_id >= plan.spec.vocab_size:
        raise InputError(
            f"the tokenizer gives the id {largest_id} and the model's embedding has "
            f"{plan.spec.vocab_size} rows",
            "A tokenizer that belongs to the model was expected",
        )
    if len(windows) < plan.samples:
        progress.message(
            f"{text.name} has {len(windows)} windows of {plan.seq_len} tokens for calibration, "
            f"fewer than the {plan.samples} asked for; all are used"
        )
    return CalibrationData(
        windows,
        {
            "source": options.calibration,
            "name": text.name,
            "text_sha256": text.sha256,
            "truncated": text.truncated,
            "windows": len(windows),
            "window_tokens": plan.seq_len,
            "tokens": windows.numel(),
            "windows_sha256": windows_sha256(windows),
        },
    )


def _generate_calibration_data(
    plan: QuantizePlan, tokenizer: Tokenizer, generate: GenerateFn | None, progress: Progress
) -> CalibrationData:
    """Calibration text that the model writes itself."""
    if generate is None:
        raise UsageError(
            "--calibration self needs an engine to write the text with", "A generator was expected"
        )
    options = plan.options
    progress.message(f"the model writes {plan.samples * plan.seq_len:,} tokens to calibrate on")
    source = plan.source
    if source.file_format == "gguf":
        source = source.with_dtype("BF16")
    windows = generated_windows(
        source, tokenizer, generate, plan.samples, plan.seq_len, options.seed, plan.device.type
    )
    return CalibrationData(
        windows,
        {
            "source": SELF,
            "name": "text that the model wrote",
            "windows": len(windows),
            "window_tokens": plan.seq_len,
            "tokens": windows.numel(),
            "windows_sha256": windows_sha256(windows),
        },
    )
