"""What guessed tokens and kept prompts save, in a control group, so that the page cache cannot flatter anyone.

    python -m benchmarks.reuse                          # three minutes, root

Speculation: SmolLM2-135M-Instruct in bfloat16, a real model as random weights repeat nothing, with 80 MB of its weights
in memory: tokens a second of one client with drafts over those without, greedily, by turns in one process. On texts to
be repeated, and on others. Prefixes: BLOOM-560m's shape in bfloat16, in memory and with 600 MB on disk: seconds to the
first token of a prompt of 520 tokens of which 512 were there before, over those of one that is new.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.checkpoints import WORK, bloom_560m
from benchmarks.offload import MEMORY_GROUPS, child, commit, print_run, processor
from scripts.demo_model import NAME, demo_model

LOAD = """
import json, sys, time
from pathlib import Path
from handler.engine import Engine, Request
from handler.loading import load_model
from handler.settings import Settings

folder, cpu = Path(sys.argv[1]), int(sys.argv[2])
loaded = load_model(folder, Settings(max_memory={"cpu": cpu}), folder.parent / "work")
"""

SPECULATION = (
    LOAD
    + """
engines = [Engine(loaded.model, loaded.tokenizer, Settings(num_speculative_tokens=n, prefix_cache="off"))
           for n in (0, 16)]
poem = ("Tyger Tyger, burning bright,\\nIn the forests of the night;\\nWhat immortal hand or eye,\\n"
        "Could frame thy fearful symmetry?\\n\\nIn what distant deeps or skies,\\nBurnt the fire of thine eyes?\\n")
record = '{"id": 17, "name": "Ada", "city": "London", "languages": ["English", "French"], "active": true}\\n'
asked = {
    "repeats": [poem * 2 + "Tyger Tyger, burning", record * 3],
    "elsewhere": ["Describe a walk through an old harbour town in winter.",
                  "Why do leaves change their colour in autumn? Explain it to an engineer."],
}

def seconds(engine, prompt, chat, new=48):
    if chat:
        prompt = loaded.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                      add_generation_prompt=True)
    job = engine.submit(Request(prompt, {"max_new_tokens": new, "min_new_tokens": new}, add_special_tokens=False))
    while not job.sequences[0].token_ids:
        engine.step()
    started = time.perf_counter()
    while not job.finished:
        engine.step()
    return time.perf_counter() - started, job.sequences[0].token_ids

report = {}
for kind, prompts in asked.items():
    without = with_drafts = same = 0
    for prompt in prompts:
        plain, tokens = seconds(engines[0], prompt, chat=kind == "elsewhere")
        guessed, tokens_too = seconds(engines[1], prompt, chat=kind == "elsewhere")
        without, with_drafts, same = without + plain, with_drafts + guessed, same + (tokens == tokens_too)
    speculator = engines[1].speculator  # so far
    report[kind] = {"speedup": without / with_drafts, "tokens_per_second": 47 * len(prompts) / with_drafts,
                    "same_texts": f"{same} of {len(prompts)}",
                    "drafted": speculator.num_drafted, "accepted": speculator.num_accepted}
report["seconds_a_step"] = without / (47 * len(prompts))
print(json.dumps(report))
"""
)

PREFIX = (
    LOAD
    + """
engine = Engine(loaded.model, loaded.tokenizer, Settings(max_sequence_length=600))

def seconds(prompt):
    job = engine.submit(Request(prompt, {"max_new_tokens": 1}))
    started = time.perf_counter()
    while not job.finished:
        engine.step()
    return time.perf_counter() - started

prefixes = [[100 + 7 * i % 5000 + number for i in range(512)] for number in range(4)]
seconds(prefixes[3] + [9] * 8)
new = [seconds(prefix + [11] * 8) for prefix in prefixes[:3]]
shared = [seconds(prefix + [12] * 8) for prefix in prefixes[:3]]
print(json.dumps({"seconds_a_step": min(shared), "new_prompt": min(new), "shared_prefix": min(shared),
                  "shared_over_new": min(shared) / min(new), "reused_tokens": engine.num_reused_tokens}))
"""
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="reuse", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=["speculation", "prefix"])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if not os.access(MEMORY_GROUPS, os.W_OK):
        sys.exit(f"no control group can be made in {MEMORY_GROUPS}: without one the page cache flatters everyone")
    report = {"commit": commit(), "processor": processor(), "runs": []}
    if args.only != "prefix":
        folder = demo_model(Path("models") / NAME)
        print_run(report, {"what": "speculation"} | child(1_000_000_000, folder, SPECULATION, str(folder), "80000000"))
    if args.only != "speculation":
        folder = bloom_560m(WORK / "bloom-560m")
        for cpu in (2_000_000_000, 520_000_000):
            measured = child(3_000_000_000, folder, PREFIX, str(folder), str(cpu))
            print_run(report, {"what": "prefix", "max_memory": cpu, **measured})
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "reuse.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
