"""What the neighbours do with a model of which part rests elsewhere."""

from functools import partial

import pytest
import torch
from adapters import lora_losses
from checkpoints import empty, offloaded, save_checkpoint
from comparisons import outputs
from models import TOKENS, llama

from bigload import load_and_quantize_model

pytestmark = pytest.mark.usefixtures("small_parts_stream")

build = partial(llama, num_hidden_layers=3)


@pytest.fixture
def models(tmp_path, device):
    """Return a model that is wholly on the device, and one of which two blocks rest on the disk."""
    folder = save_checkpoint(build().bfloat16(), tmp_path / "source")
    away = ["model.layers.0", "model.layers.2"]
    whole = load_and_quantize_model(empty(build), "nf4", folder, device_map=device)
    part = offloaded(build, folder, device, away, tmp_path / "cache", home="disk")
    return whole.eval(), part.eval()


def test_trainer_and_accelerator_take_it_as_it_is(models, device):
    from accelerate import Accelerator

    whole, part = models
    expected = outputs(whole, TOKENS.to(device))
    prepared = Accelerator(cpu=device.type == "cpu").prepare_model(part, evaluation_mode=True)
    assert torch.equal(outputs(prepared, TOKENS.to(device)), expected)
    assert part.hf_device_map == whole.hf_device_map


def test_adapter_of_peft_that_was_saved_comes_onto_it(models, device, tmp_path):
    peft = pytest.importorskip("peft")
    whole, part = models
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(whole, config)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = outputs(adapted, TOKENS.to(device))
    found = peft.PeftModel.from_pretrained(part, tmp_path / "adapter")
    assert torch.equal(outputs(found, TOKENS.to(device)), expected)
    assert not any(parameter.is_meta for parameter in found.parameters())


def test_compiled_it_gives_what_it_gives(models, device):
    whole, part = models
    expected = outputs(whole, TOKENS.to(device))
    compiled = torch.compile(part, backend="eager")
    assert torch.equal(outputs(compiled, TOKENS.to(device)), expected)
    assert torch.equal(outputs(part, TOKENS.to(device)), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training_gives_the_same_losses(models, device, reentrant):
    peft = pytest.importorskip("peft")
    losses = []
    for model in models:
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        losses.append(lora_losses(model, TOKENS.to(device), 20))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
