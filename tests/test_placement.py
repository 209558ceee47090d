"""The device map in every spelling, and the Plan: format, dtype, home and exact bytes of every tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from bigload import init_empty_weights
from bigload.config import BnbQuantizationConfig
from bigload.errors import ConfigError, PlacementError
from bigload.formats import FourBit, Int8, Plain
from bigload.keys import Source
from bigload.modules import layers_to_quantize, tensors_of
from bigload.placement import as_device, default_device, device_of, make_plan, resolve_budgets, resolve_device_map

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch):
    """Imagine two GPUs, the second being the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.norm = nn.LayerNorm(128)
        self.fc2 = nn.Linear(128, 64, bias=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.register_buffer("positions", torch.arange(7))
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))
        self.register_buffer("running_mean", torch.ones(5))
        self.head = nn.Linear(64, 10)


def resolve(model, device_map):
    return resolve_device_map(device_map, tensors_of(model), {path for path, _ in model.named_modules()})


def plan_for(model, config, device_map=None, without=("positions", "scale")):
    tensors = tensors_of(model)
    sources = {tensor.name: (Source(tensor.value),) for tensor in tensors if tensor.name not in without}
    layers = layers_to_quantize(model, config, tensors)
    return make_plan(model, config, tensors, layers, sources, device_map or {"": CPU})


def planned(model, config, **kwargs):
    return {entry.tensor.name: entry for entry in plan_for(model, config, **kwargs).tensors}


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)], ids=repr)
def test_the_cpu_is_one_device_in_every_spelling(device):
    assert as_device(device) == CPU


@pytest.mark.parametrize("device", [0, "0", "cuda:0", torch.device("cuda", 0), torch.device("cuda:0")], ids=repr)
def test_a_gpu_is_one_device_in_every_spelling(two_gpus, device):
    assert as_device(device) == torch.device("cuda", 0)


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda")], ids=repr)
def test_cuda_without_a_number_is_the_current_gpu(two_gpus, device):
    assert as_device(device) == torch.device("cuda", 1)


@pytest.mark.parametrize("device", [2, "2", "cuda:2", torch.device("cuda", 2)], ids=repr)
def test_gpu_that_does_not_exist_is_refused_with_those_that_do(two_gpus, device):
    with pytest.raises(PlacementError, match=r"'cuda:2' does not exist.*0 to 1"):
        as_device(device)


@pytest.mark.parametrize("device", [0, "0", "cuda", "cuda:0", torch.device("cuda")], ids=repr)
def test_gpu_is_refused_where_there_is_none(no_gpu, device):
    with pytest.raises(PlacementError, match="no CUDA device"):
        as_device(device)


def test_gpu_beyond_those_of_this_machine_is_refused():
    count = torch.cuda.device_count()
    with pytest.raises(PlacementError, match=f"'cuda:{count}' does not exist"):
        as_device(count)


@pytest.mark.parametrize(
    "device", ["gpu", "", "cuda:x", "cuda:-2", "²", -1, -2, 300, 2**40, 2**70, True, 1.5, None, []], ids=repr
)
def test_what_is_no_device_is_refused(two_gpus, device):
    with pytest.raises(PlacementError, match="device"):
        as_device(device)


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", torch.device("meta")], ids=repr)
def test_devices_that_bigload_does_not_load_onto_are_refused_by_name(device):
    with pytest.raises(PlacementError, match=str(device)):
        as_device(device)


def test_default_device_is_the_current_gpu(two_gpus):
    assert default_device() == torch.device("cuda", 1)


def test_default_device_is_the_cpu_where_there_is_no_gpu(no_gpu):
    assert default_device() == CPU


@pytest.mark.parametrize("device_map", [None, "auto", "balanced", "balanced_low_0", "sequential"])
def test_no_map_and_every_strategy_put_the_whole_model_on_the_default_device(device_map):
    expected = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
    assert resolve(Model(), device_map) == {"": expected}


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}], ids=repr)
def test_one_device_takes_the_whole_model(device_map):
    assert resolve(Model(), device_map) == {"": CPU}


