"""Models that bigload loaded, in Fabric: with each precision, with the plugin, and offloaded."""

import copy

import pytest
import torch
from checkpoints import offloaded, save_checkpoint
from lightning_loops import MODES, LitNet, Net, bits, differing, fabric_of, fabric_on, inputs, trainer_of
from models import GPT
from torch import nn
from torch.utils.data import DataLoader

from bigload import (
    BnbQuantizationConfig,
    QuantizationError,
    dequantize_model,
    load_and_quantize_model,
    save_quantized_model,
)
from bigload.lightning import BitsandbytesPrecision
from bigload.quantization.layers import quantized_layers

PRECISIONS = (None, "bf16-true", "bf16-mixed", "16-true")


def loaded(folder, device, mode, dtype=torch.bfloat16, **fields):
    save_checkpoint(Net(), folder)
    config = BnbQuantizationConfig.from_mode(mode, torch_dtype=dtype, **fields)
    return load_and_quantize_model(Net(), config, folder, device_map=device, progress=False)


def of_layers(model):
    """Return the names of what a model saves of its quantized layers' weights."""
    return {name for name in bits(model) for path in quantized_layers(model) if name.startswith(f"{path}.weight")}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", MODES[:-1])
def test_quantized_weights_stay_and_the_rest_is_what_the_precision_says(tmp_path, device, mode, precision):
    model = loaded(tmp_path, device, mode)
    before, modules = bits(model), list(model.modules())
    fabric = fabric_on(device, precision=precision)
    ready = fabric.setup(model)
    changed = set(differing(before, bits(model)))
    assert not changed & of_layers(model)
    assert changed == (set() if precision != "16-true" else set(before) - of_layers(model) - scales(before))
    assert list(model.modules()) == modules
    dtype = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    if precision != "bf16-mixed":  # autocast asks norms in float32 of the model
        assert ready(inputs().to(device, dtype)).isfinite().all()


def scales(names):
    return {name for name in names if name.endswith(("SCB", "weight_format"))}


@pytest.mark.parametrize("mode", MODES[:-1])
def test_autocast_runs_a_model_in_float32(tmp_path, device, mode):
    model = loaded(tmp_path, device, mode, torch.float32)
    before = bits(model)
    fabric = fabric_on(device, precision="bf16-mixed")
    fabric.backward(fabric.setup(model)(inputs().to(device)).square().mean())
    assert model.norm.weight.grad.isfinite().all()
    assert not differing(before, bits(model))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_packed_bytes_stored_as_floats_are_not_cast(tmp_path, device, storage, cast):
    model = loaded(tmp_path, device, "nf4-dq", bnb_4bit_quant_storage=storage)
    x = inputs().to(device, torch.bfloat16)
    before, first = bits(model.up), model.up(x)
    getattr(model, cast)()
    after = bits(model.up)
    assert differing(before, after) in ([], ["bias"])
    assert model.up.weight.dtype == storage
    assert torch.equal(model.up(x), first)


@pytest.mark.cuda
@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_loaded_on_the_cpu_computes_on_the_gpu_and_back(tmp_path, mode, has_run):
    model = loaded(tmp_path, torch.device("cpu"), mode)
    x = inputs().bfloat16()
    if has_run:
        model(x)
    there = model.cuda()(x.cuda())
    here = model.cpu()(x)
    assert torch.allclose(there.cpu(), here, atol=0.05)  # other kernels
    assert torch.equal(model.cuda()(x.cuda()), there)


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("mode", ["int8", "int8-training"])
def test_what_the_kernels_of_int8_are_given_moves_with_the_weight(tmp_path, mode, has_run):
    model = loaded(tmp_path, torch.device("cpu"), mode)
    x, unused = inputs().bfloat16(), copy.deepcopy(model)
    expected = model(x)
    model = model if has_run else unused
    holder = model.up.state if has_run else model.up.weight
    holder.CB = torch.empty(model.up.weight.shape, dtype=torch.int8, device="meta")  # as on the device before
    model.to(torch.device("cpu"))
    assert torch.equal(model(x), expected)


