"""What Ollama's API tells of a model: /api/tags, /api/show and /api/ps."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from llmkit.checkpoint.classifier_config import read_classifier_config
from llmkit.checkpoint.model_files import ModelFiles
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.runtime.server.text.dialect_detection import ChatDialect

DEFAULT_TAG = ":latest"
FOREVER = datetime(9999, 12, 31, tzinfo=UTC)
_MAX_LICENSE_BYTES = 64 * 1024
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class ModelFacts(msgspec.Struct):
    """The facts about one checkpoint, JSON-ready."""

    reference: str  # directory, hub id or file
    family: str  # config.json's model_type
    file_format: str  # "safetensors" or "gguf"
    card: dict[str, Any]  # runtime.model_card
    dtype: str
    size_bytes: int  # of the weights' files
    modified_s: float  # Unix time
    template: str
    defaults: dict[str, float]  # of sampling
    license: str
    capabilities: list[str]

    @staticmethod
    def read(
        files: ModelFiles,
        tokenizer: Tokenizer,
        dialect: ChatDialect,
        card: dict[str, Any],
        dtype: str,
        defaults: Mapping[str, float],
    ) -> ModelFacts:
        """Read what the other arguments do not say from the model's files."""
        weights = _weight_files(files.path)
        return ModelFacts(
            reference=files.reference,
            family=str(files.config.get("model_type") or card["architecture"]),
            file_format=files.file_format,
            card=card,
            dtype=dtype,
            size_bytes=sum(file.stat().st_size for file in weights),
            modified_s=max((file.stat().st_mtime for file in weights), default=0.0),
            template=tokenizer.template(tools=False) or "",
            defaults=dict(defaults),
            license=_license(files.path),
            capabilities=capabilities(files, tokenizer, dialect),
        )

    @staticmethod
    def unknown(reference: str, modified_s: float) -> ModelFacts:
        """The facts about a model whose files were not read."""
        card = dict.fromkeys(("parameters", "quantization", "model_limit", "hidden"))
        return ModelFacts(
            reference, "", "", card | {"parameters": 0}, "", 0, modified_s, "", {}, "", []
        )

    @property
    def digest(self) -> str:
        """A SHA-256 that is the same for the same facts. It is not that of any file."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def tag(self, name: str, parent: str = "") -> dict[str, Any]:
        """The model's entry of /api/tags; `parent`: the model that an adapter belongs to."""
        return {
            "name": tagged(name),
            "model": tagged(name),
            "modified_at": timestamp(self.modified_s),
            "size": self.size_bytes,
            "digest": self.digest,
            "details": self._details(parent),
            "capabilities": self.capabilities,
        }

    def running(
        self, name: str, device: str, context_length: int, expires: datetime
    ) -> dict[str, Any]:
        """The model's entry of /api/ps; `expires`: when it will be unloaded."""
        return {
            "name": tagged(name),
            "model": tagged(name),
            "size": self.size_bytes,
            "digest": self.digest,
            "details": self._details(""),
            "expires_at": rfc3339(expires),
            "size_vram": 0 if device.startswith("cpu") else self.size_bytes,
            "context_length": context_length,
        }

    def show(self, name: str, max_model_len: int | None = None) -> dict[str, Any]:
        """The document of /api/show; `max_model_len`: the context that the server has, if known."""
        card = self.card
        prefix = self.family
        parameters = "\n".join(f"{key} {value:g}" for key, value in self.defaults.items())
        info = {
            "general.architecture": prefix,
            "general.basename": name,
            "general.parameter_count": card["parameters"],
            f"{prefix}.block_count": card["layers"],
            f"{prefix}.context_length": max_model_len or card["model_limit"],
            f"{prefix}.embedding_length": card["hidden"],
            f"{prefix}.attention.head_count": card["heads"],
            f"{prefix}.attention.head_count_kv": card["kv_heads"],
            f"{prefix}.expert_count": card["experts"],
            f"{prefix}.vocab_size": card["vocab"],
        }
        return {
            "license": self.license,
            "modelfile": f"FROM {self.reference}\n",
            "parameters": parameters,
            "template": self.template,
            "details": self._details(""),
            "model_info": {key: value for key, value in info.items() if value is not None},
            "capabilities": self.capabilities,
            "modified_at": timestamp(self.modified_s),
        }

    def _details(self, parent: str) -> dict[str, Any]:
        return {
            "parent_model": parent,
            "format": self.file_format,
            "family": self.family,
            "families": [self.family],
            "parameter_size": _count_text(self.card["parameters"]),
            "quantization_level": self.card["quantization"] or _DTYPES.get(self.dtype, self.dtype),
            "context_length": self.card["model_limit"],
            "embedding_length": self.card["hidden"],
        }


def capabilities(files: ModelFiles, tokenizer: Tokenizer, dialect: ChatDialect) -> list[str]:
    """What the model can do, in Ollama's words."""
    if read_classifier_config(files).labels:
        return []  # it generates no text
    is_embedder = files.path.is_dir() and (files.path / "1_Pooling").is_dir()
    if is_embedder:
        return ["embedding"]
    found = ["completion"]
    template = tokenizer.template(tools=True) or ""
    if "tools" in template and dialect.tools is not None:
        found.append("tools")
    if dialect.has_reasoning:
        found.append("thinking")
    return found


def tagged(name: str) -> str:
    """A model's name as Ollama lists it: with a tag."""
    return name if ":" in name.rpartition("/")[2] else name + DEFAULT_TAG


def untagged(name: str, known: Collection[str]) -> str:
    """The name in `known` that `name` means; it may have the default tag. Else `name` itself."""
    if name not in known and name.removesuffix(DEFAULT_TAG) in known:
        return name.removesuffix(DEFAULT_TAG)
    return name


def timestamp(unix_s: float) -> str:
    """A time as Ollama writes it: RFC 3339, in UTC."""
    return rfc3339(datetime.fromtimestamp(unix_s, UTC))


def rfc3339(time: datetime) -> str:
    """A time in UTC."""
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _weight_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def _license(path: Path) -> str:
    """The text of the licence beside the weights; "" without one."""
    if not path.is_dir():
        return ""
    files = sorted(file for file in path.glob("LICENSE*") if file.is_file())
    if not files:
        return ""
    with files[0].open("rb") as stream:
        return stream.read(_MAX_LICENSE_BYTES).decode("utf-8", "replace")


def _count_text(count: int) -> str:
    """A number of parameters as Ollama writes it, such as 134.52M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            text = f"{count / size:.2f}" if unit != "B" else f"{count / size:.1f}"
            return re.sub(r"\.?0+$", "", text) + unit
    return str(count)