@pytest.mark.parametrize("device_map", [0, "0", "cuda:0", {"": 0}, {"": "cuda:0"}], ids=repr)
def test_one_gpu_takes_the_whole_model(two_gpus, device_map):
    assert resolve(Model(), device_map) == {"": torch.device("cuda", 0)}


def test_map_may_name_modules_lists_of_modules_and_single_tensors():
    device_map = dict.fromkeys(["embed", "layers", "head.weight", "head.bias", "positions", "scale"], "cpu")
    device_map["running_mean"] = CPU
    assert resolve(Model(), device_map) == dict.fromkeys(device_map, CPU)


def test_callers_map_is_not_changed(two_gpus):
    device_map = {"": "cuda", "layers.1": 1}
    resolve(Model(), device_map)
    assert device_map == {"": "cuda", "layers.1": 1}


def test_unknown_blocks_are_refused_and_all_named():
    with pytest.raises(PlacementError, match=r"'layers\.2', 'heads'"):
        resolve(Model(), {"": "cpu", "layers.2": "cpu", "heads": "cpu"})


def test_part_of_a_component_is_an_unknown_block():
    with pytest.raises(PlacementError, match="'lay'"):
        resolve(Model(), {"": "cpu", "lay": "cpu"})


def test_tensors_left_out_are_refused_and_all_named():
    with pytest.raises(PlacementError, match="leaves out") as caught:
        resolve(Model(), {"layers": "cpu", "embed": "cpu", "head.bias": "cpu"})
    assert all(repr(name) in str(caught.value) for name in ("positions", "scale", "running_mean", "head.weight"))
    assert "'head.bias'" not in str(caught.value)


def test_empty_map_leaves_everything_out():
    with pytest.raises(PlacementError, match="leaves out"):
        resolve(Model(), {})


def test_device_that_does_not_exist_is_refused_inside_a_map(no_gpu):
    with pytest.raises(PlacementError, match="'cuda:3' does not exist"):
        resolve(Model(), {"": "cpu", "head": 3})


@pytest.mark.parametrize("device_map", ["disk", {"": "disk"}, {"": "cpu", "layers.1": "disk"}], ids=repr)
def test_disk_is_refused_in_words_that_say_it_is_not_there_yet(device_map):
    with pytest.raises(PlacementError, match=r"'disk'.*does not offload"):
        resolve(Model(), device_map)


def test_cpu_beside_a_gpu_is_refused_and_names_the_block(two_gpus):
    with pytest.raises(PlacementError, match=r"'layers\.1': 'cpu'.*does not offload"):
        resolve(Model(), {"": 0, "layers.1": "cpu"})


def test_two_gpus_are_refused_and_both_named(two_gpus):
    with pytest.raises(PlacementError, match="'cuda:0', 'cuda:1'"):
        resolve(Model(), {"": 0, "layers.1": 1})


def test_one_gpu_in_several_spellings_is_one_gpu(two_gpus):
    gpu = torch.device("cuda", 1)
    assert resolve(Model(), {"": 1, "head": "cuda", "embed": "cuda:1"}) == {"": gpu, "head": gpu, "embed": gpu}


@pytest.mark.parametrize("device_map", ["everywhere", 1.5, ["cpu"], {"": "everywhere"}, {"": None}], ids=repr)
def test_what_is_no_map_is_refused(device_map):
    with pytest.raises(PlacementError, match="is not a device"):
        resolve(Model(), device_map)


def test_longest_path_decides_where_a_tensor_lies():
    places = {"": CPU, "h": torch.device("cuda", 0), "h.1": torch.device("cuda", 1), "h.1.b": torch.device("cuda", 2)}
    assert device_of("h.1.b", places) == torch.device("cuda", 2)
    assert device_of("h.1.weight", places) == torch.device("cuda", 1)
    assert device_of("h.10.weight", places) == torch.device("cuda", 0)
    assert device_of("hh.weight", places) == CPU


COMPONENTS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4)


