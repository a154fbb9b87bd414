"""Up with `upload`, down with the code of KServe's storage initializer: what the container then serves from."""

import pytest

from scripts.archive import archive
from scripts.upload import upload
from server.config_properties import METRICS, cluster_properties
from tests.clouds import files
from tests.e2e.conftest import fetch


@pytest.fixture(scope="module", params=["zip-store", "no-archive"])
def made(request, bloom, tmp_path_factory):
    return archive("bloom", bloom, tmp_path_factory.mktemp("store"), archive_format=request.param)


@pytest.fixture(scope="module")
def mounted(made):
    """Path -> bytes of all that the container must find under its mount."""
    packed = {"": made.read_bytes()} if made.is_file() else {f"/{name}": data for name, data in files(made).items()}
    archived = {f"model-store/{made.name}{name}": data for name, data in packed.items()}
    config = {
        "config/config.properties": cluster_properties(made).encode(),
        "config/metrics.yaml": METRICS.read_bytes(),
    }
    return archived | config


def test_from_a_cloud_store(cloud, made, mounted, tmp_path):
    upload(made, cloud.uri)
    fetch(cloud.uri, tmp_path / "models")
    arrived = files(tmp_path / "models")
    # KServe leaves empty files out of what it gets from S3 and Azure Blob; test_container.py serves without them.
    assert arrived == {name: data for name, data in mounted.items() if data or name in arrived}


def test_from_a_volume(made, mounted, tmp_path):
    """A PVC is mounted in the pod, and KServe links what is in it; test_container.py serves from such links."""
    upload(made, f"file://{tmp_path}/volume")
    fetch(f"file://{tmp_path}/volume", tmp_path / "models")
    assert files(tmp_path / "models") == mounted
