"""The real TorchServe, on free ports, in a folder of its own."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml

from scripts.archive import ROOT, archive
from scripts.zip import zip_checkpoint
from server.torchserve import TorchServe, free_port
from tests.models import save_tiny_bloom

READY_TIMEOUT = 180  # seconds
ENTRY = [sys.executable, "-m", "server.container"]


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/e2e" in str(item.path):
            item.add_marker("e2e")


@pytest.fixture(scope="session")
def bloom(tmp_path_factory):
    """The folder of a tiny BLOOM in three shards."""
    folder = save_tiny_bloom(tmp_path_factory.mktemp("checkpoint") / "bloom")
    assert len(list(folder.glob("model-*.safetensors"))) == 3
    return folder


@pytest.fixture(scope="session")
def bloom_zip(bloom, tmp_path_factory):
    return zip_checkpoint(bloom, tmp_path_factory.mktemp("zip") / "model.zip")


@pytest.fixture(scope="session")
def serving(tmp_path_factory):
    """serving(weights, settings) -> a context manager of a TorchServe whose model `bloom` is READY."""

    @contextlib.contextmanager
    def serving(
        weights,
        settings=None,
        archive_format="zip-store",
        environment=None,
        model_config=ROOT / "model-config.yaml",
        wait=True,
    ):
        folder = tmp_path_factory.mktemp("serving")
        setup = folder / "setup_config.json"
        setup.write_text(json.dumps(settings or {}))
        made = archive("bloom", weights, folder / "store", setup, model_config, archive_format)
        with TorchServe(made, free_port(), folder / "work", environment) as server:
            if wait:
                server.wait_ready(READY_TIMEOUT)
            yield server

    return serving


@pytest.fixture(scope="session")
def plain_config(tmp_path_factory):
    """model-config.yaml in plain mode."""
    config = yaml.safe_load((ROOT / "model-config.yaml").read_text())
    config |= {"continuousBatching": False, "batchSize": 8}
    path = tmp_path_factory.mktemp("plain") / "model-config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def container(tmp_path_factory):
    """container(mount, *arguments) -> a context manager of what the container's entry runs on that folder.

    Its addresses are on free ports in place of the pod's.
    """

    @contextlib.contextmanager
    def container(mount, *arguments, wait=True):
        port = free_port()
        addresses = [f"inference_address=http://127.0.0.1:{port}", f"management_address=http://127.0.0.1:{port + 1}"]
        addresses += [f"metrics_address=http://127.0.0.1:{port + 2}"]
        addresses += [f"grpc_inference_port={port + 3}", f"grpc_management_port={port + 4}"]
        with tempfile.TemporaryDirectory(prefix="pod-") as folder:  # short, for the path of a socket
            pod = Pod(f"http://127.0.0.1:{port}", Path(folder))
            config = ["--ts-config", str(mount / "config/config.properties")]
            pod.start(*(arguments or ["serve"]), *config, *addresses)
            try:
                if wait:
                    pod.wait_ready()
                yield pod
            finally:
                pod.end()

    return container


class Pod:
    """A process in place of a container, with a temporary folder of its own."""

    def __init__(self, url, folder):
        self.url, self.folder = url, folder
        self.environment = {**os.environ, "TMPDIR": str(folder), "TS_SERVICE_ENVELOPE": "kserve"}

    def start(self, *arguments):
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen([*ENTRY, *arguments], env=self.environment, stdout=log, stderr=log)
        self.arguments = arguments

    def run(self, *arguments):
        """A probe or a hook."""
        return subprocess.run([*ENTRY, *arguments], env=self.environment, capture_output=True, text=True, timeout=120)

    def wait_ready(self):
        deadline = time.monotonic() + READY_TIMEOUT
        while (probe := self.run("ready")).returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"not ready: {probe.stderr}\n{(self.folder / 'log').read_text()}")
            time.sleep(0.2)

    def family(self):
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def end(self):
        """As Kubernetes does; what is left after the grace period."""
        family = self.family() if self.process.poll() is None else []
        self.process.terminate()
        _, alive = psutil.wait_procs(family, timeout=30)
        for process in alive:
            process.kill()
        self.process.wait()
        return alive
