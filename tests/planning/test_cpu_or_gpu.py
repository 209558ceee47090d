"""`execute="auto"`: the CPU computes what rests in host memory where that is sooner, and possible."""

import logging

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import GPT

from bigload import OffloadConfig, load_and_quantize_model, plan_device_map, quantize_checkpoint
from bigload.hardware.bandwidth import link_gb_per_s
from bigload.planning.placing import cpu_or_gpu

pytestmark = pytest.mark.usefixtures("small_parts_stream")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
AUTO = OffloadConfig(execute="auto")
MAP = {"": 0, "transformer.h.1": "cpu"}


def where(devices):
    return torch.device(devices.get("transformer.h.1", devices.get("")))


@pytest.fixture
def rates(monkeypatch):
    """Return what sets the rates, of the link and of the host, that a measurement would find."""
    return lambda *found: monkeypatch.setattr(
        "bigload.planning.placing.cpu_or_gpu._rates", lambda device: found or None
    )


@pytest.mark.parametrize(("link", "host", "device"), [(10, 20, GPU), (10, 200, CPU)])
def test_decided_by_what_must_be_moved_and_said_why(rates, logged, link, host, device):
    """In 4 bit a block is an eighth of what it is in float32, and its scales."""
    rates(link, host)
    with logged.at_level(logging.INFO, "bigload"):
        plan = plan_device_map(GPT().bfloat16(), "nf4", device_map=MAP, offload=AUTO)
    assert where(plan.execution_map) == device
    assert ("computed on the CPU" in logged.text) == (device == CPU)
    assert f"at {link:.1f} GB/s" in logged.text


def test_in_the_models_own_float32_the_faster_way_to_memory_wins(rates):
    plain = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "fp32"}
    for link, device in ((10, CPU), (30, GPU)):
        rates(link, 20)
        plan = plan_device_map(GPT(), plain, device_map=MAP, offload=AUTO)
        assert where(plan.execution_map) == device


def test_flag_that_says_it_is_not_second_guessed(monkeypatch):
    monkeypatch.setattr("bigload.planning.placing.cpu_or_gpu._rates", lambda device: pytest.fail("measured"))
    config = {"load_in_4bit": True, "llm_int8_enable_fp32_cpu_offload": True, "torch_dtype": "bf16"}
    plan = plan_device_map(GPT().bfloat16(), config, device_map=MAP, offload=AUTO)
    assert where(plan.execution_map) == CPU


def test_without_a_measurement_the_gpu_computes(rates):
    rates()
    plan = plan_device_map(GPT().bfloat16(), "nf4", device_map=MAP, offload=AUTO)
    assert where(plan.execution_map) == GPU


def test_float32_that_has_no_room_is_streamed(rates):
    rates(1, 1000)
    away = {"": 0} | {f"transformer.h.{n}": "cpu" for n in range(4)}
    streamed = plan_device_map(GPT(layers=4).bfloat16(), "nf4", device_map=away)
    enough = {account.place: account.needed for account in streamed.accounts}
    for spare in (0, 2**30):
        budgets = {GPU: enough[GPU], "cpu": enough[CPU] + spare}
        plan = plan_device_map(GPT(layers=4).bfloat16(), "nf4", max_memory=budgets, offload=AUTO)
        assert any(placed.device == CPU for placed in plan.units) == bool(spare)
        assert bool(plan.streamed_bytes) != bool(spare)


def test_what_is_stored_quantized_is_streamed(rates, tmp_path):
    rates(1, 1000)
    folder = save_checkpoint(GPT().bfloat16(), tmp_path / "source")
    quantize_checkpoint(folder, tmp_path / "made", "nf4", model=empty(GPT), device="cpu")
    plan = plan_device_map(empty(GPT), None, tmp_path / "made", device_map=MAP, offload=AUTO)
    assert where(plan.execution_map) == GPU


@pytest.mark.cuda
def test_loaded_it_runs_wherever_it_was_decided(tmp_path, rates):
    assert 1 < link_gb_per_s(GPU) < 1000
    folder = save_checkpoint(GPT().bfloat16(), tmp_path)
    for found, device in (((1000, 1), GPU), ((1, 1000), CPU)):
        rates(*found)
        model = load_and_quantize_model(empty(GPT), "nf4", folder, device_map=MAP, offload=AUTO).eval()
        assert where(model.hf_device_map) == device
        with torch.no_grad():
            assert model(torch.arange(8, device=GPU).view(1, -1)).isfinite().all()


@pytest.mark.parametrize(("number", "is_there"), [(0, True), (1, False)])
def test_link_is_measured_of_a_gpu_that_this_machine_has(number, is_there, monkeypatch):
    """A plan may be for another one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    measured = []
    monkeypatch.setattr(cpu_or_gpu, "link_gb_per_s", lambda device: measured.append(device) or 25.0)
    monkeypatch.setattr(cpu_or_gpu, "host_gb_per_s", lambda: 80.0)
    gpu = torch.device("cuda", number)
    assert cpu_or_gpu._rates(gpu) == ((25.0, 80.0) if is_there else None)
    assert measured == [gpu] * is_there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cpu_or_gpu._rates(gpu) is None
