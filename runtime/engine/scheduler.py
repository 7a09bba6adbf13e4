"""Which tokens the next step computes, and what its result means for each request.

There is one kind of step. A sequence has `total` tokens, of which `scheduled` are in the KV cache or on their way; a
step first advances the running sequences that decode, then spends what is left of its token budget on the prompts of
running sequences, an equal share each as far as they need it. A sequence whose tokens are all computed by a step
samples the next. A step may be planned before the tokens of the last one are known: it counts on them, not on what
they are. In a pipeline it leaves those alone whose tokens are not known, and so the stages work on different ones.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import replace

from llmkit.runtime.engine.blocks import BlockPool
from llmkit.runtime.engine.sequence import GONE, Chunk, Sequence
from llmkit.runtime.engine.speculate import NgramIndex
from llmkit.runtime.engine.types import EngineConfig, FinishReason, Logprobs, RequestError, TokenOutput

OVERTAKEN = 16  # how often a waiting request that finds no room lets smaller ones pass
LOOKED_AT = 64  # waiting requests that are tried in a step
NOT_FINITE = "the model's logits were not finite"


class Scheduler:
    """Waiting and running sequences over a block pool for each window."""

    def __init__(self, config: EngineConfig, eos_ids: tuple[int, ...], draft_model: bool = False) -> None:
        self.config, self.eos_ids, self.draft_model = config, frozenset(eos_ids), draft_model
        assert not (config.ahead and config.speculate), "guesses need the last step's tokens"
        self.pools = [BlockPool(config.blocks(window)) for window in config.windows]
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank
        self.poisoned: list[list[int]] = [[] for _ in self.pools]  # blocks to be zeroed before anybody gets them
        self._slots = list(range(config.max_num_seqs))
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self.prompt_tokens = self.generation_tokens = self.preemptions = 0
        self.prefix_queries = self.prefix_hits = self.drafted = self.accepted = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError when it could never run to its end."""
        prompt, wanted = len(sequence.request.prompt), sequence.request.sampling.max_tokens
        limit = min(self.config.max_model_len, self.config.num_blocks * self.config.block_size)
        if not prompt:
            raise RequestError("invalid_value", "the prompt is empty; at least one token was expected", "prompt")
        if sequence.longest > limit:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {prompt} tokens and {wanted} were asked for, {sequence.longest} together; "
                f"at most {limit} fit",
                "prompt" if prompt >= limit else "max_tokens",
            )
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._sequences[sequence.request.id] = sequence
        insort(self.waiting, sequence, key=lambda s: s.rank)

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its blocks; False when it is not under way."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)
        return sequence is not None

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; their sequences have blocks for them."""
        for sequence in self.running:
            self._slide(sequence)
        admits = not self._grow()  # after a preemption there is no room for others
        chunks = self._plan(admits)
        while not chunks and len(self.running) > 1 and not any(s.pending for s in self.running):
            self._preempt(self.running[-1])  # prompts that hold a window's blocks and all need more
            chunks = self._plan(admits=False)
        return chunks

    def commit(
        self, chunks: list[Chunk], sampled: list[list[int]],
        told: list[tuple[list[Logprobs], list[Logprobs]]] | None = None,
    ) -> list[TokenOutput]:  # fmt: skip
        """Record a step. `sampled`: the tokens after each chunk, wanted or not; -1 where logits are not finite. `told`:
        see `unfold`."""
        outputs = []
        for index, (chunk, tokens) in enumerate(zip(chunks, sampled, strict=True)):
            sequence = chunk.sequence
            sequence.pending -= chunk.samples
            of_prompt, of_new = told[index] if told else ([], [])
            sequence.prompt_logprobs[chunk.start : chunk.start + len(of_prompt)] = of_prompt
            if sequence.ended:
                continue
            if chunk.drafts:
                self.drafted += chunk.drafts
                self.accepted += len(tokens) - 1
                sequence.scheduled = chunk.start + len(tokens)
            if not chunk.samples and tokens[-1] >= 0:
                continue
            if chunk.samples and len(sequence.tokens) == len(sequence.request.prompt):
                self.prompt_tokens += len(sequence.request.prompt)
            outputs.append(self._accept(sequence, tokens, of_new))
        return outputs

    def give_up(self, chunks: list[Chunk], message: str) -> TokenOutput:
        """Take back a step that could not be computed: the request with most tokens in it fails, the others wait."""
        worst = max(chunks, key=lambda chunk: chunk.count).sequence
        for chunk in chunks:
            chunk.sequence.pending -= chunk.samples
            for pool, table in zip(self.pools, chunk.sequence.tables, strict=True):
                pool.forget(block for block in table if block != GONE)
            if chunk.sequence is not worst and not chunk.sequence.ended:
                self._preempt(chunk.sequence)
        self._end(worst)
        return self._output(worst, [], "error", message)

    def take_poisoned(self) -> list[list[int]]:
        """The blocks of each window that must be zeroed now."""
        taken, self.poisoned = self.poisoned, [[] for _ in self.pools]
        return taken

    def _accept(self, sequence: Sequence, tokens: list[int], told: list[Logprobs]) -> TokenOutput:
        new: list[int] = []
        reason: FinishReason | None = None
        sampling, pooling = sequence.request.sampling, sequence.request.pooling
        for token in tokens:
            if token < 0:
                reason = "error"
                break
            if pooling:  # it was drawn like others, and nobody has asked for it
                reason = "stop"
                break
            sequence.tokens.append(token)
            new.append(token)
            ends = token in sampling.stop_token_ids or (token in self.eos_ids and not sampling.ignore_eos)
            if ends or (sequence.guide is not None and sequence.guide.advance(token)):
                reason = "stop"
            elif len(sequence.tokens) >= sequence.longest:
                reason = "length"
            if reason:
                break
        self.generation_tokens += len(new)
        if reason is not None:
            self._end(sequence, poisoned=reason == "error")
        output = self._output(sequence, new, reason, NOT_FINITE if reason == "error" else None)
        first = len(sequence.tokens) - len(new) == len(sequence.request.prompt)
        of_prompt = sequence.prompt_logprobs if first and sampling.prompt_logprobs is not None else None
        of_new = told[: len(new)] if sampling.logprobs is not None else None
        pooled = sequence.pooled.numpy().tobytes() if pooling and reason == "stop" else None
        return replace(output, logprobs=of_new, prompt_logprobs=of_prompt, embedding=pooled)

    def _output(
        self, sequence: Sequence, new: list[int], reason: FinishReason | None, error: str | None
    ) -> TokenOutput:
        request = sequence.request
        return TokenOutput(request.id, new, reason, error, len(request.prompt), sequence.cached or 0)

    def _grow(self) -> bool:
        """Give every decoding sequence, first come first served, the block its next token needs.

        When none is free, the last one gives up its own and is computed again later. Whether that happened.
        """
        preempted = self.preemptions
        for sequence in list(self.running):
            if sequence.left != 1:
                continue
            while sequence.tables and not self._extend(sequence, sequence.total):
                self._preempt(self.running[-1])
        return self.preemptions > preempted

    def _enter(self, sequence: Sequence) -> bool:
        """Make a waiting sequence a running one, with the blocks that its prompt shares with earlier ones."""
        size, total = self.config.block_size, sequence.total
        shared = self._match(sequence)
        start = len(shared[0]) * size
        wanted = [
            -(-(total if window is None else min(total, start + self.config.chunk_tokens)) // size) - len(table)
            for window, table in zip(self.config.windows, shared, strict=True)
        ]
        for pool, table, count in zip(self.pools, shared, wanted, strict=True):
            if count + sum(map(pool.is_cached, table)) > pool.available:
                return False
        for pool, table, count in zip(self.pools, shared, wanted, strict=True):
            pool.share(block for block in table if block != GONE)
            table += pool.allocate(count)
        sequence.tables, sequence.slot = shared, self._slots.pop()
        sequence.scheduled = sequence.drafted = start
        sequence.named = start // size
        if sequence.cached is None:
            sequence.cached = start
            self.prefix_queries += total
            self.prefix_hits += start
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.rank)
        return True

    def _match(self, sequence: Sequence) -> list[list[int]]:
        """The tables of the longest cached prefix: all its blocks, or those that a window still sees.

        The last token is always computed: what follows it is sampled from its logits.
        """
        config, size, request = self.config, self.config.block_size, sequence.request
        whole = request.sampling.prompt_logprobs is not None or request.pooling == "mean"  # all must be computed
        names = [] if whole or not config.prefix_cache else sequence.names((sequence.total - 1) // size, size)
        runs = [0] * len(self.pools)  # blocks found one after the other, up to here
        best = 0
        for count, name in enumerate(names, start=1):
            runs = [run + 1 if pool.find(name) is not None else 0 for run, pool in zip(runs, self.pools, strict=True)]
            needs = [count if w is None else min(count, -(-(w - 1) // size)) for w in config.windows]
            if all(run >= need for run, need in zip(runs, needs, strict=True)):
                best = count
            elif None in config.windows and runs[config.windows.index(None)] < count:
                break
        tables = []
        for pool, window in zip(self.pools, config.windows, strict=True):
            first = 0 if window is None else max(0, best * size - window + 1) // size
            found = [pool.find(name) for name in names[first:best]]
            tables.append([GONE] * first + [block for block in found if block is not None])
        return tables

    def _plan(self, admits: bool) -> list[Chunk]:
        """Divide the step's budget: decodes first, then prompts, each of which gets its share before one gets more."""
        budget = self.config.max_num_batched_tokens
        starts: dict[Sequence, int] = {}
        guesses: dict[Sequence, list[int]] = {}
        most = -(-len(self.running) // self.config.stages)  # that decode in this step
        for sequence in self.running:
            known = not sequence.pending or (self.config.stages == 1 and not sequence.needs_tokens)
            if sequence.left == 1 and budget and known and len(starts) < most:
                starts[sequence], guesses[sequence] = sequence.scheduled, self._guess(sequence, budget - 1)
                budget -= self._take(sequence, 1 + len(guesses[sequence]))
        prompts = [s for s in self.running if s.left > 1]
        for sequence in prompts:
            starts[sequence] = sequence.scheduled
            budget -= self._take(sequence, min(sequence.left, self.config.chunk_tokens, budget))
        passed: list[Sequence] = []
        for sequence in self.waiting[:LOOKED_AT] if admits else ():
            if not budget or not self._slots or (passed and passed[-1].overtaken >= OVERTAKEN):
                break
            if sequence.pending or not self._enter(sequence):
                passed.append(sequence)  # it lets later ones pass, but not for ever
                continue
            for other in passed:
                other.overtaken += 1
            starts[sequence] = sequence.scheduled
            budget -= self._take(sequence, min(sequence.left, self.config.chunk_tokens, budget))
            prompts.append(sequence)
        for sequence in prompts:
            budget -= self._take(sequence, min(sequence.left, budget))
        chunks = [self._chunk(s, start, guesses.get(s, [])) for s, start in starts.items() if s.scheduled > start]
        return sorted(chunks, key=lambda chunk: chunk.count > 1)

    def _take(self, sequence: Sequence, count: int) -> int:
        """Plan the next tokens of a sequence, as many of `count` as find blocks.

        The blocks they fill can be shared at once: a step writes all keys and values of a layer before it reads any.
        """
        count = self._room(sequence, count)
        sequence.scheduled += count
        self._publish(sequence)
        return count

    def _chunk(self, sequence: Sequence, start: int, guesses: list[int]) -> Chunk:
        """What was planned for a sequence since its `start`."""
        count, drafts = sequence.scheduled - start, len(guesses)
        samples = start + count - drafts == sequence.total
        tokens = [*sequence.tokens[start : start + count], *guesses]
        chunk = Chunk(sequence, start, count, samples, sequence.generated, tokens, drafts)
        sequence.pending += samples
        return chunk

    def _guess(self, sequence: Sequence, budget: int) -> list[int]:
        """Tokens that may follow; zeros when a draft model will find them. They get no block from anybody else."""
        wanted = min(self.config.speculate, budget, sequence.request.sampling.max_tokens - sequence.generated - 1)
        if wanted <= 0 or sequence.needs_tokens:
            return []
        if self.draft_model:
            guesses = [0] * wanted
        else:
            sequence.index = sequence.index or NgramIndex()
            guesses = sequence.index.propose(sequence.tokens, wanted)
        return guesses[: self._room(sequence, 1 + len(guesses)) - 1]

    def _room(self, sequence: Sequence, count: int) -> int:
        """How many of the sequence's next `count` tokens find blocks, which they then have."""
        size = self.config.block_size
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            count = min(count, (len(table) + pool.available) * size - sequence.scheduled)
        self._extend(sequence, sequence.scheduled + count)
        return count

    def _extend(self, sequence: Sequence, tokens: int) -> bool:
        """Make the tables cover so many tokens; False, and nothing done, when there are too few blocks."""
        wanted = [max(0, -(-tokens // self.config.block_size) - len(table)) for table in sequence.tables]
        if any(count > pool.available for count, pool in zip(wanted, self.pools, strict=True)):
            return False
        for table, pool, count in zip(sequence.tables, self.pools, wanted, strict=True):
            if count:
                table += pool.allocate(count)
        return True

    def _publish(self, sequence: Sequence) -> None:
        """Offer the blocks that are full after the next step to the prefix cache; steps run in the order of plans."""
        size = self.config.block_size
        full = min(sequence.scheduled, len(sequence.tokens)) // size
        if not self.config.prefix_cache or full <= sequence.named:
            return
        names = sequence.names(full, size)
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            for block, name in zip(table[sequence.named : full], names[sequence.named :], strict=True):
                if block != GONE:
                    pool.name(block, name)
        sequence.named = full

    def _slide(self, sequence: Sequence) -> None:
        """Release the blocks that no later token of the sequence sees."""
        for window, pool, table in zip(self.config.windows, self.pools, sequence.tables, strict=True):
            if window is None:
                continue
            index = min(len(table), max(0, sequence.scheduled - window + 1) // self.config.block_size) - 1
            while index >= 0 and table[index] != GONE:
                pool.release([table[index]])
                table[index] = GONE
                index -= 1

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.scheduled = sequence.drafted = sequence.named = 0
        sequence.overtaken = OVERTAKEN  # nobody takes the room it has made
        insort(self.waiting, sequence, key=lambda s: s.rank)
        self.preemptions += 1

    def _end(self, sequence: Sequence, poisoned: bool = False) -> None:
        """Forget a sequence. `poisoned`: what its blocks hold must reach nobody."""
        del self._sequences[sequence.request.id]
        sequence.ended = True
        if not sequence.tables:
            self.waiting.remove(sequence)
            return
        if poisoned:
            for pool, table in zip(self.pools, sequence.tables, strict=True):
                pool.forget(block for block in table if block != GONE)
        left = self._release(sequence)
        if poisoned:
            for blocks, more in zip(self.poisoned, left, strict=True):
                blocks += more

    def _release(self, sequence: Sequence) -> list[list[int]]:
        """Give up a running sequence's blocks and slot; the blocks that nobody holds any more."""
        pairs = zip(self.pools, sequence.tables, strict=True)
        left = [pool.release(block for block in table if block != GONE) for pool, table in pairs]
        sequence.tables = []
        self._slots.append(sequence.slot)
        sequence.slot = -1
        self.running.remove(sequence)
        return left
