"""deploy/dashboard.json as it looks under load: docs/dashboard.png.

    python -m benchmarks.dashboard     # four minutes; Prometheus' command is needed, Debian's package or another's

Serves BLOOM-560m's exact shape with part of it on disk, sends requests in waves, lets Prometheus scrape, and draws what
its query API answers to each panel's expressions. Grafana itself is in neither Debian nor PyPI, so Matplotlib draws.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import requests
import yaml
from matplotlib.ticker import FuncFormatter

from benchmarks.checkpoints import WORK, bloom_560m
from benchmarks.serving import served
from scripts.archive import ROOT
from server.torchserve import free_port

SCRAPE_SECONDS = 2
CLIENTS = 12
SETTINGS = {"max_memory": {"cpu": "700MB"}, "max_batch_size": 8, "dtype": "bfloat16"}
VARIABLES = {"$model": ".*", "$__rate_interval": f"{10 * SCRAPE_SECONDS}s"}
UNITS = {"s": "seconds", "bytes": "bytes", "Bps": "bytes a second", "reqps": "a second", "percentunit": "share"}


@contextmanager
def prometheus(command: str, target: str) -> Iterator[str]:
    """Prometheus scraping `target`; the URL that it answers at."""
    folder, address = WORK / "prometheus", f"127.0.0.1:{free_port()}"
    folder.mkdir(parents=True, exist_ok=True)
    job = {"job_name": "torchserve", "static_configs": [{"targets": [target]}]}
    config = {"global": {"scrape_interval": f"{SCRAPE_SECONDS}s"}, "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    files = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/{time.time():.0f}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([command, *files, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait()


def load(url: str, seconds: float) -> None:
    """More and more clients, and then fewer again, of two protocols; one sends nonsense, one does not wait for its
    answers."""
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        idle = seconds * number / CLIENTS / 2
        time.sleep(idle)
        asked = 0
        while time.monotonic() < end - idle:
            asked += 1
            prompt = "My dog is cute " * (1 + number * asked % 12)
            completion = {"prompt": prompt, "max_tokens": 8, "temperature": "hot" if number == 6 and asked % 2 else 0}
            predict = {"instances": [prompt], "parameters": {"max_new_tokens": 8}}
            with suppress(requests.Timeout, requests.ConnectionError):  # the second where it is in the body
                if number % 2:
                    requests.post(f"{url}/v1/models/bloom:predict", json=predict, timeout=2 if number == 7 else 120)
                else:
                    requests.post(f"{url}/predictions/bloom/1.0/v1/completions", json=completion, timeout=120)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))


def series(url: str, target: dict[str, Any], start: float, end: float) -> Iterator[tuple[str, np.ndarray]]:
    """What Prometheus answers to one of a panel's targets: the legend and [points, 2] of time and value."""
    expression = target["expr"]
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    query = {"query": expression, "start": start, "end": end, "step": SCRAPE_SECONDS}
    answer = requests.get(f"{url}/api/v1/query_range", params=query, timeout=30).json()
    if answer["status"] != "success":
        raise ValueError(f"{expression}: {answer['error']}")
    for result in answer["data"]["result"]:
        legend = target["legendFormat"]
        for label, value in result["metric"].items():
            legend = legend.replace(f"{{{{{label}}}}}", value)
        yield legend, np.array(result["values"], dtype=float)


def draw(url: str, start: float, end: float, output: Path) -> dict[str, int]:
    """Every panel in its place; how many series each has got."""
    dashboard = json.loads((ROOT / "deploy/dashboard.json").read_text())
    panels, counts = dashboard["panels"], {}
    columns = 24 // panels[0]["gridPos"]["w"]
    figure, axes = plt.subplots(len(panels) // columns, columns, figsize=(5 * columns, 11), layout="constrained")
    for panel, axis in zip(panels, axes.flat, strict=True):
        found = [one for target in panel["targets"] for one in series(url, target, start, end)]
        for legend, points in found:
            axis.plot(points[:, 0] - start, points[:, 1], label=legend, linewidth=1.2)
        counts[panel["title"]] = len(found)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        axis.set_title(panel["title"], fontsize=10)
        axis.set_ylabel(UNITS.get(unit, ""), fontsize=8)
        axis.yaxis.set_major_formatter(FuncFormatter(_short))
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{dashboard['title']} (x: seconds)", fontsize=12)
    figure.savefig(output, dpi=90)
    return counts


def _short(value: float, _: object) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", default="prometheus", help="its command (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=180, help="of load (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/dashboard.png")
    args = parser.parse_args()
    folder = bloom_560m(WORK / "bloom-560m")
    with served(folder, **SETTINGS) as server, prometheus(args.prometheus, f"127.0.0.1:{server.port + 2}") as url:
        start = time.time()
        load(server.url, args.seconds)
        time.sleep(10 * SCRAPE_SECONDS)
        counts = draw(url, start, time.time(), args.output)
    for title, count in counts.items():
        print(f"{title}: {count} series")
    if empty := [title for title, count in counts.items() if not count]:
        raise SystemExit(f"nothing in {', '.join(empty)}")


if __name__ == "__main__":
    main()
