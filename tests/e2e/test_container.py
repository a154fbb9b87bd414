"""The container's entry, as a pod runs it: probes, drain, end, restart."""

import os
import subprocess
import sys
import threading
import time

import pytest
import requests

from scripts.archive import archive
from scripts.upload import upload
from tests.e2e.asking import PROMPT, complete, predict
from tests.e2e.conftest import ENTRY, REPOSITORY_SETTINGS, fetch


def mounted(folder, bloom, archive_format):
    """What the storage initializer leaves of a volume without empty files, as S3 and Azure Blob are to KServe."""
    upload(archive("bloom", bloom, folder / "store", archive_format=archive_format), f"file://{folder}/volume")
    for path in [path for path in (folder / "volume").rglob("*") if path.is_file() and not path.stat().st_size]:
        path.unlink()
    fetch(f"file://{folder}/volume", folder / "models")
    return folder / "models"


@pytest.fixture(scope="module")
def mount(bloom, tmp_path_factory):
    return mounted(tmp_path_factory.mktemp("mount"), bloom, "no-archive")


def test_probes_drain_and_end(container, mount):
    with container(mount, wait=False) as pod:
        early = pod.run("ready")
        assert early.returncode == 1 and "Traceback" not in early.stderr
        pod.wait_ready()
        assert pod.run("ready").returncode == 0
        answers = []
        asked = {"max_tokens": 1900, "ignore_eos": True}
        long = threading.Thread(target=lambda: answers.append(complete(pod.url, **asked).json()))
        long.start()
        time.sleep(1)
        assert pod.run("drain", "--seconds", "0").returncode == 0
        assert long.is_alive() and not answers, "the request is too short for this test"
        assert pod.run("drain", "--seconds", "100").returncode == 0
        long.join(timeout=2)
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [1900]
        began = time.monotonic()
        assert pod.run("drain", "--seconds", "100").returncode == 0
        assert time.monotonic() - began < 30  # there was nothing to wait for
        assert len(pod.family()) >= 3  # this entry, Java, the worker
        assert pod.end() == []
        assert pod.process.returncode == 0


def test_kserves_own_arguments_and_a_restart_on_the_same_volume(container, bloom, tmp_path, generated):
    mount, expected = mounted(tmp_path, bloom, "zip-store"), {"predictions": [generated(settings=REPOSITORY_SETTINGS)]}
    arguments = ["torchserve", "--start", f"--model-store={mount}/model-store"]
    with container(mount, *arguments) as pod:
        assert predict(pod.url, PROMPT).json() == expected
        for process in pod.family():  # the container dies, the volume stays
            process.kill()
        pod.process.wait()
        # With a process id that is another's by now.
        (pod.folder / "torchserve/.model_server.pid").write_text(str(os.getpid()))
        (pod.folder / "torchserve/leftover").touch()
        pod.start(*pod.arguments)
        pod.wait_ready()
        assert predict(pod.url, PROMPT).json() == expected
        assert not (pod.folder / "torchserve/leftover").exists()


def test_a_model_that_cannot_load_is_never_ready(container, mount, tmp_path):
    subprocess.run(["cp", "-rL", mount, tmp_path / "models"], check=True)
    (tmp_path / "models/model-store/bloom/setup_config.json").write_text('{"max_memory": "all"}')
    with container(tmp_path / "models", wait=False) as pod:
        deadline = time.monotonic() + 60
        while b"SettingsError" not in (pod.folder / "log").read_bytes():
            assert time.monotonic() < deadline, (pod.folder / "log").read_text()
            time.sleep(0.2)
        probe = pod.run("ready")
        assert probe.returncode == 1 and probe.stderr.startswith("bloom: ") and probe.stderr.count("\n") == 1
        assert requests.get(f"{pod.url}/ping", timeout=10).status_code == 200  # which is why it is not the probe


def test_what_was_not_uploaded_is_said(tmp_path):
    missing = subprocess.run([*ENTRY, "serve", "--ts-config", tmp_path / "no"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert missing.stderr.startswith(f"error: {tmp_path}/no does not exist: set storageUri to what make upload filled")


def test_probes_import_nothing_but_the_standard_library():
    code = "import sys, server.container; print(*(set(sys.modules) & {'torch', 'requests', 'psutil', 'yaml'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
