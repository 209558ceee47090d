"""What the errors of this wing ask for is done, and the load goes on. tests/test_remedies.py lists them."""

import logging

import pytest
import torch
from checkpoints import empty, save, save_checkpoint
from models import GPT, Net, Pair
from references import quantized_state, stored_by_bitsandbytes
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from bigload import BnbQuantizationConfig, OffloadConfig, init_empty_weights, load_and_quantize_model, plan_device_map
from bigload.errors import CheckpointError, ConfigError, PlacementError

NF4 = BnbQuantizationConfig.from_mode("nf4")
GPU = {"": 0, "layers": "cpu"}


def blocks():
    return Net(layers=nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2)), norm=nn.LayerNorm(64))


@pytest.fixture
def original(tmp_path):
    torch.manual_seed(0)
    return save_checkpoint(blocks(), tmp_path / "original")


@pytest.fixture
def quantized(tmp_path):
    return save(quantized_state(blocks(), "nf4", "cpu", skip=()), tmp_path / "quantized")


REFUSED = {
    "a map that leaves out": (
        {"device_map": {"layers": "cpu"}},
        "add their blocks, or '' for the rest",
        lambda folder: {"weights_location": folder, "device_map": {"layers": "cpu", "norm": "cpu"}},
        lambda folder: {"weights_location": folder, "device_map": {"layers": "cpu", "": "cpu"}},
    ),
    "a budget twice": (
        {"device_map": "auto", "max_memory": {0: "1GiB", "cuda:0": "2GiB"}},
        "set one budget for each device",
        lambda folder: {"weights_location": folder, "device_map": "auto", "max_memory": {0: "1GiB", "cpu": "2GiB"}},
    ),
    "a disk without a folder": (
        {"device_map": {"": 0, "layers": "disk"}},
        "name an offload_folder",
        lambda folder: {"device_map": {"": 0, "layers": "disk"}, "offload_folder": folder / "off"},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plan_is_made_of_what_the_error_asks_for(case, original, two_gpus, small_parts_stream):
    given, words, *remedies = REFUSED[case]
    with pytest.raises(PlacementError, match=words):
        plan_device_map(empty(blocks), "nf4", original, **given)
    for remedy in remedies:
        assert plan_device_map(empty(blocks), "nf4", **{"weights_location": original} | remedy(original))


def test_disk_with_a_budget_is_used_where_a_folder_is_named(original, tmp_path, two_gpus, small_parts_stream, warned):
    budgets = {0: "156MiB", "cpu": 0, "disk": "1GiB"}

    def plan(**options):
        return plan_device_map(
            empty(GPT, width=512, layers=12), "nf4", device_map="auto", max_memory=budgets, **options
        )

    with pytest.raises(PlacementError, match="an offload_folder, so that blocks may be offloaded to the disk"):
        plan()
    assert warned() == ["max_memory has a budget for 'disk', which nothing goes to: name an offload_folder too"]
    assert "disk" in plan(offload_folder=tmp_path / "off").device_map.values()
    assert len(warned()) == 1


def test_weights_are_loaded_from_where_they_are_said_to_be(original):
    with pytest.raises(CheckpointError, match=r"tensors of the model are on meta: .*; pass the weights_location"):
        load_and_quantize_model(empty(blocks), "nf4", device_map="cpu")
    assert load_and_quantize_model(empty(blocks), "nf4", original, device_map="cpu")


def test_int8_training_that_is_not_offloaded_is_planned(original, two_gpus, small_parts_stream):
    with pytest.raises(ConfigError, match="offload none of them"):
        plan_device_map(empty(blocks), "int8-training", original, device_map=GPU)
    assert plan_device_map(empty(blocks), "int8-training", original, device_map=0)


@pytest.mark.parametrize(
    "wish",
    [
        {"bnb_quantization_config": BnbQuantizationConfig.from_mode("nf4", llm_int8_enable_fp32_cpu_offload=True)},
        {"offload": OffloadConfig(execute="cpu")},
    ],
    ids=["flag", "execute"],
)
def test_quantized_blocks_are_streamed_or_the_original_is_computed_on_the_cpu(
    wish, original, quantized, two_gpus, small_parts_stream
):
    options = {"bnb_quantization_config": NF4, "device_map": GPU} | wish
    words = "use the original checkpoint, or drop llm_int8_enable_fp32_cpu_offload and execute='cpu', so that"
    with pytest.raises(CheckpointError, match=words):
        plan_device_map(empty(blocks), weights_location=quantized, **options)
    assert plan_device_map(empty(blocks), weights_location=original, **options)
    assert plan_device_map(empty(blocks), NF4, quantized, device_map=GPU).offloaded


@pytest.mark.parametrize("remedy", ["a larger budget", "another device_map", "a smaller mode"])
def test_model_that_a_map_puts_where_it_does_not_fit_is_planned(remedy, two_gpus):
    given = {"bnb_quantization_config": "int8", "device_map": {"": 0}, "max_memory": {0: "164MiB"}}
    with pytest.raises(PlacementError, match="choose a smaller mode, another device_map or a larger budget"):
        plan_device_map(empty(GPT, width=512, layers=10), **given)
    given |= {
        "a larger budget": {"max_memory": {0: "1GiB"}},
        "another device_map": {"device_map": {"": "cpu"}},
        "a smaller mode": {"bnb_quantization_config": "nf4"},
    }[remedy]
    assert plan_device_map(empty(GPT, width=512, layers=10), **given)


@pytest.mark.parametrize("stored_as", ["plain", "nf4"])
def test_model_of_the_checkpoints_sizes_is_loaded(stored_as, tmp_path):
    state = Pair().state_dict() if stored_as == "plain" else quantized_state(Pair(), "nf4", "cpu", skip=())
    folder, wrong = save(state, tmp_path), empty(Pair)
    wrong.fc1 = nn.Linear(64, 96, device="meta")
    wrong.norm, wrong.fc2 = nn.LayerNorm(96, device="meta"), nn.Linear(96, 64, bias=False, device="meta")
    config = "nf4" if stored_as == "plain" else None
    with pytest.raises(CheckpointError, match="build the model from this checkpoint's config"):
        load_and_quantize_model(wrong, config, folder, device_map="cpu")
    assert load_and_quantize_model(empty(Pair), config, folder, device_map="cpu")


def test_weights_of_integers_without_scales_are_loaded_from_the_original(tmp_path):
    state = Pair().state_dict()
    save(state | {"fc1.weight": state["fc1.weight"].to(torch.int8)}, tmp_path / "integers")
    save(state, tmp_path / "original")
    with pytest.raises(CheckpointError, match="with their scales; use the original checkpoint"):
        load_and_quantize_model(empty(Pair), "nf4", tmp_path / "integers", device_map="cpu")
    assert load_and_quantize_model(empty(Pair), "nf4", tmp_path / "original", device_map="cpu")


def test_experts_in_int8_that_are_merged_are_loaded_from_the_original(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "original")
    state = {}
    for part in ("w1", "w2", "w3"):
        for expert in (0, 1):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
            state |= stored_by_bitsandbytes(name, torch.rand(64, 64), "int8")
    save(state, tmp_path / "quantized")
    with pytest.raises(
        CheckpointError, match="which needs weights that are not quantized: use the original checkpoint"
    ):
        load_and_quantize_model(empty(MixtralForCausalLM, config), None, tmp_path / "quantized", device_map="cpu")
    assert load_and_quantize_model(empty(MixtralForCausalLM, config), "nf4", tmp_path / "original", device_map="cpu")


class Halved(nn.Linear):
    """Computes with the values as it loads them."""

    def _load_from_state_dict(self, state, prefix, *rest):
        state[prefix + "weight"] = state[prefix + "weight"] / 2
        super()._load_from_state_dict(state, prefix, *rest)


def test_layer_that_computes_with_what_it_loads_is_loaded_from_the_original(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(64, 64), Halved(64, 64), nn.LayerNorm(64))

    save(quantized_state(build(), "nf4", "cpu", skip=()), tmp_path / "quantized")
    save_checkpoint(build(), tmp_path / "original")
    with pytest.raises(CheckpointError, match="computes with the values: use the original checkpoint"):
        load_and_quantize_model(empty(build), None, tmp_path / "quantized", device_map="cpu")
    assert load_and_quantize_model(empty(build), "nf4", tmp_path / "original", device_map="cpu")


class Stateful(nn.Linear):
    def get_extra_state(self):
        return torch.ones(1)

    def set_extra_state(self, state):
        self.state = state


def test_layer_with_extra_state_is_loaded_where_it_stays_plain(tmp_path):
    def build():
        return nn.Sequential(Stateful(64, 64), nn.Linear(64, 64), nn.LayerNorm(64))

    folder = save_checkpoint(build(), tmp_path)
    with pytest.raises(CheckpointError, match="a quantized layer has none: add them to skip_modules"):
        load_and_quantize_model(empty(build), "nf4", folder, device_map="cpu", quantizable=(Stateful,))
    config = BnbQuantizationConfig.from_mode("nf4", skip_modules=["0"])
    assert (
        load_and_quantize_model(empty(build), config, folder, device_map="cpu", quantizable=(Stateful,))[0].state == 1
    )


@pytest.mark.parametrize("remedy", [{"bnb_4bit_quant_storage": "uint8"}, {"skip_modules": ["0"]}])
def test_layer_that_does_not_fill_its_storage_is_loaded_otherwise(remedy):
    def build():
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(64, 64), nn.ReLU())

    config = {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}
    with pytest.raises(ConfigError, match="use bnb_4bit_quant_storage='uint8' or add '0' to skip_modules"):
        load_and_quantize_model(build(), config, device_map="cpu")
    assert load_and_quantize_model(build(), config | remedy, device_map="cpu")


def test_head_of_the_shape_of_the_embedding_is_tied_to_it(tmp_path):
    model = GPT()
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save(state, tmp_path)
    pair = ("transformer.wte.weight", "lm_head.weight")

    def build():
        made = GPT()
        made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach().clone())
        return made

    with pytest.raises(CheckpointError, match=r"if they are one weight, pass tied_parameters=\[\('"):
        load_and_quantize_model(empty(build), "nf4", tmp_path, device_map="cpu")
    assert load_and_quantize_model(empty(build), "nf4", tmp_path, device_map="cpu", tied_parameters=[pair])


