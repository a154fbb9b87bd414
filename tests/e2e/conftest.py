"""The real TorchServe, on free ports, in a folder of its own."""

import contextlib
import json

import pytest
import yaml

from scripts.archive import ROOT, archive
from scripts.torchserve import TorchServe, free_port
from scripts.zip import zip_checkpoint
from tests.models import save_tiny_bloom

READY_TIMEOUT = 180  # seconds


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
