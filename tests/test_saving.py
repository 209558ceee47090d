"""What is saved comes back with the same bits, layers and dtypes; a folder is there whole or not at all."""

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import empty, loaded, quantized, save, save_checkpoint, stored
from comparisons import assert_same_bits, state_of
from models import GPT, Layers
from references import FOUR_BIT, quantized_state
from torch import nn

from bigload import (
    BnbQuantizationConfig,
    ConfigError,
    QuantizationError,
    load_and_quantize_model,
    plan_device_map,
    save_quantized_model,
)
from bigload.offload.device_hooks import attach
from bigload.quantization.layers import quantized_layers

MODES = (*FOUR_BIT, "int8")
FORMATS = [
    *[(mode, size, storage) for mode in FOUR_BIT for size in (64, 128) for storage in (torch.uint8, torch.bfloat16)],
    ("int8", 64, torch.uint8),
]


def described(model):
    """All that may differ between two models with the same tensors."""
    return [
        (path, type(module).__name__, getattr(module, "compute_dtype", None), module.training)
        for path, module in model.named_modules()
    ]


@pytest.mark.parametrize("max_shard_size", ["5GB", 2_000, 1])
@pytest.mark.parametrize(("mode", "blocksize", "storage"), FORMATS, ids=str)
def test_model_comes_back_bit_for_bit(tmp_path, device, mode, blocksize, storage, max_shard_size):
    """With 1 byte each part of a weight is in a file of its own."""
    model = quantized(tmp_path / "source", device, mode, bnb_4bit_blocksize=blocksize, bnb_4bit_quant_storage=storage)
    save_quantized_model(model, tmp_path / "saved", max_shard_size)
    assert_same_bits(stored(tmp_path / "saved"), model.state_dict())
    again = loaded(tmp_path / "saved", device).eval()
    assert_same_bits(again.state_dict(), model.state_dict())
    assert described(again) == described(model)
    x = torch.randn(3, 160, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("mode", MODES)
def test_files_are_those_that_bitsandbytes_own_state_dict_gives(tmp_path, device, mode):
    full = Layers().bfloat16()
    state = quantized_state(full, mode, device)
    model = load_and_quantize_model(empty(), None, save(state, tmp_path / "own"), device_map=device)
    save_quantized_model(model, tmp_path / "saved")
    assert_same_bits(stored(tmp_path / "saved"), state)


@pytest.mark.parametrize("mode", MODES)
def test_saved_after_it_ran_it_is_what_was_loaded(tmp_path, device, mode):
    """On CPUs with AVX512-BF16 bitsandbytes packs weights when they run, on others it caches; int8 moves its scales."""
    model = quantized(tmp_path / "source", device, mode)
    fresh = state_of(model)
    x = torch.randn(3, 160, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(x)
    model.train()(x.requires_grad_()).float().sum().backward()
    model.eval()
    save_quantized_model(model, tmp_path / "saved")
    assert_same_bits(stored(tmp_path / "saved"), fresh)
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "saved", device).eval()(x), before)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_choice_of_layers_and_dtypes_comes_back(tmp_path, device, mode):
    model = quantized(
        tmp_path / "source",
        device,
        mode,
        skip_modules=["proj", "head"],
        keep_in_fp32_modules=["norm"],
        bnb_4bit_compute_dtype="fp16",
    )
    model.head.half()  # by hand: no rule says so
    save_quantized_model(model, tmp_path / "saved")
    again = loaded(tmp_path / "saved", device).eval()
    assert_same_bits(again.state_dict(), model.state_dict())
    assert described(again) == described(model)
    assert (again.norm.weight.dtype, again.head.weight.dtype) == (torch.float32, torch.float16)
    assert type(again.proj) is nn.Linear
    assert quantized_layers(again).keys() == {"c_proj", "odd"}


def test_what_the_weights_do_not_say_may_be_chosen_anew(tmp_path, device):
    save_quantized_model(quantized(tmp_path / "source", device, "nf4"), tmp_path / "saved")
    again = loaded(
        tmp_path / "saved", device, config=BnbQuantizationConfig.from_mode("nf4", bnb_4bit_compute_dtype="fp32")
    ).eval()
    assert again.c_proj.compute_dtype == torch.float32
    assert again.norm.weight.dtype == torch.bfloat16  # as it was saved
    with pytest.raises(ConfigError, match="quantized already"):
        loaded(tmp_path / "saved", device, config="fp4").eval()
    save_quantized_model(quantized(tmp_path / "source", device, "int8"), tmp_path / "int8")
    config = BnbQuantizationConfig.from_mode("int8", llm_int8_threshold=3.0)
    assert loaded(tmp_path / "int8", device, config=config).eval().c_proj.state.threshold == 3.0


