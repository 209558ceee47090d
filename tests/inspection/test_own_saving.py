"""Hooks and methods that change what is saved of quantized weights: saved so that it loads, or refused before."""

import pytest
import torch
from checkpoints import empty
from torch import nn

from bigload import QuantizationError, load_and_quantize_model, save_quantized_model


class Tower(nn.Module):
    """Its layers have other names in its state_dict."""

    def __init__(self):
        super().__init__()
        self.proj, self.out, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.out(self.proj(x)))


class Net(nn.Module):
    def __init__(self, tower=Tower):
        super().__init__()
        self.tower, self.head = tower(), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.tower(x))


def renames(module, state, prefix, metadata):
    for key in [key for key in state if key.startswith(f"{prefix}proj.")]:
        state[key.replace("proj.", "project.")] = state.pop(key)


def renames_the_weight_alone(module, state, prefix, metadata):
    state[f"{prefix}project.weight"] = state.pop(f"{prefix}proj.weight")


def drops(module, state, prefix, metadata):
    del state[f"{prefix}proj.weight"]


def halves(module, state, prefix, metadata):
    for key in [key for key in state if key.startswith(f"{prefix}proj.")]:
        state[key] = state[key].half()


def scales(module, state, prefix, metadata):
    state[f"{prefix}proj.weight"] = state[f"{prefix}proj.weight"] * 2


class Hooked(Tower):
    hook = staticmethod(renames)

    def __init__(self):
        super().__init__()
        self.handle = self.register_state_dict_post_hook(type(self).hook)


HOOKS = [renames, renames_the_weight_alone, drops, halves, scales]


def loaded(build, device, config="nf4"):
    torch.manual_seed(0)
    return load_and_quantize_model(Net(build), config, device_map=device).eval()


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_a_hook_that_changes_quantized_weights_is_refused_and_the_remedy_works(hook, mode, device, tmp_path):
    build = type("Changed", (Hooked,), {"hook": staticmethod(hook)})
    model = loaded(build, device, mode)
    expected = r"'tower\.proj': quantized.*" + hook.__name__ + r"' of 'tower'.*Remove such hooks"
    with pytest.raises(QuantizationError, match=expected):
        save_quantized_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    x = torch.randn(3, 64, device=device)
    model.tower.handle.remove()
    save_quantized_model(model, tmp_path / "without")
    again = load_and_quantize_model(empty(Net), None, tmp_path / "without", device_map=device).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


class Restored(Hooked):
    """Takes its own names back."""

    def __init__(self):
        super().__init__()
        self._register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(state, prefix, *rest):
        for key in [key for key in state if key.startswith(f"{prefix}project.")]:
            state[key.replace("project.", "proj.")] = state.pop(key)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_names_that_the_model_takes_back_are_saved_and_loaded(mode, device, tmp_path):
    model = loaded(Restored, device, mode)
    save_quantized_model(model, tmp_path)
    again = load_and_quantize_model(empty(Net, Restored), None, tmp_path, device_map=device).eval()
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


class Halfway(Restored):
    hook = staticmethod(renames_the_weight_alone)


def test_names_of_the_packed_values_alone_are_refused_even_if_taken_back(device, tmp_path):
    with pytest.raises(QuantizationError, match="renames_the_weight_alone"):
        save_quantized_model(loaded(Halfway, device), tmp_path / "saved")


class Overriding(Tower):
    def state_dict(self, *args, **kwargs):
        return super().state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}extra"] = torch.zeros(1)


class Dropping(Net):
    def state_dict(self, *args, **kwargs):
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "absmax" not in key}


def test_methods_count_where_they_change_quantized_weights(device, tmp_path):
    save_quantized_model(loaded(Overriding, device), tmp_path / "saved")
    model = load_and_quantize_model(Dropping(), "nf4", device_map=device)
    with pytest.raises(QuantizationError, match=r"'tower\.proj', 'tower\.out'.*Dropping\.state_dict' of the model"):
        save_quantized_model(model, tmp_path / "dropped")
    assert not (tmp_path / "dropped").exists()


def test_hooks_of_offloaded_models_are_no_change(device, tmp_path, small_parts_stream):
    torch.manual_seed(0)
    away = {"": device, "tower": "disk" if device.type == "cpu" else "cpu"}
    model = load_and_quantize_model(Net(), "nf4", device_map=away, offload_folder=tmp_path / "off").eval()
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(empty(Net), None, tmp_path / "saved", device_map=device).eval()
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
