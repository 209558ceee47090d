"""The memory of a GPU is asked for once."""

import gc

import torch

from bigload.hardware import allocation
from bigload.hardware.allocation import allocate, reserve


def test_gpu_is_asked_once_for_what_it_lacks_and_again_when_rubbish_is_collected(monkeypatch):
    asked, collected = [], []

    def empty(size, **options):
        asked.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(gc, "collect", lambda: collected.append(len(asked)))
    gpu = torch.device("cuda", 0)
    reserve(gpu, 200)
    assert asked == []
    reserve(gpu, 1000)
    assert asked == [800, 800]
    assert collected == [1]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    reserve(gpu, 1000)
    reserve(torch.device("cpu"), 1000)
    assert asked == [800, 800]


def test_systems_without_huge_pages_are_asked_for_none(monkeypatch):
    monkeypatch.setattr(allocation, "_madvise", allocation._madvise.__wrapped__)
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", None)
    made = allocate((2**23,), torch.uint8, torch.device("cpu"))
    assert made.shape == (2**23,)
    assert made.dtype == torch.uint8
