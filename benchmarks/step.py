"""A step of the engine in this process, without a server: milliseconds at 1, 8 and 32 rows, for 1,000 tokens of as many
clients in a closed loop, whose answers have one length or 8 to 128 tokens, and for prompts of 8 to 1,000 tokens, as it
is, with products that share an input made apart, with SDPA, and without replaying, or, of answers of many lengths,
without letting what is replayed stand in for fewer rows, in turns; and where they go.

    python -m benchmarks.step                       # SmolLM2-135M and BLOOM-560m's shape in bfloat16
    python -m benchmarks.step --cpu-time            # of one thread, on a machine that has other things to do
    python -m benchmarks.step --only SmolLM2-135M --profile
    python -m benchmarks.step --of prompt           # three minutes

Beside the longest prompt's time stands that of its linear layers alone, on as many rows, and what both make of the
processor: the operations a second of the prompt, attention's included, over those of the layers.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from server.torchserve import MEMORY

os.environ |= {"GOMP_SPINCOUNT": "20000", **MEMORY, **os.environ}  # before PyTorch is there, as for a worker

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.checkpoints import WORK
from benchmarks.machine import processor
from benchmarks.peers import MODELS, checkpoint
from benchmarks.running import finish
from handler.engine import Engine, Job, Request
from handler.engine.architecture import Architecture
from handler.engine.block_attention import attention
from handler.engine.heap import reusing_blocks
from handler.engine.replay import Replays, use_replay
from handler.loading import load_model
from handler.settings import Settings
from handler.weights import packed

PROMPT_TOKENS, NEW_TOKENS, ROWS, ROUNDS = 32, 64, (1, 8, 32), 3
LONG_PROMPT, SHORT_PROMPTS, OF_EACH = 1000, (8, 16, 32, 64, 128), 8
MIXED = random.Random(0).choices(range(8, 129), k=3 * max(ROWS))  # new tokens


def start(engine: Engine, rows: int, tokens: int, new: int, generator: torch.Generator | None = None) -> list[Job]:
    """Submit prompts: the same ones each time, unless a generator that goes on makes others."""
    generator = generator or torch.Generator().manual_seed(rows)
    prompts = [torch.randint(10, 300, (tokens,), generator=generator).tolist() for _ in range(rows)]
    return [engine.submit(Request(ids, {"max_new_tokens": new}, ignore_eos=True)) for ids in prompts]


def decode(engine: Engine, rows: int, clock: Callable[[], float]) -> float:
    """Seconds of a step in which all rows decode."""
    start(engine, rows, PROMPT_TOKENS, NEW_TOKENS)
    while engine.stats.generated_tokens % (rows * NEW_TOKENS) < rows:
        engine.step()
    seconds = []
    while engine.has_work:
        began = clock()
        engine.step()
        seconds.append(clock() - began)
    engine.stats.generated_tokens = 0
    return statistics.median(seconds)


def closed_loop(engine: Engine, clients: int, lengths: Sequence[int], clock: Callable[[], float]) -> float:
    """Seconds for 1,000 tokens of so many clients, each of whom sends a new prompt once the one before is answered.
    lengths: of all answers."""
    began, left, free = clock(), list(lengths), clients
    while left or engine.has_work:
        for new in left[:free]:
            start(engine, 1, PROMPT_TOKENS, new, torch.default_generator)
        left = left[free:]
        free = sum(job.finished for job in engine.step())
    engine.stats.generated_tokens = 0
    return (clock() - began) * 1000 / sum(lengths)


def prefill(engine: Engine, tokens: int, clock: Callable[[], float]) -> float:
    """Seconds of a prompt that nothing is known of."""
    jobs = start(engine, 1, tokens, 1)
    engine._scheduler._cache.prefixes.shrink(0)
    began = clock()
    finish(engine, jobs)
    engine.stats.generated_tokens = 0
    return clock() - began


@torch.inference_mode()
def products(engine: Engine, clock: Callable[[], float]) -> float:
    """Seconds of the linear layers that a prompt goes through, on zeros; not the head, which sees one position."""
    model = engine._runner._model
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    inputs = {layer.in_features: torch.zeros(1, LONG_PROMPT, layer.in_features, dtype=model.dtype) for layer in layers}
    began = clock()
    with reusing_blocks():  # as in a forward
        for layer in layers:
            layer(inputs[layer.in_features])
    return clock() - began


def operations(engine: Engine) -> tuple[int, int]:
    """Floating-point operations of the linear layers that a prompt goes through, and of its attention: for each layer,
    two products of queries with the keys and values of half of the tokens."""
    architecture, model = Architecture.of(engine._runner._model), engine._runner._model
    sizes = {m: m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)}
    del sizes[model.get_output_embeddings()]
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = architecture.num_layers * config.num_attention_heads * size * LONG_PROMPT**2 * 2
    return 2 * LONG_PROMPT * sum(sizes.values()), attention


class NoStandIns(Replays):
    def _usable(self, key: Any, count: int) -> Any:
        used = super()._usable(key, count)
        return used if used == key else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--of", default="", help="what to measure: a part of its name in what is printed")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    print(json.dumps({"processor": processor(), "threads": torch.get_num_threads()}))
    for model in [args.only] if args.only else MODELS:
        engines = {}
        use_replay(True)
        for kind, find in (("as it is", packed.shared_inputs), ("apart", lambda calls: [])):
            with mock.patch.object(packed, "shared_inputs", find):
                loaded = load_model(checkpoint(model), Settings(), WORK)
            settings = Settings(max_batch_size=max(ROWS), num_speculative_tokens=0)
            engines[kind] = Engine(loaded.model, loaded.tokenizer, settings)
        model_as_it_is = engines["as it is"]._runner._model
        exact = Engine(model_as_it_is, loaded.tokenizer, settings)
        exact._runner._replays = NoStandIns(model_as_it_is, exact._cache)
        engines["sdpa"] = Engine(model_as_it_is, loaded.tokenizer, settings)  # with recordings of its own
        use_replay(False)
        engines["not replayed"] = Engine(model_as_it_is, loaded.tokenizer, settings)
        measures = {f"{rows} rows": lambda engine, rows=rows: decode(engine, rows, clock) for rows in ROWS}
        for clients in ROWS:
            for kind, lengths in (("", [NEW_TOKENS]), (", mixed", MIXED)):
                answers = list(itertools.islice(itertools.cycle(lengths), 3 * clients))
                name = f"1,000 tokens of {clients} clients{kind}"
                measures[name] = lambda engine, of=(clients, answers): closed_loop(engine, *of, clock)
        for tokens in SHORT_PROMPTS:
            measures[f"a prompt of {tokens} tokens"] = lambda engine, tokens=tokens: statistics.median(
                prefill(engine, tokens, clock) for _ in range(OF_EACH)
            )
        long, alone = f"a prompt of {LONG_PROMPT} tokens", "that prompt's products"
        measures[long] = lambda engine: prefill(engine, LONG_PROMPT, clock)
        measures[alone] = lambda engine: products(engine, clock)
        reports = {}
        for name in (name for name in measures if args.of in name):
            measure, measured = measures[name], engines
            if "mixed" in name:
                measured = {"as it is": engines["as it is"], "without stand-ins": exact}
            seconds: dict[str, list[float]] = {kind: [] for kind in measured}
            for turn in range(1 + ROUNDS):  # the first one warms up
                for kind in list(measured)[:: 1 if turn % 2 else -1]:
                    AttentionInterface.register("sdpa", sdpa_attention_forward if kind == "sdpa" else attention)
                    seconds[kind].append(measure(measured[kind]))
            report = {kind: round_ms(statistics.median(values[1:])) for kind, values in seconds.items()}
            reports[name] = report
            print(json.dumps({"model": model, "of": name, "milliseconds": report}), flush=True)
            if args.profile:
                AttentionInterface.register("sdpa", attention)
                with profile(activities=[ProfilerActivity.CPU]) as profiler:
                    measure(engines["as it is"])
                print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
        if {long, alone} <= reports.keys():
            both = [reports[name]["as it is"] for name in (long, alone)]
            linear, attending = operations(engines["as it is"])
            shares = {"its linear layers' time": round(both[1] / both[0], 3)}
            shares["their operations a second"] = round((linear + attending) / linear * both[1] / both[0], 3)
            print(json.dumps({"model": model, "of a prompt": shares}), flush=True)


def round_ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


if __name__ == "__main__":
    main()