class WithTable(nn.Module):
    """Has a buffer that is in no checkpoint."""

    def __init__(self, table):
        super().__init__()
        self.proj = nn.Linear(64, 64)
        self.register_buffer("table", table, persistent=False)


def test_buffer_is_real_where_the_model_is_built_as_asked(tmp_path, warned):
    def build():
        return nn.Sequential(WithTable(torch.arange(4.0)), nn.LayerNorm(64))

    folder = save_checkpoint(build(), tmp_path)
    with init_empty_weights(include_buffers=True):
        lost = build()
    words = r"build the model under bigload.init_empty_weights\(\), which leaves buffers real"
    with pytest.raises(CheckpointError, match=words):
        load_and_quantize_model(lost, "nf4", folder, device_map="cpu")
    with torch.device("meta"):
        emptied = nn.Sequential(WithTable(torch.empty(4)), nn.LayerNorm(64))
    load_and_quantize_model(emptied.to_empty(device="cpu"), "nf4", folder, device_map="cpu")
    said = [message for message in warned() if "to_empty" in message]
    assert said
    assert "then build the model under bigload.init_empty_weights()" in said[0]
    with init_empty_weights():
        model = build()
    assert load_and_quantize_model(model, "nf4", folder, device_map="cpu")[0].table.equal(torch.arange(4.0))
    assert len([message for message in warned() if "to_empty" in message]) == len(said)


