"""Greedy tokens and top log probabilities from the real vLLM (its CPU build), as JSON.

Run with the Python of a virtual environment made from vllm.txt (see interop.md):

    python vllm_generate.py --model DIR --prompts PROMPTS.json --tokens 16 --out OUT.json

PROMPTS.json is a list of lists of token ids. OUT.json holds `tokens` (a list of ids for each
prompt), `top_logprobs` (for each prompt and step the two most probable ids with their log
probabilities, {"id": logprob}), `dtype`, `versions`, `reference_ops` and, for a checkpoint with
scales of the KV cache, `kv_scales`, as vLLM's attention uses them. With exit code 1 it holds
`error`: the last line of the exception.

`reference_ops` names the operators that this machine's vLLM lacks, so that they ran in torch
(`wna16` below). All loading, fusing and repacking is then still vLLM's, and only the matrix product
is not.
"""

import argparse
import json
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# Read when vLLM is imported. One process, so that the engine's own exception is the one reported
# here; no threads bound to cores, a small KV cache, nothing sent anywhere and nothing fetched.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}

# vLLM accepts these formats in half precision only; every other is run in float32.
HALF_ONLY = ("gptq", "awq")


STOOD_IN: set[str] = set()  # operators that were called and are not vLLM's own


def dtype_for(model: Path) -> str:
    """Return the most exact dtype in which vLLM accepts the checkpoint."""
    quantization = json.loads((model / "config.json").read_text()).get("quantization_config") or {}
    if quantization.get("quant_method") in HALF_ONLY:
        return "float16"
    # W8A8: the product of CPUs with AMX takes no float32.
    return "bfloat16" if quantization.get("format") == "int-quantized" else "float32"


def wna16(
    input: torch.Tensor,
    q_weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> torch.Tensor:
    """Return `input` [..., in] times the weight [in, out], and `bias`: what vLLM's operator of this
    name does.

    `q_weight` is int32 [out/16, in*words], `words` for the 16 values of an input in a block of 16
    outputs; `scales` [G, out]; `zeros` int32 [G, out/values in a word], or none: the middle.
    Computed in float32. `isa_hint` chooses among vLLM's kernels, and `pack_factor` is 8 for 8 bits
    as well: both say nothing here."""
    STOOD_IN.add("cpu_gemm_wna16")
    inputs = input.shape[-1]
    outputs = scales.shape[1]
    words = q_weight.shape[1] // inputs
    bits = 2 * words
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1).float()

    quantized = unpack(q_weight.view(-1, inputs, words).transpose(0, 1).reshape(inputs, -1))
    middle = torch.full((1, outputs), 2.0 ** (bits - 1))
    zero_points = (
        middle if zeros is None else unpack(zeros).repeat_interleave(inputs // len(zeros), 0)
    )
    dense = scales.float().repeat_interleave(inputs // len(scales), 0) * (quantized - zero_points)
    product = input.float() @ dense
    if bias is not None:
        product = product + bias.float()
    return product.to(input.dtype)


def supply_wna16(always: bool) -> None:
    """Put `wna16` in the place of vLLM's 4 bit CPU operator where its library has none.

    The build has three libraries, and the one for CPUs without AVX-512 has no `cpu_gemm_wna16`,
    although the Python above it picks that kernel on every CPU. The others have it in half
    precision only. No CPU has it for 8 bits; where
    `wna16` stands in, 8 bits pass too, so that their loading can be tried."""
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear.mixed_precision import cpu
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.platforms import current_platform
    from vllm.scalar_type import scalar_types

    current_platform.import_kernels()
    if hasattr(torch.ops._C, "cpu_gemm_wna16") and not always:
        return
    _custom_ops.cpu_gemm_wna16 = wna16
    cpu._CPUWNA16_SUPPORTED_QUANT_TYPES += (scalar_types.uint8b128, scalar_types.uint8)
    supported = marlin_utils._query_cpu_marlin_supported_quant_types

    def with_8_bits(has_zp: bool | None = None, include_fp_type: bool = True) -> list[Any]:
        return [*supported(has_zp, include_fp_type), *([] if has_zp else [scalar_types.uint8b128])]

    marlin_utils._query_cpu_marlin_supported_quant_types = with_8_bits


def has_kv_scales(model: Path) -> bool:
    """Whether the checkpoint says that it holds scales of an 8-bit KV cache."""
    quantization = json.loads((model / "config.json").read_text()).get("quantization_config") or {}
    return bool(quantization.get("kv_cache_scheme"))


def kv_scales(model: torch.nn.Module) -> dict[str, float]:
    """Return the scales that vLLM's attention layers have in the end, by the name of the
    checkpoint's tensor.
    """
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".self_attn.attn"):
            attention = name.removesuffix(".attn")
            found[f"{attention}.k_scale"] = module._k_scale.float().max().item()
            found[f"{attention}.v_scale"] = module._v_scale.float().max().item()
    return found


def generate(
    model: Path, prompts: list[list[int]], steps: int, dtype: str, reference: bool, **more: Any
) -> dict[str, Any]:
    """Return what OUT.json holds, for `steps` greedy tokens after each prompt.

    The engine runs eagerly: compiling takes minutes and is not what is asked here. `more` goes to
    `vllm.LLM`."""
    from vllm import LLM, SamplingParams

    supply_wna16(reference or dtype == "float32")
    longest = max(map(len, prompts)) + steps
    llm = LLM(
        str(model),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=-(-longest // 64) * 64,
        max_num_seqs=len(prompts),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        generation_config="vllm",
        **more,
    )
    # min_tokens would forbid the end-of-text token; ignore_eos lets it be chosen and goes on.
    greedy = SamplingParams(
        temperature=0, max_tokens=steps, ignore_eos=True, logprobs=2, detokenize=False
    )
    scales = llm.apply_model(kv_scales)[0]
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    outputs = [answer.outputs[0] for answer in answers]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "top_logprobs": [
            [
                {str(i): entry.logprob for i, entry in step.items() if entry.rank <= 2}
                for step in output.logprobs
            ]
            for output in outputs
        ],
        "dtype": dtype,
        "reference_ops": sorted(STOOD_IN),
        **({"kv_scales": scales} if has_kv_scales(model) else {}),
        "versions": {
            name: version(name) for name in ("vllm", "torch", "transformers", "compressed-tensors")
        },
    }


def main() -> int:
    """Generate, write the file that `--out` names, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--dtype",
        help="float32, or float16 for the formats that vLLM accepts in half precision only",
    )
    parser.add_argument(
        "--reference", action="store_true", help="use this file's wna16 where vLLM has its own too"
    )
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON"
    )
    args = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    prompts = json.loads(args.prompts.read_text())
    try:
        result = generate(
            args.model,
            prompts,
            args.tokens,
            args.dtype or dtype_for(args.model),
            args.reference,
            **args.engine,
        )
    except Exception as error:
        traceback.print_exc()
        # pydantic's own last line is only an address.
        lines = [line for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = lines[-1].strip() if lines else f"{where.filename}:{where.lineno}: {where.line}"
        result = {"error": f"{type(error).__name__}: {said}"}
    args.out.write_text(json.dumps(result))
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
