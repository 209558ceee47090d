"""The format, dtype and exact bytes of every tensor."""

import pytest
import torch
from checkpoints import empty
from models import Blocks as Model
from torch import nn
from transformers.pytorch_utils import Conv1D

from bigload.config import BnbQuantizationConfig
from bigload.errors import ConfigError
from bigload.model.quantizable import layers_to_quantize
from bigload.model.tensors import tensors_of
from bigload.planning.planned_tensors import formatted_tensors
from bigload.planning.sources import Source
from bigload.quantization.formats import FourBit, Int8, Plain

TABLE = 16 * 4  # bytes of a code table


def formatted(model, config, without=("positions", "scale")):
    tensors = tensors_of(model)
    sources = {tensor.name: (Source(tensor.value),) for tensor in tensors if tensor.name not in without}
    return formatted_tensors(model, config, tensors, layers_to_quantize(model, config, tensors), sources)


def planned(model, config, **kwargs):
    return {entry.tensor.name: entry for entry in formatted(model, config, **kwargs)}


def total(model, config):
    return sum(entry.nbytes for entry in formatted(model, config))


def test_plan_of_4bit_gives_each_tensor_its_format_dtype_and_bytes():
    config = BnbQuantizationConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", torch_dtype="bf16", keep_in_fp32_modules=["norm", "layers.1.fc2"]
    )
    entries = planned(Model(), config)
    four_bit = FourBit("nf4", 64, False, torch.uint8)
    assert {name: (entry.format, entry.nbytes) for name, entry in entries.items()} == {
        "embed.weight": (Plain(torch.bfloat16), 10 * 64 * 2),
        "layers.0.fc1.weight": (four_bit, 64 * 128 // 2 + 128 * 4 + TABLE),
        "layers.0.fc1.bias": (Plain(torch.bfloat16), 128 * 2),
        "layers.0.norm.weight": (Plain(torch.float32), 128 * 4),
        "layers.0.norm.bias": (Plain(torch.float32), 128 * 4),
        "layers.0.fc2.weight": (four_bit, 128 * 64 // 2 + 128 * 4 + TABLE),
        "layers.1.fc1.weight": (four_bit, 64 * 128 // 2 + 128 * 4 + TABLE),
        "layers.1.fc1.bias": (Plain(torch.bfloat16), 128 * 2),
        "layers.1.norm.weight": (Plain(torch.float32), 128 * 4),
        "layers.1.norm.bias": (Plain(torch.float32), 128 * 4),
        "layers.1.fc2.weight": (Plain(torch.float32), 128 * 64 * 4),
        "head.weight": (Plain(torch.bfloat16), 10 * 64 * 2),
        "head.bias": (Plain(torch.bfloat16), 10 * 2),
        "positions": (Plain(torch.int64), 7 * 8),
        "scale": (Plain(torch.float64), 3 * 8),
        "running_mean": (Plain(torch.bfloat16), 5 * 2),
    }


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("nf4", FourBit("nf4", 64, False, torch.uint8)),
        ("nf4-dq", FourBit("nf4", 64, True, torch.uint8)),
        ("fp4", FourBit("fp4", 64, False, torch.uint8)),
        ("fp4-dq", FourBit("fp4", 64, True, torch.uint8)),
        ("int8", Int8()),
        ("int8-training", Plain(torch.bfloat16)),
    ],
)
def test_plan_gives_each_mode_its_format(mode, expected):
    config = BnbQuantizationConfig.from_mode(mode).resolved(torch.bfloat16)
    assert planned(Model(), config)["layers.0.fc1.weight"].format == expected


def test_plan_holds_main_weights_of_int8_training_in_16_bit():
    config = BnbQuantizationConfig.from_mode("int8-training", torch_dtype="fp32").resolved(torch.float32)
    entries = planned(Model(), config)
    assert entries["layers.0.fc1.weight"].format == Plain(torch.float16)
    assert entries["embed.weight"].format == Plain(torch.float32)


def test_plan_takes_blocksize_and_storage_from_the_config():
    config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_blocksize=256, bnb_4bit_quant_storage="bfloat16")
    expected = FourBit("fp4", 256, False, torch.bfloat16)
    assert planned(Model(), config)["layers.0.fc1.weight"].format == expected


def test_plan_counts_a_tied_weight_once():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 10, bias=False))
    model[2].weight = model[0].weight
    assert total(model, BnbQuantizationConfig(load_in_8bit=True)) == 10 * 64 * 2 + 64 * 64 + 64 * 4 + 64 * 2


def test_plan_keeps_a_tied_weight_in_fp32_when_any_of_its_names_is_kept():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 10, bias=False))
    model[1].weight = model[0].weight
    config = BnbQuantizationConfig(load_in_8bit=True, keep_in_fp32_modules=["1"])
    assert planned(model, config)["0.weight"].format == Plain(torch.float32)


def test_plan_is_the_same_for_a_model_on_meta():
    config = BnbQuantizationConfig.from_mode("nf4-dq", torch_dtype="bf16").resolved(torch.bfloat16)
    facts = [
        [(entry.tensor.name, entry.format, entry.nbytes) for entry in formatted(model, config)]
        for model in (empty(Model), Model())
    ]
    assert facts[0] == facts[1]


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", torch.float32), ("bf16", torch.bfloat16)])
def test_plan_keeps_what_the_class_wants_in_fp32_under_fp16_only(dtype, expected):
    model = Model()
    model._keep_in_fp32_modules = ["fc2"]
    entries = planned(model, BnbQuantizationConfig(load_in_4bit=True, torch_dtype=dtype))
    assert entries["layers.0.fc2.weight"].format == Plain(expected)


def test_plan_turns_a_conv1d_weight_round():
    model = nn.Sequential(Conv1D(128, 64), nn.ReLU())
    entries = planned(model, BnbQuantizationConfig(load_in_8bit=True))
    assert entries["0.weight"].tensor.shape == (64, 128)
    assert entries["0.weight"].shape == (128, 64)
    assert entries["0.weight"].nbytes == 128 * 64 + 128 * 4
    assert entries["0.weight"].sources[0].transposed
    assert not entries["0.bias"].sources[0].transposed


def test_plan_leaves_a_skipped_conv1d_as_it_is():
    model = nn.Sequential(Conv1D(128, 64), nn.ReLU())
    entry = planned(model, BnbQuantizationConfig(load_in_8bit=True, skip_modules=["*"]))["0.weight"]
    assert (entry.shape, entry.format) == ((64, 128), Plain(torch.float16))
    assert not entry.sources[0].transposed


def test_weight_that_does_not_fill_its_storage_dtype_is_refused_with_the_remedy():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16")
    with pytest.raises(ConfigError, match=r"'0\.weight'.*bnb_4bit_quant_storage='uint8'.*'0' to skip_modules"):
        formatted(model, config)
