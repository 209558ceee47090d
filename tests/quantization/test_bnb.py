"""bitsandbytes' own functions are called only where they are known, and on the right GPU."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch

from bigload.quantization import bnb


@pytest.mark.parametrize(("version", "is_called"), [("0.50.7", True), ("0.51.0", False), ("0.5.0", False)])
def test_functions_of_versions_that_were_not_looked_at_are_not_called(monkeypatch, version, is_called):
    """They would be given the wrong arguments."""

    class Native:
        compiled_with_cuda = True
        _lib = ctypes.CDLL(None)

    bnb._exported.cache_clear()
    monkeypatch.setattr(bnb.library().cextension, "lib", Native())
    monkeypatch.setattr(bnb.library(), "__version__", version)
    assert (bnb._exported("getpid", ()) is not None) == is_called
    bnb._exported.cache_clear()


@pytest.mark.parametrize("kernel", ["4 bit", "int8"])
@pytest.mark.parametrize("is_current", [False, True])
def test_functions_that_know_only_pointers_run_on_the_gpu_of_their_tensors(monkeypatch, kernel, is_current):
    """They launch on the current GPU, whose memory a tensor of another is not."""
    current, launched = [None], []

    @contextlib.contextmanager
    def entered(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    values = torch.zeros(2, 64)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: values.device.index if is_current else 7)
    monkeypatch.setattr(bnb, "_own_kernel", lambda *names: lambda *pointers: launched.append(current[0]))
    if kernel == "int8":
        bnb.quantize_int8_into(values, torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2))
    else:
        bnb.quantize_4bit_into(values.view(-1), 64, "nf4", torch.zeros(64, dtype=torch.uint8), torch.zeros(2))
    assert launched == [None if is_current else values.device]
    assert current == [None]
