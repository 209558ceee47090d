"""Groups whose weights rest in files: the same bits, files untouched, clear errors, recovery after them."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest
import torch
from checkpoints import PLAIN, offloaded, save_checkpoint
from comparisons import assert_same_bits, equal, state_of
from resources import open_files
from streaming import CLOCK_NS, MODES, resident, stream_from_disk, tokens, written
from torch import nn

from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.errors import OffloadError
from bigload.offload.files import FileGroup, Mappings, limit_page_cache
from bigload.offload.weight_cache import SourceFingerprints
from bigload.planning.sources import Source


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_logits_and_state_are_those_of_the_resident_model(mode, slots, device, tmp_path):
    expected, model = resident(mode, device), resident(mode, device)
    state = state_of(model)
    engine = stream_from_disk(model, device, tmp_path, slots)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert equal(model(tokens(device)), expected(tokens(device)))
    assert engine.stats().slots == slots
    assert_same_bits(model.state_dict(), state)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    engine.remove()
    assert equal(model(tokens(device)), expected(tokens(device)))


def twice(model, x):
    """Run what may be there still from the last time, and what is not."""
    model(x)
    model(x)


@pytest.mark.parametrize("way", ["deleted", "cut short", "written again"])
def test_lost_file_gives_a_clear_error_and_when_it_is_back_the_model_runs(way, device, tmp_path):
    expected, model = resident("nf4", device), resident("nf4", device)
    engine = stream_from_disk(model, device, tmp_path)
    model(tokens(device))
    file = tmp_path / "1.bin"
    content = file.read_bytes()
    file.rename(tmp_path / "aside")
    if way == "cut short":
        file.write_bytes(content[:100])
    elif way == "written again":
        file.write_bytes(bytes(len(content)))
    for _ in range(2):
        with pytest.raises(OffloadError, match=r"h\.1\..* cannot be read.*1\.bin"):
            twice(model, tokens(device))
    assert not any(slot.users for slot in engine.pool.slots)
    (tmp_path / "aside").replace(file)
    for _ in range(2):
        assert equal(model(tokens(device)), expected(tokens(device)))


@pytest.mark.parametrize("same", ["inode", "time"])
def test_file_that_is_not_the_one_that_was_is_told_by_its_inode_or_its_time(same, tmp_path):
    group = FileGroup(written({"weight": torch.ones(64)}, tmp_path / "0"))
    stat, content = (tmp_path / "0").stat(), (tmp_path / "0").read_bytes()
    if same == "inode":
        with (tmp_path / "0").open("r+b") as file:
            file.write(bytes(len(content)))
        os.utime(tmp_path / "0", ns=(stat.st_atime_ns, stat.st_mtime_ns + CLOCK_NS))
    else:
        (tmp_path / "new").write_bytes(bytes(len(content)))
        os.utime(tmp_path / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (tmp_path / "new").replace(tmp_path / "0")
    with pytest.raises(OffloadError, match="changed since"):
        group.read_into(torch.empty(256, dtype=torch.uint8))


def test_what_comes_in_pieces_is_read_to_its_end(tmp_path, monkeypatch):
    """The system may give less than was asked for."""
    values = torch.arange(2**18, dtype=torch.float32)
    group = FileGroup(written({"weight": values}, tmp_path / "0"))
    read, asked = os.preadv, []

    def less(descriptor, buffers, offset):
        asked.append(len(buffers[0]))
        return read(descriptor, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)

    monkeypatch.setattr("bigload.io.transfer.library", lambda: None)
    monkeypatch.setattr(os, "preadv", less)
    memory = torch.zeros(values.nbytes, dtype=torch.uint8)
    group.read_into(memory)
    assert equal(memory.view(torch.float32), values)
    assert len(asked) > 5


def test_slice_that_comes_in_pieces_is_read_to_its_end_or_refused(tmp_path, monkeypatch):
    values = torch.arange(1024, dtype=torch.float32)
    group = FileGroup(written({"weight": values}, tmp_path / "0"))
    read, memory = os.preadv, torch.zeros(2048, dtype=torch.uint8)

    def less(descriptor, buffers, offset):
        return read(descriptor, [buffers[0][:300]], offset)

    monkeypatch.setattr(os, "preadv", less)
    group.read_slice("weight", 1, 2, memory)
    assert equal(memory.view(torch.float32), values[512:])
    monkeypatch.setattr(os, "preadv", lambda *given: 0)
    with pytest.raises(OffloadError, match=r"'weight' cannot be read from .*truncated"):
        group.read_slice("weight", 1, 2, memory)


def test_sample_that_comes_in_pieces_names_the_same_file(tmp_path, monkeypatch):
    """Else a weight would be quantized again, into another file."""
    save_checkpoint(two_layers(), tmp_path)
    tensor = open_checkpoint(tmp_path).tensors["0.weight"]
    read, whole = os.pread, SourceFingerprints(with_samples=True).of(Source(tensor))
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: read(descriptor, min(count, 99), offset))
    assert SourceFingerprints(with_samples=True).of(Source(tensor)) == whole


def test_groups_of_one_file_map_it_once(tmp_path):
    where = written({"a": torch.ones(2**12), "b": torch.ones(2**12)}, tmp_path / "shard")
    mappings = Mappings()
    groups = [FileGroup({name: part}, mappings) for name, part in where.items()]
    assert equal(groups[0].tensors["a"], groups[1].tensors["b"])
    assert Path("/proc/self/maps").read_text().count(str(tmp_path / "shard")) == 1


def two_layers():
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


@torch.no_grad()
def test_what_is_written_to_one_model_does_not_show_in_another_of_the_same_files(device, tmp_path, small_parts_stream):
    save_checkpoint(two_layers(), tmp_path)
    models = [offloaded(two_layers, tmp_path, device, ["0"], tmp_path / "cache", PLAIN, "disk") for _ in range(2)]
    one, other = models
    before = other[0].weight.detach().clone()
    one[0].weight.mul_(2)
    assert equal(other.state_dict()["0.weight"], before.cpu())
    for model in models:
        model.offload.remove()
    assert equal(other[0].weight.cpu(), before.cpu())
    assert equal(one[0].weight.cpu(), before.cpu() * 2)


def test_of_a_file_with_several_groups_only_those_that_have_no_room_are_dropped(tmp_path, dropped):
    where = written({str(index): torch.randn(2**21) for index in range(4)}, tmp_path / "shard")
    require_droppable(where["0"])
    dropped.clear()
    groups = [FileGroup({name: part}) for name, part in where.items()]
    memory = torch.empty(2**23, dtype=torch.uint8)
    limit_page_cache(groups, 3 * 2**23)
    assert [group.stays_in_page_cache for group in groups] == [True, True, True, False]
    for group in groups:
        group.read_into(memory)
    assert [offset // 2**23 for _, offset in dropped] == [3]
    assert in_page_cache(where["3"]) == 0


def test_file_that_is_missing_or_too_short_at_the_start_is_refused(tmp_path):
    parts = written({"weight": torch.ones(64)}, tmp_path / "0.bin")
    (tmp_path / "0.bin").write_bytes(b"header--")
    with pytest.raises(OffloadError, match="was truncated"):
        FileGroup(parts)
    (tmp_path / "0.bin").unlink()
    with pytest.raises(OffloadError, match="cannot be opened"):
        FileGroup(parts)


def in_page_cache(part):
    """Count the pages of a part that the system has in memory."""
    size = part.file.stat().st_size
    with part.file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY) as mapping:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
    end = part.offset + part.part.nbytes
    return sum(page & 1 for page in pages[part.offset // mmap.PAGESIZE : -(-end // mmap.PAGESIZE)])


def require_droppable(part):
    """Skip where a file's pages cannot be dropped: some file systems keep their files in memory."""
    before = in_page_cache(part)
    with part.file.open("rb") as file:
        os.fsync(file.fileno())  # pages that have yet to be written cannot be
        os.posix_fadvise(file.fileno(), part.offset, part.part.nbytes, os.POSIX_FADV_DONTNEED)
    if in_page_cache(part) == before:
        pytest.skip("this file system keeps its files in memory")


