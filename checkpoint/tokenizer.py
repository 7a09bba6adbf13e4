"""The tokenizer of a checkpoint: text to ids and back, special tokens, chat template."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers

from llmkit.checkpoint.detokenizer import Detokenizer, TokenBytes
from llmkit.checkpoint.model_files import ModelFiles
from llmkit.common.errors import ChatTemplateError, InputError

__all__ = ["ChatTemplateError", "Detokenizer", "Tokenizer", "load_tokenizer"]

_SPECIAL_TOKEN_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Files of tokenizers without a tokenizer.json. transformers converts them.
_SLOW_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class Tokenizer:
    """Encodes text to token ids and decodes them."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        templates: Mapping[str, str],
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        """settings: the content of tokenizer_config.json. templates: the chat templates by name."""
        # A tokenizer.json may have truncation and padding enabled, left from training.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._settings = settings
        self._templates = templates
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        tokens = {role: _token_text(settings.get(role)) for role in _SPECIAL_TOKEN_ROLES}
        self.special_tokens = {role: token for role, token in tokens.items() if token is not None}
        self.bos_token_id = bos_token_id if bos_token_id is not None else self._role_id("bos_token")
        eos = self._role_id("eos_token")
        self.eos_token_ids = eos_token_ids or (() if eos is None else (eos,))

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return self._tokenizer.to_str()

    @property
    def settings(self) -> Mapping[str, Any]:
        """The content of tokenizer_config.json; special_tokens_map.json's where that has none."""
        return self._settings

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The chat templates by name: "default", "tool_use"."""
        return self._templates

    @property
    def chat_template(self) -> str | None:
        """The chat template of conversations without tools."""
        return self.template(tools=False)

    def template(self, tools: bool) -> str | None:
        """The chat template of conversations with or without tools."""
        if tools and self._templates.get("tool_use"):
            return self._templates["tool_use"]
        return self._templates.get("default")

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        keep: Literal["first", "last"] = "last",
    ) -> list[int]:
        """The ids of `text`. Special tokens in the text are recognized.

        Of a text with more than `max_tokens`, the first or last tokens are kept, beside the special
        tokens that the tokenizer adds, which count.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        num_added = len(ids) - len(encoding.ids)
        if num_added >= max_tokens:  # no room for both
            return ids[:max_tokens] if keep == "first" else ids[-max_tokens:]
        encoding.truncate(max_tokens - num_added, direction="right" if keep == "first" else "left")
        kept: list[int] = self._tokenizer.post_process(
            encoding, add_special_tokens=add_special_tokens
        ).ids
        return kept

    def encode_pairs(
        self, pairs: Iterable[tuple[str, str]], max_tokens: int | None = None
    ) -> Iterator[list[int]]:
        """Yield the ids of pairs of texts, with the special tokens that are put around a pair.

        Of more than `max_tokens`, the first ones are kept. A text that many pairs have in common is
        tokenized once.
        """

        @functools.lru_cache(maxsize=2)  # a query stays, its documents go
        def encoding_of(text: str) -> Any:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            if max_tokens is not None:
                encoding.truncate(max_tokens)
            return encoding

        for first, second in pairs:
            ids: list[int] = self._tokenizer.post_process(
                encoding_of(first), encoding_of(second)
            ).ids
            yield ids[:max_tokens]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def id_to_token(self, index: int) -> str:
        """The token in the vocabulary's spelling; "" for an unknown id."""
        return self._tokenizer.id_to_token(index) or ""

    def special_id(self, text: str) -> int | None:
        """The id of the special token `text`; None when there is none."""
        index = self._tokenizer.token_to_id(text)
        return index if index in self.special_ids else None

    def token_bytes(self, index: int) -> bytes:
        """The bytes of a token, possibly a part of a character; b"" for an unknown id."""
        return self._token_bytes.bytes_of.get(index, b"")

    def stream(self, skip_special_tokens: bool = True, shown: Iterable[str] = ()) -> Detokenizer:
        """A decoder for one text. It skips special tokens, except those in `shown`."""
        skipped = self.special_ids - set(map(self._tokenizer.token_to_id, shown))
        return Detokenizer(self._token_bytes, skipped if skip_special_tokens else frozenset())

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation.

        kwargs: further variables of the template.
        Encode the prompt with `add_special_tokens=False`: templates contain the special tokens.
        Raises ChatTemplateError when there is no template or it refuses the messages.
        """
        # Jinja2 is imported on first use: the API process renders in another process.
        from llmkit.common.chat_template import render_chat_template

        template = self.template(bool(tools))
        if template is None:
            raise ChatTemplateError("this model has no chat template")
        return render_chat_template(
            template, **self.chat_variables(messages, tools, add_generation_prompt, **kwargs)
        )

    def chat_variables(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The variables of a chat template; see `render_chat`."""
        return {
            "documents": None,
            **self.special_tokens,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._tokenizer, json.loads(self._tokenizer.to_str())["decoder"])

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._tokenizer.token_to_id(token)


