"""Every family against transformers on tiny random models: whole prompts, decoding, chunks and mixed batches."""

import pytest
import torch
import transformers

from llmkit.checkpoint.source import open_checkpoint
from llmkit.kernels.attention import AttentionBatch
from llmkit.model.decoder import Decoder
from llmkit.model.loader import load_model
from llmkit.model.sequence import logits_of

BLOCK = 16
COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
GEMMA_LAYERS = ["sliding_attention", "full_attention"] * 2
# name: (model_type, what differs from COMMON)
FAMILIES = {
    "llama": ("llama", {}),
    "llama-mha-bias-tied": (
        "llama",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 12, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 64, "sliding_window": 50},
    ),
    "phi3-partial": (
        "phi3",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 12, "layer_types": GEMMA_LAYERS},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 12,
            "layer_types": GEMMA_LAYERS,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe-normalized": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The oracle and our decoder, from the same checkpoint."""
    kind, differences = FAMILIES[request.param]
    config = transformers.AutoConfig.for_model(kind, **(COMMON | differences))
    torch.manual_seed(0)
    oracle = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in oracle.parameters():  # norms and biases too, which start as ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("family")
    oracle.save_pretrained(path)
    return oracle, load_model(open_checkpoint(path), torch.float32)


def oracle_logits(oracle: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return oracle(tokens[None], use_cache=False).logits[0].float()


def tokens_of(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, COMMON["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))


class Sequences:
    """Several sequences in one paged cache, advanced by any number of tokens at a time."""

    def __init__(self, model: Decoder, sequences: list[torch.Tensor]) -> None:
        self.model, self.sequences = model, sequences
        self.done = [0] * len(sequences)
        per = 128 // BLOCK
        order = torch.randperm(per * len(sequences), generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = [order[i * per : (i + 1) * per] for i in range(len(sequences))]
        self.caches = [model.new_cache(per * len(sequences), BLOCK) for _ in model.layers]

    @torch.inference_mode()
    def step(self, counts: list[int]) -> list[torch.Tensor]:
        """Advance sequence i by counts[i] tokens (0: not in the batch); the logits of those tokens."""
        active = [i for i, n in enumerate(counts) if n]
        spans = {i: (self.done[i], self.done[i] + counts[i]) for i in active}
        batch = AttentionBatch.build(
            [counts[i] for i in active], [spans[i][1] for i in active], [self.tables[i] for i in active], BLOCK
        )
        tokens = torch.cat([self.sequences[i][slice(*spans[i])] for i in active])
        positions = torch.cat(
            [torch.arange(*spans[i]) + self.model.spec.rope_offset(len(self.sequences[i])) for i in active]
        )
        logits = self.model.logits(self.model(tokens, positions, batch, self.caches))
        for i in active:
            self.done[i] = spans[i][1]
        return list(logits.split([counts[i] for i in active]))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 40, 100])
def test_whole_prompt(pair, length: int) -> None:
    oracle, model = pair
    tokens = tokens_of(length, length)
    close(next(logits_of(model, tokens[None])), oracle_logits(oracle, tokens))


def test_decoding_through_the_cache(pair) -> None:
    oracle, model = pair
    tokens = tokens_of(60, 7)
    run = Sequences(model, [tokens])
    logits = [run.step([20])[0], *(run.step([1])[0] for _ in range(40))]
    close(torch.cat(logits), oracle_logits(oracle, tokens))


def test_mixed_batches(pair) -> None:
    """Prefill chunks of some sequences with decodes of others; each sequence as if it were alone."""
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


def test_longrope_chooses_its_factors_by_the_whole_request(pair) -> None:
    _, model = pair
    longrope = any(rope.long_frequencies for rope in model.spec.ropes.values())
    assert model.spec.rope_offset(64) == 0
    assert model.spec.rope_offset(65) == (128 if longrope else 0)
