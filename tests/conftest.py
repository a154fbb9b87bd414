"""What tests of several folders use: a tiny BLOOM, a folder to pack, the clouds' stand-ins; and which run together."""

import os
import re
import uuid

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import clouds

# A machine with a GPU runs the same tests as any other; those that a GPU can run, it runs with TEST_DEVICE=cuda.
ON_GPU = os.environ.get("TEST_DEVICE") == "cuda"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# What `make test-fast` leaves out besides servers and stores: files and tests that search long.
SLOW = (
    "test_equality.py",
    "test_architectures.py",
    "test_speculation.py",
    "test_draft_model.py",
    "test_the_corpus",
    "test_memory_does_not_grow_with_what_is_quantized",
    "test_the_command_prints_yaml_that_is_applied_by_deploy",
    "test_what_is_missing_is_named",
    "test_a_real_group",
)
# What `make test-gpu` runs: what computes on the device that there is.
GPU_TESTS = (
    "test_onloading.py",
    "test_replay.py",
    "test_architectures.py",
    "test_equality.py",
    "test_draft_model.py",
    "test_kv_cache.py",
    "test_prefix_cache.py",
    "test_requests.py",
    "test_speculation.py",
)
STORES = ["s3", "gcs", "azure"]


def pytest_collection_modifyitems(items):
    """The longest first, so that all processes end at the same time."""
    if ON_GPU:
        items[:] = [item for item in items if item.path.name in GPU_TESTS]
    for item in items:
        if "cloud_server" in item.fixturenames:
            item.add_marker("cloud")
        if item.path.name in SLOW or item.originalname in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: not {"e2e", "cloud"} & set(item.keywords))


def pytest_xdist_make_scheduler(config, log):
    return Together(config, log)


class Together(LoadScopeScheduling):
    """Tests that share a server or a folder run in one process; the others go wherever one is free.

    Instead of xdist_group marks: pytest-xdist 3.8 does not see them with pytest 9.2 (its issue 1386).
    """

    def _split_scope(self, nodeid):
        path, _, test = nodeid.partition("::")
        if store := re.search(rf"\[({'|'.join(STORES)})\b", test):
            return store[1]
        if "/e2e/shared/" in path:
            return "shared"
        return path if "/e2e/" in path else nodeid


@pytest.fixture(scope="session")
def bloom(tmp_path_factory):
    """The folder of a tiny BLOOM in three shards. It is everyone's: who changes something copies it first."""
    # Here, because it imports torch, which the process that hands out the tests can do without.
    from tests.models import save_tiny_bloom

    folder = save_tiny_bloom(tmp_path_factory.mktemp("checkpoint") / "bloom")
    assert len(list(folder.glob("model-*.safetensors"))) == 3
    return folder


@pytest.fixture(scope="session")
def draft_bloom(tmp_path_factory):
    """The folder of a smaller BLOOM with the same tokenizer."""
    from tests.models import save_tiny_bloom

    return save_tiny_bloom(tmp_path_factory.mktemp("draft") / "bloom-1", shards=False, n_layer=1)


@pytest.fixture(scope="session", params=STORES)
def cloud_server(request, tmp_path_factory):
    if request.param == "azure" and not clouds.AZURITE.is_file():
        pytest.skip("Azurite is not installed: npm's registry could not be reached")
    with getattr(clouds, request.param)(tmp_path_factory.mktemp(request.param) / "log") as cloud:
        yield cloud


@pytest.fixture
def cloud(cloud_server, monkeypatch):
    """A store with an empty bucket, and a proxy before it as `cloud.proxy`, in this process's environment."""
    proxy = clouds.Proxy(cloud_server.port)
    for name, value in cloud_server.environment(proxy.port).items():
        monkeypatch.setenv(name, value)
    cloud_server.bucket, cloud_server.proxy = f"bucket-{uuid.uuid4()}", proxy
    clouds.make_bucket(cloud_server)
    yield cloud_server
    proxy.close()


@pytest.fixture
def source(tmp_path):
    """A folder that looks like a checkpoint of 5 MB."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(5_000_000))
    return folder
