"""Up with `upload`, down with the code of KServe's storage initializer, and served from the folder that it fills."""

import subprocess

import pytest
import requests

from scripts.archive import ROOT, archive
from scripts.upload import upload

FETCH = "import sys; from kserve_storage import Storage; Storage.download(sys.argv[1], sys.argv[2])"
FORMATS = ["zip-store", "no-archive"]


@pytest.fixture(scope="module", params=FORMATS)
def made(request, bloom, tmp_path_factory):
    return archive("bloom", bloom, tmp_path_factory.mktemp("store"), archive_format=request.param)


def fetch_and_serve(uri, mount, container):
    """What the pod's two containers do, one after the other; what the second answers."""
    command = [ROOT / ".venv-kserve/bin/python", "-c", FETCH, uri, mount]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    with container(mount) as pod:
        body = {"instances": [{"data": "My dog is cute"}], "parameters": {"max_new_tokens": 4}}
        answer = requests.post(f"{pod.url}/v1/models/bloom:predict", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]


def test_from_a_cloud_store(cloud, made, tmp_path, container):
    upload(made, cloud.uri)
    (text,) = fetch_and_serve(cloud.uri, tmp_path / "models", container)
    assert text.startswith("My dog is cute") and len(text) > len("My dog is cute")


def test_from_a_volume(made, tmp_path, container):
    """A PVC is mounted in the pod, and KServe links what is in it."""
    upload(made, f"file://{tmp_path}/volume")
    (text,) = fetch_and_serve(f"file://{tmp_path}/volume", tmp_path / "models", container)
    assert text.startswith("My dog is cute") and len(text) > len("My dog is cute")
