"""What a worker's start consists of, and from TorchServe's start to READY: seconds, medians.

python -m benchmarks.start --only BLOOM-560m
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median

from benchmarks.checkpoints import WORK
from benchmarks.machine import processor
from benchmarks.peers import MODELS, checkpoint
from scripts.archive import archive
from server.torchserve import MEMORY, TorchServe, free_port

STAGES = """
import json, sys, time
from pathlib import Path

seconds = {}

def timed(stage, call):
    def timed_call(*arguments):
        began = time.perf_counter()
        result = call(*arguments)
        seconds[stage] = time.perf_counter() - began
        return result
    return timed_call

def imports():
    import handler.service

timed("PyTorch", lambda: __import__("torch"))()
timed("transformers and the handler", imports)()
from handler import loading
from handler.engine import engine
from handler.settings import Settings
loading.pack_weights = timed("packing", loading.pack_weights)
engine.check_rows = timed("checking rows", engine.check_rows)
engine.GrammarCompiler = timed("the grammars' tokenizer", engine.GrammarCompiler)
loaded = timed("loading and packing", loading.load_model)(Path(sys.argv[1]), Settings(), Path(sys.argv[2]))
engine.Engine(loaded.model, loaded.tokenizer, Settings())
resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
print(json.dumps(seconds | {"resident_MB": int(resident.split()[1]) / 1000}))
"""


def stages(folder: str) -> dict[str, float]:
    """Of a process that loads the checkpoint as a worker does."""
    command = [sys.executable, "-c", STAGES, folder, str(WORK / "start")]
    environment = {"GOMP_SPINCOUNT": "20000", **MEMORY, **os.environ}
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="start", description=__doc__)
    parser.add_argument("--only", choices=MODELS, help="one of the checkpoints")
    parser.add_argument("--times", type=int, default=3, help="how many starts (default: 3)")
    args = parser.parse_args()
    print(json.dumps({"processor": processor()}))
    for name in [args.only] if args.only else MODELS:
        folder = checkpoint(name)
        archive_path = archive("bloom", folder, WORK / "start", archive_format="no-archive")
        starts = []
        for _ in range(args.times):
            parts = stages(str(folder))
            began = time.perf_counter()
            with TorchServe(archive_path, free_port(), WORK / "torchserve") as server:
                server.wait_ready(600)
                starts.append(parts | {"TorchServe READY": time.perf_counter() - began})
        print(json.dumps({"model": name} | {part: round(median(s[part] for s in starts), 2) for part in starts[0]}))


if __name__ == "__main__":
    main()
