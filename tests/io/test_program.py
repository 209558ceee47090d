"""What a load reads is laid out so that each byte comes once, in whole scales, and into memory that is free."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from bigload.io.program import ReadTask, Window, lay_out
from bigload.io.tensors import StoredTensor

CPU, META = torch.device("cpu"), torch.device("meta")  # two devices, of which nothing is touched
BATCH = 4096


def task_of(number, file, offset, numel, dtype, device, scale, at_home):
    tensor = StoredTensor(str(number), Path(file), dtype, (numel,), offset, numel * dtype.itemsize)
    home = torch.empty(tensor.nbytes, dtype=torch.uint8) if at_home else None
    return ReadTask(tensor, device, lambda *_: None, home, 1 if at_home else scale)


@st.composite
def tasks(draw):
    found, offsets = [], {"a": 8, "b": 16}
    for number in range(draw(st.integers(1, 25))):
        file, dtype = draw(st.sampled_from("ab")), draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
        scale = draw(st.sampled_from([1, 64, 1000]))
        numel = draw(st.integers(1, 40)) * scale + draw(st.integers(0, 3))
        device, at_home = draw(st.sampled_from([CPU, META])), draw(st.booleans())
        found.append(task_of(number, file, offsets[file], numel, dtype, device, scale, at_home))
        offsets[file] += found[-1].tensor.nbytes + draw(st.sampled_from([0, 0, 5]))
    return found


@given(tasks())
def test_each_value_comes_once_and_in_order(given_tasks):
    windows = {device: Window(10**6 * number, 3 * BATCH, BATCH) for number, device in enumerate((CPU, META))}
    program = lay_out(given_tasks, windows)
    come = dict.fromkeys(given_tasks, 0)
    for batch in program.batches:
        assert batch.nbytes <= BATCH or len(batch.pieces) == 1
        for task, begin, count, at in batch.pieces:
            assert task.device == batch.device
            assert begin == come[task]
            assert (at is None) == (task.home is not None)
            come[task] += count
            is_last = come[task] == task.tensor.nbytes // task.tensor.dtype.itemsize
            assert is_last or count % task.values_per_scale == 0
    assert all(count == task.tensor.nbytes // task.tensor.dtype.itemsize for task, count in come.items())


@given(tasks())
def test_spans_say_what_the_pieces_say(given_tasks):
    windows = {device: Window(10**6 * number, 3 * BATCH, BATCH) for number, device in enumerate((CPU, META))}
    program = lay_out(given_tasks, windows)
    spans = [tuple(program.spans[at : at + 5]) for at in range(0, len(program.spans), 5)]
    assert program.pieces == [piece for batch in program.batches for piece in batch.pieces]
    expected = []
    for number, batch in enumerate(program.batches):
        assert batch.number == number
        for task, begin, count, at in batch.pieces:
            itemsize, file = task.tensor.dtype.itemsize, program.files.index(task.tensor.file)
            to = task.home.data_ptr() + begin * itemsize if at is None else windows[task.device].address + at
            expected.append((file, task.tensor.offset + begin * itemsize, count * itemsize, to, number))
    assert spans == expected


@given(tasks())
def test_memory_of_a_batch_is_free_once_the_one_it_waits_for_is_done(given_tasks):
    windows = {device: Window(0, 3 * BATCH, BATCH) for device in (CPU, META)}
    program = lay_out(given_tasks, windows)
    had = {CPU: [], META: []}  # (begin, end, batch) of what was laid out before
    for batch in program.batches:
        waits = -1 if batch.after is None else batch.after.number
        assert waits < batch.number
        assert batch.after is None or batch.after.device == batch.device
        for task, _, count, at in batch.pieces:
            if at is None:
                continue
            end = at + count * task.tensor.dtype.itemsize
            assert at % 512 == 0
            assert end <= 3 * BATCH
            clashes = [who for begin, stop, who in had[batch.device] if begin < end and at < stop]
            assert all(who <= waits for who in clashes)
            had[batch.device].append((at, end, batch.number))


def test_devices_take_turns():
    made = [task_of(n, "a", 8 + 4096 * n, 1024, torch.float32, (CPU, META)[n > 3], 1, True) for n in range(8)]
    program = lay_out(made, {device: Window(0, 0, BATCH) for device in (CPU, META)})
    assert [batch.device for batch in program.batches] == [CPU, META] * 4
