"""Which fused experts are quantized, by module and by weight, and why the others are not."""

import copy
import pickle

import pytest
import torch
from checkpoints import empty, save
from comparisons import assert_same_bits, equal, identity_of
from mixtures import MIXTURES, config, mixture, weights_of_experts
from torch import nn

from bigload import (
    BnbQuantizationConfig,
    CheckpointError,
    ConfigError,
    QuantizationError,
    dequantize_model,
    load_and_quantize_model,
    plan_device_map,
    save_quantized_model,
)
from bigload.checkpoint.describe import describe_checkpoint
from bigload.quantization.bnb import dequantize_4bit
from bigload.quantization.saved_experts import quantized_experts

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


def built(name="qwen3_moe"):
    return empty(lambda: MIXTURES[name][0](config(name)))


def planned(name="qwen3_moe", mode="nf4", fields=None, **options):
    model = empty(lambda: MIXTURES[name][0](config(name, **(fields or {}))))
    return plan_device_map(
        model, BnbQuantizationConfig.from_mode(mode, torch_dtype="bf16", **options), device_map="cpu"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [FIRST, SECOND]),
        ({"skip_modules": ["layers.0"]}, [SECOND]),
        ({"skip_modules": ["layers.1.mlp.experts"]}, [FIRST]),
        ({"skip_modules": ["layers.1.mlp.experts.down_proj"]}, [FIRST]),  # both of its weights or none
        ({"skip_modules": ["layers.*.gate_up_proj"]}, []),
        ({"skip_modules": ["gate"]}, [FIRST, SECOND]),  # the router, whose name is a part of gate_up_proj
        ({"keep_in_fp32_modules": ["layers.0.mlp"]}, [SECOND]),
        ({"skip_modules": ["*"]}, []),
    ],
)
def test_names_in_the_config_hold_for_experts_as_for_linears(options, expected):
    plan = planned(**options)
    assert list(plan.experts) == expected
    assert not plan.plain_experts  # it was asked for
    kept = {"keep_in_fp32_modules": torch.float32}.get(next(iter(options), ""), torch.bfloat16)
    for planned_tensor in plan.tensors:
        path, _, leaf = planned_tensor.tensor.name.rpartition(".")
        if path in {FIRST, SECOND} and path not in expected:
            assert planned_tensor.format.dtype == kept, leaf


def test_what_the_class_keeps_in_float32_is_not_quantized():
    class Kept(MIXTURES["qwen3_moe"][0]):
        _keep_in_fp32_modules = ["experts"]  # noqa: RUF012

    plan = plan_device_map(empty(lambda: Kept(config("qwen3_moe"))), "nf4", device_map="cpu")
    assert not plan.experts


def test_int8_leaves_experts_as_they_are_and_says_so(device, warned):
    model = load_and_quantize_model(mixture("qwen3_moe"), "int8", device_map=device)
    assert not quantized_experts(model)
    assert model.get_parameter(f"{FIRST}.gate_up_proj").dtype == torch.bfloat16
    (message,) = warned()
    assert "in 2 Qwen3MoeExperts (int8 has no kernel for fused experts)" in message
    plan = planned(mode="int8")
    assert f"experts not quantized, as int8 has no kernel for fused experts: '{FIRST}', '{SECOND}'" in str(plan)


def test_experts_that_no_blocksize_divides_stay_and_the_plan_says_why():
    plan = planned(
        fields={"moe_intermediate_size": 40, "hidden_size": 72, "num_hidden_layers": 1}, bnb_4bit_blocksize=128
    )
    assert not plan.experts
    assert plan.plain_experts == {
        FIRST: "an expert's down_proj, 72 x 40, is not a whole number of blocks of 128",
    }
    assert "is not a whole number of blocks of 128" in str(plan)


def test_quantized_experts_are_no_leftover(device, warned):
    load_and_quantize_model(mixture("qwen3_moe"), "nf4", device_map=device)
    assert not warned()


