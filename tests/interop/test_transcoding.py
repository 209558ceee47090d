"""Checkpoints in fp8 and mxfp4 load with the values that transformers computes, then quantized by bitsandbytes."""

import json

import pytest
import torch
import transformers
from checkpoints import offloaded
from comparisons import assert_same_bits, outputs, state_of
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scaled import as_exponents, in_fp8, in_mxfp4, in_rows
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from bigload import CheckpointError, ConfigError, init_empty_weights, load_and_quantize_model, quantize_checkpoint
from bigload.io import transfer
from bigload.quantization.saved_experts import quantized_experts

WIDTHS = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
DEEPSEEK = {
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    **{"q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 128, "qk_nope_head_dim": 64, "v_head_dim": 64},
    **{"moe_intermediate_size": 128, "n_shared_experts": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "hidden_size": 64}
MODELS = {
    "qwen3": ("Qwen3", HEADS),
    "qwen3-moe": ("Qwen3Moe", HEADS | EXPERTS),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK),
    "gpt-oss": ("GptOss", HEADS | GPT_OSS),
}
MODES = ["nf4", "nf4-dq", "int8", "none"]


def saved(name, folder):
    """Save a small model as its publisher does, in fp8 or mxfp4."""
    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**(WIDTHS | fields), dtype="bfloat16")
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
    in_mxfp4(folder) if name == "gpt-oss" else in_fp8(folder)
    return folder


def built(folder):
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def dequantized(name, folder):
    """Return the model as transformers loads it in 16 bit."""
    cls = Mxfp4Config if name == "gpt-oss" else FineGrainedFP8Config
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=cls(dequantize=True), dtype=torch.bfloat16, device_map="cpu"
    )


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A checkpoint, and the same in 16 bit with transformers' own values."""
    folder = saved(request.param, tmp_path_factory.mktemp("scaled"))
    plain = tmp_path_factory.mktemp("plain")
    model = dequantized(request.param, folder)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, plain / "model.safetensors")
    return folder, plain


@pytest.mark.parametrize("mode", MODES)
def test_the_bits_are_those_of_transformers_values_quantized(pair, mode, device):
    folder, plain = pair
    found = load_and_quantize_model(built(folder), mode, folder, device_map=device)
    expected = load_and_quantize_model(built(folder), mode, plain, device_map=device)
    assert_same_bits(state_of(found), state_of(expected))
    tokens = torch.arange(12, device=device).view(2, 6)
    assert torch.equal(outputs(found, tokens), outputs(expected, tokens))


def test_experts_that_follow_each_other_are_read_as_one_weight(tmp_path, monkeypatch):
    """A read for each of thousands of experts would take longer than their bytes."""
    read, lay_out = [], transfer.lay_out
    monkeypatch.setattr(transfer, "lay_out", lambda tasks, windows: read.extend(tasks) or lay_out(tasks, windows))
    folder = saved("gpt-oss", tmp_path)
    load_and_quantize_model(built(folder), "nf4", folder, device_map="cpu")
    scaled = [task.tensor.shape for task in read if "_proj_" in task.tensor.name and task.tensor.dtype == torch.uint8]
    assert len(scaled) == 2 * 2 * 2  # numbers and scales, of two stacks in two layers


def test_damaged_scales_are_named_though_experts_are_read_as_one_weight(tmp_path, device):
    folder = saved("qwen3-moe", tmp_path)
    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.mlp.experts.3.up_proj.weight_scale_inv"][0, 0] = torch.inf
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight': stored with scales that are not finite"):
        load_and_quantize_model(built(folder), "nf4", folder, device_map=device)


