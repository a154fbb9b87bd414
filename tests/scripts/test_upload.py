import errno
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from scripts import upload
from scripts.archive import archive
from scripts.console import UserError
from scripts.stores import base, open_store
from scripts.stores.folder import FolderStore, _FolderUpload
from scripts.upload import find_archive
from server.config_properties import METRICS
from tests.clouds import files, objects

PART_BYTES = 5 * 2**20  # the least that S3 takes
SIZE = 4 * PART_BYTES + 12345
CONFIG = {"config/config.properties", "config/metrics.yaml"}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(base, "PART_BYTES", PART_BYTES)


@pytest.fixture
def no_retries(monkeypatch):
    for vendor in ("s3", "google", "azure"):
        monkeypatch.setattr(f"scripts.stores.{vendor}.RETRIES", 0)


@pytest.fixture(scope="module")
def mar(bloom, tmp_path_factory):
    """An archive of five parts."""
    folder = tmp_path_factory.mktemp("mar")
    (folder / "weights").mkdir()
    for path in bloom.iterdir():
        (folder / "weights" / path.name).write_bytes(path.read_bytes())
    (folder / "weights/ballast").write_bytes(os.urandom(SIZE))
    return archive("bloom", folder / "weights", folder / "store")


@pytest.fixture(scope="module")
def folder(bloom, tmp_path_factory):
    return archive("bloom", bloom, tmp_path_factory.mktemp("folder"), archive_format="no-archive")


def test_a_mar_and_its_config_are_put_where_kserve_looks(cloud, mar):
    summary = upload.upload(mar, cloud.uri)
    there = objects(cloud)
    assert there.keys() == {"model-store/bloom.mar", *CONFIG}
    assert there["model-store/bloom.mar"] == mar.read_bytes()
    assert there["config/metrics.yaml"] == METRICS.read_bytes()
    properties = dict(line.split("=", 1) for line in there["config/config.properties"].decode().splitlines())
    assert properties["model_store"] == "/mnt/models/model-store"
    assert properties["metrics_config"] == "/mnt/models/config/metrics.yaml"
    assert json.loads(properties["model_snapshot"])["models"]["bloom"]["1.0"]["marName"] == "bloom.mar"
    assert (summary.sent, summary.skipped, summary.stale) == (3, 0, ())
    assert summary.bytes == sum(map(len, there.values()))


def test_a_folder_is_uploaded_with_what_its_links_point_to(cloud, folder):
    upload.upload(folder, cloud.uri)
    there = objects(cloud)
    assert all(there.pop(name) for name in CONFIG)
    assert there == {f"model-store/bloom/{name}": data for name, data in files(folder).items()}
    assert any(name.endswith("model/config.json") for name in there)


def test_a_second_upload_moves_nothing_and_a_changed_file_only_itself(cloud, folder, mar, tmp_path):
    for made in (mar, folder):
        first = upload.upload(made, cloud.uri)
        before = cloud.proxy.sent
        second = upload.upload(made, cloud.uri)
        assert (second.sent, second.bytes, second.skipped) == (0, 0, first.sent + first.skipped)
        assert cloud.proxy.sent - before < 5000 * (second.skipped + 2)  # the questions
    copy = tmp_path / "bloom"
    subprocess.run(["cp", "-rL", folder, copy], check=True)
    (copy / "setup_config.json").write_text("{}")
    third = upload.upload(copy, cloud.uri)
    assert (third.sent, third.bytes) == (1, 2)
    assert objects(cloud)["model-store/bloom/setup_config.json"] == b"{}"


def test_what_is_nobodys_is_named_and_removed_on_demand(cloud, folder, mar):
    upload.upload(mar, cloud.uri)
    assert upload.upload(folder, cloud.uri).stale == ("model-store/bloom.mar",)
    assert "model-store/bloom.mar" in objects(cloud)
    upload.upload(folder, cloud.uri, delete=True)
    assert "model-store/bloom.mar" not in objects(cloud)
    assert upload.upload(folder, cloud.uri).stale == ()


