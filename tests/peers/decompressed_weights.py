"""The dense weights of compressed-tensors checkpoints, computed by the compressed-tensors library.

    python decompressed_weights.py --jobs JOBS.json

Run with the Python of an environment that has compressed-tensors (transformers.txt); reader_jobs.py
describes JOBS.json. Each file holds a float32 `<module>.weight` for every quantized linear.
"""

from pathlib import Path

from llmcompressor_dense import dense_weights
from reader_jobs import run_jobs
from safetensors.torch import save_file


def read(model: Path, tokens: list[int], out: Path) -> None:
    """Write the weights of a checkpoint. The tokens are not used."""
    save_file(dense_weights(model), out)


if __name__ == "__main__":
    run_jobs(read)