FORMS = {
    "DeepSeek-V4's names": {"end": "scale"},
    "Mistral Large 4's names": {"end": "qscale_weight"},
    "mxfp8": {"size": (1, 32), "convert": as_exponents, "quant_method": "mxfp8", "scale_fmt": "ue8m0"},
    "experts in fp4": {"fp4": ".experts.", "expert_dtype": "fp4"},
    "experts in fp4, DeepSeek-V4's names": {"fp4": ".experts.", "expert_dtype": "fp4", "end": "scale"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_transformers_reads_as_fp8_have_its_values(form, mode, tmp_path, device):
    family, fields = MODELS["qwen3-moe"]
    config = getattr(transformers, f"{family}Config")(**(WIDTHS | fields), dtype="bfloat16")
    folder, plain = tmp_path / "scaled", tmp_path / "plain"
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
    in_fp8(folder, **FORMS[form])
    plain.mkdir()
    values = {name: tensor.clone() for name, tensor in dequantized("qwen3-moe", folder).state_dict().items()}
    if any(tensor.dtype.itemsize == 1 for tensor in values.values()):
        assert Version(transformers.__version__) < Version("5.24")
        pytest.skip("transformers does not read these names yet, and gives weights without their scales")
    save_file(values, plain / "model.safetensors")
    found = load_and_quantize_model(built(folder), mode, folder, device_map=device)
    expected = load_and_quantize_model(built(folder), mode, plain, device_map=device)
    assert_same_bits(state_of(found), state_of(expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [(torch.float8_e4m3fn, 448), (torch.int8, 127)], ids=["fp8", "w8a8"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_compressed_tensors_has_the_values_of_its_formula(name, number, mode, tmp_path, device):
    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**(WIDTHS | fields), dtype="bfloat16")
    folder, plain = tmp_path / "scaled", tmp_path / "plain"
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
    plain.mkdir()
    save_file(in_rows(folder, *number), plain / "model.safetensors")
    found = load_and_quantize_model(built(folder), mode, folder, device_map=device)
    expected = load_and_quantize_model(built(folder), mode, plain, device_map=device)
    assert_same_bits(state_of(found), state_of(expected))
    tokens = torch.arange(12, device=device).view(2, 6)
    assert torch.equal(outputs(found, tokens), outputs(expected, tokens))


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("mode", ["nf4", "none"])
def test_offloaded_blocks_compute_the_same(pair, mode, home, device, tmp_path, small_parts_stream):
    folder, _ = pair
    whole = load_and_quantize_model(built(folder), mode, folder, device_map=device).eval()
    how = {"config": mode, "home": home}
    part = offloaded(lambda: built(folder), folder, device, ["model.layers.1"], tmp_path, **how).eval()
    tokens = torch.arange(12, device=device).view(2, 6)
    assert torch.equal(outputs(part, tokens), outputs(whole, tokens))
    is_resident = home == device.type  # on the CPU, host memory is where it computes
    assert hasattr(part, "offload") is not is_resident
    if not is_resident:
        part.offload.remove()
    assert_same_bits(state_of(part), state_of(whole))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_are_rounded_once_to_any_dtype(pair, dtype):
    folder, _ = pair
    name = "gpt-oss" if "gpt_oss" in (folder / "config.json").read_text() else "fp8"
    cls = Mxfp4Config if name == "gpt-oss" else FineGrainedFP8Config
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=cls(dequantize=True), dtype=dtype, device_map="cpu"
    )
    ours = load_and_quantize_model(
        built(folder), {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": dtype}, folder, device_map="cpu"
    )
    assert_same_bits(state_of(ours), state_of(theirs))


def test_a_file_of_them_is_quantized_into_a_file(pair, tmp_path):
    folder, plain = pair
    quantize_checkpoint(folder, tmp_path / "nf4", "nf4", device="cpu")
    found = load_and_quantize_model(built(folder), None, tmp_path / "nf4", device_map="cpu")
    expected = load_and_quantize_model(built(folder), "nf4", plain, device_map="cpu")
    assert_same_bits(state_of(found), state_of(expected))


def test_a_copy_in_16_bit_is_made_from_file_to_file(pair, tmp_path, device):
    folder, plain = pair
    made = tmp_path / "made"
    quantize_checkpoint(folder, made, "none", device=device, max_shard_size="300KB")
    assert "quantization_config" not in json.loads((made / "config.json").read_text())
    assert len(list(made.glob("*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16, device_map="cpu")
    with safe_open(plain / "model.safetensors", "pt") as opened:
        assert_same_bits(state_of(theirs), {name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    found = load_and_quantize_model(built(folder), "nf4", made, device_map="cpu")
    assert_same_bits(state_of(found), state_of(load_and_quantize_model(built(folder), "nf4", plain, device_map="cpu")))
    with pytest.raises(ConfigError, match=r"nothing in this .* would be quantized"):
        quantize_checkpoint(made, tmp_path / "again", "none", device=device)


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", ["none", "nf4"])
def test_what_is_saved_is_loaded_by_transformers(pair, mode, is_training, tmp_path):
    folder, _ = pair
    ours = load_and_quantize_model(built(folder), mode, folder, device_map="cpu").train(is_training)
    if mode == "none" or not quantized_experts(ours):  # which transformers does not read in 4 bit
        ours.save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
        assert_same_bits(state_of(ours), state_of(theirs))
        # transformers gives a model in eval mode, in which bitsandbytes computes with other kernels.
        tokens = torch.arange(12).view(2, 6)
        assert torch.equal(outputs(ours, tokens), outputs(theirs.train(is_training), tokens))
