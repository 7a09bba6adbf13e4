"""What a model gets right: perplexity, and how far its predictions are from the baseline's.

Models are loaded and run as they are served: weights packed, with the kernels that serve them, keys and values in the
number format of the server's cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from llmkit.bench.metrics import QUALITY
from llmkit.bench.quality_url import Asked, Told, score_told
from llmkit.bench.whole import whole
from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.model.decoder import Decoder
from llmkit.model.families import model_spec
from llmkit.model.loader import load_model
from llmkit.model.sequence import packed
from llmkit.quant.quality import Quality, score_logits
from llmkit.quant.text import BUILTIN, load_text, windows_sha256
from llmkit.quant.tokens import calibration_windows, evaluation_windows
from llmkit.runtime.load import EngineOptions, plan_engine

MIN_WINDOW = 16  # tokens; shorter ones say nothing of a model


@dataclass(frozen=True)
class Evaluation:
    """The token windows [n, L] all checkpoints are scored on, and where they are from."""

    windows: torch.Tensor
    text: str
    text_sha256: str

    def describe(self) -> dict[str, str | int]:
        """What the report says of it; two reports with the same `sha256` scored the same tokens."""
        count, length = self.windows.shape
        return {
            "text": self.text,
            "text_sha256": self.text_sha256,
            "windows": count,
            "window_tokens": length,
            "sha256": windows_sha256(self.windows),
        }


def evaluation(tokenizer: Tokenizer, source: str, count: int, length: int, seed: int) -> Evaluation:
    """Cut up to `count` windows of `length` tokens from a text; of the builtin one, from the part held out.

    Raises InputError when the text does not fill one window, and as `load_text` does.
    """
    if length < MIN_WINDOW:
        raise InputError(
            f"windows of {length} tokens are too short to score a model on", f"{MIN_WINDOW} or more were expected"
        )
    text = load_text(source)
    if source == BUILTIN:
        chosen = evaluation_windows(tokenizer, count, length, seed)
    else:
        chosen = calibration_windows(tokenizer, text, False, count, length, seed)
    return Evaluation(chosen, source, text.sha256)


def score(
    targets: Mapping[str, Checkpoint | Asked],
    baseline: str | None,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    device: str,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Score checkpoints and servers by name on windows [n, L], those other than the baseline against it.

    baseline: one of the names, or None. Two models are in memory at a time; a sharded checkpoint is scored as the whole
    that its parts make. Returns for each name perplexity, of checkpoints load_s and, against a baseline, QUALITY's
    figures, or BOUNDS where one of the two is a server. Raises InputError for a model whose vocabulary is not the
    baseline's, and for a server that answers otherwise than before.
    """
    progress.start("quality", len(targets), "models")
    figures: dict[str, dict[str, float]] = {name: {} for name in targets}
    options = EngineOptions(dtype=str(dtype).removeprefix("torch."), device=device)
    checkpoints = {name: whole(target) for name, target in targets.items() if isinstance(target, Checkpoint)}
    kv_dtypes = {name: plan_engine(checkpoint, options).kv_dtype for name, checkpoint in checkpoints.items()}

    def load(name: str) -> Served | Asked:
        target = targets[name]
        if isinstance(target, Asked):
            return target
        started = time.perf_counter()
        model = load_model(checkpoints[name], dtype, device, packed=True)
        if device != "cpu":
            torch.cuda.synchronize()
        figures[name]["load_s"] = time.perf_counter() - started
        return Served(model, kv_dtypes[name])

    reference: Served | Asked | None = None
    if baseline is not None:
        if baseline in checkpoints:
            _require_same_vocabulary(checkpoints, baseline)
        reference = load(baseline)
    for name in targets:
        if name == baseline:
            continue
        model = load(name)
        found, base = _scored(model, reference, tokens)
        figures[name] |= found
        if baseline is not None and base is not None:
            figures[baseline]["perplexity"] = base
        del model  # before the next one is loaded
        progress.advance(1, name)
    if reference is not None and baseline is not None:
        if "perplexity" not in figures[baseline]:
            figures[baseline] |= _scored(reference, None, tokens)[0]
        progress.advance(1, baseline)
    progress.finish()
    return figures


@dataclass(frozen=True)
class Served:
    """A model as the engine runs it."""

    model: Decoder
    kv_dtype: str | None  # of the cache: "int8" or "fp8"; None: the model's own

    @torch.inference_mode()
    def logits(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits float32 [L, vocab] of each window of token ids [n, L], one at a time.

        All layers share one scratch cache: a layer reads only what it has just written.
        """
        model = self.model
        positions, batch = packed(model, [windows.shape[1]])
        for window in windows:
            scratch = model.new_cache(batch.blocks, batch.block_size, self.kv_dtype)
            yield model.logits(model(window.to(model.device), positions, batch, [scratch] * len(model.layers)))


def _scored(
    model: Served | Asked, reference: Served | Asked | None, tokens: torch.Tensor
) -> tuple[dict[str, float], float | None]:
    """A target's figures, and the reference's perplexity."""
    if isinstance(model, Served) and (reference is None or isinstance(reference, Served)):
        quality = score_logits(model.logits(tokens), reference.logits(tokens) if reference else None, tokens)
        return _figures(quality), quality.reference_perplexity

    def known(one: Served | Asked) -> Iterator[Told | torch.Tensor]:
        yield from one.logits(tokens) if isinstance(one, Served) else one.told(tokens)

    return score_told(known(model), known(reference) if reference else None, tokens)


def _figures(quality: Quality) -> dict[str, float]:
    values = asdict(quality)
    return {name: values[name] for name in ("perplexity", *QUALITY) if values[name] is not None}


def _require_same_vocabulary(checkpoints: Mapping[str, Checkpoint], baseline: str) -> None:
    sizes = {name: model_spec(checkpoint.config).vocab for name, checkpoint in checkpoints.items()}
    for name, size in sizes.items():
        if size != sizes[baseline]:
            raise InputError(
                f"{name} has a vocabulary of {size} tokens and the baseline {baseline} one of {sizes[baseline]}",
                "Predictions are compared token by token",
                "Bench them without quality, or against another baseline",
            )
