"""The messages between ranks. The first rank leads; each other rank has a channel to it.

Tensors are not sent this way: see distributed_group.py.
"""

from __future__ import annotations

import msgspec

from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.process_channel import Failed

ANY_NUMBER = 1 << 40


class LoadPart(msgspec.Struct, tag=True):
    """The first message to a rank: load your part of the model."""

    rank: int
    model: str
    options: EngineOptions
    num_threads: int  # for computing on a CPU


class PartLoaded(msgspec.Struct, tag=True):
    """A rank has loaded its part. The sizes are what its memory allows."""

    num_blocks: int  # ANY_NUMBER for a stage without attention
    max_model_len: int
    file: str  # of the part; "" when it was sliced from the whole model
    nbytes: int  # of its tensors
    seconds: float
    max_num_seqs: int = 0
    # Of recurrent states; ANY_NUMBER for a stage without recurrent layers.
    num_state_snapshots: int = 0
    # In host memory (--kv-offload)
    num_host_blocks: int = 0
    num_host_states: int = 0


class Connect(msgspec.Struct, tag=True):
    """All ranks have loaded their parts. The sizes that they use, and how they connect."""

    num_blocks: int
    max_model_len: int
    store_path: str
    max_num_seqs: int = 0
    num_state_snapshots: int = 0
    num_host_blocks: int = 0
    num_host_states: int = 0


class RunStep(msgspec.Struct, tag=True):
    """Run one engine step.

    events: the requests added and the ids of those cancelled since the last step, in order.
    """

    events: list[EngineRequest | str]


class Sleep(msgspec.Struct, tag=True):
    """Free the memory of the caches; see `Engine.sleep`."""


class WakeUp(msgspec.Struct, tag=True):
    """Be as before the sleep; see `Engine.wake_up`."""


ToRank = LoadPart | Connect | RunStep | Sleep | WakeUp
FromRank = PartLoaded | Failed

to_rank_decoder = msgspec.msgpack.Decoder(ToRank)
from_rank_decoder = msgspec.msgpack.Decoder(FromRank)
