"""Copies on a stream of their own, and what computes with them, wait for each other, however late either is.

The streams are those of `lazy_gpu`, which do nothing before they are waited for. `test_slots.py` has the same on a GPU.
"""

import kernels_by_torch
import lazy_gpu
import pytest
import torch
from comparisons import equal
from experts import made, pack
from streaming import (
    assert_at_rest,
    at_rest,
    group_of,
    groups_of,
    pairs,
    resident,
    stream,
    stream_from_disk,
    tokens,
    written,
)
from torch import nn

from bigload.hardware.pinned import HostGroup
from bigload.offload.engine import Engine
from bigload.offload.files import FileGroup
from bigload.offload.leaves import Leaf
from bigload.offload.on_device.captured_copies import CapturedCopies
from bigload.offload.on_device.expert_copies import CudaExpertCopies
from bigload.offload.on_device.gpu_book import GpuBook
from bigload.offload.on_device.slots import CudaSlotCopier, Slice, Use

CPU = torch.device("cpu")


@pytest.fixture
def gpu():
    with lazy_gpu.installed() as gpu:
        yield gpu


@pytest.fixture(params=["pinned", "pageable", "disk"])
def home(request):
    with lazy_gpu.installed(request.param == "pinned"):
        yield request.param


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_what_is_computed_waits_for_the_copies(home, slots, tmp_path):
    expected, model = resident("nf4", CPU), resident("nf4", CPU)
    engine = stream_from_disk(model, CPU, tmp_path, slots) if home == "disk" else stream(model, CPU, slots)
    assert type(engine.pool.copier) is CudaSlotCopier
    for slot in engine.pool.slots:
        slot.memory.fill_(0xFF)
    for _ in range(3):
        assert equal(model(tokens(CPU)), expected(tokens(CPU)))
    assert_at_rest(engine)
    engine.remove()
    assert equal(model(tokens(CPU)), expected(tokens(CPU)))


def filled(value):
    return at_rest({"a": torch.full((16,), float(value))}, CPU)


def read(slot, stream, found):
    """Launch what reads a slot, on a stream that is late."""
    stream.launch(lambda: found.append(slot.memory.view(torch.float32)[0].item()))


def read_later(gpu, copier, slot, found):
    """Have a stream of its own, which is late, read a slot."""
    reader = gpu.stream()
    with gpu.launching_on(reader):
        copier.await_copy(slot)
    read(slot, reader, found)


def gone(tmp_path):
    """Return a group whose file is no more."""
    group = FileGroup(written({"a": torch.zeros(16)}, tmp_path / "gone"))
    (tmp_path / "gone").unlink()
    return group


def test_copy_waits_for_all_streams_that_read_what_was_there(gpu):
    copier, found = CudaSlotCopier(CPU), []
    slot = copier.make_slot(64)
    copier.copy(filled(1), slot)
    readers = [gpu.stream(), gpu.stream()]
    for reader in readers:
        with gpu.launching_on(reader):
            copier.await_copy(slot)
            copier.await_copy(slot)  # once is enough
        read(slot, reader, found)
    copier.copy(filled(2), slot)
    copier.stream.finish()
    assert found == [1, 1]
    assert slot.memory.view(torch.float32)[0] == 2


def test_memory_that_passes_through_pinned_buffers_waits_until_these_are_copied():
    """There are two of them."""
    with lazy_gpu.installed(is_pinned=False):
        copier = CudaSlotCopier(CPU)
        slots = [copier.make_slot(64) for _ in range(5)]
        for value, slot in enumerate(slots):
            copier.copy(filled(value), slot)
        for slot in slots:
            copier.await_copy(slot)
        assert [slot.memory.view(torch.float32)[0].item() for slot in slots] == [0, 1, 2, 3, 4]
        copier.close()


@pytest.mark.parametrize("is_pinned", [True, False])
def test_copy_of_slices_waits_for_what_reads_the_slot(is_pinned, gpu, monkeypatch):
    monkeypatch.setattr(HostGroup, "is_pinned", property(lambda group: is_pinned, lambda group, pinned: None))
    copier, found = CudaSlotCopier(CPU), []
    slot = copier.make_slot(64)
    copier.copy(filled(1), slot)
    read_later(gpu, copier, slot, found)
    copier.copy_some(filled(2), [Slice("a", 0, 2, slot.memory[:32])], slot)
    copier.await_copy(slot)
    assert found == [1]
    assert slot.memory.view(torch.float32)[:16].tolist() == [2] * 8 + [1] * 8
    copier.close()


