"""What `make plan` says that a model needs on a CPU, against the peak that a process then has, over models, settings
and tiers. Each in a process of its own, with a worker's environment, and the steps that take most: all rows at once
behind long texts of different length, full rows, the longest chunk while all keys and values are there, and the widest
forward of two prompts behind most of a row.

python -m benchmarks.plan_memory
python -m benchmarks.plan_memory --worker models/SmolLM2-135M-Instruct --memory 5GB     # root

With --worker: the resident memory of a process that serves a checkpoint in a control group, at READY and at its peak
with 1 and 32 clients, each a full row that is sampled by sorting the vocabulary, against the worker's part of the plan.
Else counted is what comes on top of a process that has served a tiny model of the same kind: weights, keys and values,
their copies, activations, weights on their way.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from benchmarks.checkpoints import WORK
from benchmarks.offload import ENGINE, OPTIONS, child
from handler.settings import Settings, parse_size
from scripts.plan import make_plan
from scripts.shard import shard
from server.torchserve import MEMORY
from tests.models import train_tokenizer

LENGTH, ROWS, VOCAB = 1024, 4, 16_000
SORTED = {"do_sample": True, "typical_p": 0.9, "top_k": 0}
NEW_TOKENS = 24
WIDE = {"vocab_size": VOCAB, "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16}
MODELS: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(**WIDE, pad_token_id=3),
    "llama": LlamaConfig(**WIDE, intermediate_size=2816, num_key_value_heads=4, max_position_embeddings=LENGTH),
    "qwen2": Qwen2Config(**WIDE, intermediate_size=2816, num_key_value_heads=16, max_position_embeddings=LENGTH),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=1024, n_layer=6, n_head=16, n_positions=LENGTH, bos_token_id=1, eos_token_id=2
    ),
}
CASES = [
    # model, dtype, rows, tokens of a row, share of the weights that stays in memory
    ("bloom", "float32", ROWS, LENGTH, 1.0),
    ("bloom", "bfloat16", ROWS, LENGTH, 1.0),
    ("bloom", "bfloat16", ROWS, LENGTH, 0.5),
    ("bloom", "bfloat16", 2, 512, 0.0),
    ("bloom", "int8", ROWS, LENGTH, 1.0),
    ("bloom", "int8", ROWS, LENGTH, 0.5),
    ("llama", "float32", ROWS, LENGTH, 1.0),
    ("llama", "bfloat16", 4 * ROWS, LENGTH // 4, 1.0),
    ("llama", "bfloat16", ROWS, LENGTH, 0.5),
    ("qwen2", "bfloat16", ROWS, LENGTH, 1.0),
    ("gpt2", "float32", ROWS, LENGTH, 0.5),
    ("gpt2", "bfloat16", 2 * ROWS, LENGTH // 2, 1.0),
]

CHILD = """
import ctypes, gc, json, pathlib, re, sys
import torch
from benchmarks.running import finish
from handler.engine import Engine, Request
from handler.loading import load_model
from handler.settings import Settings

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

