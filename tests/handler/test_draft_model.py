"""A draft model is loaded where steps read weights, within the same memory, if it has the same tokens."""

import json
import shutil

import pytest

from handler.checkpoint import open_draft
from handler.engine.draft_model import DraftModel
from handler.errors import CheckpointError, LoadError
from handler.loading import load_model
from handler.memory import kv_cache_budget, limits_beside_draft
from handler.settings import Settings
from handler.weights.placement import Part, Placement
from scripts.plan import make_plan
from scripts.plan.make_plan import RUNTIME_BYTES
from scripts.plan.report import format_table
from tests.models import train_tokenizer

from .test_memory import bloom_560m, needs

LIMIT = {"cpu": 250_000}  # bytes, of 380,000


def size_of(model):
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.fixture
def own_draft(draft_bloom, tmp_path):
    return shutil.copytree(draft_bloom, tmp_path / "draft")


@pytest.mark.parametrize("pack_weights", [True, False])
def test_its_bytes_are_taken_out_of_the_weights_and_the_plan_agrees(bloom, draft_bloom, tmp_path, pack_weights):
    settings = Settings(max_memory=LIMIT, pack_weights=pack_weights)
    loaded = load_model(bloom, settings, tmp_path, draft_bloom)
    plan = make_plan(bloom, settings, gpus=[], draft_dir=draft_bloom)
    assert plan.device_map == loaded.device_map
    tiers = {device.name: (device.layers, device.weights) for device in plan.devices if device.weights}
    assert tiers == {name: (tier.layers, tier.bytes) for name, tier in loaded.placement.tiers.items()}
    assert loaded.placement.tiers["cpu"].bytes <= LIMIT["cpu"]
    assert {p.device.type for p in loaded.draft.parameters()} == {"cpu"}
    assert Part("draft_model", "cpu", size_of(loaded.draft)) in plan.parts
    alone = make_plan(bloom, settings, gpus=[])
    assert plan.cpu.layers < alone.cpu.layers
    ahead = loaded.placement.read_ahead_bytes - load_model(bloom, settings, tmp_path).placement.read_ahead_bytes
    assert plan.cpu.workspace == alone.cpu.workspace + ahead + DraftModel.cache_bytes(loaded.draft)
    assert plan.checkpoint_bytes > alone.checkpoint_bytes
    assert "draft model      0.00 GB" in format_table(plan) and "draft model" not in format_table(alone)


@pytest.mark.parametrize("settings", [Settings(), Settings(max_memory=LIMIT, num_speculative_tokens=0)])
def test_it_is_not_loaded_where_it_is_of_no_use(bloom, draft_bloom, tmp_path, settings):
    loaded = load_model(bloom, settings, tmp_path, draft_bloom)
    assert loaded.draft is None and not loaded.placement.draft_cache_bytes
    plan = make_plan(bloom, settings, gpus=[], draft_dir=draft_bloom)
    assert plan.devices == make_plan(bloom, settings, gpus=[]).devices


@pytest.mark.parametrize("drafts", [16, 0])
def test_it_is_archived_and_started_with_all_the_same(bloom, draft_bloom, own_draft, tmp_path, drafts):
    """Whether it is of use or not, and before its weights are there."""
    settings = Settings(max_memory=LIMIT, num_speculative_tokens=drafts)
    alone = make_plan(bloom, settings, gpus=[]).checkpoint_bytes
    for file in own_draft.glob("*.safetensors"):
        file.unlink()
    weights = size_of(load_model(draft_bloom, Settings(), tmp_path).model)
    stored = sum(path.stat().st_size for path in draft_bloom.glob("*.safetensors"))
    for folder, size in ((draft_bloom, stored), (own_draft, weights)):
        assert make_plan(bloom, settings, gpus=[], draft_dir=folder).checkpoint_bytes == alone + size


def test_free_memory_is_shared_with_it():
    model, draft = bloom_560m(), bloom_560m()
    taken = size_of(draft) + DraftModel.cache_bytes(draft)
    assert limits_beside_draft(model, Settings(), {"cpu": 10**11}, draft) is None
    free = 18 * 10**8
    assert limits_beside_draft(model, Settings(), {"cpu": free}, draft)["cpu"] < free - taken
    # On the first GPU, if there are any: all of its weights, or what is named of them.
    free = {0: 17 * 10**8, "cpu": 10**10}
    assert limits_beside_draft(model, Settings(), free, draft) == {0: 0, "cpu": 9 * 10**9}
    named = Settings(max_memory={"cpu": 10**9})
    assert limits_beside_draft(model, named, {"cpu": 10**11}, draft) == {"cpu": max(0, 10**9 - size_of(draft))}


def test_keys_and_values_leave_room_for_the_drafts(monkeypatch):
    monkeypatch.setattr("handler.memory.free_host_memory", lambda: 10_000)
    placement = Placement([Part("h.0", "cpu", 70)], "cpu", draft_cache_bytes=4_000)
    assert kv_cache_budget(placement, needs(1_000)) == (10_000 - 1_000 - 4_000) * 9 // 10


def test_more_memory_for_it_leaves_less_for_layers(bloom, draft_bloom):
    """Without max_memory, of a node that the plan is told of."""
    draft = make_plan(draft_bloom, Settings(), gpus=[])
    for spare in range(0, 10**9, 50 * 10**6):
        alone = make_plan(bloom, Settings(kv_cache_memory=10**6), [], RUNTIME_BYTES + spare)
        plan = make_plan(bloom, Settings(kv_cache_memory=10**6), [], RUNTIME_BYTES + spare, draft_dir=draft_bloom)
        assert plan.cpu.layers <= alone.cpu.layers
        assert plan.cpu.weights <= alone.cpu.weights + draft.weights


def test_another_tokenizer_is_refused(bloom, own_draft, tmp_path):
    settings = Settings(max_memory=LIMIT)
    train_tokenizer(300).save_pretrained(own_draft)
    with pytest.raises(LoadError, match=r"draft_model/ has another tokenizer than the model \(vocabulary differ"):
        load_model(bloom, settings, tmp_path, own_draft)


def test_other_special_tokens_are_refused(bloom, own_draft, tmp_path):
    path = own_draft / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<pad>"}))
    with pytest.raises(LoadError, match="special tokens differ"):
        load_model(bloom, Settings(max_memory=LIMIT), tmp_path, own_draft)


def test_a_folder_without_a_checkpoint(bloom, draft_bloom, tmp_path):
    assert open_draft(tmp_path) is None
    (tmp_path / "draft_model").mkdir()
    with pytest.raises(CheckpointError, match=r"draft_model holds no config\.json"):
        open_draft(tmp_path)
    shutil.copytree(draft_bloom, tmp_path / "draft_model/snapshots/1")
    assert open_draft(tmp_path) == tmp_path / "draft_model/snapshots/1"
