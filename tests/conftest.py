"""Fixtures that the tests of all wings share, how many processes and threads they run with, and which of them run here.

All tests run in one process for each core and one more, since some wait for others; those of a file that is named, in
one process (pytest-xdist's `-n` overrules both).

torch computes with one thread here, unless OMP_NUM_THREADS says how many. The models are so small that more threads
save no time, and on busy cores each product waits for the last of them: the tests took ten times as long. With torch's
own number run the tests that ask for `usual_threads`, those of the kernels that divide work among threads, and all that
starts another process.
"""

import gc
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from children import ForkServer, Programs
from hypothesis import HealthCheck, settings
from logged import Logged
from packaging.version import Version
from resources import open_files

# On a busy machine any example may take its time.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# What a user may have set, and each test sets for itself if it needs it.
SETTINGS = ("COLUMNS", "BIGLOAD_THREADS", "BIGLOAD_RING_BYTES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
LEFT_OUT = pytest.StashKey[int]()
IMPORTED = pytest.StashKey[int]()
SERVER = pytest.StashKey[ForkServer]()

# torch.compile would start a process for each core, which imports torch, to compile a few lines.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
USUAL_THREADS = torch.get_num_threads()
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)


# A shell has what it starts in the background ignore Ctrl-C, and so would the processes of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Dynamo of torch 2.11 can crash the process when a module is freed that it has compiled. 2.12 has it set so.
if Version(torch.__version__) < Version("2.12"):
    import torch._dynamo.config

    if hasattr(torch._dynamo.config, "use_recursive_dict_tags_for_guards"):
        torch._dynamo.config.use_recursive_dict_tags_for_guards = False


MOST_PROCESSES = 8  # each takes over 1 GB


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Run a file or test that is named in this process, where a debugger reaches it and it begins at once."""
    is_all = all(Path(argument).is_dir() for argument in config.args)
    return min(len(os.sched_getaffinity(0)) + 1, MOST_PROCESSES) if is_all else 0


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take over what a process tells at its end."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(trylast=True)  # of what -m and -k have left
def pytest_collection_modifyitems(config, items):
    """Leave out what needs more GPUs than there are, all at once: skipped, each would have a line of its own.

    Begin with what is slow, so that no process ends with it while the others have nothing left to do.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    left_out = [item for item in items if gpus_needed(item) > gpus]
    config.stash[LEFT_OUT] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if gpus_needed(item) <= gpus]


def gpus_needed(item):
    if item.get_closest_marker("multi_gpu"):
        return 2
    return 1 if item.get_closest_marker("cuda") else 0


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash.get(LEFT_OUT, 0)
    if count:
        terminalreporter.write_line(f"left out (deselected), for want of a GPU or of a second one: {count}")


def spare_the_collector():
    """Spare the collector of cycles what was imported, half a million objects, each time that it runs.

    And let it run for every 10,000 new objects, instead of 700.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Let it rest until then: what is imported stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish(session):
    spare_the_collector()
    session.config.stash[IMPORTED] = len(sys.modules)


def pytest_runtest_teardown(item, nextitem):
    """Do it again for what a test has imported: libraries import most of what they are when it is first used."""
    if len(sys.modules) > item.config.stash[IMPORTED] + 50:
        spare_the_collector()
        item.config.stash[IMPORTED] = len(sys.modules)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Each test that asks for it runs on the CPU, and on a GPU where there is one."""
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(autouse=True, scope="session")
def benchmarks_importable():
    """`benchmarks` lies beside the package, and `pytest` alone does not look where it is started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1])])
        yield


@pytest.fixture(autouse=True, scope="session")
def usual_settings():
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_seeds_for_later():
    """For each kind of device that is not there, torch.manual_seed notes the seed and the whole stack: in 2 ms."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            if not kind.is_available():
                patch.setattr(kind, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(autouse=True)
def seeded(no_seeds_for_later):
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_file_stays_open():
    """Fail where a test leaves a file open. A thread that reads ahead closes it soon, the collector what is let go."""
    before = _open_on_disk()
    yield
    until = time.monotonic() + 60
    while left := _open_on_disk() - before:
        assert time.monotonic() < until, f"left open: {left}"
        gc.collect()
        time.sleep(0.01)


def _open_on_disk():
    """Return what is open of temporary files: libraries keep files and logs of their own open, which may lie there."""
    home = Path(tempfile.gettempdir())
    found = {path for _, path in open_files() if path.startswith(f"{home}/") and not path.startswith(f"{sys.prefix}/")}
    return {path for path in found if not path.endswith(".log") or Path(path).parent != home}


@pytest.fixture(autouse=True, scope="session")
def quiet_bitsandbytes():
    """It warns at every int8 forward of another dtype than float16."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def programs(pytestconfig):
    """Programs in processes that have done nothing yet, and reach no hub."""
    given = getattr(pytestconfig, "workerinput", {})
    return Programs(given["fork_server"] if "fork_server" in given else fork_server(pytestconfig))


def fork_server(config):
    """Return the address of the one process from which all programs are forked."""
    if SERVER not in config.stash:
        config.stash[SERVER] = ForkServer(SETTINGS)
        config.add_cleanup(config.stash[SERVER].close)
    return config.stash[SERVER].address


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tell a process of the tests what it shares with the others."""
    node.workerinput["fork_server"] = fork_server(node.config)


@pytest.fixture
def usual_threads():
    """Let torch compute with as many threads as it takes by itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(USUAL_THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_parts_stream(monkeypatch):
    """Let tensors of a few KB leave a device, as those of a real model do.

    And let no resident layer use the packed kernel of some CPUs, which rounds its scales and takes no streamed weight.
    """
    monkeypatch.setattr("bigload.planning.units.RESIDENT_BYTES", 2000)
    monkeypatch.setattr("bigload.quantization.cpu_forwards._PACKED_ROWS", 2**40)


@pytest.fixture
def moves(monkeypatch):
    """Let "meta" take the place of a GPU. Returns a list of the tensors that a model's hooks moved, and where to."""
    found = []

    def moved(tensor, device):
        if tensor.device == device:
            return tensor
        found.append((tensor, device))
        return torch.zeros_like(tensor, device=device)  # from meta there is nothing to copy

    for room in ("hardware.nested_tensors", "offload.device_hooks"):
        monkeypatch.setattr(f"bigload.{room}.to_device", moved)
    return found


@pytest.fixture
def logged():
    with Logged() as records:
        yield records


@pytest.fixture
def warned(logged):
    """Return a function that lists what bigload has warned of."""
    logged.set_level(logging.WARNING, "bigload")
    return lambda: [record.getMessage() for record in logged.records if record.name.startswith("bigload")]


@pytest.fixture
def two_gpus(monkeypatch):
    """Imagine two GPUs, the second being the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
