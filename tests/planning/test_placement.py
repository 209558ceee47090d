"""A place for every part of a model, by a device map or by budgets."""

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import GPT, llama
from plans import planned

from bigload import BnbQuantizationConfig, OffloadConfig, load_and_quantize_model, plan_device_map
from bigload.errors import ConfigError, PlacementError
from bigload.offload import device_hooks

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


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
    with pytest.raises(PlacementError, match=r"share a weight: 'transformer.wte', 'lm_head'"):
        planned(lambda: GPT(tied=True), {"transformer": 0, "lm_head": 1})


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


@pytest.mark.parametrize(
    "options",
    [{"execute": "tpu"}, {"slots": 0}, {"slots": True}, {"pin": 1}, {"reserve": "lots"}, {"reserve": -1}],
    ids=repr,
)
def test_offload_config_that_means_nothing_is_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        OffloadConfig(**options)


def run_by(plan, model):
    """Run a model by a plan for two GPUs, where "meta" takes the place of the second and the CPU that of the first."""
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
def test_maps_over_two_gpus_run_however_they_are_spelled(device_map, moves):
    model = GPT(layers=3)
    plan = plan_device_map(model, "nf4", device_map=device_map, max_memory={0: "1GiB", 1: "1GiB"})
    assert set(plan.execution_map.values()) == {GPU, OTHER}
    assert run_by(plan, model).device == CPU
    assert moves


@pytest.mark.parametrize("budget", [0, "100MiB"])
def test_gpu_of_which_nothing_may_be_used_is_left_out(budget):
    assert planned(GPT, max_memory={0: budget, 1: "10GiB"}).execution_map == {"": OTHER}


@pytest.mark.parametrize("budget", [0, "100MiB"])
def test_without_host_memory_all_goes_to_the_disk(small_parts_stream, tmp_path, budget):
    budgets = {0: planned(GPT, 0).accounts[0].needed - 1000, "cpu": budget, "disk": "1GiB"}
    plan = planned(GPT, max_memory=budgets, offload_folder=tmp_path)
    assert {placed.home for placed in plan.offloaded} == {"disk"}


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


class Mixed(torch.nn.Module):
    """A large parameter beside a child, and blocks that are small."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.rand(1024, 1024))
        self.layer, self.small = torch.nn.Linear(1024, 2560), torch.nn.Linear(8, 8)


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_what_is_sent_away_and_stays_is_said(logged, home):
    maps = {"": 0, "table": home, "small": home, "layer": home}
    with logged.at_level("WARNING"):
        plan_device_map(Mixed(), "nf4", device_map=maps, offload_folder="files")
    said = [record.getMessage() for record in logged.records if "stay on the device" in record.getMessage()]
    assert ["'small', which stay" in said[0], "'table', which stay" in said[1], len(said)] == [True, True, 2]


def test_norms_and_biases_that_stay_as_ever_are_not_said(logged):
    with logged.at_level("WARNING"):
        plan_device_map(Mixed(), "nf4", device_map={"": 0, "layer": "cpu"})
    assert "stay on the device" not in logged.text


def test_a_reserve_below_what_the_load_needs_is_said(logged):
    with logged.at_level("WARNING"):
        plan = plan_device_map(Mixed(), "nf4", device_map=0, offload=OffloadConfig(reserve="1MiB"))
    assert "reserve is 1.00 MiB, but the transfers of the load need 144.00 MiB" in logged.text
    assert plan.accounts[0].reserve == 144 * 2**20


def test_nothing_is_said_of_a_reserve_that_nobody_asked_for(warned):
    assert plan_device_map(Mixed(), "nf4", device_map=0).accounts[0].reserve == 144 * 2**20
    assert not [message for message in warned() if "reserve" in message]


def test_a_budget_that_leaves_nothing_blames_no_unit_and_says_what_is_kept():
    options = {"max_memory": {0: "1MiB", "cpu": 0}, "offload": OffloadConfig(reserve=0)}
    with pytest.raises(PlacementError, match="kept for the transfers of the load") as caught:
        plan_device_map(Mixed(), "nf4", device_map="auto", **options)
    assert "alone is too large" not in str(caught.value)


def test_what_the_cpu_computes_in_float32_has_another_dtype_on_a_gpu():
    config = BnbQuantizationConfig(load_in_8bit=True, torch_dtype="fp16", keep_in_fp32_modules=["small"])
    maps = {"": 0, "layer": "cpu", "small": "cpu"}
    plan = plan_device_map(Mixed(), config, device_map=maps, offload=OffloadConfig(execute="cpu"))
    layer, small = ({f"{path}.{name}" for name in ("weight", "bias")} for path in ("layer", "small"))
    assert plan.dtypes_on_gpu == dict.fromkeys(layer, torch.float16) | dict.fromkeys(small, torch.float32)
    assert plan_device_map(Mixed(), config, device_map=0).dtypes_on_gpu == {}
