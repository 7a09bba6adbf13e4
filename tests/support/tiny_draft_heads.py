"""Tiny models with a draft head, trained for a moment on one text, so that drafts are accepted.

The heads are transformers' own `MtpModel`, and an EAGLE-3 head in plain torch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from support.tiny_families import family_oracle
from support.tiny_models import tiny_checkpoint

HIDDEN = 64
LAYERS = 2
VOCAB = 512
AUX_LAYERS = (1, 2, 3)  # of the Llama, whose inputs the EAGLE-3 head reads
PERIOD = 48  # tokens of the text, which repeats
# Modules of transformers' `MtpModel` in checkpoints of Qwen3-Next and Qwen3.5.
QWEN_NAMES = {
    "eh_proj": "mtp.fc",
    "enorm": "mtp.pre_fc_norm_embedding",
    "hnorm": "mtp.pre_fc_norm_hidden",
    "post_norm": "mtp.norm",
}
GLM: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "use_qk_norm": True,
}


def text_tokens(num_tokens: int, start: int = 0) -> list[int]:
    """A part of the text that the models are trained on."""
    generator = torch.Generator().manual_seed(11)
    period = torch.randint(3, VOCAB, (PERIOD,), generator=generator).tolist()
    return [period[(start + index) % PERIOD] for index in range(num_tokens)]


def _windows(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, PERIOD, (count,), generator=generator).tolist()
    return torch.tensor([text_tokens(length, start) for start in starts])


def _train(
    modules: list[nn.Module], loss: Callable[[torch.Tensor], torch.Tensor], steps: int
) -> None:
    parameters = [weight for module in modules for weight in module.parameters()]
    unique = list({id(weight): weight for weight in parameters}.values())
    size = max(weight.shape[-1] for weight in unique)  # wide layers learn from smaller steps
    optimizer = torch.optim.AdamW(unique, lr=5e-3 * min(1.0, 256 / size), weight_decay=0.0)
    generator = torch.Generator().manual_seed(5)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of such small operators wait for each other
    try:
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                loss(_windows(4, 24, generator)).backward()
                optimizer.step()
    finally:
        torch.set_num_threads(num_threads)


def mtp_hidden(head: MtpModel, hidden: torch.Tensor, next_token_ids: torch.Tensor) -> torch.Tensor:
    """What transformers' MTP head computes. hidden: [B, L, H], next_token_ids: [B, L]."""
    positions = torch.arange(1, 1 + hidden.shape[1])[None]
    cache = MtpCache(config=head.config)
    result = head.forward_layer(0, hidden, positions, cache, input_ids=next_token_ids)
    assert isinstance(result, torch.Tensor)
    return result


