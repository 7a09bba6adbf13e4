"""Runs one step: chunks of token ids in, the tokens that follow each out."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from llmkit.kernels.attention import AttentionBatch
from llmkit.kernels.jit import sent
from llmkit.kernels.sampling import report, sample
from llmkit.model.decoder import Decoder
from llmkit.model.lora import Adapters
from llmkit.model.ranks import Waitable
from llmkit.runtime.engine.graphs import Graphs, Parameters
from llmkit.runtime.engine.replay import Recordings, Tables
from llmkit.runtime.engine.sequence import Chunk, Sequence
from llmkit.runtime.engine.shaping import Told, blank, most, places, pool, shape_, tell_prompts, told_rows
from llmkit.runtime.engine.speculate import confirmed
from llmkit.runtime.engine.types import EngineConfig, SamplingParams

Span = tuple[Sequence, int, int]  # positions [start, stop) of a sequence


class _Sampling:
    """How the sequences of a step sample, on the CPU, as `sample` wants it; most steps are of those of the last."""

    def __init__(self) -> None:
        self._asked: list[tuple[SamplingParams, int]] = []
        self._parameters: Parameters | None = None

    def parameters(self, sequences: SequenceOf[Sequence]) -> Parameters:
        """temperature, top_k, top_p, min_p, seeds: [n] each."""
        asked = [(sequence.request.sampling, sequence.seed) for sequence in sequences]
        if self._parameters is None or asked != self._asked:
            floats = torch.tensor([(one.temperature, one.top_p, one.min_p) for one, _ in asked]).T
            top_k, seeds = torch.tensor([(one.top_k, seed) for one, seed in asked]).T
            self._asked, self._parameters = asked, (floats[0], top_k, floats[1], floats[2], seeds)
        return self._parameters


@dataclass(frozen=True)
class Flight:
    """A step under way on the device."""

    chunks: list[Chunk]
    ids: torch.Tensor  # on the host once `done`: for each chunk what was chosen after its last 1 + drafts tokens
    guesses: torch.Tensor | None  # on the host once `done`: a draft model's, one after the other
    told: Told | None  # on the host once `done`: log probabilities, for `unfold`
    done: Waitable | None

    @property
    def results(self) -> list[torch.Tensor]:
        """`ids`, what is told and what has been pooled."""
        return [self.ids, *(self.told or ()), *(chunk.sequence.pooled for chunk in self.chunks if chunk.pools)]

    @property
    def known(self) -> list[torch.Tensor]:
        """The results, waited for."""
        if self.done is not None:
            self.done.synchronize()
        return self.results

    def wait(self) -> list[list[int]]:
        """The tokens after each chunk, the confirmed guesses first; -1 where the logits are not finite."""
        chosen, results, at, guessed = self.known[0].tolist(), [], 0, 0
        drawn = [] if self.guesses is None else self.guesses.tolist()
        for chunk in self.chunks:
            end = at + 1 + chunk.drafts
            guesses = chunk.tokens[chunk.count - chunk.drafts :]
            if drawn:
                guesses, guessed = drawn[guessed : guessed + chunk.drafts], guessed + chunk.drafts
            results.append(confirmed(guesses, chosen[at:end]))
            # The draft model has seen every guess but the last.
            known = chunk.stop - chunk.drafts
            chunk.sequence.drafted = min(known + max(0, chunk.drafts - 1), known + len(results[-1]) - 1)
            at = end
        return results


class Runner:
    """A model and its KV cache on a device, and a draft model whose cache has the same blocks."""

    def __init__(
        self, model: Decoder, config: EngineConfig, draft: Decoder | None = None, eos_ids: tuple[int, ...] = ()
    ) -> None:
        self.model, self.config, self.draft, self.eos_ids = model, config, draft, eos_ids
        self.adapters = Adapters(model)
        on_gpu = config.device.type == "cuda"  # where graphs need a block for rows that no sequence has
        self.caches = [
            model.new_cache(config.blocks(layer.window) + on_gpu, config.block_size, config.kv_dtype)
            for layer in model.spec.layers
        ]
        layers = draft.spec.layers if draft is not None else ()
        self.draft_caches = [draft.new_cache(config.num_blocks, config.block_size) for _ in layers] if draft else []
        longest = -(-config.max_model_len // config.block_size)
        self.recordings: Recordings | Graphs
        if on_gpu:
            self.recordings = Graphs(model, self.caches, longest, config.block_size, config.max_num_seqs)
        else:
            self.recordings = Recordings(model, self.caches, longest, config.block_size)
        self._last = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=config.device)
        self._sampling = _Sampling()

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Flight:
        """Start computing the chunks. Steps run in the order of their launches.

        Only a chunk that samples has use for the token after it, but every one is looked at: a value that is not
        finite spreads to all later tokens of its sequence, and its blocks must be cleaned before others get them.
        """
        guesses = self._guess(chunks) if self.draft is not None else None
        tokens = self._tokens(chunks)
        if guesses is not None:
            tokens[self._device(_guess_rows(chunks))] = guesses
        spans = [(chunk.sequence, chunk.start, chunk.stop) for chunk in chunks]
        logits, ids, told = self._logits(chunks, spans, tokens)
        sequences, ranks = [chunk.sequence for chunk in chunks for _ in range(1 + chunk.drafts)], self.model.ranks
        if not self.model.spec.ends:
            for chunk in chunks:
                chunk.sequence.pooled = torch.zeros(self.model.spec.hidden)
            flight = Flight(chunks, torch.zeros(len(sequences), dtype=torch.int64), None, blank(chunks), None)
            return replace(flight, done=ranks.expect(flight.results))
        shaping = any(one.guide is not None or one.request.sampling.shapes for one in sequences)
        rows = told_rows(chunks)
        raw = logits[self._device(rows)] if rows else logits
        sampled = any(sequence.request.sampling.temperature for sequence in sequences)
        if ids is None or shaping or (sampled and not self.recordings.draws):
            counters = [chunk.counter + i for chunk in chunks for i in range(1 + chunk.drafts)]
            finite = ranks.finite(logits)
            if shaping:
                shape_(logits, sequences, counters, ranks.first, self.eos_ids)
            ids = torch.where(finite, self._sample(logits, sequences, counters), -1)
        if rows:
            told.append(report(raw, ids[self._device(rows)], most(chunks), ranks))
        if self.config.ahead:
            self._last[self._device([sequence.slot for sequence in sequences])] = ids
        flight = self._flight(chunks, ids, guesses, told)
        if ranks.stages > 1:
            ranks.publish(flight.known)
        return flight

    def clear(self, blocks: list[list[int]]) -> None:
        """Zero blocks of each window whose values may be NaN: masked attention multiplies by 0 what it does not see."""
        for layer, cache in zip(self.model.spec.layers, self.caches, strict=True):
            cache.clear(blocks[self.config.windows.index(layer.window)])
        for cache in self.draft_caches:
            cache.clear(blocks[self.config.windows.index(None)])

    def _tokens(self, chunks: list[Chunk]) -> torch.Tensor:
        """The step's token ids on the device: from the host, or where the last step has put them."""
        known: list[int] = []
        rows, slots = [], []
        for chunk in chunks:
            known += chunk.tokens
            if len(chunk.tokens) < chunk.count:
                rows.append(len(known))
                slots.append(chunk.sequence.slot)
                known.append(0)
        tokens = self._device(known)
        if rows:  # a token that is not finite has ended its sequence; the step runs all the same
            tokens[self._device(rows)] = self._last[self._device(slots)].clamp_min(0)
        return tokens

    def _logits(
        self, chunks: list[Chunk], spans: list[Span], tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[Told]]:
        """Logits after each chunk's last 1 + drafts tokens, the most probable ids where they are known, and what there
        is to tell of prompts."""
        prompts = any(places(chunk)[0] for chunk in chunks)
        plain = not any(sequence.adapter or sequence.request.pooling for sequence, _, _ in spans)
        if plain and not prompts and len(tokens) == len(spans) and self.recordings.take(len(spans)):
            if isinstance(self.recordings, Recordings):
                return *self.recordings.run(tokens, *self._places(spans)), []
            sampling = self._sampling.parameters([sequence for sequence, _, _ in spans])
            counters = [chunk.counter for chunk in chunks]
            return *self.recordings.run(tokens, *self._places(spans), (sampling, counters)), []
        with self.adapters.applied([(chunk.sequence.adapter, chunk.count) for chunk in chunks], self._device):
            hidden = self._forward(spans, tokens)
        ends = accumulate(chunk.count for chunk in chunks)
        rows = [row for chunk, end in zip(chunks, ends, strict=True) for row in range(end - 1 - chunk.drafts, end)]
        if not self.model.spec.ends:
            return hidden, None, []
        if not plain:
            pool(chunks, hidden)
        told = tell_prompts(self.model, chunks, hidden, most(chunks)) if prompts else []
        return self.model.logits(hidden if len(rows) == len(hidden) else hidden[self._device(rows)]), None, told

    def _places(self, spans: list[Span], draft: Decoder | None = None) -> tuple[list[int], list[int], Tables]:
        """Positions of all tokens, and the spans' contexts and block tables, for the model or a draft model."""
        spec, windows, positions = (draft or self.model).spec, self.config.windows, list[int]()
        for sequence, start, stop in spans:
            offset = spec.rope_offset(sequence.longest)
            positions += range(start + offset, stop + offset)
        tables = {
            window: [sequence.tables[windows.index(None if draft else window)] for sequence, _, _ in spans]
            for window in spec.windows
        }
        return positions, [stop for _, _, stop in spans], tables

    def _forward(self, spans: list[Span], tokens: torch.Tensor, draft: Decoder | None = None) -> torch.Tensor:
        """Hidden states [T, H] of the spans, one after the other, or a draft model's; tokens: int64 [T]."""
        model, (positions, contexts, tables) = draft or self.model, self._places(spans, draft)
        batch = AttentionBatch.build(
            [stop - start for _, start, stop in spans], contexts, tables, self.config.block_size, self.config.device
        )
        return model(tokens, self._device(positions), batch, self.draft_caches if draft else self.caches)

    def _guess(self, chunks: list[Chunk]) -> torch.Tensor | None:
        """Guesses of the draft model, the chunks' one after the other; its cache follows the chunks."""
        assert self.draft is not None
        drawn: list[torch.Tensor] = []  # of each round, one for each chunk that has so many guesses
        spans: list[Span] = []
        known: list[int] = []
        for chunk in chunks:
            sequence, stop = chunk.sequence, chunk.stop - chunk.drafts
            spans.append((sequence, sequence.drafted, stop))
            known += sequence.tokens[sequence.drafted : stop]
        hidden = self._forward(spans, self._device(known), self.draft)
        ends = list(accumulate(stop - start for _, start, stop in spans))
        guessing = [index for index, chunk in enumerate(chunks) if chunk.drafts]
        rows = [ends[index] - 1 for index in guessing]
        for turn in range(max((chunk.drafts for chunk in chunks), default=0)):
            sequences = [chunks[index].sequence for index in guessing]
            counters = [chunks[index].counter + turn for index in guessing]
            ids = self._sample(self.draft.logits(hidden[self._device(rows)]), sequences, counters)
            drawn.append(ids)
            staying = [place for place, index in enumerate(guessing) if chunks[index].drafts > turn + 1]
            if not staying:
                break
            guessing, ids = [guessing[place] for place in staying], ids[self._device(staying)]
            stops = [chunks[index].stop - chunks[index].drafts + turn for index in guessing]
            spans = [(chunks[index].sequence, stop, stop + 1) for index, stop in zip(guessing, stops, strict=True)]
            hidden, rows = self._forward(spans, ids, self.draft), list(range(len(spans)))
        if not drawn:
            return None
        order = [(turn, index) for turn in range(len(drawn)) for index, c in enumerate(chunks) if c.drafts > turn]
        by_chunk = sorted(range(len(order)), key=lambda place: (order[place][1], order[place][0]))
        return torch.cat(drawn)[self._device(by_chunk)]

    def _sample(self, logits: torch.Tensor, sequences: list[Sequence], counters: list[int]) -> torch.Tensor:
        """logits: float32, a row for each of `sequences`, whose `counters` tokens were sampled before."""
        ranks = self.model.ranks
        return sample(logits, *self._sampling.parameters(sequences), torch.tensor(counters), ranks)

    def _flight(self, chunks: list[Chunk], ids: torch.Tensor, guesses: torch.Tensor | None, told: list[Told]) -> Flight:
        table = [torch.cat(parts) for parts in zip(*told, strict=True)]
        if self.config.device.type == "cpu":
            return Flight(chunks, ids, guesses, tuple(table) or None, None)  # type: ignore[arg-type]
        drawn = None if guesses is None else _to_host(guesses)
        host, *table = map(_to_host, (ids, *table))
        for chunk in chunks:
            if chunk.pools:
                chunk.sequence.pooled = _to_host(chunk.sequence.pooled)
        done = torch.cuda.Event()
        done.record()
        return Flight(chunks, host, drawn, tuple(table) or None, done)  # type: ignore[arg-type]

    def _device(self, values: list[int]) -> torch.Tensor:
        """int64, on the device."""
        return sent(torch.tensor(values, dtype=torch.int64), self.config.device)


def _guess_rows(chunks: list[Chunk]) -> list[int]:
    """The rows of guesses among the step's tokens."""
    ends = accumulate(chunk.count for chunk in chunks)
    return [row for chunk, end in zip(chunks, ends, strict=True) for row in range(end - chunk.drafts, end)]


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, on its way."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