@pytest.fixture
def dropped(monkeypatch):
    """Return what the system is asked to drop, by file and offset: what else leaves its cache is its own affair."""
    asked, own = [], os.posix_fadvise

    def watched(descriptor, offset, nbytes, advice):
        assert advice == os.POSIX_FADV_DONTNEED
        asked.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset))
        own(descriptor, offset, nbytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", watched)
    return asked


def test_what_the_page_cache_has_no_room_for_is_dropped_after_reading_and_the_rest_stays(tmp_path, dropped):
    parts, groups = [], []
    for index in range(8):
        (part,) = written({"weight": torch.randn(2**18)}, tmp_path / str(index)).values()
        require_droppable(part)
        parts.append(part)
        groups.append(FileGroup({"weight": part}))
    memory = torch.empty(2**20, dtype=torch.uint8)

    def stay():
        dropped.clear()
        for group in groups:
            group.read_into(memory)
        without = {name for name, _ in dropped}
        assert not any(in_page_cache(part) for part in parts if part.file.name in without)
        return [part.file.name not in without for part in parts]

    assert stay() == [True] * 8
    limit_page_cache(groups, 3 * 2**20)
    assert stay() == [True, False, True, False, False, True, False, False]
    limit_page_cache(groups, 8 * 2**20)
    assert stay() == [True] * 8


def test_files_of_weights_are_not_kept_open(tmp_path):
    files = [written({"weight": torch.ones(64)}, tmp_path / str(index)) for index in range(8)]
    before = open_files()
    groups = [FileGroup(where) for where in files]
    assert all(equal(group.tensors["weight"], torch.ones(64)) for group in groups)
    assert not open_files() - before