def load_mtp(path: Path) -> tuple[Any, MtpModel]:
    """A checkpoint's model and MTP head, in transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    # transformers knows the layer's number of each published checkpoint only.
    layer = rf"model\.layers\.{model.config.num_hidden_layers}\..*"
    model._keys_to_ignore_on_load_unexpected = [layer]
    return model, MtpModel.from_pretrained(model).eval()


def glm_with_mtp(path: Path, *, steps: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """A tiny GLM-4.5 with an MTP head, trained on the text in so many steps.

    changes: values of its config that differ.
    """
    tiny_checkpoint(path, "glm4_moe", dtype="float32", **(GLM | changes))
    file = path / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(7)
    size = changes.get("hidden_size", HIDDEN)
    num_layers = changes.get("num_hidden_layers", LAYERS)
    layer = f"model.layers.{num_layers}"
    last = f"model.layers.{num_layers - 1}."
    head = {
        name.replace(last, f"{layer}."): tensor
        + torch.randn(tensor.shape, generator=generator) / 50
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    head[f"{layer}.eh_proj.weight"] = torch.randn(size, 2 * size, generator=generator) / 10
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        weight = 1 + torch.randn(size, generator=generator) / 10
        head[f"{layer}.{norm}.weight"] = weight
    save_file(tensors | head, file, {"format": "pt"})
    if steps:
        _train_mtp(path, steps)
    tensors = load_file(file)
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(cast, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"dtype": dtype}
    (path / "config.json").write_text(json.dumps(config))
    return path


def _train_mtp(path: Path, steps: int) -> None:
    model, head = load_mtp(path)

    def loss(windows: torch.Tensor) -> torch.Tensor:
        output = model(windows[:, :-2], output_hidden_states=True)
        drafted = head.shared_head(mtp_hidden(head, output.hidden_states[-1], windows[:, 1:-1]))
        return cross_entropy(output.logits.flatten(0, 1), windows[:, 1:-1].flatten()) + (
            cross_entropy(drafted.flatten(0, 1), windows[:, 2:].flatten())
        )

    _train([model, head], loss, steps)
    trained = _stored(model.state_dict())
    of_head = {
        name.removeprefix("layers.0.").removeprefix("mtp_block."): tensor
        for name, tensor in head.state_dict().items()
        if name.startswith("layers.0.")
    }
    layer = f"model.layers.{model.config.num_hidden_layers}"
    renamed = {
        f"{layer}.{name.replace('post_norm', 'shared_head.norm')}": tensor
        for name, tensor in of_head.items()
    }
    file = path / "model.safetensors"
    old = load_file(file)
    new = trained | _stored(renamed)
    assert new.keys() == old.keys(), new.keys() ^ old.keys()
    save_file({name: tensor.detach().contiguous() for name, tensor in new.items()}, file)


def _stored(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of checkpoints: experts one by one."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            stored[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            into = f"{module}.experts.{expert}"
            if kind == "down_proj":
                stored[f"{into}.down_proj.weight"] = weight
            else:
                gate, up = weight.chunk(2)
                stored[f"{into}.gate_proj.weight"] = gate
                stored[f"{into}.up_proj.weight"] = up
    return stored


def family_with_mtp(name: str, path: Path, **changes: Any) -> tuple[Any, MtpModel]:
    """A row of FAMILIES with a random MTP head, as a checkpoint at `path`; and both of them.

    changes: values of its config that differ from the row.
    """
    is_qwen = name.startswith("qwen")
    if is_qwen:
        changes["layer_types"] = ["linear_attention", "full_attention"] * 2
    model: Any = family_oracle(name, path, **changes)
    config = model.config
    config.num_mtp_layers = 1
    if is_qwen:
        config.mtp_layer_types = ["full_attention"]
        config.mlp_only_layers = []
    elif getattr(config, "mlp_layer_types", None) is not None:
        config.mtp_mlp_layer_types = ["sparse"]
    head = MtpModel(model, 1).eval()
    generator = torch.Generator().manual_seed(1)
    stored: dict[str, torch.Tensor] = {}
    prefix = "mtp.layers.0" if is_qwen else f"model.layers.{len(model.model.layers)}"
    own = QWEN_NAMES if is_qwen else {"post_norm": f"{prefix}.shared_head.norm"}
    with torch.no_grad():
        for key, tensor in head.state_dict().items():
            module, _, kind = key.removeprefix("layers.0.").rpartition(".")
            if key.startswith("layers.0."):
                is_norm = "norm" in module and not is_qwen  # Qwen's add one to the weight
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1 + is_norm)
                new = own.get(module) or f"{prefix}.{module.removeprefix('mtp_block.')}"
                stored[f"{new}.{kind}"] = tensor.clone()
    file = path / "model.safetensors"
    tensors = load_file(file)
    if not any(key.endswith("experts.gate_up_proj") for key in tensors):
        stored = _stored(stored)
    save_file(
        {key: t.contiguous() for key, t in (tensors | stored).items()}, file, {"format": "pt"}
    )
    written = json.loads((path / "config.json").read_text())
    if not is_qwen:
        (path / "config.json").write_text(json.dumps(written | {"num_nextn_predict_layers": 1}))
    return model, head


class Eagle3Head(nn.Module):
    """An EAGLE-3 head, written after the paper's figures.

    token_ids: the model's token of each of its own.
    """

    def __init__(self, config: Any, token_ids: torch.Tensor, norm_before_residual: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.norm_before_residual = norm_before_residual
        self.token_ids = token_ids
        q_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        self.fc = nn.Linear(3 * size, size, bias=False)
        self.q_proj = nn.Linear(2 * size, q_size, bias=False)
        self.k_proj = nn.Linear(2 * size, kv_size, bias=False)
        self.v_proj = nn.Linear(2 * size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, size, bias=False)
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)
        self.lm_head = nn.Linear(size, len(token_ids), bias=False)
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm", "norm"):
            norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
            nn.init.normal_(norm.weight, 1.0, 0.1)
            setattr(self, name, norm)
        inverse = 1.0 / config.rope_parameters["rope_theta"] ** (
            torch.arange(0, self.head_dim, 2) / self.head_dim
        )
        self.inv_freq = inverse

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """embedded: [B, L, H] of the next tokens; hidden: [B, L, H], projected by `fc`."""
        normed = self.hidden_norm(hidden)
        x = torch.cat((self.input_layernorm(embedded), normed), -1)
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.head_dim)
        q, k, v = (
            projection(x).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = torch.outer(torch.arange(length).float(), self.inv_freq).repeat(1, 2)
        q, k = (self._rotate(heads, angles) for heads in (q, k))
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        residual = normed if self.norm_before_residual else hidden
        residual = residual + self.o_proj(attended.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(residual)
        gated = nn.functional.silu(self.gate_proj(y)) * self.up_proj(y)
        return residual + self.down_proj(gated)

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Of its own tokens."""
        return self.lm_head(self.norm(output))

    @staticmethod
    def _rotate(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        return heads * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def save(self, path: Path, target: Path, layout: str) -> None:
        """Write it as a checkpoint. layout: "original", or that of "speculators"."""
        config = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 1}
        layer = {"original": "midlayer", "speculators": "layers.0"}[layout]
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self.state_dict().items():
            module = name.split(".")[0]
            if module in ("q_proj", "k_proj", "v_proj", "o_proj"):
                name = f"{layer}.self_attn.{name}"
            elif module in ("gate_proj", "up_proj", "down_proj"):
                name = f"{layer}.mlp.{name}"
            elif module not in ("fc", "norm", "lm_head"):
                name = f"{layer}.{name}"
            tensors[name] = tensor.contiguous()
        num_tokens = len(self.token_ids)
        tensors["d2t"] = self.token_ids - torch.arange(num_tokens)
        known = torch.zeros(config["vocab_size"], dtype=torch.bool)
        known[self.token_ids] = True
        tensors["t2d"] = known
        own = {
            "draft_vocab_size": num_tokens,
            "eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS),
        }
        if layout == "speculators":
            own = own | {
                "architectures": ["Eagle3Speculator"],
                "speculators_model_type": "eagle3",
                "norm_before_residual": self.norm_before_residual,
                "transformer_layer_config": config,
            }
        else:
            own = config | own | {"architectures": ["LlamaForCausalLMEagle3"]}
        path.mkdir()
        (path / "config.json").write_text(json.dumps(own))
        save_file(tensors, path / "model.safetensors", {"format": "pt"})


