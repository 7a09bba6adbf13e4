"""The dense weights of a compressed-tensors checkpoint, computed by the compressed-tensors library.

    python llmcompressor_dense.py --model DIR --out FILE.safetensors

Run with the Python of llm-compressor's environment. FILE holds a float32 `<module>.weight` for
every quantized linear.
"""

import argparse
import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file


def dense_weights(model: Path) -> dict[str, torch.Tensor]:
    """Decompress every linear of a checkpoint whose linears all follow its first config group."""
    settings = json.loads((model / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    stored = settings["config_groups"]["group_0"].get("format") or settings["format"]
    compressor = BaseCompressor.get_value_from_registry(stored)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module, _, leaf = name.rpartition(".")
            modules.setdefault(module, {})[leaf] = tensor
    return {
        f"{module}.weight": compressor.decompress(dict(tensors), scheme)["weight"]
        .float()
        .contiguous()
        for module, tensors in modules.items()
        if "weight_scale" in tensors
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    save_file(dense_weights(arguments.model), arguments.out)


if __name__ == "__main__":
    main()
