"""What a worker's start consists of, and from TorchServe's start to READY: seconds, medians.

python -m benchmarks.start --only BLOOM-560m
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.checkpoints import WORK
from benchmarks.machine import processor
from benchmarks.packing import served
from benchmarks.peers import MODELS, checkpoint
from scripts.archive import archive
from server.torchserve import environment

STAGES = """
import json, sys, time
from contextlib import contextmanager
from pathlib import Path

seconds = {}

@contextmanager
def timed(stage):
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began

with timed("PyTorch"):
    import torch
with timed("transformers and the handler"):
    import handler.service
import psutil
from handler import loading
from handler.engine import engine
from handler.settings import Settings
loading.pack_weights = timed("packing")(loading.pack_weights)
engine.check_rows = timed("checking rows")(engine.check_rows)
engine.GrammarCompiler = timed("the grammars' tokenizer")(engine.GrammarCompiler)
with timed("loading and packing"):
    loaded = loading.load_model(Path(sys.argv[1]), Settings(), Path(sys.argv[2]))
engine.Engine(loaded.model, loaded.tokenizer, Settings())
print(json.dumps(seconds | {"resident_MB": psutil.Process().memory_info().rss / 1e6}))
"""


def stages(folder: Path, work: Path) -> dict[str, float]:
    """Of a process that loads the checkpoint as a worker does."""
    command = [sys.executable, "-c", STAGES, str(folder), str(work)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(work, work))
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
            ready, _ = served(archive_path)
            starts.append(stages(folder, WORK) | {"TorchServe READY": ready})
        print(json.dumps({"model": name} | {part: round(median(s[part] for s in starts), 2) for part in starts[0]}))


if __name__ == "__main__":
    main()
