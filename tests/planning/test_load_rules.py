"""What modules say about their own loading is followed; load_state_dict is the oracle."""

import logging

import pytest
import torch
from checkpoints import PLAIN, empty, save
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from bigload import CheckpointError, load_and_quantize_model, quantize_checkpoint, save_quantized_model

FP32 = PLAIN | {"torch_dtype": "fp32"}


class Clock(nn.Module):
    """Counts in its extra state, a tensor."""

    def __init__(self):
        super().__init__()
        self.ticks = 0

    def get_extra_state(self):
        return torch.tensor([self.ticks])

    def set_extra_state(self, state):
        self.ticks = int(state[0])

    def forward(self, x):
        return x + self.ticks


class Named(Clock):
    """Its extra state is a dict, which only pickles hold."""

    def get_extra_state(self):
        return {"ticks": self.ticks}

    def set_extra_state(self, state):
        self.ticks = state["ticks"]


class Logarithms(nn.Module):
    """Stores the logarithm of its scale, and computes with what it was."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(64) + 1)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict[f"{prefix}scale"] = state_dict.pop(f"{prefix}log_scale").exp()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x):
        return x * self.scale


class Copies(nn.Module):
    """Does not call nn.Module's method: half of its table is copied, half computed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(64))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        values = state_dict[f"{prefix}table"]
        self.table.copy_(torch.cat([values[:32], values[32:] * 3]))

    def forward(self, x):
        return x * self.table


class Versioned(nn.Linear):
    """Before version 2, its weight was stored transposed."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].T
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Renamer(nn.Module):
    """Its hook, a method, renames a child's keys; another drops a key."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 64)
        self._register_load_state_dict_pre_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._drop)

    def _rename(self, state_dict, prefix, *rest):
        for key in [key for key in state_dict if key.startswith(f"{prefix}trunk.")]:
            state_dict[key.replace("trunk.", "body.")] = state_dict.pop(key)

    @staticmethod
    def _drop(module, state_dict, prefix, *rest):
        state_dict.pop(f"{prefix}unused", None)

    def forward(self, x):
        return self.body(x)


def norms():
    return nn.Sequential(nn.Unflatten(1, (8, 8)), nn.BatchNorm1d(8), nn.Flatten(1))


def convolution(norm):
    return nn.Sequential(nn.Unflatten(1, (4, 16)), norm(nn.Conv1d(4, 4, 1)), nn.Flatten(1))


old_norm, new_norm = nn.utils.weight_norm, nn.utils.parametrizations.weight_norm


def build(part):
    return lambda: nn.Sequential(nn.Linear(64, 64), part(), nn.Linear(64, 8))


CASES = {
    "extra state": (Clock, lambda state: state | {"1._extra_state": torch.tensor([5])}),
    "extra state that is no tensor": (Named, lambda state: state | {"1._extra_state": {"ticks": 4}}),
    "a computed value": (
        Logarithms,
        lambda state: {k.replace("scale", "log_scale"): v.log() if "scale" in k else v for k, v in state.items()},
    ),
    "a method that copies by itself": (Copies, lambda state: state | {"1.table": torch.rand(64)}),
    "another layout without a version": (lambda: Versioned(64, 64), dict),
    "a child's keys": (
        Renamer,
        lambda state: {k.replace("body", "trunk"): v for k, v in state.items()} | {"1.unused": torch.ones(2)},
    ),
    "weight_norm's old names": (
        lambda: convolution(new_norm),
        lambda state: {
            k.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): v
            for k, v in state.items()
        },
    ),
    "weight_norm's new names": (lambda: convolution(new_norm), dict),
    "the old weight_norm": (lambda: convolution(old_norm), dict),
    "a norm from before it counted": (
        norms,
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    ),
}


