"""TorchServe's config.properties for a laptop and for a cluster: the same model and limits at different addresses."""

import json
import zipfile
from pathlib import Path
from typing import Any

import yaml

from server.properties import format_properties

CLUSTER_STORE = "/mnt/models/model-store"  # where KServe's storage initializer puts what was uploaded
# Behind nginx on 8080 and 8082, or KServe's wrapper on 8080 and 8081 (gRPC), which asks TorchServe on 8085.
CLUSTER_PORTS = {
    "inference": 8085,
    "management": 8086,
    "metrics": 8087,
    "grpc_inference": 7070,
    "grpc_management": 7071,
}
METRICS = Path(__file__).with_name("metrics.yaml")  # what TorchServe tells Prometheus
CLUSTER_METRICS = "/mnt/models/config/metrics.yaml"  # where KServe's own runtime finds it; our image has it itself
PORTS = tuple(CLUSTER_PORTS)  # on a laptop: PORT, PORT+1, …

WORKER_DEFAULTS = {  # TorchServe's own, for what model-config.yaml leaves out
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 1,
    "maxBatchDelay": 100,
    "responseTimeout": 120,
    "startupTimeout": 120,
}


def laptop_properties(archive: Path, port: int) -> str:
    """For an archive on this machine: five ports from `port` on."""
    return _render(archive, archive.parent, METRICS, {name: port + offset for offset, name in enumerate(PORTS)})


def cluster_properties(archive: Path) -> str:
    """For an archive in KServe's container."""
    return _render(archive, Path(CLUSTER_STORE), Path(CLUSTER_METRICS), CLUSTER_PORTS)


def addresses(ports: dict[str, int]) -> dict[str, str]:
    """Where TorchServe listens: on the loopback interface only, gRPC too."""
    urls = {f"{name}_address": f"http://127.0.0.1:{ports[name]}" for name in ("inference", "management", "metrics")}
    grpc = {f"grpc_{name}_port": str(ports[f"grpc_{name}"]) for name in ("inference", "management")}
    hosts = {f"grpc_{name}_address": "127.0.0.1" for name in ("inference", "management")}
    return urls | grpc | hosts


def model_config(archive: Path) -> dict[str, Any]:
    """model-config.yaml of a .mar or of a no-archive folder."""
    return yaml.safe_load(_read(archive, "model-config.yaml"))


def _render(archive: Path, model_store: Path, metrics: Path, ports: dict[str, int]) -> str:
    name = archive.name.removesuffix(".mar")
    version = json.loads(_read(archive, "MAR-INF/MANIFEST.json"))["model"]["modelVersion"]
    config = model_config(archive)
    worker = {key: config.get(key, default) for key, default in WORKER_DEFAULTS.items()}
    model = {version: {"defaultVersion": True, "marName": archive.name} | worker}
    snapshot = {"name": "startup.cfg", "modelCount": 1, "models": {name: model}}
    values = {
        **addresses(ports),
        "model_store": model_store,
        # A snapshot, not load_models: KServe's wrapper takes the model's name from it.
        "model_snapshot": json.dumps(snapshot, separators=(",", ":")),
        "metrics_mode": "prometheus",
        "metrics_config": metrics,
        "model_metrics_auto_detect": "true",  # for a handler that is newer than that file
        # The model needs the memory, of which Java would take up to a quarter, and the cores, on which it would compile
        # its code a second time, but for what runs a million times: else digests of a .mar take three times as long.
        "vmargs": "-Xmx1g -XX:Tier4InvocationThreshold=1000000 -XX:Tier4CompileThreshold=1000000 "
        "-XX:Tier4BackEdgeThreshold=10000000",
        "job_queue_size": 1000,
        # TorchServe's worker parses JSON before the handler sees it, and nobody else is served meanwhile: 50 ms for the
        # worst 1 MiB on one core. A prompt of 250,000 tokens fits.
        "max_request_size": 2**20,
        "max_response_size": 2**26,
        "disable_token_authorization": "true",
        "enable_model_api": "false",
        # KServe sets TS_SERVICE_ENVELOPE, which would wrap the handler in one that answers only the first of a batch.
        "enable_envvars_config": "false",
        "ts_open_inference_protocol": "true",
    }
    return format_properties(values)


def _read(archive: Path, name: str) -> bytes:
    if archive.is_dir():
        return (archive / name).read_bytes()
    with zipfile.ZipFile(archive) as zipped:
        return zipped.read(name)
