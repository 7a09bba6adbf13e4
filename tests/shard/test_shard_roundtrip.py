"""Sharding loses nothing: merge(shard(x)) equals x, and the ranks compute what the model does."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.synthetic_checkpoint import stored_bytes, synthetic_checkpoint
from support.tiny_families import family_oracle
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint import tensor_reader as reading
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import format_of
from llmkit.checkpoint.quantized_weight import QuantizationConfig, QuantizedWeight, Scheme
from llmkit.cli import main
from llmkit.common.errors import InputError
from llmkit.model.families import SUPPORTED, model_spec
from llmkit.model.spec import ModelSpec
from llmkit.shard import chunking as blocks
from llmkit.shard import shard_source
from llmkit.shard.layout_capacity import plan_report
from llmkit.shard.merge import merge
from llmkit.shard.shard_checkpoint import open_source, shard
from llmkit.shard.valid_layouts import valid_ep, valid_tp
from llmkit.shard.verify import verify

SCHEME = Scheme(4, 16)
GPTQ = QuantizationConfig("gptq", SCHEME)
PACKED = QuantizationConfig("compressed-tensors", SCHEME)
GPTQ_8 = QuantizationConfig("gptq", Scheme(4, 8))  # divides four ways
PACKED_8 = QuantizationConfig("compressed-tensors", Scheme(4, 8))
MOE: dict[str, Any] = {
    "num_local_experts": 3,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
}


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def act_order_checkpoint(path: Path) -> Path:
    """A GPTQ checkpoint with a linear whose groups are not numbered in the order of its columns."""
    source = synthetic_checkpoint(path, GPTQ)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def round_trip(source: Path, work: Path, tp: int, pp: int) -> None:
    shard(source, work / "ranks", tp, pp)
    result = verify(work / "ranks")
    assert result.problems == []
    assert result.files == tp * pp
    merge(work / "ranks", work / "merged")
    assert stored_bytes(work / "merged") == stored_bytes(source)
    assert open_checkpoint(work / "merged").config == open_checkpoint(source).config


sizes = st.sampled_from([-1, 8, 16, 32])
quantizations = (
    st.none()
    | st.builds(
        QuantizationConfig, st.just("gptq"), st.builds(Scheme, st.sampled_from([4, 8]), sizes)
    )
    | st.builds(
        QuantizationConfig, st.just("awq"), st.builds(Scheme, st.just(4), sizes, st.just(False))
    )
    | st.builds(
        QuantizationConfig,
        st.just("compressed-tensors"),
        st.builds(Scheme, st.sampled_from([4, 8]), sizes, st.booleans())
        | st.sampled_from([Scheme(8, inputs="token"), Scheme(8, kind="float", inputs="tensor")]),
        kv=st.sampled_from(["", "fp8"]),
    )
)


def bytes_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@st.composite
def layouts(
    draw: st.DrawFn, spec: ModelSpec, quantization: QuantizationConfig | None
) -> dict[str, Any]:
    """Arguments of `shard`, of any layout that the model has."""
    tp = draw(st.sampled_from(valid_tp(spec, quantization)), "tp")
    ep = draw(st.sampled_from(valid_ep(spec, quantization, tp)), "ep")
    count = len(spec.layers)
    starts = spec.stage_starts
    stops = draw(st.sets(st.sampled_from(starts)) if starts else st.just(set()), "stages")
    bounds = [0, *sorted(stops), count]
    layers = tuple(stop - start for start, stop in pairwise(bounds))
    even = draw(st.booleans(), "even")
    return {"tp": tp, "ep": ep, "pp": len(layers), "pp_layers": () if even else layers}


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_shard_any_chain_of_layouts_loses_nothing(data: st.DataObject) -> None:
    """Sharding what is sharded gives the files, manifest included, that sharding its source does,
    and merging them gives the source.
    """
    kv_heads = data.draw(st.sampled_from([1, 2, 3, 4]), "kv_heads")
    heads = kv_heads * data.draw(st.sampled_from([1, 2, 3, 4]), "queries per KV head")
    quantization = data.draw(quantizations, "quantization")
    experts = data.draw(st.integers(2, 6), "experts")
    vocab_size = data.draw(st.integers(1, 200), "vocab")
    config = {
        "architectures": [data.draw(st.sampled_from(list(SUPPORTED)), "architecture")],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": data.draw(st.sampled_from([8, 16]), "head_dim"),
        "hidden_size": heads * 8,
        "intermediate_size": 32 * data.draw(st.integers(1, 6), "intermediate / 32"),
        "vocab_size": vocab_size,
        "max_position_embeddings": 64,
        "num_hidden_layers": data.draw(st.integers(1, 4), "layers"),
        "vocab_size_per_layer_input": vocab_size,
        "tie_word_embeddings": data.draw(st.booleans(), "tied"),
        **MOE,
        "num_local_experts": experts,
        "num_experts": experts,
        "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": kv_heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "full_attention_interval": 2,
        # Eight Mamba heads of two features for each head of attention.
        **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "num_heads"), 8 * heads),
        **dict.fromkeys(("mamba_n_groups", "n_groups"), kv_heads),
        **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
        "mamba_head_dim": 2,
        "moe_shared_expert_intermediate_size": 64,
        "moe_latent_size": data.draw(st.sampled_from([None, 16]), "latent"),
        "attn_layer_indices": [1],
        "full_attn_idxs": [1],
    }
    config["model_type"], _ = SUPPORTED[config["architectures"][0]]
    if config["model_type"] == "mamba2":
        config["head_dim"] = 2
    if config["model_type"] == "granitemoehybrid":
        types = ["linear_attention", "full_attention"] * 2
        config["layer_types"] = types[: config["num_hidden_layers"]]
    if config["model_type"] == "apertus":
        config["hidden_act"] = "xielu"
    if config["model_type"] == "hunyuan_v1_moe":
        config["moe_intermediate_size"] = config["intermediate_size"]
    spec = model_spec(config)
    if spec.moe is not None and spec.moe.expert_stack is not None:
        quantization = None  # MXFP4 is the only format of experts in one tensor
    chain = data.draw(st.lists(layouts(spec, quantization), min_size=1, max_size=3), "chain")
    with folder() as work, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CHUNK_BYTES", data.draw(st.sampled_from([64, 1000, 2**26]), "chunk"))
        source = at = synthetic_checkpoint(work / "source", quantization, dtype="F16", **config)
        for index, layout in enumerate(chain):
            shard(at, work / str(index), **layout)
            at = work / str(index)
        assert verify(at).problems == []
        merge(at, work / "merged")
        assert stored_bytes(work / "merged") == stored_bytes(source)
        assert open_checkpoint(work / "merged").config == open_checkpoint(source).config
        if len(chain) > 1:
            shard(source, work / "direct", **chain[-1])
            assert bytes_of(at) == bytes_of(work / "direct")


@pytest.mark.parametrize(
    "chain",
    [
        [{"tp": 2}, {"tp": 2, "ep": 2}],
        [{"tp": 2, "ep": 2}, {"tp": 2}],
        [{"tp": 4, "ep": 4}, {"tp": 2, "ep": 2}],
    ],
)
@pytest.mark.parametrize("chunk_bytes", [64, 1000, 2**26])
def test_shard_of_stacked_experts_changes_between_features_and_experts(
    chain: list[dict[str, int]], chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CHUNK_BYTES", chunk_bytes)
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4}
    names = {"architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe"}
    source = synthetic_checkpoint(tmp_path / "source", None, dtype="F16", **(names | sizes))
    at = source
    for index, layout in enumerate(chain):
        shard(at, tmp_path / str(index), **layout)
        at = tmp_path / str(index)
    assert verify(at).problems == []
    merge(at, tmp_path / "merged")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(source)
    shard(source, tmp_path / "direct", **chain[-1])
    assert bytes_of(at) == bytes_of(tmp_path / "direct")


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 3)])
def test_shard_of_layers_that_read_earlier_layers_round_trips(
    tp: int, pp: int, tmp_path: Path
) -> None:
    family_oracle("gemma4", tmp_path / "source")
    round_trip(tmp_path / "source", tmp_path, tp, pp)
    with pytest.raises(InputError, match="4 pipeline stages: stages can begin with layers 0, 1, 2"):
        shard(tmp_path / "source", tmp_path / "refused", 1, 4)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    "quantization", [None, GPTQ, PACKED], ids=["dense", "gptq", "compressed-tensors"]
)
def test_shard_chunks_do_not_change_a_byte(quantization, tmp_path: Path, monkeypatch) -> None:
    source = synthetic_checkpoint(tmp_path / "source", quantization)
    shard(source, tmp_path / "large", 2, 2)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 100)
    shard(source, tmp_path / "small", 2, 2)
    for file in (tmp_path / "large").iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "small" / file.name).read_bytes()
    merge(tmp_path / "small", tmp_path / "merged")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(source)


@pytest.mark.parametrize("quantization", [GPTQ, PACKED], ids=["gptq", "compressed-tensors"])
def test_shard_ranks_compute_what_the_model_computes(
    quantization: QuantizationConfig, tmp_path: Path
) -> None:
    """Column-parallel outputs side by side, and the sum of row-parallel partial products, from each
    rank's own file and its own file alone: group indices and shapes have to be those of the slice.
    """
    source = synthetic_checkpoint(tmp_path / "source", quantization)
    path = source / "model.safetensors"
    tensors = load_file(path)
    layout = format_of(quantization)
    generator = torch.Generator().manual_seed(1)
    for module in {
        name.rpartition(".")[0] for name in tensors if name.endswith(("qweight", "weight_packed"))
    }:
        out, in_ = (
            (64, 32)
            if "gate" in module or "up" in module
            else (32, 64)
            if "down" in module
            else (32, 32)
        )
        if "k_proj" in module or "v_proj" in module:
            out = 16
        groups = in_ // 16
        weight = QuantizedWeight(
            torch.randint(0, 16, (out, in_), generator=generator, dtype=torch.uint8),
            torch.rand(out, groups, generator=generator).to(torch.float16),
            torch.full((out, groups), 8, dtype=torch.uint8),
            SCHEME,
        )
        tensors |= {
            f"{module}.{suffix}": t for suffix, t in layout.pack(weight.scheme, weight).items()
        }
    save_file(tensors, path, {"format": "pt"})
    shard(source, tmp_path / "ranks", 2)
    ranks = [load_file(tmp_path / "ranks" / f"rank-pp0-tp{rank}.safetensors") for rank in range(2)]

    def linear(stored: dict[str, torch.Tensor], module: str) -> torch.Tensor:
        suffixes = [p.suffix for p in layout.tensors(SCHEME, 32, 32)]
        return layout.unpack(SCHEME, {s: stored[f"{module}.{s}"] for s in suffixes}).dequantize()

    for layer in range(2):
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            module = f"model.layers.{layer}.{name}"
            assert torch.equal(
                torch.cat([linear(r, module) for r in ranks]), linear(tensors, module)
            ), module
            x = torch.randn(3, 32, generator=generator)
            parts = [x @ linear(r, module).T for r in ranks]
            torch.testing.assert_close(torch.cat(parts, 1), x @ linear(tensors, module).T)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            module = f"model.layers.{layer}.{name}"
            weight = linear(tensors, module)
            assert torch.equal(torch.cat([linear(r, module) for r in ranks], 1), weight), module
            x = torch.randn(3, weight.shape[1], generator=generator)
            parts = [a @ linear(r, module).T for a, r in zip(x.chunk(2, 1), ranks, strict=True)]
            torch.testing.assert_close(sum(parts), x @ weight.T)


def test_shard_dense_ranks_compute_what_the_model_computes(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", dtype="float32")
    shard(source, tmp_path / "ranks", 2)
    whole = load_file(source / "model.safetensors")
    ranks = [load_file(tmp_path / "ranks" / f"rank-pp0-tp{rank}.safetensors") for rank in range(2)]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    def mlp(stored: dict[str, torch.Tensor]) -> torch.Tensor:
        gate, up, down = (
            stored[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
        )
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    torch.testing.assert_close(mlp(ranks[0]) + mlp(ranks[1]), mlp(whole))
    logits = [x @ rank["lm_head.weight"].T for rank in ranks]
    torch.testing.assert_close(torch.cat(logits, 1), x @ whole["lm_head.weight"].T)


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_shard_moe_ranks_compute_what_the_model_computes(tp: int, ep: int, tmp_path: Path) -> None:
    """The sum over the ranks of what their experts add is what all experts add, however they are
    divided.
    """
    source = tiny_checkpoint(tmp_path / "source", "mixtral", dtype="float32")
    shard(source, tmp_path / "ranks", tp, ep=ep)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator)
    shares = torch.rand(5, 4, generator=generator)

    def mixture(stored: dict[str, torch.Tensor]) -> torch.Tensor:
        total = torch.zeros_like(x)
        for expert in range(4):
            prefix = f"model.layers.1.block_sparse_moe.experts.{expert}"
            if f"{prefix}.w1.weight" in stored:
                gate, up, down = (stored[f"{prefix}.{n}.weight"] for n in ("w1", "w3", "w2"))
                total += shares[:, expert, None] * (
                    (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
                )
        return total

    whole = load_file(source / "model.safetensors")
    ranks = [load_file(tmp_path / "ranks" / f"rank-pp0-tp{rank}.safetensors") for rank in range(tp)]
    assert (
        sum(len([name for name in rank if ".experts." in name]) for rank in ranks)
        == 2 * 4 * 3 * tp // ep
    )
    torch.testing.assert_close(sum(mixture(rank) for rank in ranks), mixture(whole))


def reads_of(patch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is read from now on: file, first byte, bytes."""
    reads: list[tuple[str, int, int]] = []

    def recording(path: Path, start: int, view: memoryview) -> None:
        reads.append((path.name, start, len(view)))
        read_into(path, start, view)

    read_into = reading.read_into
    for module in (reading, shard_source):
        patch.setattr(module, "read_into", recording)
    return reads