def stored_and_wanted(case, folder):
    """Write a checkpoint, and return its path, how the model is built, and the model as load_state_dict loads it."""
    part, change = CASES[case]
    torch.manual_seed(0)
    state = change(dict(build(part)().state_dict()))
    folder.mkdir(exist_ok=True)
    if any(not isinstance(value, torch.Tensor) for value in state.values()):
        path = folder / "model.bin"
        torch.save(state, path)
    else:
        path = save(state, folder)
    wanted = build(part)()
    wanted.load_state_dict(state)
    return path, build(part), wanted.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_load_is_that_of_load_state_dict(tmp_path, case, device):
    path, make, wanted = stored_and_wanted(case, tmp_path / "stored")
    model = load_and_quantize_model(empty(make), FP32, path, device_map=device, strict=True).eval()
    x = torch.randn(3, 64)
    assert torch.equal(model.cpu()(x), wanted(x))
    for name, value in wanted.state_dict().items():
        mine = model.state_dict()[name]
        assert mine.equal(value) if isinstance(value, torch.Tensor) else mine == value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_quantized_layers_beside_them_and_saved_again(tmp_path, case, device):
    path, make, wanted = stored_and_wanted(case, tmp_path / "stored")
    reference = load_and_quantize_model(wanted, "nf4", device_map=device).eval()
    model = load_and_quantize_model(empty(make), "nf4", path, device_map=device).eval()
    x = torch.randn(3, 64, device=device)
    assert type(model[0]).__name__ == "Linear4bit"
    assert torch.equal(model(x), reference(x))
    if isinstance(model[1], Named):
        with pytest.raises(Exception, match="let get_extra_state return a tensor"):
            save_quantized_model(model, tmp_path / "saved")
        with pytest.raises(CheckpointError, match="load the model with load_and_quantize_model"):
            quantize_checkpoint(path, tmp_path / "converted", "nf4", model=empty(make), device=device)
        return
    save_quantized_model(model, tmp_path / "saved")
    quantize_checkpoint(path, tmp_path / "converted", "nf4", model=empty(make), device=device)
    for folder in ("saved", "converted"):
        again = load_and_quantize_model(empty(make), None, tmp_path / folder, device_map=device, strict=True).eval()
        assert torch.equal(again(x), reference(x)), folder


def test_the_version_of_a_pickled_state_dict_is_told(tmp_path):
    model = build(lambda: Versioned(64, 64))()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    made = load_and_quantize_model(empty(build(lambda: Versioned(64, 64))), FP32, tmp_path / "model.pt")
    assert torch.equal(made[1].weight.cpu(), model[1].weight)


@pytest.mark.parametrize("part", [Renamer, lambda: Versioned(64, 64)])
def test_offloaded_tensors_follow_their_rules(tmp_path, part, device):
    wide = lambda: nn.Sequential(part(), nn.Linear(64, 8))  # noqa: E731
    state = {k.replace("body", "trunk"): v for k, v in wide().state_dict().items()}
    save(state, tmp_path / "stored")
    wanted = wide()
    wanted.load_state_dict(state)
    for _ in range(2):  # the second load finds the files of the first
        model = load_and_quantize_model(
            empty(wide),
            FP32,
            tmp_path / "stored",
            device_map={"0": "disk", "1": device},
            offload_folder=tmp_path / "files",
        )
        x = torch.randn(2, 64)
        assert torch.allclose(model(x.to(device)).cpu(), wanted(x), atol=1e-6)


def test_files_of_a_computed_weight_follow_the_code(tmp_path, monkeypatch):
    class Scaled(nn.Linear):
        factor = 2.0

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * type(self).factor
            super()._load_from_state_dict(state_dict, prefix, *rest)

    def make():
        return nn.Sequential(Scaled(1024, 1024), nn.Linear(1024, 8))

    save({name: torch.ones_like(value) for name, value in make().state_dict().items()}, tmp_path / "stored")

    def load():
        model = load_and_quantize_model(
            empty(make), FP32, tmp_path / "stored", device_map="disk", offload_folder=tmp_path / "files"
        )
        return model.state_dict()["0.weight"].unique().item()

    assert load() == 2
    monkeypatch.setattr(Scaled, "factor", 5.0)
    assert load() == 5


