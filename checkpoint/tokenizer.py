"""A checkpoint's tokenizer: text to ids and back, special tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from llmkit.checkpoint.detokenizer import Detokenizer, TokenBytes
from llmkit.checkpoint.errors import ChatTemplateError, InputError
from llmkit.checkpoint.files import ModelFiles

__all__ = ["ChatTemplateError", "Detokenizer", "Tokenizer", "load_tokenizer"]

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class Tokenizer:
    """Text to token ids and back. `settings` is tokenizer_config.json; `templates` are chat templates by name."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        templates: Mapping[str, str],
        bos_id: int | None,
        eos_ids: tuple[int, ...],
    ) -> None:
        tokenizer.no_truncation()  # a tokenizer.json may ask for both, for training
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._templates = templates
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        names = {role: _content(settings.get(role)) for role in _ROLES}
        self.special_tokens = {role: token for role, token in names.items() if token is not None}
        self.bos_id = bos_id if bos_id is not None else self._role_id("bos_token")
        eos = self._role_id("eos_token")
        self.eos_ids = eos_ids or (() if eos is None else (eos,))

    def to_json(self) -> str:
        """Its tokenizer.json."""
        return self._tokenizer.to_str()

    @property
    def chat_template(self) -> str | None:
        """The template of ordinary conversations."""
        return self.template(tools=False)

    def template(self, tools: bool) -> str | None:
        """The chat template of conversations with tools or of those without."""
        return (self._templates.get("tool_use") if tools else None) or self._templates.get("default")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens written out in it are recognized."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def id_to_token(self, index: int) -> str:
        """The token as the vocabulary spells it; "" when there is none."""
        return self._tokenizer.id_to_token(index) or ""

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written `text`."""
        index = self._tokenizer.token_to_id(text)
        return index if index in self.special_ids else None

    def token_bytes(self, index: int) -> bytes:
        """The bytes a token stands for, which need not be whole characters; b"" when there is no such token."""
        return self._token_bytes.bytes_of.get(index, b"")

    def stream(self, skip_special_tokens: bool = True, shown: Iterable[str] = ()) -> Detokenizer:
        """Decodes one text as its ids come; special tokens are skipped, but for those that are `shown`."""
        skipped = self.special_ids - set(map(self._tokenizer.token_to_id, shown))
        return Detokenizer(self._token_bytes, skipped if skip_special_tokens else frozenset())

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation; `kwargs` are further variables of the template.

        Encode it with `add_special_tokens=False`: templates write the special tokens themselves.
        Raises ChatTemplateError when there is no template or it refuses the messages.
        """
        from llmkit.checkpoint.chat import render  # jinja2 is not imported where another process renders

        template = self.template(bool(tools))
        if template is None:
            raise ChatTemplateError("this model has no chat template")
        return render(template, **self.chat_variables(messages, tools, add_generation_prompt, **kwargs))

    def chat_variables(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What a chat template is rendered with; see `render_chat`."""
        own = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return {"documents": None, **self.special_tokens, **kwargs, **own}

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._tokenizer, json.loads(self._tokenizer.to_str())["decoder"])

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._tokenizer.token_to_id(token)


def load_tokenizer(ckpt: ModelFiles) -> Tokenizer:
    """The tokenizer of a model. Raises InputError when it has none or it is malformed."""
    files = ckpt.side_files()
    settings = {**_object(ckpt, files, "special_tokens_map.json"), **_object(ckpt, files, "tokenizer_config.json")}
    if "tokenizer.json" in files:
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the tokenizers library raises plain Exception
            raise InputError(f"{ckpt.path / 'tokenizer.json'} is malformed ({error})") from error
    elif any(name in files for name in _SLOW_FILES) or any(name.endswith(".tiktoken") for name in files):
        tokenizer = _converted(ckpt.path)
    else:
        raise InputError(f"{ckpt.path} has no tokenizer", "tokenizer.json or tokenizer.model was expected")
    bos = _ids(ckpt.generation_config.get("bos_token_id")) or _ids(ckpt.config.get("bos_token_id"))
    ends = (*_ids(ckpt.generation_config.get("eos_token_id")), *_ids(ckpt.config.get("eos_token_id")))
    return Tokenizer(
        tokenizer, settings, _templates(ckpt, files, settings), bos[0] if bos else None, tuple(dict.fromkeys(ends))
    )


def _converted(path: Path) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and only old checkpoints need it

    try:
        slow = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        return tokenizers.Tokenizer.from_str(slow.backend_tokenizer.to_str())
    except Exception as error:  # what is raised depends on the tokenizer class
        raise InputError(
            f"{path} has no tokenizer.json, and its tokenizer could not be converted ({error})",
            todo="Save it with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)",
        ) from error


def _templates(ckpt: ModelFiles, files: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name ("default", "tool_use"), from the newest of the places they have been kept in."""
    if "chat_template.jinja" in files:
        return {"default": files["chat_template.jinja"].decode(errors="replace")}
    given = settings.get("chat_template") or _object(ckpt, files, "chat_template.json").get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    entries: Iterable[Any] = given if isinstance(given, list) else ()
    return {
        str(entry["name"]): str(entry["template"])
        for entry in entries
        if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
    }


def _object(ckpt: ModelFiles, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise InputError(f"{ckpt.path / name} is not valid JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def _content(token: object) -> str | None:
    """A special token's text: itself, or the content of an object that also says how it is stripped."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _ids(value: object) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(item for item in items if type(item) is int)
