"""Rows that grow, move and keep to their bounds; models that do not fit the scheme."""

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPTBigCodeConfig,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from handler.engine import Engine, EngineConfig, Request, UnsupportedModel
from handler.engine.architecture import Architecture
from handler.engine.kv_cache import KVCache
from tests.models import DEVICE

from .conftest import VOCAB, make_model, prompt_ids, reference


def store(cache, first, lengths, counts, keys, shape):
    cache.prepare_forward(first, lengths, counts, shape)
    return cache.update(keys, -keys, 0)


def numbered(rows, new, start=0):
    """Keys [rows, 1, new, 1]: row r's i-th has the value 100 r + start + i."""
    values = torch.arange(rows)[:, None] * 100 + start + torch.arange(new)
    return values.float()[:, None, :, None]


def test_equal_rows_are_views_of_the_store():
    cache = KVCache(100, None, 1)
    keys, values = store(cache, 0, [0, 0], [3, 3], numbered(2, 3), (2, 3))
    assert keys.flatten().tolist() == [0, 1, 2, 100, 101, 102]
    assert torch.equal(values, -keys)
    assert keys.untyped_storage().data_ptr() == cache.layers[0].keys.untyped_storage().data_ptr()


def test_ragged_rows_stay_left_aligned():
    cache = KVCache(100, None, 1)
    store(cache, 0, [0, 0], [3, 1], numbered(2, 3), (2, 3))
    keys, _ = store(cache, 0, [3, 1], [1, 1], torch.tensor([7.0, 107.0]).view(2, 1, 1, 1), (2, 4))
    assert keys[0].flatten().tolist()[:4] == [0, 1, 2, 7]
    assert keys[1].flatten().tolist()[:2] == [100, 107]
    keys, _ = store(cache, 0, [4, 2], [1, 3], numbered(2, 3, start=50), (2, 5))
    # While the forward runs, new tokens of all rows stand in the same columns …
    assert keys[:, 0, 4:, 0].tolist() == [[50, 51, 52], [150, 151, 152]]
    # … and in the store each row goes on without a gap.
    assert cache.layers[0].keys[0, 0, :5, 0].tolist() == [0, 1, 2, 7, 50]
    assert cache.layers[0].keys[1, 0, :5, 0].tolist() == [100, 107, 150, 151, 152]


def grown(cache, length):
    """The store's columns after a row of `length` tokens got one more."""
    store(cache, 0, [length], [1], numbered(1, 1, start=length), (1, length + 1))
    return cache.layers[0].keys.shape[2]


def test_the_store_grows_in_steps_and_keeps_its_content():
    cache = KVCache(10_000, None, 1)
    columns = [grown(cache, length) for length in range(1000)]
    assert cache.layers[0].keys.flatten()[:1000].tolist() == list(range(1000))
    assert all(length < have < 1.125 * (length + 1) + 32 for length, have in enumerate(columns))
    assert len(set(columns)) < 20  # each is a copy of everything


def test_the_store_shrinks_when_long_rows_have_left():
    cache = KVCache(10_000, None, 1)
    assert [grown(cache, length) for length in (9, 999, 600, 499, 9)] == [32, 1152, 1152, 576, 32]
    assert cache.layers[0].keys.flatten()[9] == 9


def test_the_store_shrinks_when_most_rows_have_left():
    cache = KVCache(10_000, None, 1)

    def rows_for(count):
        store(cache, 0, [3] * count, [1] * count, numbered(count, 1, start=3), (count, 4))
        return cache.num_rows

    assert [rows_for(count) for count in (1, 8, 9, 5, 4, 3, 2, 1)] == [1, 8, 16, 16, 8, 8, 4, 2]
    assert cache.layers[0].keys[0, 0, 3] == 3


def test_the_cache_says_by_how_much_it_grows_before_it_does():
    cache = KVCache(10_000, None, 1)
    store(cache, 0, [0], [20], numbered(1, 20), (1, 20))
    cache.prepare_forward(0, [20, 0], [1, 4], (2, 40))
    before = sum(part.nbytes for part in cache._stores())
    assert cache.growth == 8 * (2 * 64 - 32)  # keys and values of 4 bytes each
    cache.update(numbered(2, 4), numbered(2, 4), 0)
    assert sum(part.nbytes for part in cache._stores()) == before + 8 * (2 * 64 - 32)
    assert cache.growth == 0
    cache.prepare_forward(0, [5], [1], (1, 6))
    assert cache.growth == 0  # it shrinks


