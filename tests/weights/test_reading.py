import os
from concurrent.futures import wait

import pytest

from handler.weights import reading
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


@pytest.mark.parametrize("method", READ_METHODS[:4:3], ids=str, indirect=True)
def test_a_file_that_was_cut_is_an_error_and_can_be_read_again(file, method):
    data, reader = file.read_bytes(), Reader(method)
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