def test_threshold_and_compute_dtype_come_back(tmp_path, device):
    model = quantized(tmp_path / "source", device, "int8", llm_int8_threshold=2.5)
    save_quantized_model(model, tmp_path / "int8")
    assert loaded(tmp_path / "int8", device).eval().c_proj.state.threshold == 2.5
    model = quantized(tmp_path / "source", device, "nf4", bnb_4bit_compute_dtype="fp32")
    save_quantized_model(model, tmp_path / "nf4")
    assert loaded(tmp_path / "nf4", device).eval().c_proj.compute_dtype == torch.float32


def test_trainable_main_weights_come_back_with_their_layers(tmp_path, device):
    model = quantized(tmp_path / "source", device, "int8-training", skip_modules=["proj"])
    save_quantized_model(model, tmp_path / "saved")
    again = loaded(tmp_path / "saved", device).eval()
    assert_same_bits(again.state_dict(), model.state_dict())
    assert quantized_layers(again).keys() == quantized_layers(model).keys()
    assert again.c_proj.state.has_fp16_weights
    assert again.c_proj.weight.requires_grad


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.body = nn.Linear(64, 64)
        self.proj = nn.Linear(64, 64)
        self.sub_proj = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.sub_proj(self.proj(self.body(self.embedding(x)))))


@pytest.mark.parametrize("made_on_meta", [False, True])
def test_tied_weights_are_stored_once_and_tied_again(tmp_path, device, made_on_meta):
    """torch's own meta device unties them, as accelerate's `init_empty_weights` does."""
    model = quantized(tmp_path / "source", device, build=Tied)
    save_quantized_model(model, tmp_path / "saved")
    assert "head.weight" not in stored(tmp_path / "saved")
    with torch.device("meta"):
        untied = Tied()
    untied.head.weight = nn.Parameter(torch.empty(96, 64, device="meta"))
    target = untied if made_on_meta else empty(Tied)
    again = load_and_quantize_model(target, None, tmp_path / "saved", device_map=device, strict=True)
    assert again.head.weight is again.embedding.weight
    assert_same_bits(again.state_dict(), model.state_dict())


def test_a_subclass_of_linear_that_was_named_quantizable_is_quantized_again(tmp_path, device):
    class Own(nn.Linear):
        def merged(self):
            return self.weight

    def build():
        return nn.ModuleDict({"fc": Own(64, 64), "plain": Own(64, 64), "head": nn.Linear(64, 2)})

    save_checkpoint(build(), tmp_path / "source")
    config = BnbQuantizationConfig.from_mode("nf4", skip_modules=["plain"])
    model = load_and_quantize_model(empty(build), config, tmp_path / "source", device_map=device, quantizable=[Own])
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(empty(build), None, tmp_path / "saved", device_map=device)
    assert quantized_layers(again).keys() == {"fc", "head"}
    assert_same_bits(again.state_dict(), model.state_dict())


def test_model_that_is_itself_a_layer(tmp_path, device):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).bfloat16()
    model = load_and_quantize_model(layer, BnbQuantizationConfig.from_mode("nf4", skip_modules=[]), device_map=device)
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(empty(nn.Linear, 64, 64), None, tmp_path / "saved", device_map=device)
    assert isinstance(again, bnb.nn.Linear4bit)
    assert_same_bits(again.state_dict(), model.state_dict())


def test_model_whose_layers_bitsandbytes_made_itself_is_saved_too(tmp_path, device):
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.bfloat16), nn.Linear(64, 4))
    model = model.to(device)
    if device.type == "cpu":
        model[0].weight = model[0].weight.to("cpu")
        model[0].weight._quantize("cpu") if not model[0].weight.bnb_quantized else None
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(
        empty(lambda: nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 4))), None, tmp_path / "saved", device_map=device
    )
    assert_same_bits(again.state_dict(), model.state_dict())


# What is refused, and what is left of it.


