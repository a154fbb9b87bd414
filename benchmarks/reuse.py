"""What guessed tokens and kept prompts save, in a control group, so that the page cache cannot flatter anyone.

    python -m benchmarks.reuse                          # eight minutes, root
    python -m benchmarks.reuse --only draft             # or speculation, or prefix

Each time is taken beside the one that it is compared with, by turns and each of the two first as often, so that what
else the machine does counts for both; the ratio is the median of these pairs.

Speculation: SmolLM2-135M-Instruct, a real model as random weights repeat nothing or all, most of it on disk and all of
it in memory: tokens a second after the first one, with drafts over those without, greedily. On texts to be repeated; on
others; and where every draft is wrong, as what follows two words must not follow them again.
Draft model: the same model in int8 or int4 as its own draft, whose weights come out of the same `max_memory`. A smaller
model of the family would be right less often, and faster.
Prefix: BLOOM-560m's shape, in memory and with its layers on disk: seconds to the first token of a prompt of 520 tokens
of which 512 were there before, over those of one that is new, each a second after the one before; the least of five.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.checkpoints import WORK, bloom_560m
from benchmarks.machine import commit, processor
from benchmarks.offload import MEMORY_GROUPS, child, print_run, quantized
from scripts.demo_model import NAME, demo_model

LOAD = """
import json, statistics, sys, time
from pathlib import Path
from benchmarks.running import finish
from handler.engine import Engine, Request
from handler.engine.draft_model import DraftModel
from handler.loading import load_model
from handler.settings import Settings

folder, cpu = Path(sys.argv[1]), int(sys.argv[2])

def load(draft=None):
    return load_model(folder, Settings(max_memory={"cpu": cpu}), folder.parent / "work", draft)

def on_disk(loaded):
    return sum(part.bytes for part in loaded.placement.parts if part.device == "disk")

loaded = load()
"""

SPECULATION = (
    LOAD
    + """
clients, rounds, kinds, draft = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5].split(","), sys.argv[6:]
plain = Engine(loaded.model, loaded.tokenizer, Settings(num_speculative_tokens=0, prefix_cache="off"))
beside = load(Path(draft[0])) if draft else loaded
guessing = Engine(beside.model, beside.tokenizer, Settings(prefix_cache="off"))
if draft:
    guessing.speculator.draft_model = DraftModel(beside.draft, beside.model.config.vocab_size)

poem = ("Tyger Tyger, burning bright,\\nIn the forests of the night;\\nWhat immortal hand or eye,\\n"
        "Could frame thy fearful symmetry?\\n\\nIn what distant deeps or skies,\\nBurnt the fire of thine eyes?\\n")
record = '{"id": 17, "name": "Ada", "city": "London", "languages": ["English", "French"], "active": true}\\n'
repeating = [poem * 2 + "Tyger Tyger, burning", record * 3, poem + record * 2, record * 2 + poem * 2]
questions = ["Describe a walk through an old harbour town in winter.",
             "Why do leaves change their colour in autumn? Explain it to an engineer.",
             "Write a letter to a friend who has moved to another country.",
             "What is the difference between a violin and a viola?"]
chats = [loaded.tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                              add_generation_prompt=True) for question in questions]
texts = {"repeats": (repeating, {}), "elsewhere": (chats, {}), "always_wrong": (repeating, {"no_repeat_ngram_size": 3})}
NEW = 32

def run(engine, prompts, parameters):
    parameters = {"max_new_tokens": NEW, "min_new_tokens": NEW} | parameters
    jobs = [engine.submit(Request(prompt, parameters, add_special_tokens=False)) for prompt in prompts]
    while engine.has_work and not all(job.sequences[0].token_ids for job in jobs):
        engine.step()
    tokens, started = -sum(len(job.sequences[0].token_ids) for job in jobs), time.perf_counter()
    finish(engine, jobs)
    texts = [job.sequences[0].token_ids for job in jobs]
    return (tokens + sum(map(len, texts))) / (time.perf_counter() - started), texts

report = {"on_disk": on_disk(loaded), "clients": clients}
if loaded.streamed:
    report["raw_bytes_per_second"] = loaded.streamed.rate
if draft:
    report |= {"draft": Path(draft[0]).name, "on_disk_beside_draft": on_disk(beside)}
for engine in (plain, guessing):  # the first forwards are slow
    run(engine, chats[:clients], {})
