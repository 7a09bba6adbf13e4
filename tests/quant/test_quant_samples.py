"""What a model writes before and after, and the calibration text that it writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import EOS_ID, VOCAB, tiny_checkpoint, write_tokenizer
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.processors import TemplateProcessing

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmkit.common.errors import InputError, ShortageError
from llmkit.quant.generated_text import (
    GREEDY_TOKENS,
    PROMPTS,
    GenerateFn,
    compare_answers,
    generated_windows,
    start_tokens,
)
from llmkit.runtime.generate import generate


@pytest.fixture(scope="module")
def opened_model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("samples"), dtype="float32"))


@pytest.fixture(scope="module")
def tokenizer(opened_model: Checkpoint) -> Tokenizer:
    return load_tokenizer(opened_model)


def with_bos(folder: Path) -> Tokenizer:
    """The tiny tokenizer, which begins texts with BOS now."""
    write_tokenizer(folder)
    inner = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    return Tokenizer(inner, {"bos_token": "<|endoftext|>"}, {}, 0, (EOS_ID,))


class Recorder:
    """A generator that notes what it is asked and answers with fixed tokens."""

    def __init__(self, *answers: list[list[int]]) -> None:
        self.answers = list(answers)
        self.calls = 0
        self.prompts: list[list[list[int]]] = []

    def __call__(
        self,
        checkpoint: Checkpoint,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float,
        seed: int,
        *,
        device: str = "auto",
        stop_at_eos: bool = True,
    ) -> list[list[int]]:
        assert (max_tokens, temperature, device, stop_at_eos) == (48, 0.0, "cpu", True)
        self.prompts.append([list(prompt) for prompt in prompts])
        return self.answers.pop(0)


def test_engine_is_a_generate_fn() -> None:
    chosen: GenerateFn = generate
    assert chosen is generate


def test_compare_answers_of_a_model_and_itself_are_equal(
    opened_model: Checkpoint, tokenizer: Tokenizer
) -> None:
    rows, reason = compare_answers(
        opened_model, opened_model, tokenizer, generate, "cpu", max_tokens=12
    )
    assert reason is None
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert len(set(PROMPTS)) == 10
    for row in rows:
        assert row["before"] == row["after"] != ""
        assert row["same_tokens"] == row["tokens"] <= 12


def test_compare_answers_of_two_models_differ(
    opened_model: Checkpoint, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = open_checkpoint(tiny_checkpoint(tmp_path, seed=1, dtype="float32"))
    rows, _ = compare_answers(opened_model, other, tokenizer, generate, "cpu", max_tokens=12)
    assert all(row["before"] != row["after"] for row in rows)
    swapped, _ = compare_answers(other, opened_model, tokenizer, generate, "cpu", max_tokens=12)
    assert [row["after"] for row in swapped] == [row["before"] for row in rows]


def test_compare_answers_counts_common_tokens(
    opened_model: Checkpoint, tokenizer: Tokenizer
) -> None:
    before = [[10, 11, 12, 13]] * 10
    after = [[10, 11, 14, 13], [10, 11, 12], [], [10, 11, 12, 13, 14], *[[10, 11, 12, 13]] * 6]
    rows, _ = compare_answers(opened_model, opened_model, tokenizer, Recorder(before, after), "cpu")
    assert [row["same_tokens"] for row in rows] == [2, 3, 0, 4, *[4] * 6]
    assert {row["tokens"] for row in rows} == {4}
    assert rows[0]["after"] == tokenizer.decode([10, 11, 14, 13])


def test_compare_answers_uses_the_chat_template(
    opened_model: Checkpoint, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    empty: list[list[int]] = [[]] * 10
    asked = Recorder(empty, empty)
    compare_answers(opened_model, opened_model, tokenizer, asked, "cpu")
    chat = f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert asked.prompts[0][0] == tokenizer.encode(chat, add_special_tokens=False)
    assert asked.prompts[0] == asked.prompts[1]

    refusing = "{{ raise_exception('no users') }}"
    for template in (None, refusing):
        write_tokenizer(tmp_path, chat_template=template)
        plain = load_tokenizer(replace(opened_model, load_side_files=lambda: _files(tmp_path)))
        asked = Recorder(empty, empty)
        compare_answers(opened_model, opened_model, plain, asked, "cpu")
        assert asked.prompts[0] == [plain.encode(prompt) for prompt in PROMPTS]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [ShortageError("too large"), InputError("not finite")])
def test_compare_answers_gives_the_reason_when_a_model_cannot_run(
    opened_model: Checkpoint, tokenizer: Tokenizer, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> list[list[int]]:
        raise error

    assert compare_answers(opened_model, opened_model, tokenizer, refuse, "cpu") == ([], str(error))


def test_start_tokens_are_words(tokenizer: Tokenizer) -> None:
    words = start_tokens(tokenizer)
    assert len(words) > 20
    for index in words:
        text = tokenizer.decode([index])
        assert text[0] == " " and text[1:].isalpha() and len(text) > 2
    assert not set(words) & tokenizer.special_ids
    assert start_tokens(tokenizer, vocab_size=300) == [index for index in words if index < 300]
    letters = start_tokens(tokenizer, vocab_size=256)  # nothing but bytes: letters then
    assert letters and all(tokenizer.decode([index]).strip().isalpha() for index in letters)
    with pytest.raises(InputError, match="only special tokens"):
        start_tokens(tokenizer, vocab_size=3)


def test_generated_windows_are_full_and_depend_on_the_seed(
    opened_model: Checkpoint, tokenizer: Tokenizer
) -> None:
    first = generated_windows(opened_model, tokenizer, generate, 5, 40, 7, "cpu")
    assert (first.dtype, tuple(first.shape)) == (torch.int64, (5, 40))
    assert int(first.min()) >= 0 and int(first.max()) < VOCAB
    assert first.equal(generated_windows(opened_model, tokenizer, generate, 5, 40, 7, "cpu"))
    other = generated_windows(opened_model, tokenizer, generate, 5, 40, 8, "cpu")
    assert (first != other).float().mean() > 0.5
    assert len({tuple(window) for window in first.tolist()}) == 5
    assert int(first[0, 0]) in start_tokens(tokenizer)


def test_generated_windows_begin_with_bos(opened_model: Checkpoint, tmp_path: Path) -> None:
    tokenizer = with_bos(tmp_path)
    windows = generated_windows(opened_model, tokenizer, generate, 4, 32, 0, "cpu")
    assert tuple(windows.shape) == (4, 32)
    assert windows[:, 0].tolist() == [0] * 4
    assert int(windows[0, 1]) in start_tokens(tokenizer)


def test_generated_text_is_a_word_then_greedy_then_sampled(
    opened_model: Checkpoint, tokenizer: Tokenizer
) -> None:
    (window,) = generated_windows(opened_model, tokenizer, generate, 1, 30, 3, "cpu").tolist()
    greedy = generate(opened_model, [window[:1]], 29, 0.0, 0, device="cpu", stop_at_eos=False)[0]
    assert window[1 : 1 + GREEDY_TOKENS] == greedy[:GREEDY_TOKENS]
    assert window[1:] != greedy


@pytest.mark.parametrize(("length", "may_help"), [(25, True), (60, False)])
def test_generated_windows_are_full_however_early_texts_end(
    opened_model: Checkpoint, tokenizer: Tokenizer, length: int, may_help: bool
) -> None:
    asked: list[bool] = []

    def ending(
        checkpoint: Checkpoint,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float,
        seed: int,
        *,
        device: str = "auto",
        stop_at_eos: bool = True,
    ) -> list[list[int]]:
        """Ends at once, or after 6 tokens."""
        if temperature:
            asked.append(stop_at_eos)
            assert len(prompts) <= 16 * 4
        if not stop_at_eos:
            return [[9] * max_tokens for _ in prompts]
        return [[9] * 5 + [EOS_ID] if temperature and may_help else [EOS_ID] for _ in prompts]

    windows = generated_windows(opened_model, tokenizer, ending, 4, length, 0, "cpu")
    assert tuple(windows.shape) == (4, length)
    assert all(asked) == may_help
    assert len(asked) == (2 if may_help else 4)
    if may_help:
        assert (windows == EOS_ID).sum() == 14  # texts of a word, five tokens and the end
