import subprocess
import sys
import threading
import zipfile

import pytest

from handler import checkpoint
from handler.checkpoint import find_root, open_checkpoint
from handler.errors import CheckpointError
from handler.weights.unpack import unpack
from scripts.zip import zip_checkpoint


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
    monkeypatch.setattr(checkpoint, "unpack", lambda *args: (calls.append(args), unpack(*args)))
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
        "import os, sys, pathlib; from handler import checkpoint; from handler.weights import unpack;"
        "unpack._check_digests = lambda *_: os._exit(9);"
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
