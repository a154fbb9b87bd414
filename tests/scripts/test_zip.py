import zipfile

import pytest

from scripts.console import UserError
from scripts.zip import main, zip_checkpoint


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(b"\0" * 100_000)
    (folder / "sub/more").write_text("more")
    (folder / ".cache/junk").write_text("junk")
    return folder


def test_weights_are_stored_and_hidden_files_left_out(folder, tmp_path):
    with zipfile.ZipFile(zip_checkpoint(folder, tmp_path / "out/model.zip")) as zipped:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in zipped.infolist())
        assert sorted(zipped.namelist()) == ["SHA256SUMS", "config.json", "sub/more", "weights.safetensors"]


def test_a_failed_run_leaves_the_old_zip(folder, tmp_path, monkeypatch):
    archive = zip_checkpoint(folder, tmp_path / "model.zip")
    before = archive.read_bytes()
    monkeypatch.setattr("scripts.zip._chunks", lambda path: (_ for _ in ()).throw(OSError("unreadable")))
    with pytest.raises(OSError, match="unreadable"):
        zip_checkpoint(folder, archive)
    assert archive.read_bytes() == before
    assert not (tmp_path / "model.zip.partial").exists()


def test_what_cannot_be_packed(folder, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        zip_checkpoint(tmp_path / "nothing", tmp_path / "model.zip")
    with pytest.raises(UserError, match="inside"):
        zip_checkpoint(folder, folder / "model.zip")


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--model-dir" in capsys.readouterr().out