def test_new_slot_is_not_copied_into_before_what_had_its_memory_is_computed(gpu):
    found, earlier = [], gpu.stream()
    copier = CudaSlotCopier(CPU)
    with gpu.launching_on(earlier):
        slot = copier.make_slot(64)
    slot.memory.view(torch.float32).fill_(7)
    read(slot, earlier, found)
    copier.copy(filled(1), slot)
    copier.stream.finish()
    assert found == [7]


def test_copy_that_failed_is_waited_for_by_the_next_into_its_slot(gpu, tmp_path):
    """What reads the slot is to be done before the copy that succeeds, too."""
    copier, found = CudaSlotCopier(CPU), []
    slot = copier.make_slot(64)
    copier.copy(filled(1), slot)
    read_later(gpu, copier, slot, found)
    copier.copy(gone(tmp_path), slot)
    assert copier.has_failed(slot)
    copier.copy(filled(2), slot)
    copier.stream.finish()
    assert found == [1]
    copier.close()


def test_wait_that_fails_leaves_a_slot_that_is_filled_again(gpu, monkeypatch):
    expected, model = resident("nf4", CPU), resident("nf4", CPU)
    engine = stream(model, CPU)
    own = lazy_gpu.Stream.wait_event

    def failing(self, event):
        if self is gpu.default:
            raise KeyboardInterrupt
        own(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(lazy_gpu.Stream, "wait_event", failing)
        with pytest.raises(KeyboardInterrupt):
            model(tokens(CPU))
    assert_at_rest(engine)
    for _ in range(2):
        assert equal(model(tokens(CPU)), expected(tokens(CPU)))
    engine.remove()


def test_memory_that_is_let_go_of_is_not_had_again_before_all_have_used_it(gpu):
    copier = CudaSlotCopier(CPU)
    slot = copier.make_slot(64)
    copier.copy(filled(1), slot)
    reader = gpu.stream()
    with gpu.launching_on(reader):
        copier.await_copy(slot)
    copier.discard(slot)
    assert [stream for memory, stream in gpu.recorded if memory is slot.memory] == [copier.stream, reader]


def test_memory_that_is_let_go_of_after_a_copy_that_failed_is_waited_for_too(gpu, tmp_path):
    """Its readers are remembered by their events alone."""
    copier, found = CudaSlotCopier(CPU), []
    slot = copier.make_slot(64)
    copier.copy(filled(1), slot)
    read_later(gpu, copier, slot, found)
    copier.copy(gone(tmp_path), slot)
    copier.discard(slot)
    copier.stream.finish()  # of which the allocator is told
    assert found == [1]
    copier.close()


def test_one_of_eight_copies_is_timed(gpu):
    copier, group = CudaSlotCopier(CPU), filled(1)
    slot = copier.make_slot(64)
    for _ in range(17):
        copier.copy(group, slot)
        copier.finish()
    assert copier.timed_bytes == 2 * 64
    assert copier.timed_s == pytest.approx(2 * 1e-3)  # the copy is all that is launched between the two events


def test_stream_that_replays_waits_for_the_others_and_they_for_it(gpu):
    copier, found = CudaSlotCopier(CPU), []
    slot = copier.make_slot(64)
    copier.copy(filled(1), slot)
    replays = gpu.stream()
    read_later(gpu, copier, slot, found)
    with gpu.launching_on(replays):
        copier.await_users(slot)
        replays.launch(lambda: slot.memory.view(torch.float32).fill_(2))
        copier.note_replay(slot)
    copier.await_copy(slot)
    assert found == [1]
    assert slot.memory.view(torch.float32)[0] == 2
    read(slot, replays, found)
    copier.copy(filled(3), slot)
    copier.stream.finish()
    assert found == [1, 2]


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_captured_step_finds_each_group_in_its_slot_and_leaves_the_first_there(gpu, slots):
    model = pairs(nn.Linear).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, CPU)), CPU, slots)
    copier, groups = engine.pool.copier, engine.groups
    copies = CapturedCopies(copier, [group for group in groups for _ in group.leaves], engine.pool.slots)
    for slot, group in copies.first():
        slot.memory[: len(group.store.source)].copy_(group.store.source)
    for _ in range(2):
        copies.begin()
        for group in groups:
            for _ in group.leaves:
                use = Use()
                slot = copies.enter(use, group)
                assert equal(slot.memory[: len(group.store.source)], group.store.source)
                slot.users.remove(use)
                copies.leave()
        copies.finish()
        for slot, group in copies.first():
            assert equal(slot.memory[: len(group.store.source)], group.store.source)
    assert len(copies.copied()) == {1: 4, 2: 4, 3: 2, 4: 0}[slots]
    engine.remove()