@given(name=COMPONENTS, paths=st.lists(COMPONENTS, max_size=6))
def test_longest_path_decides_whatever_the_order_of_the_map(name, paths):
    places = {"": torch.device("cuda", 0)} | {
        ".".join(path): torch.device("cuda", n) for n, path in enumerate(paths, 1)
    }
    prefixes = [".".join(name[:length]) for length in range(len(name), -1, -1)]
    expected = next(places[prefix] for prefix in prefixes if prefix in places)
    assert device_of(".".join(name), places) == expected
    assert device_of(".".join(name), dict(reversed(places.items()))) == expected


def test_budgets_are_read_in_every_spelling(two_gpus):
    budgets = resolve_budgets({0: "1GiB", "cuda:1": 5, "cpu": "2KB", "disk": "1TB"})
    assert budgets == {torch.device("cuda", 0): 2**30, torch.device("cuda", 1): 5, CPU: 2000}


@pytest.mark.parametrize("max_memory", [None, {}])
def test_no_budgets_bound_nothing(max_memory):
    assert resolve_budgets(max_memory) == {}


@pytest.mark.parametrize("max_memory", [{"cpu": "lots"}, {"disk": "lots"}, {"cpu": -1}, {0: 1}, {"gpu": 1}], ids=repr)
def test_budget_without_a_size_or_a_device_is_refused(no_gpu, max_memory):
    with pytest.raises(PlacementError, match=r"max_memory|device"):
        resolve_budgets(max_memory)


def test_plan_of_4bit_gives_each_tensor_its_format_dtype_and_bytes():
    config = BnbQuantizationConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", torch_dtype="bf16", keep_in_fp32_modules=["norm", "layers.1.fc2"]
    )
    entries = planned(Model(), config)
    four_bit = FourBit("nf4", 64, False, torch.uint8)
    assert {name: (entry.format, entry.nbytes) for name, entry in entries.items()} == {
        "embed.weight": (Plain(torch.bfloat16), 10 * 64 * 2),
        "layers.0.fc1.weight": (four_bit, 64 * 128 // 2 + 128 * 4),
        "layers.0.fc1.bias": (Plain(torch.bfloat16), 128 * 2),
        "layers.0.norm.weight": (Plain(torch.float32), 128 * 4),
        "layers.0.norm.bias": (Plain(torch.float32), 128 * 4),
        "layers.0.fc2.weight": (four_bit, 128 * 64 // 2 + 128 * 4),
        "layers.1.fc1.weight": (four_bit, 64 * 128 // 2 + 128 * 4),
        "layers.1.fc1.bias": (Plain(torch.bfloat16), 128 * 2),
        "layers.1.norm.weight": (Plain(torch.float32), 128 * 4),
        "layers.1.norm.bias": (Plain(torch.float32), 128 * 4),
        "layers.1.fc2.weight": (Plain(torch.float32), 128 * 64 * 4),
        "head.weight": (Plain(torch.bfloat16), 10 * 64 * 2),
        "head.bias": (Plain(torch.bfloat16), 10 * 2),
        "positions": (Plain(torch.int64), 7 * 8),
        "scale": (Plain(torch.float64), 3 * 8),
        "running_mean": (Plain(torch.bfloat16), 5 * 2),
    }


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("nf4", FourBit("nf4", 64, False, torch.uint8)),
        ("nf4-dq", FourBit("nf4", 64, True, torch.uint8)),
        ("fp4", FourBit("fp4", 64, False, torch.uint8)),
        ("fp4-dq", FourBit("fp4", 64, True, torch.uint8)),
        ("int8", Int8()),
        ("int8-training", Plain(torch.bfloat16)),
    ],
)
def test_plan_gives_each_mode_its_format(mode, expected):
    config = BnbQuantizationConfig.from_mode(mode).resolved(torch.bfloat16)
    assert planned(Model(), config)["layers.0.fc1.weight"].format == expected


def test_plan_holds_main_weights_of_int8_training_in_16_bit():
    config = BnbQuantizationConfig.from_mode("int8-training", torch_dtype="fp32").resolved(torch.float32)
    entries = planned(Model(), config)
    assert entries["layers.0.fc1.weight"].format == Plain(torch.float16)
    assert entries["embed.weight"].format == Plain(torch.float32)


def test_plan_takes_blocksize_and_storage_from_the_config():
    config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_blocksize=256, bnb_4bit_quant_storage="bfloat16")
    expected = FourBit("fp4", 256, False, torch.bfloat16)
    assert planned(Model(), config)["layers.0.fc1.weight"].format == expected


