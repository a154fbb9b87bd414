"""What one request costs the others, in the engine alone; benchmarks.hostile asks the same of a server.

python -m benchmarks.fairness [--baseline path/to/another/checkout]     (the figures of both)

One thread, one model after the other, random weights. Compare the figures of one run only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
TINY_TOKEN_BYTES = 2 * 2 * 64 * 4  # keys and values of one token
SMALL = {"hidden_size": 576, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3}
SMALL |= {"intermediate_size": 1536, "tie_word_embeddings": True}  # SmolLM2-135M's
LLAMA_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}  # Llama-3.1-8B's
LONG = 1700  # tokens of a prompt beside short ones
CLIENT_TIMEOUT, MAX_WAIT = 8.0, 7.0  # seconds


def llama(vocab_size: int, **shape: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**shape, vocab_size=vocab_size, max_position_embeddings=4096, eos_token_id=2, pad_token_id=3)
    return AutoModelForCausalLM.from_config(config)


def make_engine(model: PreTrainedModel, kv_cache_memory: int | None = None) -> Any:
    """The engine of the checkout that is imported; a baseline may be older than EngineConfig."""
    from handler import engine
    from tests.models import train_tokenizer

    if not hasattr(engine, "EngineConfig"):
        return engine.Engine(model, train_tokenizer(), kv_cache_bytes=kv_cache_memory, max_queue=300)
    config = engine.EngineConfig(
        max_queue=300, max_wait=MAX_WAIT, kv_cache_memory=kv_cache_memory, num_speculative_tokens=0
    )
    return engine.Engine(model, train_tokenizer(), config)


def submit(engine: Any, prompt_tokens: int, new: int, seed: int = 0, **fields: Any) -> Any:
    from handler.engine import Request

    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(4, 384, (prompt_tokens,), generator=generator).tolist()
    parameters = {"max_new_tokens": new} | fields.pop("parameters", {})
    return engine.submit(Request(prompt, parameters, ignore_eos=True, **fields))


def has_begun(job: Any) -> bool:
    return any(one.token_ids for one in (job.sequences if hasattr(job, "sequences") else job.choices))


def milliseconds(engine: Any, steps: int) -> Iterator[float]:
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        yield (time.perf_counter() - started) * 1e3


def beside_n_of_128() -> dict[str, Any]:
    """How long another client waits for its one token."""
    engine = make_engine(llama(384, **TINY))
    submit(engine, 9, 200, n=128)
    for _ in range(5):
        engine.step()
    small = submit(engine, 4, 1)
    started, steps = time.perf_counter(), 0
    while not has_begun(small) and engine.has_work:
        engine.step()
        steps += 1
    return {"steps": steps, "seconds": round(time.perf_counter() - started, 3)}


def declared_and_not_used() -> int:
    """Of 31 requests, one of which declares 2,000 tokens, how many run at once in a cache of 8,192."""
    engine = make_engine(llama(384, **TINY), 8192 * TINY_TOKEN_BYTES)
    jobs = [submit(engine, 4, 1996 if seed == 0 else 60, seed) for seed in range(31)]
    for _ in range(5):
        engine.step()
    return sum(map(has_begun, jobs))


def short_rows(model: PreTrainedModel) -> dict[str, float]:
    """ms of the shortest step of 16 short rows, alone and beside a long one. By turns, so that noise hits both."""
    engines = {"alone": make_engine(model), f"beside one of {LONG:,} tokens": make_engine(model)}
    for name, engine in engines.items():
        jobs = [submit(engine, LONG, 200)] if name != "alone" else []
        jobs += [submit(engine, 20, 200, seed) for seed in range(16)]
        while not all(map(has_begun, jobs)):
            engine.step()
    rounds = [[next(milliseconds(engine, 1)) for engine in engines.values()] for _ in range(24)]
    return {name: round(min(times), 2) for name, times in zip(engines, zip(*rounds, strict=True), strict=True)}


def eight_choices() -> dict[str, Any]:
    """What the model computes for a prompt of 1,000 tokens until eight continuations have begun."""
    model = llama(384, **TINY)
    engine, positions = make_engine(model), 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal positions
        positions += kwargs["input_ids"].numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    job, started = submit(engine, 1000, 1, n=8), time.perf_counter()
    while not job.finished:
        engine.step()
    return {"positions, padding included": positions, "seconds": round(time.perf_counter() - started, 3)}


def overload() -> dict[str, int]:
    """300 clients at once that go away after a while: how many got all, a 429 or 503, or nothing until then."""
    engine = make_engine(llama(384, **TINY))
    jobs, end = [submit(engine, 20, 400, seed) for seed in range(300)], time.monotonic() + CLIENT_TIMEOUT
    while engine.has_work and time.monotonic() < end:
        engine.step()
    refused = sum(job.error is not None for job in jobs)
    begun = sum(map(has_begun, jobs))
    return {"served, or being served": begun, "told to come back": refused, "timed out": 300 - begun - refused}


def demanding_parameters() -> dict[str, Any]:
    """What one request with parameters of large sizes costs at BLOOM's vocabulary: ms to submit it, and of
    the shortest step."""
    model = llama(250_880, **TINY)
    kinds = {
        "none": {},
        "no_repeat_ngram_size 256": {"no_repeat_ngram_size": 256},
        "encoder_no_repeat_ngram_size 1": {"encoder_no_repeat_ngram_size": 1},
        "4,096 suppress_tokens": {"suppress_tokens": list(range(400, 4496))},
        "1,365 bad_words_ids": {"bad_words_ids": [[i, i + 1, i + 2] for i in range(400, 400 + 3 * 1365, 3)]},
        "64 stop strings": {"stop_strings": [chr(0x4E00 + i) + "a" * 255 for i in range(64)]},
    }
    costs = {}
    for name, parameters in kinds.items():
        engine, started = make_engine(model), time.perf_counter()
        job = submit(engine, 2048, 30, parameters=parameters)
        submitted = (time.perf_counter() - started) * 1e3
        while not has_begun(job):
            engine.step()
        step = min(milliseconds(engine, 20))
        costs[name] = {"submit, ms": round(submitted, 1), "step, ms": round(step, 2)}
    return costs


def long_context() -> dict[str, Any]:
    """What keys and values of Llama-3.1-8B may take at the default settings, in GB: all rows at full length, as before,
    and what this machine has for them beside the weights. Nothing is loaded."""
    try:
        from handler import memory
    except ImportError:
        return {"free": "not looked at"}
    from handler.settings import Settings
    from handler.weights.placement import Placement, spread_map

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16)
    free, settings = memory.free_host_memory(), Settings()
    asked = memory.Capacity.of(memory.Architecture.of(model), settings).kv_cache_bytes
    placement = Placement.of(model, spread_map(model, memory.device_limits(model, settings, {"cpu": free})["cpu"]))
    left = free - (placement.tiers["cpu"].bytes if "cpu" in placement.tiers else 0)
    with mock.patch.object(memory, "free_host_memory", lambda: left):
        takes = memory.with_kv_cache_limit(settings, model, placement).kv_cache_memory or asked
    return {name: round(size / 1e9, 1) for name, size in {"rows x length": asked, "free": free, "takes": takes}.items()}


def measure() -> None:
    torch.set_num_threads(1)
    results = {
        "one token beside n=128": beside_n_of_128,
        "running of 31, one with 2,000 declared": declared_and_not_used,
        "16 short rows, tiny Llama, ms a step": lambda: short_rows(llama(384, **TINY)),
        "16 short rows, SmolLM2-135M's shape, float32, ms a step": lambda: short_rows(llama(49152, **SMALL)),
        "n=8 of one prompt": eight_choices,
        "300 clients at once": overload,
        "one request's parameters": demanding_parameters,
        "keys and values of Llama-3.1-8B, GB": long_context,
    }
    for name, result in results.items():
        print(json.dumps({name: result()}), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fairness", description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=Path, help="another checkout, measured first")
    args = parser.parse_args(argv)
    here = Path(__file__).parents[1]
    for checkout in filter(None, (args.baseline, here)):
        print(json.dumps({"checkout": checkout.resolve().name}), flush=True)
        code = "import runpy, sys; runpy.run_path(sys.argv[1])['measure']()"
        command = [sys.executable, "-c", code, __file__]
        subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout.resolve())}, check=True)


if __name__ == "__main__":
    main()
