"""The config of a checkpoint that is quantized already: its weights tell it, the caller only how they compute."""

import json

import pytest
import torch
from checkpoints import empty, loaded, save
from comparisons import assert_same_bits, equal
from models import Layers
from references import FOUR_BIT, quantized_state, stored_by_bitsandbytes
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.config import warn_of_float32
from bigload.errors import CheckpointError, ConfigError

MODES = (*FOUR_BIT, "int8")


def config_json(folder, **fields):
    quantization = {"quant_method": "bitsandbytes", "llm_int8_threshold": 6.0, "bnb_4bit_compute_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization | fields}))


def test_compute_dtype_is_that_of_the_config_beside_the_weights(tmp_path, device):
    save(quantized_state(Layers().to(torch.float16), "nf4", device), tmp_path)
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.items():
        config_json(tmp_path, bnb_4bit_compute_dtype=name)
        model = loaded(tmp_path, device)
        assert {model.c_proj.compute_dtype, model.odd.compute_dtype} == {dtype}
        assert model.c_proj.weight.quant_state.dtype == model.head.weight.dtype == torch.float16


@pytest.mark.parametrize("mode", ["nf4-dq", "fp4", "int8"])
def test_float32_that_the_config_beside_says_is_warned_of_once_and_the_remedies_work(tmp_path, device, mode, warned):
    warn_of_float32.cache_clear()
    save(quantized_state(Layers().to(torch.float16), mode, device), tmp_path)
    config_json(tmp_path)  # what transformers writes if nothing was said
    for _ in range(2):
        loaded(tmp_path, device)
    if mode == "int8":
        assert not warned()
        return
    (warning,) = warned()
    assert "4-bit layers will compute in float32" in warning
    warn_of_float32.cache_clear()
    for dtype in ("bf16", "fp32"):
        remedy = BnbQuantizationConfig.from_mode(mode, bnb_4bit_compute_dtype=dtype)
        assert f"BnbQuantizationConfig.from_mode({mode!r}, bnb_4bit_compute_dtype=torch.bfloat16)" in warning
        model = load_and_quantize_model(empty(Layers), remedy, tmp_path, device_map=device)
        assert model.c_proj.compute_dtype == remedy.bnb_4bit_compute_dtype
    config_json(tmp_path, bnb_4bit_compute_dtype="bfloat16")
    loaded(tmp_path, device)
    assert len(warned()) == 1


def test_threshold_is_that_of_the_config_beside_the_weights(tmp_path, device):
    save(quantized_state(Layers(), "int8", device), tmp_path)
    for threshold in (0.0, 2.5, 7):
        config_json(tmp_path, llm_int8_threshold=threshold)
        assert loaded(tmp_path, device).c_proj.state.threshold == threshold


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "[]",
        "{}",
        "null",
        '{"quantization_config": null}',
        '{"quantization_config": {}}',
        '{"quantization_config": []}',
        '{"quantization_config": {"quant_method": "gptq", "bits": 4}}',
        '{"quantization_config": {"llm_int8_threshold": null, "bnb_4bit_compute_dtype": null}}',
        '{"quantization_config": {"llm_int8_threshold": "x", "bnb_4bit_compute_dtype": ["float16"]}}',
        '{"quantization_config": {"llm_int8_threshold": -1, "bnb_4bit_compute_dtype": "int8"}}',
    ],
)
def test_config_that_says_nothing_of_use_leaves_the_defaults(tmp_path, device, text):
    (tmp_path / "config.json").write_text(text)
    model = loaded(save(quantized_state(Layers().to(torch.bfloat16), "nf4", device), tmp_path), device)
    assert model.c_proj.compute_dtype == torch.bfloat16
    model = loaded(save(quantized_state(Layers(), "int8", device), tmp_path), device)
    assert model.c_proj.state.threshold == 6.0


