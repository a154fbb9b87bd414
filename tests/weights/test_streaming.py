"""Weights on disk come through StreamedWeights, and are the same as if they were in memory."""

import json
import os
import random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from handler.engine import Engine, EngineConfig, ModelError, Request
from handler.loading import load_model
from handler.settings import Settings
from handler.weights import reading, streaming
from handler.weights.reading import Reader
from tests.engine.architectures import RUNS
from tests.engine.conftest import make_tokenizer
from tests.models import save_tiny_bloom

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    monkeypatch.setattr(streaming, "SMALL_BYTES", 0)


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
    ahead = sum(len(arriving.buffer) for arriving in loaded.streamed._foresight.ahead.values())
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
    assert names[0] in streamed._foresight.ahead
    assert torch.equal(streamed[names[2]], expected[names[2]])  # two are skipped, as experts that nobody chose
    assert next(iter(streamed._foresight.ahead)) == names[3]
    assert torch.equal(streamed["transformer.ln_f.weight"], expected["transformer.ln_f.weight"])
    streamed.reader.close()  # a read that has begun holds its buffer until it ends
    held = {id(arriving.buffer) for arriving in streamed._foresight.ahead.values()}
    assert len(streamed._arena._used) - len(streamed._arena._returned) == len(held)


def test_an_unknown_name(load):
    with pytest.raises(KeyError):
        load().streamed["transformer.h.9.mlp.weight"]


def test_of_the_input_embedding_only_rows_that_are_looked_up_are_read(load, bloom):
    loaded = load()
    table = stored(bloom)["transformer.word_embeddings.weight"]
    read = []
    start = loaded.streamed.reader.start
    loaded.streamed.reader.start = lambda wanted, *args, **kwargs: (
        read.append(wanted.size),
        start(wanted, *args, **kwargs),
    )[1]
    embedding = loaded.model.get_input_embeddings()
    for ids in ([[5, 6, 7, 8]], [[300, 5], [5, 5]], [[0, 383]]):
        assert torch.equal(embedding(torch.tensor(ids)), table[torch.tensor(ids)])
    assert read == [table[0].nbytes] * 8


def test_small_tensors_stay(load, monkeypatch):
    monkeypatch.setattr(streaming, "SMALL_BYTES", 500)
    loaded = load()
    logits(loaded.model)
    before = loaded.streamed.reader.bytes_read
    assert loaded.streamed["transformer.ln_f.weight"].shape == (32,)
    assert loaded.streamed.reader.bytes_read == before


@pytest.fixture
def in_pieces(monkeypatch):
    """Tensors of several pieces each, as large ones are; the kernel takes none of them back meanwhile."""
    monkeypatch.setattr(reading, "_PIECE", reading.ALIGNMENT)
    monkeypatch.setattr(Reader, "_is_cached", lambda *_: True)


def read_from_disk(reader):
    """Wraps a reader; what it then reads that is not in the page cache by its own account."""
    pieces, read = [], reader._read

    def reading(piece, *rest):
        if piece not in reader._cached:
            pieces.append(piece)
        read(piece, *rest)

    reader._read = reading
    return pieces


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_room_in_the_page_cache_is_used_and_spread(load, in_pieces, share):
    loaded = load()
    streamed = loaded.streamed
    everything = set(streamed._pieces)
    size = sum(piece.size for piece in everything)
    assert size >= 0.9 * sum(stored.range.size for name, stored in streamed._stored.items() if name != streamed._table)
    streamed.page_cache_room = lambda: int(share * size)
    logits(loaded.model)
    assert streamed.page_cache_bytes <= share * size < streamed.page_cache_bytes + 2 * reading.ALIGNMENT
    assert sum(piece.size for piece in streamed.reader.kept) == streamed.page_cache_bytes
    if share == 0.5:
        ranges = [streamed._stored[f"transformer.h.{layer}.mlp.dense_h_to_4h.weight"].range for layer in range(4)]
        assert all(0 < len(streamed.reader.kept & set(wanted.pieces)) < len(wanted.pieces) for wanted in ranges)


def test_a_table_that_rows_are_looked_up_of_takes_no_room_in_the_page_cache(load, tmp_path):
    next(case for case in RUNS if case.model_type == "llama").make_model().save_pretrained(tmp_path / "untied")
    make_tokenizer().save_pretrained(tmp_path / "untied")
    streamed = load(folder=tmp_path / "untied").streamed
    table = streamed._stored["model.embed_tokens.weight"].range
    assert streamed._pieces and not set(table.pieces) & set(streamed._pieces)


