"""A decoder with fused experts, as on a GPU: interpreted, against single experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support.expert_cases import stack_layer_experts
from support.tiny_models import tiny_checkpoint
from support.triton_checks import interpreted

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model import decoder
from llmkit.model.full_forward import window_logits
from llmkit.model.weight_loader import load_model

WINDOWS = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(3))


def results(path: str) -> dict[str, torch.Tensor]:
    """Outputs of a model on the CPU whose experts behave as on a GPU."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    decoder.runs_triton = lambda _: True  # type: ignore[assignment]
    model = load_model(open_checkpoint(Path(path)), torch.float32)
    found = {}
    found["apart"] = torch.cat(list(window_logits(model, WINDOWS)))

    decoder.supports_fused_experts = lambda _: True  # type: ignore[assignment]
    assert all(layer.fused_experts is None for layer in model.layers), (
        "each expert's is a memory of its own"
    )
    for layer in model.layers:
        stack_layer_experts(layer)
        assert layer.layer.is_moe == (layer.fused_experts is not None)
    found["together"] = torch.cat(list(window_logits(model, WINDOWS)))
    for layer in model.layers:
        layer.has_lora_rows = True
    found["adapted"] = torch.cat(list(window_logits(model, WINDOWS)))
    layer = model.layers[0]
    x = torch.randn(7, model.spec.hidden_size, generator=torch.Generator().manual_seed(4))
    layer.has_lora_rows = False
    with torch.inference_mode():
        found["all"] = layer._moe(x)
        linears = layer.linears
        for part in ("0", "123"):
            layer.linears = {
                name: one
                for name, one in linears.items()
                if ".experts." not in name or name.split(".")[2] in part
            }
            stack_layer_experts(layer)
            found[part] = layer._moe(x)
    return found


@pytest.mark.parametrize(
    "architecture", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe"]
)
def test_decoder_fused_experts_match_single_experts(architecture: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, architecture, dtype="float32")
    (found,) = interpreted("model.test_model_experts", "results", [(str(path),)], tmp_path)
    torch.testing.assert_close(found["together"], found["apart"], atol=1e-4, rtol=1e-4)
    assert not torch.equal(found["together"], found["apart"]), "summed in another order"
    assert torch.equal(found["adapted"], found["apart"]), "adapters need each expert's rows"
    torch.testing.assert_close(
        found["0"] + found["123"], found["all"], atol=1e-5, rtol=1e-5
    )  # two ranks'
    assert found["0"].any() and found["123"].any()


def test_decoder_fused_experts_without_gate_match_single_experts(tmp_path: Path) -> None:
    """Those of Nemotron 3, which read and compute vectors of another size than the hidden one."""
    path = tiny_checkpoint(
        tmp_path,
        "nemotron_h",
        dtype="float32",
        hybrid_override_pattern="EM",
        n_routed_experts=4,
        moe_intermediate_size=48,
        moe_latent_size=32,
        moe_shared_expert_intermediate_size=32,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=16,
    )
    (found,) = interpreted("model.test_model_experts", "results", [(str(path),)], tmp_path)
    torch.testing.assert_close(found["together"], found["apart"], atol=1e-4, rtol=1e-4)


def test_experts_have_no_biases_where_other_mlps_have(tmp_path: Path) -> None:
    path = tiny_checkpoint(
        tmp_path,
        "hy_v3",
        dtype="float32",
        mlp_bias=True,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    with torch.inference_mode():
        wanted = oracle(WINDOWS, use_cache=False).logits
    model = load_model(open_checkpoint(path), torch.float32)
    assert model.layers[1].linears["mlp.shared_expert.down"].bias is not None
    assert model.layers[1].linears["mlp.experts.0.down"].bias is None
    logits = torch.stack(list(window_logits(model, WINDOWS)))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
