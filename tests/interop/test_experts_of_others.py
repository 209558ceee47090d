"""Experts in 4 bit that others have written are loaded bit for bit, or refused; others read what bigload has saved."""

import bitsandbytes.functional as kernels
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from checkpoints import empty, offloaded, save
from comparisons import assert_same_bits, equal, outputs
from mixtures import MIXTURES, TOKENS, config, mixture, unpacked, weights_of_experts
from references import stored_by_bitsandbytes
from safetensors.torch import load_file

from bigload import (
    BnbQuantizationConfig,
    CheckpointError,
    dequantize_model,
    load_and_quantize_model,
    plan_device_map,
    save_quantized_model,
)
from bigload.model.experts import find_experts

MODES = ("nf4", "nf4-dq", "fp4")


def built(name):
    return empty(lambda: MIXTURES[name][0](config(name)))


def as_4_bit(mode, **fields):
    return BnbQuantizationConfig.from_mode(mode, torch_dtype="bf16", bnb_4bit_compute_dtype="bf16", **fields)


def expert_values(stored, name, dtype=torch.bfloat16):
    """Dequantize one weight as bitsandbytes' own layer does."""
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
    state = kernels.QuantState.from_dict(parts, device=torch.device("cpu"))
    return kernels.dequantize_4bit(stored[name].reshape(1, -1).t(), state).to(dtype)


def by_transformers_4(name, folder, mode):
    """Write what transformers 4 writes: each expert as Linears of its own, each of them quantized. Returns it."""
    mixture(name).save_pretrained(folder / "original")
    state = {}
    for key, tensor in load_file(folder / "original" / "model.safetensors").items():
        is_quantized = key.endswith("proj.weight") or ".experts." in key
        state |= stored_by_bitsandbytes(key, tensor, mode) if is_quantized else {key: tensor}
    save({key: tensor.clone() for key, tensor in state.items()}, folder / "quantized", shards=2)
    return state


def names_of(name, key, expert):
    """The names in that checkpoint of what one expert of a weight is made of."""
    stem = key.rpartition(".")[0]
    if name == "mixtral":
        stem = stem.replace("mlp", "block_sparse_moe")
        parts = ("w1", "w3") if key.endswith("gate_up_proj") else ("w2",)
    else:
        parts = ("gate_proj", "up_proj") if key.endswith("gate_up_proj") else ("down_proj",)
    return [f"{stem}.{expert}.{part}.weight" for part in parts]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_transformers_4_are_joined_bit_for_bit(tmp_path, device, name, mode):
    stored = by_transformers_4(name, tmp_path, mode)
    plan = plan_device_map(built(name), None, tmp_path / "quantized", device_map=device)
    model = load_and_quantize_model(built(name), None, tmp_path / "quantized", device_map=device, strict=True)
    found = weights_of_experts(model)
    assert len(found) == 4
    assert plan.experts.keys() == {key.rpartition(".")[0] for key in found}
    by_name = {planned.tensor.name: planned for planned in plan.tensors}
    for key, weight in found.items():
        state = weight.quant_state
        assert not state.nested  # the experts' own offsets differ
        held = (weight.data, state.absmax, state.code)
        assert by_name[key].nbytes == sum(part.nbytes for part in held)
        values = kernels.dequantize_4bit(weight.data, state).cpu()
        for expert, one in enumerate(values):
            expected = torch.cat([expert_values(stored, part) for part in names_of(name, key, expert)])
            assert equal(one, expected)
    if mode != "nf4-dq":
        # On the CPU, as the stored ones: GPUs round some fp4 values that lie between two codes to the other one.
        own = load_and_quantize_model(built(name), as_4_bit(mode), tmp_path / "original", device_map="cpu")
        expected = weights_of_experts(own)
        for key, weight in found.items():
            assert equal(weight.data.cpu(), expected[key].data)
            assert equal(weight.quant_state.absmax.cpu(), expected[key].quant_state.absmax)


@pytest.mark.parametrize("mode", MODES)
def test_joined_experts_are_saved_offloaded_and_dequantized(tmp_path, device, mode, small_parts_stream):
    by_transformers_4("qwen3_moe", tmp_path, mode)
    model = load_and_quantize_model(built("qwen3_moe"), None, tmp_path / "quantized", device_map=device)
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(built("qwen3_moe"), None, tmp_path / "saved", device_map=device)
    assert_same_bits(again.state_dict(), model.state_dict())
    part = offloaded(
        lambda: MIXTURES["qwen3_moe"][0](config("qwen3_moe")),
        tmp_path / "quantized",
        device,
        ["model.layers.0"],
        tmp_path / "cache",
        config=None,
        home="disk",
    )
    assert_same_bits(part.state_dict(), model.state_dict())
    for each in (model, again, part):
        unpacked(each.eval())
    expected = outputs(model, TOKENS.to(device))
    assert torch.equal(outputs(part, TOKENS.to(device)), expected)
    kept = {key: kernels.dequantize_4bit(w.data, w.quant_state) for key, w in weights_of_experts(again).items()}
    plain = dequantize_model(again).state_dict()
    for key, values in kept.items():
        assert equal(plain[key], values)


