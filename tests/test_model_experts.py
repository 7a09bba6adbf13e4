"""A decoder whose experts run together, as on a GPU: by the interpreter, against the experts one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_cases import put_together
from tiny import tiny_checkpoint
from triton_checks import interpreted

from llmkit.checkpoint.source import open_checkpoint
from llmkit.model import decoder
from llmkit.model.loader import load_model
from llmkit.model.sequence import logits_of

WINDOWS = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(3))


def results(path: str) -> dict[str, torch.Tensor]:
    """Of a model on the CPU that takes itself to be on a GPU, as far as its experts are concerned."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    decoder.runs_triton = lambda _: True  # type: ignore[assignment]
    model, found = load_model(open_checkpoint(Path(path)), torch.float32), {}
    found["apart"] = torch.cat(list(logits_of(model, WINDOWS)))

    decoder.suits = lambda _: True  # type: ignore[assignment]
    assert all(layer.together is None for layer in model.layers), "each expert's is a memory of its own"
    for layer in model.layers:
        put_together(layer)
    found["together"] = torch.cat(list(logits_of(model, WINDOWS)))
    for layer in model.layers:
        layer.adapted = True
    found["adapted"] = torch.cat(list(logits_of(model, WINDOWS)))
    layer, x = model.layers[0], torch.randn(7, model.spec.hidden, generator=torch.Generator().manual_seed(4))
    layer.adapted = False
    with torch.inference_mode():
        found["all"] = layer._experts(x)
        linears = layer.linears
        for part in ("0", "123"):
            layer.linears = {
                name: one for name, one in linears.items() if ".experts." not in name or name.split(".")[2] in part
            }
            put_together(layer)
            found[part] = layer._experts(x)
    return found


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_together_give_what_they_give_one_by_one(architecture: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, architecture, dtype="float32")
    (found,) = interpreted("test_model_experts", "results", [(str(path),)], tmp_path)
    torch.testing.assert_close(found["together"], found["apart"], atol=1e-4, rtol=1e-4)
    assert not torch.equal(found["together"], found["apart"]), "summed in another order"
    assert torch.equal(found["adapted"], found["apart"]), "adapters need each expert's rows"
    torch.testing.assert_close(found["0"] + found["123"], found["all"], atol=1e-5, rtol=1e-5)  # two ranks'
    assert found["0"].any() and found["123"].any()
