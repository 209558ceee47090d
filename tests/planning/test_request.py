"""Device maps and budgets in every spelling, and what is refused of them."""

import pytest
import torch
from checkpoints import empty
from models import GPT, Blocks
from plans import planned

from bigload import plan_device_map
from bigload.errors import ConfigError, PlacementError
from bigload.model.tensors import tensors_of
from bigload.planning.request import check_map, computing_devices, resolve_budgets

CPU = torch.device("cpu")


def resolve(model, device_map):
    """Plan with a map for this machine's devices."""
    check_map(device_map, tensors_of(model), {path for path, _ in model.named_modules()})
    return dict(plan_device_map(model, "nf4", device_map=device_map).device_map)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}], ids=repr)
def test_one_device_takes_the_whole_model(device_map):
    assert resolve(Blocks(), device_map) == {"": CPU}


@pytest.mark.parametrize("device_map", [0, "0", "cuda:0", {"": 0}, {"": "cuda:0"}], ids=repr)
def test_one_gpu_takes_the_whole_model(two_gpus, device_map):
    assert resolve(Blocks(), device_map) == {"": torch.device("cuda", 0)}


def test_map_may_name_modules_lists_of_modules_and_single_tensors():
    device_map = dict.fromkeys(["embed", "layers", "head.weight", "head.bias", "positions", "scale"], "cpu")
    device_map["running_mean"] = CPU
    assert resolve(Blocks(), device_map) == dict.fromkeys(device_map, CPU)


def test_callers_map_is_not_changed(two_gpus):
    device_map = {"": "cuda", "layers.1": 1}
    resolve(Blocks(), device_map)
    assert device_map == {"": "cuda", "layers.1": 1}


@pytest.mark.parametrize(("paths", "named"), [(["layers.2", "heads"], "'layers.2', 'heads'"), (["lay"], "'lay'")])
def test_unknown_blocks_are_warned_of_and_all_named(logged, paths, named):
    with logged.at_level("WARNING"):
        resolve(Blocks(), {"": "cpu"} | dict.fromkeys(paths, "cpu"))
    assert f"device_map names {named}, which the model does not have" in logged.text


def test_tensors_left_out_are_refused_and_all_named():
    with pytest.raises(PlacementError, match="leaves out") as caught:
        resolve(Blocks(), {"layers": "cpu", "embed": "cpu", "head.bias": "cpu"})
    assert all(repr(name) in str(caught.value) for name in ("positions", "scale", "running_mean", "head.weight"))
    assert "'head.bias'" not in str(caught.value)


def test_empty_map_leaves_everything_out():
    with pytest.raises(PlacementError, match="leaves out"):
        resolve(Blocks(), {})


def test_device_that_does_not_exist_is_refused_inside_a_map(no_gpu):
    with pytest.raises(PlacementError, match="'cuda:3' does not exist"):
        resolve(Blocks(), {"": "cpu", "head": 3})


def test_one_gpu_in_several_spellings_is_one_gpu(two_gpus):
    gpu = torch.device("cuda", 1)
    assert resolve(Blocks(), {"": 1, "head": "cuda", "embed": "cuda:1"}) == {"": gpu, "head": gpu, "embed": gpu}


@pytest.mark.parametrize("device_map", ["everywhere", 1.5, ["cpu"], {"": "everywhere"}, {"": None}], ids=repr)
def test_what_is_no_map_is_refused(device_map):
    with pytest.raises(PlacementError, match="is not a device"):
        resolve(Blocks(), device_map)


def test_budgets_are_read_in_every_spelling(two_gpus):
    budgets = resolve_budgets({0: "1GiB", "cuda:1": 5, "cpu": "2KB", "disk": "1TB"})
    assert budgets == {torch.device("cuda", 0): 2**30, torch.device("cuda", 1): 5, CPU: 2000, "disk": 10**12}


@pytest.mark.parametrize("max_memory", [None, {}])
def test_no_budgets_bound_nothing(max_memory):
    assert resolve_budgets(max_memory) == {}


@pytest.mark.parametrize("max_memory", [{"cpu": "lots"}, {"disk": "lots"}, {"cpu": -1}, {0: 1}, {"gpu": 1}], ids=repr)
def test_budget_without_a_size_or_a_device_is_refused(no_gpu, max_memory):
    with pytest.raises(PlacementError, match=r"max_memory|device"):
        resolve_budgets(max_memory)


def test_device_named_twice_is_refused():
    with pytest.raises(PlacementError, match="cuda:0 twice"):
        resolve_budgets({0: 1, "cuda:0": 2}, must_exist=False)


@pytest.mark.parametrize("classes", ["Block", [1]], ids=repr)
def test_classes_that_are_no_list_of_names_are_refused(classes):
    with pytest.raises(ConfigError, match="no_split_module_classes"):
        planned(GPT, no_split_module_classes=classes)


@pytest.mark.parametrize("folder", ["", 5])
def test_what_is_no_folder_is_refused(folder):
    with pytest.raises(ConfigError, match="offload_folder is"):
        plan_device_map(empty(GPT), "nf4", device_map="auto", offload_folder=folder)


def test_misspelled_place_in_a_map_is_named_with_its_block():
    with pytest.raises(PlacementError, match=r"device_map\['transformer.h.1'\]: 'dsk' is not a device.*'disk'"):
        plan_device_map(empty(GPT), "nf4", device_map={"": "cpu", "transformer.h.1": "dsk"})


def test_a_path_of_a_map_that_no_module_has_is_warned_of_with_a_likely_one(logged):
    model = torch.nn.ModuleDict({"final_layernorm": torch.nn.LayerNorm(4), "body": torch.nn.Linear(4, 4)})
    modules = dict(model.named_modules())
    with logged.at_level("WARNING"):
        check_map({"": "cpu", "final_layer_norm": "cpu", "zzz": "cpu"}, tensors_of(model), modules)
    (record,) = logged.records
    assert "names 'final_layer_norm', 'zzz'" in record.getMessage()
    assert "did you mean 'final_layernorm'?" in record.getMessage()


def test_what_computes_is_what_the_budgets_name_and_else_all_there_is(monkeypatch):
    cpu, first, second = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for there, otherwise in ((True, [first, second]), (False, [cpu])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert computing_devices({}) == otherwise
        assert computing_devices({"disk": 100}) == otherwise
        assert computing_devices({second: 100, cpu: 100, first: 100}) == [first, second]
        assert computing_devices({cpu: 100}) == [cpu]
