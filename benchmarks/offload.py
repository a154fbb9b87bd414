"""A model that does not fit: BLOOM-7b1's exact shape, 14.1 GB in bfloat16, in a control group of 6.5 GB.

    python -m benchmarks.offload                        # everything: an hour, 35 GB of disk, root
    python -m benchmarks.offload --memory 6.5GB --formats bfloat16 --clients 1

Of the hour, making the checkpoints takes most; they stay.

For each format and number of clients: tokens a second of this package's engine while all rows decode, beside those of
Accelerate's own `generate` of one client in 16 bits in the same group; bytes read a step over those of the disk tier;
the rate of reading over that of raw reads of the same files between the steps. Nothing is guessed ahead: random weights
repeat themselves, which would flatter. JSON goes to benchmarks/results/, where runs with other memory stay, and a plot
to docs/.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from benchmarks.checkpoints import WORK, bloom_7b1
from benchmarks.machine import commit, control_group, processor
from handler.settings import parse_size
from server.torchserve import MEMORY

MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
PLOT = Path("docs/offload.svg")
FORMATS = ("bfloat16", "int8", "int4")
NEW_TOKENS = 12
OPTIONS = {"num_speculative_tokens": 0}

ACCELERATE = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM

folder, cpu, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto", max_memory={"cpu": cpu})
ids = torch.arange(10, 18)[None]

def seconds(tokens):
    started = time.perf_counter()
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return time.perf_counter() - started

first = seconds(1)
print(json.dumps({"seconds_a_step": (seconds(new) - first) / (new - 1)}))
"""

