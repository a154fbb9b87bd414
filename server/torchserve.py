"""Start, watch and stop a TorchServe that shares nothing with any other on the machine."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import takewhile
from pathlib import Path

import psutil
import requests

from server.config_properties import PORTS, laptop_properties
from server.errors import LaunchError
from server.java import find_java_home

LOGGING = Path(__file__).with_name("log4j2.xml")
# Below those that the kernel gives to clients: a connection of somebody's would take one until TorchServe is up.
FREE_PORTS = range(10_000, 16_000, len(PORTS))
MAX_SOCKET_PATH = 107  # bytes, of a Unix socket's path on Linux
# What TorchServe's worker logs right before the traceback of a failure, and what it logs right after it.
FAILURE = re.compile(r"MODEL_LOG - (Failed to load model|Load model .* OOM|Backend worker process died)")
AFTER_TRACEBACK = ("Backend worker process died", "s_name_part0=")
TRACEBACK_SECONDS = 30  # that its last line may come later than its first: the next worker has to start for that

# Of workers. What they keep for themselves is then what handler/engine/capacity.py plans for.
MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",  # PyTorch's large tensors in huge pages: products read them a tenth faster
    # Freed blocks of a MiB or more go back at once. By default those of up to 32 MiB stay, and new ones may not fit in.
    # Of smaller ones the kernel would spend more time on zeroing pages.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 20),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",  # half a millisecond each to make again
    "LRU_CACHE_CAPACITY": "64",  # PyTorch's own of the same: by default it holds on to 1024
}


class ModelFailed(LaunchError):
    """The worker could not load the model; the message contains its traceback."""


class TorchServe:
    """One TorchServe, its worker and its work folder; a context manager that ends all of it.

    with TorchServe(store / "bloom.mar", port=8080, work=folder) as server:
        server.wait_ready(timeout=600)
        requests.post(f"{server.url}/v1/models/bloom:predict", json=…)
    """

    def __init__(self, archive: Path, port: int, work: Path, environment: dict[str, str] | None = None):
        self.name = archive.name.removesuffix(".mar")
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.management_url = f"http://127.0.0.1:{port + 1}"
        self.work = work.resolve()
        self.logs = self.work / "logs"
        self._archive = archive.resolve()
        self._environment = environment or {}
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "TorchServe":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it. Raises LaunchError when a port is taken or there is no Java."""
        _check_ports(self.port)
        stop(self.work)  # a TorchServe that was killed leaves processes and gigabytes
        shutil.rmtree(self.work, ignore_errors=True)
        temporary = self._temporary_folder()
        config = _config(self.work)
        config.write_text(laptop_properties(self._archive, self.port))
        start = command(config, self._archive.parent)
        variables = environment(temporary, self.logs) | self._environment
        with (self.work / "console.log").open("wb") as console:
            # In a process session of its own: one signal reaches Java and the workers, and Ctrl-C reaches only us.
            self._process = subprocess.Popen(
                start, cwd=self.work, env=variables, stdout=console, stderr=console, start_new_session=True
            )
        (self.work / "pid").write_text(str(self._process.pid))

    def wait_ready(self, timeout: float) -> None:
        """Wait until a worker is READY: `/ping` says Healthy long before, and also when the model cannot load.

        timeout: seconds. Raises ModelFailed with the worker's traceback, LaunchError when TorchServe ends or the
        time is over.
        """
        deadline = time.monotonic() + timeout
        while not self.ready():
            if failure := self.failure():
                raise ModelFailed(f"the worker could not load the model:\n{failure}")
            if not self.running():
                raise LaunchError(f"TorchServe ended before it was ready:\n{_tail(self.work / 'console.log')}")
            if time.monotonic() > deadline:
                raise LaunchError(f"no worker was READY in {timeout:.0f} s; see {self.logs / 'model_log.log'}")
            time.sleep(0.1)

    def ready(self) -> bool:
        """Whether a worker has loaded the model."""
        try:
            answer = requests.get(f"{self.management_url}/models/{self.name}", timeout=5)
            return answer.ok and any(worker["status"] == "READY" for worker in answer.json()[0]["workers"])
        except requests.RequestException:
            return False

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def failure(self) -> str:
        """The traceback of the first worker that died, or nothing."""
        deadline = time.monotonic() + TRACEBACK_SECONDS
        while FAILURE.search(log := _read(self.logs / "model_log.log")):
            lines = FAILURE.split(log, maxsplit=1)[-1].splitlines()[1:]
            logged = [line.partition(" MODEL_LOG - ")[2] for line in lines if "-stdout MODEL_LOG - " in line]
            traceback = [*takewhile(lambda line: not line.startswith(AFTER_TRACEBACK), logged)]
            if len(traceback) < len(logged) or not self.running() or time.monotonic() > deadline:
                return "\n".join(traceback)
            time.sleep(0.1)
        return ""

    def wait(self) -> None:
        """Wait until TorchServe ends, whoever ended it."""
        if self._process:
            self._process.wait()

    def stop(self) -> None:
        """End TorchServe and every worker, and remove what they unpacked. The logs stay."""
        stop(self.work)
        if self._process:
            self._process.wait()

    def _temporary_folder(self) -> Path:
        """Where TorchServe unpacks models and puts its sockets, on the disk of the work folder."""
        temporary = self.work / "tmp"
        temporary.mkdir(parents=True)
        if len(os.fsencode(temporary / ".ts.sock.9000")) <= MAX_SOCKET_PATH:
            return temporary
        short = Path(tempfile.mkdtemp(prefix="ts-")) / "tmp"
        short.symlink_to(temporary)
        (self.work / "short").write_text(str(short.parent))
        return short


