"""A model that writes what a test wants: its weights let each token depend on the last one only.

A script is a text cut into pieces, each of which is a token of its own. A prompt whose last token
is the script's trigger starts it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from support.server_process import serving
from support.tiny_models import SPECIAL_TOKENS, tiny_checkpoint

PIECE = 3  # characters of a token, at first
_UNSURE_WEIGHT = 0.1  # gives the next token a few times the probability of any other
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}\nCall them as FORMAT.<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "CALL {{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{{ remark }}"
    "{% if add_generation_prompt %}{{ messages[-1].content }}{% endif %}"
)
FORMATS = {
    "hermes": "<tool_call>{}</tool_call>",
    "thinker": "<tool_call>{}</tool_call>, <think> before",
    "mistral": "[TOOL_CALLS]",
    "llama": 'Respond in the format {"name": function name, "parameters": dictionary}',
}
CALL = '{"name": "get_weather", "KEY": {"city": "Paris"}}'
SECOND = '{"name": "add", "KEY": {"a": 1}}'
SCRIPTS = {
    "hermes": {
        "plain": "Just words.",
        "call": f"Sure. \n<tool_call>\n{CALL}\n</tool_call>",
        "two": f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{SECOND}\n</tool_call>",
        "almost": '<tool_call>{"name": "unheard", "KEY": {}}</tool_call> or <tool_call>',
        "json": '{"colour": "blue"}',
    },
    "thinker": {
        "plain": "Just words.",
        "think": f"<think>\nA call?\n</think>\n\nYes: <tool_call>{SECOND}</tool_call>",
    },
    "mistral": {
        "plain": "Just words.",
        "call": f"[TOOL_CALLS][{CALL}, {SECOND}]",
    },
    "llama": {
        "plain": '{"name": "get_weather"} was words.',
        "call": f"<|python_tag|>{CALL}; {SECOND}",
    },
}
SPECIAL: dict[str, tuple[str, ...]] = {
    "hermes": (),
    "thinker": (),
    "mistral": ("[TOOL_CALLS]",),
    "llama": ("<|python_tag|>",),
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/city"}},
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"city": {"enum": ["Paris", "Oslo"]}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"const": 1}}},
        },
    },
]


def trigger(name: str) -> str:
    """The text that starts the script `name` as a prompt's end."""
    return f"<say {name}>"


def scripted_checkpoint(
    path: Path,
    scripts: Mapping[str, str],
    template: str,
    special: tuple[str, ...] = (),
    unsure: Collection[str] = (),
    endless: Collection[str] = (),
    special_in: Collection[str] | None = None,
    continued: Mapping[str, str] | None = None,
) -> Path:
    """Write a model that knows `scripts`; texts in `special` become special tokens.

    Greedy, it writes the scripts in `unsure` too, but other tokens are about as probable. The last
    token of scripts in `endless` follows itself. special_in: the scripts in which texts of
    `special` are these tokens; they are spelled in the others. None: all. continued: scripts after
    whose end another script begins, which stands before them.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = {
        letter: index + 3
        for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)} | alphabet
    follows: dict[str, str] = {}
    doubted: set[str] = set()  # tokens after which the model is not sure
    first_pieces: dict[str, str] = {}
    for name, text in scripts.items():
        is_spelled = special_in is not None and name not in special_in
        pieces = _pieces(text, set(follows), () if is_spelled else special)
        follows |= dict(zip([trigger(name), *pieces], [*pieces, SPECIAL_TOKENS[2]], strict=True))
        first_pieces[name] = pieces[0]
        if name in endless:
            follows[pieces[-1]] = pieces[-1]
        if continued is not None and name in continued:
            follows[pieces[-1]] = first_pieces[continued[name]]
        if name in unsure:
            doubted |= {trigger(name), *pieces}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    for token in follows:
        tokenizer.add_tokens([AddedToken(token, special=token in special, normalized=False)])
    size = tokenizer.get_vocab_size()
    width = -(-size // 64) * 64
    tiny_checkpoint(
        path,
        dtype="float32",
        vocab_size=size,
        hidden_size=width,
        num_hidden_layers=1,
        intermediate_size=64,
        max_position_embeddings=4096,
    )
    weights = load_file(path / "model.safetensors")
    for name, tensor in weights.items():
        weights[name] = torch.ones_like(tensor) if "norm" in name else torch.zeros_like(tensor)
    for index in range(size):
        weights["model.embed_tokens.weight"][index, index] = 1
    for token, following in follows.items():
        weights["lm_head.weight"][
            tokenizer.token_to_id(following), tokenizer.token_to_id(token)
        ] = _UNSURE_WEIGHT if token in doubted else 2
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return path


def _pieces(text: str, taken: set[str], special: tuple[str, ...]) -> list[str]:
    """`text` cut into tokens that are nowhere else, so that each has one that follows it."""
    pieces: list[str] = []
    while text:
        size = next((len(mark) for mark in special if text.startswith(mark)), 0)
        if not size:
            positions = [text.find(mark) for mark in special]
            limit = min([position for position in positions if position > 0], default=len(text))
            size = next((size for size in range(PIECE, limit) if text[:size] not in taken), limit)
        while text[:size] in taken and pieces:  # a short rest
            text = pieces[-1] + text
            size = size + len(pieces[-1])
            taken.remove(pieces.pop())
        assert text[:size] not in taken, f"{text[:size]!r} comes twice"
        taken.add(text[:size])
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def start_scripted_server(folder: Path, call_format: str, **options: Any) -> Any:
    """Start a server of a model named "said" that knows the scripts of a tool call format."""
    key = "parameters" if call_format == "llama" else "arguments"
    scripts = {name: text.replace("KEY", key) for name, text in SCRIPTS[call_format].items()}
    model = scripted_checkpoint(
        folder / "model",
        scripts,
        TEMPLATE.replace("FORMAT", FORMATS[call_format]),
        SPECIAL[call_format],
    )
    options = {"served_model_name": "said", "kv_cache_memory": 2**26, "max_num_seqs": 8, **options}
    return serving(folder / "log", model, **options)
