"""Reads that go on in the background give the file's bytes, end before their memory does, and say what went wrong."""

import dataclasses
import errno
import os
import random

import pytest
from forks import exit_status, needs_fork
from resources import open_files

from bigload.io import async_reads
from bigload.io.async_reads import Reads

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(params=["library", "pool"])
def reader(request, monkeypatch):
    """Threads of the C library's, or of Python's; blocks of 4 KiB."""
    monkeypatch.setattr(async_reads, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(async_reads, "SMALL_BYTES", 0)
    if request.param == "pool":
        monkeypatch.setattr(async_reads, "_library", lambda: None)
    elif async_reads._library() is None:
        pytest.skip("no glibc")
    return request.param


@pytest.fixture
def with_functions(monkeypatch):
    """Put a function of the test's own in the place of one of the C library's."""
    if async_reads._library() is None:
        pytest.skip("no glibc")
    monkeypatch.setattr(async_reads, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(async_reads, "SMALL_BYTES", 0)

    def put(**functions):
        changed = dataclasses.replace(async_reads._library(), **functions)
        monkeypatch.setattr(async_reads, "_library", lambda: changed)

    return put


@pytest.fixture(scope="module")
def data():
    return random.Random(0).randbytes(100_003)


@pytest.fixture
def file(tmp_path, data):
    path = tmp_path / "data"
    path.write_bytes(data)
    return path


def memory(*sizes):
    return [memoryview(bytearray(size)) for size in sizes]


@pytest.mark.parametrize("threads", [1, 3, 100])
@pytest.mark.parametrize("sizes", [(1,), (4096,), (4097,), (60_000,), (5000, 1, 9000, 4096)], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 8191])
def test_bytes_are_those_of_the_file(reader, file, data, threads, sizes, offset):
    buffers = memory(*sizes)
    with Reads(threads) as reads:
        assert reads.finish(reads.begin(file, buffers, offset)) == sum(sizes)
    assert b"".join(buffers) == data[offset : offset + sum(sizes)]


def test_many_reads_of_several_files_go_on_at_once(reader, tmp_path, data):
    files = [tmp_path / str(number) for number in range(3)]
    for number, path in enumerate(files):
        path.write_bytes(data[number:])
    asked = [(number, 7 * turn, memory(20_000 + turn)) for turn in range(40) for number in range(3)]
    with Reads(4) as reads:
        going = [reads.begin(files[number], buffers, offset) for number, offset, buffers in asked]
        assert [reads.finish(read) for read in going] == [len(buffers[0]) for _, _, buffers in asked]
    for number, offset, (buffer,) in asked:
        assert buffer == data[number + offset : number + offset + len(buffer)]


def test_end_of_the_file_is_told_by_the_count(reader, file, data):
    (buffer,) = buffers = memory(30_000)
    with Reads(3) as reads:
        assert reads.finish(reads.begin(file, buffers, len(data) - 10_000)) == 10_000
        assert reads.finish(reads.begin(file, memory(30_000), len(data))) == 0
    assert buffer[:10_000] == data[-10_000:]


def test_what_is_small_is_read_at_once(file, data, monkeypatch):
    monkeypatch.setattr(async_reads, "_ReadByLibrary", None)
    monkeypatch.setattr(async_reads, "_ReadByPool", None)
    buffers = memory(*[64] * 50)
    with Reads(4) as reads:
        read = reads.begin(file, buffers, 5)
        assert b"".join(buffers) == data[5 : 5 + 3200]  # before it is waited for
        assert reads.finish(read) == 3200


def test_end_of_the_block_waits_for_what_goes_on(reader, file, data):
    buffers = memory(90_000)
    with Reads(2) as reads:
        reads.begin(file, buffers, 0)
        assert not reads.is_done
    assert reads.is_done
    assert buffers[0] == data[:90_000]


def test_closed_file_is_opened_again(reader, file, data):
    with Reads(3) as reads:
        before = open_files()
        for _ in range(3):
            buffers = memory(20_000)
            reads.finish(reads.begin(file, buffers, 3))
            assert buffers[0] == data[3:20_003]
            reads.close(file)
            assert not open_files() - before


def test_file_that_is_not_there_is_an_error(reader, tmp_path):
    with Reads(3) as reads, pytest.raises(FileNotFoundError):
        reads.begin(tmp_path / "none", memory(9000), 0)


def test_folder_is_an_error(reader, tmp_path):
    with Reads(3) as reads, pytest.raises(IsADirectoryError):
        reads.finish(reads.begin(tmp_path, memory(9000), 0))


def test_error_of_the_system_is_raised_where_the_read_is_waited_for(file, with_functions):
    own = async_reads._library().aio_error
    asked = []

    def failing(address):
        asked.append(address)
        return errno.EIO if own(address) == 0 and address == max(asked) else own(address)

    with_functions(aio_error=failing)
    with Reads(3) as reads:
        read = reads.begin(file, memory(50_000), 0)
        with pytest.raises(OSError, match="Input/output error") as raised:
            reads.finish(read)
    assert raised.value.errno == errno.EIO


def test_more_than_the_system_takes_at_once_is_read_all_the_same(file, data, with_functions):
    """Then what was not taken has EAGAIN for its error, and nothing was read."""
    with_functions(lio_listio=lambda *arguments: -1, aio_error=lambda address: errno.EAGAIN)
    buffers = memory(50_000)
    with Reads(3) as reads:
        assert reads.finish(reads.begin(file, buffers, 0)) == 50_000
    assert buffers[0] == data[:50_000]


def test_wait_that_a_signal_ends_too_early_goes_on(file, data, with_functions):
    own, waits = async_reads._library().aio_error, []

    def pending(address):
        return errno.EINPROGRESS if len(waits) < 5 else own(address)

    def interrupted(*arguments):
        waits.append(arguments)
        return -1

    with_functions(aio_error=pending, aio_suspend=interrupted)
    buffers = memory(4096)
    with Reads(1) as reads:
        read = reads.begin(file, buffers, 0)
        while async_reads._library().aio_return(read._addresses[0]) != 4096:
            os.sched_yield()  # the read itself ends in its own time
        assert reads.finish(read) == 4096
    assert len(waits) == 5
    assert buffers[0] == data[:4096]


def test_memory_of_a_read_that_was_not_waited_for_is_kept(file, with_functions, monkeypatch):
    """A second Ctrl-C, on a disk that hangs: what is written to must not become another's."""
    own = async_reads._library()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with_functions(aio_error=lambda address: errno.EINPROGRESS, aio_suspend=interrupted)
    monkeypatch.setattr(async_reads, "_abandoned", [])
    reads = Reads(2)
    read = reads.begin(file, memory(9000), 0)
    with pytest.raises(KeyboardInterrupt), reads:
        pass
    assert not reads.is_done
    assert async_reads._abandoned == [reads]
    assert list(reads._going) == [read]
    monkeypatch.setattr(read, "_library", own)
    reads.__exit__()
    assert reads.is_done


@needs_fork
def test_forked_process_reads_by_threads_of_its_own(file, data):
    """The C library's stay in the parent, and it would wait for them."""

    def read():
        buffers = memory(100_000)
        with Reads(3) as reads:
            reads.finish(reads.begin(file, buffers, 0))
        assert buffers[0] == data[:100_000]

    read()
    assert exit_status(read) == 0
