"""What the ranks say to each other besides numbers: the first rank leads, each of the others has a channel to it."""

from __future__ import annotations

import msgspec

from llmkit.runtime.channel import Failed
from llmkit.runtime.engine.types import EngineOptions, Request


class Join(msgspec.Struct, tag=True):
    """The first message to a rank: what it is to load."""

    index: int
    model: str
    engine: EngineOptions
    threads: int  # that it may compute with on a CPU


class Loaded(msgspec.Struct, tag=True):
    """A rank has its part, and room for so much."""

    num_blocks: int
    max_model_len: int
    file: str
    nbytes: int  # of its tensors
    seconds: float


class Go(msgspec.Struct, tag=True):
    """All ranks have theirs: the sizes that all take, and the file by which they meet."""

    num_blocks: int
    max_model_len: int
    store: str


class Step(msgspec.Struct, tag=True):
    """Take in what has happened since the last step, requests and ids of cancelled ones in their order, and step."""

    events: list[Request | str]


ToRank = Join | Go | Step
FromRank = Loaded | Failed

to_rank_decoder = msgspec.msgpack.Decoder(ToRank)
from_rank_decoder = msgspec.msgpack.Decoder(FromRank)
