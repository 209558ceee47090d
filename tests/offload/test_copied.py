"""Parts of an offloaded model that others copy, and adapters beside its layers."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from checkpoints import PLAIN, loaded, offloaded, save_checkpoint
from comparisons import assert_same_bits, equal, outputs, relative_error, state_of
from models import GPT, TOKENS, llama
from streaming import hooks_of
from torch import nn

from bigload import OffloadError, QuantizationError, load_and_quantize_model
from bigload.offload.at_rest import keep_writes
from bigload.offload.leaves import Leaf, MethodOverride
from bigload.offload.model_device import ApplyGuards

pytestmark = pytest.mark.usefixtures("small_parts_stream")

AWAY = ["model.embed_tokens", "model.layers.0", "lm_head"]


@pytest.fixture(params=[None, "disk"])
def twins(tmp_path, device, request):
    """Return a function that loads the same Llama whole, and with parts of it offloaded."""

    def made(mode="nf4", build=llama, away=AWAY):
        torch.manual_seed(5)
        folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
        whole = loaded(folder, device, mode, build)
        return whole, offloaded(build, folder, device, away, tmp_path / "cache", mode, request.param)

    return made


def is_plain(module):
    held = [value for inner in module.modules() for value in vars(inner).values()]
    return not any(isinstance(value, MethodOverride) for value in held) and not hooks_of(module)


@pytest.mark.parametrize("mode", [PLAIN, "nf4", "nf4-dq", "int8"], ids=["plain", "nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.0.mlp"])
def test_copy_of_a_part_is_what_it_would_be_in_the_whole_model(twins, device, mode, path):
    whole, model = (each.eval() for each in twins(mode))
    expected = outputs(model, TOKENS.to(device))
    own, part = whole.get_submodule(path), model.get_submodule(path)
    x = TOKENS.to(device) if "embed" in path else torch.randn(3, 64, device=device, dtype=torch.bfloat16)
    for made in (copy.deepcopy(part), copy.deepcopy([part])[0]):
        assert is_plain(made)
        assert {type(tensor) for tensor in made.parameters()} == {type(tensor) for tensor in own.parameters()}
        assert {tensor.device for tensor in made.parameters()} == {device}
        assert equal(outputs(made, x), outputs(own, x))
        state = state_of(own)
        assert_same_bits(state_of(made), state)
        if mode == PLAIN:
            nn.init.zeros_(next(made.parameters()).requires_grad_().data)
            made(x).sum().backward()
    assert equal(outputs(model, TOKENS.to(device)), expected)


def test_copy_of_the_whole_is_refused_before_anything_is_copied(twins, device):
    _, model = twins()
    with pytest.raises(OffloadError, match=r"remove\(\).*a part of it can be copied"):
        copy.deepcopy(model)
    with pytest.raises(OffloadError, match="a part of it can be copied"):
        copy.deepcopy(nn.Sequential(nn.Linear(2, 2), model))
    with pytest.raises(OffloadError, match="a part of it can be copied"):
        pickle.dumps(model.lm_head)
    model.lm_head = copy.deepcopy(model.lm_head)
    model.offload.remove()
    assert not any(
        isinstance(held, MethodOverride) for part in copy.deepcopy(model).modules() for held in vars(part).values()
    )
    assert equal(outputs(copy.deepcopy(model), TOKENS.to(device)), outputs(model, TOKENS.to(device)))


def test_copy_of_a_part_in_a_file_that_has_changed_is_refused(tmp_path, device):
    folder = save_checkpoint(GPT().bfloat16(), tmp_path / "source")
    model = offloaded(GPT, folder, device, ["transformer.h.0", "transformer.wte"], tmp_path / "cache", PLAIN, "disk")
    (folder / "model.safetensors").unlink()
    for part in (model.transformer["h"][0].mlp["c_fc"], model.transformer["wte"], model.transformer["h"]):
        with pytest.raises(OffloadError, match="which the model needs as it runs"):
            copy.deepcopy(part)


OPTIONS = {
    "a saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "all": {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


JOBS = [(mode, name) for mode in ("nf4", "int8") for name in OPTIONS]


@pytest.mark.parametrize(("mode", "options"), JOBS)
def test_peft_trains_beside_offloaded_layers_as_beside_resident_ones(twins, device, mode, options):
    peft = pytest.importorskip("peft")
    tokens, losses = TOKENS.to(device), []
    for model in twins(mode):
        torch.manual_seed(2)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **OPTIONS[options]))
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss = adapted(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert {p.device for p in adapted.parameters() if p.requires_grad} == {device}
    assert losses[0] != losses[2]
    if device.type == "cuda" and options == "DoRA":
        # The CPU dequantizes what rests there; it rounds as a GPU does, except for a few values.
        assert relative_error(torch.tensor(losses[3:]), torch.tensor(losses[:3])) < 0.01
    else:
        assert losses[:3] == losses[3:]


class Pool:
    """In place of what streams to a GPU: to "meta"."""

    copier = SimpleNamespace(device=torch.device("meta"), finish=lambda: None)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_what_is_dequantized_of_a_weight_at_rest_goes_to_what_it_meets(mode):
    """DoRA adds its products, which are on the device, to the dequantized weight."""
    from bitsandbytes import functional

    layer = load_and_quantize_model(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), mode, device_map="cpu")[0]
    pool = Pool()  # it is held weakly
    keep_writes(layer.weight, pool)
    if mode == "int8":
        values = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    else:
        values = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    there = torch.ones(values.shape, device="meta", dtype=values.dtype)
    assert (values + there).device.type == (values.t() @ there).device.type == "meta"


class Net(nn.Module):
    """Two layers that are keys of a map by themselves."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(64, 64)
        self.inner = nn.ModuleDict({"out": nn.Linear(64, 64)})

    def forward(self, x):
        return self.inner["out"](self.project(x))


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "OFTConfig", "VeraConfig", "FourierFTConfig"])
def test_adapter_of_a_layer_that_is_a_unit_comes_onto_its_device(monkeypatch, method):
    """Some adapters are used before the layer that they adapt."""
    peft = pytest.importorskip("peft")
    from bigload import plan_device_map
    from bigload.offload import handle

    brought = []
    monkeypatch.setattr(handle, "_move", lambda parameter, device: brought.append(id(parameter)))
    model, keys = Net(), ["project", "inner.out"]
    plan = plan_device_map(model, "nf4", device_map={"": 0, **dict.fromkeys(keys, "cpu")})
    hooks = [
        handle.MoveAddedParameters(model, placed.unit.name, placed.device, handle.leaves_of(model, placed))
        for placed in plan.offloaded
    ]
    for hook in hooks:
        assert len(hook.register()) == 2
    options = {"feedforward_modules": []} if method == "IA3Config" else {"r": 4} if method == "LoraConfig" else {}
    adapted = peft.get_peft_model(model, getattr(peft, method)(target_modules=["project", "out"], **options))
    adapted(torch.randn(2, 64))
    added = {id(parameter) for parameter in adapted.parameters() if parameter.requires_grad}
    assert added
    assert added <= set(brought)
    assert id(model.project.get_base_layer().weight) not in brought


