"""`BitsandbytesPrecision` in Trainer: fits, evaluates, saves and resumes."""

import lightning.pytorch as pl
import pytest
import torch
from lightning_loops import MODES, LitNet, Net, batches, bits, differing, fabric_of, inputs, trainer_of
from torch import nn

from bigload import QuantizationError
from bigload.lightning import BitsandbytesPrecision

HEAD = {"net.head"}


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.mark.parametrize("late", [False, True], ids=["built before", "configure_model"])
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_fits_evaluates_and_predicts(tmp_path, device, mode, late):
    model, trainer = LitNet(late), trainer_of(device, mode, tmp_path, ignore_modules=HEAD, epochs=2)
    before = {} if late else {name: id(parameter) for name, parameter in model.named_parameters()}
    trainer.fit(model, batches())
    assert model.called == ["before backward", "before step"] * 4
    assert (type(model.net.up) is nn.Linear, type(model.net.head) is nn.Linear) == (False, True)
    if mode == "int8-training" and not late:
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    (validated,) = trainer.validate(model, batches(), verbose=False)
    (tested,) = trainer.test(model, batches(), verbose=False)
    assert validated["loss"] == tested["loss"] < 1
    predicted = torch.cat(trainer.predict(model, batches()))
    assert predicted.shape == (8, 8)
    assert predicted.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_it_trains_what_fabric_trains(tmp_path, device, mode):
    lit, net = LitNet(), Net()
    net.load_state_dict(lit.net.state_dict())
    trainer_of(device, mode, tmp_path).fit(lit, batches())
    fabric = fabric_of(device, mode)
    if device.type == "cuda":  # where Trainer quantizes, since it tells where the model will be
        net.cuda()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in batches():
        optimizer.zero_grad()
        fabric.backward(model(batch.to(device)).square().mean())
        optimizer.step()
    for (name, mine), other in zip(lit.net.named_parameters(), net.parameters(), strict=True):
        if mine.requires_grad:
            assert torch.allclose(mine.float().cpu(), other.float().cpu(), atol=2e-3), name


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_is_resumed_and_evaluated(tmp_path, device, mode):
    model, trainer = LitNet(), trainer_of(device, mode, tmp_path, ignore_modules=HEAD)
    trainer.fit(model, batches())
    file = tmp_path / "model.ckpt"
    trainer.save_checkpoint(file)
    expected = torch.cat(trainer.predict(model, batches()))
    again = trainer_of(device, mode, tmp_path, ignore_modules=HEAD, epochs=2)
    resumed = LitNet(late=True)
    found = torch.cat(again.predict(resumed, batches(), ckpt_path=file))
    assert torch.equal(found, expected)
    assert differing(bits(resumed), bits(model)) == []
    again.fit(resumed, batches(), ckpt_path=file)
    assert (again.current_epoch, again.global_step) == (2, 4)
    assert resumed.called == ["before backward", "before step"] * 2  # one epoch of the two was done


def test_a_fitted_model_takes_its_checkpoint_and_a_plain_one(tmp_path):
    plain = LitNet()
    model, trainer = LitNet(), trainer_of(torch.device("cpu"), "nf4-dq", tmp_path)
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    expected = bits(model)
    model.load_state_dict(plain.state_dict())
    assert differing(expected, bits(model))
    model.load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=False)["state_dict"])
    assert differing(expected, bits(model)) == []


def test_a_module_is_loaded_from_its_checkpoint_in_the_context_of_the_plugin(tmp_path):
    model, trainer = LitNet(), trainer_of(torch.device("cpu"), "nf4", tmp_path)
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    plugin = BitsandbytesPrecision("nf4")
    with plugin.module_init_context():
        again = LitNet.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    plugin.convert_module(again)
    assert differing(bits(again), bits(model)) == []


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_and_accumulated(tmp_path, device, algorithm):
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    trainer = trainer_of(device, "int8-training", tmp_path, accumulate_grad_batches=2, **options)
    model = LitNet()
    trainer.fit(model, batches())
    assert model.called == ["before backward", "before backward", "before step"]
    assert 0 < model.net.norm.bias.abs().max() <= 0.1 * 0.01 * 1.001  # it was 0; the learning rate, and the limit


def test_init_module_of_trainer_makes_a_model_that_is_quantized(tmp_path, device):
    trainer = trainer_of(device, "nf4", tmp_path)
    with trainer.init_module():
        model = LitNet()
    assert (model.net.up.weight.dtype, model.net.up.weight.device.type) == (torch.bfloat16, device.type)
    trainer.predict(model, batches())
    assert model.net.up.weight.dtype == torch.uint8


def test_lightnings_class_is_refused_off_cuda():
    with pytest.raises(RuntimeError, match="only supported on CUDA"):
        pl.Trainer(accelerator="cpu", plugins=pl.plugins.BitsandbytesPrecision("nf4"), logger=False)
    trainer = pl.Trainer(accelerator="cpu", plugins=BitsandbytesPrecision("nf4"), logger=False)
    assert isinstance(trainer.precision_plugin, BitsandbytesPrecision)


def test_outputs_of_a_step_are_those_of_the_model(tmp_path):
    model = LitNet()
    (first, second) = trainer_of(torch.device("cpu"), "int8", tmp_path).predict(model, batches())
    with torch.no_grad():
        expected = model.net.half()(inputs().half()[:4])
    assert torch.allclose(first.half(), expected, atol=1e-2)
    assert first.shape == second.shape


def test_what_was_read_quantized_is_saved_and_refuses_to_compute_before_it_is_converted(tmp_path, device):
    model, trainer = LitNet(), trainer_of(device, "nf4", tmp_path)
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    plugin = BitsandbytesPrecision("nf4")
    with plugin.module_init_context():
        again = LitNet.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu", weights_only=True)
    expected = {name: value.cpu() for name, value in model.state_dict().items()}
    held = again.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name].cpu(), value) for name, value in expected.items())
    x = inputs().to(plugin.dtype)
    with pytest.raises(QuantizationError, match=r"loaded quantized.*not converted.*convert_module\(model\), which"):
        again.net(x)
    assert plugin.convert_module(again) is again
    assert torch.equal(again.net(x), model.cpu().net(x))
    assert not any(module._forward_pre_hooks for module in again.modules())
    assert again.state_dict().keys() == expected.keys()


def test_plain_values_that_are_loaded_after_quantized_ones_are_those_that_count(tmp_path):
    fabric = fabric_of(torch.device("cpu"), "nf4")
    first, plain = fabric.setup(Net()), Net().state_dict()
    with fabric.init_module():
        net = Net()
    net.load_state_dict(first.state_dict())
    net.load_state_dict(plain)
    net.up(inputs().to(net.up.weight.dtype))
    expected = Net()
    expected.load_state_dict({name: value.bfloat16() for name, value in plain.items()})
    assert differing(bits(fabric.setup(net).module), bits(fabric.setup(expected).module)) == []
