"""A model that cannot be served: the load fails, and the reason is told."""

import shutil
from types import SimpleNamespace

import pytest
from transformers import MambaConfig, MambaForCausalLM

from handler.engine import UnsupportedModel
from handler.errors import LoadError
from handler.service import LargeModelHandler
from scripts.archive import archive
from scripts.zip import zip_checkpoint
from server.torchserve import ModelFailed
from tests.models import train_tokenizer


def test_a_damaged_zip_is_the_workers_own_traceback(serving, bloom, tmp_path):
    damaged = zip_checkpoint(bloom, tmp_path / "model.zip")
    content = bytearray(damaged.read_bytes())
    content[100_000] ^= 1
    damaged.write_bytes(content)
    with serving(damaged, {}, wait=False) as server, pytest.raises(ModelFailed) as error:
        server.wait_ready(120)
    assert "Traceback" in str(error.value)
    assert "CheckpointError: model.zip cannot be unpacked" in str(error.value).splitlines()[-1]


def without_tokenizer(bloom, folder):
    shutil.copytree(bloom, folder, ignore=shutil.ignore_patterns("tokenizer*"))


def mamba(bloom, folder):
    tokenizer = train_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "make, error, says",
    [(without_tokenizer, LoadError, "no tokenizer"), (mamba, UnsupportedModel, "more than keys and values")],
)
def test_what_cannot_be_served_fails_when_it_is_loaded(bloom, tmp_path, make, error, says):
    """In what TorchServe's worker calls, and not at the first request."""
    make(bloom, tmp_path / "checkpoint")
    made = archive("bloom", tmp_path / "checkpoint", tmp_path / "store", archive_format="no-archive")
    context = SimpleNamespace(
        system_properties={"model_dir": str(made)},
        model_name="bloom",
        manifest={"model": {"modelVersion": "1.0"}},
        model_yaml_config={},
    )
    handler = LargeModelHandler()
    with pytest.raises(error, match=says):
        handler.initialize(context)
    assert not handler.initialized
