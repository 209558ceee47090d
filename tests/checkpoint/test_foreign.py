"""Checkpoints that other methods quantized are named in the error, whatever was asked for."""

import json

import pytest
import torch
from checkpoints import empty, save
from torch import nn

from bigload import CheckpointError, load_and_quantize_model


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj, self.head = nn.LayerNorm(128), nn.Linear(128, 128, bias=False), nn.Linear(128, 8)


INT = torch.zeros(16, 128, dtype=torch.int32)
SCALES = torch.ones(1, 128).half()
BYTES = torch.zeros(128, 64, dtype=torch.uint8)
FP8 = torch.zeros(128, 128).to(torch.float8_e4m3fn)
HELD = {
    "gptq": {"qweight": INT, "qzeros": INT, "scales": SCALES, "g_idx": INT},
    "awq": {"qweight": INT, "qzeros": INT, "scales": SCALES},
    "quanto": {"weight._data": BYTES, "weight._scale": SCALES},
    "compressed-tensors": {"weight_packed": INT, "weight_scale": SCALES, "weight_shape": torch.tensor([128, 128])},
    "hqq": {"W_q": BYTES, "scale": SCALES, "zero": SCALES},
    "modelopt": {"weight": BYTES, "weight_scale": FP8, "weight_scale_2": SCALES, "input_scale": SCALES},
    "torchao": {"_weight_qdata": BYTES, "_weight_scale": SCALES},
    "nvfp4": {"weight_packed": BYTES, "weight_scale": FP8, "weight_global_scale": SCALES},
    "mxfp4": {"weight_blocks": BYTES, "weight_scales": BYTES},
}


@pytest.mark.parametrize("says", [True, False], ids=["with a config", "alone"])
@pytest.mark.parametrize("config", ["nf4", None])
@pytest.mark.parametrize("build", [lambda: empty(Two), Two], ids=["empty", "real"])
@pytest.mark.parametrize("method", HELD)
def test_the_method_is_named_with_a_remedy(tmp_path, method, build, config, says):
    state = Two().state_dict()
    del state["proj.weight"]
    save(state | {f"proj.{part}": value for part, value in HELD[method].items()}, tmp_path)
    if says:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    with pytest.raises(CheckpointError, match="which bigload does not read") as caught:
        load_and_quantize_model(build(), config, tmp_path)
    message = str(caught.value)
    assert "Use the original checkpoint" in message
    assert "'proj." in message
    if says:
        assert f"was quantized by '{method}', as 'config.json' says" in message


@pytest.mark.parametrize("config", ["nf4", None])
@pytest.mark.parametrize("inside", [True, False], ids=["a folder", "a file"])
def test_gguf_is_named(tmp_path, inside, config):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"llama\.cpp \(GGUF.*original checkpoint in safetensors"):
        load_and_quantize_model(empty(Two), config, tmp_path if inside else tmp_path / "model-Q4_K_M.gguf")
    save(Two().state_dict(), tmp_path)
    assert type(load_and_quantize_model(empty(Two), "nf4", tmp_path).proj).__name__ == "Linear4bit"


def test_a_model_that_has_scales_of_its_own_loads(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.head = nn.Linear(64, 64), nn.Linear(64, 8)
            self.weight_scale, self.scales = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    model = load_and_quantize_model(empty(Scaled), "nf4", save(Scaled().state_dict(), tmp_path), strict=True)
    assert type(model.proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("turn", [1, -1], ids=["stored one by one", "stored in one"])
def test_experts_of_the_other_layout_are_said(tmp_path, turn):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.ones(2, 8, 16))
            self.head = nn.Linear(8, 8)

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(8, 8)}) for _ in range(2))
            self.head = nn.Linear(8, 8)

    stored, wanted = (Single, Fused)[::turn]
    with pytest.raises(CheckpointError, match=r"the checkpoint stores (each expert by itself|all experts in one)"):
        load_and_quantize_model(wanted(), "nf4", save(stored().state_dict(), tmp_path))