def test_a_broken_upload_says_so_and_the_next_goes_on_where_it_stopped(cloud, mar, no_retries, monkeypatch):
    monkeypatch.setattr(upload, "WORKERS", 1)
    cloud.proxy.break_after = 3 * PART_BYTES
    with pytest.raises(UserError) as error:
        upload.upload(mar, cloud.uri)
    assert re.search("did not take it .*: run the same command again to go on where it stopped$", str(error.value))
    cloud.proxy.break_after = None
    assert not objects(cloud).keys() & {"model-store/bloom.mar", *CONFIG}
    summary = upload.upload(mar, cloud.uri)
    assert PART_BYTES < summary.bytes < mar.stat().st_size - PART_BYTES / 2
    there = objects(cloud)
    assert there["model-store/bloom.mar"] == mar.read_bytes()
    assert there.keys() == {"model-store/bloom.mar", *CONFIG}
    assert not upload.upload(mar, cloud.uri).sent


def test_another_file_does_not_go_on_with_what_was_begun(cloud, mar, no_retries, tmp_path):
    cloud.proxy.break_after = 3 * PART_BYTES
    with pytest.raises(UserError):
        upload.upload(mar, cloud.uri)
    cloud.proxy.break_after = None
    other = tmp_path / "bloom.mar"
    data = mar.read_bytes()
    other.write_bytes(data[:1000] + bytes(reversed(data[1000:1010])) + data[1010:])
    store, summary = open_store(cloud.uri), upload.Summary()
    with ThreadPoolExecutor(2) as pool, upload.progress_bar([other], "other") as bar:
        upload._send(store, "model-store/bloom.mar", other, pool, bar, summary)
    assert objects(cloud)["model-store/bloom.mar"] == other.read_bytes()
    upload.upload(mar, cloud.uri)
    assert objects(cloud)["model-store/bloom.mar"] == data


def test_a_missing_bucket_is_named(cloud, mar):
    uri = cloud.uri.replace(cloud.bucket, "no-such-bucket")
    with pytest.raises(
        UserError, match=r"^there is no (bucket|container) no-such-bucket: make it \(.*\) or name another$"
    ):
        upload.upload(mar, uri)


def test_a_server_that_is_not_there(cloud, mar, no_retries):
    cloud.proxy.break_after = 0
    with pytest.raises(UserError, match="run the same command again"):
        upload.upload(mar, cloud.uri)


@pytest.mark.parametrize("cloud_server", ["azure"], indirect=True)
def test_wrong_keys_of_azure(cloud, mar, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCESS_KEY", "d3Jvbmc=")
    with pytest.raises(UserError, match=r"^Azure refuses the credentials .*: set AZURE_STORAGE_ACCESS_KEY"):
        upload.upload(mar, cloud.uri)
    monkeypatch.delenv("AZURE_STORAGE_ACCESS_KEY")
    monkeypatch.setenv("PATH", "/nowhere")  # without the az command
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "dev")  # and without asking for a virtual machine's identity
    with pytest.raises(UserError, match=r"^no Azure credentials: run az login"):
        upload.upload(mar, cloud.uri)


@pytest.mark.parametrize("cloud_server", ["s3"], indirect=True)
def test_wrong_keys_of_s3_and_too_few_rights(cloud, mar, monkeypatch):
    import boto3

    iam = boto3.client("iam")
    iam.create_user(UserName="nobody")
    keys = iam.create_access_key(UserName="nobody")["AccessKey"]
    server = f"http://127.0.0.1:{cloud.port}/moto-api/reset-auth"
    requests.post(server, data=b"0", timeout=10).raise_for_status()  # from now on rights are looked at
    try:
        with pytest.raises(UserError, match=r"^the AWS credentials are refused|^no permission for s3://"):
            upload.upload(mar, cloud.uri)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys["SecretAccessKey"])
        with pytest.raises(UserError, match=r"^no permission for s3://.*: grant s3:PutObject"):
            upload.upload(mar, cloud.uri)
    finally:
        requests.post(server, data=b"inf", timeout=10).raise_for_status()


