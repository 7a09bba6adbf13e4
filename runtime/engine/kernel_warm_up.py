"""Runs steps at the start of an engine, so that no request waits while a kernel is compiled.

Triton compiles a kernel for each combination of its constants (`tl.constexpr`), of the types of its
arguments, and of what it specializes on: whether an integer is 1 or a multiple of 16, and whether
an address is a multiple of 16. CUDA graphs have launched their own kernels when they are captured.
What is left are the steps without graphs, and what is sampled after a graph. The steps here launch
each of their kernels once. Which steps these are follows from what the constants depend on:

- The number of tokens, T, in products with packed weights and of experts. Integers that follow from
  T are not specialized. The rows of a tile depend on the next power of two; above 512 tokens,
  weights are dequantized first, and experts have tiles for fewer and for more tokens. Whether there
  are partial sums, and so the type of the outputs, depends on the number of tiles: within a class
  of T, its smallest member has the fewest and its largest has the most. So T is each power of two,
  and one more.
- The number of logits, in an LM head with packed weights: the same numbers, from as many sequences
  as there can be, and from prompts with log probabilities, which take up to 64 positions at once.
- The longest query, in attention and in recurrent layers. It is 1 (decodes), or up to the queries
  of a small tile, or more; long prompts of recurrent layers are computed in chunks, and those of
  latent attention in the expanded form. Beside a prompt, decodes have tiles of their own.
- The context, in attention: whether a tile of queries is split over several programs. A context as
  long as can be is split. One of a few tokens is not, and neither are prompts that fill the GPU.
- The number of rows that are sampled from, and whether there are grammars and logits processors.
  These kernels are launched on their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from llmkit.kernels.device_copy import to_device
from llmkit.kernels.logits_tables import count_tokens
from llmkit.kernels.sampling_triton import rows_of_variants
from llmkit.kernels.token_bitmask import num_bitmask_words
from llmkit.runtime.engine.cuda_graphs import logits_dtype
from llmkit.runtime.engine.draft_head_proposer import DraftHeadProposer
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.model_runner import ModelRunner
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.sampling_tensors import SamplingTensors, sampling_tensors_on_device
from llmkit.runtime.engine.scheduler_output import ScheduledRequest, SchedulerOutput
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.state_scheduler import NO_ROW, StateRows

SMALLEST_CLASS = 8  # tokens: fewer have the tiles of 8
LARGEST_EDGE = 512  # tokens: the largest class whose smallest member runs, too
PROMPT_TOKENS = 65  # more than a tile of queries has
# Tokens at the end of a long context: in tiles of queries, and in the expanded form of latents.
LATE_TOKENS = (1, 2, PROMPT_TOKENS, 512)


class WarmUpStep(NamedTuple):
    """The sequences of a step."""

    query_lens: tuple[int, ...]  # new tokens of each
    context_lens: tuple[int, ...]  # tokens of each before
    prompt_logprobs: bool = False  # whether the log probabilities of the new tokens are computed
    num_drafts: int = 0  # how many of the last tokens of each are drafts


def warm_up_steps(config: EngineConfig, num_drafts: int = 0) -> list[WarmUpStep]:
    """The steps that launch every kernel of steps without graphs.

    num_drafts: draft tokens of a draft model, which computes each step, too; else 0.
    """
    longest = config.max_model_len
    budget = config.max_num_batched_tokens
    steps = []
    for num_tokens in token_counts(min(budget, longest * config.max_num_seqs)):
        num_seqs = min(num_tokens, config.max_num_seqs)
        share, rest = divmod(num_tokens, num_seqs)
        query_lens = tuple(share + (index < rest) for index in range(num_seqs))
        steps.append(WarmUpStep(query_lens, (0,) * num_seqs))
    for num_tokens in token_counts(min(budget, longest)):
        # The last token of a prompt has no log probability here, so that there is one more.
        length = min(num_tokens + 1, budget, longest)
        steps.append(WarmUpStep((length,), (0,), prompt_logprobs=True))
        steps.append(WarmUpStep((length,), (0,), num_drafts=min(num_drafts, length - 1)))
    for num_tokens in LATE_TOKENS:
        num_late = min(num_tokens, budget, longest)
        steps.append(WarmUpStep((num_late,), (longest - num_late,)))
    if config.max_num_seqs > 1 and budget > 2:
        prompt = min(PROMPT_TOKENS, budget - 1, longest)
        steps.append(WarmUpStep((1, prompt), (0, 0)))
        steps.append(WarmUpStep((1, prompt), (longest - 1, 0)))
    return list(dict.fromkeys(steps))


def token_counts(limit: int) -> list[int]:
    """The numbers of tokens up to `limit` that have other kernels than those before."""
    counts = [1, 2, 3]
    size = SMALLEST_CLASS
    while size < limit:
        counts.append(size)
        if size <= LARGEST_EDGE:
            counts.append(size + 1)
        size *= 2
    counts.append(limit)
    return sorted({count for count in counts if count <= limit})


def warm_up(runner: ModelRunner, done: Callable[[int, int], None] = lambda *_: None) -> int:
    """Launch the kernels of all steps without graphs. Returns the number of steps that ran.

    All ranks of a model must call it at the same time. Nothing that it computes is kept: it writes
    to the padding block of the KV caches and to the padding row of recurrent states.
    done: called with the number of steps that ran and of all.
    """
    config = runner.config
    num_drafts = 0
    if runner.draft_model is not None and not isinstance(runner.draft_model, DraftHeadProposer):
        num_drafts = min(1, config.num_speculative_tokens)
    steps = warm_up_steps(config, num_drafts)
    with runner.without_graphs():
        for number, step in enumerate(steps, start=1):
            runner.launch(_scheduler_output(step, config)).synchronize()
            done(number, len(steps))
    if runner.model.spec.is_last_stage and not runner.model.spec.num_labels:
        _launch_samplers(runner)
    runner.forget_last_step()
    if config.device.type == "cuda":
        torch.cuda.empty_cache()
    return len(steps)


def _scheduler_output(step: WarmUpStep, config: EngineConfig) -> SchedulerOutput:
    """A step of sequences of token 0, whose keys and values all go to the padding block."""
    params = SamplingParams(prompt_logprobs=0 if step.prompt_logprobs else None)
    requests = []
    for slot, (query_len, context_len) in enumerate(
        zip(step.query_lens, step.context_lens, strict=True)
    ):
        num_tokens = context_len + query_len
        request = EngineRequest(f"warm-up {slot}", [0] * num_tokens, params)
        num_blocks = -(-num_tokens // config.block_size)
        sequence = Sequence(
            request,
            seed=0,
            num_computed_tokens=context_len,
            num_draft_computed_tokens=context_len,
            block_tables=[
                [config.num_cache_blocks(window) - 1] * num_blocks
                for window in config.sliding_windows
            ],
            slot=slot,
        )
        requests.append(
            ScheduledRequest(
                sequence,
                start=context_len,
                num_tokens=query_len,
                samples_next_token=True,
                num_sampled=0,
                token_ids=[0] * query_len,
                num_draft_tokens=step.num_drafts,
                # The rows of sequences come first; the last row is that of unused sequences.
                state_rows=StateRows(NO_ROW, ((query_len, config.num_state_rows),)),
            )
        )
    return SchedulerOutput(requests)


@torch.inference_mode()
def _launch_samplers(runner: ModelRunner) -> None:
    """Launch the kernels that change logits and sample from them, for all numbers of rows."""
    config = runner.config
    model = runner.model
    device = config.device
    sampler = runner.graph_runner.sampler
    processors = runner.logits_processors
    if sampler is None or processors is None:
        return
    vocab_size = model.spec.full_model.vocab_size
    tables = processors.tables
    count_tokens(tables, processors.row_slots[:1], processors.row_slots[:1])  # counts nothing
    words = num_bitmask_words(vocab_size)
    bitmask = to_device(torch.full((1, words), -1, dtype=torch.int32), device)
    for num_rows in rows_of_variants(config.max_num_seqs * (1 + config.num_speculative_tokens)):
        zeros = torch.zeros(num_rows)
        integers = torch.zeros(num_rows, dtype=torch.int64)
        sampling = SamplingTensors(zeros, integers, zeros, zeros, integers)
        parameters = sampling_tensors_on_device(sampling, [0] * num_rows, device)
        bitmask_rows = torch.zeros(num_rows, dtype=torch.int32, device=device)
        dtype = logits_dtype(model.spec, config.dtype)
        logits = torch.zeros(num_rows, vocab_size, dtype=dtype, device=device)
        changes = (tables, processors.row_slots[:num_rows])
        sampler(logits, *parameters)
        sampler(logits, *parameters, bitmask, bitmask_rows)
        sampler(logits, *parameters, None, None, *changes)
        sampler(logits, *parameters, bitmask, bitmask_rows, *changes)
