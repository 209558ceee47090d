"""Offloaded models that are moved or cast: weights at rest stay there, or nothing changes at all."""

import copy
import pickle

import pytest
import torch
from checkpoints import PLAIN, offloaded, save_checkpoint
from comparisons import identity_of, outputs
from models import GPT, TOKENS, llama

from bigload import OffloadError

pytestmark = pytest.mark.usefixtures("small_parts_stream")

AWAY = ["transformer.wte", "transformer.h.0"]


@pytest.fixture
def loaded(tmp_path, device):
    """Return a function that loads a model of which the embedding and the first block rest elsewhere."""

    def loading(build=GPT, away=AWAY, mode=PLAIN):
        folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
        return offloaded(build, folder, device, away, tmp_path / "cache", mode).eval()

    return loading


@pytest.mark.parametrize("mode", [PLAIN, "nf4", "int8"], ids=["plain", "nf4", "int8"])
def test_what_is_where_it_computes_already_stays_as_it_is(loaded, device, mode):
    model = loaded(mode=mode)
    expected, before = outputs(model, TOKENS.to(device)), identity_of(model)
    assert model.to(device) is model
    assert model.to(torch.bfloat16) is model
    model.to(device, torch.bfloat16, non_blocking=True)
    model.to(torch.empty(1, device=device, dtype=torch.bfloat16))
    model.bfloat16()
    model.transformer["h"][0].mlp["c_fc"].to(device)
    getattr(model, device.type)()
    assert identity_of(model) == before
    assert torch.equal(outputs(model, TOKENS.to(device)), expected)