class Peeks(nn.Linear):
    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if state_dict[f"{prefix}weight"].max() > 0:
            super()._load_from_state_dict(state_dict, prefix, *rest)


def test_what_cannot_be_followed_is_refused_with_a_remedy_that_works(tmp_path):
    make = build(lambda: Peeks(64, 64))
    saved = make().state_dict()
    folder, model = save(saved, tmp_path), empty(make)
    with pytest.raises(CheckpointError, match=r"'1', a Peeks, is loaded by Peeks\._load_from_state_dict") as caught:
        load_and_quantize_model(model, "nf4", folder)
    assert "Load the model with load_state_dict, then pass it without weights_location" in str(caught.value)
    assert all(parameter.is_meta for parameter in model.parameters())
    whole = make()
    whole.load_state_dict(saved)
    assert torch.equal(load_and_quantize_model(whole, FP32)[1].weight.cpu(), saved["1.weight"])


class Hooked(nn.Linear):
    """Runs something after it is loaded."""

    def __init__(self, *sizes, then):
        super().__init__(*sizes)
        self.register_load_state_dict_post_hook(then)


def test_a_hook_after_the_load_may_set_attributes_and_allow_missing_keys(tmp_path, logged):
    def then(module, keys):
        module.ready = True
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith("bias")]

    def make():
        return build(lambda: Hooked(64, 64, then=then))()

    state = make().state_dict()
    state.pop("1.bias")
    model = empty(make)
    model[1].bias = nn.Parameter(torch.full((64,), 3.0))
    with logged.at_level(logging.WARNING):
        model = load_and_quantize_model(model, FP32, save(state, tmp_path), device_map="cpu")
    assert model[1].ready
    assert model[1].bias.unique().tolist() == [3]
    assert "not found in" not in logged.text


def test_a_hook_after_the_load_that_uses_weights_is_refused(tmp_path):
    def then(module, keys):
        with torch.no_grad():
            module.weight.mul_(2)

    def make():
        return build(lambda: Hooked(64, 64, then=then))()

    with pytest.raises(CheckpointError, match=r"'1', a Hooked, is loaded by the hook .*then.*calls mul_"):
        load_and_quantize_model(empty(make), "nf4", save(make().state_dict(), tmp_path))