def test_experts_of_several_dtypes_are_quantized_from_the_one_that_was_asked_for(tmp_path, device):
    """As a checkpoint may hold them that was put together from others."""
    full = {key: tensor.clone() for key, tensor in mixture("mixtral").state_dict().items()}
    stored = {}
    for key, tensor in full.items():
        if "experts" not in key:
            stored[key] = tensor
            continue
        stem = key.rpartition(".")[0].replace("mlp", "block_sparse_moe")
        names = ("w1", "w3") if "gate_up" in key else ("w2",)
        for number, expert in enumerate(tensor):
            for name, part in zip(names, expert.chunk(len(names)), strict=True):
                stored[f"{stem}.{number}.{name}.weight"] = part.float() if number % 2 else part
    stored = {key.replace("mlp.gate", "block_sparse_moe.gate"): tensor.contiguous() for key, tensor in stored.items()}
    build = lambda: MIXTURES["mixtral"][0](config("mixtral"))  # noqa: E731
    asked = BnbQuantizationConfig.from_mode("nf4", torch_dtype="bf16")
    found = load_and_quantize_model(empty(build), asked, save(stored, tmp_path), device_map=device)
    expected = load_and_quantize_model(mixture("mixtral"), asked, device_map=device)
    assert len(weights_of_experts(found)) == 4
    assert_same_bits(found.state_dict(), expected.state_dict())


def stored_one_by_one(folder, name):
    mixture(name).save_pretrained(folder)
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("lost", [(1, "all"), (3, "all"), (2, "down_proj"), (0, "gate_proj")])
def test_missing_experts_are_named(tmp_path, lost):
    number, part = lost
    state = stored_one_by_one(tmp_path / "whole", "qwen3_moe")
    stem = f"{SECOND}.{number}."
    gone = {key for key in state if key.startswith(stem) and part in (key.split(".")[-2], "all")}
    assert gone
    save({key: tensor for key, tensor in state.items() if key not in gone}, tmp_path / "part")
    with pytest.raises(CheckpointError) as caught:
        load_and_quantize_model(built(), "nf4", tmp_path / "part", device_map="cpu")
    assert set(caught.value.missing_keys) == gone
    assert all(f"'{key}'" in str(caught.value) for key in gone)


