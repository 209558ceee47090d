"""What surrounds a call changes nothing: torch's default device, and the working directory."""

import contextlib
import gc
import os

import pytest
import torch
from checkpoints import PLAIN, empty, save_checkpoint
from models import GPT
from torch import nn

import bigload
from bigload import ConfigError, load_and_quantize_model


def build():
    wide = [nn.Sequential(nn.Linear(1024, 2560), nn.Linear(2560, 1024)) for _ in range(2)]
    return nn.Sequential(nn.ModuleList(wide), nn.Linear(1024, 8))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = build()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@contextlib.contextmanager
def by_setting(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture
def stored(tmp_path):
    torch.manual_seed(0)
    return save_checkpoint(Stack(), tmp_path / "stored", dtype=torch.bfloat16)


@pytest.mark.parametrize("surrounded", [by_setting, torch.device], ids=["set", "context"])
@pytest.mark.parametrize("default", ["meta", "cpu"])
@pytest.mark.parametrize("away", ["resident", "disk"])
def test_every_entry_works_under_another_default_device(stored, tmp_path, device, default, surrounded, away):
    places = {"": device} | ({"layers": "disk"} if away == "disk" else {})
    options = {"device_map": places, "offload_folder": tmp_path / "files"}
    x = torch.randn(2, 1024, device=device, dtype=torch.bfloat16)
    want = bigload.load_and_quantize_model(empty(Stack), "nf4", stored, **options)(x)
    models = [empty(Stack) for _ in range(4)]
    with surrounded(default):
        model = bigload.load_and_quantize_model(models[0], "nf4", stored, **options)
        assert torch.equal(model(x), want)
        plan = bigload.plan_device_map(models[1], "nf4", stored, device_map=places, offload_folder="files")
        assert plan.layers
        bigload.quantize_checkpoint(stored, tmp_path / "converted", "nf4", model=models[2], device=device)
        if away == "disk":
            with model.offload.materialize(model):
                assert not model.layers[0][0].weight.is_meta
            model.offload.remove()
        bigload.save_quantized_model(model, tmp_path / "saved")
        again = bigload.load_and_quantize_model(models[3], None, tmp_path / "saved", device_map=device)
        assert torch.equal(again(x), want)
        plain = bigload.dequantize_model(model)
        bigload.release_buffers()
    assert not any(parameter.is_meta for parameter in plain.parameters())


@pytest.mark.parametrize("config", ["nf4", PLAIN], ids=["quantized", "as stored"])
def test_relative_paths_outlive_a_change_of_the_working_directory(stored, tmp_path, device, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"device_map": {"": device, "layers": "disk"}, "offload_folder": "files"}
    model = bigload.load_and_quantize_model(empty(Stack), config, "stored", **options)
    x = torch.randn(2, 1024, device=device, dtype=torch.bfloat16)
    want = model(x)
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    assert torch.equal(model(x), want)
    assert model.state_dict()
    model.offload.remove()
    assert torch.equal(model(x), want)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "call",
    [
        lambda: bigload.load_and_quantize_model("nf4", "nf4"),
        lambda: bigload.plan_device_map(nn.Linear, "nf4"),
        lambda: bigload.save_quantized_model("model", "folder"),
        lambda: bigload.dequantize_model(3),
    ],
)
def test_what_is_no_model_is_refused_by_name(call):
    with pytest.raises(ConfigError, match=r"model must be an nn\.Module, but it is"):
        call()


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_is_on_again_if_it_was(tmp_path, monkeypatch, was_on, fails):
    """It rests while a load makes tens of thousands of objects."""
    save_checkpoint(GPT(), tmp_path)
    seen = []

    def look(*args):
        seen.append(gc.isenabled())
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", look)
    if not was_on:
        gc.disable()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map="cpu")
        assert gc.isenabled() == was_on
    finally:
        gc.enable()
    assert seen
    assert not any(seen)
