"""The quality of models: perplexity, and the KL divergence from a baseline.

Models run as they are served: with packed weights, the serving kernels, and the KV cache's dtype.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from llmkit.bench.bench_metrics import QUALITY_METRICS
from llmkit.bench.server_quality import PromptLogprobs, PromptLogprobsClient, score_prompt_logprobs
from llmkit.bench.unsharded_view import unsharded
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.common.errors import InputError
from llmkit.common.options import CpuActivations
from llmkit.common.progress import Progress
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import make_batch
from llmkit.model.language_model import LanguageModel, scratch_layer_caches
from llmkit.model.weight_loader import load_model
from llmkit.quant.calibration_text import BUILTIN, load_text, windows_sha256
from llmkit.quant.output_quality import Quality, score_logits
from llmkit.quant.token_windows import calibration_windows, evaluation_windows
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_plan import plan_engine

MIN_WINDOW_TOKENS = 16  # shorter windows measure nothing


@dataclass(frozen=True)
class Evaluation:
    """The token windows [n, L] that all targets are scored on, and the text they are from."""

    windows: torch.Tensor
    text: str
    text_sha256: str

    def describe(self) -> dict[str, str | int]:
        """The report's entry. Two reports with the same `sha256` scored the same tokens."""
        count, length = self.windows.shape
        return {
            "text": self.text,
            "text_sha256": self.text_sha256,
            "windows": count,
            "window_tokens": length,
            "sha256": windows_sha256(self.windows),
        }


def make_evaluation(
    tokenizer: Tokenizer, source: str, count: int, length: int, seed: int
) -> Evaluation:
    """Take up to `count` windows of `length` tokens from a text.

    Windows of the builtin text are from the part that is not used for calibration. Raises
    InputError when the text is shorter than one window, and as `load_text` does.
    """
    if length < MIN_WINDOW_TOKENS:
        raise InputError(
            f"windows of {length} tokens are too short to score a model on",
            f"{MIN_WINDOW_TOKENS} or more were expected",
        )
    text = load_text(source)
    if source == BUILTIN:
        windows = evaluation_windows(tokenizer, count, length, seed)
    else:
        windows = calibration_windows(tokenizer, text, False, count, length, seed)
    return Evaluation(windows, source, text.sha256)


def score_targets(
    targets: Mapping[str, Checkpoint | PromptLogprobsClient],
    baseline: str | None,
    tokens: torch.Tensor,
    dtype: str,
    device: str,
    progress: Progress,
    cpu_activations: CpuActivations = "auto",
) -> dict[str, dict[str, float]]:
    """Score checkpoints and servers on windows [n, L], against the baseline.

    baseline: one of the names of `targets`, or None. At most two models are in memory at a time.
    Sharded checkpoints are scored unsharded. dtype, cpu_activations: as the engine's options.

    Returns the metrics by name: perplexity, load_s of checkpoints and, for targets other than the
    baseline, QUALITY_METRICS, or QUALITY_BOUND_METRICS when target or baseline is a server. Raises
    InputError when vocabularies differ from the baseline's, and for a server's unusable response.
    """
    progress.start("quality", len(targets), "models")
    metrics: dict[str, dict[str, float]] = {name: {} for name in targets}
    options = EngineOptions(dtype=dtype, device=device, cpu_activations=cpu_activations)
    checkpoints = {
        name: unsharded(target)
        for name, target in targets.items()
        if isinstance(target, Checkpoint)
    }
    plans = {name: plan_engine(checkpoint, options) for name, checkpoint in checkpoints.items()}

    def load(name: str) -> ServedModel | PromptLogprobsClient:
        target = targets[name]
        if isinstance(target, PromptLogprobsClient):
            return target
        start_s = time.perf_counter()
        plan = plans[name]
        model = load_model(
            checkpoints[name],
            plan.dtype,
            device,
            packed=True,
            cpu_activations=plan.cpu_activations,
            weight_dtype=plan.weight_dtype,
        )
        if device != "cpu":
            torch.cuda.synchronize()
        metrics[name]["load_s"] = time.perf_counter() - start_s
        return ServedModel(model, plan.kv_cache_dtype)

    reference: ServedModel | PromptLogprobsClient | None = None
    if baseline is not None:
        if baseline in checkpoints:
            _check_same_vocabulary(checkpoints, baseline)
        reference = load(baseline)
    for name in targets:
        if name == baseline:
            continue
        model = load(name)
        target_metrics, reference_perplexity = _score(model, reference, tokens)
        metrics[name] |= target_metrics
        if baseline is not None and reference_perplexity is not None:
            metrics[baseline]["perplexity"] = reference_perplexity
        del model  # free its memory before the next model is loaded
        progress.advance(1, name)
    if reference is not None and baseline is not None:
        if "perplexity" not in metrics[baseline]:
            metrics[baseline] |= _score(reference, None, tokens)[0]
        progress.advance(1, baseline)
    progress.finish()
    return metrics


@dataclass(frozen=True)
class ServedModel:
    """A model with the KV cache dtype that the engine would use."""

    model: LanguageModel
    kv_cache_dtype: str | None  # a name in KV_CACHE_DTYPES; None: the model's dtype

    @torch.inference_mode()
    def logits(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits float32 [L, vocab] of each window of token ids [n, L], one at a time."""
        model = self.model
        positions, batch = make_batch(model, [windows.shape[1]])
        for window in windows:
            caches = scratch_layer_caches(
                model, model.spec, batch.num_blocks, batch.block_size, self.kv_cache_dtype
            )
            yield model.logits(model(window.to(model.device), positions, batch, caches))


def _score(
    model: ServedModel | PromptLogprobsClient,
    reference: ServedModel | PromptLogprobsClient | None,
    tokens: torch.Tensor,
) -> tuple[dict[str, float], float | None]:
    """The metrics of a target, and the reference's perplexity."""
    if isinstance(model, ServedModel) and (reference is None or isinstance(reference, ServedModel)):
        reference_logits = reference.logits(tokens) if reference else None
        quality = score_logits(model.logits(tokens), reference_logits, tokens)
        return _quality_metrics(quality), quality.reference_perplexity
    reference_predictions = _predictions(reference, tokens) if reference else None
    return score_prompt_logprobs(_predictions(model, tokens), reference_predictions, tokens)


def _predictions(
    model: ServedModel | PromptLogprobsClient, tokens: torch.Tensor
) -> Iterator[PromptLogprobs | torch.Tensor]:
    if isinstance(model, ServedModel):
        yield from model.logits(tokens)
    else:
        yield from model.prompt_logprobs(tokens)


def _quality_metrics(quality: Quality) -> dict[str, float]:
    values = asdict(quality)
    names = ("perplexity", *QUALITY_METRICS)
    return {name: values[name] for name in names if values[name] is not None}


def _check_same_vocabulary(checkpoints: Mapping[str, Checkpoint], baseline: str) -> None:
    sizes = {
        name: checkpoint_spec(checkpoint).vocab_size for name, checkpoint in checkpoints.items()
    }
    for name, size in sizes.items():
        if size != sizes[baseline]:
            raise InputError(
                f"{name} has a vocabulary of {size} tokens"
                f" and the baseline {baseline} one of {sizes[baseline]}",
                "Predictions are compared token by token",
                "Bench them without quality, or against another baseline",
            )
