"""Budgets: what devices, cgroups and disks have left, read from systems that the tests make up."""

import shutil
from collections import namedtuple

import psutil
import pytest
import torch

from bigload.errors import PlacementError
from bigload.hardware import free_memory
from bigload.hardware.free_memory import cgroup_free_bytes, free_bytes, free_disk_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
V1_UNLIMITED = 9223372036854771712
V2_MOUNT = "31 23 0:28 {top} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def system(root, cgroup, *mounts):
    write(root / "proc/self/cgroup", cgroup)
    write(root / "proc/self/mountinfo", "\n".join(["22 1 0:21 / /proc rw - proc proc rw", *mounts]))


def v2(root, path, limit=None, usage=None, **pages):
    folder = root / "sys/fs/cgroup" / path
    if limit is not None:
        write(folder / "memory.max", limit)
    if usage is not None:
        write(folder / "memory.current", usage)
    write(folder / "memory.stat", "\n".join(f"{name} {value}" for name, value in pages.items()))
    return folder


def v1(root, path, limit, usage, **pages):
    folder = root / "sys/fs/cgroup/memory" / path
    write(folder / "memory.limit_in_bytes", limit)
    write(folder / "memory.usage_in_bytes", usage)
    write(folder / "memory.stat", "\n".join(f"{name} {value}" for name, value in pages.items()))


def test_v2_gives_what_is_left_and_the_pages_of_files(tmp_path):
    system(tmp_path, "0::/job", V2_MOUNT.format(top="/"))
    v2(tmp_path, "job", 1000, 700, anon=400, file=300, shmem=50, inactive_file=100, active_file=20)
    assert cgroup_free_bytes(tmp_path) == 1000 - 700 + 120


def test_v2_high_is_no_limit(tmp_path):
    system(tmp_path, "0::/job", V2_MOUNT.format(top="/"))
    folder = v2(tmp_path, "job", 1000, 700)
    write(folder / "memory.high", 701)
    assert cgroup_free_bytes(tmp_path) == 300


@pytest.mark.parametrize(("own", "middle", "outer"), [(100, 900, 900), (900, 100, 900), (900, 900, 100)])
def test_v2_the_tightest_of_all_levels_counts(tmp_path, own, middle, outer):
    system(tmp_path, "0::/slice/user/job", V2_MOUNT.format(top="/"))
    v2(tmp_path, "slice", outer + 5000, 5000)
    v2(tmp_path, "slice/user", middle + 300, 300)
    v2(tmp_path, "slice/user/job", own + 20, 20)
    v2(tmp_path, "slice/other", 1, 1)
    assert cgroup_free_bytes(tmp_path) == 100


def test_v2_max_bounds_nothing_but_its_parents_do(tmp_path):
    system(tmp_path, "0::/slice/job", V2_MOUNT.format(top="/"))
    v2(tmp_path, "slice/job", "max", 20)
    v2(tmp_path, "slice", "max", 20)
    assert cgroup_free_bytes(tmp_path) is None
    v2(tmp_path, "slice", 60, 20)
    assert cgroup_free_bytes(tmp_path) == 40


def test_cgroup_above_its_limit_gives_nothing(tmp_path):
    system(tmp_path, "0::/job", V2_MOUNT.format(top="/"))
    v2(tmp_path, "job", 100, 250, inactive_file=10)
    assert cgroup_free_bytes(tmp_path) == 0


def test_container_with_a_namespace_finds_its_limit_at_the_mount_point(tmp_path):
    system(tmp_path, "0::/", V2_MOUNT.format(top="/"))
    v2(tmp_path, "", 1000, 700)
    assert cgroup_free_bytes(tmp_path) == 300


@pytest.mark.parametrize(
    ("path", "top", "inside"),
    [
        ("/docker/abc", "/docker/abc", ""),
        ("/docker/abc/init", "/docker/abc", "init"),
        ("/docker/abc", "/docker/abcdef", ""),
        ("/../sibling", "/", ""),
        ("/", "/..", ""),
    ],
)
def test_mount_that_begins_inside_the_hierarchy(tmp_path, path, top, inside):
    system(tmp_path, f"0::{path}", V2_MOUNT.format(top=top))
    v2(tmp_path, "", 1000, 100)
    v2(tmp_path, "sibling", 1, 1)
    write(tmp_path / "sys/fs/sibling/memory.max", 1)
    write(tmp_path / "sys/fs/sibling/memory.current", 1)
    if inside:
        assert cgroup_free_bytes(tmp_path) == 900
        v2(tmp_path, inside, 400, 100)
    assert cgroup_free_bytes(tmp_path) == (300 if inside else 900)


def test_v1_counts_the_totals_of_its_hierarchy(tmp_path):
    system(tmp_path, "5:cpu,cpuacct:/elsewhere\n4:memory:/job\n0::/", V1_MOUNT.format(top="/"))
    pages = {"inactive_file": 1, "active_file": 1, "total_inactive_file": 100, "total_active_file": 20}
    v1(tmp_path, "job", 1000, 700, **pages)
    v1(tmp_path, "", V1_UNLIMITED, 5000)
    v1(tmp_path, "elsewhere", 1, 1)
    assert cgroup_free_bytes(tmp_path) == 420


