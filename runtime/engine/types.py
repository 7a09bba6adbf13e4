"""What goes into the engine and what comes out: token ids and plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from llmkit.checkpoint.errors import LlmkitError

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "error"]
Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen, and when it ends."""

    temperature: float = 1.0  # 0: the most probable token
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the most probable token
    seed: int | None = None  # None: drawn by the engine
    max_tokens: int = 16
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # before so many no token may end the answer
    repetition_penalty: float = 1.0  # divides positive logits of tokens seen in prompt or answer, multiplies others
    presence_penalty: float = 0.0  # taken from the logits of tokens that are in the answer
    frequency_penalty: float = 0.0  # taken from them once for each time
    logit_bias: dict[int, float] = field(default_factory=dict)  # added to logits, by token
    logprobs: int | None = None  # most probable tokens told of with each one; 0: only the token itself
    prompt_logprobs: int | None = None  # the same of the prompt's tokens

    @property
    def penalizes(self) -> bool:
        """Whether a choice depends on the tokens before it by more than the model."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def shapes(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return self.penalizes or bool(self.logit_bias or self.min_tokens)


class Logprobs(NamedTuple):
    """The logarithms of probabilities at one place, by the model itself, whatever the request's sampling."""

    own: float  # of the token that is there
    top: list[tuple[int, float]]  # the most probable tokens, the first first


@dataclass(frozen=True)
class Request:
    """A prompt of token ids; `id` is the caller's and unique among the requests under way."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    priority: int = 0  # the least goes first
    salt: str = ""  # cached prefixes are shared between requests of one salt only
    adapter: str | None = None  # a name given to `Engine.add_adapter`; None: the model as it is
    grammar: str | None = None  # that the answer follows, for the engine's `grammars`
    pooling: Pooling | None = None  # no answer, but its last or mean hidden state; max_tokens is 1 then


@dataclass(frozen=True)
class TokenOutput:
    """What one step did for one request."""

    request_id: str
    token_ids: list[int]  # new ones, several after a speculation; a token that ends the request is included
    finish_reason: FinishReason | None  # None: it goes on
    error: str | None  # with finish_reason "error"
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    logprobs: list[Logprobs] | None = None  # of each new token
    prompt_logprobs: list[Logprobs] | None = None  # with the first tokens: of the prompt's, but for its first
    embedding: bytes | None = None  # what was pooled, float32 [H], with finish_reason "stop"


class RequestError(LlmkitError):
    """A request that can never be answered; `code` and `param` are those of the OpenAI API."""

    exit_code = 3

    def __init__(self, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


@dataclass(frozen=True)
class EngineOptions:
    """What a user may choose for an engine; sizes that are None are planned. No torch here: the API process has it."""

    device: str = "auto"  # "auto", "cuda" or "cpu"
    dtype: str = "auto"  # "auto", "float32", "bfloat16" or "float16"
    max_model_len: int | None = None  # tokens; None: the model's own limit, or what the KV cache can hold
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # of a step; None: as suits the device
    kv_cache_memory: int | None = None  # bytes
    kv_cache_dtype: str = "auto"  # "int8" or "fp8"; "auto": the model's, or that of the checkpoint's stored scales
    gpu_memory_utilization: float = 0.9
    cpu_offload: int = 0  # bytes of weights that stay in host memory, on CUDA
    prefix_cache: bool = True
    speculate: int = 0  # tokens guessed for each request in a step
    draft_model: str | None = None  # a model that guesses; None: what followed the last time
    adapters: dict[str, str] = field(default_factory=dict)  # directories of LoRA adapters by name
    tp: int = 1  # tensor-parallel ranks; those of a sharded checkpoint are its own
    pp: int = 1  # pipeline stages
    ep: int = 1  # groups of ranks over which experts are divided
    dp: int = 1  # engines side by side, which share what memory a CPU has


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine, after the memory plan, and what it may do."""

    max_model_len: int  # tokens of a request, prompt and output
    num_blocks: int  # of the KV cache
    device: torch.device
    dtype: torch.dtype
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    windows: tuple[int | None, ...] = (None,)  # of the whole model's layers; each has block tables of its own
    window_blocks: int | None = None  # of each sliding window; None: num_blocks
    kv_dtype: str | None = None  # "int8" or "fp8"; None: the model's
    prefix_cache: bool = True
    chunk_tokens: int = 2048  # of one prompt in a step, while others wait for theirs
    ahead: bool = False  # the next step is launched before this one's tokens are known
    stages: int = 1  # of a pipeline: so many steps are under way, each of other sequences
    speculate: int = 0  # tokens drafted for a sequence in a step; not together with `ahead`

    def blocks(self, window: int | None) -> int:
        """How many blocks there are for the layers of a window."""
        return self.num_blocks if window is None else self.window_blocks or self.num_blocks


@dataclass(frozen=True)
class EngineStats:
    """Gauges of this moment and counters since the start."""

    running: int
    waiting: int
    kv_used_blocks: int
    kv_cached_blocks: int  # held by nobody, with a prefix that may be wanted again
    kv_total_blocks: int
    prompt_tokens_total: int
    generation_tokens_total: int
    preemptions_total: int
    steps_total: int
    prefix_queries_total: int  # prompt tokens looked up
    prefix_hits_total: int  # of them found
    drafted_total: int  # tokens proposed by speculation
    accepted_total: int  # of them confirmed
