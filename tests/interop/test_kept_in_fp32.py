"""transformers' loader finds what a class keeps in float32 by searching names, and so does a load."""

import pytest
import torch
from checkpoints import PLAIN, empty
from comparisons import assert_same_bits
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bigload import load_and_quantize_model


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
