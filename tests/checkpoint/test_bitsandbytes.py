"""A checkpoint that bitsandbytes has quantized already is loaded as it is, bit by bit."""

import json
import logging

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import empty, loaded, save
from comparisons import assert_same_bits, equal, relative_error
from models import GPT, Layers
from references import FOUR_BIT, dequantize_by_hand, quantized_state, stored_by_bitsandbytes
from safetensors.torch import load_file
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.errors import CheckpointError, ConfigError

MODES = (*FOUR_BIT, "int8")
FORMATS = [
    *[(mode, size, storage) for mode in FOUR_BIT for size in (64, 128) for storage in (torch.uint8, torch.bfloat16)],
    ("int8", 64, torch.uint8),
]


def inputs(device, dtype):
    return torch.randn(6, 160, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.mark.parametrize(("mode", "blocksize", "storage"), FORMATS, ids=str)
def test_every_part_equals_what_was_written_bit_for_bit(tmp_path, device, mode, blocksize, storage):
    state = quantized_state(Layers().to(torch.bfloat16), mode, device, blocksize, storage)
    model = loaded(save(state, tmp_path), device)
    assert_same_bits(model.state_dict(), state)
    # bitsandbytes makes the descriptions anew, on the CPU, when it is asked for them.
    described = ("weight_format", f"quant_state.bitsandbytes__{mode[:3]}")
    held = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(described)}
    assert {tensor.device for tensor in held.values()} == {device}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("mode", FOUR_BIT)
def test_4bit_layer_is_bitsandbytes_own_with_all_it_knows_of_its_weight(tmp_path, device, mode, blocksize, storage):
    state = quantized_state(Layers().to(torch.float16), mode, device, blocksize, storage)
    model = loaded(save(state, tmp_path), device)
    for path, shape in {"c_proj": (128, 160), "proj": (35, 128), "odd": (5, 35)}.items():
        layer = model.get_submodule(path)
        weight, quant_state = layer.weight, layer.weight.quant_state
        written = json.loads(bytes(state[f"{path}.weight.quant_state.bitsandbytes__{mode[:3]}"].numpy()))
        assert type(layer) is bnb.nn.Linear4bit
        assert type(weight) is bnb.nn.Params4bit
        assert (layer.out_features, layer.in_features) == shape == tuple(quant_state.shape)
        assert layer.quant_state is quant_state
        assert weight.module is layer
        assert weight.bnb_quantized
        assert not weight.requires_grad
        assert (weight.blocksize, weight.quant_type, weight.quant_storage) == (blocksize, mode[:3], storage)
        assert weight.compress_statistics == quant_state.nested == mode.endswith("-dq")
        assert (quant_state.blocksize, quant_state.quant_type) == (blocksize, mode[:3])
        assert quant_state.dtype == layer.compute_dtype == torch.float16
        if quant_state.nested:
            assert equal(quant_state.offset.cpu(), torch.tensor(written["nested_offset"]))
            assert (quant_state.state2.blocksize, quant_state.state2.dtype) == (256, torch.float32)


def test_int8_layer_is_bitsandbytes_own_and_its_rows_are_held_once(tmp_path, device):
    state = quantized_state(Layers(), "int8", device)
    model = loaded(save(state, tmp_path), device)
    for path in ("c_proj", "proj", "odd"):
        layer = model.get_submodule(path)
        assert type(layer) is bnb.nn.Linear8bitLt
        assert type(layer.weight) is bnb.nn.Int8Params
        assert not layer.state.has_fp16_weights
        assert layer.weight.CB.data_ptr() == layer.weight.data_ptr()
        assert equal(layer.weight.SCB.cpu(), state[f"{path}.SCB"])


@pytest.mark.parametrize(("mode", "blocksize", "storage"), FORMATS, ids=str)
def test_forward_equals_that_of_the_original_weights_loaded_in_this_mode(tmp_path, device, mode, blocksize, storage):
    assert_forward_equals_that_of_the_originals(tmp_path, device, torch.bfloat16, mode, blocksize, storage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_forward_equals_that_of_the_original_weights_in_other_dtypes_too(tmp_path, device, mode, dtype):
    assert_forward_equals_that_of_the_originals(tmp_path, device, dtype, mode)


def assert_forward_equals_that_of_the_originals(tmp_path, device, dtype, mode, blocksize=64, storage=torch.uint8):
    full = Layers().to(dtype)
    config = BnbQuantizationConfig.from_mode(
        mode, bnb_4bit_blocksize=blocksize, bnb_4bit_quant_storage=storage, bnb_4bit_compute_dtype=dtype
    )
    from_original = loaded(save(full.state_dict(), tmp_path / "full"), device, config)
    model = loaded(save(quantized_state(full, mode, device, blocksize, storage), tmp_path / "quantized"), device)
    x = inputs(device, dtype)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), from_original.eval()(x))
        assert [type(module) for module in model.modules()] == [type(module) for module in from_original.modules()]


