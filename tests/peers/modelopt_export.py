"""A tiny Llama quantized and exported by NVIDIA's Model-Optimizer: an oracle for its format.

Run with the Python of a virtual environment made from fp4.txt; it needs no GPU:
`python modelopt_export.py --config NVFP4_DEFAULT_CFG --out DIR [--kv]`.

--config: a configuration of `modelopt.torch.quantization`: FP8_DEFAULT_CFG, MXFP8_DEFAULT_CFG,
FP8_PER_CHANNEL_PER_TOKEN_CFG, FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, ... The result is a checkpoint with
both config files: `llmkit inspect DIR` reads it, and `llmkit serve DIR` runs it. That of
`--config INT4_AWQ_CFG --hidden-size 128 --intermediate-size 256 --layers 1`, by Model-Optimizer
0.47.0, is in tests/data/modelopt_int4_awq.
"""

import argparse
import copy
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint


def main() -> None:
    """Quantize a random model with random tokens, and export it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="NVFP4_DEFAULT_CFG")
    parser.add_argument("--kv", action="store_true", help="an FP8 KV cache, too")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = torch.randint(0, config.vocab_size, (2, 16))
    quantization = copy.deepcopy(getattr(mtq, options.config))
    if options.kv:
        quantization["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG)["quant_cfg"]
    mtq.quantize(model, quantization, lambda calibrated: calibrated(tokens))
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=str(options.out))


if __name__ == "__main__":
    main()
