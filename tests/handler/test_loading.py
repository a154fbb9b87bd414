import json
import logging
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from handler.errors import CheckpointError, LoadError
from handler.loading import load_model
from handler.settings import Settings
from handler.weights.placement import align_hooks
from tests.models import SAMPLE_SETUP_CONFIG, train_tokenizer

PROMPT = "My dog is cute"


@pytest.fixture
def own_bloom(bloom, tmp_path):
    return shutil.copytree(bloom, tmp_path / "bloom")


def logits(model, tokenizer):
    with torch.inference_mode():
        return model(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)).logits


@pytest.mark.parametrize("limit, tiers", [(None, {"cpu"}), (100_000, {"cpu", "disk"}), (0, {"disk"})])
def test_every_tier_gives_the_same_logits(bloom, tmp_path, limit, tiers):
    whole = AutoModelForCausalLM.from_pretrained(bloom)
    loaded = load_model(bloom, Settings(max_memory=None if limit is None else {"cpu": limit}), tmp_path)
    assert set(loaded.placement.tiers) == tiers
    assert sum(tier.bytes for tier in loaded.placement.tiers.values()) == whole.get_memory_footprint()
    assert max(tier.layers for tier in loaded.placement.tiers.values()) == 4
    torch.testing.assert_close(logits(loaded.model, loaded.tokenizer), logits(whole, loaded.tokenizer))


def test_blooms_own_gelu_is_replaced_by_pytorchs(bloom, tmp_path):
    """Same outputs: test_every_tier_gives_the_same_logits."""
    kinds = [type(module).__name__ for module in load_model(bloom, Settings(), tmp_path).model.modules()]
    assert kinds.count("GELU") == 4 and "BloomGelu" not in kinds


def test_safetensors_on_disk_are_read_in_place(bloom, tmp_path):
    load_model(bloom, Settings(max_memory={"cpu": 0}), tmp_path)
    assert not any((tmp_path / "offload").iterdir())


@pytest.mark.parametrize("limit", [None, {"cpu": 0}])
def test_bin_checkpoints(own_bloom, tmp_path, limit):
    model = AutoModelForCausalLM.from_pretrained(own_bloom)
    for path in own_bloom.glob("model*"):
        path.unlink()
    torch.save(model.state_dict(), own_bloom / "pytorch_model.bin")
    loaded = load_model(own_bloom, Settings(max_memory=limit), tmp_path / "work")
    torch.testing.assert_close(logits(loaded.model, loaded.tokenizer), logits(model, loaded.tokenizer))


def test_no_hook_knows_an_address_that_is_free(bloom, tmp_path):
    """BLOOM's embedding is tied to its head. What took its place in memory would be served in its stead."""
    model = load_model(bloom, Settings(max_memory={"cpu": 100_000}, pack_weights=False), tmp_path).model
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    held = {parameter.data_ptr() for parameter in model.parameters() if parameter.layout == torch.strided}
    assert all(
        held.issuperset(hook.tied_params_map or ()) for module in model.modules() for hook in align_hooks(module)
    )


def test_bin_checkpoints_run_no_pickled_code(own_bloom, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("evil").touch, ())

    for path in own_bloom.glob("model*"):
        path.unlink()
    torch.save({"transformer.ln_f.weight": Evil()}, own_bloom / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_model(own_bloom, Settings(), tmp_path)
    assert not (tmp_path / "evil").exists()


def test_the_sample_on_a_machine_without_its_gpu(bloom, tmp_path, caplog):
    loaded = load_model(bloom, Settings.model_validate(SAMPLE_SETUP_CONFIG | {"pack_weights": False}), tmp_path)
    assert "max_memory names GPU 0" in caplog.text or torch.cuda.is_available()
    assert loaded.model.dtype == torch.float16


def test_an_explicit_map_goes_to_the_cpu_where_it_names_a_missing_gpu(bloom, tmp_path, caplog):
    missing = torch.cuda.device_count()
    loaded = load_model(bloom, Settings(device_map={"transformer": missing, "lm_head": "cpu"}), tmp_path)
    assert set(loaded.placement.tiers) == {"cpu"}
    assert f"puts 'transformer' on GPU {missing}" in caplog.text


def test_the_map_is_logged(bloom, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    load_model(bloom, Settings(max_memory={"cpu": 0}), tmp_path)
    assert "disk holds 4 layers, 0.00 GB" in caplog.text


def test_the_dtype_asked_for(bloom, tmp_path):
    assert load_model(bloom, Settings(dtype="bfloat16", pack_weights=False), tmp_path).model.dtype == torch.bfloat16
    assert load_model(bloom, Settings(), tmp_path).model.dtype == torch.float32


def test_no_weights(own_bloom, tmp_path):
    for path in own_bloom.glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_model(own_bloom, Settings(), tmp_path)


def test_no_tokenizer(own_bloom, tmp_path):
    (own_bloom / "tokenizer.json").unlink()
    with pytest.raises(LoadError, match="no tokenizer"):
        load_model(own_bloom, Settings(), tmp_path)


def test_a_broken_tokenizer(own_bloom, tmp_path):
    (own_bloom / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError, match="cannot be loaded"):
        load_model(own_bloom, Settings(), tmp_path)


def test_an_encoder_decoder_model(tmp_path):
    config = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="encoder-decoder"):
        load_model(tmp_path, Settings(), tmp_path)


@pytest.mark.parametrize("model_type, problem", [("vit", "no causal language model"), ("unheard-of", "unheard-of")])
def test_a_model_that_does_not_generate_text(own_bloom, tmp_path, model_type, problem):
    (own_bloom / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(LoadError, match=problem):
        load_model(own_bloom, Settings(), tmp_path)


def test_remote_code_is_not_run_unless_allowed(own_bloom, tmp_path):
    config = json.loads((own_bloom / "config.json").read_text())
    config |= {"model_type": "ours", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (own_bloom / "config.json").write_text(json.dumps(config))
    (own_bloom / "code.py").write_text(
        "from transformers import BloomConfig, BloomForCausalLM\n"
        "class Config(BloomConfig):\n    model_type = 'ours'\n"
        "class Model(BloomForCausalLM):\n    config_class = Config\n"
    )
    with pytest.raises(LoadError, match="trust_remote_code"):
        load_model(own_bloom, Settings(), tmp_path)
    assert (
        load_model(
            own_bloom, Settings(trust_remote_code=True, max_memory={"cpu": 10**9}), tmp_path
        ).model.config.model_type
        == "ours"
    )


@pytest.mark.parametrize(
    "cuda, message",
    [
        (None, "REQUIRE_GPUS is 2 and PyTorch sees 0: this PyTorch is built for CPUs"),
        ("13.0", "built for CUDA 13.0, for which the node needs NVIDIA driver 580 or newer"),
        ("12.8", "driver 525 or newer"),
    ],
)
def test_gpus_that_are_asked_for_and_not_there_fail_the_load(bloom, tmp_path, monkeypatch, cuda, message):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("REQUIRE_GPUS", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LoadError, match=message):
        load_model(bloom, Settings(), tmp_path)


@pytest.mark.parametrize("value", ["", "0"])
def test_no_gpus_are_asked_for(bloom, tmp_path, monkeypatch, value):
    monkeypatch.setenv("REQUIRE_GPUS", value)
    assert load_model(bloom, Settings(), tmp_path).placement.tiers


def test_a_number_of_gpus_that_is_none(bloom, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUIRE_GPUS", "all")
    with pytest.raises(LoadError, match="REQUIRE_GPUS is 'all': give a number"):
        load_model(bloom, Settings(), tmp_path)