def by_hand(full, state, mode):
    """The model, with each quantized weight put back from what was written, by the formats' definition alone."""
    for path, module in full.named_modules():
        if f"{path}.weight.absmax" in state or f"{path}.SCB" in state:
            parts = {"weight": state[f"{path}.weight"]}
            if mode == "int8":
                parts["SCB"] = state[f"{path}.SCB"]
            else:
                written = json.loads(bytes(state[f"{path}.weight.quant_state.bitsandbytes__{mode[:3]}"].numpy()))
                names = {"absmax": "absmax", "code": "quant_map"}
                if mode.endswith("-dq"):
                    names |= {"nested_absmax": "nested_absmax", "nested_code": "nested_quant_map"}
                    parts["offset"] = torch.tensor(written["nested_offset"])
                parts |= {name: state[f"{path}.weight.{stored}"] for name, stored in names.items()}
            module.weight = nn.Parameter(dequantize_by_hand(parts, module.weight.shape))
    return full


@pytest.mark.parametrize("mode", MODES)
def test_output_is_that_of_the_stored_weights_dequantized_by_hand(tmp_path, device, mode):
    full = Layers()
    state = quantized_state(full, mode, device)
    model = loaded(save(state, tmp_path), device)
    x = inputs("cpu", torch.float32)
    with torch.no_grad():
        found, expected = model.eval()(x.to(device)), by_hand(full, state, mode)(x)
    # int8 layers round their inputs too; float32 matmuls of a GPU may be TF32.
    assert relative_error(found, expected) < (0.05 if mode == "int8" else 1e-3)


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "ran"])
@pytest.mark.parametrize("mode", MODES)
def test_saved_state_dict_of_a_loaded_model_comes_back_with_the_same_bits(tmp_path, device, mode, ran):
    full = Layers().to(torch.bfloat16)
    first = loaded(save(full.state_dict(), tmp_path / "full"), device, mode).eval()
    expected = quantized_state(full, mode, device)
    if ran:
        with torch.no_grad():
            first(inputs(device, torch.bfloat16))
    save({name: tensor.cpu().clone() for name, tensor in first.state_dict().items()}, tmp_path / "saved")
    assert_same_bits(loaded(tmp_path / "saved", device).state_dict(), expected)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_parts_of_one_weight_may_lie_in_different_shards(tmp_path, device, mode):
    state = quantized_state(Layers(), mode, device)
    save({name: state[name] for name in sorted(state)}, tmp_path, shards=4)
    files = [load_file(file).keys() for file in tmp_path.glob("*.safetensors")]
    assert sum(any(name.startswith("c_proj.") and name != "c_proj.bias" for name in file) for file in files) > 2
    assert_same_bits(loaded(tmp_path, device).state_dict(), state)


@pytest.mark.parametrize("mode", MODES)
def test_pickled_state_dict_is_loaded_the_same(tmp_path, device, mode):
    state = quantized_state(Layers(), mode, device)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_bits(loaded(tmp_path, device).state_dict(), state)


@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_how_the_parts_were_cut_while_they_were_read(tmp_path, device, mode, monkeypatch):
    state = quantized_state(Layers(), mode, device)
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "1KiB")
    assert_same_bits(loaded(save(state, tmp_path), device).state_dict(), state)


@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_torchs_default_dtype(tmp_path, device, mode):
    state = quantized_state(Layers(), mode, device)
    model = empty()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load_and_quantize_model(model, None, save(state, tmp_path), device_map=device)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(model.state_dict(), state)


@pytest.mark.parametrize("mode", MODES)
def test_model_that_has_weights_of_its_own_takes_those_of_the_checkpoint(tmp_path, device, mode):
    state = quantized_state(Layers(), mode, device)
    model = load_and_quantize_model(Layers(), None, save(state, tmp_path), device_map=device, strict=True)
    assert_same_bits(model.state_dict(), state)


def test_int8_rows_without_a_word_of_their_layout_are_rows(tmp_path, device):
    """Files from before bitsandbytes wrote `weight_format`."""
    state = quantized_state(Layers(), "int8", device)
    older = {name: tensor for name, tensor in state.items() if not name.endswith("weight_format")}
    assert len(older) == len(state) - 3
    assert_same_bits(loaded(save(older, tmp_path), device).state_dict(), state)


