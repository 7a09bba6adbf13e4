"""How much of a conversation's next turn comes from the prefix cache: hybrids beside a dense model.

    python tests/peers/bench_turns.py

Conversations of eight turns share a system prompt. After half of the conversations, the engine
begins anew on the same `--prefix-cache-dir`. The models are tiny and random: what is cached depends
on lengths only. Counts, not times.
"""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, table

sys.path.insert(0, str(ROOT / "tests"))

from support.tiny_families import family_oracle

from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.prefix_engine import PrefixStoreEngine

FAMILIES = {"llama": "Llama (dense)", "qwen3.5": "Qwen3.5", "mamba2": "Mamba 2", "lfm2": "LFM2"}
OPTIONS = EngineOptions(device="cpu", max_model_len=4096, max_num_seqs=8, kv_cache_memory=1 << 23)
SYSTEM_TOKENS = 700
NUM_CONVERSATIONS = 6
NUM_TURNS = 8
BLOCK_SIZE = 16


@dataclass
class Counts:
    """Tokens of the prompts, those that earlier requests computed, those found in the cache."""

    prompt_tokens: int = 0
    possible_tokens: int = 0  # in full blocks
    found_tokens: int = 0

    def row(self, name: str, when: str) -> list[str]:
        """A row of the table."""
        share = self.found_tokens / max(1, self.possible_tokens)
        return [
            name,
            when,
            f"{self.prompt_tokens:,}",
            f"{self.possible_tokens:,}",
            f"{self.found_tokens:,}",
            f"{share:.1%}",
        ]


def answer(engine: Engine, prompt: list[int], max_tokens: int) -> tuple[list[int], int]:
    """The answer, and the prompt tokens that came from the cache."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    engine.add(EngineRequest("turn", prompt, params))
    token_ids: list[int] = []
    cached = 0
    while engine.has_work:
        for output in engine.step():
            token_ids += output.token_ids
            cached = output.cached_tokens
    return token_ids, cached


def converse(engine: Engine, chosen: random.Random, system: list[int], known: int) -> Counts:
    """A conversation. known: tokens of the system prompt that were computed before."""
    counts = Counts()
    prompt = system
    for _ in range(NUM_TURNS):
        prompt = prompt + [chosen.randrange(3, 120) for _ in range(chosen.randrange(20, 150))]
        token_ids, cached = answer(engine, prompt, chosen.randrange(10, 60))
        counts.prompt_tokens += len(prompt)
        counts.possible_tokens += known // BLOCK_SIZE * BLOCK_SIZE
        counts.found_tokens += cached
        known = len(prompt) + len(token_ids) - 1  # the last token was not computed
        prompt = prompt + token_ids
    return counts


def total(parts: list[Counts]) -> Counts:
    """The sum of the counts."""
    return Counts(
        sum(part.prompt_tokens for part in parts),
        sum(part.possible_tokens for part in parts),
        sum(part.found_tokens for part in parts),
    )


def main() -> None:
    """Converse with each model, and print a table of counts."""
    rows = []
    for family, name in FAMILIES.items():
        chosen = random.Random(3)
        system = [chosen.randrange(3, 120) for _ in range(SYSTEM_TOKENS)]
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            family_oracle(family, model, max_position_embeddings=4096)
            known = 0
            for when in ("at first", "after a restart"):
                engine = load_engine(model, OPTIONS, prefix_store=(f"{folder}/kept", 1 << 30))
                assert isinstance(engine, PrefixStoreEngine)
                parts = []
                for _ in range(NUM_CONVERSATIONS // 2):
                    parts.append(converse(engine, chosen, system, known))
                    known = SYSTEM_TOKENS
                rows.append(total(parts).row(name, when))
                while engine.has_work:
                    engine.step()
                engine._write_thread.shutdown()  # wait for the files
    head = ["model", "requests", "prompt tokens", "computed before", "found", "share"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
