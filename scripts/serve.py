"""Serve a checkpoint folder on this machine until Ctrl-C or `make stop`. Nothing is copied: the folder is linked."""

import argparse
import signal
import sys
import time
from pathlib import Path

from scripts.archive import ROOT, archive
from scripts.console import UserError, run
from scripts.demo_model import NAME as DEMO_NAME
from scripts.demo_model import demo_model
from server.torchserve import TorchServe, stop

RUN = Path(".run")  # one work folder a port


def serve(archive_path: Path, port: int, timeout: float) -> None:
    """Serve an archive in the foreground. Raises UserError when it cannot be loaded."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored when started in a shell's background
    started = time.monotonic()
    with TorchServe(archive_path, port, RUN / str(port)) as server:
        print(f"loading {server.name}; logs in {RUN / str(port) / 'logs'}", flush=True)
        try:
            server.wait_ready(timeout)
            print(f"READY after {time.monotonic() - started:.1f} s", flush=True)
            print(f"predict     {server.url}/v1/models/{server.name}:predict   (make predict)")
            print(f"management  {server.management_url}/models/{server.name}")
            print(f"metrics     http://127.0.0.1:{port + 2}/metrics")
            print("Ctrl-C or make stop ends it.", flush=True)
            server.wait()
        except KeyboardInterrupt:
            print("stopping", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="serve", description=__doc__)
    parser.add_argument("--model-dir", type=Path, help=f"checkpoint folder; default: the demo model, {DEMO_NAME}")
    parser.add_argument("--draft-model", type=Path, help="a small checkpoint with the same tokenizer, to guess tokens")
    parser.add_argument("--model-name", help="default: the folder's name")
    parser.add_argument("--setup-config", type=Path, default=ROOT / "setup_config.json")
    parser.add_argument("--model-config", type=Path, default=ROOT / "model-config.yaml")
    parser.add_argument("--port", type=int, default=8080, help="and the four after it; default: 8080")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds to wait for READY; default: 3600")
    parser.add_argument("--stop", action="store_true", help="end the one that serves on --port")
    args = parser.parse_args(argv)
    if args.stop:
        print("stopped" if stop(RUN / str(args.port)) else f"nothing is served on port {args.port} from here")
        return
    model_dir = args.model_dir or demo_model(Path("models") / DEMO_NAME)
    if not model_dir.is_dir():
        raise UserError(f"{model_dir} is not a folder: give MODEL_DIR a checkpoint folder")
    name = args.model_name or model_dir.resolve().name
    store = RUN / "model_store" / str(args.port)
    archive_path = archive(name, model_dir, store, args.setup_config, args.model_config, "no-archive", args.draft_model)
    serve(archive_path, args.port, args.timeout)


if __name__ == "__main__":
    sys.exit(run(main))