for kind in kinds:
    (prompts, parameters), rates, same, speculator = texts[kind], [], 0, guessing.speculator
    before = speculator.num_drafted, speculator.num_accepted
    for turn in range(rounds):
        for first in range(0, len(prompts), clients):
            pair = [plain, guessing] if (turn + first // clients) % 2 else [guessing, plain]
            found = {engine: run(engine, prompts[first : first + clients], parameters) for engine in pair}
            rates.append((found[plain][0], found[guessing][0]))
            same += found[plain][1] == found[guessing][1]
    ratios = sorted(after / without for without, after in rates)
    report[kind] = {
        "speedup": statistics.median(ratios), "least": ratios[0], "most": ratios[-1],
        "tokens_per_second_without": statistics.median(without for without, _ in rates),
        "tokens_per_second": statistics.median(after for _, after in rates),
        "drafted": speculator.num_drafted - before[0], "accepted": speculator.num_accepted - before[1],
        "same_texts": f"{same} of {len(rates)}"}
report["seconds_a_step"] = clients / report["elsewhere"]["tokens_per_second_without"]
print(json.dumps(report))
"""
)

PREFIX = (
    LOAD
    + """
engine = Engine(loaded.model, loaded.tokenizer, Settings(max_sequence_length=600))

def measured(prompt):
    time.sleep(1)
    waited, started = engine._runner.wait_seconds, time.perf_counter()
    steps = finish(engine, [engine.submit(Request(prompt, {"max_new_tokens": 1}))])
    return time.perf_counter() - started, engine._runner.wait_seconds - waited, steps

prefixes = [[100 + 7 * i % 5000 + number for i in range(512)] for number in range(6)]
measured(prefixes[5] + [9] * 8)
pairs = [(measured(prefix + [11] * 8), measured(prefix + [12] * 8)) for prefix in prefixes[:5]]
new, shared = ({"seconds": min(each)[0], "of_these_waited_for_disk": min(each)[1], "passes": min(each)[2]}
               for each in zip(*pairs))
size, rate = on_disk(loaded), loaded.streamed.rate if loaded.streamed else None
report = {"on_disk": size, "read_ahead": loaded.placement.read_ahead_bytes, "raw_bytes_per_second": rate, "new": new,
          "shared": shared, "shared_over_new": shared["seconds"] / new["seconds"],
          "reused_tokens": engine.num_reused_tokens, "seconds_a_step": shared["seconds"]}
if rate:  # one pass, of which so much is there before the request
    report["floor"] = (size - loaded.placement.read_ahead_bytes) / rate / new["seconds"]
print(json.dumps(report))
"""
)


def speculation() -> Iterator[dict]:
    folder = demo_model(Path("models") / NAME)
    all_in_memory = 2000
    cases = [("bfloat16", 80, 1, 2), ("bfloat16", 80, 4, 4), ("int4", 40, 1, 2)]
    cases += [("bfloat16", all_in_memory, 1, 2), ("bfloat16", all_in_memory, 4, 4)]
    for name, cpu, clients, rounds in cases:
        of_format = folder if name == "bfloat16" else quantized(folder, name)
        arguments = [str(of_format), f"{cpu}000000", str(clients), str(rounds), "repeats,elsewhere,always_wrong"]
        group = max(10**9, cpu * 10**6)
        yield {"format": name, "max_memory": cpu * 10**6} | child(group, of_format, SPECULATION, *arguments)


def draft() -> Iterator[dict]:
    folder = demo_model(Path("models") / NAME)
    for name in ("int8", "int4"):
        arguments = [str(folder), "150000000", "1", "3", "elsewhere", str(quantized(folder, name))]
        yield {"max_memory": 150_000_000} | child(1_500_000_000, folder, SPECULATION, *arguments)


def prefix() -> Iterator[dict]:
    folder = bloom_560m(WORK / "bloom-560m")
    for name, cpu in (("bfloat16", 2000), ("bfloat16", 520), ("int4", 270)):
        of_format = folder if name == "bfloat16" else quantized(folder, name)
        measured = child(3 * 10**9, of_format, PREFIX, str(of_format), f"{cpu}000000")
        yield {"format": name, "max_memory": cpu * 10**6} | measured


CASES = {case.__name__: case for case in (speculation, draft, prefix)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="reuse", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if not os.access(MEMORY_GROUPS, os.W_OK):
        sys.exit(f"no control group can be made in {MEMORY_GROUPS}: without one the page cache flatters everyone")
    report = {"commit": commit(), "processor": processor(), "runs": []}
    for name in args.only:
        for measured in CASES[name]():
            print_run(report, {"what": name} | measured)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "reuse.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