@pytest.mark.cuda
def test_packed_bytes_stored_as_floats_move_and_compute(tmp_path):
    model = loaded(tmp_path, torch.device("cpu"), "nf4", bnb_4bit_quant_storage=torch.bfloat16)
    before = bits(model)
    model.cuda()
    assert model.up.weight.dtype == torch.bfloat16
    assert model(inputs().cuda().bfloat16()).isfinite().all()
    model.to("cpu", torch.float16)
    assert set(differing(before, bits(model))).isdisjoint(of_layers(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "int8", "int8-training"])
def test_the_plugin_leaves_it_and_takes_its_dtype(tmp_path, device, mode, dtype):
    model = loaded(tmp_path, device, mode, dtype)
    before, expected = bits(model), model(inputs().to(device, dtype)).float()
    plugin = BitsandbytesPrecision("fp4-dq")
    ready = fabric_on(device, plugin).setup(model)
    assert differing(before, bits(model)) == []
    assert type(model.head) is nn.Linear  # which a load does not quantize by default
    assert plugin.dtype == dtype
    assert torch.equal(ready(inputs().to(device)), expected)


def test_another_dtype_that_was_asked_for_is_said(tmp_path, warned):
    model = loaded(tmp_path, "cpu", "nf4", torch.float16)
    fabric_of(torch.device("cpu"), "nf4", dtype=torch.bfloat16).setup(model)
    assert warned() == [
        "the model was loaded in torch.float16, but the plugin casts its inputs to torch.bfloat16",
    ]


def test_one_loaded_without_quantizing_is_left_with_a_word(tmp_path, warned):
    model = loaded(tmp_path, "cpu", "nf4", skip_modules=["*"])
    before = bits(model)
    fabric_of(torch.device("cpu"), "nf4").setup(model)
    assert differing(before, bits(model)) == []
    assert warned() == ["the model was loaded by bigload without quantizing any layer, and is left as it is"]


def test_trainer_runs_an_offloaded_model_and_leaves_it_in_place(tmp_path, device, small_parts_stream):
    (tmp_path / "cache").mkdir()
    save_checkpoint(GPT().bfloat16(), tmp_path / "gpt")
    lit = LitNet(late=True)
    lit.net = offloaded(GPT, tmp_path / "gpt", device, ["transformer.h.0"], tmp_path / "cache")
    tokens = torch.arange(24).view(2, 12)
    trainer = trainer_of(device, "nf4", tmp_path)
    (predicted,) = trainer.predict(lit, DataLoader(tokens, batch_size=2))
    with torch.no_grad():
        assert torch.equal(predicted.to(device), lit.net(tokens.to(device)))
    assert lit.net.offload.stats().fetches
    assert "cpu" not in vars(lit)  # whatever Trainer did not move may be moved by hand again
    trainer.fit(lit, DataLoader(tokens, batch_size=2))
    lit.net.offload.remove()


@pytest.mark.parametrize("precision", [None, "bf16-true", "plugin"])
def test_an_offloaded_model_stays_offloaded(tmp_path, device, small_parts_stream, precision):
    (tmp_path / "cache").mkdir()
    save_checkpoint(GPT().bfloat16(), tmp_path / "gpt")
    away = ["transformer.h.0", "transformer.h.1"]
    model = offloaded(GPT, tmp_path / "gpt", device, away, tmp_path / "cache")
    tokens = torch.arange(12, device=device).view(1, 12)
    with torch.no_grad():
        expected = model(tokens)
    fabric = fabric_of(device, "nf4") if precision == "plugin" else fabric_on(device, precision=precision)
    ready = fabric.setup(model)
    with torch.no_grad():
        assert torch.equal(ready(tokens), expected.float() if precision else expected)
    assert model.offload.stats().fetches
    model.offload.remove()


@pytest.mark.parametrize("mode", MODES)
def test_layers_without_values_are_neither_saved_nor_dequantized(tmp_path, device, mode):
    """They hold zeros, which another process would take for weights."""
    fabric = fabric_of(device, mode)
    with fabric.init_module(empty_init=True):
        net = Net()
    fabric.setup(net)
    for act in (dequantize_model, lambda model: save_quantized_model(model, tmp_path / "saved")):
        with pytest.raises(QuantizationError, match=r"'up', .*'down'.*: built empty, and never loaded; load a"):
            act(net)
    net.load_state_dict(Net().state_dict())
    save_quantized_model(net, tmp_path / "saved")
    assert dequantize_model(net)(inputs().to(device, next(net.parameters()).dtype)).isfinite().all()
