"""What an offloaded model says is its device, and what goes into it from elsewhere.

A plan for a GPU that is not here is made for a model on the CPU; "meta" takes the place of that GPU where things move.
"""

import copy
import inspect
import pickle
from contextlib import suppress
from typing import ClassVar

import pytest
import torch
from checkpoints import PLAIN, empty, save_checkpoint
from models import GPT, TOKENS, clip, llama, t5
from streaming import hooks_of
from torch import nn
from transformers import CLIPModel, LlamaForCausalLM

from bigload import OffloadError, dequantize_model, load_and_quantize_model, plan_device_map
from bigload.hardware import nested_tensors
from bigload.offload import device_hooks
from bigload.offload.device_hooks import attach
from bigload.offload.model_device import ModelDevices, entries

pytestmark = pytest.mark.usefixtures("small_parts_stream")

CPU, META, GPU, OTHER = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0), torch.device("cuda", 1)


def planned(model, *away, **more):
    return plan_device_map(model, "nf4", device_map={"": 0} | dict.fromkeys(away, "cpu") | more)


@pytest.fixture
def offloaded(tmp_path):
    """Return a model whose embedding and first block rest in files, and a function that loads it."""
    folder = save_checkpoint(llama().bfloat16(), tmp_path / "source")
    device_map = {"": "cpu", "model.embed_tokens": "disk", "model.layers.0": "disk"}

    def loaded(model, mode="nf4"):
        return load_and_quantize_model(
            model, mode, folder, device_map=device_map, offload_folder=tmp_path / "cache"
        ).eval()

    return loaded(empty(llama)), loaded


def test_device_is_the_one_that_computes():
    model = llama()
    plan = planned(model, "model.embed_tokens", **{"lm_head": 1})
    assert model.device == CPU
    devices = ModelDevices(model, plan)
    assert (model.device, model.model.device) == (GPU, GPU)
    assert next(model.parameters()).device == CPU
    devices.remove()
    assert (model.device, model.model.device) == (CPU, CPU)


def test_device_of_a_model_in_it_is_that_of_its_own_first_part():
    model = clip()
    plan = planned(model, "text_model.embeddings", "vision_model.encoder.layers.0", vision_model=1)
    assert entries(model, plan) == {"": GPU, "text_model": GPU, "vision_model": OTHER}
    devices = ModelDevices(model, plan)
    assert (model.device, model.text_model.device, model.vision_model.device) == (GPU, GPU, OTHER)
    devices.remove()
    assert model.vision_model.device == CPU


def test_models_without_weights_elsewhere_are_left_alone():
    model = clip()
    ModelDevices(model, planned(model, "text_model.encoder.layers.0"))
    assert type(model) is not CLIPModel
    assert type(model.vision_model) is type(clip().vision_model)
    assert copy.deepcopy(model.vision_model).device == CPU


def test_a_tied_embedding_is_computed_where_its_first_name_is():
    model = t5()
    assert entries(model, planned(model, "decoder.block.0")) == dict.fromkeys(["", "encoder", "decoder"], GPU)


def test_whole_models_keep_their_classes_and_ask_a_layer_where_they_are(tmp_path, device):
    folder = save_checkpoint(llama(), tmp_path)
    model = load_and_quantize_model(empty(llama), "nf4", folder, device_map=device)
    assert type(model) is LlamaForCausalLM
    first = model.model.layers[0].self_attn.q_proj
    assert entries(model, planned(llama())) == {"": first, "model": first}
    assert not any(hooks_of(layer) for layer in model.model.layers)
    plain = load_and_quantize_model(empty(llama), PLAIN, folder, device_map=device)
    assert not hooks_of(plain)


CALLS_OF_WHOLE = {
    "by position": lambda model, x: model(x).logits,
    "by name": lambda model, x: model(input_ids=x, attention_mask=torch.ones_like(x)).logits,
    "the model in it": lambda model, x: model.model(x).last_hidden_state,
}


@pytest.mark.parametrize("how", CALLS_OF_WHOLE)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_input_from_elsewhere_comes_to_a_whole_model_wherever_that_is_now(tmp_path, moves, how, mode):
    """bitsandbytes' kernels would read it as if it were on their device."""
    folder = save_checkpoint(llama(), tmp_path)
    model = load_and_quantize_model(empty(llama), mode, folder, device_map="cpu").eval()
    given = TOKENS.to(META)
    with torch.no_grad():
        expected = CALLS_OF_WHOLE[how](model, torch.zeros_like(TOKENS))  # from meta come zeros
        assert not moves
        found = []
        handle = model.model.layers[0].register_forward_hook(lambda module, args, out: found.append(args[0].device))
        out = CALLS_OF_WHOLE[how](model, given)
        handle.remove()
    assert found == [CPU]
    assert moves[0][1] == CPU
    assert moves[0][0] is given
    assert out.device == (CPU if how == "the model in it" else META)
    assert out.shape == expected.shape

    moves.clear()
    copied = copy.deepcopy(model)
    for each in copied.modules():
        if isinstance(each, nn.Linear):
            each.weight = nn.Parameter(torch.empty_like(each.weight, device=META), requires_grad=False)
    with suppress(Exception):  # what is left on the CPU cannot be computed with
        CALLS_OF_WHOLE[how](copied, TOKENS)
    assert moves[0][1] == META


