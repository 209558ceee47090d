"""PEFT trains, saves and merges adapters on a loaded model, whatever ran before."""

import pytest
import torch
from comparisons import outputs, relative_error, state_of
from models import GPT, llama
from references import FOUR_BIT
from torch import nn

from bigload import load_and_quantize_model

peft = pytest.importorskip("peft")

MODES = ("nf4", "nf4-dq", "int8")
BUILDS = {"plain": GPT, "llama": lambda: llama(False)}
TARGETS = {"plain": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj"]}

pytestmark = pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning")


@pytest.fixture(params=BUILDS)
def name(request):
    return request.param


def loaded(name, mode):
    """The same weights each time."""
    torch.manual_seed(1)
    return load_and_quantize_model(BUILDS[name](), mode, device_map="cpu")


def adapted(model, name, started=False):
    """LoRA on some of the model's layers, the same each time.

    Args:
        started: as if trained already: an adapter's second matrix is zero before that.
    """
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=TARGETS[name], init_lora_weights=not started)
    return peft.get_peft_model(model, config)


def tokens():
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(3))


def logits(model):
    found = model(tokens())
    return getattr(found, "logits", found)


def evaluated(model):
    """Logits of an eval forward, the one that bitsandbytes packs 4-bit weights at on an AVX512-BF16 CPU."""
    return outputs(model.eval(), tokens())


def loss_of(model):
    return nn.functional.cross_entropy(logits(model).float().flatten(0, 1), tokens().flatten())


def is_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", MODES)
def test_lora_chooses_its_bitsandbytes_layers_and_training_changes_nothing_else(name, mode):
    model = adapted(loaded(name, mode), name)
    expected = peft.tuners.lora.Linear4bit if mode in FOUR_BIT else peft.tuners.lora.Linear8bitLt
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 4
    assert {type(layer) for layer in layers} == {expected}

    before = state_of(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model.train())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in before if "lora_" in key}


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_a_model_that_never_ran_an_eval_forward(name, mode):
    gradients = []
    for runs_before in (True, False):
        model = loaded(name, mode)
        if runs_before:
            evaluated(model)
        model = adapted(model, name, started=True)
        if runs_before:
            evaluated(model)
        loss_of(model.train()).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    assert is_equal(*gradients)


@pytest.mark.parametrize("mode", MODES)
def test_merge_after_an_eval_forward_is_the_merge_without_one(name, mode):
    ran, fresh = (adapted(loaded(name, mode), name, started=True) for _ in range(2))
    plain = evaluated(loaded(name, mode))
    unmerged = evaluated(ran)
    ran, fresh = ran.merge_and_unload(), fresh.merge_and_unload()
    assert is_equal(ran.state_dict(), fresh.state_dict())
    assert not is_equal(ran.state_dict(), loaded(name, mode).state_dict())
    merged = evaluated(ran)
    assert torch.equal(merged, evaluated(fresh))
    # Merging rounds to the format again. A merge that forgot the adapter would be as far off as the plain model is.
    assert relative_error(merged, unmerged) < (0.1 if mode in FOUR_BIT else 0.02)
    assert relative_error(plain, unmerged) > 0.25


@pytest.mark.parametrize("mode", MODES)
def test_model_prepared_for_training_trains_with_checkpointed_activations(mode):
    gradients = []
    for prepares in (True, False):
        model = loaded("llama", mode)
        if prepares:
            evaluated(model)
            model = peft.prepare_model_for_kbit_training(model)
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert is_equal(state_of(model), state_of(loaded("llama", mode)))
        model = adapted(model, "llama", started=True)
        loss_of(model.train()).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if "lora_" in key})
    assert is_equal(*gradients)


@pytest.mark.parametrize("mode", MODES)
def test_plain_module_is_prepared_for_training_without_checkpointing(mode):
    model = loaded("plain", mode)
    before = state_of(model)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert is_equal(state_of(model), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_saved_adapter_goes_onto_a_model_loaded_again(tmp_path, name, mode):
    model = adapted(loaded(name, mode), name, started=True)
    expected = evaluated(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(loaded(name, mode), tmp_path)
    assert torch.equal(evaluated(again), expected)
