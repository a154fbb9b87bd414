"""Four servers that serve until the last test of this folder, since most of the tests' time goes into starts.

The tests run in one process (tests/conftest.py). Who breaks a server mends it.
"""

import shutil

import pytest
import yaml
from transformers import AutoTokenizer

from scripts.archive import ROOT
from scripts.zip import zip_checkpoint
from tests.e2e.conftest import SETTINGS
from tests.models import SAMPLE_SETUP_CONFIG, save_tiny_bloom
from tests.protocols.conftest import CHAT_TEMPLATE

# In float32: in float16 a row's rounding depends on who else is in the batch, on some CPUs.
SAMPLE_SETTINGS = SAMPLE_SETUP_CONFIG | {"torch_dtype": "float32"}
OFFLOADED_SETTINGS = {**SETTINGS, "max_memory": {"cpu": 100_000}}  # bytes, of 350,000


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
    """In continuous mode, another model with the settings of KServe's sample."""
    with serving(other_bloom, SAMPLE_SETTINGS) as server:
        yield server
