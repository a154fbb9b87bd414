"""On a GPU, in float16: tokens a second of static `generate` through Accelerate and of this package's engine, for 1, 8
and 32 prompts of 32 tokens and 64 new ones, with all weights in the GPU's memory and with a part of them.

    python -m benchmarks.gpu                        # BLOOM-560m's and BLOOM-7b1's shape: 31 GB of disk
    python -m benchmarks.gpu --models BLOOM-7b1 --memory 6GB --clients 1 32

--memory is what weights may take of the GPU's; the others come from the host's, at each step. Nothing is guessed ahead:
random weights repeat themselves, which would flatter. JSON goes to benchmarks/results/, behind that of earlier runs.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.checkpoints import WORK, bloom_7b1, bloom_560m
from benchmarks.machine import commit, processor
from benchmarks.running import finish, seconds
from handler.engine import Engine, Request
from handler.loading import load_model
from handler.settings import Settings, parse_size

MODELS = {"BLOOM-560m": bloom_560m, "BLOOM-7b1": bloom_7b1}
PROMPT_TOKENS, NEW_TOKENS, NEW_TOKENS_STREAMED = 32, 64, 8


def prompts(clients: int) -> torch.Tensor:
    """[clients, tokens], int64."""
    return torch.randint(10, 300, (clients, PROMPT_TOKENS), generator=torch.Generator().manual_seed(clients))


def places(memory: int | None) -> dict[int | str, int] | None:
    return None if memory is None else {0: memory, "cpu": 1 << 40}


def static_generate(folder: Path, memory: int | None, new: int) -> Callable[[int], object]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map="auto", max_memory=places(memory)
    )

    def answer(clients: int) -> object:
        ids = prompts(clients).to("cuda")
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new)

    return answer


def own_engine(folder: Path, memory: int | None, new: int, replay_steps: bool = True) -> Callable[[int], object]:
    settings = Settings(
        dtype="float16",
        max_memory=places(memory),
        num_speculative_tokens=0,
        prefix_cache="off",
        max_batch_size=32,
        replay_steps=replay_steps,
    )
    loaded = load_model(folder, settings, WORK)
    engine = Engine(loaded.model, loaded.tokenizer, settings)

    def answer(clients: int) -> object:
        parameters = {"max_new_tokens": new}
        jobs = [engine.submit(Request(ids, parameters, ignore_eos=True)) for ids in prompts(clients).tolist()]
        return finish(engine, jobs)

    return answer


ENGINES = {"generate": static_generate, "launched": partial(own_engine, replay_steps=False), "ours": own_engine}


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--memory", nargs="+", default=["all", "6GB"], help="of the GPU's for weights, or all")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here")
    card = torch.cuda.get_device_name()
    report = {"gpu": card, "processor": processor(), "torch": torch.__version__, "date": str(date.today())}
    report |= {"commit": commit(), "runs": []}
    for name in args.models:
        folder = MODELS[name](WORK / name.lower())
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for size in args.memory:
            memory = None if size == "all" else parse_size(size)
            if memory is not None and memory >= weights:
                continue
            new = NEW_TOKENS if memory is None else NEW_TOKENS_STREAMED
            for kind in args.engines:
                torch.cuda.reset_peak_memory_stats()
                answer = ENGINES[kind](folder, memory, new)
                through(answer, 1)  # warms up
                for clients in args.clients:
                    run = {"model": name, "weights_on_gpu": size, "engine": kind, "clients": clients}
                    run |= {"tokens_per_second": clients * new / seconds(partial(through, answer, clients))}
                    run |= {"gpu_bytes_peak": torch.cuda.max_memory_reserved()}
                    report["runs"].append(run)
                    print(json.dumps(run), flush=True)
                del answer
                gc.collect()
                torch.cuda.empty_cache()
    results = args.results / "gpu.json"
    earlier = json.loads(results.read_text()) if results.is_file() else []
    args.results.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps([*earlier, report], indent=2) + "\n")


def through(answer: Callable[[int], object], clients: int) -> None:
    """Until the GPU is through, too."""
    answer(clients)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
