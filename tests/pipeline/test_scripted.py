"""Scripted parts of a model are loaded, and stay as they are; the rest is quantized."""

import pytest
import torch
from checkpoints import empty, save_checkpoint
from torch import nn

from bigload import PlacementError, load_and_quantize_model
from bigload.pipeline import assembly


class Net(nn.Module):
    """Holds a part that is scripted or traced."""

    def __init__(self, how=torch.jit.script):
        super().__init__()
        self.enter = nn.Linear(64, 64)
        self.compiled = how(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()).eval())
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.compiled(self.enter(x)))


def traced(part):
    return torch.jit.trace(part, torch.randn(2, 64))


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("how", [torch.jit.script, traced], ids=["scripted", "traced"])
def test_scripted_parts_get_the_checkpoints_weights_and_compute_with_them(how, mode, device, tmp_path):
    model = Net(how).eval()
    nn.init.normal_(model.compiled.state_dict()["1.running_mean"])
    save_checkpoint(model, tmp_path)
    x = torch.randn(3, 64)
    fresh = Net(how).eval()  # other values, on the CPU
    blank = [fresh] if how is traced else [fresh, empty(Net, how)]
    for each in blank:
        loaded = load_and_quantize_model(each, mode, tmp_path, device_map=device).eval()
        assert type(loaded.enter) is not nn.Linear
        assert isinstance(loaded.compiled, torch.jit.ScriptModule)
        for name, value in model.compiled.state_dict().items():
            assert torch.equal(loaded.compiled.state_dict()[name].cpu(), value), name
        with torch.no_grad():
            inner = loaded.enter(x.to(device))
            assert torch.equal(loaded(x.to(device)), loaded.norm(loaded.compiled(inner)))
            expected = model.norm(model.compiled(inner.cpu()))
            assert (loaded(x.to(device)).cpu() - expected).norm() < 1e-5 * expected.norm()


def test_a_load_that_fails_restores_the_scripted_weights(monkeypatch):
    model = Net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = assembly.Assembly.commit

    def fail(root):
        raise KeyboardInterrupt

    monkeypatch.setattr(assembly.Assembly, "commit", lambda self, then: made(self, fail))
    with pytest.raises(KeyboardInterrupt):
        load_and_quantize_model(model, {"load_in_4bit": True, "torch_dtype": "bf16"}, device_map="cpu")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_offloaded_scripted_weights_are_refused_and_the_remedy_works(device, tmp_path, small_parts_stream):
    save_checkpoint(Net(), tmp_path)
    away = {"": device, "enter": "disk", "compiled": "disk"}
    with pytest.raises(PlacementError, match=r"'compiled\.0\.weight'.*scripted module.*by name in device_map"):
        load_and_quantize_model(empty(Net), "nf4", tmp_path, device_map=away, offload_folder=tmp_path / "off")
    kept = away | {"compiled": device}
    model = load_and_quantize_model(
        empty(Net), "nf4", tmp_path, device_map=kept, offload_folder=tmp_path / "off"
    ).eval()
    assert torch.isfinite(model(torch.randn(3, 64, device=device))).all()
