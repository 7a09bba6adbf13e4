"""`llmkit deploy vllm --device`: vLLM's plugins for accelerators other than CUDA's, as data.

What a plugin loads was read in its sources; nothing here ran on such a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from llmkit.common.errors import InputError, UsageError
from llmkit.deploy.loadable_checkpoints import Engine, LoadableFormat
from llmkit.shard.layout_capacity import GPUS

DeviceName = Literal["cuda", "neuron", "tpu", "hpu"]
GIB = 2**30


class Accelerator(NamedTuple):
    """A chip or a card, which is what Kubernetes counts.

    A rank of a layout is a core: a chip may have several, each with a part of its memory.
    """

    device: DeviceName
    memory_gib: int  # of a core
    cores: int = 1
    # GKE's names of the chip and, by the chips of a node, of the slices on one host.
    gke_name: str = ""
    gke_topologies: tuple[tuple[int, str], ...] = ()

    def node_selector(self, chips: int) -> dict[str, str]:
        """The labels of Kubernetes nodes with so many chips; empty where there is no need.

        Raises UsageError for a number that no slice on one host has.
        """
        if not self.gke_name:
            return {}
        topologies = dict(self.gke_topologies)
        if chips not in topologies:
            raise UsageError(
                f"--gpus-per-node {chips}: no host of {self.gke_name} has {chips} chips",
                f"One of {', '.join(map(str, topologies))} was expected",
            )
        return {
            "cloud.google.com/gke-tpu-accelerator": self.gke_name,
            "cloud.google.com/gke-tpu-topology": topologies[chips],
        }


_SLICES_2D = ((1, "1x1"), (4, "2x2"), (8, "2x4"))
_SLICES_3D = ((4, "2x2x1"),)
# Memory of a TPU's core: `get_device_hbm_limit` of tpu-inference 0.32. Of a NeuronCore: the chip's,
# divided by its cores; Trainium 2 shows 4 logical cores of 8 (NEURON_LOGICAL_NC_CONFIG is 2).
ACCELERATORS = {
    "gaudi2": Accelerator("hpu", 96),
    "gaudi3": Accelerator("hpu", 128),
    "inf2": Accelerator("neuron", 16, cores=2),
    "trn1": Accelerator("neuron", 16, cores=2),
    "trn2": Accelerator("neuron", 24, cores=4),
    "v5e": Accelerator("tpu", 16, 1, "tpu-v5-lite-podslice", _SLICES_2D),
    "v5p": Accelerator("tpu", 95, 1, "tpu-v5p-slice", _SLICES_3D),
    "v6e": Accelerator("tpu", 32, 1, "tpu-v6e-slice", _SLICES_2D),
    "v7x": Accelerator("tpu", 96, 2, "tpu7x", _SLICES_3D),
}


@dataclass(frozen=True)
class Device:
    """vLLM on a kind of accelerator."""

    name: DeviceName
    engine: Engine
    resource: str  # that Kubernetes counts
    image: str  # words in capitals stand for versions
    # Whether several nodes serve a model together, by Ray.
    has_nodes: bool = True
    # The largest batch, where it is a part of the compiled model, and the KV cache has a place of
    # the longest request for each of its requests.
    max_static_batch: int | None = None
    environment: tuple[tuple[str, str], ...] = ()


CUDA = Device("cuda", Engine("vLLM"), "nvidia.com/gpu", "vllm/vllm-openai:latest")
# tpu_inference/layers/vllm/quantization: get_tpu_quantization_config, and get_scheme of
# compressed_tensors.py. The models in JAX, which some architectures have by default, load fewer.
_TPU_TORCH = (("MODEL_IMPL_TYPE", "vllm"),)
_TPU_FORMATS = (
    LoadableFormat(
        "compressed-tensors",
        ("w8a8", "fp8", "fp8-static", "w4afp8", "nvfp4", "nvfp4a16"),
        environment=_TPU_TORCH,
    ),
    LoadableFormat("awq", ("w4a16",), environment=_TPU_TORCH),
    LoadableFormat("fp8", ("fp8-block",), environment=_TPU_TORCH),
    LoadableFormat("mxfp4", ("mxfp4a16",), environment=_TPU_TORCH),
    LoadableFormat("modelopt", ("nvfp4",), environment=_TPU_TORCH),
)
# vllm_gaudi/platform.py: supported_quantization; ops/hpu_compressed_tensors.py: get_hpu_scheme, and
# HPUMPLinearKernel, whose integers have 4 bits; ops/hpu_modelopt.py: FP8 only. The classes for AWQ
# and GPTQ answer to their own names only.
_HPU_FORMATS = (
    LoadableFormat("compressed-tensors", ("fp8", "fp8-static", "fp8-block", "w4a16", "w8a8")),
    LoadableFormat("awq", ("w4a16",), ("--quantization", "awq_hpu", "--dtype", "bfloat16")),
    LoadableFormat("gptq", ("w4a16",), ("--quantization", "gptq_hpu", "--dtype", "bfloat16")),
    LoadableFormat("fp8", ("fp8-block",)),
    LoadableFormat("mxfp4", ("mxfp4a16",)),
    LoadableFormat("modelopt", ("fp8-static",)),
)
# neuronx_distributed_inference/utils/constants.py: MODEL_TYPES, as vllm-neuron's
# _get_neuron_model_cls turns the name of an architecture into one of them.
_NEURON_ARCHITECTURES = frozenset(
    {
        "DbrxForCausalLM",
        "Gemma3ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
DEVICES: dict[DeviceName, Device] = {
    "cuda": CUDA,
    # It quantizes a checkpoint of 16 bits itself (`quantized` of override_neuron_config).
    "neuron": Device(
        "neuron",
        Engine(
            "vLLM on Neuron",
            architectures=_NEURON_ARCHITECTURES,
            source="vllm-neuron 0.2.0 with neuronx-distributed-inference 0.7",
        ),
        "aws.amazon.com/neuron",
        "public.ecr.aws/neuron/pytorch-inference-vllm-neuronx:VERSION",
        has_nodes=False,  # platform.py: the executor is "uni"
        max_static_batch=32,  # platform.py: the default of max_num_seqs
    ),
    "tpu": Device(
        "tpu",
        Engine(
            "vLLM on TPU",
            _TPU_FORMATS,
            "--method fp8",
            source="tpu-inference 0.32.0",
        ),
        "google.com/tpu",
        "vllm/vllm-tpu:VERSION",
        has_nodes=False,
    ),
    "hpu": Device(
        "hpu",
        Engine("vLLM on Gaudi", _HPU_FORMATS, "--method fp8", source="vllm-gaudi 0.27.0"),
        "habana.ai/gaudi",
        "vault.habana.ai/gaudi-docker/VERSION/ubuntu24.04/habanalabs/"
        "vllm-VLLM_VERSION-ptupstream-PT_VERSION:latest",
        environment=(("OMPI_MCA_btl_vader_single_copy_mechanism", "none"),),
    ),
}


def accelerator_of(name: str, device: DeviceName | None) -> tuple[Device, Accelerator | None]:
    """The device and the accelerator that `--gpu` and `--device` name together.

    None for a GPU of CUDA, and for a size. A named accelerator says the device too. Raises
    UsageError when the two do not go together.
    """
    accelerator = ACCELERATORS.get(name.lower())
    if accelerator is None:
        if device in (None, "cuda") or name[:1].isdigit():
            return DEVICES[device or "cuda"], None
        raise UsageError(
            f"--gpu {name} is not known for --device {device}",
            f"{', '.join(_accelerators_of(device))}, or a size like 48GiB",
        )
    if device not in (None, accelerator.device):
        known = list(GPUS) if device == "cuda" else _accelerators_of(device)
        raise UsageError(
            f"--gpu {name} goes with --device {accelerator.device}, not {device}",
            f"For {device}: {', '.join(known)}, or a size like 48GiB",
        )
    return DEVICES[accelerator.device], accelerator


def _accelerators_of(device: DeviceName | None) -> list[str]:
    return [name for name, accelerator in ACCELERATORS.items() if accelerator.device == device]


def require_one_node(device: Device, pp: int, tokens: int) -> None:
    """Raises InputError for a layout over several nodes where a plugin serves on one node only."""
    if pp > 1 and not device.has_nodes:
        raise InputError(
            f"{tokens:,} tokens and the weights do not fit on one node",
            f"{device.engine.name} serves a model on one node",
            "Name a larger accelerator, more of them a node, or fewer --tokens",
        )


def static_batch(device: Device, tokens: int, max_model_len: int) -> int | None:
    """The requests of a batch whose KV cache has `tokens` tokens; None where it is not static."""
    if device.max_static_batch is None:
        return None
    return min(device.max_static_batch, max(1, tokens // max_model_len))
