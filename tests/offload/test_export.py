"""What captures a graph of a model is told that offloaded weights are in none."""

import pytest
import torch
from checkpoints import empty, save_checkpoint
from torch import nn

from bigload import OffloadError, load_and_quantize_model
from bigload.offload.forwards import CpuForward

UNQUANTIZED = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "fp32"}


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2))
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


def exported(model, x, strict=False):
    return torch.export.export(model, (x,), strict=strict)


def exported_strictly(model, x):
    return exported(model, x, strict=True)


def traced(model, x):
    return torch.jit.trace(model, x)


@pytest.mark.parametrize("capture", [exported, exported_strictly, traced])
@pytest.mark.parametrize("config", [UNQUANTIZED, "nf4", "int8"], ids=["fp32", "nf4", "int8"])
def test_a_model_with_offloaded_weights_is_not_captured_and_runs_as_before(
    config, capture, device, tmp_path, small_parts_stream
):
    save_checkpoint(Tower(), tmp_path)
    model = load_and_quantize_model(
        empty(Tower), config, tmp_path, device_map={"": device, "blocks": "disk"}, offload_folder=tmp_path / "off"
    ).eval()
    x = torch.randn(2, 64, device=device)
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(OffloadError, match=r"cannot be exported or traced.*call model\.offload\.remove\(\) first"):
            capture(model, x)
        assert torch.equal(model(x), expected)


def test_both_remedies_work(tmp_path, device, small_parts_stream):
    save_checkpoint(Tower(), tmp_path)
    x = torch.randn(2, 64, device=device)
    for where in ({"": device}, {"": device, "blocks": "disk"}):
        model = load_and_quantize_model(
            empty(Tower), UNQUANTIZED, tmp_path, device_map=where, offload_folder=tmp_path / "off"
        ).eval()
        if "blocks" in where:
            model.offload.remove()
            model.to(device)
        with torch.no_grad():
            for strict in (False, True):
                assert torch.equal(exported(model, x, strict).module()(x), model(x))
            assert torch.equal(traced(model, x)(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_a_module_that_the_cpu_computes_beside_a_gpu_is_not_exported(strict):
    """Such modules have another forward than streamed ones."""
    model = Tower()
    override = CpuForward("blocks.1.0", model.blocks[1][0], torch.device("cpu"))
    x = torch.randn(2, 64)
    with pytest.raises(OffloadError, match="cannot be exported"):
        exported(model, x, strict)
    override.remove()
    assert exported(model, x, strict)