def test_each_word_of_the_config_beside_counts_without_the_others(tmp_path, device):
    save(quantized_state(Layers(), "nf4", device), tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"bnb_4bit_compute_dtype": "bfloat16"}}')
    assert loaded(tmp_path, device).c_proj.compute_dtype == torch.bfloat16


class MostlyQuantized(nn.Module):
    """A skipped layer that, kept in float32, takes more bytes than the quantized one, but would not if it were none."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(160, 128)
        self.head = nn.Linear(128, 50)


@pytest.mark.parametrize("mode", FOUR_BIT)
def test_dtype_of_most_weights_is_counted_as_if_they_were_not_packed(tmp_path, device, mode):
    full = MostlyQuantized()
    full.body.half()
    state = quantized_state(full, mode, device)
    packed = sum(tensor.nbytes for name, tensor in state.items() if name.startswith("body"))
    assert packed < state["head.weight"].nbytes < full.body.weight.nbytes
    model = loaded(save(state, tmp_path), device, build=MostlyQuantized)
    assert model.body.bias.dtype == model.body.compute_dtype == torch.float16


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("mode", MODES)
def test_dtype_of_the_model_in_the_config_beside_decides_for_what_is_not_quantized(tmp_path, device, mode, key):
    """As in transformers: a file may hold more float32 than all else, of modules that are kept in it."""
    full = Layers()
    full.norm.half()
    (tmp_path / "config.json").write_text(json.dumps({key: "float16", "quantization_config": {}}))
    model = loaded(save(quantized_state(full, mode, device), tmp_path), device)
    assert {model.norm.weight.dtype, model.head.weight.dtype} == {torch.float16}
    if mode != "int8":
        assert model.c_proj.compute_dtype == torch.float16


def test_without_a_config_the_compute_dtype_is_the_checkpoints(tmp_path, device):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = loaded(save(quantized_state(Layers().to(dtype), "nf4", device), tmp_path), device)
        assert model.c_proj.compute_dtype == dtype


@pytest.mark.parametrize("mode", MODES)
def test_config_that_agrees_chooses_how_the_layers_compute(tmp_path, device, mode):
    state = quantized_state(Layers(), mode, device)
    save(state, tmp_path)
    config_json(tmp_path)
    config = BnbQuantizationConfig.from_mode(mode, bnb_4bit_compute_dtype="fp16", llm_int8_threshold=2.5)
    before = config.to_dict()
    model = loaded(tmp_path, device, config)
    if mode == "int8":
        assert model.c_proj.state.threshold == 2.5
    else:
        assert model.c_proj.compute_dtype == torch.float16
    assert_same_bits(model.state_dict(), state)
    assert config.to_dict() == before


def test_config_that_agrees_chooses_the_dtype_of_what_is_not_quantized(tmp_path, device):
    config = BnbQuantizationConfig.from_mode("nf4", torch_dtype="bf16")
    state = quantized_state(Layers(), "nf4", device)
    model = loaded(save(state, tmp_path), device, config)
    assert {model.head.weight.dtype, model.norm.bias.dtype, model.c_proj.bias.dtype} == {torch.bfloat16}
    assert model.c_proj.weight.quant_state.dtype == torch.float32
    assert equal(model.c_proj.weight.data.cpu(), state["c_proj.weight"])


@pytest.mark.parametrize("mode", MODES)
def test_config_in_any_spelling_may_agree(tmp_path, device, mode):
    state = quantized_state(Layers(), mode, device)
    of_transformers = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    if mode != "int8":
        of_transformers = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": mode[:3]}
        of_transformers["bnb_4bit_use_double_quant"] = mode.endswith("-dq")
    for config in (mode, of_transformers):
        assert_same_bits(loaded(save(state, tmp_path), device, config).state_dict(), state)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONTRADICTIONS = {
    "int8 asked of nf4": ("nf4", {"load_in_8bit": True}, ["load_in_8bit=True", "not False"]),
    "nf4 asked of int8": ("int8", NF4, ["load_in_4bit=True", "not False"]),
    "fp4 asked of nf4": ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, ["=fp4", "not nf4"]),
    "nf4 asked of fp4": ("fp4", NF4, ["=nf4", "not fp4"]),
    "double quant asked of none": (
        "nf4",
        NF4 | {"bnb_4bit_use_double_quant": True},
        ["double_quant=True", "not False"],
    ),
    "no double quant asked of one": ("nf4-dq", NF4, ["double_quant=False", "not True"]),
    "blocksize": ("nf4", NF4 | {"bnb_4bit_blocksize": 128}, ["blocksize=128", "not 64"]),
    "storage": ("nf4", NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, ["storage=torch.bfloat16", "not torch.uint8"]),
    "training": ("int8", {"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, ["fp16_weight=True", "not False"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_config_that_contradicts_the_checkpoint_is_refused_with_both_sides(tmp_path, device, case):
    mode, fields, named = CONTRADICTIONS[case]
    state = quantized_state(Layers(), mode, device)
    model = empty()
    with pytest.raises(ConfigError, match="is quantized already") as caught:
        load_and_quantize_model(model, BnbQuantizationConfig(**fields), save(state, tmp_path), device_map=device)
    assert all(word in str(caught.value) for word in named)
    assert "None" in str(caught.value)
    assert_same_bits(load_and_quantize_model(model, None, tmp_path, device_map=device).state_dict(), state)


@pytest.mark.parametrize("field", ["skip_modules", "keep_in_fp32_modules"])
@pytest.mark.parametrize("mode", MODES)
def test_config_that_keeps_plain_what_is_stored_quantized_is_refused_by_name(tmp_path, device, mode, field):
    state = quantized_state(Layers(), mode, device)
    save(state, tmp_path)
    agreeing = BnbQuantizationConfig.from_mode(mode, torch_dtype="fp32", **{field: ["head"]})
    assert_same_bits(loaded(tmp_path, device, agreeing).state_dict(), state)
    with pytest.raises(ConfigError, match="is quantized already") as caught:
        loaded(tmp_path, device, BnbQuantizationConfig.from_mode(mode, **{field: ["head", "c_proj"]}))
    assert "'c_proj'" in str(caught.value)
    assert field in str(caught.value)


def test_none_for_a_checkpoint_that_is_not_quantized_is_refused_with_the_remedy(tmp_path, device):
    save(Layers().state_dict(), tmp_path)
    with pytest.raises(ConfigError, match=r"None.*give a config or one of.*nf4"):
        loaded(tmp_path, device)
    for given in ("nf4", BnbQuantizationConfig(load_in_8bit=True)):
        assert load_and_quantize_model(empty(Layers), given, tmp_path, device_map=device)


@pytest.mark.parametrize("build", [Layers, empty], ids=["real", "meta"])
def test_none_without_weights_is_refused_with_the_remedy(device, build):
    with pytest.raises(ConfigError, match=r"None.*give a config or one of.*nf4"):
        load_and_quantize_model(build(), None, device_map=device)


OTHER_FORMATS = {
    "int8": {"mode": "int8"},
    "fp4": {"mode": "fp4"},
    "nested": {"mode": "nf4-dq"},
    "blocksize": {"mode": "nf4", "blocksize": 128},
    "storage": {"mode": "nf4", "storage": torch.bfloat16},
}


@pytest.mark.parametrize("other", OTHER_FORMATS)
def test_weights_in_two_formats_are_refused_by_name(tmp_path, device, other):
    state = quantized_state(Layers(), "nf4", device, skip=("head", "proj"))
    weight = state.pop("proj.weight")
    state |= {k: v.cpu() for k, v in stored_by_bitsandbytes("proj.weight", weight, **OTHER_FORMATS[other]).items()}
    with pytest.raises(CheckpointError, match=r"'c_proj\.weight'|'odd\.weight'") as caught:
        loaded(save(state, tmp_path), device)
    assert "'proj.weight'" in str(caught.value)