def test_plan_adds_up_the_bytes_of_each_device():
    places = {"": CPU, "layers.1": torch.device("cuda", 0), "layers.1.fc2": torch.device("cuda", 1)}
    plan = plan_for(Model(), BnbQuantizationConfig(load_in_8bit=True), places)
    fc1, fc2, norm = 128 * 64 + 128 * 4 + 128 * 2, 64 * 128 + 64 * 4, 2 * 128 * 2
    rest = 10 * 64 * 2 + (10 * 64 + 10) * 2 + 7 * 8 + 3 * 8 + 5 * 2
    assert plan.device_bytes == {
        CPU: rest + fc1 + norm + fc2,
        torch.device("cuda", 0): fc1 + norm,
        torch.device("cuda", 1): fc2,
    }
    assert sum(plan.device_bytes.values()) == sum(entry.nbytes for entry in plan.tensors)


def test_plan_reads_every_source_once():
    model = Model()
    plan = plan_for(model, BnbQuantizationConfig(load_in_8bit=True))
    read = [tensor for name, tensor in model.state_dict().items() if name not in ("positions", "scale")]
    assert plan.source_bytes == sum(tensor.nbytes for tensor in read)


def test_plan_counts_a_tied_weight_once():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 10, bias=False))
    model[2].weight = model[0].weight
    plan = plan_for(model, BnbQuantizationConfig(load_in_8bit=True))
    assert plan.device_bytes == {CPU: 10 * 64 * 2 + 64 * 64 + 64 * 4 + 64 * 2}


def test_plan_keeps_a_tied_weight_in_fp32_when_any_of_its_names_is_kept():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 10, bias=False))
    model[1].weight = model[0].weight
    config = BnbQuantizationConfig(load_in_8bit=True, keep_in_fp32_modules=["1"])
    assert planned(model, config)["0.weight"].format == Plain(torch.float32)


def test_plan_is_the_same_for_a_model_on_meta():
    with init_empty_weights():
        empty = Model()
    config = BnbQuantizationConfig.from_mode("nf4-dq", torch_dtype="bf16").resolved(torch.bfloat16)
    facts = [
        [(entry.tensor.name, entry.format, entry.nbytes) for entry in plan_for(model, config).tensors]
        for model in (empty, Model())
    ]
    assert facts[0] == facts[1]


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", torch.float32), ("bf16", torch.bfloat16)])
def test_plan_keeps_what_the_class_wants_in_fp32_under_fp16_only(dtype, expected):
    model = Model()
    model._keep_in_fp32_modules = ["fc2"]
    entries = planned(model, BnbQuantizationConfig(load_in_4bit=True, torch_dtype=dtype))
    assert entries["layers.0.fc2.weight"].format == Plain(expected)


def test_plan_turns_a_conv1d_weight_round():
    model = nn.Sequential(Conv1D(128, 64), nn.ReLU())
    entries = planned(model, BnbQuantizationConfig(load_in_8bit=True))
    assert entries["0.weight"].tensor.shape == (64, 128)
    assert entries["0.weight"].shape == (128, 64)
    assert entries["0.weight"].nbytes == 128 * 64 + 128 * 4
    assert entries["0.weight"].sources[0].transposed
    assert not entries["0.bias"].sources[0].transposed


def test_plan_leaves_a_skipped_conv1d_as_it_is():
    model = nn.Sequential(Conv1D(128, 64), nn.ReLU())
    entry = planned(model, BnbQuantizationConfig(load_in_8bit=True, skip_modules=["*"]))["0.weight"]
    assert (entry.shape, entry.format) == ((64, 128), Plain(torch.float16))
    assert not entry.sources[0].transposed


def test_weight_that_does_not_fill_its_storage_dtype_is_refused_with_the_remedy():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16")
    with pytest.raises(ConfigError, match=r"'0\.weight'.*bnb_4bit_quant_storage='uint8'.*'0' to skip_modules"):
        plan_for(model, config)
