import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from google.cloud.storage import blob as google

from scripts import releases, upload
from scripts.archive import archive
from scripts.console import UserError
from scripts.stores import base, check_kserve, open_store
from scripts.stores.folder import FolderStore, _FolderUpload
from scripts.stores.s3 import _S3Upload
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


def of_release(cloud, release):
    """Everything in a release, by its path from there."""
    return {name.removeprefix(f"{release}/"): data for name, data in objects(cloud).items() if name.startswith(release)}


def test_a_mar_and_its_config_are_put_where_kserve_looks(cloud, mar):
    summary = upload.upload(mar, cloud.uri)
    there = of_release(cloud, summary.release)
    assert len(there) == len(objects(cloud)) and re.fullmatch("[0-9a-f]{16}", summary.release)
    assert there.keys() == {"model-store/bloom.mar", *CONFIG}
    assert there["model-store/bloom.mar"] == mar.read_bytes()
    assert there["config/metrics.yaml"] == METRICS.read_bytes()
    properties = dict(line.split("=", 1) for line in there["config/config.properties"].decode().splitlines())
    assert properties["model_store"] == "/mnt/models/model-store"
    assert properties["metrics_config"] == "/mnt/models/config/metrics.yaml"
    assert json.loads(properties["model_snapshot"])["models"]["bloom"]["1.0"]["marName"] == "bloom.mar"
    assert (summary.sent, summary.skipped) == (3, 0)
    assert summary.bytes == sum(map(len, there.values()))


def test_a_folder_is_uploaded_with_what_its_links_point_to(cloud, folder):
    there = of_release(cloud, upload.upload(folder, cloud.uri).release)
    assert all(there.pop(name) for name in CONFIG)
    assert there == {f"model-store/bloom/{name}": data for name, data in files(folder).items()}
    assert any(name.endswith("model/config.json") for name in there)


def test_a_second_upload_moves_nothing(cloud, folder, mar):
    for made in (mar, folder):
        first = upload.upload(made, cloud.uri)
        before = cloud.proxy.sent
        second = upload.upload(made, cloud.uri)
        assert second == upload.Summary(first.release, skipped=first.sent)
        assert cloud.proxy.sent - before < 5000 * (second.skipped + 2)  # the questions


def test_what_is_changed_is_another_release_and_the_first_stays(cloud, folder, tmp_path):
    first = upload.upload(folder, cloud.uri).release
    before = of_release(cloud, first)
    copy = tmp_path / "bloom"
    subprocess.run(["cp", "-rL", folder, copy], check=True)
    (copy / "setup_config.json").write_text("{}")
    second = upload.upload(copy, cloud.uri).release
    assert of_release(cloud, first) == before
    assert of_release(cloud, second) == before | {"model-store/bloom/setup_config.json": b"{}"}
    assert [release.name for release in releases.releases(cloud.uri)] == [first, second]
    releases.delete(cloud.uri, first)
    assert {name.partition("/")[0] for name in objects(cloud)} == {second}
    assert [(release.name, release.whole) for release in releases.releases(cloud.uri)] == [(second, True)]
    with pytest.raises(UserError, match=f"has no release {first}: make releases lists them"):
        releases.delete(cloud.uri, first)


def test_a_release_is_named_by_its_files_names_and_content(tmp_path):
    def name(**files):
        paths = {key: tmp_path / key for key in files}
        for key, data in files.items():
            paths[key].write_bytes(data)
        with ThreadPoolExecutor(1) as pool:
            return releases.release_name({key: base.parts_of(path, pool) for key, path in paths.items()})

    assert name(a=b"1", b=b"2") == name(b=b"2", a=b"1")
    assert len({name(a=b"1", b=b"2"), name(a=b"2", b=b"1"), name(a=b"1", c=b"2"), name(a=b"1")}) == 4