def test_v1_unlimited_and_nested(tmp_path):
    system(tmp_path, "4:hugetlb,memory:/slice/job", V1_MOUNT.format(top="/"))
    v1(tmp_path, "slice/job", V1_UNLIMITED, 10)
    assert cgroup_free_bytes(tmp_path) is None
    v1(tmp_path, "slice", 50, 10)
    assert cgroup_free_bytes(tmp_path) == 40


def test_both_versions_side_by_side_count_both(tmp_path):
    unified = V2_MOUNT.format(top="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    system(tmp_path, "4:memory:/job\n0::/job", V1_MOUNT.format(top="/"), unified)
    v1(tmp_path, "job", 500, 100)
    assert cgroup_free_bytes(tmp_path) == 400
    v2(tmp_path, "unified/job", 300, 100)
    assert cgroup_free_bytes(tmp_path) == 200


@pytest.mark.parametrize("file", ["memory.max", "memory.current"])
def test_missing_file_is_no_limit(tmp_path, file):
    system(tmp_path, "0::/job", V2_MOUNT.format(top="/"))
    (v2(tmp_path, "job", 1000, 100) / file).unlink()
    assert cgroup_free_bytes(tmp_path) is None


def test_missing_stat_counts_no_pages(tmp_path):
    system(tmp_path, "0::/job", V2_MOUNT.format(top="/"))
    (v2(tmp_path, "job", 1000, 100, active_file=50) / "memory.stat").unlink()
    assert cgroup_free_bytes(tmp_path) == 900


@pytest.mark.parametrize("unreadable", ["proc/self/cgroup", "proc/self/mountinfo", "sys/fs/cgroup/job/memory.max"])
def test_unreadable_file_is_no_limit(tmp_path, unreadable):
    system(tmp_path, "0::/job", V2_MOUNT.format(top="/"))
    v2(tmp_path, "job", 1000, 100)
    assert cgroup_free_bytes(tmp_path) == 900
    (tmp_path / unreadable).write_bytes(b"\xff\xfe\n")
    assert cgroup_free_bytes(tmp_path) is None
    (tmp_path / unreadable).unlink()
    (tmp_path / unreadable).mkdir()
    assert cgroup_free_bytes(tmp_path) is None


def test_system_without_cgroups_bounds_nothing(tmp_path):
    assert cgroup_free_bytes(tmp_path) is None


@pytest.mark.parametrize("line", ["", "31 23", "31 23 0:28 / /sys/fs/cgroup rw - ", "31 23 0:28 / /x rw - cgroup2"])
def test_broken_mountinfo_bounds_nothing(tmp_path, line):
    system(tmp_path, "0::/job\nnonsense", line)
    assert cgroup_free_bytes(tmp_path) is None


@pytest.mark.parametrize(("allowed", "free"), [(None, 1000), (400, 400), (4000, 1000), (0, 0)])
def test_cpu_has_the_least_of_machine_and_cgroup(monkeypatch, allowed, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(1000))
    monkeypatch.setattr(free_memory, "cgroup_free_bytes", lambda: allowed)
    assert free_bytes(CPU) == free


def test_this_machine_has_some_memory_left():
    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total


def test_gpu_has_what_the_driver_and_the_allocator_hold_unused(monkeypatch):
    asked = []

    def answer(value):
        return lambda device: asked.append(device) or value

    monkeypatch.setattr(torch.cuda, "mem_get_info", answer((1000, 5000)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", answer(300))
    monkeypatch.setattr(torch.cuda, "memory_allocated", answer(120))
    assert free_bytes(GPU) == 1000 + 300 - 120
    assert set(asked) == {GPU}


@pytest.mark.cuda
def test_gpu_gives_what_the_allocator_keeps_of_a_freed_tensor():
    device = torch.device("cuda", 0)

    def taken_and_given_back() -> tuple[int, int]:
        before = free_bytes(device)
        held = torch.empty(2**28, dtype=torch.uint8, device=device)
        taken = before - free_bytes(device)
        del held
        assert torch.cuda.memory_reserved(device) >= 2**28
        return taken, before - free_bytes(device)

    # Other processes may take and free memory of the GPU meanwhile, but not each time.
    tries = (taken_and_given_back() for _ in range(100))
    assert any(abs(taken - 2**28) < 2**24 and abs(lost) < 2**24 for taken, lost in tries)


def test_disk_of_a_folder_that_is_yet_to_be_made(tmp_path, monkeypatch):
    asked = []
    usage = namedtuple("Usage", "total used free")(100, 60, 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or usage)
    assert free_disk_bytes(tmp_path / "a" / "b") == 30
    assert free_disk_bytes(str(tmp_path)) == 30
    monkeypatch.chdir(tmp_path)
    assert free_disk_bytes("later") == 30
    assert asked == [tmp_path] * 3


def test_real_disk_has_some_room(tmp_path):
    assert 0 < free_disk_bytes(tmp_path / "new") <= shutil.disk_usage(tmp_path).total


def test_disk_that_does_not_answer_is_named(tmp_path, monkeypatch):
    def fails(place):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", fails)
    with pytest.raises(PlacementError, match="Input/output error") as caught:
        free_disk_bytes(tmp_path / "offload")
    assert str(tmp_path / "offload") in str(caught.value)


def test_a_system_that_does_not_tell_is_named(monkeypatch):
    def failing():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(psutil, "virtual_memory", failing)
    with pytest.raises(PlacementError, match="does not tell how much host memory is free: Too many open files"):
        free_bytes(CPU)
