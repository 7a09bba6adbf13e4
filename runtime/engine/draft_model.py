"""A small model that proposes draft tokens for the large one."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.sampling import sample
from llmkit.model.decoder import Decoder
from llmkit.model.draft_head import DraftHead
from llmkit.model.language_model import LanguageModel, new_layer_caches
from llmkit.runtime.engine.cpu_graphs import CpuGraphRunner
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner, compute_logits
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.graph_runner import GraphRunner, NoGraphRunner
from llmkit.runtime.engine.paged_model import PagedModel, Span, int64_tensor
from llmkit.runtime.engine.sampling_tensors import (
    SamplingTensorCache,
    sampling_tensors_on_device,
)
from llmkit.runtime.engine.scheduler_output import ScheduledRequest, SchedulerOutput
from llmkit.runtime.engine.sequence import Sequence

# Known tokens of a sequence that the draft model computes in a step: the last one, and the last
# draft token where all were accepted.
MAX_KNOWN_TOKENS = 2
CPU = torch.device("cpu")
PLACEHOLDER = 0  # the draft token that is scheduled before the draft model has run


class DraftModelProposer:
    """Runs a draft model at the start of each step.

    The scheduler reserves places for the draft tokens with `propose`; the runner fills them with
    `run`. The draft model's KV cache has the same blocks as the full attention layers of the large
    model.
    """

    def __init__(
        self,
        model: LanguageModel | DraftHead,
        config: EngineConfig,
        max_query_len: int = MAX_KNOWN_TOKENS,
        hidden_size: int = 0,
    ) -> None:
        """max_query_len: the most tokens of a sequence in a step without prompts. hidden_size: see
        `CudaGraphRunner`.
        """
        self._config = config
        on_gpu = config.device.type == "cuda"
        kv_caches = new_layer_caches(
            model, lambda _: config.num_cache_blocks(None), config.block_size
        )
        full_attention = config.sliding_windows.index(None)
        table_of_window = dict.fromkeys(model.spec.sliding_windows, full_attention)
        self.paged_model = PagedModel(model, kv_caches, config, table_of_window)
        self._sampling_tensors = SamplingTensorCache()
        self._graph_sampling_tensors = SamplingTensorCache()  # of all tokens of a graph's step
        self.graph_runner: GraphRunner = NoGraphRunner()
        max_blocks = -(-config.max_model_len // config.block_size)
        # What torch does beside compiled kernels is too little for several threads.
        self._few_threads: Callable[[], AbstractContextManager[None]] = nullcontext
        if self.paged_model.is_compiled:
            self._few_threads = cpu_kernels.torch_on_one_thread
        # After `_compute`: the hidden states of its tokens.
        self._hidden_states = torch.empty(0)
        if on_gpu and isinstance(model, Decoder | DraftHead):
            self.graph_runner = CudaGraphRunner(
                model,
                kv_caches,
                max_blocks,
                config.block_size,
                config.max_num_seqs,
                enabled=not config.enforce_eager,
                max_query_len=max_query_len,
                max_capture_size=config.max_cudagraph_capture_size,
                max_mixed_tokens=config.max_num_batched_tokens,
                hidden_size=hidden_size,
            )
        elif isinstance(model, Decoder | DraftHead):
            self.graph_runner = CpuGraphRunner(
                model,
                kv_caches,
                max_blocks,
                config.block_size,
                config.max_num_seqs,
                enabled=not config.enforce_eager,
            )

    def propose(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """See `DraftProposer.propose`; the tokens are placeholders."""
        return [PLACEHOLDER] * max_tokens

    def forget(self, sequence: Sequence) -> None:
        """See `DraftProposer.forget`; nothing is stored."""

    def run(self, step: SchedulerOutput) -> torch.Tensor | None:
        """The draft tokens of all requests in their order: int64 [n] on the device, or None."""
        with self._few_threads():
            return self._run(step)

    def _run(self, step: SchedulerOutput) -> torch.Tensor | None:
        """See `run`.

        First the draft model computes the known tokens of each sequence that its cache does not
        have yet. Then each round samples one draft token for every request that has drafts left and
        computes it.
        """
        token_ids: list[int] = []
        spans: list[Span] = []
        for request in step.requests:
            sequence = request.sequence
            start = sequence.num_draft_computed_tokens
            stop = request.stop - request.num_draft_tokens
            spans.append((sequence, start, stop))
            token_ids += sequence.token_ids[start:stop]
        span_ends = list(accumulate(stop - start for _, start, stop in spans))

        drafting: list[ScheduledRequest] = []  # requests with drafts left
        rows: list[int] = []  # the row of each one's last token
        for request, end in zip(step.requests, span_ends, strict=True):
            if request.num_draft_tokens:
                drafting.append(request)
                rows.append(end - 1)
        draft_token_ids = self._compute(
            self._to_device(token_ids),
            spans,
            rows,
            [request.sequence for request in drafting],
            [request.num_sampled for request in drafting],
        )
        return self._draft(step.requests, drafting, draft_token_ids)

    def _draft(
        self,
        requests: list[ScheduledRequest],
        drafting: list[ScheduledRequest],
        draft_token_ids: torch.Tensor,
    ) -> torch.Tensor | None:
        """All draft tokens of a step, see `run`.

        drafting: those of the requests that have drafts. draft_token_ids: the first one of each.
        """
        rounds: list[torch.Tensor] = []  # the draft tokens of each round
        while drafting:
            num_rounds = len(rounds)
            rounds.append(draft_token_ids)
            left = [
                index
                for index, request in enumerate(drafting)
                if request.num_draft_tokens > num_rounds + 1
            ]
            if not left:
                break
            drafting = [drafting[index] for index in left]
            draft_token_ids = self._compute(
                self._continued(draft_token_ids, left),
                [self._draft_span(request, num_rounds) for request in drafting],
                list(range(len(drafting))),
                [request.sequence for request in drafting],
                [request.num_sampled + num_rounds + 1 for request in drafting],
            )
        if not rounds:
            return None
        return torch.cat(rounds)[self._to_device(_order_by_request(requests))]

    def _continued(self, draft_token_ids: torch.Tensor, left: list[int]) -> torch.Tensor:
        """The tokens that the next round computes: the last drafts of the requests `left`."""
        return self._rows_of(draft_token_ids, left)

    def _draft_span(self, request: ScheduledRequest, index: int) -> Span:
        """Where the draft model computes a draft token of a request."""
        position = request.stop - request.num_draft_tokens + index
        return request.sequence, position, position + 1

    def _compute(
        self,
        token_ids: torch.Tensor,
        spans: list[Span],
        rows: list[int],
        sequences: list[Sequence],
        counters: list[int],
    ) -> torch.Tensor:
        """Compute spans, and sample a draft token after each of `rows`.

        token_ids: int64 [T] of all spans. sequences, counters: of each row, its sequence and the
        output tokens before the sampled one. Returns int64 [rows].
        """
        inputs = self.paged_model.forward_inputs(spans)
        model = self.paged_model.model
        graph_runner = self.graph_runner
        is_uniform = graph_runner.can_replay(inputs.query_lens)
        if not is_uniform and not graph_runner.can_replay(inputs.query_lens, is_mixed=True):
            self._hidden_states = self.paged_model.forward(token_ids, inputs)
            if not rows:
                return token_ids[:0]
            last = self._rows_of(self._hidden_states, rows)
            logits = compute_logits(model, last, graph_runner.sampler)
            return self._sample(logits, sequences, counters)

        if is_uniform:  # the graph samples after each token
            of_tokens = [sequence for sequence, start, stop in spans for _ in range(start, stop)]
            counters_of_tokens = [0] * len(of_tokens)
            for row, counter in zip(rows, counters, strict=True):
                counters_of_tokens[row] = counter
            sampling = self._graph_sampling_tensors.get(of_tokens)
            logits, sampled = graph_runner.replay(token_ids, inputs, sampling, counters_of_tokens)
        else:
            sampling = self._sampling_tensors.get(sequences)
            logits, sampled = graph_runner.replay(token_ids, inputs, sampling, counters, rows)
        self._hidden_states = graph_runner.hidden_states
        if not rows:
            return token_ids[:0]
        if sampled is None or not graph_runner.samples_tokens:
            logits = self._rows_of(logits, rows) if is_uniform else logits
            return self._sample(logits.float(), sequences, counters)
        sampled = self._rows_of(sampled, rows) if is_uniform else sampled
        # -1, where logits are not finite, is no token; the large model does not accept another.
        return sampled.clamp_min(0)

    def _sample(
        self, logits: torch.Tensor, sequences: list[Sequence], counters: list[int]
    ) -> torch.Tensor:
        """Sample with the seeds and counters of the large model.

        The same random draws make both models agree more often.
        """
        sampling = self._sampling_tensors.get(sequences)
        sampler = self.graph_runner.sampler
        if sampler is not None:
            device = self._config.device
            arguments = sampling_tensors_on_device(sampling, counters, device)
            # -1, where logits are not finite, is no token; see `_compute`.
            return sampler(logits, *arguments).clamp_min(0)
        group = self.paged_model.model.parallel_group
        return sample(logits, *sampling, int64_tensor(counters, CPU), group)

    def _rows_of(self, values: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """values[rows]. rows: in rising order."""
        return values if len(rows) == len(values) else values[self._to_device(rows)]

    def _to_device(self, values: list[int]) -> torch.Tensor:
        return int64_tensor(values, self._config.device)


def _order_by_request(requests: SequenceOf[ScheduledRequest]) -> list[int]:
    """The indices that sort the concatenated rounds by request."""
    places: list[list[int]] = [[] for _ in requests]
    place = 0
    for round_index in range(max(request.num_draft_tokens for request in requests)):
        for index, request in enumerate(requests):
            if request.num_draft_tokens > round_index:
                places[index].append(place)
                place += 1
    return [place for of_request in places for place in of_request]