def test_a_tied_table_takes_room_once(load):
    streamed = load().streamed
    table = streamed._stored["transformer.word_embeddings.weight"].range
    head = streamed._stored["lm_head.weight"].range  # the same tensor, and this one is read whole
    assert streamed._table == "transformer.word_embeddings.weight" and table == head
    assert len(streamed._pieces) == len(set(streamed._pieces)) and set(head.pieces) <= set(streamed._pieces)
    whole = load(dtype="float64").streamed  # has to be converted
    assert whole._table is None


def test_the_part_of_the_page_cache_follows_the_room(bloom, load, methods, in_pieces, monkeypatch):
    if not methods[0].direct:
        pytest.skip("what is not kept is dropped after each read")
    expected = logits(AutoModelForCausalLM.from_pretrained(bloom))
    dropped, advise = [], os.posix_fadvise

    def advising(file, start, size, advice):
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append(start)
        advise(file, start, size, advice)

    loaded = load(budget=4096)  # nothing is read ahead
    streamed, reader = loaded.streamed, loaded.streamed.reader
    size = sum(piece.size for piece in streamed._pieces)
    from_disk = read_from_disk(reader)
    room = 0
    streamed.page_cache_room = lambda: room

    def a_pass():
        from_disk.clear(), dropped.clear()
        torch.testing.assert_close(logits(loaded.model), expected)
        return sum(piece.size for piece in from_disk)

    all_of_it = a_pass()
    monkeypatch.setattr(os, "posix_fadvise", advising)
    monkeypatch.setattr(streaming, "_STEPS", 8)
    room, step = size // 2, size // streaming._STEPS
    a_pass()
    half = reader.kept
    assert a_pass() == all_of_it - streamed.page_cache_bytes and not dropped
    room += step // 2  # not worth it
    assert a_pass() and reader.kept is half
    room += 2 * step
    a_pass()
    assert half < reader.kept  # nothing has gone
    before, room = reader.kept, size // 4
    a_pass()
    assert reader.kept < half
    reader.close()  # when all is done
    assert sorted(dropped) == sorted(piece.start for piece in before - reader.kept)
    assert not reader._cached - reader.kept


def test_all_fits_at_last(load, in_pieces, monkeypatch):
    monkeypatch.setattr(streaming, "_STEPS", 8)
    loaded = load()
    streamed = loaded.streamed
    size = sum(piece.size for piece in streamed._pieces)
    for room in (size - reading.ALIGNMENT, size):  # less than a step between them
        streamed.page_cache_room = lambda room=room: room
        logits(loaded.model)
        assert streamed.page_cache_bytes <= room
    assert streamed.page_cache_bytes == size


def test_no_byte_is_wrong_while_the_room_changes(bloom, load, method, in_pieces):
    expected = logits(AutoModelForCausalLM.from_pretrained(bloom))
    loaded, chosen = load(method), random.Random(0)
    size = sum(piece.size for piece in loaded.streamed._pieces)
    loaded.streamed.page_cache_room = lambda: chosen.randrange(-size, 2 * size)
    for layer in loaded.model.transformer.h:  # between passes, and in the midst of them
        layer.register_forward_pre_hook(lambda *_: loaded.streamed.begin_pass())
    for _ in range(20):
        torch.testing.assert_close(logits(loaded.model), expected)


def test_what_the_kernel_took_back_is_given_up_for_a_while(load, in_pieces):
    streamed = load().streamed
    size = sum(piece.size for piece in streamed._pieces)
    streamed.page_cache_room = lambda: size
    streamed.begin_pass()
    assert streamed.page_cache_bytes == size
    streamed.reader.bytes_lost += size // 4
    kept = []
    for _ in range(1000):
        streamed.begin_pass()
        kept.append(streamed.page_cache_bytes)
    assert 0.7 * size < kept[0] <= 0.75 * size
    assert kept == sorted(kept) and kept[10] < 0.85 * size and kept[-1] == size


def test_what_is_pushed_out_by_who_takes_the_room_is_given_up_once(load, in_pieces):
    streamed = load().streamed
    size = sum(piece.size for piece in streamed._pieces)
    for room in (size, size // 2, size // 2):
        streamed.page_cache_room = lambda room=room: room
        streamed.begin_pass()
        streamed.reader.bytes_lost += (size - room) // 2
    assert 0.45 * size < streamed.page_cache_bytes <= 0.5 * size
    streamed.begin_pass()  # but the room has not become less a second time
    assert streamed.page_cache_bytes <= 0.25 * size


def test_where_losses_cannot_be_seen_some_room_is_left(load, in_pieces):
    streamed = load().streamed
    size = sum(piece.size for piece in streamed._pieces)
    streamed.page_cache_room = lambda: size
    streamed.reader.tells_what_is_cached = False
    streamed.begin_pass()
    assert 0.85 * size < streamed.page_cache_bytes <= 0.9 * size


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