def test_adapters_of_replicated_blocks_come_onto_the_device(monkeypatch):
    """PEFT puts copies of all blocks in their place, which share the weights at rest."""
    peft = pytest.importorskip("peft")
    from bigload import plan_device_map
    from bigload.offload import handle

    brought = []
    monkeypatch.setattr(handle, "_move", lambda parameter, device: brought.append(id(parameter)))
    model = llama()
    names = {name: "cpu" for name, _ in model.named_children()}
    plan = plan_device_map(model, {"load_in_4bit": True, "skip_modules": ["*"]}, device_map={"": 0, **names})
    leaves = [leaf for placed in plan.offloaded for leaf in handle.leaves_of(model, placed)]
    away = {id(leaf.module.get_parameter(name)) for leaf in leaves for name in leaf.parameters}
    (hook,) = handle.MoveAddedParameters(model, "", torch.device("cuda", 0), leaves, always=False).register()
    config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 1], [0, 1]])
    adapted = peft.get_peft_model(model, config)
    adapted(input_ids=TOKENS)
    assert len(model.model.layers) == 2
    added = {id(parameter) for parameter in adapted.parameters() if parameter.requires_grad}
    assert len(added) == 4
    assert added <= set(brought)
    assert away
    assert not away & set(brought)
    adapted(input_ids=TOKENS)
    brought.clear()
    adapted(input_ids=TOKENS)  # it looked once
    assert not brought
    hook.remove()


@pytest.mark.parametrize("mode", [PLAIN, "nf4", "int8"], ids=["plain", "nf4", "int8"])
def test_blocks_that_are_replicated_give_what_they_give_in_the_whole_model(twins, device, mode):
    peft = pytest.importorskip("peft")
    found = []
    for model in twins(mode, away=["model.embed_tokens", "model.layers"]):
        torch.manual_seed(2)
        config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 1], [0, 1]], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        if device.type == "cuda" and mode != PLAIN and hasattr(model, "offload"):
            with pytest.raises(QuantizationError, match="but its input is on cuda"):
                adapted(input_ids=TOKENS.to(device))
            return
        out = adapted(input_ids=TOKENS.to(device)).logits
        out.float().square().sum().backward()
        found.append([out, *(p.grad for p in adapted.parameters() if p.requires_grad)])
    assert len(found[0]) == 5
    assert all(equal(one, other) for one, other in zip(*found, strict=True))


def test_lone_layers_train_with_adapters(device, tmp_path):
    peft = pytest.importorskip("peft")
    home, found = "cpu" if device.type == "cuda" else "disk", []
    for away in ({}, {"project": home, "inner.out": home}):
        torch.manual_seed(1)
        model = load_and_quantize_model(
            Net().bfloat16(), "nf4", device_map={"": device, **away}, offload_folder=tmp_path
        )
        torch.manual_seed(2)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["project", "out"]))
        out = adapted(torch.randn(2, 64, device=device, dtype=torch.bfloat16))
        out.sum().backward()
        gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
        assert {each.device for each in gradients} == {device}
        found.append([out.detach(), *gradients])
    assert all(equal(one, other) for one, other in zip(*found, strict=True))


