"""Host memory of a group: aligned parts, just their size, each tensor its own, freed when nobody views it."""

import contextlib
import gc
import weakref

import pytest
import torch
from comparisons import equal
from streaming import PARTS, at_rest, parts_of

from bigload.hardware import pinned
from bigload.hardware.layout import ALIGNMENT, TensorSpec
from bigload.hardware.pinned import HostGroup


def filled():
    return {
        name: torch.randint(0, 256, (part.nbytes,), dtype=torch.uint8).view(part.dtype).view(part.shape)
        for name, part in PARTS.items()
    }


def test_copied_tensors_lie_in_the_source_where_the_layout_says(device):
    tensors = filled()
    group = at_rest({name: tensor.to(device) for name, tensor in tensors.items()}, device)
    assert group.source.numel() == group.layout.nbytes
    for name, tensor in tensors.items():
        assert equal(group.tensors[name], tensor)
        assert equal(group.source_of(name), tensor)
        assert group.tensors[name].data_ptr() % ALIGNMENT == 0
    assert group.is_pinned == (device.type == "cuda")
    assert parts_of(group.tensors) == PARTS


def test_what_is_written_to_a_part_is_in_the_source(device):
    group = HostGroup(PARTS, device)
    for name, tensor in filled().items():
        group.tensors[name].copy_(tensor)
        assert equal(group.source_of(name), tensor)


def test_each_part_has_a_storage_of_its_own(device):
    group = HostGroup(PARTS, device)
    for name, part in PARTS.items():
        assert group.tensors[name].untyped_storage().nbytes() == part.nbytes


def test_group_without_bytes_is_no_error(device):
    assert HostGroup({}, device).source.numel() == 0
    assert HostGroup({"none": TensorSpec(torch.float32, (0,))}, device).tensors["none"].shape == (0,)


def test_memory_is_freed_when_the_last_view_is_gone(device):
    group = HostGroup(PARTS, device)
    mapping = weakref.ref(group._mapping)
    view = group.tensors["scales"].fill_(3)
    group.release()
    gc.collect()
    assert mapping() is not None
    assert view.tolist() == [3] * 5
    assert not group.is_pinned
    del view
    gc.collect()
    assert mapping() is None


def test_made_under_inference_mode_it_can_be_trained_with(device):
    with torch.inference_mode():
        group = HostGroup(PARTS, device)
    assert not any(tensor.is_inference() for tensor in group.tensors.values())


@pytest.fixture
def driver(monkeypatch):
    """Stand in for a GPU's driver. Lists what it is asked for, and refuses to pin while it has an error to tell."""

    class Driver:
        def __init__(self):
            self.asked, self.errors = [], []

        def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
            self.asked.append(("register", address, nbytes, flags))
            return len(self.errors)

        def cudaHostUnregister(self, address):  # noqa: N802
            self.asked.append(("unregister", address))

        def check(self, code):
            if code:
                raise RuntimeError(self.errors[0])

        def zeros(self, *shape, device):
            assert device.type == "cuda"
            raise RuntimeError(self.errors.pop())

    made = Driver()
    monkeypatch.setattr(pinned, "_cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "check_error", made.check)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.asked.append(("wait", device)))
    monkeypatch.setattr(torch, "zeros", made.zeros)
    return made


@pytest.mark.parametrize("is_released", [True, False])
def test_memory_that_a_gpu_reads_is_pinned_until_it_is_released_or_freed(driver, is_released):
    gpu = torch.device("cuda", 0)
    group = HostGroup(PARTS, gpu)
    address = group.source.data_ptr()
    assert group.is_pinned
    assert driver.asked == [("register", address, group.layout.nbytes, 1)]  # for every GPU
    if is_released:
        group.release()
        assert not group.is_pinned
    del group
    gc.collect()
    assert driver.asked[1:] == [("wait", gpu), ("unregister", address)]  # once, and when no copy reads it


def test_memory_that_the_driver_does_not_pin_is_pageable_and_its_error_is_taken_from_it(driver, monkeypatch, logged):
    monkeypatch.setattr(pinned, "_has_warned", False)
    gpu = torch.device("cuda", 0)
    for _ in range(2):
        driver.errors.append("refused")
        group = at_rest(filled(), gpu)
        assert not group.is_pinned
        assert not driver.errors  # else the next launch would fail
        group.release()
    assert len(logged.records) == 1
    assert "cannot be pinned" in logged.text
    assert not any(asked[0] == "unregister" for asked in driver.asked)


def test_no_memory_is_not_pinned(driver):
    assert not HostGroup({}, torch.device("cuda", 0)).is_pinned
    assert not driver.asked


@pytest.mark.cuda
def test_memory_that_cannot_be_pinned_is_pageable_right_and_warned_of_once(monkeypatch, logged):
    gpu = torch.device("cuda", 0)

    class Refusing:
        def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
            return torch.cuda.cudart().cudaHostRegister(0, nbytes, flags)  # an error that CUDA itself keeps

    monkeypatch.setattr(pinned, "_cudart", Refusing)
    monkeypatch.setattr(pinned, "_has_warned", False)
    for _ in range(2):
        group = at_rest(filled(), gpu)
        assert not group.is_pinned
        assert torch.ones(3, device=gpu).sum().item() == 3  # the error is forgotten
        assert equal(group.source.to(gpu).cpu(), group.source)
    assert len(logged.records) == 1
    assert "cannot be pinned" in logged.text


@pytest.mark.parametrize(
    ("can_be_pinned", "at_least", "found"),
    [
        (100, None, (100, True)),
        (100, 30, (100, True)),
        (60, 30, (50, True)),
        (25, 25, (25, True)),
        (24, 25, (100, False)),
        (60, None, (100, False)),
        (0, 0, (100, False)),
    ],
)
def test_memory_is_pinned_as_far_as_the_system_allows(monkeypatch, logged, can_be_pinned, at_least, found):
    own, tried = torch.empty, []

    def empty(nbytes, *, dtype, device=None, pin_memory=False):
        if pin_memory:
            tried.append(nbytes)
            if nbytes > can_be_pinned:
                raise RuntimeError("CUDA error: out of memory")
        return own(nbytes, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(pinned, "_has_warned", False)
    made = [pinned.pinned_memory(100, at_least) for _ in range(2)]
    is_pinned = tried[-1] <= can_be_pinned
    assert [(len(memory), memory.dtype, is_pinned) for memory in made] == [(found[0], torch.uint8, found[1])] * 2
    assert len(logged.records) == (0 if is_pinned else 1)


def test_no_memory_that_cannot_be_pinned_is_none(monkeypatch):
    def refusing(nbytes, *, dtype, device=None, pin_memory=False):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return own(nbytes, dtype=dtype)

    own = torch.empty
    monkeypatch.setattr(torch, "empty", refusing)
    assert pinned.pinned_memory(0).shape == (0,)
