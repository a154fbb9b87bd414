import ctypes
import errno
import mmap
import os
import time
from concurrent.futures import wait

import pytest

from handler.weights import reading
from handler.weights.page_cache import cached_pages
from handler.weights.reading import ALIGNMENT, READ_METHODS, Range, Reader, fastest_reader
from handler.weights.streaming import aligned_memory

SIZE = 9_000_000  # three pieces, the last of them short
RANGES = [(0, SIZE), (0, 10), (4096, 8192), (4095, 2), (5_000_001, 3_999_999), (SIZE - 1, 1)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    return path


def read(reader, wanted):
    buffer = aligned_memory(wanted.buffer_size)
    pieces = reader.start(wanted, buffer.data)
    wait(pieces)  # one that fails late would open a file in the midst of what a test does next
    for piece in pieces:
        piece.result()
    skipped = wanted.start - wanted.aligned_start
    return bytes(buffer[skipped : skipped + wanted.size])


def test_every_method_reads_any_range(file, method):
    reader = Reader(method)
    for start, size in RANGES:
        assert read(reader, Range(file, start, size)) == file.read_bytes()[start : start + size]
    assert reader.bytes_read >= sum(size for _, size in RANGES)


@pytest.mark.parametrize("method", READ_METHODS[:4:3], ids=str, indirect=True)
def test_short_reads_go_on_where_they_ended(file, monkeypatch, method):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][: 3 * ALIGNMENT]], at))
    assert read(Reader(method), Range(file, 100, SIZE - 200)) == file.read_bytes()[100:-100]


@pytest.mark.parametrize("method", READ_METHODS[1:4:2], ids=str, indirect=True)
def test_a_file_that_was_cut_is_an_error_and_can_be_read_again(file, method):
    data, reader = file.read_bytes(), Reader(method)  # of one thread: another may have it open anew when one fails
    wanted = Range(file, 0, SIZE)
    os.truncate(file, SIZE // 2)
    with pytest.raises(OSError, match="weights ends too early"):
        read(reader, wanted)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        read(reader, wanted)
    file.write_bytes(data)
    assert read(reader, wanted) == data


def test_the_kernel_is_asked_for_nothing_outside_the_range(file, monkeypatch):
    """By itself it reads on: by 8 MB on some disks, behind each tensor."""
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: asked.append((advice, start, size)))
    wanted = Range(file, 4096, SIZE - 8192)
    read(Reader(READ_METHODS[3]), wanted)
    assert asked[0] == (os.POSIX_FADV_RANDOM, 0, 0)
    willed = [(start, start + size) for advice, start, size in asked if advice == os.POSIX_FADV_WILLNEED]
    assert len(willed) == 2 and all(
        start > 4096 and end <= wanted.aligned_start + wanted.aligned_size for start, end in willed
    )


