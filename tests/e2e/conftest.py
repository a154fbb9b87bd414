"""The real TorchServe, on free ports, in a folder of its own; four are shared, since most of the time goes into starts.

continuous, plain, offloaded and sample serve until the last test. Tests that use them are one xdist_group, "servers".
"""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from handler.loading import load_model
from handler.settings import Settings
from scripts.archive import ROOT, archive
from scripts.zip import zip_checkpoint
from server.torchserve import TorchServe
from tests.e2e.asking import PROMPT
from tests.models import SAMPLE_SETUP_CONFIG, save_tiny_bloom
from tests.ports import free_port
from tests.protocols.conftest import CHAT_TEMPLATE

READY_TIMEOUT = 180  # seconds
REPOSITORY_SETTINGS = json.loads((ROOT / "setup_config.json").read_text())
ENTRY = [sys.executable, "-m", "server.container"]
FETCH = "import sys; from kserve_storage import Storage; Storage.download(sys.argv[1], sys.argv[2])"
SETTINGS = {"max_new_tokens": 8, "max_batch_size": 4, "max_queue": 8, "max_prompt_tokens": 200}
OFFLOADED_SETTINGS = {**SETTINGS, "max_memory": {"cpu": 100_000}}  # bytes, of 350,000


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/e2e" in str(item.path):
            item.add_marker("e2e")


@pytest.fixture(scope="session")
def other_bloom(tmp_path_factory):
    """The folder of a BLOOM that answers otherwise."""
    return save_tiny_bloom(tmp_path_factory.mktemp("other") / "bloom", n_head=8)


@pytest.fixture(scope="session")
def bloom_zip(bloom, tmp_path_factory):
    """The tiny BLOOM as a zip, with a chat template."""
    folder = shutil.copytree(bloom, tmp_path_factory.mktemp("chat") / "bloom")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return zip_checkpoint(folder, tmp_path_factory.mktemp("zip") / "model.zip")


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


def envelope(name, protocol):
    """What KServe sets to wrap the handler; `enable_envvars_config` would let it in."""
    return {"TS_SERVICE_ENVELOPE": name, "PROTOCOL_VERSION": protocol}


@pytest.fixture(scope="session")
def continuous(serving, bloom_zip):
    """In continuous mode, with a chat template."""
    with serving(bloom_zip, SETTINGS, environment=envelope("kserve", "v1")) as server:
        yield server


@pytest.fixture(scope="session")
def plain(serving, bloom, tmp_path_factory):
    """In plain mode, from a folder."""
    config = yaml.safe_load((ROOT / "model-config.yaml").read_text())
    config |= {"continuousBatching": False, "batchSize": 8}
    path = tmp_path_factory.mktemp("plain") / "model-config.yaml"
    path.write_text(yaml.safe_dump(config))
    with serving(bloom, SETTINGS, "no-archive", model_config=path) as server:
        yield server


@pytest.fixture(scope="session")
def offloaded(serving, bloom, tmp_path_factory):
    """In continuous mode, with most layers on disk and a work folder too deep for the path of a socket."""
    deep = tmp_path_factory.mktemp("d" * 60) / ("e" * 60)
    deep.mkdir()
    packed = zip_checkpoint(bloom, deep / "model.zip")
    with serving(packed, OFFLOADED_SETTINGS, environment=envelope("kservev2", "v2"), folder=deep) as server:
        yield server


@pytest.fixture(scope="session")
def sample(serving, other_bloom):
    """In continuous mode, another model with the sample's settings."""
    with serving(other_bloom, SAMPLE_SETUP_CONFIG) as server:
        yield server


def fetch(uri, mount):
    """What KServe's storage initializer does before the container starts."""
    command = [ROOT / ".venv-kserve/bin/python", "-c", FETCH, uri, mount]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture
def container():
    """container(mount, *arguments) -> a context manager of what the container's entry runs on that folder.

    Its addresses are on free ports in place of the pod's.
    """

    @contextlib.contextmanager
    def container(mount, *arguments, wait=True, **image):
        port = free_port()
        addresses = [f"inference_address=http://127.0.0.1:{port}", f"management_address=http://127.0.0.1:{port + 1}"]
        addresses += [f"metrics_address=http://127.0.0.1:{port + 2}"]
        addresses += [f"grpc_inference_port={port + 3}", f"grpc_management_port={port + 4}"]
        with tempfile.TemporaryDirectory(prefix="pod-") as folder:  # short, for the path of a socket
            pod = Pod(f"http://127.0.0.1:{port}", Path(folder), **image)
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
    """A process in place of a container, with a temporary folder of its own.

    entry, environment, cwd: as the image has them.
    """

    def __init__(self, url, folder, entry=ENTRY, environment=os.environ, cwd=ROOT):
        self.url, self.folder, self.entry, self.cwd = url, folder, entry, cwd
        self.environment = {**environment, "TMPDIR": str(folder), "TS_SERVICE_ENVELOPE": "kserve"}

    def start(self, *arguments):
        log = (self.folder / "log").open("ab")
        command = [*self.entry, *arguments]
        self.process = subprocess.Popen(command, env=self.environment, cwd=self.cwd, stdout=log, stderr=log)
        self.arguments = arguments

    def run(self, *arguments):
        """A probe or a hook."""
        command = [*self.entry, *arguments]
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
        for process in alive:
            process.kill()
        self.process.wait()
        return alive