class Rule(nn.Linear):
    """Loads as nn.Linear does, after what a case lets it do first."""

    first = staticmethod(lambda module, state, key, errors: None)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        self.first(self, state_dict, f"{prefix}weight", errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def fail(*_):
    raise KeyError("no such weight")


RULES = {
    "a new buffer": (
        lambda m, s, k, e: m.register_buffer("seen", torch.ones(2)),
        "it adds or removes parameters",
    ),
    "a tensor in an attribute": (lambda m, s, k, e: setattr(m, "kept", [s[k]]), "it keeps tensors in kept"),
    "what it held": (lambda m, s, k, e: s.update({k: s[k] + m.weight}), "values that the module had before"),
    "an error": (fail, "KeyError: 'no such weight'"),
    "an error that is listed": (lambda m, s, k, e: e.append("too old"), "'1', a Rule, does not load this: too old"),
}


@pytest.mark.parametrize("case", RULES)
def test_a_rule_that_does_what_no_plan_can_is_refused(tmp_path, monkeypatch, case):
    make = build(lambda: Rule(64, 64))
    folder, model = save(make().state_dict(), tmp_path), empty(make)
    first, message = RULES[case]
    monkeypatch.setattr(Rule, "first", staticmethod(first))
    with pytest.raises(CheckpointError, match=message):
        load_and_quantize_model(model, "nf4", folder, device_map="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    monkeypatch.undo()
    load_and_quantize_model(model, "nf4", folder, device_map="cpu", strict=True)


OWN_LOADS = {
    "twice": (lambda load, state: (load(state), load(state)), "does not call nn.Module's load_state_dict once"),
    "never": (lambda load, state: None, "does not call nn.Module's load_state_dict once"),
    "new values": (lambda load, state: load(state | {"0.bias": torch.ones(64)}), "it makes new values"),
    "an error": (lambda load, state: fail(), "KeyError: 'no such weight'"),
}


@pytest.mark.parametrize("case", OWN_LOADS)
def test_a_model_whose_load_state_dict_does_what_no_plan_can_is_refused(tmp_path, case):
    how, message = OWN_LOADS[case]

    class Model(nn.Sequential):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            return how(super().load_state_dict, state_dict)

    def make():
        return Model(nn.Linear(64, 64), nn.Linear(64, 8))

    model = empty(make)
    with pytest.raises(CheckpointError, match=message):
        load_and_quantize_model(model, "nf4", save(make().state_dict(), tmp_path), device_map="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


HOOKS = {
    "an answer": (lambda module, keys: keys, "TypeError: a hook after load_state_dict must return None"),
    "a new buffer": (
        lambda module, keys: module.register_buffer("seen", torch.ones(2)),
        "it changes which parameters",
    ),
    "an exchanged weight": (lambda module, keys: setattr(module, "bias", None), "it changes which parameters"),
}


@pytest.mark.parametrize("case", HOOKS)
def test_a_hook_after_the_load_that_does_what_no_plan_can_is_refused(tmp_path, case):
    then, message = HOOKS[case]

    def make():
        return build(lambda: Hooked(64, 64, then=then))()

    with pytest.raises(CheckpointError, match=message):
        load_and_quantize_model(empty(make), "nf4", save(make().state_dict(), tmp_path), device_map="cpu")


def test_extra_state_that_the_checkpoint_lacks_is_said(tmp_path, logged):
    state = {name: value for name, value in build(Clock)().state_dict().items() if "extra" not in name}
    with logged.at_level(logging.WARNING):
        load_and_quantize_model(empty(build(Clock)), "nf4", save(state, tmp_path))
    assert "'1._extra_state': extra state that the checkpoint lacks" in logged.text


def test_a_failing_set_extra_state_leaves_the_model_as_it_was(tmp_path):
    class Fails(Clock):
        def set_extra_state(self, state):
            self.broken = 1
            raise ValueError("no such clock")

    state = build(Clock)().state_dict()
    model = empty(build(Fails))
    with pytest.raises(CheckpointError, match=r"'1', a Fails, .*set_extra_state raised ValueError: no such clock"):
        load_and_quantize_model(model, "nf4", save(state, tmp_path))
    assert not hasattr(model[1], "broken")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_norms_and_attention_of_torch_load_as_ever(tmp_path):
    def make():
        return nn.ModuleDict(
            {
                "norm": nn.BatchNorm2d(4),
                "instance": nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
                "attention": nn.MultiheadAttention(16, 2),
                "lstm": nn.LSTM(8, 8),
                "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            }
        )

    state = make().state_dict()
    model = load_and_quantize_model(empty(make), FP32, save(state, tmp_path), device_map="cpu", strict=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_frozen_norms_of_detr_and_old_names_of_mamba(tmp_path):
    from transformers import MambaConfig, MambaModel
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    def norm():
        return nn.Sequential(DetrFrozenBatchNorm2d(4), nn.Linear(4, 4))

    state = norm().state_dict() | {"0.num_batches_tracked": torch.tensor(3)}
    load_and_quantize_model(empty(norm), FP32, save(state, tmp_path / "norm"), strict=True)

    def mamba():
        return MambaModel(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))

    wanted = mamba()
    state = {name.replace("embeddings.", "embedding."): value for name, value in wanted.state_dict().items()}
    made = load_and_quantize_model(empty(mamba), FP32, save(state, tmp_path / "mamba"), device_map="cpu", strict=True)
    assert torch.equal(made.embeddings.weight, wanted.embeddings.weight)


class Wrapped(nn.Module):
    """Its load_state_dict takes away what data-parallel training put before the names."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 8)

    def load_state_dict(self, state_dict, strict=True):
        return super().load_state_dict({k.removeprefix("module."): v for k, v in state_dict.items()}, strict)


def test_a_load_state_dict_of_the_models_own_is_followed(tmp_path):
    wanted = Wrapped()
    folder = save({f"module.{name}": value for name, value in wanted.state_dict().items()}, tmp_path)
    made = load_and_quantize_model(empty(Wrapped), FP32, folder, device_map="cpu", strict=True)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in wanted.state_dict().items())


def test_a_load_state_dict_that_computes_is_refused(tmp_path):
    class Halves(Wrapped):
        def load_state_dict(self, state_dict, strict=True):
            return super().load_state_dict({name: value / 2 for name, value in state_dict.items()}, strict)

    folder = save(Halves().state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"the model, a Halves, is loaded by Halves\.load_state_dict"):
        load_and_quantize_model(empty(Halves), "nf4", folder)


class CopiesIntoData(nn.Module):
    """Does not call nn.Module's method, and writes to `.data`, which counts no version."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(4, 16))
        self.register_buffer("count", torch.tensor(0))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.codes.data.copy_(state_dict[f"{prefix}codes"].reshape(4, 16) * 2)
        self.codes.data[0] = 7
        self.count.fill_(5)


@pytest.mark.parametrize("is_empty", [True, False])
def test_what_is_written_to_the_data_of_a_parameter_is_loaded(is_empty, tmp_path, logged):
    def build():
        return nn.Sequential(CopiesIntoData(), nn.Linear(64, 8))

    stored = {**build().state_dict(), "0.codes": torch.rand(64)}
    save(stored, tmp_path)
    wanted = build()
    wanted.load_state_dict(stored)
    loaded = load_and_quantize_model(empty(build) if is_empty else build(), FP32, tmp_path, device_map="cpu")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in wanted.state_dict().items())
    assert "keep the values that they have" not in logged.text


class Fills(nn.Linear):
    """Has a bias that old checkpoints do not, and makes its extra state of what theirs was."""

    def __init__(self):
        super().__init__(64, 64)
        self.extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict[f"{prefix}bias"] = torch.arange(64.0)
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
        state_dict[f"{prefix}_extra_state"] = {"made": len(state_dict[f"{prefix}_extra_state"]["words"])}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_a_rule_may_make_tensors_and_objects_of_objects(tmp_path, device):
    make = build(Fills)
    state = {name: value for name, value in make().state_dict().items() if name not in ("1.bias", "1._extra_state")}
    torch.save(state | {"1._extra_state": {"words": ["one", "two"]}}, tmp_path / "model.bin")
    model = load_and_quantize_model(empty(make), FP32, tmp_path / "model.bin", device_map=device, strict=True)
    assert torch.equal(model[1].weight.cpu(), state["1.weight"] * 2)
    assert torch.equal(model[1].bias.cpu(), torch.arange(64.0))
    assert model[1].extra == {"made": 2}


def test_a_rule_that_computes_with_a_weight_that_is_put_together_is_given_the_whole(tmp_path, device):
    """The stored experts' matrices are regions of one weight of the model."""
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}

    def make():
        return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=3))

    make().save_pretrained(tmp_path)
    plain = load_and_quantize_model(empty(make), FP32, tmp_path, device_map=device)
    model, path = empty(make), "model.layers.0.mlp.experts"

    def double(state_dict, prefix, *_):
        for name in ("gate_up_proj", "down_proj"):
            state_dict[f"{prefix}{name}"] = state_dict[f"{prefix}{name}"] * 2

    model.get_submodule(path)._register_load_state_dict_pre_hook(double)
    model = load_and_quantize_model(model, FP32, tmp_path, device_map=device)
    for name in ("gate_up_proj", "down_proj"):
        found, expected = (getattr(each.get_submodule(path), name) for each in (model, plain))
        assert torch.equal(found, expected * 2), name