def test_two_weights_that_the_model_ties_are_both_loaded_without_the_tie(tmp_path, warned):
    def build(tied):
        made = Net(embed=nn.Embedding(40, 64), head=nn.Linear(64, 40, bias=False))
        if tied:
            made.head.weight = made.embed.weight
        return made

    folder = save(build(tied=False).state_dict(), tmp_path)
    with_tie = load_and_quantize_model(empty(build, tied=True), "nf4", folder, device_map="cpu")
    assert with_tie.head.weight is with_tie.embed.weight
    words = "build the model without the tie if they are two weights"
    assert sum(words in message for message in warned()) == 1
    model = load_and_quantize_model(empty(build, tied=False), "nf4", folder, device_map="cpu")
    assert not torch.equal(model.head.weight, model.embed.weight)
    assert sum(words in message for message in warned()) == 1


def test_values_that_were_kept_are_trained(tmp_path, logged):
    folder = save_checkpoint(nn.Sequential(nn.Linear(64, 64)), tmp_path)
    model = nn.Sequential(nn.Linear(64, 64, device="meta"), nn.Linear(64, 4))
    with logged.at_level(logging.WARNING):
        model = load_and_quantize_model(model, "nf4", folder, device_map="cpu", strict=False)
    assert "they keep the values that they have and are not quantized: train them" in logged.text
    before = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
