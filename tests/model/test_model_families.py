"""Every family against transformers on tiny random models: whole prompts, decoding, chunks and
mixed batches.
"""

import pytest
import torch
from support.tiny_families import COMMON, FAMILIES, family_oracle, oracle_logits

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.model.decoder import Decoder
from llmkit.model.full_forward import window_logits
from llmkit.model.language_model import new_kv_caches
from llmkit.model.weight_loader import load_model

BLOCK = 16


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The oracle and our decoder, from the same checkpoint."""
    path = tmp_path_factory.mktemp("family")
    oracle = family_oracle(request.param, path)
    return oracle, load_model(open_checkpoint(path), torch.float32)


def tokens_of(length: int, seed: int) -> torch.Tensor:
    return torch.randint(
        3, COMMON["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)
    )


class Sequences:
    """Several sequences in one paged cache, advanced by any number of tokens at a time."""

    def __init__(self, model: Decoder, sequences: list[torch.Tensor]) -> None:
        self.model = model
        self.sequences = sequences
        self.done = [0] * len(sequences)
        per = 128 // BLOCK
        order = torch.randperm(
            per * len(sequences), generator=torch.Generator().manual_seed(1)
        ).tolist()
        self.tables = [order[i * per : (i + 1) * per] for i in range(len(sequences))]
        self.caches = new_kv_caches(model, lambda _: per * len(sequences), BLOCK)

    @torch.inference_mode()
    def step(self, counts: list[int]) -> list[torch.Tensor]:
        """Advance sequence i by counts[i] tokens (0: not in the batch); their logits."""
        active = [i for i, n in enumerate(counts) if n]
        spans = {i: (self.done[i], self.done[i] + counts[i]) for i in active}
        batch = AttentionBatch.build(
            [counts[i] for i in active],
            [spans[i][1] for i in active],
            {None: [self.tables[i] for i in active]},
            BLOCK,
        )
        tokens = torch.cat([self.sequences[i][slice(*spans[i])] for i in active])
        positions = torch.cat(
            [
                torch.arange(*spans[i]) + self.model.spec.rope_offset(len(self.sequences[i]))
                for i in active
            ]
        )
        logits = self.model.logits(self.model(tokens, positions, batch, self.caches))
        for i in active:
            self.done[i] = spans[i][1]
        return list(logits.split([counts[i] for i in active]))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 40, 100])
def test_decoder_agrees_with_transformers_on_a_prompt(pair, length: int) -> None:
    oracle, model = pair
    tokens = tokens_of(length, length)
    close(next(window_logits(model, tokens[None])), oracle_logits(oracle, tokens))


def test_decoder_agrees_with_transformers_when_decoding(pair) -> None:
    oracle, model = pair
    tokens = tokens_of(60, 7)
    run = Sequences(model, [tokens])
    logits = [run.step([20])[0], *(run.step([1])[0] for _ in range(40))]
    close(torch.cat(logits), oracle_logits(oracle, tokens))


def test_decoder_agrees_with_transformers_on_mixed_batches(pair) -> None:
    """Prefill chunks and decodes share a batch; each sequence is computed as if alone."""
    oracle, model = pair
    sequences = [tokens_of(n, n) for n in (30, 100, 57)]
    run = Sequences(model, sequences)
    plan = [[29, 0, 0], [1, 40, 0], [0, 40, 17], [0, 19, 1], [0, 1, 39]]
    got: list[list[torch.Tensor]] = [[] for _ in sequences]
    for counts in plan:
        active = [i for i, n in enumerate(counts) if n]
        for i, logits in zip(active, run.step(counts), strict=True):
            got[i].append(logits)
    for tokens, logits in zip(sequences, got, strict=True):
        close(torch.cat(logits), oracle_logits(oracle, tokens))


def test_decoder_longrope_selects_factors_by_total_length(pair) -> None:
    _, model = pair
    longrope = any(rope.long_inv_freq for rope in model.spec.ropes.values())
    assert model.spec.rope_offset(64) == 0
    assert model.spec.rope_offset(65) == (128 if longrope else 0)
