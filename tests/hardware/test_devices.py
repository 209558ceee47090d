"""Devices in every spelling."""

import pytest
import torch

from bigload.errors import PlacementError
from bigload.hardware.devices import as_device, as_place, default_device

CPU = torch.device("cpu")


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


def test_a_plan_may_name_devices_that_are_not_here(no_gpu):
    assert as_device(3, must_exist=False) == torch.device("cuda", 3)
    assert as_device("cuda", must_exist=False) == torch.device("cuda", 0)
    with pytest.raises(PlacementError, match="device"):
        as_device("gpu", must_exist=False)


def test_disk_is_a_place_and_no_device():
    assert as_place("disk") == "disk"
    assert as_place("cpu") == CPU
    with pytest.raises(PlacementError, match="device"):
        as_device("disk")