@pytest.mark.parametrize(
    "quantization", [None, GPTQ_8, PACKED_8], ids=["dense", "gptq", "compressed-tensors"]
)
def test_shard_reads_each_byte_of_a_source_once(quantization, tmp_path: Path, monkeypatch) -> None:
    source = synthetic_checkpoint(tmp_path / "source", quantization, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # left out, but hashed
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 1000)
    work = {
        source: lambda: shard(source, tmp_path / "two", 2),
        tmp_path / "two": lambda: shard(tmp_path / "two", tmp_path / "four", 4, 2),
        tmp_path / "four": lambda: merge(tmp_path / "four", tmp_path / "merged"),
    }
    for folder, run in work.items():
        with pytest.MonkeyPatch.context() as patch:
            reads = reads_of(patch)
            run()
        read = sorted(read for read in reads if (folder / read[0]).exists())
        for file in folder.glob("*.safetensors"):
            position = 0
            for _, start, count in (read for read in read if read[0] == file.name):
                assert start == position
                position += count
            assert position == file.stat().st_size


def test_shard_hashes_a_source_while_it_is_read(tmp_path: Path) -> None:
    source = synthetic_checkpoint(tmp_path / "source", GPTQ_8)
    shard(source, tmp_path / "ranks", 2)
    shard(tmp_path / "ranks", tmp_path / "more", 4, 2)
    expected = {
        name: sha256((source / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }
    for path in (tmp_path / "ranks", tmp_path / "more"):
        manifest = open_checkpoint(path).manifest
        assert manifest is not None
        assert manifest["source"] == {"reference": str(source), "files": expected}


def test_shard_refuses_to_split_act_order_of_a_sharded_source(tmp_path: Path) -> None:
    source = act_order_checkpoint(tmp_path / "source")
    shard(source, tmp_path / "one", 1, 2)
    with pytest.raises(InputError, match=r"down_proj\.g_idx does not number its groups.*--tp 1"):
        shard(tmp_path / "one", tmp_path / "two", 2)
    assert not list(tmp_path.glob("two*"))


def test_shard_refuses_a_tokenizer_that_cannot_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    whole = (source / "tokenizer.json").read_bytes()
    (source / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    words = ["shard", str(source), "--tp", "2", "-o", str(tmp_path / "out")]
    assert main.run(words) == 3
    assert f"{source / 'tokenizer.json'} is malformed (" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    (source / "tokenizer.json").unlink()  # none is needed
    assert main.run(words) == 0


def test_shard_of_several_source_files_and_side_files(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3", max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    round_trip(source, tmp_path, 2, 2)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "ranks" / name).read_bytes() == (source / name).read_bytes()
        assert (tmp_path / "merged" / name).read_bytes() == (source / name).read_bytes()


def test_shard_phi3_keeps_q_k_and_v_of_its_own_heads(tmp_path: Path) -> None:
    source = tiny_checkpoint(
        tmp_path / "source", "phi3", num_attention_heads=4, num_key_value_heads=2
    )
    round_trip(source, tmp_path, 4, 2)  # each KV head on two ranks
    whole = load_file(source / "model.safetensors")["model.layers.0.self_attn.qkv_proj.weight"]
    q, k, v = whole.split([64, 32, 32])
    gate, up = load_file(source / "model.safetensors")[
        "model.layers.0.mlp.gate_up_proj.weight"
    ].chunk(2)
    for rank in range(4):
        stored = load_file(tmp_path / "ranks" / f"rank-pp0-tp{rank}.safetensors")
        head = slice(rank * 16, rank * 16 + 16)
        kv = slice(rank // 2 * 16, rank // 2 * 16 + 16)
        expected = torch.cat([q[head], k[kv], v[kv]])
        assert torch.equal(stored["model.layers.0.self_attn.qkv_proj.weight"], expected)
        features = slice(rank * 32, rank * 32 + 32)
        expected = torch.cat([gate[features], up[features]])
        assert torch.equal(stored["model.layers.0.mlp.gate_up_proj.weight"], expected)


def test_shard_stores_tied_embeddings_in_first_and_last_stage(tmp_path: Path) -> None:
    source = synthetic_checkpoint(
        tmp_path / "source", tie_word_embeddings=True, num_hidden_layers=3
    )
    round_trip(source, tmp_path, 1, 3)
    embed = "model.embed_tokens.weight"
    stages = [
        load_file(tmp_path / "ranks" / f"rank-pp{stage}-tp0.safetensors") for stage in range(3)
    ]
    assert [embed in stage for stage in stages] == [True, False, True]
    assert ["model.norm.weight" in stage for stage in stages] == [False, False, True]
    assert stages[0][embed].view(torch.uint8).equal(stages[2][embed].view(torch.uint8))
    layout = open_checkpoint(tmp_path / "ranks").layout
    assert layout is not None
    assert layout["tensors"][f"rank-pp2-tp0.safetensors::{embed}"]["replicas"] == [0, 2]


def test_shard_leaves_a_repeated_tied_head_out(tmp_path: Path) -> None:
    class Listener:
        messages: list[str] = []  # noqa: RUF012

        def start(self, stage: str, total: int, unit: str) -> None: ...
        def advance(self, n: int = 1, note: str = "") -> None: ...
        def finish(self) -> None: ...
        def message(self, text: str) -> None:
            self.messages.append(text)

    source = synthetic_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    shard(source, tmp_path / "ranks", 2, progress=Listener())
    assert any("lm_head.weight" in text for text in Listener.messages)
    assert open_checkpoint(tmp_path / "ranks").layout["left_out"] == ["lm_head.weight"]


def test_shard_interrupted_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmkit.checkpoint.writer import CheckpointWriter

    source = synthetic_checkpoint(tmp_path / "source", GPTQ)
    shard(source, tmp_path / "expected", 2, 2)
    write_chunk = CheckpointWriter.write_chunk
    calls = []
    limit = 30

    def interrupted(self: CheckpointWriter, file: str, name: str, offset: int, data: bytes) -> None:
        calls.append(name)
        if len(calls) == limit:
            raise KeyboardInterrupt
        write_chunk(self, file, name, offset, data)

    monkeypatch.setattr(CheckpointWriter, "write_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard(source, tmp_path / "ranks", 2, 2)
    assert not (tmp_path / "ranks").exists()
    calls.clear()
    limit = -1
    command = ["shard", str(source), "--tp", "2", "--pp", "2", "-o", str(tmp_path / "ranks")]
    assert main.run(command) == 0
    told = capsys.readouterr().err
    found = re.search(r"continuing an interrupted run of [0-9.]+ s: (\d+) of (\d+) tensors", told)
    assert found is not None, told
    left = int(found[2]) - int(found[1])
    assert f" are written, {left} are left" in told
    assert re.search(r"the whole run took [0-9.]+ s, [0-9.]+ s of them before it was inter", told)
    again = len(calls)
    calls.clear()
    shard(source, tmp_path / "full", 2, 2)
    assert again == len(calls) - 29
    for file in (tmp_path / "expected").iterdir():
        assert file.read_bytes() == (tmp_path / "ranks" / file.name).read_bytes()


def test_shard_refuses_a_row_split_of_act_order(tmp_path: Path) -> None:
    source = act_order_checkpoint(tmp_path / "source")
    for dry_run in (True, False):
        with pytest.raises(
            InputError, match=r"down_proj\.g_idx does not number its groups.*--tp 1"
        ):
            shard(source, tmp_path / "ranks", 2, dry_run=dry_run)
    assert [path.name for path in tmp_path.iterdir()] == [
        "source"
    ]  # it was seen before anything was written
    report = plan_report(open_source(source), 2)
    assert "does not number its groups" in report["refusal"]
    assert report["works"] == [{"tp": 1, "ep": [1]}]
    round_trip(source, tmp_path / "one", 1, 2)


def test_shard_refuses_a_wrong_weight_shape(tmp_path: Path) -> None:
    source = synthetic_checkpoint(tmp_path / "source", PACKED)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_shape"] = torch.tensor([64, 31])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj\.weight_shape is \[64, 31\]. \[64, 32\]"):
        shard(source, tmp_path / "ranks", 2)
