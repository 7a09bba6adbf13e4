"""Reads tool calls with vLLM's parsers; runs in .venv-vllm, for compare_tool_calls.py.

Takes a JSON list of {"parser", "text", "tools", "special_tokens"} and prints a list of the calls
that each text has: [[name, arguments], ...], or a text that says what the parser raised.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers import ToolParserManager


def tokenizer(special_tokens: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with these special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(
        [AddedToken(mark, special=True) for mark in ["<eos>", *special_tokens]]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def read(case: dict[str, Any]) -> Any:
    """The calls in one text."""
    request = ChatCompletionRequest.model_validate(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "tools": case["tools"],
            "tool_choice": "auto",
        }
    )
    try:
        parser_class = ToolParserManager.get_tool_parser(case["parser"])
        parser = parser_class(tokenizer(case["special_tokens"]), request.tools)
        found = parser.extract_tool_calls(case["text"], request)
        return [
            [call.function.name, json.loads(call.function.arguments)] for call in found.tool_calls
        ]
    except Exception as error:  # any of its parsers' own
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Read the cases, write the answers."""
    answers = [read(case) for case in json.load(sys.stdin)]
    json.dump(answers, sys.stdout, ensure_ascii=False)


if __name__ == "__main__":
    main()
