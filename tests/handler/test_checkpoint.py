import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple

import pytest

from handler import checkpoint
from handler.checkpoint import find_root, open_checkpoint, unpack
from handler.errors import CheckpointError
from scripts.zip import zip_checkpoint


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(5_000_000))
    return folder


@pytest.fixture
def model_dir(tmp_path):
    """A folder as TorchServe makes one when it unpacks a .mar."""
    folder = tmp_path / "models" / ("0" * 31 + "f")
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def linked_dir(tmp_path):
    """A user's no-archive folder and the link through which TorchServe reaches it."""
    users = tmp_path / "store/bloom"
    users.mkdir(parents=True)
    link = tmp_path / "models" / ("0" * 31 + "e") / "bloom"
    link.parent.mkdir(parents=True)
    link.symlink_to(users)
    return link


def write_zip(path, entries, **options):
    with zipfile.ZipFile(path, "w", **options) as zipped:
        for name, content in entries:
            zipped.writestr(name, content)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "SHA256SUMS"}


def test_round_trip_frees_the_zip(source, model_dir):
    zip_checkpoint(source, model_dir / "model.zip")
    folder = open_checkpoint(model_dir)
    assert contents(folder) == contents(source)
    assert not (model_dir / "model.zip").exists()


def test_a_restart_finds_it_done(source, model_dir):
    zip_checkpoint(source, model_dir / "model.zip")
    folder = open_checkpoint(model_dir)
    before = (folder / "model.safetensors").stat()
    assert open_checkpoint(model_dir) == folder
    after = (folder / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_workers_that_start_together_unpack_once(source, model_dir, monkeypatch):
    zip_checkpoint(source, model_dir / "model.zip")
    calls = []
    monkeypatch.setattr(checkpoint, "unpack", lambda *given: (calls.append(given), unpack(*given)))
    found = []
    workers = [threading.Thread(target=lambda: found.append(open_checkpoint(model_dir))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(calls) == 1
    assert found == [model_dir / "model"] * 4


def test_a_killed_worker_leaves_nothing_that_the_next_would_take_for_whole(source, model_dir):
    zip_checkpoint(source, model_dir / "model.zip")
    die = (
        "import os, sys, pathlib; from handler import checkpoint;"
        "checkpoint._check_digests = lambda *_: os._exit(9);"
        "checkpoint.open_checkpoint(pathlib.Path(sys.argv[1]))"
    )
    assert subprocess.run([sys.executable, "-c", die, str(model_dir)]).returncode == 9
    assert (model_dir / "model.partial").is_dir() and not (model_dir / "model").exists()
    assert contents(open_checkpoint(model_dir)) == contents(source)
    assert not (model_dir / "model.partial").exists()


def test_a_users_zip_stays_and_nothing_is_written_beside_it(source, linked_dir):
    users = linked_dir.resolve()
    zip_checkpoint(source, users / "model.zip")
    folder = open_checkpoint(linked_dir)
    assert contents(folder) == contents(source)
    assert [path.name for path in users.iterdir()] == ["model.zip"]
    again = linked_dir.parents[1] / "other" / "bloom"  # TorchServe's link after a restart
    again.parent.mkdir()
    again.symlink_to(users)
    assert open_checkpoint(again) == folder


def test_a_users_folder_named_like_torchserves_own_is_a_users_all_the_same(source, tmp_path):
    users = tmp_path / "models" / ("a" * 32)
    users.mkdir(parents=True)
    zip_checkpoint(source, users / "model.zip")
    link = tmp_path / "tmp/models" / ("b" * 32) / "bloom"
    link.parent.mkdir(parents=True)
    link.symlink_to(users)
    open_checkpoint(link)
    assert (users / "model.zip").is_file()


def test_a_folder_is_used_where_it_lies(source, linked_dir):
    (linked_dir.resolve() / "model").symlink_to(source)
    folder = open_checkpoint(linked_dir)
    assert folder.resolve() == source
    assert contents(folder) == contents(source)


def test_the_samples_zip_with_its_deep_snapshot_folder(source, model_dir):
    deep = "model/models--bigscience-bloom-7b1/snapshots/5546055f/"
    with zipfile.ZipFile(model_dir / "model.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.mkdir(deep.rstrip("/"))
        for path in source.iterdir():
            zipped.write(path, deep + path.name)
    assert open_checkpoint(model_dir) == model_dir / "model" / deep.rstrip("/")


def test_neither_zip_nor_folder(model_dir):
    with pytest.raises(CheckpointError, match=r"model\.zip"):
        open_checkpoint(model_dir)


def test_no_config_and_two_configs(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_root(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    with pytest.raises(CheckpointError, match="several checkpoints"):
        find_root(tmp_path)


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "C:\\evil", "..\\evil"])
def test_names_that_lead_outside(tmp_path, name):
    info = zipfile.ZipInfo("x")
    info.filename = name
    archive = write_zip(tmp_path / "model.zip", [(info, b"evil")])
    with pytest.raises(CheckpointError, match="outside"):
        unpack(archive, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.zip"]


def test_links(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(CheckpointError, match="link"):
        unpack(write_zip(tmp_path / "model.zip", [(info, "/etc/passwd")]), tmp_path / "target")


def test_a_bomb_is_refused_before_a_byte_is_written(tmp_path):
    archive = write_zip(tmp_path / "model.zip", [("zeros", b"\0" * 50_000_000)], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="claims to unpack"):
        unpack(archive, tmp_path / "target")


def test_a_file_that_is_larger_than_it_declares(tmp_path):
    archive = write_zip(tmp_path / "model.zip", [("f", os.urandom(1000))])
    content = bytearray(archive.read_bytes())
    central = content.rindex(b"PK\1\2")
    content[central + 24 : central + 28] = (10).to_bytes(4, "little")  # the uncompressed size
    archive.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(archive, tmp_path / "target")


def test_the_same_name_twice(tmp_path):
    with pytest.warns(UserWarning):
        archive = write_zip(tmp_path / "model.zip", [("f", b"1"), ("f", b"2")])
    with pytest.raises(CheckpointError, match="twice"):
        unpack(archive, tmp_path / "target")


def test_no_space(tmp_path, source, monkeypatch):
    archive = zip_checkpoint(source, tmp_path / "model.zip")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 4_000_000))
    with pytest.raises(CheckpointError, match=r"0\.01 GB unpacked .* 0\.00 GB free"):
        unpack(archive, tmp_path / "target")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no zip at all"])
def test_damage_is_an_error_and_leaves_nothing(tmp_path, source, damage):
    archive = zip_checkpoint(source, tmp_path / "model.zip")
    content = bytearray(archive.read_bytes())
    if damage == "truncated":
        content = content[:3_000_000]
    elif damage == "flipped":
        content[2_000_000] ^= 1
    else:
        content = io.BytesIO(b"hello").getvalue()
    archive.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(archive, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.zip", "source"]


@pytest.mark.parametrize("manifest", ["0" * 64 + "  a\n", "{digest}  a\n{digest}  missing\n", "{digest}  other\n", ""])
def test_a_zip_that_does_not_match_its_manifest(tmp_path, manifest):
    digest = hashlib.sha256(b"content").hexdigest()
    entries = [("a", b"content"), ("SHA256SUMS", manifest.format(digest=digest))]
    with pytest.raises(CheckpointError, match="does not match its SHA256SUMS"):
        unpack(write_zip(tmp_path / "model.zip", entries), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_the_manifest_is_what_sha256sum_reads(tmp_path, source):
    unpack(zip_checkpoint(source, tmp_path / "model.zip"), tmp_path / "target")
    checked = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path / "target", capture_output=True)
    assert checked.returncode == 0, checked.stderr