def llama_with_eagle3(
    folder: Path,
    *,
    layout: str = "original",
    steps: int = 0,
    norm_before_residual: bool = False,
) -> tuple[Path, Path, Any, Eagle3Head]:
    """A tiny Llama and an EAGLE-3 head for it, trained on the text in so many steps.

    Returns both checkpoints, and both in torch.
    """
    target = tiny_checkpoint(folder / "target", dtype="float32", num_hidden_layers=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    known = torch.cat((torch.tensor(sorted(set(text_tokens(PERIOD)))), torch.arange(500, 512)))
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    head = Eagle3Head(model.config, known.unique(), norm_before_residual)
    torch.random.set_rng_state(state)
    own_ids = torch.zeros(VOCAB, dtype=torch.int64)
    own_ids[head.token_ids] = torch.arange(len(head.token_ids))

    def loss(windows: torch.Tensor) -> torch.Tensor:
        output = model(windows[:, :-2], output_hidden_states=True)
        drafted = eagle3_output(model, head, output.hidden_states, windows[:, 1:-1])
        return cross_entropy(output.logits.flatten(0, 1), windows[:, 1:-1].flatten()) + (
            cross_entropy(head.logits(drafted).flatten(0, 1), own_ids[windows[:, 2:]].flatten())
        )

    if steps:
        _train([model, head], loss, steps)
        model.save_pretrained(target)
    head.save(folder / "head", target, layout)
    return target, folder / "head", model, head


def eagle3_output(
    model: Any, head: Eagle3Head, hidden_states: Any, next_token_ids: torch.Tensor
) -> torch.Tensor:
    """What the head computes. hidden_states: as transformers returns them."""
    projected = head.fc(torch.cat([hidden_states[layer] for layer in AUX_LAYERS], -1))
    output = head(model.get_input_embeddings()(next_token_ids), projected)
    assert isinstance(output, torch.Tensor)
    return output


class NemotronMtp(nn.Module):
    """Nemotron 3's MTP head: layers with one block each, written after vLLM's description.

    transformers ignores its tensors. model: the model whose blocks the head's are copies of, with
    other weights. kinds: of each layer, as in the model's `layers_block_type`.
    """

    def __init__(self, model: Any, kinds: tuple[str, ...] = ("full_attention", "moe")) -> None:
        super().__init__()
        config = model.config
        self.embedding = model.get_input_embeddings()
        self.blocks = nn.ModuleList(
            copy.deepcopy(model.model.layers[config.layers_block_type.index(kind)])
            for kind in kinds
        )
        size = config.hidden_size
        self.enorm, self.hnorm, self.final_layernorm = (
            nn.RMSNorm(size, eps=config.layer_norm_epsilon) for _ in range(3)
        )
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in (*self.parameters(), *self.buffers()):
                if parameter is not self.embedding.weight:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def forward(self, hidden: torch.Tensor, next_token_ids: torch.Tensor) -> torch.Tensor:
        """hidden: [B, L, H], next_token_ids: [B, L]."""
        normed = self.enorm(self.embedding(next_token_ids)), self.hnorm(hidden)
        x = self.eh_proj(torch.cat(normed, -1))
        length = x.shape[1]
        mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
        for block in self.blocks:
            x = block(x, attention_mask=mask)
        return self.final_layernorm(x)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As checkpoints have them."""
        stored = {
            f"mtp.layers.0.{name}.weight": getattr(self, name).weight
            for name in ("enorm", "hnorm", "eh_proj")
        }
        last = len(self.blocks) - 1
        stored[f"mtp.layers.{last}.final_layernorm.weight"] = self.final_layernorm.weight
        for index, block in enumerate(self.blocks):
            for name, tensor in block.state_dict().items():
                module, _, kind = name.rpartition(".")
                if module.endswith("experts"):
                    for expert, weight in enumerate(tensor):
                        stored[f"mtp.layers.{index}.{module}.{expert}.{kind}.weight"] = weight
                else:
                    stored[f"mtp.layers.{index}.{name}"] = tensor
        return {name: tensor.detach().clone() for name, tensor in stored.items()}


def nemotron_with_mtp(
    path: Path, name: str = "nemotron-3", **changes: Any
) -> tuple[Any, NemotronMtp]:
    """A row of FAMILIES with a random MTP head, as a checkpoint at `path`; and both of them.

    changes: values of its config that differ from the row.
    """
    model: Any = family_oracle(name, path, **changes)
    head = NemotronMtp(model).eval()
    file = path / "model.safetensors"
    save_file(load_file(file) | head.tensors(), file, {"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    written |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    (path / "config.json").write_text(json.dumps(written))
    return model, head
