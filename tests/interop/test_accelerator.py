"""accelerate's Accelerator takes a loaded model with its optimizer and data, in this process and in one it launches."""

from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from checkpoints import empty, offloaded, save_checkpoint
from comparisons import equal
from models import llama
from torch.utils.data import DataLoader

from bigload import OffloadError, load_and_quantize_model, plan_device_map

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("small_parts_stream"), pytest.mark.filterwarnings("ignore")]

MODES = ("nf4", "int8")
build = partial(llama, num_hidden_layers=3)
SEQUENCES = [torch.arange(i, i + 8) for i in range(3, 11)]
PLACES = [("cpu", "resident"), ("cpu", "disk")]
PLACES += [pytest.param("cuda:0", place, marks=pytest.mark.cuda) for place in ("resident", "disk", "cpu")]
PLACES += [pytest.param("cuda:0", "two", marks=[pytest.mark.cuda, pytest.mark.multi_gpu])]


@pytest.fixture(autouse=True)
def fresh_state():
    """It lives in the class, for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def load(tmp_path):
    torch.manual_seed(0)
    source = save_checkpoint(build(), tmp_path / "source")

    def loaded(place, mode, device):
        if place == "resident":
            model = load_and_quantize_model(empty(build), mode, source, device_map={"": device})
        elif place == "two":
            plan = plan_device_map(empty(build), mode, source, {"": device})
            budget = sum(plan.device_bytes.values()) * 3 // 4 + plan.accounts[0].reserve
            budgets = dict.fromkeys((0, 1), budget)
            model = load_and_quantize_model(empty(build), mode, source, device_map="balanced", max_memory=budgets)
        else:
            model = offloaded(
                build, source, device, ["model.layers.0", "model.layers.2"], tmp_path / "cache", mode, place
            )
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))

    return loaded


def trained(model, device, mixed_precision="no"):
    """Train by Accelerator's own steps. Returns the losses, the adapters, and what was prepared."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    given = model, optimizer, DataLoader(SEQUENCES, batch_size=2), torch.optim.lr_scheduler.LinearLR(optimizer)
    model, optimizer, batches, schedule = accelerator.prepare(*given)
    losses = []
    for _ in range(2):
        for tokens in batches:
            assert tokens.device == device
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    own = accelerator.unwrap_model(model)
    return losses, {name: p.detach().cpu() for name, p in own.named_parameters() if "lora_" in name}, accelerator


def by_hand(model, device):
    """Train as Accelerator does, without it."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-2), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    for number, tokens in enumerate(2 * list(DataLoader(SEQUENCES, batch_size=2)), 1):
        loss = model.train()(input_ids=tokens.to(device), labels=tokens.to(device)).loss
        (loss / 2).backward()
        losses.append(loss.item())
        if number % 2 == 0:
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(("kind", "place"), PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_prepared_it_trains_as_a_loop_by_hand_and_as_the_resident_one(load, kind, mode, place):
    device = torch.device(kind)
    model = load(place, mode, device).train()
    before = model.get_base_model().hf_device_map
    losses, adapters, accelerator = trained(model, device)
    assert accelerator.unwrap_model(model) is model
    assert model.get_base_model().hf_device_map == before
    assert losses[4] < losses[0]  # the same sequences
    expected, others, _ = trained(load("resident", mode, device).train(), device)
    assert losses == expected == by_hand(load("resident", mode, device), device)
    assert all(equal(adapters[name], value) for name, value in others.items())


@pytest.mark.parametrize("mode", MODES)
def test_mixed_precision_trains_it(load, device, mode):
    found, _, _ = trained(load("resident", mode, device), device, "bf16")
    expected, _, _ = trained(load("resident", mode, device), device)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    assert found[4] < found[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_state_that_it_saves_comes_back_after_forwards(load, device, mode, tmp_path):
    """In int8 bitsandbytes refuses the scales of a model that has run."""
    model = load("resident", mode, device)
    _, adapters, accelerator = trained(model, device)
    with torch.no_grad():
        expected = model.eval()(SEQUENCES[0][None].to(device)).logits
        accelerator.save_state(tmp_path / "state")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
        assert not equal(model(SEQUENCES[0][None].to(device)).logits, expected)
        accelerator.load_state(tmp_path / "state")
        assert equal(model(SEQUENCES[0][None].to(device)).logits, expected)
    assert all(equal(p.cpu(), adapters[name]) for name, p in model.named_parameters() if "lora_" in name)


def test_a_state_is_not_loaded_into_files_and_the_remedy_works(load, device, tmp_path):
    model = load("disk", "nf4", device)
    _, _, accelerator = trained(model, device)
    accelerator.save_state(tmp_path / "state")
    with pytest.raises(OffloadError, match=r"are in files, .*call model\.offload\.remove\(\) first"):
        accelerator.load_state(tmp_path / "state")
    model.get_base_model().offload.remove()
    accelerator.load_state(tmp_path / "state")


LAUNCH = """
import os, sys
from accelerate.commands.launch import main
os.environ["PYTHONPATH"] = os.pathsep.join([{helpers!r}, os.environ["PYTHONPATH"]])
sys.argv = {words!r}
main()
"""


def test_accelerate_launch_runs_a_script_that_loads_and_trains(tmp_path, programs):
    script = tmp_path / "train.py"
    script.write_text(
        """
import sys
import peft, torch
from accelerate import Accelerator
from models import llama
from bigload import load_and_quantize_model

accelerator = Accelerator()
torch.manual_seed(0)
model = load_and_quantize_model(llama(), "nf4", device_map={"": accelerator.device})
model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
data = torch.utils.data.DataLoader([torch.arange(i, i + 8) for i in range(8)], batch_size=2)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
for tokens in data:
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
assert accelerator.state.num_processes == 1, accelerator.state
print("loss", loss.item(), file=open(sys.argv[1], "w"))
"""
    )
    helpers = str(Path(__file__).parents[1] / "helpers")
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    words = ["accelerate launch", *options, "--dynamo_backend", "no", str(script), str(tmp_path / "out")]
    programs.run(LAUNCH.format(words=words, helpers=helpers), tmp_path)
    assert float((tmp_path / "out").read_text().split()[1]) < 4.97