def load_tokenizer(model: ModelFiles, chat_template: Path | None = None) -> Tokenizer:
    """The tokenizer of a model.

    chat_template: a file to use in place of the model's own chat templates.
    Raises InputError when the model has no tokenizer, or a file is malformed or cannot be read.
    """
    files = model.side_files()
    settings = _settings(model, files)
    if "tokenizer.json" in files:
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the tokenizers library raises plain Exception
            raise InputError(
                f"{model.path / 'tokenizer.json'} is malformed ({error})",
                "A file that the tokenizers library can load was expected",
                "Copy it again from where the model came from",
            ) from error
    elif any(name in files for name in _SLOW_TOKENIZER_FILES) or any(
        name.endswith(".tiktoken") for name in files
    ):
        tokenizer = _convert_slow_tokenizer(model.path)
    else:
        raise InputError(
            f"{model.path} has no tokenizer", "tokenizer.json or tokenizer.model was expected"
        )
    bos_ids = _to_ids(model.generation_config.get("bos_token_id"))
    bos_ids = bos_ids or _to_ids(model.config.get("bos_token_id"))
    bos_ids = bos_ids or _to_ids(model.text_config.get("bos_token_id"))
    eos_token_ids = (
        *_to_ids(model.generation_config.get("eos_token_id")),
        *_to_ids(model.config.get("eos_token_id")),
    )
    # Last, because a nested config may repeat its class's defaults, whatever the tokenizer.
    eos_token_ids = eos_token_ids or _to_ids(model.text_config.get("eos_token_id"))
    templates = chat_templates(model.path, files, settings)
    if chat_template is not None:
        templates = {"default": read_chat_template(chat_template)}
    return Tokenizer(
        tokenizer,
        settings,
        templates,
        bos_ids[0] if bos_ids else None,
        tuple(dict.fromkeys(eos_token_ids)),
    )


def check_copied_tokenizer(model: ModelFiles) -> Tokenizer | None:
    """The tokenizer that an output of `model` gets a copy of; None when there is none.

    Raises InputError when it is malformed.
    """
    return load_tokenizer(model) if "tokenizer.json" in model.side_files() else None


def check_chat_templates(model: ModelFiles) -> None:
    """Raise InputError, with the line, when a chat template that a model uses does not compile."""
    # Imported here, because this is the only use of Jinja2 where no chat is rendered.
    from llmkit.common.chat_template import check_chat_template

    files = model.side_files()
    for template in chat_templates(model.path, files, _settings(model, files)).values():
        try:
            check_chat_template(template)
        except ChatTemplateError as error:
            raise InputError(
                f"the chat template of {model.path} does not compile ({error})",
                "A Jinja2 template as transformers renders it was expected",
                "Mend it",
            ) from None


def _settings(model: ModelFiles, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The settings of a model's tokenizer."""
    return {
        **_read_object(model.path, files, "special_tokens_map.json"),
        **_read_object(model.path, files, "tokenizer_config.json"),
    }


def _convert_slow_tokenizer(path: Path) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and only old checkpoints need it

    try:
        slow = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        return tokenizers.Tokenizer.from_str(slow.backend_tokenizer.to_str())
    except Exception as error:  # the exception type depends on the tokenizer class
        raise InputError(
            f"{path} has no tokenizer.json, and its tokenizer could not be converted ({error})",
            todo="Save it with transformers:"
            " AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)",
        ) from error


def read_chat_template(path: Path) -> str:
    """The chat template in a file. Raises InputError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the chat template cannot be read ({path}: {error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"the chat template is not UTF-8 ({path})") from None


def chat_templates(
    path: Path, files: Mapping[str, bytes], settings: Mapping[str, Any]
) -> dict[str, str]:
    """The chat templates by name ("default", "tool_use").

    path: of the model. settings: its tokenizer_config.json. Several places have held templates over
    time; the newest one wins. Raises InputError for a malformed file.
    """
    if "chat_template.jinja" in files:
        return {"default": files["chat_template.jinja"].decode(errors="replace")}
    template = settings.get("chat_template")
    if not template:
        template = _read_object(path, files, "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    entries: Iterable[Any] = template if isinstance(template, list) else ()
    return {
        str(entry["name"]): str(entry["template"])
        for entry in entries
        if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
    }


def _read_object(path: Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path / name} is not valid JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def _token_text(token: object) -> str | None:
    """The text of a special token, which is stored as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _to_ids(value: object) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(item for item in items if type(item) is int)
