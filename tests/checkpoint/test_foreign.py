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


def integers(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


def scales(*shape, dtype=torch.float16):
    return torch.ones(shape).to(dtype)


U8, FP8, F32 = torch.uint8, torch.float8_e4m3fn, torch.float32
BYTES = integers(128, 64, dtype=U8)
GROUPS = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, "targets": ["Linear"]}
FP4_GROUPS = {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}}
# What a Linear of 128 x 128 is stored as, and what config.json says, as the methods' own libraries write both.
HELD = {
    "gptq": (
        {"qweight": integers(16, 128), "qzeros": integers(1, 16), "scales": scales(1, 128), "g_idx": integers(128)},
        {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    ),
    "gptq, for marlin": (
        {"B": integers(8, 256), "s": scales(1, 128), "workspace": integers(16)},
        {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
    ),
    "auto-round": (
        {"qweight": integers(16, 128), "qzeros": integers(1, 16), "scales": scales(1, 128)},
        {"bits": 4, "packing_format": "auto_round:auto_gptq"},
    ),
    "awq": (
        {"qweight": integers(128, 16), "qzeros": integers(1, 16), "scales": scales(1, 128)},
        {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    ),
    "quanto": (
        {"weight._data": integers(128, 128, dtype=torch.int8), "weight._scale": scales(128, 1)},
        {"weights": "int8", "activations": None},
    ),
    "quanto, in fp8": (
        {"weight._data": scales(128, 128, dtype=FP8), "weight._scale": scales(128, 1), "input_scale": scales()},
        {"quant_method": "quanto", "weights": "float8", "activations": None},
    ),
    "compressed-tensors": (
        {"weight_packed": integers(128, 16), "weight_scale": scales(128, 1), "weight_shape": torch.tensor([128, 128])},
        {"config_groups": {"group_0": GROUPS}, "format": "pack-quantized", "quantization_status": "compressed"},
    ),
    "compressed-tensors, marlin-24": (
        {"weight_packed": integers(4, 256), "scale_packed": scales(1, 128), "meta": integers(8, 256)},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUPS}, "format": "marlin-24"},
    ),
    "compressed-tensors, nvfp4": (
        {"weight_packed": BYTES, "weight_scale": scales(128, 8, dtype=FP8), "weight_global_scale": scales(1)},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": FP4_GROUPS}},
    ),
    "modelopt": (
        {
            "weight": BYTES,
            "weight_scale": scales(128, 8, dtype=FP8),
            "weight_scale_2": scales(),
            "input_scale": scales(),
        },
        {"quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.35.0"}},
    ),
    "nvfp4": (
        {"weight": BYTES, "weight_sf": integers(128, 4), "weight_global_scale": scales(1)},
        {"modules_to_not_convert": ["head"]},
    ),
    "torchao": (
        {"_weight_qdata": BYTES, "_weight_scale": scales(1, 128), "_weight_zero_point": scales(1, 128)},
        {"quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 128}}}},
    ),
    "torchao, tiled": (
        {"_weight_qdata": BYTES, "_weight_scale_and_zero": scales(1, 128, 2)},
        {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    ),
    "hqq": ({"W_q": BYTES, "scale": scales(128, 1), "zero": scales(128, 1)}, {"quant_config": {}}),
    "sinq": ({"W_q": BYTES, "meta": integers(9, dtype=U8)}, {"nbits": 4}),
    "bitnet": ({"weight": integers(32, 128, dtype=U8), "weight_scale": scales(1)}, {"linear_class": "bitlinear"}),
    "aqlm": ({"codes": integers(16, 16, 1), "codebooks": scales(1, 256, 1, 8), "scales": scales(16, 1, 1, 1)}, {}),
    "higgs": (
        {"weight": integers(128, 32), "scales": scales(1, 128), "tables": scales(16), "tables2": scales(16, 16)},
        {},
    ),
    "spqr": ({"dense_weights": integers(99), "row_offsets": integers(129), "col_vals": integers(9)}, {"bits": 3}),
    "eetq": ({"weight": integers(128, 128, dtype=torch.int8), "weight_scales": scales(128)}, {"weights": "int8"}),
    "fp_quant": ({"qweight": BYTES, "scales": integers(128, 4, dtype=U8)}, {"forward_dtype": "mxfp4"}),
    "metal": ({"weight": integers(128, 16), "scales": scales(128, 2), "qbiases": scales(128, 2)}, {"bits": 4}),
    "fouroversix": ({"quantized_weight_values": BYTES, "quantized_weight_amax": scales(1)}, {}),
    "exl3": ({"trellis": integers(8, 8, 64), "suh": scales(128), "svh": scales(128)}, {"bits": 4.0}),
    "mxfp4": ({"weight_blocks": BYTES, "weight_scales": BYTES}, {}),
}
# Names that nothing is known of, so that the config alone tells the method, or small numbers whose scales mean what
# those of other methods do, but that are said to be of a method that is not known to.
SAID = {
    "a_new_method": ({"packed": integers(128, 16), "grid": scales(16)}, {"bits": 4}),
    "another_one": ({"weight": integers(128, 16), "grid": scales(16)}, {"bits": 4}),
    "quark": ({"weight": scales(128, 128, dtype=FP8), "weight_scale": scales(dtype=F32)}, {"export": {}}),
    "gemma": ({"weight": integers(128, 128, dtype=torch.int8), "weight_scale": scales(128, 1, dtype=F32)}, {}),
}


@pytest.mark.parametrize("says", [True, False], ids=["with a config", "alone"])
@pytest.mark.parametrize("config", ["nf4", None])
@pytest.mark.parametrize("build", [lambda: empty(Two), Two], ids=["empty", "real"])
@pytest.mark.parametrize("name", HELD)
def test_the_method_is_named_with_a_remedy(tmp_path, name, build, config, says):
    parts, said = HELD[name]
    with pytest.raises(CheckpointError, match="which bigload does not read") as caught:
        load_and_quantize_model(build(), config, written(tmp_path, parts, name, said if says else None))
    message = str(caught.value)
    assert "Use the original checkpoint" in message
    assert "'proj." in message
    if says:
        assert f"was quantized by '{said.get('quant_method', name)}', as 'config.json' says" in message


@pytest.mark.parametrize("config", ["nf4", None])
@pytest.mark.parametrize("name", SAID)
def test_a_method_that_only_the_config_tells_is_named(tmp_path, name, config):
    parts, said = SAID[name]
    with pytest.raises(CheckpointError, match=f"was quantized by '{name}', as 'config.json' says .it holds 'proj"):
        load_and_quantize_model(empty(Two), config, written(tmp_path, parts, name, said))


def test_a_weight_that_expects_scaled_inputs_is_refused(tmp_path):
    parts = {"weight": scales(128, 128, dtype=FP8), "weight_scale": scales(dtype=F32), "pre_quant_scale": scales(128)}
    said = {"quant_algo": "FP8"}
    with pytest.raises(CheckpointError, match=r"a method that scales inputs .it holds 'proj.pre_quant_scale'"):
        load_and_quantize_model(empty(Two), "nf4", written(tmp_path, parts, "modelopt", said))
    del parts["pre_quant_scale"]
    assert load_and_quantize_model(
        empty(Two), "nf4", written(tmp_path, parts, "modelopt", said)
    ).proj.weight.quant_state


def test_a_config_that_was_left_behind_beside_plain_weights_is_no_method(tmp_path):
    folder = written(tmp_path, {"weight": torch.ones(128, 128)}, "gptq", {"bits": 4})
    assert load_and_quantize_model(empty(Two), "nf4", folder).proj.weight.quant_state
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not found in.*'proj.weight'; is it the checkpoint of this model"):
        load_and_quantize_model(empty(Two), "nf4", written(tmp_path, {}, "gptq", {"bits": 4}))


def written(folder, parts, method, said):
    """Save a model whose Linear is stored in parts; with a config, unless nothing is said."""
    state = Two().state_dict()
    del state["proj.weight"]
    save(state | {f"proj.{part}": value for part, value in parts.items()}, folder)
    if said is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, **said}}))
    return folder


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
