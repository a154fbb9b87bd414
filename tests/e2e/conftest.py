"""The real TorchServe, on free ports, in a folder of its own."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch

from handler.loading import load_model
from handler.settings import Settings
from scripts.archive import ROOT, archive
from server.config_properties import PORTS
from server.config_properties import addresses as addresses_of
from server.torchserve import TorchServe
from tests.e2e.asking import PROMPT
from tests.nginx import with_nginx
from tests.ports import free_port

READY_TIMEOUT = 180  # seconds
REPOSITORY_SETTINGS = json.loads((ROOT / "setup_config.json").read_text())
ENTRY = [sys.executable, "-m", "server.container"]
OLD_KSERVE = ROOT / ".venv-kserve-old"
LIMITS = {"max_batch_size": 4, "max_queue": 8, "max_prompt_tokens": 200, "max_sequence_length": 8192}
SETTINGS = {"max_new_tokens": 8, **LIMITS}


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/e2e" in str(item.path):
            item.add_marker("e2e")


@pytest.fixture(scope="session")
def generated(bloom, tmp_path_factory):
    """generated(prompt, new_tokens) -> the prompt and what `model.generate` adds to it, in this process and alone."""

    @functools.cache
    def load(folder, settings):
        return load_model(folder, Settings.model_validate_json(settings), tmp_path_factory.mktemp("generated"))

    def generated(prompt=PROMPT, new_tokens=None, folder=bloom, settings=SETTINGS):
        loaded = load(folder, json.dumps(settings))
        inputs = loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        new_tokens = new_tokens or Settings.model_validate(settings).max_new_tokens
        with torch.inference_mode():
            tokens = loaded.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        return loaded.tokenizer.decode(tokens[0], skip_special_tokens=True)

    return generated


@pytest.fixture(scope="session")
def serving(tmp_path_factory):
    """serving(weights, settings) -> a context manager of a TorchServe whose model `bloom` is READY.

    In the end nothing is left of it but its logs, and all of the weights.
    """

    @contextlib.contextmanager
    def serving(
        weights,
        settings,
        archive_format="zip-store",
        environment=None,
        model_config=ROOT / "model-config.yaml",
        wait=True,
        folder=None,
    ):
        folder = folder or tmp_path_factory.mktemp("serving")
        setup = folder / "setup_config.json"
        setup.write_text(json.dumps(settings))
        made = archive("bloom", weights, folder / "store", setup, model_config, archive_format)
        sizes = sizes_in(weights)
        with TorchServe(made, free_port(), folder / "work", environment) as server:
            if wait:
                server.wait_ready(READY_TIMEOUT)
            short = server.work / "short"
            temporary = [server.work / "tmp", *([Path(short.read_text())] if short.exists() else [])]
            yield server
        assert not server.running() and not any(path.exists() for path in temporary)
        assert sizes_in(weights) == sizes

    return serving


def sizes_in(weights):
    return {path: path.stat().st_size for path in (weights, *weights.rglob("*")) if path.is_file()}


def fetch(uri, mount, kserve=None):
    """What KServe's storage initializer does before the container starts; kserve: an old version of OLD_KSERVE."""
    script = Path(__file__).with_name("storage_initializer.py")
    command = [ROOT / ".venv-kserve/bin/python", script, uri, mount, *([OLD_KSERVE / kserve] if kserve else [])]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture
def container():
    """container(mount, *arguments) -> a context manager of what the container's entry runs on that folder.

    Its addresses are on free ports in place of the pod's.
    """

    @contextlib.contextmanager
    def container(mount, *arguments, wait=True, **image):
        port, behind = free_port(), free_port()
        addresses = addresses_of(dict(zip(PORTS, range(behind, behind + len(PORTS)), strict=True)))
        with tempfile.TemporaryDirectory(prefix="pod-") as folder:  # short, for the path of a socket
            pod = Pod(f"http://127.0.0.1:{port}", Path(folder), **image)
            options = ["--ts-config", str(mount / "config/config.properties")]
            options += ["--port", str(port), "--metrics-port", str(port + 1)]
            changes = [f"{key}={value}" for key, value in addresses.items()]
            pod.start(*(arguments or ["serve"]), *options, *changes)
            try:
                if wait:
                    pod.wait_ready()
                yield pod
            finally:
                pod.end()

    return container


class Pod:
    """A process in place of a container, with a temporary folder of its own.

    entry, environment, cwd: as the image has them.
    """

    def __init__(self, url, folder, entry=ENTRY, environment=os.environ, cwd=ROOT):
        self.url, self.folder, self.entry, self.cwd = url, folder, entry, cwd
        self.environment = with_nginx(environment) | {"TMPDIR": str(folder), "TS_SERVICE_ENVELOPE": "kserve"}
        self.environment |= {"AUTH": "none"} if "API_KEY" not in environment else {}

    def start(self, *arguments):
        log = (self.folder / "log").open("ab")
        command = self.command(*arguments)
        self.process = subprocess.Popen(command, env=self.environment, cwd=self.cwd, stdout=log, stderr=log)
        self.arguments = arguments

    def command(self, *arguments):
        return [*self.entry, *arguments]

    def run(self, *arguments):
        """A probe or a hook."""
        command = self.command(*arguments)
        return subprocess.run(command, env=self.environment, cwd=self.cwd, capture_output=True, text=True, timeout=120)

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
        kill(alive)
        self.process.wait()
        return alive


def kill(processes):
    """At once, and all of them, also if one goes because of another; they are gone then."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=60)
