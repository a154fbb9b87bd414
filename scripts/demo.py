"""The whole way on one machine: a real model -> shards -> zip -> .mar -> TorchServe -> the sample's request."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from scripts.archive import ROOT, archive
from scripts.console import run
from scripts.demo_model import NAME, demo_model
from scripts.predict import TEXT, predict
from scripts.zip import files_in, zip_checkpoint
from server.torchserve import TorchServe, free_port

WORK = Path(".run/demo")
T = TypeVar("T")


def step(title: str, action: Callable[[], T], size: Callable[[], int] | None = None) -> T:
    """Do one step and say how long it took, and how many bytes it left."""
    started = time.monotonic()
    result = action()
    bytes_left = f"{size() / 1e6:8.1f} MB" if size else ""
    print(f"{title:<44}{time.monotonic() - started:7.1f} s  {bytes_left}", flush=True)
    return result


def demo(text: str, setup_config: Path) -> dict:
    """Run every step; the answer."""
    folder = Path("models") / NAME
    zipped, mar = WORK / "model.zip", WORK / f"model_store/{NAME}.mar"
    step(
        f"1. {NAME} as safetensors shards",
        lambda: demo_model(folder),
        lambda: sum(path.stat().st_size for path in files_in(folder)),
    )
    step("2. model.zip", lambda: zip_checkpoint(folder, zipped), lambda: zipped.stat().st_size)
    step("3. .mar", lambda: archive(NAME, zipped, mar.parent, setup_config), lambda: mar.stat().st_size)
    with TorchServe(mar, free_port(), WORK / "torchserve") as server:
        step("4. TorchServe: from start to a READY worker", lambda: server.wait_ready(600))
        answer = step(f"5. POST /v1/models/{NAME}:predict", lambda: predict(server.url, NAME, text))
    return answer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--text", default=TEXT, help=f"the prompt; default: {TEXT!r}")
    parser.add_argument("--setup-config", type=Path, default=ROOT / "setup_config.json")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    answer = demo(args.text, args.setup_config)
    print(f"{'all of it':<44}{time.monotonic() - started:7.1f} s", flush=True)
    print(json.dumps(answer, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(run(main))
