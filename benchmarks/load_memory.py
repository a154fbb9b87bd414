"""Peak memory of loading a 1.1 GB checkpoint with every layer on disk, in a process of its own.

python -m benchmarks.load_memory
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.checkpoints import WORK, bloom_560m

CHILD = """
import json, pathlib, re, sys
import handler.libraries
from handler.loading import load_model
from handler.settings import Settings

def peak():  # of this program alone: getrusage would count what the parent had before exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

imported = peak()
folder = pathlib.Path(sys.argv[1])
load_model(folder, Settings(max_memory={"cpu": 0}), folder.parent)
print(json.dumps({"imports": imported, "load": peak()}))
"""


def peaks(folder: Path) -> dict[str, int]:
    """Peak resident set in bytes, mapped file pages included: after the imports, and after the load."""
    ended = subprocess.run([sys.executable, "-c", CHILD, str(folder)], check=True, capture_output=True, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    folder = bloom_560m(WORK / "bloom-560m")
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    measured = peaks(folder)
    report = {
        "checkpoint_GB": sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9,
        "largest_shard_GB": largest / 1e9,
        "peak_GB": {name: peak / 1e9 for name, peak in measured.items()},
        "within_largest_shard_plus_1_GB": measured["load"] <= largest + 10**9,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
