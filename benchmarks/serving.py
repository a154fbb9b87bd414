"""Tokens a second through TorchServe, measured by GuideLLM, beside one static `generate` of the same size.

    python -m benchmarks.serving                 # everything, about half an hour on 2 cores
    python -m benchmarks.serving --only aligned  # or: mixed, offloaded

GuideLLM gets a virtual environment of its own (1.5 GB) in .run/. All figures of one run belong together: compare
ratios, not seconds.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

from benchmarks.checkpoints import WORK, bloom_560m
from benchmarks.machine import control_group, inside
from scripts.archive import archive
from server.torchserve import TorchServe, free_port

REQUIREMENTS = ("torch==2.13.0", "guidellm==0.8.1")
PROMPT_TOKENS, NEW_TOKENS = 32, 64
MIXED = {"min": 8, "max": 128, "mean": 68}
CLIENTS = (1, 8, 32)
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
# Java, the worker, the keys and values of 32 sequences and the resident layers, and little more.
OFFLOADED_MEMORY = 2_200_000_000

STATIC = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM

folder, dtype, rows, prompt, new = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
ids = torch.randint(10, 300, (rows, prompt), generator=torch.Generator().manual_seed(0))

def seconds(tokens):
    started = time.perf_counter()
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    return time.perf_counter() - started

seconds(2)
print(json.dumps(rows * new / seconds(new)))
"""