@pytest.mark.parametrize("skipped", ["c_proj", "proj"])
@pytest.mark.parametrize("mode", MODES)
def test_layer_whose_name_ends_in_anothers_is_quantized_or_not_on_its_own(tmp_path, device, mode, skipped):
    state = quantized_state(Layers(), mode, device, skip=(skipped, "head", "odd"))
    model = loaded(save(state, tmp_path), device)
    quantized = {path for path, module in model.named_modules() if type(module).__name__.startswith("Linear")}
    plain = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    assert plain == {skipped, "head", "odd"}
    assert quantized - plain == {"c_proj", "proj"} - {skipped}
    assert_same_bits(model.state_dict(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_quantized_keeps_its_dtype(tmp_path, device, mode, dtype):
    state = quantized_state(Layers().to(dtype), mode, device)
    model = loaded(save(state, tmp_path), device)
    plain = [model.head.weight, model.head.bias, model.norm.weight, model.c_proj.bias]
    assert {tensor.dtype for tensor in plain} == {dtype}


@pytest.mark.parametrize("mode", MODES)
def test_head_that_was_quantized_is_loaded_quantized(tmp_path, device, mode):
    """What is skipped was decided when the checkpoint was made."""
    state = quantized_state(Layers(), mode, device, skip=())
    for config in (None, mode):
        assert_same_bits(loaded(save(state, tmp_path), device, config).state_dict(), state)


@pytest.mark.parametrize(
    "key_mapping", [{r"^old\.": ""}, lambda key: key.removeprefix("old.")], ids=["regexes", "function"]
)
@pytest.mark.parametrize("mode", MODES)
def test_key_mapping_renames_a_weight_with_all_its_parts(tmp_path, device, mode, key_mapping):
    state = quantized_state(Layers(), mode, device)
    save({f"old.{name}": tensor for name, tensor in state.items()}, tmp_path)
    assert_same_bits(loaded(tmp_path, device, key_mapping=key_mapping).state_dict(), state)


@pytest.mark.parametrize("both", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("mode", MODES)
def test_tied_embeddings_stay_plain_and_tied(tmp_path, device, mode, both):
    full = GPT(tied=True)
    state = quantized_state(full, mode, device, skip=("lm_head",))
    expected = dict(state)
    if not both:
        del state["lm_head.weight"]
    model = loaded(save(state, tmp_path), device, build=lambda: GPT(tied=True))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer["wte"].weight
    assert_same_bits(model.state_dict(), expected)


class Shared(nn.Module):
    """One layer under two names, as ALBERT's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("stored", ["first", "second"])
@pytest.mark.parametrize("mode", MODES)
def test_layer_under_two_names_is_one_layer_whichever_name_is_stored(tmp_path, device, mode, stored):
    state = quantized_state(Shared(), mode, device)
    kept = {name: tensor for name, tensor in state.items() if name.startswith(stored)}
    model = loaded(save(kept, tmp_path), device, build=Shared)
    assert model.first is model.second
    assert_same_bits(model.state_dict(), state)


class TiedLinears(nn.Module):
    """Two layers with one weight, of which bitsandbytes can make no two quantized ones."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(64, 64)
        self.leave = nn.Linear(64, 64)
        self.leave.weight = self.enter.weight


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_weight_of_two_layers_that_is_stored_quantized_is_refused_by_name(tmp_path, device, mode):
    state = quantized_state(TiedLinears(), mode, device)
    with pytest.raises(CheckpointError, match=r"'enter\.weight'"):
        loaded(save(state, tmp_path), device, build=TiedLinears)


class TiedHeadFirst(nn.Module):
    """A head that comes before the embedding it is tied to."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 96, bias=False)
        self.embed = nn.Embedding(96, 64)
        self.embed.weight = self.head.weight


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_weight_of_an_embedding_too_that_is_stored_quantized_is_refused_by_name(tmp_path, device, mode):
    state = quantized_state(TiedHeadFirst(), mode, device, skip=())
    del state["embed.weight"]
    with pytest.raises(CheckpointError, match=r"'head\.weight'"):
        loaded(save(state, tmp_path), device, build=TiedHeadFirst)


@pytest.mark.parametrize("mode", MODES)
def test_model_that_is_itself_the_layer_is_replaced_by_a_quantized_one(tmp_path, device, mode):
    state = quantized_state(nn.Linear(64, 32), mode, device)
    model = loaded(save(state, tmp_path), device, build=lambda: nn.Linear(64, 32))
    assert type(model).__module__.startswith("bitsandbytes")
    assert_same_bits(model.state_dict(), state)


class Named(nn.Linear):
    """A subclass that does what nn.Linear does, and is asked for more."""

    def merged(self):
        return self.weight


class Other(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("mode", MODES)
def test_subclass_of_linear_is_loaded_when_it_is_named(tmp_path, device, mode):
    def build():
        return nn.Sequential(Named(64, 64), nn.Linear(64, 3))

    state = quantized_state(build(), mode, device, skip=("1",))
    with pytest.raises(CheckpointError, match=r"'0\.weight'.*quantizable"):
        loaded(save(state, tmp_path), device, build=build)
    assert_same_bits(loaded(tmp_path, device, build=build, quantizable=[Named]).state_dict(), state)


@pytest.mark.parametrize("quantizable", [Named, [Other], [nn.Embedding], "Named"], ids=str)
def test_quantizable_is_checked_as_for_any_checkpoint(tmp_path, device, quantizable):
    state = quantized_state(Layers(), "nf4", device)
    with pytest.raises(ConfigError, match="quantizable"):
        loaded(save(state, tmp_path), device, quantizable=quantizable)


class Observer(nn.Module):
    """Keeps statistics in buffers that are called as bitsandbytes calls its own."""

    NAMES = ("absmax", "quant_map", "SCB", "weight_format", "nested_absmax")

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            self.register_buffer(name, torch.zeros(3))


class Observed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 64)
        self.observer = Observer()
        self.scaled = nn.LayerNorm(64)
        self.scaled.register_buffer("SCB", torch.zeros(64))
        self.scaled.register_buffer("absmax", torch.zeros(1))
        self.head = nn.Linear(64, 3)


def observed():
    full = Observed()
    for buffer in full.buffers():
        buffer.normal_()
    return full


@pytest.mark.parametrize("mode", MODES)
def test_buffers_with_the_names_of_parts_are_loaded_beside_quantized_weights(tmp_path, device, mode):
    state = quantized_state(observed(), mode, device)
    assert_same_bits(loaded(save(state, tmp_path), device, build=Observed).state_dict(), state)


@pytest.mark.parametrize("mode", MODES)
def test_buffers_with_the_names_of_parts_make_no_checkpoint_a_quantized_one(tmp_path, device, mode):
    full = observed()
    model = loaded(save(full.state_dict(), tmp_path), device, mode, build=Observed)
    assert_same_bits(model.state_dict(), quantized_state(full, mode, device))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_flow_through_loaded_layers_to_plain_parameters(tmp_path, device, mode):
    full = Layers()
    state = quantized_state(full, mode, device)
    model = loaded(save(state, tmp_path), device).train()
    reference = by_hand(full, state, mode)
    x = inputs("cpu", torch.float32)
    found, expected = (x.clone().to(place).requires_grad_() for place in (device, "cpu"))
    model(found).square().sum().backward()
    reference(expected).square().sum().backward()
    # int8 layers round their inputs and gradients too.
    bound = 0.1 if mode == "int8" else 2e-3
    assert relative_error(found.grad, expected.grad) < bound
    for path in ("norm", "head"):
        plain, by_definition = model.get_submodule(path), reference.get_submodule(path)
        assert relative_error(plain.weight.grad, by_definition.weight.grad) < bound
    assert not any(parameter.requires_grad for parameter in model.c_proj.parameters())


def test_all_places_and_sources_are_said_to_fit_without_a_warning(tmp_path, device, logged):
    state = quantized_state(Layers(), "nf4-dq", device)
    with logged.at_level(logging.WARNING, "bigload"):
        load_and_quantize_model(empty(), None, save(state, tmp_path), device_map=device)
    assert not logged.records


def test_tensor_without_a_place_is_a_warning_under_its_own_name(tmp_path, device, logged):
    state = quantized_state(Layers(), "nf4", device)
    state |= {k: v.cpu() for k, v in stored_by_bitsandbytes("gone.weight", torch.rand(64, 64), "nf4").items()}
    with logged.at_level(logging.WARNING, "bigload"):
        load_and_quantize_model(empty(), None, save(state, tmp_path), device_map=device)
    (message,) = (record.getMessage() for record in logged.records)
    assert "1 tensor" in message
    assert "'gone.weight'" in message


@pytest.mark.parametrize("mode", MODES)
def test_report_counts_each_byte_once(tmp_path, device, mode):
    state = quantized_state(Layers(), mode, device)
    described = ("weight_format", f"quant_state.bitsandbytes__{mode[:3]}")
    read = {name: tensor.nbytes for name, tensor in state.items() if not name.endswith(described)}
    offsets = 3 * 4 if mode.endswith("-dq") else 0
    report = loaded(save(state, tmp_path), device).load_report
    assert report.mode == mode
    assert report.bytes_read == sum(read.values())
    assert report.device_bytes == {device: sum(read.values()) + offsets}
