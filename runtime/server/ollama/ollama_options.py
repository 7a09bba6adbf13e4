"""`options` of Ollama's requests: sampling, and limits of the answer and the context."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from llmkit.runtime.server.schemas.base_request import (
    INT64,
    Penalty,
    RepetitionPenalty,
    StopStrings,
    StrictModel,
)
from llmkit.runtime.server.schemas.ignored_fields import IgnoredFields

AS_MANY_AS_FIT = -1


def _whole_number(value: Any) -> Any:
    """Ollama takes 40.0 for 40."""
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole else value


_Int = Annotated[int, BeforeValidator(_whole_number), Field(ge=-(2**31), lt=2**31)]


class OllamaOptions(StrictModel):
    """`options`. Those without effect configure how Ollama loads a model, or no longer exist."""

    neutral_values = {"typical_p": (1, 0)}  # noqa: RUF012
    without_effect: ClassVar[tuple[str, ...]] = (
        "num_keep",
        "repeat_last_n",
        "num_batch",
        "num_gpu",
        "main_gpu",
        "num_thread",
        "draft_num_predict",
        "numa",
        "low_vram",
        "f16_kv",
        "logits_all",
        "vocab_only",
        "use_mmap",
        "use_mlock",
        "embedding_only",
        "penalize_newline",
        "tfs_z",
        "mirostat",
        "mirostat_tau",
        "mirostat_eta",
    )

    # -1 and -2: as many as fit into the context, as Ollama's default.
    num_predict: Annotated[int, BeforeValidator(_whole_number), Field(ge=-2, lt=2**31)] | None = (
        None
    )
    num_ctx: Annotated[int, BeforeValidator(_whole_number), Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, BeforeValidator(_whole_number), Field(ge=-1, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    # -1: another one for each request.
    seed: Annotated[int, BeforeValidator(_whole_number), Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopStrings | None = None
    repeat_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None

    num_keep: _Int | None = None
    # Penalties see the whole text. 0 turns them off, as in Ollama.
    repeat_last_n: Annotated[int, BeforeValidator(_whole_number), Field(ge=-1, lt=2**31)] | None = (
        None
    )
    num_batch: _Int | None = None
    num_gpu: _Int | None = None
    main_gpu: _Int | None = None
    num_thread: _Int | None = None
    draft_num_predict: _Int | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    embedding_only: bool | None = None
    penalize_newline: bool | None = None
    tfs_z: float | None = None
    mirostat: _Int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None

    def add_ignored(self, ignored: IgnoredFields) -> None:
        """Add the options given that have no effect to `ignored`."""
        for name in self.without_effect:
            value = getattr(self, name)
            turns_penalties_off = name == "repeat_last_n" and value == 0
            if value is not None and not turns_penalties_off:
                ignored.add(("options", name))

    @property
    def sampling_fields(self) -> dict[str, Any]:
        """The same for OpenAI's requests, as llmkit extends them."""
        fields = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "seed": None if self.seed == -1 else self.seed,
            "stop": self.stop,
        }
        if self.repeat_last_n != 0:
            fields["repetition_penalty"] = self.repeat_penalty
            fields["presence_penalty"] = self.presence_penalty
            fields["frequency_penalty"] = self.frequency_penalty
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def max_new_tokens(self) -> int | None:
        """How many tokens an answer may have; None: as many as fit."""
        limit = self.num_predict
        return limit if limit is not None and limit > 0 else None