def test_a_file_that_changes_meanwhile_is_not_taken_for_what_it_was(mar, tmp_path, monkeypatch):
    copy = tmp_path / "bloom.mar"
    copy.write_bytes(mar.read_bytes())
    send = upload._send_parts

    def change(store, key, path, *rest):
        path.write_bytes(bytes(reversed(path.read_bytes())))
        send(store, key, path, *rest)

    monkeypatch.setattr(upload, "_send_parts", change)
    with pytest.raises(UserError, match="has changed while it was uploaded"):
        upload.upload(copy, f"file://{tmp_path}/there")
    assert not list((tmp_path / "there").rglob("*.mar"))


def test_two_uploads_of_one_archive_at_once(cloud, mar):
    """Both end well, whoever was quicker at which step, and what is there is the archive."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: upload.upload(mar, cloud.uri), range(2))
    assert first.release == second.release
    assert of_release(cloud, first.release)["model-store/bloom.mar"] == mar.read_bytes()
    assert len(objects(cloud)) == 3
    assert not upload.upload(mar, cloud.uri).sent


def test_who_comes_second_takes_what_the_first_has_finished(cloud, mar, monkeypatch):
    """Another upload of the same archive ends between the parts and the end of this one."""
    send = upload._send_parts

    def overtaken(store, key, *rest):
        monkeypatch.setattr(upload, "_send_parts", send)
        begin = store.begin

        def slow(*arguments):
            unfinished = begin(*arguments)
            finish = unfinished.finish

            def after_another():
                upload.upload(mar, cloud.uri)
                finish()

            unfinished.finish = after_another
            return unfinished

        store.begin = slow
        send(store, key, *rest)

    monkeypatch.setattr(upload, "_send_parts", overtaken)
    release = upload.upload(mar, cloud.uri).release
    assert of_release(cloud, release)["model-store/bloom.mar"] == mar.read_bytes()
    assert len(objects(cloud)) == 3


def test_parts_that_another_upload_used_up_are_not_counted_on(cloud, mar, monkeypatch):
    """Another upload of the same archive begins and ends after this one has seen what is there, and before it sends
    the rest."""
    send = upload._send_parts

    def overtaken(store, key, path, parts, *rest):
        monkeypatch.setattr(upload, "_send_parts", send)
        store.begin(key, path, parts).put(parts[0], parts[0].read(path))
        begin = store.begin

        def slow(*arguments):
            unfinished = begin(*arguments)
            assert unfinished.done == {1}
            upload.upload(mar, cloud.uri)
            return unfinished

        store.begin = slow
        send(store, key, path, parts, *rest)

    monkeypatch.setattr(upload, "_send_parts", overtaken)
    release = upload.upload(mar, cloud.uri).release
    assert of_release(cloud, release)["model-store/bloom.mar"] == mar.read_bytes()
    assert len(objects(cloud)) == 3


@pytest.mark.parametrize("cloud_server", ["s3"], indirect=True)
def test_what_another_makes_of_the_parts_is_waited_for(cloud, mar, monkeypatch):
    """S3 forgets an upload before the object that it makes of it is there."""
    unfinished = _S3Upload._unfinished

    def used_up(self, location):
        monkeypatch.setattr(_S3Upload, "_unfinished", unfinished)
        gone = self._client.create_multipart_upload(**location)["UploadId"]
        self._client.abort_multipart_upload(**location, UploadId=gone)
        other.start()
        return gone

    other = threading.Timer(0.5, upload.upload, (mar, cloud.uri))
    monkeypatch.setattr(_S3Upload, "_unfinished", used_up)
    release = upload.upload(mar, cloud.uri).release
    other.join()
    assert of_release(cloud, release)["model-store/bloom.mar"] == mar.read_bytes()
    assert len(objects(cloud)) == 3


@pytest.mark.parametrize("cloud_server", ["s3", "azure"], indirect=True)  # the emulator of gs knows no conditions
def test_nothing_is_written_over(cloud, folder):
    store = open_store(cloud.uri)
    first, second = (folder / name for name in ("setup_config.json", "model-config.yaml"))
    with ThreadPoolExecutor(1) as pool:
        for path in (first, second):
            (part,) = base.parts_of(path, pool)
            with contextlib.nullcontext() if path == first else pytest.raises(store.errors()) as error:
                store.put("key", path.read_bytes(), part)
    assert store.explain(error.value) == base.CHANGED
    assert objects(cloud) == {"key": first.read_bytes()}


@pytest.mark.parametrize("cloud_server", ["gcs"], indirect=True)
def test_google_is_asked_to_write_nothing_over(cloud, mar, monkeypatch):
    """The emulator knows no conditions, so this looks at what is sent."""
    asked = []
    send = requests.Session.request

    def record(self, method, url, *rest, **more):
        asked.append((method, url))
        return send(self, method, url, *rest, **more)

    monkeypatch.setattr(requests.Session, "request", record)
    upload.upload(mar, cloud.uri)
    writes = [url for method, url in asked if method == "POST"]
    assert len(writes) == 1 + 5 + 2 and all("ifGenerationMatch=0" in url for url in writes)


@pytest.mark.parametrize("cloud_server", ["gcs"], indirect=True)
def test_what_google_composed_is_verified(cloud, mar, monkeypatch):
    """Parts in the wrong order have the right size."""
    compose = google.Blob.compose

    def wrong(self, sources, **more):
        compose(self, [*sources[1::-1], *sources[2:]], **more)

    with monkeypatch.context() as patch:
        patch.setattr(google.Blob, "compose", wrong)
        with pytest.raises(UserError, match="what Google composed is not bloom"):
            upload.upload(mar, cloud.uri)
    assert not [name for name in objects(cloud) if name.endswith(".mar")]
    release = upload.upload(mar, cloud.uri).release
    assert of_release(cloud, release)["model-store/bloom.mar"] == mar.read_bytes()


@pytest.mark.parametrize("cloud_server", ["gcs"], indirect=True)
def test_google_composes_what_it_composed_by_names_of_the_content(cloud, mar, monkeypatch):
    """Three parts a request in place of 32. Another upload that broke off here has left its own."""
    monkeypatch.setattr("scripts.stores.google.MAX_COMPOSED", 3)
    composed = []
    compose = google.Blob.compose

    def record(self, sources, **more):
        composed.append((self.name, len(sources)))
        compose(self, sources, **more)

    monkeypatch.setattr(google.Blob, "compose", record)
    release = upload.upload(mar, cloud.uri).release
    (middle, first), (last, second) = composed
    assert re.search("/composed-[0-9a-f]{64}$", middle) and last.endswith(".mar") and (first, second) == (3, 3)
    assert of_release(cloud, release)["model-store/bloom.mar"] == mar.read_bytes() and len(objects(cloud)) == 3


@pytest.mark.parametrize("cloud_server", ["s3"], indirect=True)
def test_anothers_upload_to_s3_goes_on(cloud, mar):
    """Of two unfinished ones the newer is taken, and the older, which may be somebody's, is left."""
    import boto3

    client = boto3.client("s3")
    with ThreadPoolExecutor(2) as pool:
        release = releases.release_name(
            {key: base.parts_of(path, pool) for key, path in upload._files(mar, mar.parent).items()}
        )
    location = {"Bucket": cloud.bucket, "Key": f"models/bloom/{release}/model-store/bloom.mar"}
    older, newer = (client.create_multipart_upload(**location, ChecksumAlgorithm="SHA256") for _ in range(2))
    assert upload.upload(mar, cloud.uri).release == release
    left = client.list_multipart_uploads(Bucket=cloud.bucket).get("Uploads", [])
    assert len(left) == 1 and left[0]["UploadId"] in (older["UploadId"], newer["UploadId"])