def command(config: Path, model_store: Path) -> list[str]:
    """The command line that runs TorchServe in the foreground."""
    start = [str(Path(sys.executable).parent / "torchserve"), "--start", "--foreground", "--ncs"]
    return [*start, "--ts-config", str(config), "--model-store", str(model_store)]


def environment(temporary: Path, logs: Path) -> dict[str, str]:
    """This process's environment, with what makes TorchServe write to these two folders alone.

    Raises LaunchError when there is no Java.
    """
    java_home = find_java_home()
    if java_home is None:
        raise LaunchError("TorchServe needs Java 17 or newer: run make setup, or set JAVA_HOME")
    return {
        # How often a waiting thread looks before it sleeps: about until the next product begins. Less costs a wake-up
        # for each, more keeps Java and others from the core. It takes precedence over OMP_WAIT_POLICY.
        "GOMP_SPINCOUNT": "20000",
        **MEMORY,
        **({"OMP_NUM_THREADS": str(max(1, int(quota)))} if (quota := cpu_quota()) else {}),
        **os.environ,
        "JAVA_HOME": str(java_home),
        "TEMP": str(temporary),
        "TMPDIR": str(temporary),
        "LOG_LOCATION": str(logs),
        "METRICS_LOCATION": str(logs),
        "LOG4J_CONFIGURATION_FILE": f"log4j2.xml,{LOGGING}",
        "PYTHONUNBUFFERED": "1",
    }


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many CPUs' time the control group may use, or None without a limit. PyTorch counts cores, not quotas: threads
    beyond it would use the time up in the first part of each period, and all of them stand still in the rest."""
    quotas = []
    for line in of.read_text().splitlines() if of.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder, group = root if not controllers else root / "cpu", Path(path.strip("/"))
        # The groups above count too. A container may see its own as the root, under the path that it has outside.
        for parent in (folder / group, *(folder / above for above in group.parents)):
            if controllers:
                values = [_read(parent / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                values = _read(parent / "cpu.max").split()
            if len(values) == 2 and all(value.isdecimal() for value in values):  # else "-1" or "max"
                quotas.append(int(values[0]) / int(values[1]))
    return min(quotas, default=None)


def stop(work: Path, timeout: float = 30) -> bool:
    """End the TorchServe whose work folder this is, with all its workers; whether there was one.

    timeout: seconds it gets to end by itself.
    """
    process = _recorded_process(work)
    if process:
        family = [process, *process.children(recursive=True)]
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout)
        for survivor in alive:
            survivor.kill()
        psutil.wait_procs(alive, timeout)
    shutil.rmtree(work / "tmp", ignore_errors=True)
    if short := _read(work / "short"):
        shutil.rmtree(short, ignore_errors=True)
    for name in ("pid", "short"):
        (work / name).unlink(missing_ok=True)
    return process is not None


def free_port() -> int:
    """A port with as many free ones after it as TorchServe needs. Raises LaunchError when there is none."""
    for port in random.sample(FREE_PORTS, len(FREE_PORTS)):
        if all(map(_is_free, range(port, port + len(PORTS)))):
            return port
    raise LaunchError(f"no free ports between {FREE_PORTS.start} and {FREE_PORTS.stop}")


def _check_ports(port: int) -> None:
    for offset, purpose in enumerate(PORTS):
        if not _is_free(port + offset):
            raise LaunchError(f"port {port + offset} ({purpose}) is taken: choose another PORT or stop what has it")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
        return True


def _recorded_process(work: Path) -> psutil.Process | None:
    """The process that `start` recorded, unless it has ended and its id belongs to another one by now. Its command line
    tells; when it was started, by the clock, changes when the clock is set."""
    if recorded := _read(work / "pid").split():  # version 0.1.0 wrote more than the id
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(recorded[0]))
            return process if str(_config(work.resolve())) in process.cmdline() else None
    return None


def _config(work: Path) -> Path:
    return work / "config.properties"


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(_read(path).splitlines()[-lines:])
