"""What each place can give: the host as control groups allow it, GPUs, disks."""

import psutil
import pytest
import torch

from bigload.budgets import cgroup_bytes, free_bytes, free_disk_bytes
from bigload.errors import PlacementError


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def left(tmp_path, files):
    return list(cgroup_bytes(tree(tmp_path, files)))


STAT = "anon 5\ninactive_file 30\nactive_file 20\nfile_dirty 7\n"


def test_own_group_of_version_2_less_what_is_used_plus_what_can_be_dropped(tmp_path):
    files = {"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": STAT, "memory.high": "1"}
    made = {f"sys/fs/cgroup/a/{name}": text for name, text in files.items()}
    assert left(tmp_path, {"proc/self/cgroup": "0::/a\n", **made}) == [1000 - 400 + 50]


def test_groups_that_hold_it_count_too(tmp_path):
    made = {"proc/self/cgroup": "0::/a/b\n"}
    for group, limit, used in (("a/b", "max", 5), ("a", "900", 300), ("", "700", 100)):
        made |= {f"sys/fs/cgroup/{group}/memory.max": limit, f"sys/fs/cgroup/{group}/memory.current": used}
    assert left(tmp_path, made) == [600, 600]


def test_root_of_a_container(tmp_path):
    made = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "800", "sys/fs/cgroup/memory.current": "900"}
    assert left(tmp_path, made) == [0]


def test_version_1(tmp_path):
    base = "sys/fs/cgroup/memory/docker"
    made = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker\n4:memory:/docker\n0::/\n",
        f"{base}/memory.limit_in_bytes": "5000",
        f"{base}/memory.usage_in_bytes": "2000",
        f"{base}/memory.stat": "inactive_file 1\ntotal_inactive_file 100\ntotal_active_file 200\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
    }
    assert left(tmp_path, made) == [3300]


@pytest.mark.parametrize("files", [{}, {"proc/self/cgroup": "0::/a\n"}, {"proc/self/cgroup": "3:cpu:/\n"}], ids=repr)
def test_no_group_no_limit(tmp_path, files):
    assert left(tmp_path, files) == []


def test_host_gives_the_least_that_anything_allows(monkeypatch):
    available = psutil.virtual_memory().available
    monkeypatch.setattr("bigload.budgets.cgroup_bytes", lambda: [5, 10**18])
    assert free_bytes(torch.device("cpu")) == 5
    monkeypatch.setattr("bigload.budgets.cgroup_bytes", lambda: [])
    assert free_bytes(torch.device("cpu")) == pytest.approx(available, rel=0.3)


def test_gpu_gives_what_the_driver_has_and_the_allocator_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert free_bytes(torch.device("cuda", 0)) == 140


@pytest.mark.cuda
def test_gpu_gives_back_what_was_freed():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    before = free_bytes(torch.device("cuda", 0))
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert before - free_bytes(torch.device("cuda", 0)) == pytest.approx(2**28, abs=2**25)
    del held
    assert free_bytes(torch.device("cuda", 0)) == pytest.approx(before, abs=2**25)


def test_disk_of_a_folder_that_is_yet_to_be_made(tmp_path, monkeypatch):
    assert free_disk_bytes(tmp_path / "a" / "b") > 0

    def failing(path):
        raise OSError("gone")

    monkeypatch.setattr("shutil.disk_usage", failing)
    with pytest.raises(PlacementError, match="offload_folder"):
        free_disk_bytes(tmp_path)
