"""Up with `upload`, down with the code of KServe's storage initializers: what the container then serves from."""

import pytest

from scripts.archive import ROOT, archive
from scripts.console import UserError
from scripts.releases import release_uri
from scripts.stores import check_kserve
from scripts.upload import upload
from server.config_properties import METRICS, cluster_properties
from tests.clouds import files
from tests.e2e.conftest import fetch

LOCK = (ROOT / "requirements-kserve-old.lock").read_text()
OLD = [line.partition("==")[2] for line in LOCK.splitlines()]
VERSIONS = [None, *OLD]


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
    # The path comes again in the keys, and it has a sibling: with these some versions went wrong.
    uri = cloud.uri.replace("models/bloom", "model-store/bloom")
    release = upload(made, uri).release
    upload(made, f"{uri}-7b1")
    for kserve in [None] if cloud.name == "azure" else VERSIONS:
        mount = tmp_path / f"models-{kserve}"
        fetch(release_uri(uri, release), mount, kserve)
        arrived = files(mount)
        # KServe leaves empty files out of what it gets from S3 and Azure; test_container.py serves without them.
        assert arrived == {name: data for name, data in mounted.items() if data or name in arrived}, kserve


@pytest.mark.parametrize("cloud_server", ["azure"], indirect=True)
@pytest.mark.parametrize("made", ["no-archive"], indirect=True)
def test_why_azure_needs_a_newer_kserve(cloud, made, mounted, tmp_path):
    """Should this fail one day, it needs no newer one."""
    release = upload(made, cloud.uri).release
    for kserve in OLD:
        with pytest.raises(UserError, match=r"use KServe 0\.17 or newer"):
            check_kserve(cloud.uri, kserve)
        fetch(release_uri(cloud.uri, release), tmp_path / kserve, kserve)
        lost = {name for name in mounted.keys() - files(tmp_path / kserve).keys() if mounted[name]}
        assert lost and all("/handler/protocols/openai/" in name for name in lost)


def test_from_a_volume(made, mounted, tmp_path):
    """A PVC is mounted in the pod, and KServe links what is in it; test_container.py serves from such links."""
    release = upload(made, f"file://{tmp_path}/volume").release
    for kserve in VERSIONS:
        mount = tmp_path / f"models-{kserve}"
        fetch(release_uri(f"file://{tmp_path}/volume", release), mount, kserve)
        assert files(mount) == mounted, kserve