@pytest.mark.cuda
@pytest.mark.parametrize("how", CALLS_OF_WHOLE)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_input_on_the_cpu_is_right_for_a_whole_model_on_a_gpu(tmp_path, how, mode):
    folder = save_checkpoint(llama(), tmp_path)
    model = load_and_quantize_model(empty(llama), mode, folder, device_map=0).eval()
    with torch.no_grad():
        expected = CALLS_OF_WHOLE[how](model, TOKENS.to(GPU))
        assert torch.equal(CALLS_OF_WHOLE[how](model, TOKENS).to(GPU), expected)
        there = torch.nn.Linear(64, 64)
        layer = load_and_quantize_model(there, mode, device_map=0)
        assert layer(torch.ones(2, 64)).device == CPU
    assert torch.equal(model.generate(TOKENS, max_new_tokens=3), model.generate(TOKENS.to(GPU), max_new_tokens=3).cpu())


def test_whole_models_are_compiled_in_one_graph_and_dequantized_without_hooks(tmp_path, device):
    folder = save_checkpoint(GPT().bfloat16(), tmp_path)
    model = load_and_quantize_model(empty(GPT), "nf4", folder, device_map=device).eval()
    assert hooks_of(model)
    with torch.no_grad():
        expected = model(TOKENS.to(device))
        graphs = torch._dynamo.explain(model)(TOKENS.to(device)).graph_count
        plain = torch._dynamo.explain(bigload_free(model))(TOKENS.to(device)).graph_count
        assert graphs == plain
        assert torch.equal(torch.compile(model, backend="eager")(TOKENS.to(device)), expected)
    assert not hooks_of(dequantize_model(model))


def bigload_free(model):
    """Copy a model without hooks."""
    made = copy.deepcopy(model)
    device_hooks.detach(made)
    assert not hooks_of(made)
    return made


def test_class_is_what_it_was_to_all_who_ask(offloaded, tmp_path):
    model, _ = offloaded
    cls = type(model)
    assert cls is not LlamaForCausalLM
    assert isinstance(model, LlamaForCausalLM)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "config_class"):
        assert getattr(cls, name) == getattr(LlamaForCausalLM, name)
    assert repr(cls) == repr(LlamaForCausalLM)
    assert inspect.getsource(cls) == inspect.getsource(LlamaForCausalLM)
    assert inspect.signature(cls.forward) == inspect.signature(LlamaForCausalLM.forward)
    assert inspect.signature(cls) == inspect.signature(LlamaForCausalLM)
    with torch.device("meta"):
        another = cls(model.config)
    assert another.device == META
    model.save_pretrained(tmp_path / "saved")
    assert LlamaForCausalLM.config_class.from_pretrained(tmp_path / "saved").architectures == ["LlamaForCausalLM"]


def test_bases_that_list_what_derives_from_them_hear_of_nothing():
    class Listing(nn.Module):
        listed: ClassVar = []

        def __init_subclass__(cls):
            Listing.listed.append(cls)

    class Own(Listing):
        @property
        def device(self):
            return next(self.parameters()).device

        def __init__(self):
            super().__init__()
            self.gpt = GPT()

    model = Own()
    ModelDevices(model, planned(model, "gpt.transformer.wte"))
    assert model.device == GPU
    assert Listing.listed == [Own]


def test_copies_are_of_the_own_class_or_refused(offloaded):
    model, _ = offloaded
    shallow = copy.copy(model)
    assert type(shallow) is LlamaForCausalLM
    assert shallow.model is model.model
    for copied in (copy.deepcopy, pickle.dumps, lambda model: pickle.dumps(model, protocol=0)):
        with pytest.raises(OffloadError, match=r"remove\(\)"):
            copied(model)


def test_remove_gives_back_what_was_changed_and_a_second_load_changes_it_again(offloaded):
    model, loaded = empty(llama), offloaded[1]
    expected = None
    for _ in range(2):
        model = loaded(model, PLAIN)
        assert type(model) is not LlamaForCausalLM
        assert len(model._forward_hooks) == 1
        with torch.no_grad():
            found = model(TOKENS).logits
        assert expected is None or torch.equal(found, expected)
        expected = found
        model.offload.remove()
        assert type(model) is LlamaForCausalLM
        assert set(vars(model)) - set(vars(llama())) == {"load_report", "hf_device_map", "is_loaded_in_4bit"} | {
            "is_loaded_in_8bit"
        }
        assert not hooks_of(model)


