"""`llmkit shard --format vllm` beside vLLM's own loading, for every tensor-parallel rank, on a CPU.

Run with the Python of a virtual environment made from vllm.txt (see interop.md):

    python vllm_shards.py --out OUT.json WHOLE SHARDS TP [WHOLE SHARDS TP ...]

For each rank, vLLM's model class is built as that rank and loads WHOLE with vLLM's weight loaders.
The parameters and buffers that its `sharded_state` loader would read must be the tensors of the
rank's file in SHARDS, byte for byte. Then a fresh model of that rank loads SHARDS with that loader
and must hold the same. Nothing is run, so that ranks do not communicate: one process only tells the
model which rank it is.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm_generate import SETTINGS


def started(folder: str) -> None:
    """Start vLLM's groups of processes, with this one alone in them."""
    from vllm.distributed import parallel_state

    parallel_state.init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
    parallel_state.initialize_model_parallel(1, 1)


def configured(model: Path, **more: Any) -> Any:
    """Return vLLM's configuration for a model."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        str(model), enforce_eager=True, skip_tokenizer_init=True, max_model_len=64, **more
    )
    return arguments.create_engine_config()


def loaded(config: Any, rank: int, tp: int) -> dict[str, torch.Tensor]:
    """Build the model as that rank and load it; what is in it before vLLM repacks it for its
    kernels, by key.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    group = get_tp_group()
    group.world_size = tp
    group.rank_in_group = rank
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(config)
        # What no loader fills has to show.
        for tensor in model.state_dict().values():
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.fill_(float("nan"))
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    group.world_size = 1
    group.rank_in_group = 0
    return dict(ShardedStateLoader._filter_subtensors(model.state_dict()))


def differences(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """Return how `found` is not `wanted`, to the byte."""
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is not vLLM's" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        one = wanted[name]
        other = found[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            problems.append(
                f"{name} is {other.dtype} {list(other.shape)}, vLLM's {one.dtype} {list(one.shape)}"
            )
        elif not torch.equal(
            one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
        ):
            problems.append(f"{name} has other bytes")
    return problems


def compared(whole: Path, shards: Path, tp: int) -> dict[str, Any]:
    """Compare every rank; the tensors of each and all problems."""
    from safetensors.torch import load_file

    problems = []
    counts = []
    for rank in range(tp):
        wanted = loaded(configured(whole), rank, tp)
        stored = load_file(shards / f"model-rank-{rank}-part-0.safetensors")
        read = loaded(configured(shards, load_format="sharded_state"), rank, tp)
        counts.append(len(wanted))
        problems += [f"rank {rank}, file: {problem}" for problem in differences(wanted, stored)]
        problems += [f"rank {rank}, loaded: {problem}" for problem in differences(wanted, read)]
    return {"whole": str(whole), "tp": tp, "tensors": counts, "problems": problems}


def main() -> int:
    """Compare, write the file that `--out` names, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("pairs", nargs="+", help="WHOLE SHARDS TP, any number of times")
    arguments = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm.config import set_current_vllm_config

    triples = list(zip(*[iter(arguments.pairs)] * 3, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        with set_current_vllm_config(configured(Path(triples[0][0]))):
            started(folder)
        results = [compared(Path(whole), Path(shards), int(tp)) for whole, shards, tp in triples]
    arguments.out.write_text(json.dumps(results, indent=1))
    return any(result["problems"] for result in results)


if __name__ == "__main__":
    sys.exit(main())