def test_a_broken_upload_says_so_and_the_next_goes_on_where_it_stopped(cloud, mar, no_retries, monkeypatch):
    monkeypatch.setattr(upload, "WORKERS", 1)
    cloud.proxy.break_after = 3 * PART_BYTES
    with pytest.raises(UserError) as error:
        upload.upload(mar, cloud.uri)
    assert re.search("did not take it .*: run the same command again to go on where it stopped$", str(error.value))
    cloud.proxy.break_after = None
    assert not [name for name in objects(cloud) if name.endswith((".mar", ".properties"))]
    assert not any(release.whole for release in releases.releases(cloud.uri))
    summary = upload.upload(mar, cloud.uri)
    assert PART_BYTES < summary.bytes < mar.stat().st_size - PART_BYTES / 2
    there = of_release(cloud, summary.release)
    assert there["model-store/bloom.mar"] == mar.read_bytes()
    assert there.keys() == {"model-store/bloom.mar", *CONFIG} and len(objects(cloud)) == 3
    assert not upload.upload(mar, cloud.uri).sent


def test_with_a_release_goes_what_an_upload_of_it_that_broke_off_has_left(cloud, mar, no_retries, monkeypatch):
    monkeypatch.setattr(upload, "WORKERS", 1)
    cloud.proxy.break_after = 3 * PART_BYTES
    with pytest.raises(UserError):
        upload.upload(mar, cloud.uri)
    cloud.proxy.break_after = None
    with ThreadPoolExecutor(1) as pool:
        name = releases.release_name(
            {key: base.parts_of(path, pool) for key, path in upload._files(mar, mar.parent).items()}
        )
    with contextlib.nullcontext() if cloud.name != "azure" else pytest.raises(UserError, match="has no release"):
        releases.delete(cloud.uri, name)
    assert objects(cloud) == {}
    if cloud.name == "s3":
        import boto3

        assert not boto3.client("s3").list_multipart_uploads(Bucket=cloud.bucket).get("Uploads")


