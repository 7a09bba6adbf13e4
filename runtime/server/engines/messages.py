"""What the API process and the engine process say to each other."""

from __future__ import annotations

from typing import Any

import msgspec

from llmkit.runtime.channel import Failed
from llmkit.runtime.engine.types import EngineOptions, Logprobs, Pooling


class Start(msgspec.Struct, tag=True):
    """The first message to the engine process: which model to load and how (see ServeOptions)."""

    model: str
    engine: EngineOptions
    debug: bool
    prefixes: tuple[str, int] | None = None  # the folder of the prefix cache on disk, and its most bytes


class Add(msgspec.Struct, tag=True):
    """A request for the engine. `prompt` holds token ids; `seed` None asks for a fresh one."""

    id: str
    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    salt: str = ""
    adapter: str | None = None
    grammar: str | None = None
    pooling: Pooling | None = None


class Cancel(msgspec.Struct, tag=True):
    """Nobody waits for request `id` any more. Unknown and finished ids are fine."""

    id: str


class LoadAdapter(msgspec.Struct, tag=True):
    """Requests may name this LoRA adapter from now on. Answered with Done or Refused."""

    id: str
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, tag=True):
    """Let go of an adapter that no request uses. Answered with Done or Refused."""

    id: str
    name: str


class Ready(msgspec.Struct, tag=True):
    """The model is loaded; what the API process must know of it."""

    max_model_len: int
    vocab_size: int  # rows of the embedding: a prompt's token ids are below it
    dtype: str
    device: str
    kv_cache_tokens: int
    load_s: float
    seconds: dict[str, float]  # of the engine process's stages until now, in their order; their sum is its age
    plan: dict[str, str | int | dict[str, int]]  # EnginePlan.as_dict
    adapters: list[str]  # names of models that are the loaded one with an adapter
    paths: list[str]  # which fast ways are taken, and why others are not
    card: dict[str, Any]  # model_card


class Output(msgspec.Struct, array_like=True):
    """New tokens of one request. `finish_reason` is None until its last Output."""

    id: str
    token_ids: list[int]
    finish_reason: str | None  # "stop", "length", "error", "cancelled"
    error: str | None
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs] | None = None
    queued_s: float | None = None  # from its Add to its first step, with its first tokens
    embedding: bytes | None = None  # float32, where that was asked for


class Stats(msgspec.Struct, tag=True):
    """The engine's gauges and its counters since the start. Sent alone when a message changed them, not a step."""

    running: int = 0
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_cached_blocks: int = 0
    kv_total_blocks: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0
    drafted_total: int = 0
    accepted_total: int = 0
    store_queries_total: int = 0
    store_hits_total: int = 0
    store_damaged_total: int = 0

    def counters(self) -> Stats:
        """What is left of an engine that is gone."""
        return Stats(**{name: getattr(self, name) for name in self.__struct_fields__ if name.endswith("_total")})

    def __add__(self, other: Stats) -> Stats:
        return Stats(*map(sum, zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)))


class Outputs(msgspec.Struct, tag=True):
    """All that one engine step produced."""

    outputs: list[Output]
    stats: Stats


class Done(msgspec.Struct, tag=True):
    """What `id` asked for has been done."""

    id: str


class Refused(msgspec.Struct, tag=True):
    """The engine will not do what `id` asks for: a request can never fit, an adapter is none."""

    id: str
    code: str
    message: str
    param: str | None = None


ToEngine = Start | Add | Cancel | LoadAdapter | UnloadAdapter
FromEngine = Ready | Failed | Stats | Outputs | Done | Refused

to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)
