"""From device maps in every spelling, and budgets, to places."""

import re

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import GPT, Blocks, llama
from torch import nn

from bigload import OffloadConfig, load_and_quantize_model, plan_device_map
from bigload.errors import ConfigError, PlacementError
from bigload.model.tensors import tensors_of
from bigload.planning.request import check_map, resolve_budgets

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


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


def test_unknown_blocks_are_refused_and_all_named():
    with pytest.raises(PlacementError, match=r"'layers\.2', 'heads'"):
        resolve(Blocks(), {"": "cpu", "layers.2": "cpu", "heads": "cpu"})


def test_part_of_a_component_is_an_unknown_block():
    with pytest.raises(PlacementError, match="'lay'"):
        resolve(Blocks(), {"": "cpu", "lay": "cpu"})


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


# Several places.


@pytest.fixture
def small_parts_stream(monkeypatch):
    """Let tensors of a few KB leave a device, as those of a real model do."""
    monkeypatch.setattr("bigload.planning.units.RESIDENT_BYTES", 2000)


def planned(build, device_map="auto", mode="nf4", **options):
    return plan_device_map(empty(build), mode, device_map=device_map, **options)


def test_offloaded_blocks_are_computed_on_the_gpu(small_parts_stream):
    plan = planned(GPT, {"": 0, "transformer.h.1": "cpu"})
    assert plan.device_map == {"": GPU, "transformer.h.1": CPU}
    assert plan.execution_map == {"": GPU}
    (block,) = plan.offloaded
    assert (block.unit.name, block.device, block.home) == ("transformer.h.1", GPU, CPU)
    away = {entry.tensor.name for entry in plan.tensors if entry.home == CPU}
    assert away == {f"transformer.h.1.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    gpu, cpu = plan.accounts
    assert gpu.ring == plan.streamed_bytes == cpu.weights + cpu.quant_state  # a slot for the one block
    assert gpu.reserve > 0
    assert cpu.ring > 0


def test_with_fp32_on_the_cpu_its_blocks_are_computed_there(small_parts_stream):
    config = {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True, "torch_dtype": "bf16"}
    plan = planned(GPT, {"": 0, "transformer.h.1": "cpu"}, config)
    assert plan.execution_map["transformer.h.1"] == CPU
    assert plan.execution_map["transformer.h.0"] == GPU
    assert not plan.offloaded
    assert plan.streamed_bytes == 0
    there = [entry for entry in plan.tensors if entry.device == CPU]
    assert {str(entry.format) for entry in there} == {"Plain(dtype=torch.float32)"}
    assert not any(path.startswith("transformer.h.1") for path in plan.layers)
    assert any(path.startswith("transformer.h.0") for path in plan.layers)


def test_a_map_without_a_gpu_computes_on_the_cpu(small_parts_stream):
    plan = planned(GPT, {"": "cpu", "transformer.h.0": "disk"}, offload_folder="cache")
    assert plan.execution_map == {"": CPU}
    assert [placed.home for placed in plan.offloaded] == ["disk"]
    assert [str(account.place) for account in plan.accounts] == ["cpu", "disk"]


def test_whole_model_on_the_cpu_beside_nothing_else_is_not_offloaded():
    plan = planned(GPT, "cpu")
    assert not plan.offloaded
    assert plan.execution_map == {"": CPU}


def test_two_gpus_each_compute_what_they_hold():
    plan = planned(lambda: GPT(layers=4), max_memory={0: "1GiB", 1: "1GiB"})
    assert {device for path, device in plan.execution_map.items() if path.startswith("transformer.h")} == {GPU, OTHER}
    assert plan.execution_map["transformer.wte"] == GPU
    assert plan.execution_map["lm_head"] == OTHER


def test_tied_weights_lie_on_one_device():
    plan = planned(lambda: GPT(layers=4, tied=True), max_memory={0: "1GiB", 1: "1GiB"})
    assert plan.execution_map["transformer.wte"] == plan.execution_map["lm_head"]
    with pytest.raises(PlacementError, match=r"shares a weight: 'transformer.wte', 'lm_head'"):
        planned(lambda: GPT(tied=True), {"transformer": 0, "lm_head": 1})


def test_block_is_not_divided():
    with pytest.raises(PlacementError, match=r"divides the block 'transformer.h.0'.*one device must hold it whole"):
        planned(GPT, {"": 0, "transformer.h.0.mlp": 1})
    plan = planned(GPT, {"": 0, "transformer.h.0.mlp": 1}, no_split_module_classes=["Attention"])
    assert plan.execution_map["transformer.h.0.mlp.c_fc"] == OTHER
    assert plan.execution_map["transformer.h.0.attn"] == GPU


class Reading(nn.Module):
    """Reads a child's weight past the child's forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64, bias=False)
        self.other = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.other(x @ self.inner.weight)


def test_owner_that_reads_a_childs_weight_is_not_divided_and_what_it_reads_stays(small_parts_stream):
    model = nn.Sequential(nn.Linear(64, 64), Reading(), nn.Linear(64, 64))
    with pytest.raises(PlacementError, match="one device must hold it whole"):
        plan_device_map(model, "nf4", device_map={"": 0, "1.inner": 1})
    plan = plan_device_map(model, "nf4", device_map={"": 0, "1": "cpu"})
    assert [entry.tensor.name for entry in plan.tensors if entry.home == CPU] == ["1.other.weight"]


def test_blocks_are_those_that_the_model_names_else_those_it_repeats():
    for build, names in (
        (lambda: llama(tied=False), ["model.layers.0", "model.layers.1"]),
        (Blocks, ["layers.0", "layers.1"]),
    ):
        plan = planned(build, "cpu")
        assert [placed.unit.name for placed in plan.units if placed.unit.is_block] == names


def test_buffers_that_blocks_share_are_on_the_first_gpu():
    plan = planned(lambda: llama(tied=False, num_hidden_layers=6), max_memory={0: "1GiB", 1: "1GiB"})
    assert plan.execution_map["model.rotary_emb"] == GPU
    assert plan.execution_map["model.norm"] == OTHER


def test_what_fits_is_not_spread_beyond_the_gpus_that_are_named():
    plan = planned(GPT, max_memory={1: "1GiB"})
    assert plan.execution_map == {"": OTHER}
    assert planned(GPT, max_memory={"cpu": "1GiB"}).execution_map == {"": CPU}


def test_disk_is_used_only_where_a_folder_is_given(small_parts_stream, tmp_path, monkeypatch):
    monkeypatch.setenv("BIGLOAD_RING_BYTES", "1KiB")
    build = lambda: GPT(layers=6)  # noqa: E731
    whole = planned(build, 0).accounts[0]
    budgets = {0: whole.needed - 20_000, "cpu": 20_000}
    with pytest.raises(PlacementError, match="offload_folder"):
        planned(build, max_memory=budgets)
    plan = planned(build, max_memory=budgets, offload_folder=tmp_path)
    assert {placed.home for placed in plan.offloaded} == {CPU, "disk"}
    for account in plan.accounts:
        assert account.free is None or account.free >= 0


def test_what_does_not_fit_is_explained():
    with pytest.raises(PlacementError) as caught:
        planned(lambda: GPT(width=256, vocab=64), max_memory={0: "145MiB", "cpu": "1KiB"}, mode="int8")
    text = str(caught.value)
    assert "cuda:0" in text
    assert "too little" in text
    assert "nf4-dq" in text
    assert "a budget" in text


def test_block_larger_than_every_budget_is_named():
    with pytest.raises(PlacementError, match=r"must be on cuda:0 needs .* 'transformer\.h\.0' alone is too large"):
        planned(lambda: GPT(width=1024, vocab=2), max_memory={0: "145MiB", "cpu": 0}, mode="int8")


def test_device_named_twice_is_refused():
    with pytest.raises(PlacementError, match="cuda:0 twice"):
        resolve_budgets({0: 1, "cuda:0": 2}, must_exist=False)


@pytest.mark.parametrize("classes", ["Block", [1]], ids=repr)
def test_classes_that_are_no_list_of_names_are_refused(classes):
    with pytest.raises(ConfigError, match="no_split_module_classes"):
        planned(GPT, no_split_module_classes=classes)


@pytest.mark.parametrize(
    "options",
    [{"execute": "tpu"}, {"slots": 0}, {"slots": True}, {"pin": 1}, {"reserve": "lots"}, {"reserve": -1}],
    ids=repr,
)
def test_offload_config_that_means_nothing_is_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        OffloadConfig(**options)


def test_largest_layer_that_is_dequantized_is_kept_free_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr("bigload.planning.planner.WINDOW_BYTES", 0)
    largest = 4 * 64 * 64 * 4  # the widest of GPT's layers, in float32
    assert planned(GPT, 0).accounts[0].reserve == 2**27 + largest
    assert planned(GPT, 0, mode="int8").accounts[0].reserve == 2**27
    assert planned(GPT, 0, offload=OffloadConfig(reserve=5)).accounts[0].reserve == 5


def test_reserve_is_kept_free():
    plan = planned(GPT, 0, offload=OffloadConfig(reserve="1GiB"))
    assert plan.accounts[0].reserve == 2**30
    with pytest.raises(ConfigError, match="OffloadConfig"):
        planned(GPT, offload={"reserve": 5})


# What a review found.


def runs(model, plan, monkeypatch):
    """Run a model by a plan for two GPUs, where "meta" takes the place of the second and the CPU that of the first."""
    from bigload.offload import device_hooks

    def moved(tensor, device):
        return tensor if tensor.device == device else torch.zeros_like(tensor, device=device)

    monkeypatch.setattr(device_hooks, "_to_device", moved)
    there = {GPU: CPU, OTHER: torch.device("meta")}
    for placed in plan.units:
        for path in placed.unit.paths:
            model.get_submodule(path).to(there[placed.device])
    device_hooks.attach(model, {path: there[device] for path, device in plan.execution_map.items()})
    return model(torch.arange(6).view(1, 6))


@pytest.mark.parametrize(
    "device_map",
    [
        {"": 0, "transformer.h.1": 1},
        {"transformer": 0, "transformer.h.1": 1, "lm_head": 0},
        {"transformer": 0, "transformer.h": 1, "lm_head": 1},
        "balanced",
    ],
    ids=repr,
)
def test_maps_over_two_gpus_run_however_they_are_spelled(device_map, monkeypatch):
    model = GPT(layers=3)
    plan = plan_device_map(model, "nf4", device_map=device_map, max_memory={0: "1GiB", 1: "1GiB"})
    assert set(plan.execution_map.values()) == {GPU, OTHER}
    assert runs(model, plan, monkeypatch).device == CPU


@pytest.mark.parametrize("budget", [0, "100MiB"])
def test_gpu_of_which_nothing_may_be_used_is_left_out(budget):
    assert planned(GPT, max_memory={0: budget, 1: "10GiB"}).execution_map == {"": OTHER}


@pytest.mark.parametrize("budget", [0, "100MiB"])
def test_without_host_memory_all_goes_to_the_disk(small_parts_stream, tmp_path, budget):
    budgets = {0: planned(GPT, 0).accounts[0].needed - 1000, "cpu": budget, "disk": "1GiB"}
    plan = planned(GPT, max_memory=budgets, offload_folder=tmp_path)
    assert {placed.home for placed in plan.offloaded} == {"disk"}


def test_list_of_lists_and_lists_of_two_kinds_have_blocks():
    class A(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    class B(A):
        pass

    for model, blocks in (
        (nn.ModuleList([nn.ModuleList([A(), A()]), nn.ModuleList([A(), A()])]), ["0.0", "0.1", "1.0", "1.1"]),
        (nn.Sequential(nn.Linear(8, 8), nn.ModuleList([A(), B(), A()])), ["1.0", "1.1", "1.2"]),
        (nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))), []),
    ):
        plan = plan_device_map(model, "nf4", device_map="cpu")
        assert [placed.unit.name for placed in plan.units if placed.unit.is_block] == blocks
        assert len(plan.units) >= 3


def test_class_that_no_module_is_of_is_warned_of_and_none_divides_all(caplog):
    plan = planned(GPT, "cpu", no_split_module_classes=["Blokc"])
    assert "'Blokc'" in caplog.text
    assert not any(placed.unit.is_block for placed in plan.units)
    assert not any(placed.unit.is_block for placed in planned(GPT, "cpu", no_split_module_classes=[]).units)


def test_whole_map_is_held_against_what_is_free(tmp_path, monkeypatch):
    folder = save_checkpoint(GPT(), tmp_path)
    monkeypatch.setattr("bigload.planning.placement.free_bytes", lambda device: 1000)
    with pytest.raises(PlacementError, match="cpu"):
        load_and_quantize_model(empty(GPT), "nf4", folder, device_map="cpu")


def test_what_nothing_of_can_leave_is_not_offloaded():
    plan = planned(GPT, {"": 0, "transformer.ln_f": "cpu"})
    assert not plan.offloaded
    assert set(plan.device_bytes) == {GPU}


def test_gpus_are_taken_in_the_order_of_their_numbers():
    plan = planned(lambda: GPT(layers=12), max_memory=dict.fromkeys((10, 2, 1), "1GiB"))
    assert list(dict.fromkeys(device.index for device in plan.execution_map.values())) == [1, 2, 10]


def test_what_is_stored_quantized_is_not_computed_on_the_cpu_in_fp32(tmp_path):
    from bigload import CheckpointError, quantize_checkpoint

    folder = save_checkpoint(GPT().bfloat16(), tmp_path / "source")
    quantize_checkpoint(folder, tmp_path / "made", "nf4", model=empty(GPT), device="cpu")
    options = {"device_map": {"": 0, "transformer.h.1": "cpu"}, "offload": OffloadConfig(execute="cpu")}
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1.*float32"):
        plan_device_map(empty(GPT), None, tmp_path / "made", **options)


@pytest.mark.parametrize("options", [{}, {"offload_folder": "cache"}], ids=["cpu", "disk"])
def test_budget_that_is_said_to_help_does(small_parts_stream, options):
    """In one try, whatever else would be lacking."""

    def build():
        return GPT(layers=4, width=128)

    budgets = {"cpu": 2**15}
    with pytest.raises(PlacementError, match="a budget") as caught:
        plan_device_map(empty(build), "nf4", device_map="auto", max_memory=budgets, **options)
    (more,) = re.findall(r"a budget ([\d.]+) KiB larger", str(caught.value))
    budgets["cpu"] += int(float(more) * 2**10 + 2**6)  # it is rounded
    assert plan_device_map(empty(build), "nf4", device_map="auto", max_memory=budgets, **options)
    budgets["cpu"] -= 2**10
    with pytest.raises(PlacementError):
        plan_device_map(empty(build), "nf4", device_map="auto", max_memory=budgets, **options)


def test_mode_is_said_to_help_only_if_it_does():
    budget = sum(plan_device_map(empty(GPT), "int8", device_map="cpu").device_bytes.values())
    for lacking, helps in ((200, True), (budget // 2, False)):
        with pytest.raises(PlacementError) as caught:
            plan_device_map(empty(GPT), "int8", device_map="auto", max_memory={"cpu": budget - lacking})
        assert ("nf4 (" in str(caught.value)) == helps


def test_several_gpus_that_are_too_small_are_told_what_each_needs(small_parts_stream):
    options = {"device_map": "auto", "offload": OffloadConfig(reserve=0)}
    empty_pair = {0: 0, 1: 0, "cpu": "1GiB"}
    with pytest.raises(PlacementError) as caught:
        plan_device_map(empty(lambda: GPT(layers=8)), "nf4", max_memory=empty_pair, **options)
    text = str(caught.value)
    assert "leaving cuda:" not in text  # neither would that: both are too small
    assert "offload_folder" not in text  # which would not help: what must be on a GPU is too much
    (needed,) = re.findall(r"on cuda:\d needs ([\d.]+) KiB", text)
    assert float(needed) < 200


def test_gpu_that_is_too_small_for_slots_is_said_to_be_left_out_where_that_helps(small_parts_stream):
    plain = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "bf16"}
    options = {"device_map": "auto", "offload": OffloadConfig(reserve=0)}

    def build():
        return GPT(vocab=64, width=1024, layers=12)

    budgets = {0: "300MiB", 1: "160MiB", "cpu": "60GiB"}
    with pytest.raises(PlacementError, match="or leaving cuda:1 out"):
        plan_device_map(empty(build), plain, max_memory=budgets, **options)
    del budgets[1]
    assert plan_device_map(empty(build), plain, max_memory=budgets, **options).streamed_bytes


@pytest.mark.parametrize("folder", ["", 5])
def test_what_is_no_folder_is_refused(folder):
    with pytest.raises(ConfigError, match="offload_folder is"):
        plan_device_map(empty(GPT), "nf4", device_map="auto", offload_folder=folder)


def test_misspelled_place_in_a_map_is_named_with_its_block():
    with pytest.raises(PlacementError, match=r"device_map\['transformer.h.1'\]: 'dsk' is not a device.*'disk'"):
        plan_device_map(empty(GPT), "nf4", device_map={"": "cpu", "transformer.h.1": "dsk"})