def test_load_that_fails_leaves_class_and_hooks_as_they_were(offloaded, monkeypatch):
    _, loaded = offloaded
    model = empty(llama)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ModelDevices, "_replace_class", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loaded(model)
    assert type(model) is LlamaForCausalLM
    assert set(vars(model)) == set(vars(llama()))
    assert not hooks_of(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert loaded(model)(TOKENS).logits.isfinite().all()


def test_adapters_of_peft_come_onto_it(offloaded):
    peft = pytest.importorskip("peft")
    model, _ = offloaded
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert adapted.get_base_model() is model
    assert adapted.device == model.device
    assert adapted(TOKENS).logits.isfinite().all()


class Patches(nn.Module):
    """Sends what goes into a convolution to where its weight is, as transformers' Mllama does."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.conv = nn.Conv1d(8, 64, 3)
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        x = self.norm(x)
        return self.head(self.conv(x.to(self.conv.weight.device)).transpose(1, 2))


@pytest.mark.parametrize("grad", [False, True])
def test_input_that_is_sent_to_where_a_weight_rests_comes_back(tmp_path, device, grad):
    folder, place = save_checkpoint(Patches(), tmp_path / "source"), "cpu" if device.type == "cuda" else "disk"
    made = []
    for device_map in ({"": device}, {"": device, "conv": place}):
        options = {"device_map": device_map, "offload_folder": tmp_path / "cache"}
        model = load_and_quantize_model(empty(Patches), "nf4", folder, **options).requires_grad_(False)
        with torch.set_grad_enabled(grad):
            made += [
                model(torch.arange(512.0, device=where).view(2, 8, 32)) for where in (device, "cpu")[: len(made) + 1]
            ]
    assert made[-1].device == CPU
    assert all(torch.equal(one.cpu(), made[0].cpu()) for one in made)


def test_streamed_leaf_is_brought_what_it_is_given(tmp_path, moves):
    folder = save_checkpoint(Patches(), tmp_path / "source")
    device_map = {"": "cpu", "conv": "disk"}
    model = load_and_quantize_model(empty(Patches), "nf4", folder, device_map=device_map, offload_folder=tmp_path / "c")
    with torch.no_grad():
        assert model.conv(torch.ones(2, 8, 32, device=META)).device == CPU
    assert model.conv.requires_grad_(False)(torch.ones(2, 8, 32, device=META)).device == CPU
    assert [device for _, device in moves] == [CPU, CPU]


ENTERED = {
    "forward": lambda model: model(TOKENS, position_ids=torch.arange(5)[None]).logits,
    "inner": lambda model: model.model(TOKENS, position_ids=torch.arange(5)[None]).last_hidden_state,
}


@pytest.mark.parametrize("entry", ENTERED)
def test_inputs_from_elsewhere_are_brought_and_outputs_of_the_model_sent_back(moves, entry):
    with META:
        model = llama()
    attach(model, {"": META}, entries={"": META, "model": META})
    out = ENTERED[entry](model)
    assert [device for _, device in moves] == [META, META] + [CPU] * (entry == "forward")
    assert out.device == (CPU if entry == "forward" else META)


def test_tower_is_brought_what_it_is_called_with(moves):
    with META:
        model = clip()
    attach(model, {"": META}, entries=dict.fromkeys(["", "text_model", "vision_model"], META))
    found = model.get_image_features(pixel_values=torch.ones(1, 3, 32, 32))
    assert [device for _, device in moves] == [META]
    assert getattr(found, "pooler_output", found).device == META


def test_encoder_is_brought_what_it_is_called_with(moves):
    with META:
        model = t5()
    attach(model, {"": META}, entries=dict.fromkeys(["", "encoder", "decoder"], META))
    assert model.get_encoder()(TOKENS).last_hidden_state.device == META
    assert [device for _, device in moves] == [META]


def test_caches_are_left_where_they_are_and_do_not_say_where_the_input_was(moves):
    class Holding(nn.Module):
        _skip_keys_device_placement = "held"

        def forward(self, held=None, x=None):
            return {"x": x, "held": held}

    model = Holding()
    attach(model, {"": META}, entries={"": META})
    out = model(held=torch.ones(1, device=META), x=torch.ones(2))
    assert (out["x"].device, out["held"].device) == (CPU, META)
    assert [device for _, device in moves] == [META, CPU]


def test_calls_within_a_call_go_back_to_where_each_came_from(moves):
    class Twice(nn.Module):
        def forward(self, x, again=True):
            if again:
                assert self(torch.ones(3), again=False).device == CPU
                assert self(torch.ones(3, device=META), again=False).device == META
            return x

    model = Twice()
    attach(model, {"": META}, entries={"": META})
    assert model(torch.ones(2)).device == CPU


def test_what_is_there_already_passes_as_it_is(moves):
    class Passing(nn.Module):
        def forward(self, x):
            return x

    model = Passing()
    attach(model, {"": CPU}, entries={"": CPU})
    given = {"x": torch.ones(2), "n": 3}
    assert model(given) is given
    assert not moves


def test_gradients_come_back_through_what_was_moved(monkeypatch):
    for room in (device_hooks, nested_tensors):
        monkeypatch.setattr(room, "to_device", lambda tensor, device: tensor if device == CPU else tensor * 1)
    model = nn.Linear(2, 2)
    attach(model, {"": META}, entries={"": META})
    x = torch.ones(1, 2, requires_grad=True)
    model(x).sum().backward()
    assert torch.equal(x.grad, model.weight.sum(0, keepdim=True))
