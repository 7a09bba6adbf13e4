"""Every family against transformers on tiny random models: whole prompts, decoding, chunks and
mixed batches.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from support.paged_sequences import Sequences, close, tokens_of
from support.parity import check_decoding, check_mixed_batches
from support.tiny_families import (
    FAMILIES,
    LATENT_FAMILIES,
    STATE_FAMILIES,
    family_oracle,
    oracle_logits,
)

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.decoder import Decoder
from llmkit.model.full_forward import window_logits
from llmkit.model.weight_loader import load_model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The oracle and our decoder, from the same checkpoint."""
    path = tmp_path_factory.mktemp("family")
    oracle = family_oracle(request.param, path)
    return oracle, load_model(open_checkpoint(path), torch.float32)


@pytest.mark.parametrize("length", [1, pytest.param(40, marks=pytest.mark.slow), 100])
def test_decoder_agrees_with_transformers_on_a_prompt(pair, length: int) -> None:
    oracle, model = pair
    tokens = tokens_of(length, length)
    close(next(window_logits(model, tokens[None])), oracle_logits(oracle, tokens))


def test_decoder_agrees_with_transformers_when_decoding(pair) -> None:
    oracle, model = pair
    check_decoding(model, partial(oracle_logits, oracle))


def test_decoder_agrees_with_transformers_on_mixed_batches(pair) -> None:
    oracle, model = pair
    check_mixed_batches(model, partial(oracle_logits, oracle))


@pytest.fixture(scope="module", params=STATE_FAMILIES + LATENT_FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The oracle's logits of a prompt, and our decoder as it is loaded for serving."""
    path = tmp_path_factory.mktemp("served")
    tokens = tokens_of(100, 3)
    expected = oracle_logits(family_oracle(request.param, path), tokens)
    return tokens, expected, load_model(open_checkpoint(path), torch.float32, packed=True)


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_served_decoder_agrees_with_transformers_however_a_prompt_is_cut(
    served, chunk: int
) -> None:
    tokens, expected, model = served
    run = Sequences(model, [tokens])
    logits = []
    while run.done[0] < len(tokens):
        logits.append(run.step([min(chunk, len(tokens) - run.done[0])])[0])
    close(torch.cat(logits), expected)


def test_decoder_longrope_selects_factors_by_total_length(pair) -> None:
    _, model = pair
    longrope = any(rope.long_inv_freq for rope in model.spec.ropes.values())
    assert model.spec.rope_offset(64) == 0
    assert model.spec.rope_offset(65) == (128 if longrope else 0)


@pytest.mark.parametrize(
    "name", ["gemma", "gemma2", "gemma3", "vaultgemma", "gemma4-dense", "granite"]
)
def test_embeddings_are_scaled_as_in_transformers_in_bfloat16(name: str, tmp_path: Path) -> None:
    """Gemma's code rounds the factor to the dtype of the model first; Granite's does not."""
    changes = {"embedding_multiplier": 6.3} if name == "granite" else {}
    oracle = family_oracle(name, tmp_path, **changes).to(torch.bfloat16)
    tokens = tokens_of(40, 1)
    expected = []
    oracle.model.layers[0].register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0]))
    oracle_logits(oracle, tokens)
    model = load_model(open_checkpoint(tmp_path), torch.bfloat16)
    assert isinstance(model, Decoder)
    assert torch.equal(model.embed_tokens(tokens), expected[0][0])
