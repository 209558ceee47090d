"""transformers' loader finds what a class keeps in float32 by searching names, and so does a load."""

import pytest
import torch
from checkpoints import PLAIN, empty
from comparisons import assert_same_bits
from models import t5
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bigload import (
    BnbQuantizationConfig,
    dequantize_model,
    load_and_quantize_model,
    plan_device_map,
    save_quantized_model,
)


class GatedConfig(PretrainedConfig):
    model_type = "gated"


class Gated(PreTrainedModel):
    config_class = GatedConfig
    _keep_in_fp32_modules = ("norm",)
    _keep_in_fp32_modules_strict = ("gate.weight", "sink*s")

    def __init__(self, config):
        super().__init__(config)
        names = ("gate", "shared_expert_gate", "gated", "norm", "post_norm", "normal", "word", "sinks", "sinking_bias")
        self.parts = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_class_keeps_in_fp32_what_its_patterns_find_anywhere_in_a_name(tmp_path, dtype):
    torch.manual_seed(0)
    Gated(GatedConfig()).save_pretrained(tmp_path)
    theirs = Gated.from_pretrained(tmp_path, dtype=dtype)
    ours = load_and_quantize_model(
        empty(Gated, GatedConfig()), PLAIN | {"torch_dtype": dtype}, tmp_path, device_map="cpu"
    )
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    kept = {name for name, tensor in ours.state_dict().items() if tensor.dtype == torch.float32}
    if dtype != torch.float32:
        assert {"parts.gate.weight", "parts.shared_expert_gate.weight"} < kept
        assert "parts.gated.weight" not in kept


@pytest.mark.parametrize("mode", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_stays_in_fp32_does_not_decide_the_dtype_of_what_is_saved(tmp_path, mode, dtype):
    """T5 keeps a product of each block in float32, which is more bytes than all else that is not quantized."""
    t5(d_ff=256).save_pretrained(tmp_path / "plain")
    config = BnbQuantizationConfig.from_mode(mode, torch_dtype=dtype)
    model = load_and_quantize_model(empty(t5, d_ff=256), config, tmp_path / "plain", device_map="cpu")
    save_quantized_model(model, tmp_path / "saved")
    assert plan_device_map(empty(t5, d_ff=256), None, tmp_path / "saved", device_map="cpu").config.load_dtype == dtype
    again = load_and_quantize_model(empty(t5, d_ff=256), None, tmp_path / "saved", device_map="cpu")
    expected = dequantize_model(model).state_dict()
    assert {tensor.dtype for tensor in expected.values()} == {dtype, *[torch.float32] * (dtype == torch.float16)}
    assert_same_bits(dequantize_model(again).state_dict(), expected)


def test_layers_that_transformers_quantized_have_the_dtype_of_the_config(tmp_path):
    from transformers import BitsAndBytesConfig, T5ForConditionalGeneration

    t5(d_ff=256).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = T5ForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float16, device_map={"": "cpu"}
    )
    assert dequantize_model(model).encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.float16