def test_experts_of_which_half_is_stored_quantized_are_loaded_from_the_original(tmp_path):
    model = load_and_quantize_model(mixture("qwen3_moe"), "nf4", device_map="cpu")
    plain = mixture("qwen3_moe").state_dict()
    state = {key: t for key, t in model.state_dict().items() if not key.startswith(f"{SECOND}.down_proj")}
    state[f"{SECOND}.down_proj"] = plain[f"{SECOND}.down_proj"]
    save({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "half")
    save({key: tensor.clone() for key, tensor in plain.items()}, tmp_path / "original")
    message = rf"'{SECOND}\.gate_up_proj' is stored quantized, but '{SECOND}\.down_proj'.*use the original checkpoint"
    with pytest.raises(CheckpointError, match=message):
        load_and_quantize_model(built(), None, tmp_path / "half", device_map="cpu")
    again = load_and_quantize_model(built(), "nf4", tmp_path / "original", device_map="cpu")
    assert_same_bits(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("field", ["skip_modules", "keep_in_fp32_modules"])
def test_a_config_that_names_experts_which_are_stored_quantized_is_refused(tmp_path, field):
    mixture("qwen3_moe").save_pretrained(tmp_path / "original")
    model = load_and_quantize_model(built(), "nf4", tmp_path / "original", device_map="cpu")
    save_quantized_model(model, tmp_path / "saved")
    named = BnbQuantizationConfig.from_mode("nf4", **{field: ["layers.0.mlp.experts"]})
    with pytest.raises(ConfigError, match=r"'model\.layers\.0\.mlp\.experts', which .*: remove it from there, or use"):
        load_and_quantize_model(built(), named, tmp_path / "saved", device_map="cpu")
    removed = load_and_quantize_model(built(), "nf4", tmp_path / "saved", device_map="cpu")
    assert list(quantized_experts(removed)) == [FIRST, SECOND]
    original = load_and_quantize_model(built(), named, tmp_path / "original", device_map="cpu")
    assert list(quantized_experts(original)) == [SECOND]


def test_stored_experts_that_the_model_computes_otherwise_are_refused(tmp_path):
    asked = BnbQuantizationConfig.from_mode("nf4", skip_modules=[], experts_modules=["1"])
    save_quantized_model(load_and_quantize_model(net(), asked, device_map="cpu"), tmp_path / "saved")

    def others():
        return nn.Sequential(Ours(), Other())

    with pytest.raises(ConfigError, match="'1', but its forward computes something else"):
        load_and_quantize_model(empty(others), None, tmp_path / "saved", device_map="cpu")


def test_a_declared_module_that_computes_otherwise_is_loaded_without_its_name():
    asked = BnbQuantizationConfig.from_mode("nf4", skip_modules=[], experts_modules=["0", "1"])
    with pytest.raises(ConfigError, match=r"'1', but .* or remove it from experts_modules, so that it stays in 16 bit"):
        load_and_quantize_model(nn.Sequential(Ours(), Other()), asked, device_map="cpu")
    asked.experts_modules = ["0"]
    model = load_and_quantize_model(nn.Sequential(Ours(), Other()), asked, device_map="cpu")
    assert list(quantized_experts(model)) == ["0"]
    asked.experts_modules = ["0", "1"]
    assert list(quantized_experts(load_and_quantize_model(net(), asked, device_map="cpu"))) == ["0", "1"]


class Ours(nn.Module):
    """Experts of one's own, named in the config."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 64) / 8)
        self.down_proj = nn.Parameter(torch.randn(4, 64, 32) / 6)
        self.act_fn = nn.functional.silu

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in range(len(self.down_proj)):
            token, choice = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, y * top_k_weights[token, choice, None])
        return out


class Other(Ours):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights) * 2


def net():
    torch.manual_seed(0)
    return nn.Sequential(Ours(), Ours())


def test_declared_experts_of_ones_own_are_quantized_saved_and_loaded(tmp_path, device):
    asked = BnbQuantizationConfig.from_mode("nf4", skip_modules=[], experts_modules=["1"])
    model = load_and_quantize_model(net(), asked, device_map=device)
    assert list(quantized_experts(model)) == ["1"]
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(empty(net), None, tmp_path / "saved", device_map=device)
    assert list(quantized_experts(again)) == ["1"]
    assert_same_bits(again.state_dict(), model.state_dict())


def test_a_weight_held_outside_its_experts_is_refused():
    model = net()
    model.held = [model[1].down_proj]
    asked = BnbQuantizationConfig.from_mode("nf4", skip_modules=[], experts_modules=["0", "1"])
    with pytest.raises(ConfigError, match="holds the weight of '1'"):
        load_and_quantize_model(model, asked, device_map="cpu")
    asked.skip_modules = ["1"]
    assert list(quantized_experts(load_and_quantize_model(model, asked, device_map="cpu"))) == ["0"]


def test_tied_experts_stay_and_the_plan_says_so():
    model = net()
    model[1].down_proj = model[0].down_proj
    asked = BnbQuantizationConfig.from_mode("nf4", skip_modules=[], experts_modules=["0"])
    plan = plan_device_map(model, asked, device_map="cpu")
    assert plan.plain_experts == {"0": "tied to other modules' weights"}


def test_experts_whose_weight_was_replaced_are_saved_after_a_load(tmp_path):
    model = load_and_quantize_model(mixture("qwen3_moe"), "nf4", device_map="cpu")
    module = model.get_submodule(FIRST)
    module.down_proj = nn.Parameter(torch.zeros(4, 64, 64))
    for refused in (lambda: save_quantized_model(model, tmp_path / "saved"), lambda: dequantize_model(model)):
        with pytest.raises(QuantizationError, match=rf"'{FIRST}\.down_proj': quantized when .*: load the model again"):
            refused()
    again = load_and_quantize_model(mixture("qwen3_moe"), "nf4", device_map="cpu")
    save_quantized_model(again, tmp_path / "saved")
    dequantize_model(again)


def test_saving_warns_of_what_transformers_does_not_read(tmp_path, warned):
    model = load_and_quantize_model(mixture("qwen3_moe"), "nf4", device_map="cpu")
    save_quantized_model(model, tmp_path / "saved")
    (message,) = warned()
    assert f"transformers reads no fused experts in 4 bit, such as those of '{FIRST}'" in message
    assert "load_and_quantize_model(model, None, folder)" in message
    again = load_and_quantize_model(built(), None, tmp_path / "saved", device_map="cpu")
    assert_same_bits(again.state_dict(), model.state_dict())


def test_experts_that_a_hook_renames_are_saved_without_it(tmp_path):
    model = load_and_quantize_model(mixture("qwen3_moe"), "nf4", device_map="cpu")

    def rename(module, state, prefix, metadata):
        for key in [key for key in state if "gate_up_proj" in key]:
            state[key.replace("gate_up_proj", "w13")] = state.pop(key)

    handle = model.register_state_dict_post_hook(rename)
    with pytest.raises(QuantizationError, match=rf"'{FIRST}\.gate_up_proj'.*: remove these hooks for the save"):
        save_quantized_model(model, tmp_path / "saved")
    handle.remove()
    save_quantized_model(model, tmp_path / "saved")


def test_copies_have_their_own_weights_and_state(device):
    model = load_and_quantize_model(mixture("gpt_oss"), "nf4-dq", device_map=device)
    made = copy.deepcopy(model), pickle.loads(pickle.dumps(model.get_submodule(FIRST)))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert_same_bits(made[0].state_dict(), before)
    with torch.no_grad():
        for module in model.modules():
            for name in getattr(getattr(module, "quantized_experts", None), "weights", ()):
                module._parameters[name].data.zero_()
                module._parameters[name].quant_state.absmax.zero_()
    assert_same_bits(made[0].state_dict(), before)
    of_first = {key.removeprefix(f"{FIRST}."): tensor for key, tensor in before.items() if key.startswith(FIRST)}
    assert_same_bits(made[1].state_dict(), of_first)
    with pytest.raises(QuantizationError, match=rf"'{FIRST}' is quantized, and torch.nn.DataParallel"):
        model.get_submodule(FIRST)._replicate_for_data_parallel()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_own_weights_and_pickled_ones_are_quantized_to_the_same_bits(tmp_path, device, name):
    full = mixture(name)
    own = load_and_quantize_model(copy.deepcopy(full), "nf4-dq", device_map=device)
    torch.save(full.state_dict(), tmp_path / "pytorch_model.bin")
    pickled = load_and_quantize_model(built(name), "nf4-dq", tmp_path, device_map=device)
    full.save_pretrained(tmp_path / "saved")
    stored = load_and_quantize_model(built(name), "nf4-dq", tmp_path / "saved", device_map=device)
    assert weights_of_experts(own)
    assert_same_bits(own.state_dict(), stored.state_dict())
    assert_same_bits(pickled.state_dict(), stored.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dequantized_to_another_dtype_experts_and_biases_have_it(device, dtype):
    model = load_and_quantize_model(mixture("gpt_oss"), "nf4", device_map=device)
    expected = {
        key: dequantize_4bit(weight.data, weight.quant_state, dtype).mT
        for key, weight in weights_of_experts(model).items()
    }
    plain = dequantize_model(model, dtype)
    for key, values in expected.items():
        assert equal(plain.get_parameter(key), values.contiguous())
        assert plain.get_parameter(f"{key}_bias").dtype == dtype
    assert not vars(plain.get_submodule(FIRST)).keys() & {"forward", "quantized_experts", "compute_dtype", "loaded_as"}


def test_a_parametrized_bias_is_computed_with():
    """As PEFT and others change it."""

    class Doubled(nn.Module):
        def forward(self, x):
            return x * 2

    model = load_and_quantize_model(mixture("gpt_oss"), "nf4", device_map="cpu")
    module = model.get_submodule(FIRST)
    given = (torch.randn(5, 64).bfloat16(), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5))
    before = module(*given)
    torch.nn.utils.parametrize.register_parametrization(module, "down_proj_bias", Doubled())
    found = module(*given)
    expected = before.float() + module.parametrizations.down_proj_bias.original[:2].float().mean(0)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
    assert not torch.equal(found, before)


def test_described_checkpoint_tells_its_experts(tmp_path):
    model = load_and_quantize_model(mixture("qwen3_moe"), "nf4", device_map="cpu")
    save_quantized_model(model, tmp_path / "saved")
    assert "fused experts among them: 4 tensors, 98,304 values" in describe_checkpoint(tmp_path / "saved")


def test_a_model_with_quantized_experts_is_not_loaded_again_and_a_failed_load_changes_nothing(device, monkeypatch):
    model = net()
    before = identity_of(model), {path: sorted(vars(module)) for path, module in model.named_modules()}
    asked = BnbQuantizationConfig.from_mode("nf4", skip_modules=[], experts_modules=["0", "1"])
    with monkeypatch.context() as patched:
        patched.setattr("bigload.loading._set_to_run", failing(RuntimeError("interrupted")))
        with pytest.raises(RuntimeError, match="interrupted"):
            load_and_quantize_model(model, asked, device_map=device)
    assert (identity_of(model), {path: sorted(vars(module)) for path, module in model.named_modules()}) == before
    load_and_quantize_model(model, asked, device_map=device)
    with pytest.raises(ConfigError, match="quantized"):
        load_and_quantize_model(model, asked, device_map=device)


def failing(error):
    def fail(*given):
        raise error

    return fail
