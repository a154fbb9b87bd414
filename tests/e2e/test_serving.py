"""A checkpoint, packed as a user packs it, behind the real TorchServe."""

from pathlib import Path

import psutil
import pytest
import requests
import torch

from handler.loading import load_model
from handler.settings import Settings
from scripts.zip import zip_checkpoint
from server.torchserve import ModelFailed
from tests.models import SAMPLE_SETUP_CONFIG, save_tiny_bloom

PROMPTS = ["My dog is cute", "The quick brown fox jumps over the lazy dog, again", "東京"]


def generated(folder, settings, prompts, work):
    """What `model.generate` gives in this process, for each prompt alone."""
    settings = Settings.model_validate(settings)
    loaded = load_model(folder, settings, work)
    texts = []
    for prompt in prompts:
        inputs = loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            tokens = loaded.model.generate(**inputs, max_new_tokens=settings.max_new_tokens, do_sample=False)
        texts.append(loaded.tokenizer.decode(tokens[0], skip_special_tokens=True))
    return texts


def predict(server, *instances):
    return requests.post(f"{server.url}/v1/models/bloom:predict", json={"instances": list(instances)}, timeout=120)


@pytest.mark.parametrize(
    "settings, tiers",
    [
        pytest.param({"max_new_tokens": 12}, {"cpu"}, id="cpu"),
        pytest.param({"max_new_tokens": 12, "max_memory": {"cpu": 100_000}}, {"cpu", "disk"}, id="most-on-disk"),
        pytest.param(SAMPLE_SETUP_CONFIG, {"cpu"}, id="the-sample-verbatim"),
    ],
)
def test_the_text_is_what_generate_gives(serving, bloom, bloom_zip, tmp_path, settings, tiers):
    expected = generated(bloom, settings, PROMPTS, tmp_path)
    with serving(bloom_zip, settings) as server:
        assert predict(server, *PROMPTS).json() == {"predictions": expected}
        assert predict(server, {"data": PROMPTS[0]}).json() == {"predictions": expected[:1]}
        text = requests.post(f"{server.url}/predictions/bloom", data=PROMPTS[0].encode(), timeout=120)
        assert text.text == expected[0]
        unpacked = [path for path in (server.work / "tmp/models").rglob("*") if path.is_file()]
        assert not any(path.name == "model.zip" for path in unpacked)
        # The served weights and the code beside them, and not a second copy of either.
        assert sum(path.stat().st_size for path in unpacked) < bloom_zip.stat().st_size + 250_000
    assert not (server.work / "tmp").exists()


def test_no_archive_copies_nothing(serving, bloom, tmp_path):
    expected = generated(bloom, {"max_new_tokens": 8}, PROMPTS[:1], tmp_path)
    with serving(bloom, {"max_new_tokens": 8}, "no-archive") as server:
        assert predict(server, PROMPTS[0]).json() == {"predictions": expected}
        assert not any(path.is_file() and path.stat().st_size > 1000 for path in (server.work / "tmp").rglob("*"))
    assert (bloom / "config.json").is_file()


def test_a_killed_worker_comes_back_without_unpacking_again(serving, bloom_zip):
    with serving(bloom_zip, {"max_new_tokens": 8}) as server:
        before = predict(server, PROMPTS[0]).json()
        (shard, *_) = (server.work / "tmp/models").rglob("model-00001-*")
        inode = shard.stat().st_ino
        status = requests.get(f"{server.management_url}/models/bloom", timeout=10).json()
        killed = psutil.Process(status[0]["workers"][0]["pid"])
        killed.kill()
        psutil.wait_procs([killed], 10)
        while server.ready():
            pass  # until TorchServe has noticed
        server.wait_ready(120)
        assert predict(server, PROMPTS[0]).json() == before
        assert shard.stat().st_ino == inode


def test_two_at_once_share_nothing(serving, bloom, bloom_zip, tmp_path):
    other = save_tiny_bloom(tmp_path / "other", n_layer=2)
    with serving(bloom_zip, {"max_new_tokens": 8}) as one, serving(other, {"max_new_tokens": 8}) as two:
        for server, folder in ((one, bloom), (two, other)):
            expected = generated(folder, {"max_new_tokens": 8}, PROMPTS[:1], tmp_path)
            assert predict(server, PROMPTS[0]).json() == {"predictions": expected}


def test_a_work_folder_too_deep_for_a_socket(serving, bloom, tmp_path_factory, monkeypatch):
    deep = tmp_path_factory.mktemp("d" * 60) / ("e" * 60)
    deep.mkdir()
    monkeypatch.setattr(tmp_path_factory, "mktemp", lambda name: deep)
    with serving(bloom, {"max_new_tokens": 8}) as server:
        assert predict(server, PROMPTS[0]).ok
        short = (server.work / "short").read_text()
    assert not Path(short).exists()


def cause(serving, weights, settings=None):
    """The last line of the error that a model which cannot load ends in."""
    with serving(weights, settings, wait=False) as server, pytest.raises(ModelFailed) as error:
        server.wait_ready(120)
    assert "Traceback" in str(error.value)
    assert not server.running()
    return str(error.value).splitlines()[-1]


def test_a_damaged_zip_is_the_workers_own_traceback(serving, bloom_zip, tmp_path):
    content = bytearray(bloom_zip.read_bytes())
    content[100_000] ^= 1
    damaged = tmp_path / "model.zip"
    damaged.write_bytes(content)
    assert "CheckpointError: model.zip cannot be unpacked" in cause(serving, damaged)


def test_a_checkpoint_without_a_tokenizer(serving, tmp_path):
    folder = save_tiny_bloom(tmp_path / "bloom")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    packed = zip_checkpoint(folder, tmp_path / "model.zip")
    assert "LoadError" in (line := cause(serving, packed)) and "no tokenizer" in line