def test_another_file_does_not_go_on_with_what_was_begun(cloud, mar, no_retries, tmp_path):
    """Not even under the same key, which its release's name rules out."""

    def send(path):
        store, summary = open_store(cloud.uri), upload.Summary("")
        with ThreadPoolExecutor(1) as pool, upload.progress_bar([path], "bloom") as bar, upload.explained(store):
            upload._send(store, "model-store/bloom.mar", path, base.parts_of(path, pool), pool, bar, summary)

    cloud.proxy.break_after = 3 * PART_BYTES
    with pytest.raises(UserError):
        send(mar)
    cloud.proxy.break_after = None
    other = tmp_path / "bloom.mar"
    data = mar.read_bytes()
    other.write_bytes(data[:1000] + bytes(reversed(data[1000:1010])) + data[1010:])
    send(other)
    assert objects(cloud)["model-store/bloom.mar"] == other.read_bytes()


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
        ("PreconditionFailed", "an object of this release is there with other content"),
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
    assert not [*tmp_path.rglob("config.properties")]
    summary = upload.upload(mar, uri)
    assert summary.bytes < SIZE - PART_BYTES
    there = tmp_path / "there" / summary.release
    assert (there / "model-store/bloom.mar").read_bytes() == mar.read_bytes()
    assert all((there / name).is_file() for name in CONFIG)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 3
    assert (upload.upload(mar, uri).sent, upload.upload(mar, uri).skipped) == (0, 3)
    (there / "model-store/bloom.mar").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="is there with other content"):
        upload.upload(mar, uri)
    assert (there / "model-store/bloom.mar").read_bytes() == b"somebody's"
    releases.delete(uri, summary.release)
    assert not there.exists()


def test_pods_can_read_a_volume_whatever_the_umask_is(mar, tmp_path):
    before = os.umask(0o077)
    try:
        upload.upload(mar, f"file://{tmp_path}/volume/bloom")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "volume").rglob("*") if path.is_file()}
    folders = {path.stat().st_mode & 0o777 for path in (tmp_path / "volume", *(tmp_path / "volume").glob("**/"))}
    assert (modes, folders) == ({0o644}, {0o755})