def guidellm() -> Path:
    """GuideLLM's command, installed when it is not there."""
    home = WORK / "guidellm"
    if not (home / "bin/guidellm").exists():
        venv.create(home, with_pip=True)
        subprocess.run([home / "bin/pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return home / "bin/guidellm"


def static_generate(folder: Path, dtype: str, rows: int, new_tokens: int = NEW_TOKENS) -> float:
    """Tokens a second of one `model.generate` over `rows` equal prompts, in a process of its own."""
    arguments = [str(folder), dtype, str(rows), str(PROMPT_TOKENS), str(new_tokens)]
    command = [sys.executable, "-c", STATIC, *arguments]
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ}  # as TorchServe's worker has it
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(ended.stdout.splitlines()[-1])


@contextlib.contextmanager
def served(folder: Path, **settings: object) -> Iterator[TorchServe]:
    """TorchServe with the checkpoint and these settings, READY. Nothing is guessed ahead unless they say so: random
    weights repeat themselves, which would flatter."""
    setup = WORK / "setup_config.json"
    setup.write_text(json.dumps({"num_speculative_tokens": 0} | settings))
    archive_path = archive("bloom", folder, WORK / "served", setup, archive_format="no-archive")
    with TorchServe(archive_path, free_port(), WORK / "torchserve") as server:
        server.wait_ready(600)
        yield server


def load(
    server: TorchServe, folder: Path, profile: str, requests: int, output: str = f"output_tokens={NEW_TOKENS}"
) -> dict:
    """`measure` on TorchServe."""
    return measure(f"{server.url}/predictions/bloom/1.0", folder, profile, requests, output)


def measure(
    target: str, folder: Path, profile: str, requests: int, output: str = f"output_tokens={NEW_TOKENS}"
) -> dict:
    """Tokens a second of an OpenAI endpoint under one load, and medians in milliseconds of time to first token and
    between tokens."""
    report = WORK / "guidellm.json"
    command = [str(guidellm()), "run", "--profile", profile, "--constraint", f"kind=max_requests,count={requests}"]
    command += ["--backend", f"kind=openai_http,target={target},request_format=/v1/completions"]
    command += ["--tokenizer", f"kind=hf_auto,model={folder.resolve()}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},{output}"]
    command += ["--output", f"kind=json,path={report}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise RuntimeError(f"GuideLLM: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    measured = json.loads(report.read_text())["benchmarks"][0]
    requests_done = measured["requests"]["successful"]
    started = min(request["request_start_time"] for request in requests_done)
    finished = max(request["request_end_time"] for request in requests_done)
    tokens = sum(request["output_tokens"] for request in requests_done)
    metrics = measured["metrics"]
    return {
        "requests": len(requests_done),
        "failed": len(measured["requests"]["errored"]),
        "tokens_per_second": tokens / (finished - started),
        "time_to_first_token_ms": metrics["time_to_first_token_ms"]["successful"]["median"],
        "between_tokens_ms": metrics["inter_token_latency_ms"]["successful"]["median"],
    }


def aligned(folder: Path, dtype: str) -> dict:
    """Closed loops of requests of one length: TorchServe beside static `generate` and one request at a time."""
    static = {rows: static_generate(folder, dtype, rows) for rows in CLIENTS}
    with served(folder, dtype=dtype) as server:
        ours = {n: load(server, folder, f"kind=concurrent,streams={n}", 2 * n) for n in CLIENTS}
    with served(folder, dtype=dtype, max_batch_size=1) as server:
        alone = load(server, folder, "kind=concurrent,streams=4", 4)
    speed = {n: ours[n]["tokens_per_second"] for n in CLIENTS}
    return {
        "static_generate_tokens_per_second": static,
        "torchserve": ours,
        "one_at_a_time": alone,
        "over_static": {n: speed[n] / static[n] for n in CLIENTS},
        "32_clients_over_one_at_a_time": speed[32] / alone["tokens_per_second"],
    }


def mixed(folder: Path, dtype: str, static_dtype: str | None = None) -> dict:
    """Lengths of 8 to 128 tokens, Poisson arrivals faster than they are served. A static batch runs until its
    longest request is done, so of its tokens only mean/max are asked for; it may compute in another dtype."""
    output = f"output_tokens={MIXED['mean']},output_tokens_min={MIXED['min']},output_tokens_max={MIXED['max']}"
    output += ",output_tokens_stdev=40"
    useful = static_generate(folder, static_dtype or dtype, 32, MIXED["max"]) * MIXED["mean"] / MIXED["max"]
    with served(folder, dtype=dtype, max_wait=600) as server:  # or the last ones are refused where this takes minutes
        ours = load(server, folder, "kind=poisson,rate=8", 96, output)
    return {
        "static_generate_useful_tokens_per_second": useful,
        "torchserve": ours,
        "over_static": ours["tokens_per_second"] / useful,
    }


def offloaded(folder: Path, dtype: str) -> dict:
    """Under half of the weights resident, the other layers read at every step: from the page cache, as long as the
    machine has memory for it, and from disk in a control group that has not."""
    measured = {}
    for name, limit in (("page_cache", None), ("disk", OFFLOADED_MEMORY)):
        if limit and not MEMORY_GROUPS.is_dir():
            print(f"no {MEMORY_GROUPS} here: not measured without page cache", file=sys.stderr)
            continue
        with contextlib.ExitStack() as stack:
            with limited_memory(limit, folder):  # the server, not the clients
                server = stack.enter_context(served(folder, dtype=dtype, max_memory={"cpu": "550MB"}))
            ours = {n: load(server, folder, f"kind=concurrent,streams={n}", max(2, n)) for n in (1, 32)}
        ratio = ours[32]["tokens_per_second"] / ours[1]["tokens_per_second"]
        measured[name] = {"torchserve": ours, "32_over_1": ratio}
    return measured


@contextlib.contextmanager
def limited_memory(limit: int | None, folder: Path) -> Iterator[None]:
    """Let what is started in here have no more than `limit` bytes, the page cache of `folder` included (control
    groups, v1)."""
    if limit is None:
        yield
        return
    for path in folder.iterdir():  # what is cached already counts for nobody in the group
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with inside(control_group(MEMORY_GROUPS / "benchmark-serving", "memory.limit_in_bytes", limit)):
        yield


def main() -> None:
    parts = {"aligned": aligned, "mixed": mixed, "offloaded": offloaded}
    parser = argparse.ArgumentParser(prog="serving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    parser.add_argument("--only", choices=parts)
    args = parser.parse_args()
    folder = bloom_560m(WORK / "bloom-560m")
    for name in [args.only] if args.only else parts:
        print(json.dumps({name: parts[name](folder, args.dtype)}, indent=2), flush=True)


if __name__ == "__main__":
    main()