ENGINE = """
import json, re, sys, threading, time
from functools import partial
from pathlib import Path
import handler.libraries  # before all that imports transformers, as in a worker
from benchmarks.running import finish
from handler.engine import Engine, Request
from handler.loading import load_model
from handler.memory import free_host_memory, page_cache_room, with_kv_cache_limit
from handler.settings import Settings
from handler.weights.reading import _rate
from scripts.plan import make_plan
from scripts.plan.make_plan import RUNTIME_BYTES

folder, clients, new, options = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])

def resident():  # its libraries' pages too; of the page cache, what nobody has mapped is not in it
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def disk_reads():
    return int(re.search(r"read_bytes: (\\d+)", Path("/proc/self/io").read_text())[1])

settings = Settings(**{"max_batch_size": 32, "max_sequence_length": 64, **options})
make_plan(folder, settings, [])  # takes memory itself, which it does not give back
plan = make_plan(folder, settings, [], free_host_memory() + RUNTIME_BYTES)
started = time.perf_counter()
loaded = load_model(folder, settings, folder.parent / "work")
settings = with_kv_cache_limit(settings, loaded.model, loaded.placement)
engine = Engine(loaded.model, loaded.tokenizer, settings)
if loaded.streamed:
    loaded.streamed.page_cache_room = partial(page_cache_room, engine)
on_cpu = sum(part.bytes for part in loaded.placement.parts if part.device == "cpu")
report = {"seconds_to_ready": time.perf_counter() - started, "planned_ready": plan.ready, "resident_ready": resident()}
peak = [0]

def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
parameters = {"min_new_tokens": new, "max_new_tokens": new, **json.loads(sys.argv[5])}
prompt = max(1, settings.max_sequence_length - new)  # so that rows are full, as a plan has them
jobs = [engine.submit(Request([10 + (n + i) % 350 for i in range(prompt)], parameters)) for n in range(clients)]
while engine.has_work and not all(job.sequences[0].token_ids for job in jobs):
    engine.step()
streamed, steps, read, started = loaded.streamed, 0, disk_reads(), time.perf_counter()
tokens = -sum(len(job.sequences[0].token_ids) for job in jobs)
waited, forward = streamed.wait_seconds if streamed else 0, engine.forward_seconds
raw, measuring, measured = [], 0.0, 0  # between steps: the disk gives more for a while than it can for long
while engine.has_work and not any(job.sequences[0].finished for job in jobs):  # all clients' rows decode
    engine.step()
    steps += 1
    if streamed and streamed.reader.method.direct and steps % 3 == 0:
        began, of_steps = time.perf_counter(), disk_reads()
        raw.append(_rate(streamed.reader.method, streamed._pieces, 1.0))
        measuring, measured = measuring + time.perf_counter() - began, measured + disk_reads() - of_steps
seconds = time.perf_counter() - started - measuring
tokens += sum(len(job.sequences[0].token_ids) for job in jobs)
read, waited = disk_reads() - read - measured, streamed.wait_seconds - waited if streamed else 0
forward = engine.forward_seconds - forward
finish(engine, jobs)
on_disk = sum(part.bytes for part in loaded.placement.parts if part.device == "disk")
report |= {
    "tokens_per_second": tokens / seconds,
    "seconds_a_step": seconds / steps,
    "bytes_on_cpu": on_cpu,
    "bytes_on_disk": on_disk,
    "planned_peak": plan.serving.get(clients),
    "resident_peak": peak[0],
    "planned_on_cpu": plan.cpu.weights,
}
if streamed:
    raw_rate = sum(raw) / len(raw) if raw else streamed.rate
    report |= {
        "bytes_read_over_disk_tier": read / steps / on_disk,
        "method": str(streamed.reader.method),
        "read_rate_over_raw": read / seconds / raw_rate,
        "raw_bytes_per_second": raw_rate,
        "share_waited": waited / forward,
    }
print(json.dumps(report))
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="offload", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sizes = [5_000_000_000, 6_500_000_000, 9_000_000_000]
    parser.add_argument("--memory", type=parse_size, nargs="+", default=sizes, help="of the control group")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="of each client (default %(default)s)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if not os.access(MEMORY_GROUPS, os.W_OK):
        sys.exit(f"no control group can be made in {MEMORY_GROUPS}: without one the page cache flatters everyone")
    folder = bloom_7b1(WORK / "bloom-7b1")
    folders = {name: folder if name == "bfloat16" else quantized(folder, name) for name in args.formats}
    results = args.results / "offload.json"
    earlier = json.loads(results.read_text())["runs"] if results.is_file() else []
    report = {"processor": processor(), "runs": [run for run in earlier if run["memory"] not in args.memory]}
    of = {"date": str(date.today()), "commit": commit()}
    for memory in args.memory:
        measured = child(memory, folder, ACCELERATE, str(folder), str(int(memory * 0.6)), "3")
        print_run(
            report, of | {"engine": "accelerate", "format": "bfloat16", "clients": 1, "memory": memory, **measured}
        )
        for name in args.formats:
            for clients in args.clients:
                arguments = [str(folders[name]), str(clients), str(args.new_tokens), json.dumps(OPTIONS), "{}"]
                measured = child(memory, folders[name], ENGINE, *arguments)
                print_run(
                    report, of | {"engine": "ours", "format": name, "clients": clients, "memory": memory, **measured}
                )
    args.results.mkdir(parents=True, exist_ok=True)
    report["runs"].sort(key=lambda run: run["memory"])
    results.write_text(json.dumps(report, indent=2) + "\n")
    plot(report["runs"], PLOT)


def quantized(folder: Path, name: str) -> Path:
    target = folder.with_name(f"{folder.name}-{name}")
    if not (target / "config.json").is_file():
        command = ["scripts.shard", "--model-dir", str(folder), "--output-dir", str(target), "--quantize", name]
        subprocess.run([sys.executable, "-m", *command], check=True)
    return target


def child(memory: int, folder: Path, code: str, *arguments: str) -> dict:
    """What a process prints as its last line that has `memory` bytes, the page cache included; why not, if it died."""
    with memory_group(memory) as group:
        for path in folder.iterdir():  # what is cached already would count for nobody in the group
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        join = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
        command = [sys.executable, "-c", join + code, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | MEMORY)  # as a worker has it
    if ended.returncode:
        return {"failed": f"exit code {ended.returncode}", "stderr": ended.stderr[-500:]}
    measured = json.loads(ended.stdout.splitlines()[-1])
    return {"tokens_per_second": 1 / measured["seconds_a_step"]} | measured


@contextmanager
def memory_group(memory: int) -> Iterator[Path]:
    group = control_group(MEMORY_GROUPS / "benchmark-offload", "memory.limit_in_bytes", memory)
    try:
        yield group
    finally:
        group.rmdir()


def print_run(report: dict, run: dict) -> None:
    report["runs"].append(run)
    print(json.dumps(run, indent=2), flush=True)


def plot(runs: list[dict], path: Path) -> None:
    """Tokens a second over the memory given, for each format and number of clients."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    styles = {1: "o--", 32: "o-"}
    colours = {"accelerate": "grey", "bfloat16": "tab:blue", "int8": "tab:orange", "int4": "tab:green"}
    lines: dict[tuple[str, int], list[dict]] = {}
    for run in runs:
        if "failed" not in run:
            name = run["format"] if run["engine"] == "ours" else run["engine"]
            lines.setdefault((name, run["clients"]), []).append(run)
    for (name, clients), line in sorted(lines.items(), key=lambda item: -item[1][-1]["tokens_per_second"]):
        memory = [run["memory"] / 1e9 for run in line]
        rates = [run["tokens_per_second"] for run in line]
        engine = "Accelerate, bfloat16" if name == "accelerate" else name
        label = f"{rates[-1]:.3g} in {memory[-1]:g} GB: {engine}, {clients} client{'s' * (clients > 1)}"
        axes.plot(memory, rates, styles.get(clients, "o:"), color=colours[name], label=label)
    axes.set(
        yscale="log",
        xlabel="memory given, GB",
        ylabel="tokens a second",
        title="BLOOM-7b1's shape, 7.1 billion weights",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
