"""What runs in the container: TorchServe on what KServe's storage initializer fetched, and the pod's probes.

    serve [--ts-config FILE] [KEY=VALUE …]   run TorchServe until SIGTERM; KEY=VALUE go into its config.properties
    ready                                    exit status 0 when every model has a READY worker
    drain                                    wait until no request is running or waiting

KServe's own arguments, `torchserve --start --model-store=… --ts-config=…`, do the same as serve. The probes import
nothing but the standard library, because they run every few seconds and have to be quick.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from server.properties import format_properties, parse_properties

CONFIG = Path("/mnt/models/config/config.properties")
SETTLE_SECONDS = 5  # until no router sends new requests to a pod that is ending
PROBE_SECONDS = 5  # that a probe waits for TorchServe's answer


class NotReady(Exception):
    """Why the probe fails; one line for the pod's events."""


def serve(ts_config: Path, changes: dict[str, str]) -> int:
    """Run TorchServe with the config.properties that was uploaded, changed by `changes`; its exit status.

    Set here is what follows from the container: its port, the folders that can be written to, and its environment.
    """
    from server.config_properties import METRICS
    from server.torchserve import command, environment

    if not ts_config.is_file():
        print(
            f"error: {ts_config} does not exist: set storageUri to what make upload filled, "
            "with config/config.properties and model-store/ in it",
            file=sys.stderr,
        )
        return 1
    model_store = ts_config.parents[1] / "model-store"
    # Knative names the port in PORT.
    values = {
        "inference_address": f"http://0.0.0.0:{os.environ.get('PORT', '8080')}",
        "model_store": str(model_store),
        "metrics_config": str(METRICS),
    }
    # The volume outlives a container that dies: it would leave gigabytes, and a process id that is another's by now.
    shutil.rmtree(_work_folder(), ignore_errors=True)
    _work_folder().mkdir()
    _config_file().write_text(format_properties(parse_properties(ts_config.read_text()) | values | changes))
    variables = environment(_work_folder(), _work_folder() / "logs")
    variables.pop("TS_SERVICE_ENVELOPE", None)  # KServe sets it; it would serve one request of a batch
    return _run_as_init(command(_config_file(), model_store), variables)


def ready() -> None:
    """Raises NotReady unless every model of the config has a READY worker. `/ping` says Healthy long before that."""
    properties = parse_properties(_config_file().read_text()) if _config_file().is_file() else {}
    models = _models(properties)
    if not models:
        raise NotReady("TorchServe was not started yet")
    for name, _ in models:
        workers = _get(f"{properties['management_address']}/models/{name}")[0]["workers"]
        statuses = [worker["status"] for worker in workers]
        if "READY" not in statuses:
            raise NotReady(f"{name}: {', '.join(statuses) or 'no worker'}")


def drain(seconds: float, settle: float = SETTLE_SECONDS) -> None:
    """For the preStop hook: wait until new requests go elsewhere, then until those that are here are answered.

    seconds: the most that it waits, less than the pod's terminationGracePeriodSeconds. Requests that are still open
    afterwards end with their connection.
    """
    deadline = time.monotonic() + seconds
    time.sleep(min(settle, seconds))
    properties = parse_properties(_config_file().read_text())
    while time.monotonic() < deadline and any(_open_requests(properties, *model) for model in _models(properties)):
        time.sleep(0.5)


def _open_requests(properties: dict[str, str], name: str, version: str) -> int:
    port = properties["inference_address"].rpartition(":")[2]
    try:
        engine = _get(f"http://127.0.0.1:{port}/predictions/{name}/{version}/describe")["engine"]
    except NotReady:
        return 0  # a worker that does not answer has nothing to lose
    return engine["running"] + engine["waiting"]


def _models(properties: dict[str, str]) -> list[tuple[str, str]]:
    """(name, version) of the models that the config starts TorchServe with."""
    snapshot = json.loads(properties.get("model_snapshot", "{}"))
    return [(name, version) for name, versions in snapshot.get("models", {}).items() for version in versions]


def _get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise NotReady(f"{url}: {error}") from None


def _work_folder() -> Path:
    return Path(tempfile.gettempdir()) / "torchserve"


def _config_file() -> Path:
    return _work_folder() / "config.properties"


def _run_as_init(command: list[str], environment: dict[str, str]) -> int:
    """Run a command as a container's first process has to: pass signals on and reap orphans. Its exit status.

    The kernel does not end a first process that leaves SIGTERM unhandled, as `torchserve` does.
    """
    child = subprocess.Popen(command, env=environment, cwd=_work_folder(), start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.killpg(child.pid, received))
    while True:
        process, status = os.wait()
        if process == child.pid:
            code = os.waitstatus_to_exitcode(status)
            return 0 if code == -signal.SIGTERM else code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="container", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["serve", "torchserve", "ready", "drain"])
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--ts-config", type=Path, default=CONFIG)
    parser.add_argument("--seconds", type=float, default=60, help="that drain may take (default: %(default)s)")
    for flag in ("--start", "--foreground", "--ncs"):  # torchserve's, which serve does anyway
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model-store", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if args.action == "ready":
        ready()
    elif args.action == "drain":
        drain(args.seconds)
    else:
        return serve(args.ts_config, parse_properties("\n".join(args.changes)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotReady as reason:
        sys.exit(str(reason))
