"""Ways to read that there are where the tests write."""

import mmap
import os

import pytest

from handler.weights.reading import ALIGNMENT, READ_METHODS


@pytest.fixture(scope="session")
def methods(tmp_path_factory):
    """Those of READ_METHODS that the file system takes: a tmpfs of an older kernel has no direct reads."""
    path = tmp_path_factory.mktemp("methods") / "file"
    path.write_bytes(b"1")
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_DIRECT)) as file:
            os.preadv(file.fileno(), [mmap.mmap(-1, ALIGNMENT)], 0)  # some open files so and then refuse to read them
    except OSError:
        return [method for method in READ_METHODS if not method.direct]
    return list(READ_METHODS)


@pytest.fixture
def tells_what_is_cached(tmp_path):
    """Needs a file system that drops of a file what it is asked to, and tells what of it is in the page cache."""
    path = tmp_path / "told"
    path.write_bytes(b"1")
    with path.open("r+b") as file:

        def is_cached():
            try:
                return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                return False

        try:
            before = is_cached()
        except (OSError, AttributeError, NotImplementedError):
            pytest.skip("the file system does not tell what is cached")
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not before or is_cached():  # a file system in memory has nowhere else; a disk as fast is read by asking
            pytest.skip("the file system keeps what is to be dropped, or tells nothing of it")


@pytest.fixture(params=READ_METHODS, ids=str)
def method(request, methods):
    if request.param not in methods:
        pytest.skip("no direct reads here")
    return request.param
