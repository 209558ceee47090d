"""Optimizers of bitsandbytes and of torch, on adapters and on the main weights of int8 training."""

import copy
import pickle

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import empty
from comparisons import assert_same_bits, equal
from models import TOKENS, llama
from torch import nn
from transformers import Trainer, TrainingArguments

from bigload import BnbQuantizationConfig, QuantizationError, load_and_quantize_model, save_quantized_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

OPTIMIZERS = ("AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "Adam8bit", "PagedLion8bit", "AdEMAMix8bit")
EIGHT_BIT = [name for name in OPTIMIZERS if "8bit" in name]


def made(name, parameters):
    """One that keeps the states of small parameters in 8 bit too."""
    smallest = {"min_8bit_size": 64} if name in EIGHT_BIT else {}
    return getattr(bnb.optim, name)(parameters, lr=1e-2, **smallest)


def adapted(device):
    torch.manual_seed(0)
    model = load_and_quantize_model(llama(), "nf4", device_map=device)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))


def trained_in_int8(device, **fields):
    torch.manual_seed(0)
    config = BnbQuantizationConfig.from_mode("int8-training", torch_dtype="fp32", **fields)
    return load_and_quantize_model(llama(), config, device_map=device)


MODELS = {"adapters": adapted, "main weights": trained_in_int8}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_on_plain_parameters_of_the_same_values(name, kind, device):
    model = MODELS[kind](device).train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 4
    copies = {key: nn.Parameter(p.detach().clone().as_subclass(torch.Tensor)) for key, p in trained.items()}
    optimizers = made(name, trained.values()), made(name, copies.values())
    tokens, losses = TOKENS.to(device), []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        for key, parameter in trained.items():
            copies[key].grad = parameter.grad.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert not [key for key, p in trained.items() if not equal(copies[key], p)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3
    if name in EIGHT_BIT:
        held = [state["state1"].dtype for state in optimizers[0].state.values() if "state1" in state]
        assert torch.uint8 in held


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_optimizer_goes_on_as_it_would_have(name, device):
    model = adapted(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, tokens = made(name, trained), TOKENS.to(device)

    def step(one):
        model(input_ids=tokens, labels=tokens).loss.backward()
        one.step()
        one.zero_grad()

    step(optimizer)
    values, state = [p.detach().clone() for p in trained], copy.deepcopy(optimizer.state_dict())
    step(optimizer)
    expected = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for parameter, value in zip(trained, values, strict=True):
            parameter.copy_(value)
    again = made(name, trained)
    again.load_state_dict(state)
    step(again)
    assert all(equal(p.detach(), value) for p, value in zip(trained, expected, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["no gradients", "gradients of zeros"])
@pytest.mark.parametrize("write", ["optimizer", "in place", "data", "load_state_dict"])
def test_int8_training_computes_with_its_main_weights_as_they_are_now(write, set_to_none, training, device):
    """bitsandbytes keeps the rows of the weights before, in eval mode and while there is a gradient."""
    model = trained_in_int8(device).train()
    optimizer, tokens = torch.optim.SGD(model.parameters(), lr=1.0), TOKENS.to(device)
    model(input_ids=tokens, labels=tokens).loss.backward()
    before = model(tokens).logits.detach()
    weights = [m.weight for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    with torch.no_grad():
        if write == "optimizer":
            optimizer.step()
        for weight in weights if write in ("in place", "data") else ():
            (weight if write == "in place" else weight.data).mul_(1.5)
    if write == "load_state_dict":
        model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})
    optimizer.zero_grad(set_to_none=set_to_none)
    model.train(training)
    fresh = trained_in_int8(device).train(training)
    with torch.no_grad():
        for parameter, value in zip(fresh.parameters(), model.parameters(), strict=True):
            parameter.copy_(value)
        found = model(tokens).logits
        assert torch.equal(found, fresh(tokens).logits)
        assert not torch.equal(found, before)


DIVIDING = ("AdamW", "Adam", "NAdam", "RMSprop", "Adagrad", "Adamax")


@pytest.mark.parametrize("name", DIVIDING)
def test_an_optimizer_that_would_divide_by_zero_is_refused_before_its_step_and_both_remedies_work(name, device):
    model, tokens = trained_in_int8(device).train(), TOKENS.to(device)
    before = [p.detach().clone() for p in model.parameters()]
    model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(
        QuantizationError, match=rf"{name} would compute .* float16, in which its eps=.* is 0: use .* or"
    ):
        getattr(torch.optim, name)(model.parameters(), lr=1e-3).step()
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    for optimizer in (
        getattr(torch.optim, name)(model.parameters(), lr=1e-3, eps=1e-4),
        bnb.optim.AdamW8bit(model.parameters(), lr=1e-3),
    ):
        losses = []
        for _ in range(4):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]


def test_main_weights_that_are_given_to_an_optimizer_later_are_looked_at_too(device):
    """As fine-tuning does that thaws layers one after the other."""
    model = trained_in_int8(device)
    optimizer = torch.optim.AdamW([*model.model.norm.parameters()])
    optimizer.step()
    optimizer.add_param_group({"params": [model.model.layers[0].mlp.up_proj.weight]})
    with pytest.raises(QuantizationError, match=r"AdamW would compute .* float16, in which its eps=1e-08 is 0"):
        optimizer.step()


def test_optimizers_of_torch_on_adapters_and_plain_models_are_left_alone(device):
    trained_in_int8(device)
    for model in (adapted(device), nn.Linear(4, 4).to(device, torch.float16)):
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()


def trainer_of(model, optimizer, device, folder):
    sequences = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(6)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        optim=optimizer,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        use_cpu=device.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # with several it would make DataParallel of a model on one
    return Trainer(model=model, args=arguments, train_dataset=sequences)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_trainer_steps_by_an_optimizer_of_bitsandbytes_that_it_is_told_by_name(name, kind, device, tmp_path):
    trainer = trainer_of(MODELS[kind](device), name, device, tmp_path)
    assert type(trainer.create_optimizer()).__module__.startswith("bitsandbytes.")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_trainers_own_optimizer_is_refused_for_main_weights_and_what_it_saves_loads_again(device, tmp_path):
    trainer = trainer_of(trained_in_int8(device), "adamw_torch", device, tmp_path)
    with pytest.raises(QuantizationError, match="in Trainer optim='adamw_8bit'"):
        trainer.train()
    trainer = trainer_of(trained_in_int8(device), "adamw_8bit", device, tmp_path)
    trainer.train()
    save_quantized_model(trainer.model, tmp_path / "saved")
    again = load_and_quantize_model(empty(llama), None, tmp_path / "saved", device_map=device)
    assert_same_bits(again.state_dict(), trainer.model.state_dict())


def test_a_model_in_int8_training_is_copied_and_pickled_as_any_other(device):
    model = trained_in_int8(device)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made.hf_quantizer) is type(model.hf_quantizer)
        assert made.hf_quantizer.is_qat_trainable
        assert_same_bits(made.state_dict(), model.state_dict())
