"""What modules' own loading sets on them comes back after the model is saved and loaded again, or is not saved."""

import json

import pytest
import torch
from checkpoints import empty
from torch import nn

from bigload import (
    CheckpointError,
    QuantizationError,
    load_and_quantize_model,
    quantize_checkpoint,
    save_quantized_model,
)


class Kind(nn.Module):
    """Loading says what kind of checkpoint it was, and forward depends on it."""

    def __init__(self):
        super().__init__()
        self.scale, self.kind, self.seen = nn.Parameter(torch.ones(64)), "none", []

    def said(self, flag):
        return None if flag is None else int(flag.numel())

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.kind = self.said(state_dict.pop(f"{prefix}flag", None))
        self.seen.append(self.kind)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x):
        return x * self.scale * (self.kind or 1)


class Computed(Kind):
    """Its own loading does not run again on what is saved, since that holds other names."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict[f"{prefix}scale"] = state_dict.pop(f"{prefix}log_scale").exp()
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ByHook(Kind):
    _load_from_state_dict = nn.Module._load_from_state_dict

    def __init__(self):
        super().__init__()
        self._register_load_state_dict_pre_hook(self._note)

    def _note(self, state_dict, prefix, *rest):
        self.kind = self.said(state_dict.pop(f"{prefix}flag", None))
        self.seen.append(self.kind)


class Half(Kind):
    """Nothing sets the attributes but set_extra_state, and nothing saves it."""

    _load_from_state_dict = nn.Module._load_from_state_dict

    def set_extra_state(self, state):
        self.kind = int(state.sum())
        self.seen = [self.kind]


def build(part):
    return lambda: nn.Sequential(nn.Linear(64, 64), part(), nn.Linear(64, 8))


def stored(part, folder):
    torch.manual_seed(0)
    state = dict(build(part)().state_dict()) | {"1.scale": torch.rand(64) + 1}
    if part is Computed:
        state["1.log_scale"] = state.pop("1.scale").log()
    state |= {"1._extra_state" if part is Half else "1.flag": torch.ones(3)}
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    expected = build(part)()
    expected.load_state_dict({key: value.clone() for key, value in state.items()}, strict=part is not Half)
    return folder, expected


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("part", [Kind, Computed, ByHook, Half])
def test_they_come_back_after_saving(part, mode, device, tmp_path):
    folder, expected = stored(part, tmp_path / "source")
    assert (expected[1].kind, expected[1].seen) == (3, [3])
    first = load_and_quantize_model(empty(build(part)), mode, folder, device_map=device).eval()
    assert (first[1].kind, first[1].seen) == (3, [3])  # once, though the rule is followed before it is carried out
    x = torch.randn(3, 64, device=device)
    model = first
    for again in range(2):
        save_quantized_model(model, tmp_path / f"saved{again}")
        assert (model[1].kind, model[1].seen) == (3, [3])
        model = load_and_quantize_model(empty(build(part)), None, tmp_path / f"saved{again}", device_map=device).eval()
        assert (model[1].kind, model[1].seen) == (3, [3])
        with torch.no_grad():
            assert torch.equal(model(x), first(x))


@pytest.mark.parametrize("part", [Kind, Computed, ByHook])
def test_they_come_back_from_a_converted_checkpoint(part, device, tmp_path):
    folder, _ = stored(part, tmp_path / "source")
    first = load_and_quantize_model(empty(build(part)), "nf4", folder, device_map=device).eval()
    quantize_checkpoint(folder, tmp_path / "quantized", "nf4", model=empty(build(part)), device="cpu")
    again = load_and_quantize_model(empty(build(part)), None, tmp_path / "quantized", device_map=device).eval()
    assert (again[1].kind, again[1].seen) == (3, [3])
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        assert torch.equal(again(x), first(x))


def test_a_model_that_was_quantized_in_place_keeps_them_too(device, tmp_path):
    _, model = stored(Kind, tmp_path / "source")
    loaded = load_and_quantize_model(model, "nf4", device_map=device)
    save_quantized_model(loaded, tmp_path / "saved")
    again = load_and_quantize_model(empty(build(Kind)), None, tmp_path / "saved", device_map=device)
    assert (again[1].kind, again[1].seen) == (3, [3])


class Typed(Kind):
    """Keeps what JSON does not hold."""

    def said(self, flag):
        return None if flag is None else flag.dtype

    def forward(self, x):
        return x * self.scale


class Kept(Typed):
    """The remedy: extra state."""

    def get_extra_state(self):
        return torch.tensor([self.kind == torch.float32])

    def set_extra_state(self, state):
        self.kind = torch.float32 if state else None
        self.seen = [self.kind]


class Constant(Kind):
    """Sets what JSON does not hold, but the same each time."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict.pop(f"{prefix}flag", None)
        self.kind = torch.float32
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)


def test_what_would_be_lost_is_not_saved_and_the_remedy_works(device, tmp_path):
    folder, _ = stored(Typed, tmp_path / "source")
    model = load_and_quantize_model(empty(build(Typed)), "nf4", folder, device_map=device)
    assert model[1].kind == torch.float32
    with pytest.raises(QuantizationError, match=r"'1\.kind'.*get_extra_state"):
        save_quantized_model(model, tmp_path / "saved")
    with pytest.raises(QuantizationError, match=r"'1\.kind'.*get_extra_state"):
        quantize_checkpoint(folder, tmp_path / "saved", "nf4", model=empty(build(Typed)), device="cpu")
    assert not (tmp_path / "saved").exists()
    model[1].__class__ = Kept
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(empty(build(Kept)), None, tmp_path / "saved", device_map=device)
    assert again[1].kind == torch.float32


def test_what_loading_sets_again_by_itself_may_be_of_any_type(device, tmp_path):
    folder, _ = stored(Constant, tmp_path / "source")
    model = load_and_quantize_model(empty(build(Constant)), "nf4", folder, device_map=device)
    save_quantized_model(model, tmp_path / "saved")
    assert load_and_quantize_model(empty(build(Constant)), None, tmp_path / "saved", device_map=device)[1].kind == (
        torch.float32
    )


def test_a_damaged_record_of_attributes_is_refused(tmp_path):
    folder, _ = stored(Kind, tmp_path / "source")
    save_quantized_model(load_and_quantize_model(build(Kind)(), "nf4", folder, device_map="cpu"), tmp_path / "saved")
    path = tmp_path / "saved" / "bigload.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attributes": {"1": [3]}}))
    with pytest.raises(CheckpointError, match="not a dict of attributes"):
        load_and_quantize_model(build(Kind)(), None, tmp_path / "saved", device_map="cpu")
