"""What runs in the container: TorchServe on what KServe's storage initializer fetched, nginx before it, and probes.

    serve [--ts-config FILE] [KEY=VALUE …]   run both until SIGTERM; KEY=VALUE go into TorchServe's config.properties
    ready                                    exit status 0 when every model has a READY worker
    drain                                    wait until no request is open

The environment variable API_KEY holds the key that a request must bring, or several with spaces between; AUTH=none
serves whoever comes, for where a mesh or a gateway decides that.

KServe's own arguments, `torchserve --start --model-store=… --ts-config=…`, do the same as serve. The probes import
nothing but the standard library, because they run every few seconds and have to be quick.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from server.properties import format_properties, parse_properties

CONFIG = Path("/mnt/models/config/config.properties")
PORT, METRICS_PORT = 8080, 8082  # nginx's
SETTLE_SECONDS = 5  # until no router sends new requests to a pod that is ending
CONNECTIONS, ESTABLISHED = Path("/proc/net/tcp"), "01"
PROBE_SECONDS = 5  # that a probe waits for TorchServe's answer


class NotReady(Exception):
    """Why the probe fails; one line for the pod's events."""


def serve(ts_config: Path, changes: dict[str, str], port: int, metrics_port: int) -> int:
    """Run TorchServe with the config.properties that was uploaded, changed by `changes`, and nginx; the exit status.

    Set here is what follows from the container: the folders that can be written to, the environment, and that
    TorchServe is spoken to through nginx alone, whatever was uploaded.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a container's first process would ignore it
    from server import proxy, torchserve
    from server.config_properties import CLUSTER_PORTS, METRICS, addresses
    from server.errors import LaunchError

    if not ts_config.is_file():
        print(
            f"error: {ts_config} does not exist: set storageUri to what make upload filled, "
            "with config/config.properties and model-store/ in it",
            file=sys.stderr,
        )
        return 1
    model_store = ts_config.parents[1] / "model-store"
    uploaded = parse_properties(ts_config.read_text())
    if not _models(uploaded):
        print(
            f"error: {ts_config} names no model in model_snapshot: use the one that make upload writes", file=sys.stderr
        )
        return 1
    folders = {"model_store": str(model_store), "metrics_config": str(METRICS)}
    properties = uploaded | addresses(CLUSTER_PORTS) | folders | changes
    # The volume outlives a container that dies: it would leave gigabytes, and a process id that is another's by now.
    shutil.rmtree(_work_folder(), ignore_errors=True)
    _work_folder().mkdir()
    _config_file().write_text(format_properties(properties))
    try:
        nginx = proxy.command(
            _work_folder() / "nginx", properties, _models(properties)[0], _api_keys(), port, metrics_port
        )
        variables = torchserve.environment(_work_folder(), _work_folder() / "logs")
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    variables.pop("TS_SERVICE_ENVELOPE", None)  # KServe sets it; it would serve one request of a batch
    variables.pop("API_KEY", None)  # nginx has read it
    return _run_as_init(
        {"TorchServe": torchserve.command(_config_file(), model_store), "nginx": nginx},
        variables,
        signals={"nginx": signal.SIGQUIT},
    )


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
    afterwards end with their connection. Calls of gRPC, which do not come through nginx, are not waited for.
    """
    deadline = time.monotonic() + seconds
    time.sleep(min(settle, seconds))
    port = int(parse_properties(_config_file().read_text())["inference_address"].rpartition(":")[2])
    while time.monotonic() < deadline and _open_requests(port):
        time.sleep(0.5)


def _open_requests(port: int) -> int:
    """How many requests nginx has open at TorchServe, which has a connection for each.

    The kernel says it. A worker in a step of many seconds does not answer, and TorchServe does not know what its
    worker has not told it yet.
    """
    rows = [line.split() for line in CONNECTIONS.read_text().splitlines()[1:]]
    return sum(int(remote.rpartition(":")[2], 16) == port and state == ESTABLISHED for _, _, remote, state, *_ in rows)


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


def _api_keys() -> list[str] | None:
    return None if os.environ.get("AUTH") == "none" else os.environ.get("API_KEY", "").split()


def _run_as_init(commands: dict[str, list[str]], environment: dict[str, str], signals: dict[str, int]) -> int:
    """Run commands as a container's first process has to: end all of them when it is told to end or one of them ends,
    one after the other, the last first, and reap orphans. The exit status of the one that ended first.

    The kernel does not end a first process that leaves SIGTERM unhandled, as `torchserve` does.

    signals: what ends a command if not SIGTERM.
    """
    children: dict[int, str] = {}
    told = threading.Event()

    def end(*_: object) -> None:
        told.set()
        for process, name in [*children.items()][-1:]:  # the others once it has gone: it may still need them
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(process, signals.get(name, signal.SIGTERM))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    starting: dict[int, str] = {}  # to `end` the last is known with all before it, or none is
    for name, command in commands.items():
        if not told.is_set():
            started = subprocess.Popen(command, env=environment, cwd=_work_folder(), start_new_session=True)
            starting[started.pid] = name
    children.update(starting)
    if told.is_set():  # meanwhile
        end()
    result = 0
    while children:
        process, status = os.wait()
        if process not in children:
            continue
        name, code = children.pop(process), os.waitstatus_to_exitcode(status)
        if not told.is_set():
            print(f"error: {name} ended by itself with status {code}", file=sys.stderr)
            result = code or 1
        end()
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="container", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["serve", "torchserve", "ready", "drain"])
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--ts-config", type=Path, default=CONFIG)
    # Knative names the port in PORT.
    parser.add_argument(
        "--port", type=int, default=os.environ.get("PORT", PORT), help="of nginx (default: $PORT or %(default)s)"
    )
    parser.add_argument("--metrics-port", type=int, default=METRICS_PORT, help="of nginx (default: %(default)s)")
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
        return serve(args.ts_config, parse_properties("\n".join(args.changes)), args.port, args.metrics_port)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotReady as reason:
        sys.exit(str(reason))