def serve(folder, settings):
    loaded = load_model(folder, settings, folder.parent)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: mapped files are let go of
    engine = Engine(loaded.model, loaded.tokenizer, settings)
    rows, length = settings.max_batch_size, settings.max_sequence_length
    length = min(length, engine.capacity.max_sequence_length)
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(4, 300, (max(1, count),), generator=generator).tolist()

    def answer(prompts, of_first=8):
        jobs = []
        for prompt in prompts:
            new = 8 if jobs else of_first
            jobs.append(engine.submit(Request(prompt, {"max_new_tokens": new, "min_new_tokens": new})))
        finish(engine, jobs)

    # Two texts of different length that fit beside rows which begin with one of them: all rows in one ragged forward.
    tail = min(engine.capacity.idle_prefill_chunk // rows, length // 4)
    texts = [tokens(rows * (length - tail - 16) // (rows + 2) - 32 - i) for i in range(2)]
    answer(texts)
    answer([texts[row % 2] + tokens(tail) for row in range(rows)])
    # Full rows, and the longest chunk once more when all keys and values are there.
    answer([tokens(length - 8 - row) for row in range(rows)])
    answer([tokens(length - 8)])
    # The widest forward of several rows behind a long one: it stands there when the short one does not decode any more.
    answer([tokens(8), *(tokens(length - 8) for _ in range(rows - 1))], of_first=2)

settings = Settings.model_validate_json(sys.argv[3])
serve(pathlib.Path(sys.argv[1]), settings.model_copy(update={"max_memory": None, "max_batch_size": 2}))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before = memory("VmRSS")
serve(pathlib.Path(sys.argv[2]), settings)
print(json.dumps(memory("VmHWM") - before))
"""


TINY = {  # heads are large enough for a kernel: LLVM's pages are a worker's, whatever its model
    "vocab_size": 384,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def checkpoint(model: str, dtype: str, tiny: bool = False) -> Path:
    """A folder with random weights. dtype: int8 is of bfloat16."""
    folder = WORK / f"plan-{model}-{dtype}{'-tiny' * tiny}"
    if not (folder / "config.json").is_file():
        if dtype == "int8":
            shard(checkpoint(model, "bfloat16", tiny), folder, 50 * 10**6, "keep", dtype)
            return folder
        torch.manual_seed(0)
        config = copy.deepcopy(MODELS[model])
        config.update(TINY if tiny else {})
        made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        made.save_pretrained(folder, max_shard_size="50MB")
        train_tokenizer().save_pretrained(folder)
    return folder


def compare(model: str, dtype: str, rows: int, length: int, resident: float) -> dict:
    """Bytes planned and measured, and their ratio."""
    folder = checkpoint(model, dtype)
    weights = make_plan(folder, Settings(), []).weights
    settings = Settings(
        max_memory=None if resident == 1 else {"cpu": int(weights * resident)},
        max_batch_size=rows,
        max_sequence_length=length,
        kv_cache_memory="1TB",
        num_speculative_tokens=0,  # for the same forwards in each run
    )
    cpu = make_plan(folder, settings, []).cpu
    planned = cpu.needed - cpu.runtime
    before = checkpoint(model, dtype, tiny=True)
    command = [sys.executable, "-c", CHILD, str(before), str(folder), settings.model_dump_json()]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | MEMORY)
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    measured = json.loads(ended.stdout.splitlines()[-1])
    return {
        "model": model, "dtype": dtype, "rows": rows, "length": length, "resident": resident,
        "weights_MB": cpu.weights // 10**6, "kv_cache_MB": cpu.kv_cache // 10**6,
        "workspace_MB": (cpu.workspace + cpu.kv_copies) // 10**6,
        "planned_MB": planned // 10**6, "measured_MB": measured // 10**6, "ratio": round(planned / measured, 3),
    }  # fmt: skip


def compare_worker(folder: Path, memory: int, clients: int) -> dict:
    """GB planned and measured, and the ratio that make plan must not let come over 1."""
    arguments = [str(folder), str(clients), str(NEW_TOKENS), json.dumps(OPTIONS), json.dumps(SORTED)]
    measured = child(memory, folder, ENGINE, *arguments)
    if "failed" in measured:
        raise RuntimeError(measured)
    row = {"checkpoint": folder.name, "memory_GB": memory / 1e9, "clients": clients}
    for name in ("ready", "peak"):
        planned, resident = measured[f"planned_{name}"], measured[f"resident_{name}"]
        row |= {f"planned_{name}_GB": round(planned / 1e9, 3), f"{name}_GB": round(resident / 1e9, 3)}
        row[f"{name}_ratio"] = round(resident / planned, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all without any")
    parser.add_argument("--worker", type=Path, nargs="+", default=[], help="folders of checkpoints")
    parser.add_argument("--memory", type=parse_size, nargs="+", default=[5_000_000_000], help="of the control group")
    args = parser.parse_args()
    for folder in args.worker:
        for memory in args.memory:
            for clients in (1, 32):
                row = compare_worker(folder, memory, clients)
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.worker:
        return
    torch.set_num_threads(2)
    chosen = [case for case in CASES if not args.models or case[0] in args.models]
    results = []
    for case in chosen:
        results.append(compare(*case))
        print(" ".join(f"{key}={value}" for key, value in results[-1].items()), flush=True)
    ratios = [result["ratio"] for result in results]
    print(f"planned / measured: {min(ratios)} to {max(ratios)}; never under, at most a fifth over: ", end="")
    print("yes" if min(ratios) >= 1 and max(ratios) <= 1.2 else "no")


if __name__ == "__main__":
    main()