def test_a_changed_file_of_joined_experts_is_read_again(tmp_path, small_parts_stream):
    """What an offload_folder holds of them was made of all files."""
    device = torch.device("cpu")
    stored = by_transformers_4("qwen3_moe", tmp_path, "nf4")
    how = (lambda: MIXTURES["qwen3_moe"][0](config("qwen3_moe")), tmp_path / "quantized", device, ["model.layers.0"])
    offloaded(*how, tmp_path / "cache", config=None, home="disk")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    stored[f"{name}.absmax"] = stored[f"{name}.absmax"] * 2
    save({key: tensor.clone() for key, tensor in stored.items()}, tmp_path / "quantized", shards=2)
    part = offloaded(*how, tmp_path / "cache", config=None, home="disk")
    whole = load_and_quantize_model(built("qwen3_moe"), None, tmp_path / "quantized", device_map=device)
    assert_same_bits(part.state_dict(), whole.state_dict())


@pytest.mark.parametrize("lost", ["", ".absmax", "all"])
def test_a_missing_expert_of_transformers_4_is_named(tmp_path, lost):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    stored = by_transformers_4("qwen3_moe", tmp_path, "nf4")
    gone = {key for key in stored if key == f"{name}{lost}" or (lost == "all" and key.startswith(name))}
    assert gone
    save({key: tensor.clone() for key, tensor in stored.items() if key not in gone}, tmp_path / "part")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.2\.up_proj\.weight") as caught:
        load_and_quantize_model(built("qwen3_moe"), None, tmp_path / "part", device_map="cpu")
    assert caught.value.missing_keys or not lost


@pytest.mark.parametrize("mode", MODES)
def test_parametrized_experts_of_bitsandbytes_are_loaded(tmp_path, device, mode):
    full = mixture("olmoe")
    for layer in full.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(
                layer.mlp.experts, name, compress_statistics=mode.endswith("dq"), quant_type=mode[:3], blocksize=64
            )
    state = {key: tensor.clone().contiguous() for key, tensor in full.state_dict().items()}
    model = load_and_quantize_model(built("olmoe"), None, save(state, tmp_path), device_map=device, strict=True)
    assert_same_bits(model.state_dict(), state)
    assert len(weights_of_experts(model)) == 4
    assert "forward" in vars(model.model.layers[0].mlp.experts)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_parametrized_experts_in_the_other_layout_are_refused(tmp_path, name):
    full = mixture(name)
    full.save_pretrained(tmp_path / "original")
    for path, module in list(full.named_modules()):
        if path.endswith("experts"):
            for weight in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(module, weight)
    state = {key: tensor.clone().contiguous() for key, tensor in full.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"transposed they would have other values: use the original checkpoint"):
        load_and_quantize_model(built(name), None, save(state, tmp_path / "quantized"), device_map="cpu")
    assert weights_of_experts(load_and_quantize_model(built(name), "nf4", tmp_path / "original", device_map="cpu"))


def test_experts_with_a_square_weight_are_told_by_the_other(tmp_path):
    sizes = {"intermediate_size": 32, "hidden_size": 64}  # gates and ups together, 64 x 64
    build = lambda: MIXTURES["gpt_oss"][0](config("gpt_oss", **sizes))  # noqa: E731
    model = load_and_quantize_model(mixture("gpt_oss", **sizes), as_4_bit("nf4"), device_map="cpu")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    again = load_and_quantize_model(empty(build), None, save(state, tmp_path / "turned"), device_map="cpu")
    assert_same_bits(again.state_dict(), state)
    full = mixture("gpt_oss", **sizes)
    for layer in full.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name)
    state = {key: tensor.clone().contiguous() for key, tensor in full.state_dict().items()}
    with pytest.raises(CheckpointError, match="transposed they would have other values"):
        load_and_quantize_model(empty(build), None, save(state, tmp_path / "not turned"), device_map="cpu")


@pytest.mark.parametrize("mode", MODES)
def test_bitsandbytes_reads_what_was_saved(tmp_path, mode):
    """Its function for weights that are quantized already, given what a folder of bigload's holds."""
    model = load_and_quantize_model(mixture("qwen3_moe"), as_4_bit(mode), device_map="cpu")
    save_quantized_model(model, tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    theirs = mixture("qwen3_moe")
    plain = dequantize_model(model).state_dict()
    for key in find_experts(dict(theirs.named_modules())):
        module = theirs.get_submodule(key)
        for name in ("gate_up_proj", "down_proj"):
            full = f"{key}.{name}"
            parts = {part.removeprefix(f"{full}."): t for part, t in state.items() if part.startswith(f"{full}.")}
            setattr(module, name, torch.nn.Parameter(state[full], requires_grad=False))
            replace_parameter_4bit_prequantized(module, name, parts, torch.device("cpu"))
            assert equal(getattr(module, name), plain[full])
