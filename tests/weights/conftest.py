"""Ways to read that there are where the tests write."""

import os

import pytest

from handler.weights.reading import READ_METHODS


@pytest.fixture(scope="session")
def methods(tmp_path_factory):
    """Those of READ_METHODS that the file system takes: a tmpfs of an older kernel has no direct reads."""
    path = tmp_path_factory.mktemp("methods") / "file"
    path.touch()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return [method for method in READ_METHODS if not method.direct]
    return list(READ_METHODS)


@pytest.fixture
def tells_what_is_cached(tmp_path):
    """Needs a file system that tells what of a file is in the page cache."""
    path = tmp_path / "told"
    path.write_bytes(b"1")
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except (OSError, AttributeError, NotImplementedError):
            pytest.skip("the file system does not tell what is cached")


@pytest.fixture(params=READ_METHODS, ids=str)
def method(request, methods):
    if request.param not in methods:
        pytest.skip("no direct reads here")
    return request.param
