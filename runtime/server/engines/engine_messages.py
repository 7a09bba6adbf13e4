"""Messages between the API process and the engine process.

Requests, outputs and statistics are the engine's own dataclasses; a message only wraps them. The
frames that carry messages are described in `runtime/process_channel.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import EngineOutput, EngineStats
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.process_channel import Failed

# To the engine process


class LoadModel(msgspec.Struct, tag=True):
    """The first message: which model to load, and how. Answered with EngineReady."""

    model: str
    engine: EngineOptions
    debug: bool
    # Folder of the prefix cache on disk, and its size limit in bytes.
    prefix_store: tuple[str, int] | None = None


class AddRequest(msgspec.Struct, tag=True):
    """Queue a request. Answered with EngineOutputs, or with Refused."""

    request: EngineRequest


class AbortRequest(msgspec.Struct, tag=True):
    """Drop a request. Ids that are unknown or finished are ignored."""

    request_id: str


class LoadAdapter(msgspec.Struct, tag=True):
    """Load a LoRA adapter, so that requests may use it. Answered with Done or Refused."""

    id: str
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, tag=True):
    """Unload an adapter that no request uses. Answered with Done or Refused."""

    id: str
    name: str


class Sleep(msgspec.Struct, tag=True):
    """Free the memory of the caches, and of the weights on a GPU. Answered with Done or Refused.

    No request may follow before WakeUp.
    """

    id: str


class WakeUp(msgspec.Struct, tag=True):
    """Be as before Sleep. Answered with Done or Refused; when refused, it sleeps on."""

    id: str


# From the engine process


class EngineReady(msgspec.Struct, tag=True):
    """The model is loaded; what the API process needs to know about it."""

    max_model_len: int
    vocab_size: int  # rows of the embedding; every token id of a prompt is below it
    dtype: str
    device: str
    kv_cache_tokens: int
    load_s: float
    # Seconds of each start-up stage of the engine process, in order; their sum is its age.
    seconds: dict[str, float]
    plan: dict[str, str | int | dict[str, int]]  # EnginePlan.as_dict
    adapters: list[str]  # names under which the model is served with an adapter
    fast_paths: list[str]  # which optimized code paths are used, and why others are not
    card: dict[str, Any]  # model_card


class EngineOutputs(msgspec.Struct, tag=True):
    """The outputs of one engine step, and the statistics after it."""

    outputs: list[EngineOutput]
    stats: EngineStats
    # Seconds between a request's arrival in the engine process and its first step, by request id.
    # A request is listed once, with its first output.
    queue_times_s: dict[str, float] = {}


class StatsUpdate(msgspec.Struct, tag=True):
    """The statistics, sent when a message changed them and no step did."""

    stats: EngineStats


class Done(msgspec.Struct, tag=True):
    """The change with this `id`, of an adapter or of sleep, is done."""

    id: str


class Refused(msgspec.Struct, tag=True):
    """The engine refuses the request or the change with this `id`."""

    id: str
    code: str
    message: str
    param: str | None = None


Change = LoadAdapter | UnloadAdapter | Sleep | WakeUp
ToEngine = LoadModel | AddRequest | AbortRequest | Change
FromEngine = EngineReady | Failed | StatsUpdate | EngineOutputs | Done | Refused

to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)
