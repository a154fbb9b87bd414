"""config.properties for a laptop and for a cluster, from one archive."""

import json

import pytest
import yaml

from scripts.archive import ROOT, STARTUP_BYTES_PER_SECOND, STARTUP_SECONDS, archive
from server.config_properties import cluster_properties, laptop_properties, model_config

SAME = [
    "metrics_mode",
    "model_metrics_auto_detect",
    "vmargs",
    "job_queue_size",
    "max_request_size",
    "max_response_size",
    "disable_token_authorization",
    "enable_model_api",
    "enable_envvars_config",
    "ts_open_inference_protocol",
    "model_snapshot",
]


@pytest.fixture(params=["zip-store", "no-archive"])
def archive_path(request, bloom, tmp_path):
    return archive("bloom", bloom, tmp_path / "store", archive_format=request.param)


def read(text):
    return dict(line.split("=", 1) for line in text.splitlines())


def test_both_are_the_same_but_for_where_they_listen(archive_path):
    laptop, cluster = read(laptop_properties(archive_path, 9000)), read(cluster_properties(archive_path))
    assert laptop.keys() == cluster.keys()
    assert {name: laptop[name] for name in SAME} == {name: cluster[name] for name in SAME}


@pytest.mark.parametrize("render", [lambda path: laptop_properties(path, 9000), cluster_properties])
def test_all_is_on_loopback(archive_path, render):
    values = read(render(archive_path))
    hosts = {
        name: value.removeprefix("http://").partition(":")[0] for name, value in values.items() if "_address" in name
    }
    assert hosts == {
        "inference_address": "127.0.0.1",
        "management_address": "127.0.0.1",
        "metrics_address": "127.0.0.1",
        "grpc_inference_address": "127.0.0.1",
        "grpc_management_address": "127.0.0.1",
    }


def test_where_a_laptop_listens(archive_path):
    values = read(laptop_properties(archive_path, 9000))
    addresses = [values[f"{name}_address"] for name in ("inference", "management", "metrics")]
    assert addresses == [f"http://127.0.0.1:{port}" for port in (9000, 9001, 9002)]
    assert (values["grpc_inference_port"], values["grpc_management_port"]) == ("9003", "9004")
    assert values["model_store"] == str(archive_path.parent)
    assert values["metrics_config"] == str(ROOT / "server/metrics.yaml")


def test_where_a_pod_listens(archive_path):
    values = read(cluster_properties(archive_path))
    assert values["inference_address"] == "http://127.0.0.1:8085"  # which KServe's wrapper asks
    assert values["model_store"] == "/mnt/models/model-store"
    assert values["metrics_config"] == "/mnt/models/config/metrics.yaml"
    assert values["enable_envvars_config"] == values["enable_model_api"] == "false"


def test_the_snapshot_says_what_the_archives_own_configuration_says(archive_path):
    models = json.loads(read(cluster_properties(archive_path))["model_snapshot"])["models"]
    (model,) = models["bloom"].values()
    packed = model_config(archive_path)
    assert model.pop("defaultVersion") is True and model.pop("marName") == archive_path.name
    assert model == {key: packed[key] for key in model} and model["batchSize"] == 256


def test_the_time_to_start_grows_with_the_checkpoint(bloom, tmp_path):
    shard = bloom / "model-00001-of-00003.safetensors"
    size = sum(path.stat().st_size for path in bloom.iterdir())
    small = model_config(archive("small", bloom, tmp_path, archive_format="no-archive"))
    assert small["startupTimeout"] == STARTUP_SECONDS + size // STARTUP_BYTES_PER_SECOND
    large = tmp_path / "large"
    large.mkdir()
    for path in bloom.iterdir():
        (large / path.name).symlink_to(path)
    (large / shard.name).unlink()
    with (large / shard.name).open("wb") as sparse:
        sparse.truncate(10**12)
    slow = model_config(archive("large", large, tmp_path, archive_format="no-archive"))
    assert slow["startupTimeout"] > 50_000


def test_a_time_to_start_of_ones_own_is_kept(bloom, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text((ROOT / "model-config.yaml").read_text() + "startupTimeout: 77")
    archive_path = archive("bloom", bloom, tmp_path, model_config=own, archive_format="no-archive")
    assert yaml.safe_load((archive_path / "model-config.yaml").read_text())["startupTimeout"] == 77


def test_a_body_is_no_larger_than_what_the_worker_parses_in_between(archive_path):
    assert int(read(laptop_properties(archive_path, 9000))["max_request_size"]) == 2**20