def test_no_keys_at_all(mar, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "STORAGE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(UserError, match=r"^no AWS credentials: set AWS_ACCESS_KEY_ID"):
        upload.upload(mar, "s3://bucket/bloom")
    with pytest.raises(UserError, match=r"^no Google credentials: run gcloud auth"):
        upload.upload(mar, "gs://bucket/bloom")


@pytest.mark.parametrize(
    "error, message",
    [
        ("Forbidden", "no permission for gs://bucket/bloom: grant roles/storage.objectUser"),
        ("Unauthorized", "Google refuses the credentials"),
        ("ServiceUnavailable", "gs://bucket did not take it"),
    ],
)
def test_googles_errors(error, message, monkeypatch):
    """The emulator knows no rights."""
    from google.api_core import exceptions

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    explained = open_store("gs://bucket/bloom").explain(getattr(exceptions, error)("said"))
    assert explained.startswith(message) and "\n" not in explained


def test_a_folder_goes_on_where_it_stopped_too(mar, tmp_path, monkeypatch):
    uri = f"file://{tmp_path}/there"
    put, count = _FolderUpload.put, iter(range(100))

    def full(self, part, data):
        if next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, part, data)

    with monkeypatch.context() as patch:
        patch.setattr(_FolderUpload, "put", full)
        patch.setattr(upload, "WORKERS", 1)
        with pytest.raises(UserError, match=r"^no space left in .*/there: make room, then run the same command again"):
            upload.upload(mar, uri)
    assert not (tmp_path / "there/config").exists()
    summary = upload.upload(mar, uri)
    assert summary.bytes < SIZE - PART_BYTES
    assert (tmp_path / "there/model-store/bloom.mar").read_bytes() == mar.read_bytes()
    assert all((tmp_path / "there" / name).is_file() for name in CONFIG)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 3
    assert (upload.upload(mar, uri).sent, upload.upload(mar, uri).skipped) == (0, 3)
    (tmp_path / "there/model-store/bloom").mkdir()
    (tmp_path / "there/model-store/bloom/old").touch()
    assert upload.upload(mar, uri, delete=True).stale == ("model-store/bloom/old",)
    assert upload.upload(mar, uri).stale == ()


def test_permission_is_explained():
    assert FolderStore("/x").explain(PermissionError(13, "denied")).startswith("no permission to write in /x")


@pytest.mark.parametrize(
    "uri, message",
    [
        ("ftp://host/path", "write gs://BUCKET/PATH, s3://"),
        ("/mnt/models", "write gs://BUCKET/PATH, s3://"),
        ("https://example.com/bucket/path", "write gs://BUCKET/PATH, s3://"),
        ("s3://bucket", "KServe wants a bucket and a path in it"),
        ("gs:///path", "KServe wants a bucket and a path in it"),
        ("https://a.blob.core.windows.net/container", "KServe wants a bucket and a path in it"),
        ("https://a.blob.core.windows.net/container/path?sig=secret", "KServe wants"),
        ("file://relative/path", "write file:///an/absolute/path"),
        ("file:///", "write file:///an/absolute/path"),
    ],
)
def test_uris_that_kserve_could_not_read_are_refused(uri, message):
    with pytest.raises(UserError, match=message):
        open_store(uri)


def test_the_archive_is_found_by_the_models_name(mar, tmp_path):
    assert find_archive(mar.parent, "bloom") == mar
    with pytest.raises(UserError, match="make archive MODEL_NAME=other"):
        find_archive(mar.parent, "other")
    (tmp_path / "bloom").mkdir()
    (tmp_path / "bloom.mar").touch()
    with pytest.raises(UserError, match="both there: remove the one"):
        find_archive(tmp_path, "bloom")


def test_the_command_says_what_it_did(mar, tmp_path):
    command = [sys.executable, "-m", "scripts.upload", "--model-name", "bloom", "--model-store", str(mar.parent)]
    command += ["--storage-uri", f"file://{tmp_path}"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))
    assert first.stdout == f"file://{tmp_path}: sent 3 files (0.02 GB), 0 were there already\n"
    assert second.stdout == f"file://{tmp_path}: sent 0 files (0.00 GB), 3 were there already\n"
    wrong = subprocess.run([*command[:-1], "s3://bucket"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: STORAGE_URI is 's3://bucket'")
