import hashlib
import io
import os
import shutil
import stat
import subprocess
import zipfile
from collections import namedtuple

import pytest

from handler.errors import CheckpointError
from handler.weights.unpack import unpack
from scripts.zip import zip_checkpoint


def write_zip(path, entries, **options):
    with zipfile.ZipFile(path, "w", **options) as zipped:
        for name, content in entries:
            zipped.writestr(name, content)
    return path


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
