"""A request to the engine: the same type in the engine and between processes."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.runtime.engine.sampling_params import PoolingTask, SamplingParams


@dataclass(frozen=True)
class EngineRequest:
    """A tokenized prompt and how to continue it. Plain data, which msgspec can encode."""

    request_id: str  # chosen by the caller, unique among unfinished requests
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    priority: int = 0  # lower values run first
    cache_salt: str = ""  # only requests with the same salt share cached prefixes
    adapter: str | None = None  # a name given to `Engine.add_adapter`; None: the base model
    grammar: str | None = None  # constrains the output; compiled by `Engine.compile_grammar`
    # How many of the prompt's first tokens other conversations are likely to begin with, too: the
    # system prompt and the tools. A model with recurrent layers keeps its state after them.
    num_shared_tokens: int = 0
    # Return no tokens, but the pooled hidden states of the prompt or, with "classify", the logits
    # of labels after its last token; max_tokens is 1 then.
    pooling: PoolingTask | None = None
    # With "classify": the tokens whose logits are returned, in this order. None: the labels of the
    # model's classification head.
    label_token_ids: tuple[int, ...] | None = None
