"""A stand-in for CUDA graphs on the CPU: it records the operators that are called, and a replay calls them again.

As with CUDA, nothing that a step writes during a capture remains, no Python runs in a replay, the tensors that were
given are read where they were, and to read a value on the host ends the capture. All that a graph computes is poisoned
before each replay, so that nothing of an earlier one can be read.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
READ_BY_HOST = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.equal.default, ATEN.item.default}


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for each in value for tensor in flat(each)]
    return []


def storage(tensor):
    return tensor.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.fresh, self.saved, self.kept = [], {}, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READ_BY_HOST:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = flat([*args, *kwargs.values()])
        self.kept += given
        known = {storage(tensor) for tensor in given}
        if func._schema.is_mutable:
            for tensor in given:
                if storage(tensor) not in self.fresh and storage(tensor) not in self.saved:
                    self.saved[storage(tensor)] = tensor, self.bytes_of(tensor).clone()
        out = func(*args, **kwargs)
        made = [tensor for tensor in flat(out) if storage(tensor) not in known]
        for tensor in made:
            self.fresh[storage(tensor)] = tensor
        self.calls.append((func, args, kwargs, made))
        return out

    @staticmethod
    def bytes_of(tensor):
        return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())

    def roll_back(self):
        for tensor, before in self.saved.values():
            self.bytes_of(tensor).copy_(before)

    def poison(self):
        for tensor in self.fresh.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            else:
                self.bytes_of(tensor).fill_(1 if tensor.dtype == torch.bool else 0x55)


class NoCopiesFromHost(TorchFunctionMode):
    """`torch.tensor` copies what it is given to the device, for which the host waits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.tensor and (kwargs or {}).get("device") is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


class RecordedGraph:
    def __init__(self, recorder, graphs):
        self.recorder, self.graphs = recorder, graphs

    def replay(self):
        self.graphs.replays += 1
        self.recorder.poison()
        for func, args, kwargs, made in self.recorder.calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif made:
                again = flat(func(*args, **kwargs))
                for old, new in zip(made, again, strict=True):
                    old.copy_(new)

    def reset(self):
        self.graphs.resets += 1
        self.recorder = None


class RecordedGraphs:
    """Takes the place of `bigload.decoding.graphs.CudaGraphs`."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.captures = self.replays = self.resets = self.warmed_up = 0
        self.fail = None

    @contextlib.contextmanager
    def warming_up(self):
        self.warmed_up += 1
        yield

    def capture(self, step):
        recorder = Recorder()
        try:
            with recorder, NoCopiesFromHost():
                out = step()
                if self.fail is not None:
                    raise self.fail
        finally:
            recorder.roll_back()
        recorder.poison()
        self.captures += 1
        return RecordedGraph(recorder, self), out

    def follow(self):
        pass

    def allocated(self):
        return 1000 * self.captures