def test_where_each_row_adds_one_token_the_model_gets_all_columns():
    """Keys without gaps between rows, as torch.bmm wants them; the mask has as many columns."""
    cache = KVCache(1000, None, 1)
    assert cache.prepare_forward(0, [0, 0], [3, 1], (2, 3)).kv_length == 3
    cache.update(numbered(2, 3), numbered(2, 3), 0)
    assert cache.prepare_forward(0, [3, 1], [1, 1], (2, 4)).kv_length == 32
    keys, values = cache.update(numbered(2, 1), numbered(2, 1), 0)
    assert keys.shape[2] == values.shape[2] == cache.get_mask_sizes(1, 0)[0] == 32
    assert keys.is_contiguous() and values.is_contiguous()
    assert cache.prepare_forward(0, [3, 1], [1, 1], (3, 8)).kv_length == 4  # a row elsewhere is twice as long


def test_a_layer_that_found_no_memory_follows_when_less_is_needed():
    cache = KVCache(10_000, None, 1)
    for layer in (0, 1):
        cache.prepare_forward(0, [0], [20], (1, 20))
        cache.update(numbered(1, 20), numbered(1, 20), layer)
    cache.prepare_forward(0, [20], [1], (1, 400))
    cache.update(numbered(1, 1), numbered(1, 1), 0)  # layer 0 has grown, layer 1 has not
    assert cache.prepare_forward(0, [20], [1], (1, 21)).kv_length == 32
    for layer in (0, 1):
        keys, _ = cache.update(numbered(1, 1, start=20), numbered(1, 1, start=20), layer)
        assert keys.flatten()[:21].tolist() == list(range(21)) and keys.shape[2] == 32


def test_the_store_never_exceeds_its_bound():
    cache = KVCache(48, None, 1)
    store(cache, 0, [0], [20], numbered(1, 20), (1, 20))
    for rows in range(2, 9):
        store(cache, 0, [6] * rows, [0] * rows, numbered(rows, 0), (rows, 6))
        shape = cache.layers[0].keys.shape
        assert shape[0] * shape[2] <= 48 and shape[0] >= rows and shape[2] >= 6
    assert cache.layers[0].keys[0, 0, :6, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_bytes_bound_the_store():
    cache = KVCache(1000, max_bytes=640, bytes_per_token=4)
    assert cache.capacity_tokens == 160
    store(cache, 0, [0], [1], numbered(1, 1), (1, 1))
    assert cache.capacity_tokens == 80  # the keys and values that came are larger than the estimate


def test_scrubbed_rows_are_zero():
    cache = KVCache(100, None, 1)
    store(cache, 0, [0, 0], [2, 2], numbered(2, 2) * float("nan"), (2, 2))
    cache.zero_row(1)
    cache.zero_row(99)
    assert cache.layers[0].keys[1].eq(0).all() and cache.layers[0].keys[0].isnan().any()


def test_rows_may_change_places():
    cache = KVCache(100, None, 1)
    assert cache.num_rows == 0
    store(cache, 0, [0, 0, 0], [3, 3, 3], numbered(3, 3), (3, 3))
    cache.copy_rows([0, 1, 1], [1, 0, 2], 2)
    assert cache.num_rows == 3
    assert cache.layers[0].keys[:, 0, :3, 0].tolist() == [[100, 101, 2], [0, 1, 102], [100, 101, 202]]
    assert torch.equal(cache.layers[0].values, -cache.layers[0].keys)


def test_rows_move_when_neighbours_leave(kind, tokenizer):
    config = EngineConfig(max_batch_size=4, prefill_chunk=5, num_speculative_tokens=0)
    engine = Engine(make_model(kind), tokenizer, config)
    prompts = [prompt_ids(i, n) for i, n in enumerate((3, 4, 5, 23))]
    news = (3, 9, 12, 6)
    jobs = [engine.submit(Request(p, {"max_new_tokens": n})) for p, n in zip(prompts, news, strict=True)]
    rows = []
    while engine.has_work:
        running = [job for job in jobs if not job.finished]
        engine.step()
        rows.append([job.sequences[0].row for job in running])
        assert sorted(rows[-1]) == list(range(len(rows[-1])))
    assert rows[0] == [0, 1, 2, 3] and rows[-1] == [0]
    for job, prompt, new in zip(jobs, prompts, news, strict=True):
        assert job.sequences[0].token_ids == reference(kind, tuple(prompt))[:new]


SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
    "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.5, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
WINDOWS = {
    "sliding": MistralConfig(**SHAPE, sliding_window=8),
    "sliding and full": Qwen2Config(**SHAPE, sliding_window=8, use_sliding_window=True, max_window_layers=2),
    "sliding, in a buffer of the layer": GPTNeoConfig(
        **SHAPE, num_layers=4, num_heads=4, window_size=8, attention_types=[[["global", "local"], 2]]
    ),
}


@pytest.mark.parametrize("offload", [False, True])  # True: rows of different kinds share a forward
@pytest.mark.parametrize("layers", WINDOWS)
def test_sequences_grow_far_beyond_a_sliding_window(layers, offload, tokenizer):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(WINDOWS[layers]).eval().to(DEVICE)
    prompts = [prompt_ids(i, n) for i, n in enumerate((40, 2, 9, 21))]
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        alone.append(whole[0, len(prompt) :].tolist())
    if offload:
        cpu_offload(model, DEVICE)
    engine = Engine(model, tokenizer, EngineConfig(prefill_chunk=7))
    assert engine.capacity.max_sequence_length == 128
    jobs = []
    for prompt in prompts:
        jobs.append(engine.submit(Request(prompt, {"max_new_tokens": 24})))
        engine.step()
    while engine.has_work:
        engine.step()
    assert [job.sequences[0].token_ids for job in jobs] == alone


def test_padding_attends_to_something(tokenizer):
    """Softmax over nothing is no number in some kernels, and 0 x NaN is NaN wherever a weight is 0."""
    model = AutoModelForCausalLM.from_config(WINDOWS["sliding"]).eval().to(DEVICE)
    engine = Engine(model, tokenizer, EngineConfig(prefill_chunk=20))
    masks = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True
    )
    for length in (30, 2):  # in one forward: 28 columns of padding behind 2 tokens, and a window of 8
        engine.submit(Request(prompt_ids(0, length), {"max_new_tokens": 1}))
    engine.step()
    assert [mask.shape for mask in masks] == [(2, 1, 30, 30)]
    assert masks[0].any(dim=-1).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoModelForCausalLM.from_config(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)),
        lambda: AutoModelForCausalLM.from_config(MptConfig(vocab_size=64, d_model=16, n_heads=2, n_layers=1)),
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2)),
    ],
    ids=["mamba", "mpt", "t5"],
)
def test_models_that_cannot_be_batched_by_rows_are_refused(make, tokenizer):
    with pytest.raises(UnsupportedModel):
        Engine(make(), tokenizer)


SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 16}


@pytest.mark.parametrize(
    "config, heads",
    [
        (FalconConfig(**SMALL, multi_query=True, new_decoder_architecture=False), 1),
        (FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True), 4),  # it stores them for each head
        (FalconConfig(**SMALL, multi_query=False, alibi=True), 4),
        (GPTBigCodeConfig(**SMALL, multi_query=True), 1),
        (LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=8), 2),
    ],
)
def test_bytes_of_a_token_are_known_before_there_are_any(config, heads):
    model = AutoModelForCausalLM.from_config(config)
    layers = model(torch.tensor([[1]]), use_cache=True).past_key_values.layers
    stored = sum(store.nbytes for layer in layers for store in (layer.keys, layer.values))
    assert Architecture.of(model).kv_bytes_per_token == stored == 2 * 2 * heads * 8 * 4


def test_columns_last_longer_where_forwards_are_replayed():
    cache = KVCache(16_384, None, 1)
    assert [cache._next_shape(rows, 33) for rows in (1, 4, 32)] == [(1, 64), (4, 64), (32, 64)]
    cache.on_move = lambda: None
    assert [cache._next_shape(rows, 33) for rows in (1, 4, 32)] == [(1, 512), (4, 128), (32, 64)]
    large = KVCache(10**6, None, 1)
    large.on_move = lambda: None
    assert [large._next_shape(rows, 33) for rows in (1, 8, 32)] == [(1, 512), (8, 128), (32, 128)]
    small = KVCache(2048, None, 1)
    small.on_move = lambda: None
    assert small._next_shape(1, 33) == (1, 128)  # a sixteenth of what there may be: prefixes want some


def test_columns_of_few_rows_stay_where_forwards_are_replayed():
    cache = KVCache(16_384, None, 1)
    keys = torch.zeros(1, 1, 1, 4)
    for replayed, columns in ((True, 512), (False, 64)):
        cache.on_move = (lambda: None) if replayed else None
        for layer in cache._row_layers():
            layer.resize(1, 512)
        cache.prepare_forward(0, [32], [1], (1, 33))
        cache.update(keys, keys, 0)
        assert cache.context.store_shape == (1, columns)


def test_rows_stay_where_forwards_are_replayed_and_they_are_a_small_part():
    """Those who come back find what was captured."""
    keys = torch.zeros(1, 1, 1, 4)

    def rows_left(capacity, columns=33, allocated=128):
        cache = KVCache(capacity, None, 1)
        cache.prepare_forward(0, [0], [1], (1, 1))
        cache.update(keys, keys, 0)
        cache.on_move = lambda: None
        for layer in cache._row_layers():
            layer.resize(32, allocated)
        return cache._next_shape(1, columns)

    assert rows_left(16 * 32 * 128) == (32, 128)
    assert rows_left(16 * 32 * 128 - 1) == (2, 128)
    assert rows_left(16 * 32 * 128, columns=129) == (2, 256)
    assert rows_left(16 * 32 * 512, columns=60, allocated=512) == (32, 512)  # as many columns as one row alone has