def test_captured_copy_waits_for_what_reads_its_slot(gpu):
    model = pairs(nn.Linear, count=2).requires_grad_(False)
    engine = Engine(model, list(groups_of(model, CPU)), CPU, 1)
    (slot,), (first, second), found = engine.pool.slots, engine.groups, []
    captures = gpu.stream()
    with gpu.launching_on(captures):
        copies = CapturedCopies(engine.pool.copier, [first, second], [slot])
        copies._leaves = [1, 1]
        slot.memory[: len(first.store.source)].copy_(first.store.source)
        for group in (first, second):
            use = Use()
            copies.enter(use, group).users.remove(use)
            captures.launch(lambda: found.append(slot.memory[: len(first.store.source)].clone()))
            copies.leave()
        copies.finish()
    copies._stream.finish()  # which hurries
    captures.finish()
    assert [equal(one, group.store.source) for one, group in zip(found, (first, second), strict=True)] == [True, True]
    engine.remove()


class Experts:
    """A memory of one slot, what is copied into it, and a table of two experts."""

    def __init__(self):
        self.copies, self.memory = CudaExpertCopies(CudaSlotCopier(CPU)), torch.zeros(64, dtype=torch.uint8)
        self.table, self.target = self.copies.make_table(2), torch.full((2,), -1, dtype=torch.int32)

    def copy(self, value):
        self.copies.finish()
        self.table.fill_(value)
        self.copies.copy(filled(value), [Slice("a", 0, 1, self.memory)], self.table, self.target)

    def there(self):
        return [self.memory.view(torch.float32)[0].item(), *self.target.tolist()]


@pytest.fixture
def experts(gpu):
    return Experts()


def test_experts_and_their_table_are_there_when_they_are_waited_for(experts):
    experts.copy(1)
    assert experts.there() == [0, -1, -1]
    experts.copies.await_copies()
    assert experts.there() == [1, 1, 1]


def test_table_is_not_written_to_before_it_is_copied(experts):
    experts.copy(1)
    assert experts.there() == [0, -1, -1]
    experts.copies.finish()
    experts.table.fill_(7)
    experts.copies.await_copies()
    assert experts.there() == [1, 1, 1]


def test_experts_are_not_copied_over_before_all_streams_have_read_them(gpu, experts):
    experts.copy(1)
    readers, found = [gpu.stream(), gpu.stream()], []
    for turn in (1, 2):  # of which the second uses the events of the first
        for reader in readers:
            with gpu.launching_on(reader):
                experts.copies.await_copies()
                experts.copies.await_copies()  # once is enough
            reader.launch(lambda: found.append(experts.there()))
        experts.copy(turn + 1)
        experts.copies.finish()
    assert found == [[1, 1, 1]] * 2 + [[2, 2, 2]] * 2
    assert experts.there() == [3, 3, 3]


def test_stream_that_could_not_wait_for_experts_waits_the_next_time(experts, monkeypatch):
    experts.copy(1)

    def interrupted(self, event):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lazy_gpu.Stream, "wait_event", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experts.copies.await_copies()
    assert experts.there() == [0, -1, -1]
    experts.copies.await_copies()
    assert experts.there() == [1, 1, 1]


def test_memory_of_experts_is_not_had_again_before_all_have_used_it(gpu, experts):
    experts.copy(1)
    reader = gpu.stream()
    with gpu.launching_on(reader):
        experts.copies.await_copies()
    experts.copies.discard(experts.memory)
    assert [stream for _, stream in gpu.recorded] == [experts.copies._stream, reader]


def test_book_on_the_gpu_is_kept_by_one_stream_after_the_other(gpu, monkeypatch):
    kernels_by_torch.install_book(monkeypatch)
    model = made()
    pack(model)
    leaf = Leaf("experts", model.experts, model.experts.quantized_experts.weights)
    group = group_of("0", [leaf], CPU)
    group.cached = 2
    engine = Engine(model, [group], CPU, 1)
    book, found, others = engine.pool.caches.of(leaf)._book, [], [gpu.stream(), gpu.stream()]
    assert type(book) is GpuBook
    for number, other in enumerate(others):
        with gpu.launching_on(other):
            book.follow()
            book.follow()
            assert len(other.work) == 1  # it has waited once
        other.launch(lambda number=number: found.append(number))
    others[1].finish()
    assert found == [0, 1]
    others[1].launch(lambda: found.append(2))
    assert book.count() == (0, 0, 0)
    assert found == [0, 1, 2]  # what the count waits for
    book.discard()
    assert gpu.recorded[-1][1] is others[1]
    engine.remove()