META = torch.device("meta")
PUT_ON_INT8 = {
    "IA3Config": {"feedforward_modules": []},
    "VeraConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 32, "r": 0},
    "FourierFTConfig": {"n_frequency": 10},
    "LoraConfig": {"r": 4},
}


@pytest.fixture
def on_meta():
    """Return int8 layers on the CPU that are moved as if they were streamed from there to "meta"."""
    model = load_and_quantize_model(Net(), "int8", device_map="cpu")
    guards = ApplyGuards(model, {Leaf(path, model.get_submodule(path)): META for path in ("project", "inner.out")})
    yield model
    guards.remove()


@pytest.mark.parametrize("method", PUT_ON_INT8)
def test_int8_layers_are_moved_with_their_adapters_to_where_they_rest(on_meta, method):
    """So PEFT does, which asks the weight; the adapters come onto the device before the block runs."""
    peft = pytest.importorskip("peft")
    layers, x = (on_meta.project, on_meta.inner["out"]), torch.randn(2, 64)
    expected = on_meta(x)
    config = getattr(peft, method)(target_modules=["project", "out"], **PUT_ON_INT8[method])
    adapted = peft.get_peft_model(on_meta, config)
    assert (on_meta.project.get_base_layer(), on_meta.inner["out"].get_base_layer()) == layers
    with adapted.disable_adapter():
        assert equal(adapted(x), expected)


def to_cpu(tensor):  # there is nothing to copy from meta
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor


@pytest.mark.parametrize("part", ["", "inner"])
def test_more_than_a_layer_is_not_moved_to_where_its_weights_rest(on_meta, part):
    for moved in (on_meta.get_submodule(part), nn.Sequential(on_meta.get_submodule(part))):
        with pytest.raises(OffloadError, match=r"cannot be moved to cpu; call model\.offload\.remove\(\)"):
            moved._apply(to_cpu)


def test_a_layer_that_is_moved_to_where_its_weight_rests_keeps_its_bias_where_it_computes(on_meta):
    layer, weight, place = on_meta.project, on_meta.project.weight, on_meta.project.weight.data_ptr()
    layer.bias = nn.Parameter(torch.zeros(64, device=META))
    for dtype in (torch.float32, torch.float16):
        layer.to(dtype)._apply(to_cpu)
        assert (layer.bias.device, layer.bias.dtype) == (META, dtype)
        assert layer.weight is weight
        assert (weight.dtype, weight.data_ptr()) == (torch.int8, place)


@pytest.mark.cuda
def test_a_streamed_layer_that_is_moved_to_the_cpu_computes_as_before(tmp_path):
    device = torch.device("cuda", 0)
    model = load_and_quantize_model(
        Net(), "int8", device_map={"": device, "project": "cpu", "inner.out": "cpu"}, offload_folder=tmp_path
    )
    x = torch.randn(2, 64, device=device)
    expected, layer = outputs(model, x), model.project
    assert (layer.weight.device.type, layer.bias.device.type) == ("cpu", "cuda")
    layer.to("cpu")
    assert (layer.weight.device.type, layer.bias.device.type) == ("cpu", "cuda")
    assert equal(outputs(model, x), expected)


@pytest.mark.parametrize("mode", [PLAIN, "nf4", "int8"], ids=["plain", "nf4", "int8"])
def test_shallow_copies_of_offloaded_layers_are_refused(twins, device, mode):
    _, model = (each.eval() for each in twins(mode))
    expected = outputs(model, TOKENS.to(device))
    for path in ("lm_head", "model.layers.0.mlp.up_proj", "model.embed_tokens"):
        with pytest.raises(OffloadError, match=r"by copy\.deepcopy"):
            copy.copy(model.get_submodule(path))
    assert equal(outputs(model, TOKENS.to(device)), expected)
    model.offload.remove()
    head = copy.copy(model.lm_head)
    head._parameters = dict(head._parameters)
    head.weight = None
    assert equal(outputs(model, TOKENS.to(device)), expected)


def test_a_shallow_copy_of_a_block_has_no_methods_of_the_original(twins, device):
    _, model = (each.eval() for each in twins())
    block = model.model.layers[0].mlp
    made = copy.copy(block)
    assert not any(isinstance(held, MethodOverride) for held in vars(made).values())
    x = torch.randn(3, 64, device=device, dtype=torch.bfloat16)
    assert equal(outputs(made, x), outputs(block, x))
    vars(made)["_modules"] = dict(made._modules, up_proj=nn.Linear(64, 8))
    made.double()
    assert made.up_proj.weight.dtype == torch.float64
    assert equal(outputs(block, x), outputs(copy.deepcopy(block), x))


def test_replicas_of_an_offloaded_model_are_refused(twins):
    _, model = twins(PLAIN)
    for path in ("", "model.layers.0", "lm_head"):
        with pytest.raises(OffloadError, match=r"DataParallel.*device_map='balanced'"):
            model.get_submodule(path)._replicate_for_data_parallel()
    model.offload.remove()
    assert type(model._replicate_for_data_parallel()) is type(model)
