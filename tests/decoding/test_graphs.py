"""CUDA graphs, with a CUDA that only notes what it is asked: in which order, and what follows a failure."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bigload.decoding import graphs
from bigload.decoding.graphs import CudaGraphs, graphs_on


class Stream:
    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def wait_stream(self, other):
        self.seen.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.seen.append(f"host waits for {self.name}")


@pytest.fixture
def cuda(monkeypatch):
    """What the host does with CUDA, in order; `fails` names the methods of a graph that raise."""
    seen, state = [], SimpleNamespace(fails=set(), pools=0, current=None)
    state.seen, state.current = seen, Stream("default", seen)

    class Graph:
        def __init__(self):
            self.is_whole = False

        def do(self, name):
            seen.append(name)
            if name in state.fails:
                raise RuntimeError(name)

        def capture_begin(self, pool, capture_error_mode):
            assert capture_error_mode == "thread_local"
            self.do(f"begin in pool {pool}")

        def capture_end(self):
            self.do("end")
            self.is_whole = True

        def pool(self):
            if not self.is_whole:
                raise RuntimeError("no pool")

        def reset(self):
            self.do("reset")

        def replay(self):
            self.do("replay")

    @contextlib.contextmanager
    def on(stream):
        before, state.current = state.current, stream
        try:
            yield
        finally:
            state.current = before

    def handle():
        state.pools += 1
        return state.pools

    monkeypatch.setattr(graphs, "_failed", [])
    for name, value in {
        "CUDAGraph": Graph,
        "graph_pool_handle": handle,
        "synchronize": lambda device: seen.append("synchronize"),
        "stream": on,
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda device: Stream("side", seen),
        "current_stream": lambda device: state.current,
        "current_device": lambda: 0,
        "memory_reserved": lambda device: 123,
        "default_generators": [],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: seen.append(f"{name}{given}"), raising=False)
    return state


def test_a_step_is_warmed_up_and_captured_on_a_stream_of_its_own(cuda):
    own = CudaGraphs(torch.device("cuda", 0))
    with own.warming_up():
        assert cuda.current.name == "side"
    assert cuda.seen == ["side waits for default", "default waits for side"]
    cuda.seen.clear()
    graph, out = own.capture(lambda: cuda.current.name)
    assert out == "side"
    assert cuda.current.name == "default"
    assert cuda.seen == ["synchronize", "begin in pool 1", "end"]
    other, _ = own.capture(lambda: None)  # in the same pool
    graph.reset()
    other.reset()
    third, _ = own.capture(lambda: None)  # in a new one, as nothing keeps the first
    assert [each for each in cuda.seen if each.startswith("begin")] == [
        "begin in pool 1",
        "begin in pool 1",
        "begin in pool 2",
    ]
    third.replay()
    assert cuda.seen[-1] == "replay"
    assert own.allocated() == 123


def test_replays_follow_each_other_over_streams(cuda):
    own = CudaGraphs(torch.device("cuda", 0))
    own.follow()
    own.follow()
    assert cuda.seen == []
    first = cuda.current
    cuda.current = Stream("other", cuda.seen)
    own.follow()
    assert cuda.seen == ["other waits for default"]
    assert first is not cuda.current
    graph, _ = own.capture(lambda: None)
    graph.reset()
    assert cuda.seen[-2:] == ["host waits for other", "reset"]


@pytest.mark.parametrize("error", [RuntimeError("a wait"), torch.OutOfMemoryError("none"), KeyboardInterrupt()])
@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_fails_is_ended_whatever_torch_leaves_of_it(error, ends, cuda):
    own = CudaGraphs(torch.device("cuda", 0))

    def step():
        raise error

    cuda.fails = set() if ends else {"end"}
    with pytest.raises(type(error)):
        own.capture(step)
    assert cuda.current.name == "default"
    released = ["_cuda_endAllocateToPool(0, 1)", "_cuda_releasePool(0, 1)"]
    assert [each for each in cuda.seen if "Pool" in each] == ([] if ends else released)
    assert cuda.seen.count("end") == 1
    assert "reset" in cuda.seen
    assert len(graphs._failed) == (not ends)
    cuda.fails = set()
    own.capture(lambda: None)
    assert cuda.seen[-2:] == ["begin in pool 2", "end"]


def test_a_capture_that_fails_at_its_end(cuda):
    own = CudaGraphs(torch.device("cuda", 0))
    cuda.fails = {"end"}
    with pytest.raises(RuntimeError, match="end"):
        own.capture(lambda: None)
    assert cuda.current.name == "default"
    assert len(graphs._failed) == 1


def test_a_generator_that_goes_on_capturing_is_exchanged(cuda, monkeypatch):
    did = []
    generator = SimpleNamespace(
        get_state=lambda: "before",
        set_state=did.append,
        clone_state=lambda: "clone",
        graphsafe_set_state=did.append,
    )
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])

    def empty(*size, device):
        def uniform(generator):
            if not did:
                raise RuntimeError("Offset increment outside graph capture")

        return SimpleNamespace(uniform_=uniform)

    monkeypatch.setattr(torch, "empty", empty)
    graphs._revive_generator(0)
    assert did == ["clone", "before"]
    graphs._revive_generator(0)
    assert did == ["clone", "before", "before"]
    graphs._revive_generator(1)  # there is none


def test_graphs_are_on_gpus_of_nvidia(monkeypatch):
    assert graphs_on(torch.device("cpu")) is None
    assert isinstance(graphs_on(torch.device("cuda", 0)), CudaGraphs)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert graphs_on(torch.device("cuda", 0)) is None


@pytest.mark.cuda
def test_random_numbers_and_memory_after_a_capture_that_failed():
    device = torch.device("cuda", 0)
    own, x = CudaGraphs(device), torch.ones(4, device=device)
    torch.cuda.manual_seed(0)
    expected = torch.rand(3, device=device)
    torch.cuda.manual_seed(0)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            own.capture(lambda: (x * 2).sum().item())
    assert torch.equal(torch.rand(3, device=device), expected)
    torch.cuda.empty_cache()
    graph, out = own.capture(lambda: x * 2)
    x.fill_(5)
    graph.replay()
    assert out.tolist() == [10.0] * 4
    graph.reset()
    del out
    torch.cuda.empty_cache()