def test_models_that_cannot_come_back_are_refused(tmp_path, device):
    with pytest.raises(ConfigError, match="no layer that bitsandbytes quantized"):
        save_quantized_model(GPT(), tmp_path / "saved")
    model = quantized(tmp_path / "source", device)
    model.norm.to("meta")
    with pytest.raises(QuantizationError, match=r"'norm\.weight'.*on meta"):
        save_quantized_model(model, tmp_path / "saved")
    one, other = quantized(tmp_path / "source", device, "nf4"), quantized(tmp_path / "source", device, "int8")
    one.odd = other.odd
    with pytest.raises(QuantizationError, match=r"'c_proj'.*'odd'.*different quantization configs"):
        save_quantized_model(one, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_weights_that_bitsandbytes_packed_are_refused(tmp_path):
    model = quantized(tmp_path / "source", "cpu")
    model.c_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(QuantizationError, match="'c_proj': packed by bitsandbytes"):
        save_quantized_model(model, tmp_path / "saved")


class SharedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = self.first
        self.head = nn.Linear(64, 4)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_layer_under_two_names_is_stored_once_with_all_its_parts(tmp_path, device, mode):
    model = quantized(tmp_path / "source", device, mode, SharedLayer)
    save_quantized_model(model, tmp_path / "saved")
    assert not any(name.startswith("second.") for name in stored(tmp_path / "saved"))
    again = loaded(tmp_path / "saved", device, build=SharedLayer).eval()
    assert again.second is again.first
    assert_same_bits(again.state_dict(), model.state_dict())


def test_layers_that_were_never_quantized_or_have_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    for layer in (bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)):
        with pytest.raises(QuantizationError, match="'0': not quantized yet"):
            save_quantized_model(nn.Sequential(layer), tmp_path / "saved")
    adapted = peft.get_peft_model(quantized(tmp_path / "source", "cpu"), peft.LoraConfig(target_modules=["c_proj"]))
    with pytest.raises(QuantizationError, match="merge_and_unload"):
        save_quantized_model(adapted, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_layers_that_compute_differently_are_refused(tmp_path, device):
    model = quantized(tmp_path / "source", device)
    model.odd.compute_dtype = torch.float32
    with pytest.raises(QuantizationError, match=r"'c_proj', 'odd' have different quantization configs"):
        save_quantized_model(model, tmp_path / "saved")


def test_extra_state_that_is_no_tensor_is_refused(tmp_path, device):
    model = quantized(tmp_path / "source", device)
    type(model.norm).get_extra_state, before = (lambda self: 7), type(model.norm).get_extra_state
    try:
        with pytest.raises(QuantizationError, match=r"'norm\._extra_state': extra state"):
            save_quantized_model(model, tmp_path / "saved")
    finally:
        type(model.norm).get_extra_state = before


def test_compiled_model_is_saved_under_its_own_names(tmp_path, device):
    model = quantized(tmp_path / "source", device)
    save_quantized_model(torch.compile(model), tmp_path / "saved")
    assert_same_bits(stored(tmp_path / "saved"), model.state_dict())


def test_a_torch_dtype_that_is_asked_for_counts(tmp_path, device):
    save_quantized_model(quantized(tmp_path / "source", device, "nf4"), tmp_path / "saved")
    config = BnbQuantizationConfig.from_mode("nf4", torch_dtype="fp32")
    assert loaded(tmp_path / "saved", device, config=config).eval().norm.weight.dtype == torch.float32


def mixed(model, where):
    """What `where` names is computed by the CPU in float32, as beside a GPU."""
    parts = {name: p.dtype for name, p in model.named_parameters() if name.startswith(where) and p.is_floating_point()}
    model.get_submodule(where).float()
    attach(model, {}, entries={"": torch.device("cpu")}).dtypes_on_gpu = parts
    return parts


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_model_that_was_cast_is_saved_in_the_dtype_of_its_other_weights(tmp_path, mode):
    config = BnbQuantizationConfig.from_mode(mode, torch_dtype=torch.bfloat16)
    model = load_and_quantize_model(GPT(), config, device_map="cpu").half()
    save_quantized_model(model, tmp_path)
    plan = plan_device_map(empty(GPT), None, tmp_path, device_map="cpu")
    assert plan.config.load_dtype == torch.float16
    state = load_and_quantize_model(empty(GPT), None, tmp_path, device_map="cpu").state_dict()
    assert_same_bits(state, model.state_dict())


def test_what_the_cpu_computes_in_float32_is_saved_as_a_gpu_would_have_it(tmp_path):
    model = quantized(tmp_path / "source", "cpu", build=GPT, skip_modules=["transformer.h.1", "lm_head"])
    dtypes = mixed(model, "transformer.h.1")
    assert len(dtypes) == 12
    save_quantized_model(model, tmp_path / "saved")
    again = loaded(tmp_path / "saved", "cpu", build=GPT)
    assert {again.get_parameter(name).dtype for name in dtypes} == {torch.bfloat16}
    assert {again.transformer["ln_f"].weight.dtype} == {torch.bfloat16}


@pytest.mark.cuda
def test_model_with_blocks_in_float32_on_the_cpu_is_saved_for_a_gpu(tmp_path):
    torch.manual_seed(0)
    folder = save_checkpoint(GPT(), tmp_path / "source", dtype=torch.float16)
    config = BnbQuantizationConfig(load_in_8bit=True, torch_dtype="fp16", llm_int8_enable_fp32_cpu_offload=True)
    model = loaded(folder, {"": 0, "transformer.h.1": "cpu"}, config, GPT)
    save_quantized_model(model, tmp_path / "saved")
    again = loaded(tmp_path / "saved", 0, None, GPT).eval()
    skipped = BnbQuantizationConfig(load_in_8bit=True, torch_dtype="fp16", skip_modules=["transformer.h.1", "lm_head"])
    expected = loaded(folder, 0, skipped, GPT).eval()
    tokens = torch.arange(12, device="cuda").view(2, 6)
    with torch.no_grad():
        assert torch.equal(again(tokens), expected(tokens))
