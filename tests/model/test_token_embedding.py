"""The factors of embeddings in 16 bits, and the tables' dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support.tiny_families import family_oracle

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model

TOKENS = torch.arange(3, 120)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", ["gemma", "gemma2", "gemma3", "gemma4", "vaultgemma", "afmoe", "granite"]
)
def test_embeddings_equal_transformers_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Gemma rounds its factor to the dtype; sqrt(32) is no number of 16 bits. Others do not."""
    family_oracle(name, tmp_path)
    model = load_model(open_checkpoint(tmp_path), dtype)
    assert isinstance(model, Decoder)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=dtype
    ).eval()
    with torch.inference_mode():
        output = oracle.model(TOKENS[None], output_hidden_states=True, use_cache=False)
    hidden = model.embed_tokens(TOKENS)
    assert torch.equal(hidden, output.hidden_states[0][0])
    if name == "gemma4":
        with torch.inference_mode():
            rows = oracle.model.get_per_layer_inputs(TOKENS[None])
            wanted = oracle.model.project_per_layer_inputs(hidden[None], rows)[0]
        found = model.embed_tokens.per_layer_inputs(TOKENS, hidden)
        assert found is not None
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_tables_of_16_bits_leave_the_model_in_float32(tmp_path: Path) -> None:
    family_oracle("gemma4", tmp_path / "wide")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "wide", dtype=torch.bfloat16
    )
    oracle.save_pretrained(tmp_path / "narrow")
    model = load_model(open_checkpoint(tmp_path / "narrow"), torch.float32, packed=True)
    assert isinstance(model, Decoder)
    assert model.embed_tokens.per_layer["embed"].dtype == torch.bfloat16
    assert model.dtype == torch.float32
    assert model.embed_tokens(TOKENS).dtype == torch.float32