REFUSED = {
    "to meta": lambda model: model.to("meta"),
    "to float32": lambda model: model.to(torch.float32),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "emptied": lambda model: model.to_empty(device="meta"),
    "a block": lambda model: model.transformer["h"][0].to("meta"),
    "all blocks": lambda model: model.transformer["h"].half(),
    "an embedding": lambda model: model.transformer["wte"].to("meta"),
    "a layer": lambda model: model.transformer["h"][0].mlp["c_fc"].to("meta"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_would_change_a_weight_at_rest_is_refused_before_anything_moved(loaded, device, call):
    model = loaded()
    expected, before = outputs(model, TOKENS.to(device)), identity_of(model)
    with pytest.raises(OffloadError, match=r"'transformer\.(wte|h\.0\..*)' .*model\.offload\.remove\(\)"):
        REFUSED[call](model)
    assert identity_of(model) == before
    assert torch.equal(outputs(model, TOKENS.to(device)), expected)
    model.offload.remove()
    REFUSED[call](model)
    changed = {tensor.dtype for tensor in model.parameters()} | {tensor.device for tensor in model.parameters()}
    assert changed - {torch.bfloat16, device}


@pytest.mark.cuda
def test_cpu_is_refused_by_what_a_gpu_computes(loaded, device):
    model = loaded()
    if device.type == "cpu":
        pytest.skip("the CPU computes it")
    for call in (model.cpu, lambda: model.to("cpu"), model.transformer["h"][0].cpu):
        with pytest.raises(OffloadError, match="cannot be moved to cpu"):
            call()
    assert torch.equal(outputs(model, TOKENS.to(device)), outputs(model.cuda(), TOKENS.to(device)))


def test_what_rests_nowhere_else_may_be_changed_by_itself(loaded, device):
    model = loaded()
    model.transformer["h"][1].float()
    assert {parameter.dtype for parameter in model.transformer["h"][1].parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.transformer["h"][0].parameters()} == {torch.bfloat16}


def test_casts_leave_packed_weights_alone_as_those_of_a_whole_model(loaded, device):
    model = loaded(away=AWAY[1:], mode="nf4")
    layer = model.transformer["h"][0].mlp["c_fc"]
    before = layer.weight.data_ptr()
    model.half()
    assert (layer.weight.dtype, layer.weight.data_ptr()) == (torch.uint8, before)
    assert layer.bias.dtype == model.transformer["h"][0].ln_1.weight.dtype == torch.float16
    assert outputs(model, TOKENS.to(device)).dtype == torch.float16


@pytest.mark.parametrize("flag", ["overwrite", "swap"])
def test_parameters_at_rest_keep_their_identity_however_torch_exchanges_others(loaded, device, flag):
    model = loaded()
    expected, before = outputs(model, TOKENS.to(device)), dict(model.named_parameters())
    setting = getattr(torch.__future__, f"set_{flag}_module_params_on_conversion")
    setting(True)
    try:
        model.to(device)
    finally:
        setting(False)
    held = dict(model.named_parameters())
    assert list(held) == list(before)
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"):
        assert held[name] is before[name]
    assert torch.equal(outputs(model, TOKENS.to(device)), expected)


def test_adapters_beside_a_layer_at_rest_are_moved(loaded, device):
    peft = pytest.importorskip("peft")
    model = loaded(llama, ["model.embed_tokens", "model.layers.0"], "nf4")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    projection = model.model.layers[0].self_attn.q_proj
    before = projection.base_layer.weight.data_ptr()
    adapted.to(device)
    assert {parameter.device for parameter in projection.lora_A.parameters()} == {device}
    assert projection.base_layer.weight.data_ptr() == before
    with pytest.raises(OffloadError, match=r"q_proj"):
        projection.to("meta")
    with pytest.raises(OffloadError, match=r"remove\(\)"):
        adapted.to("meta")
    assert {parameter.device for parameter in projection.lora_A.parameters()} == {device}


def test_own_methods_come_back_and_do_not_show(loaded):
    model = loaded()
    assert list(model.state_dict()) == list(GPT().state_dict())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(OffloadError, match=r"remove\(\)"):
            copied(model)
    assert any("_apply" in vars(module) for module in model.modules())
    model.offload.remove()
    assert not any("_apply" in vars(module) for module in model.modules())
    assert copy.deepcopy(model).float().lm_head.weight.dtype == torch.float32


def test_load_that_is_interrupted_leaves_own_methods(loaded, monkeypatch):
    from bigload.offload import model_device

    model, own, calls = None, model_device._ApplyGuard.__init__, []

    def interrupted(self, module, leaves):
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt
        own(self, module, leaves)

    def build():
        nonlocal model
        model = GPT()
        return model

    monkeypatch.setattr(model_device._ApplyGuard, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loaded(build)
    assert len(calls) == 3
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any("_apply" in vars(module) for module in model.modules())


def where(model):
    return [(id(parameter), parameter.data_ptr(), parameter.device) for parameter in model.parameters()]


@pytest.mark.parametrize("mode", [PLAIN, "nf4", "int8"], ids=["plain", "nf4", "int8"])
def test_accelerator_prepares_it_as_it_is(loaded, device, mode):
    accelerate = pytest.importorskip("accelerate")
    model = loaded(llama, ["model.embed_tokens", "model.layers.0", "lm_head"], mode)
    expected, before = outputs(model, TOKENS.to(device)), where(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.model.norm.weight)
    optimizer = torch.optim.SGD([model.model.norm.weight], lr=0.1)
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu")
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert where(model) == before
    assert torch.equal(outputs(prepared, TOKENS.to(device)), expected)
    accelerator.backward(prepared(TOKENS.to(device)).logits.float().sum())
    optimizer.step()
    assert not torch.equal(outputs(prepared, TOKENS.to(device)), expected)


CASTS = {
    "type": lambda model: model.type(torch.float16),
    "apply": lambda model: model.apply(lambda module: module.half() if not list(module.children()) else None),
    "to like another": lambda model: model.to(torch.empty(1, dtype=torch.float64)),
    "to all at once": lambda model: model.to(
        dtype=torch.float16, non_blocking=True, memory_format=torch.preserve_format
    ),
    "a part by _apply": lambda model: model.transformer["h"][0]._apply(lambda tensor: tensor.half()),
    "by a layer around it": lambda model: torch.nn.Sequential(model).half(),
    "by a module": lambda model: torch.nn.Module.to(model, torch.float64),
}


@pytest.mark.parametrize("call", CASTS)
def test_casts_of_every_kind_are_refused(loaded, device, call):
    model = loaded()
    expected = outputs(model, TOKENS.to(device))
    with pytest.raises(OffloadError, match=r"cannot be (cast|moved) to .*model\.offload\.remove\(\)"):
        CASTS[call](model)
    if call not in ("apply", "by a layer around it"):  # these begin with parts that rest nowhere else
        assert torch.equal(outputs(model, TOKENS.to(device)), expected)
