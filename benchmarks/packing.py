"""Zip and archive of a 1.1 GB checkpoint, ours beside the sample's commands, and what they leave when it is served.

python -m benchmarks.packing
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.checkpoints import WORK, bloom_560m
from benchmarks.running import seconds
from scripts.archive import ROOT, archive
from scripts.zip import files_in, zip_checkpoint
from server.torchserve import TorchServe, free_port


def sample_zip(folder: Path) -> None:
    shutil.make_archive(str(WORK / "sample/model"), "zip", folder)  # deflates, as `zip -r` does


def sample_archive() -> None:
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "bloom", "--version", "1.0"]
    command += ["--handler", str(ROOT / "handler/service.py"), "--export-path", str(WORK / "sample"), "--force"]
    command += ["--extra-files", f"{WORK / 'sample/model.zip'},{ROOT / 'setup_config.json'}"]
    subprocess.run(command, check=True, capture_output=True)


def served(archive_path: Path) -> tuple[float, int]:
    """Seconds from TorchServe's start to READY, and the bytes it then keeps beside the archive."""
    with TorchServe(archive_path, free_port(), WORK / "torchserve") as server:
        ready = seconds(lambda: server.wait_ready(600))
        files = (path for path in (WORK / "torchserve").rglob("*") if path.is_file() and not path.is_symlink())
        return ready, sum(path.stat().st_size for path in files)


def main() -> None:
    shutil.rmtree(WORK / "sample", ignore_errors=True)
    (WORK / "sample").mkdir(parents=True)
    folder = bloom_560m(WORK / "bloom-560m")
    weights = sum(path.stat().st_size for path in files_in(folder))
    sample = {"zip": seconds(lambda: sample_zip(folder)), "archive": seconds(sample_archive)}
    ours = {
        "zip": seconds(lambda: zip_checkpoint(folder, WORK / "model.zip")),
        "archive": seconds(lambda: archive("bloom", WORK / "model.zip", WORK / "store")),
    }
    linked = archive("bloom", folder, WORK / "linked", archive_format="no-archive")
    ready, size = served(WORK / "store/bloom.mar")
    linked_ready, linked_size = served(linked)
    report = {
        "weights_GB": weights / 1e9,
        "sample_seconds": sample,
        "ours_seconds": ours,
        "ours_over_sample": sum(ours.values()) / sum(sample.values()),
        "mar": {"seconds_to_ready": ready, "bytes_kept_over_weights": size / weights},
        "no_archive": {"seconds_to_ready": linked_ready, "bytes_kept_over_weights": linked_size / weights},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
