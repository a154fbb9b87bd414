"""What tests of several folders use: a tiny BLOOM, a folder to pack, and the cloud stores' stand-ins."""

import os
import uuid

import pytest

from tests import clouds
from tests.models import save_tiny_bloom


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that share a server run in one process, so that it is started once."""
    for item in items:
        if "cloud_server" in item.fixturenames:
            item.add_marker("cloud")
            item.add_marker(pytest.mark.xdist_group(item.callspec.params["cloud_server"]))


@pytest.fixture(scope="session")
def bloom(tmp_path_factory):
    """The folder of a tiny BLOOM in three shards. It is everyone's: who changes something copies it first."""
    folder = save_tiny_bloom(tmp_path_factory.mktemp("checkpoint") / "bloom")
    assert len(list(folder.glob("model-*.safetensors"))) == 3
    return folder


@pytest.fixture(scope="session", params=["s3", "gcs", "azure"])
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