def test_two_uploads_to_a_folder_at_once_share_no_file_that_is_written(tmp_path, monkeypatch):
    """Another one writes the same object before this one has renamed its own."""
    store, rename, written = FolderStore(tmp_path / "there"), Path.rename, []

    def overtaken(partial, target):
        written.append(partial)
        if len(written) == 1:
            store.put("key", b"data", None)
        assert partial.read_bytes() == b"data"
        return rename(partial, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    store.put("key", b"data", None)
    assert len(set(written)) == 2 and files(tmp_path / "there") == {"key": b"data"}
    with pytest.raises(FileExistsError):
        store.put("key", b"data", None)
    assert files(tmp_path / "there") == {"key": b"data"}


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
        ("https://a.blob.core.windows.net/container/path?sig=secret", r"path' and more: KServe wants"),
        ("file://relative/path", "write file:///an/absolute/path"),
        ("file:///tmp/a#b", r"without \? and #"),
        ("file:///tmp/a?b", r"without \? and #"),
        ("gs://bucket/bloom#2", r"without \? and #"),
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


def test_the_commands_say_what_they_did(mar, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "bloom.mar").symlink_to(mar)
    uri = f"file://{tmp_path}/there"
    command = [sys.executable, "-m", "scripts.upload", "--model-name", "bloom", "--model-store", store]
    first, second = (
        subprocess.run([*command, "--storage-uri", uri], capture_output=True, text=True, check=True) for _ in range(2)
    )
    release = releases.newest(store, "bloom", uri)
    said = f"release {release}, for KServe 0.13 or newer: make deploy takes it\n"
    assert first.stdout == f"{uri}: sent 3 files (0.02 GB), 0 were there already\n{said}"
    assert second.stdout == f"{uri}: sent 0 files (0.00 GB), 3 were there already\n{said}"
    wrong = subprocess.run([*command, "--storage-uri", "s3://bucket"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: STORAGE_URI is 's3://bucket'")


def test_releases_are_listed(mar, tmp_path, capsys):
    uri = f"file://{tmp_path}"
    release = upload.upload(mar, uri).release
    releases.main(["--storage-uri", uri])
    assert re.fullmatch(rf"{release}  \d{{4}}-\d\d-\d\d \d\d:\d\d  21\.\dMB\n", capsys.readouterr().out)
    (tmp_path / release / "config/config.properties").unlink()
    releases.main(["--storage-uri", uri])
    assert capsys.readouterr().out.endswith("  not whole: run make upload again to go on\n")
    with pytest.raises(UserError, match="is not the name of a release"):
        releases.main(["--storage-uri", uri, "--delete", ".."])


def test_with_the_last_release_its_folder_goes_and_no_other(mar, tmp_path):
    uri = f"file://{tmp_path}/mount/a model ä"
    release = upload.upload(mar, uri).release
    releases.delete(uri, release)
    assert [path.name for path in (tmp_path / "mount").rglob("*")] == ["a model ä"]


def test_the_uri_of_a_release():
    assert releases.release_uri("gs://bucket/bloom/", "0123456789abcdef") == "gs://bucket/bloom/0123456789abcdef/"
    for wrong in ("latest", "", "0123456789abcdef/", "0123456789ABCDEF"):
        with pytest.raises(UserError, match="is not the name of a release"):
            releases.release_uri("gs://bucket/bloom", wrong)


def test_without_an_upload_from_here_a_release_has_to_be_named(tmp_path):
    with pytest.raises(UserError, match="uploaded from here to s3://b/p: run make upload, or name"):
        releases.newest(tmp_path, "bloom", "s3://b/p")


@pytest.mark.parametrize(
    "uri, kserve, message",
    [
        ("https://a.blob.core.windows.net/container/path", "0.16.1", r"KServe 0\.16\.1 cannot fetch a large model"),
        ("https://a.blob.core.windows.net/container/path", "v0.9", "use KServe 0.17 or newer"),
        ("s3://bucket/path", "0.12.1", r"KServe 0\.12\.1 is too old: use 0\.13 or newer"),
        ("s3://bucket/path", "new", "write the cluster's version, such as 0.13"),
    ],
)
def test_a_kserve_that_could_not_fetch_it_is_refused(uri, kserve, message):
    with pytest.raises(UserError, match=message):
        check_kserve(uri, kserve)
    check_kserve(uri, "0.17")
    check_kserve(uri, "v1.2.3")
