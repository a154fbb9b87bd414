"""Weights on disk come through StreamedWeights, and are the same as if they were in memory."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from handler.engine import Engine, EngineConfig, ModelError, Request
from handler.loading import load_model
from handler.settings import Settings
from handler.weights import streaming
from handler.weights.reading import Reader
from tests.engine.architectures import RUNS
from tests.engine.conftest import make_tokenizer
from tests.models import save_tiny_bloom

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    monkeypatch.setattr(streaming, "_SMALL", 0)


@pytest.fixture
def load(bloom, tmp_path, methods, monkeypatch):
    def load(method=methods[0], budget=None, folder=bloom, **settings):
        monkeypatch.setattr(streaming, "fastest_reader", lambda ranges: (Reader(method), 1e9))
        loaded = load_model(folder, Settings(**{"max_memory": {"cpu": 0}, **settings}), tmp_path)
        if budget is not None:
            loaded.streamed._arena = streaming._Arena(budget)
        return loaded

    return load


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def stored(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.offset_keys()}
    return tensors


def test_every_method_gives_the_same_logits_step_after_step(bloom, load, method):
    expected = logits(AutoModelForCausalLM.from_pretrained(bloom))
    model = load(method).model
    for _ in range(3):
        torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("budget", [4096, 20_480, 61_440, 10**7])
def test_each_tensor_is_read_once_a_step_within_the_budget(bloom, load, budget):
    expected = logits(AutoModelForCausalLM.from_pretrained(bloom))
    loaded = load(budget=budget)
    ranges = [stored.range for name, stored in loaded.streamed._stored.items() if "word_embeddings.w" not in name]
    rows = 4 * 2 * 4096  # of the embedding: two blocks each, at most
    for _ in range(5):
        torch.testing.assert_close(logits(loaded.model), expected)
    ahead = sum(len(arriving.buffer) for arriving in loaded.streamed._ahead.values())
    read = loaded.streamed.reader.bytes_read
    assert 5 * sum(wanted.size for wanted in ranges) <= read
    assert read <= 5 * (sum(wanted.aligned_size for wanted in ranges) + rows) + ahead
    assert (ahead > 0) == (budget > 4096)  # across the end of a step
    assert ahead <= budget


def test_tensors_in_any_order_are_the_right_ones(bloom, load):
    streamed, expected = load(budget=61_440).streamed, stored(bloom)
    chosen, held = random.Random(0), []
    for _ in range(300):
        name = chosen.choice(sorted(expected))
        held.append((name, streamed[name]))
        if len(held) > 5:  # some are held for long, and must not be written over
            held.pop(chosen.randrange(len(held)))
        for other, tensor in held:
            assert torch.equal(tensor, expected[other])


def test_what_is_foreseen_wrongly_is_forgotten(bloom, load):
    streamed, expected = load(budget=10**7).streamed, stored(bloom)
    names = [name for name in expected if "mlp" in name and "weight" in name]
    for _ in range(2):
        for name in names:
            assert torch.equal(streamed[name], expected[name])
    assert names[0] in streamed._ahead
    assert torch.equal(streamed[names[2]], expected[names[2]])  # two are skipped, as experts that nobody chose
    assert next(iter(streamed._ahead)) == names[3]
    assert torch.equal(streamed["transformer.ln_f.weight"], expected["transformer.ln_f.weight"])
    streamed.reader.close()  # a read that has begun holds its buffer until it ends
    held = {id(arriving.buffer) for arriving in streamed._ahead.values()}
    assert len(streamed._arena._used) - len(streamed._arena._returned) == len(held)


def test_an_unknown_name(load):
    with pytest.raises(KeyError):
        load().streamed["transformer.h.9.mlp.weight"]


def test_of_the_input_embedding_only_rows_that_are_looked_up_are_read(load, bloom):
    loaded = load()
    table = stored(bloom)["transformer.word_embeddings.weight"]
    read = []
    start = loaded.streamed.reader.start
    loaded.streamed.reader.start = lambda wanted, *args: (read.append(wanted.size), start(wanted, *args))[1]
    embedding = loaded.model.get_input_embeddings()
    for ids in ([[5, 6, 7, 8]], [[300, 5], [5, 5]], [[0, 383]]):
        assert torch.equal(embedding(torch.tensor(ids)), table[torch.tensor(ids)])
    assert read == [table[0].nbytes] * 8


def test_small_tensors_stay(load, monkeypatch):
    monkeypatch.setattr(streaming, "_SMALL", 500)
    loaded = load()
    logits(loaded.model)
    before = loaded.streamed.reader.bytes_read
    assert loaded.streamed["transformer.ln_f.weight"].shape == (32,)
    assert loaded.streamed.reader.bytes_read == before


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_room_in_the_page_cache_is_used_and_spread(bloom, load, share):
    loaded = load()
    streamed = loaded.streamed
    sizes = {name: streamed._stored[name].range.size for name in streamed._large()}
    streamed.keep_in_page_cache(int(share * sum(sizes.values())))
    left = [name for name in sizes if name not in streamed._cached]
    kept = sum(size for name, size in sizes.items() if name in streamed._cached)
    assert kept <= share * sum(sizes.values()) < kept + max(sizes.values())
    if share == 0.5:
        assert all(any(f".h.{layer}." in name for name in left) for layer in range(4))
    torch.testing.assert_close(logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(bloom)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_than_the_stored_one(bloom, load, dtype):
    name = str(dtype).removeprefix("torch.")
    # As they are: packed ones are held in float32 on a CPU without 16-bit instructions.
    expected = logits(load(dtype=name, max_memory=None, pack_weights=False).model)
    torch.testing.assert_close(logits(load(dtype=name).model), expected)


def test_tensors_that_are_not_aligned_in_their_file(bloom, tmp_path, load):
    folder = tmp_path / "odd"
    save_tiny_bloom(folder, shards=False)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size])).encode()
    header += b" " * (1 - len(header) % 2)  # an odd number of bytes
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    expected = logits(load(folder=bloom, max_memory=None).model)
    torch.testing.assert_close(logits(load(folder=folder).model), expected)


def test_an_embedding_that_lies_in_a_larger_block(tmp_path, load):
    model = next(case for case in RUNS if case.model_type == "modernbert-decoder").make_model()
    model.save_pretrained(tmp_path / "own")
    make_tokenizer().save_pretrained(tmp_path / "own")
    for memory in (0, 60_000):
        loaded = load(folder=tmp_path / "own", max_memory={"cpu": memory})
        assert "disk" in loaded.device_map.values()
        torch.testing.assert_close(logits(loaded.model), logits(model))


def test_a_disk_error_fails_the_step_and_the_next_one_tries_again(tmp_path, load):
    folder = save_tiny_bloom(tmp_path / "own", shards=False)
    loaded = load(folder=folder, budget=61_440)
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(max_batch_size=2))

    def answer():
        job = engine.submit(Request("My dog is cute", {"max_new_tokens": 8}))
        while engine.has_work:
            engine.step()
        return job

    expected = answer().sequences[0].token_ids
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-60_000])
    assert isinstance(answer().error, ModelError)
    path.write_bytes(data)
    assert answer().sequences[0].token_ids == expected
