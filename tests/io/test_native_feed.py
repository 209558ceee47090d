"""The part in C where it is not there, or what it works with hangs."""

import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from resources import open_and_running
from safetensors.torch import save_file

from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.io import feed, native_feed, transfer
from bigload.io.program import ReadTask

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def entry(tmp_path):
    save_file({"w": torch.arange(20_000, dtype=torch.float32)}, tmp_path / "w.safetensors")
    return open_checkpoint(tmp_path / "w.safetensors").tensors["w"]


def read_home(entry):
    home = torch.zeros(entry.nbytes, dtype=torch.uint8)
    transfer.read_all([ReadTask(entry, CPU, None, home)])
    return home.view(torch.float32)


def test_a_compiler_that_fails_leaves_an_install_without_it(tmp_path):
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "bigload", tmp_path / "bigload", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "CC": "false"})
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("found", ["nothing", "no library"])
def test_what_it_lacks_is_said_once_and_files_are_read_all_the_same(entry, tmp_path, monkeypatch, logged, found):
    if found == "no library":
        (tmp_path / "_feed.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(native_feed, "__file__", str(tmp_path / "native_feed.py"))
    monkeypatch.setattr(transfer, "library", functools.cache(native_feed.library.__wrapped__))
    with logged.at_level(logging.INFO, logger="bigload"):
        for _ in range(3):
            assert torch.equal(read_home(entry), torch.arange(20_000, dtype=torch.float32))
    (record,) = logged.records
    assert record.levelname == "INFO"
    assert "reading by Python" in record.getMessage()
    assert ("without its part in C" if found == "nothing" else "cannot be used") in record.getMessage()


def test_a_system_without_memory_for_it_is_an_error_and_the_next_read_is_right(entry, monkeypatch):
    found = native_feed.library()
    if found is None:
        pytest.skip("needs the part in C")
    before = open_and_running()
    with monkeypatch.context() as patch:
        patch.setattr(native_feed, "library", lambda: SimpleNamespace(begin=lambda order: None))
        with pytest.raises(MemoryError, match="no memory or no thread to read with"):
            read_home(entry)
    assert not open_and_running() - before
    assert torch.equal(read_home(entry), torch.arange(20_000, dtype=torch.float32))


def test_a_file_system_that_hangs_is_left_alone(entry, tiny_threads, monkeypatch, logged):
    """Its threads end when it answers; what they may write to until then is kept."""
    read, hangs, answers = os.preadv, threading.Event(), threading.Event()

    def hanging(descriptor, buffers, offset):
        if offset > entry.offset + 4000:
            hangs.set()
            answers.wait()
        return read(descriptor, buffers, offset)

    def interrupted(count):
        assert hangs.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(feed, "END_S", 0.2)
    monkeypatch.setattr(os, "preadv", hanging)
    home = torch.zeros(entry.nbytes, dtype=torch.uint8)
    before = len(feed._abandoned)
    with pytest.raises(KeyboardInterrupt):
        transfer.read_all([ReadTask(entry, CPU, None, home)], on_bytes=interrupted)
    assert "does not answer" in logged.text
    (left,) = feed._abandoned[before:]
    assert not left.is_done
    assert left._program.pieces[0].task.home is home
    answers.set()
    for thread in left._threads:
        thread.join()
    feed._abandoned.remove(left)
    left.is_done = True
    left._end()
    monkeypatch.setattr(os, "preadv", read)
    assert torch.equal(read_home(entry), torch.arange(20_000, dtype=torch.float32))


def test_ctrl_c_ends_the_wait_for_a_gpu_that_hangs(entry, late_gpu, small_reads, monkeypatch, logged, executor):
    monkeypatch.setattr(feed, "END_S", 0.2)
    late_gpu.hang()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    begun = time.monotonic()
    timer.start()
    before = len(feed._abandoned)
    with pytest.raises(KeyboardInterrupt):
        read_home(entry)
    assert time.monotonic() - begun < 5
    assert "does not answer" in logged.text
    (left,) = feed._abandoned[before:]
    assert not left.is_done
    assert not left._resources.ring.is_quiet
    late_gpu.go_on()
    for lane in left.lanes.values():
        lane.copies.synchronize()
    feed._abandoned.remove(left)
    left._end()
    assert left.is_done