def drop_from_page_cache(file):
    """Asked once, the kernel leaves pages that another core has just put there and not yet on its list."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        os.fsync(opened.fileno())
        first = ctypes.c_char.from_buffer(mapped)
        cached = (ctypes.c_ubyte * -(-SIZE // mmap.PAGESIZE))()
        for _ in range(100):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert not ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(SIZE), cached)
            if not any(cached):
                break
            time.sleep(0.05)
        del first  # or the mapping cannot be closed
    assert not any(cached)


def test_what_the_kernel_took_back_is_read_past_the_page_cache(file, method, tells_what_is_cached):
    """Otherwise it would push out what is read next, and a cyclic read of more than fits would find nothing."""
    reader, wanted = Reader(method), Range(file, 0, SIZE)
    pieces, data = wanted.pieces, file.read_bytes()

    def lost_by_reading():
        before = reader.bytes_lost
        assert read(reader, wanted) == data
        return reader.bytes_lost - before

    reader.keep(set(pieces))
    assert [lost_by_reading() for _ in range(2)] == [0, 0]
    drop_from_page_cache(file)
    assert lost_by_reading() == sum(piece.size for piece in pieces) and not reader._cached
    with file.open("rb") as opened:
        if (pages := cached_pages(opened.fileno(), 0, SIZE)) is not None:
            assert not pages
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # to ask must not make the kernel read on
        for piece in reversed(pieces if pages is None else []):  # but for the page that was asked for
            with pytest.raises(BlockingIOError):
                os.preadv(opened.fileno(), [bytearray(1)], piece.start + piece.size // 2, os.RWF_NOWAIT)
    assert [lost_by_reading() for _ in range(2)] == [0, 0] and reader._cached == set(pieces)


def test_an_older_kernel_is_asked_another_way(file, monkeypatch, tells_what_is_cached):
    monkeypatch.setattr(reading, "cached_pages", lambda *given: None)
    asked, preadv = [], os.preadv

    def spy(fd, buffers, at, *flags):
        if not flags:
            return preadv(fd, buffers, at)
        asked.append(at)
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", spy)
    reader, wanted = Reader(READ_METHODS[3]), Range(file, 0, SIZE)
    reader.keep(set(wanted.pieces))
    for _ in range(2):
        assert read(reader, wanted) == file.read_bytes()
    assert len(asked) == 3 and reader.bytes_lost == sum(piece.size for piece in wanted.pieces)


def test_pages_that_are_cached_are_counted(file):
    with file.open("rb") as opened:
        if (pages := cached_pages(opened.fileno(), 0, SIZE)) is None:
            pytest.skip("this kernel does not tell")
        assert pages == -(-SIZE // mmap.PAGESIZE)
        assert cached_pages(opened.fileno(), mmap.PAGESIZE - 1, 2) == 2
    drop_from_page_cache(file)
    with file.open("rb") as opened:
        assert cached_pages(opened.fileno(), 0, SIZE) == 0
    assert cached_pages(-1, 0, 1) is None


@pytest.mark.parametrize(
    "refusal",
    [
        NotImplementedError("preadv2: flags unavailable on this platform"),  # a Python for an old libc
        *(OSError(number, os.strerror(number)) for number in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)),
        None,  # a Python that was built where the kernel had no such flag
    ],
    ids=repr,
)
def test_where_nobody_tells_what_is_cached(file, monkeypatch, refusal):
    monkeypatch.setattr(reading, "cached_pages", lambda *given: None)
    preadv = os.preadv

    def refusing(fd, buffers, at, flags=0):
        if flags:
            raise refusal
        return preadv(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", refusing)
    if refusal is None:
        monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    else:
        monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    reader, wanted = Reader(READ_METHODS[3]), Range(file, 0, SIZE)
    reader.keep(set(wanted.pieces))
    for _ in range(3):
        assert read(reader, wanted) == file.read_bytes()
    assert not reader.bytes_lost and not reader.tells_what_is_cached


def test_a_neighbour_that_is_not_kept_takes_nothing_with_it(file, tells_what_is_cached):
    """Tensors begin within blocks, which two of them then share, and one is dropped after each read."""
    reader, border = Reader(READ_METHODS[3]), 5_000_001
    before, kept, data = Range(file, 0, border), Range(file, border, SIZE - border), file.read_bytes()
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # what is not on the disk yet is not dropped, nor in part what was written at once
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader.keep(set(kept.pieces))
    for _ in range(3):
        for wanted in (before, kept):
            assert read(reader, wanted) == data[wanted.start :][: wanted.size]
    assert reader.bytes_lost == 0 and reader._cached == set(kept.pieces)


def test_a_row_of_what_is_kept_leaves_it_there(file, tells_what_is_cached):
    reader, wanted, row = Reader(READ_METHODS[3]), Range(file, 0, SIZE), Range(file, ALIGNMENT, 10)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    reader.keep(set(wanted.pieces))
    for _ in range(2):
        assert read(reader, wanted) == file.read_bytes()
        for future in reader.start(row, aligned_memory(row.aligned_size).data, drop=False):
            future.result()
    assert reader.bytes_lost == 0


def test_what_is_let_go_of_while_it_is_read_is_dropped(file, monkeypatch):
    reader, wanted, dropped = Reader(READ_METHODS[3]), Range(file, 0, SIZE), []
    reader.keep(set(wanted.pieces))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (setattr(reader, "kept", set()), preadv(*args))[1])
    monkeypatch.setattr(reader, "_drop", dropped.append)
    assert read(reader, wanted) == file.read_bytes()
    assert dropped == wanted.pieces and not reader._cached


def test_the_fastest_way_is_taken(file, monkeypatch):
    rates = dict(zip(READ_METHODS, [1.0, 1.05, 3.0, 1.0, 3.2, 2.0], strict=True))
    monkeypatch.setattr(reading, "_rate", lambda method, pieces, seconds: rates[method])
    reader, rate = fastest_reader([Range(file, 0, SIZE)])
    assert (reader.method, rate) == (READ_METHODS[2], 3.0)  # the fifth is faster, but not by enough


def test_rates_are_measured(file):
    reader, rate = fastest_reader([Range(file, 0, SIZE)], seconds=0.1)
    assert reader.method in READ_METHODS and rate > 0
    assert not reader.bytes_read  # what was read to measure is not counted


def test_threads_that_come_too_late_measure_nevertheless(file):
    assert fastest_reader([Range(file, 0, SIZE)], seconds=0)[1] > 0


def test_a_file_system_without_direct_reads(file, monkeypatch):
    opened = os.open

    def refusing(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", refusing)
    assert not fastest_reader([Range(file, 0, SIZE)], seconds=0.1)[0].method.direct


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        fastest_reader([Range(tmp_path / "missing", 0, 5)])
