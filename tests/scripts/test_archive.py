import json
import zipfile

import pytest
import yaml

from handler.errors import SettingsError
from scripts.archive import archive, main
from scripts.console import UserError
from scripts.zip import zip_checkpoint


def test_a_mar_holds_the_package_and_the_zip_uncompressed(bloom, tmp_path):
    zipped = zip_checkpoint(bloom, tmp_path / "model.zip")
    mar = archive("bloom", zipped, tmp_path / "store")
    assert mar == tmp_path / "store/bloom.mar"
    with zipfile.ZipFile(mar) as packed:
        names = packed.namelist()
        assert {"handler/settings.py", "handler/engine/engine.py", "setup_config.json", "model.zip"} <= set(names)
        assert not any("__pycache__" in name for name in names)
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in packed.infolist())
        assert packed.read("model.zip") == zipped.read_bytes()
        manifest = json.loads(packed.read("MAR-INF/MANIFEST.json"))
    assert manifest["model"]["handler"] == "service.py"
    assert manifest["model"]["configFile"] == "model-config.yaml"
    assert list((tmp_path / "store").iterdir()) == [mar]


def test_a_mar_with_a_folder_instead_of_a_zip(bloom, tmp_path):
    with zipfile.ZipFile(archive("bloom", bloom, tmp_path / "store")) as packed:
        assert packed.read("model/config.json") == (bloom / "config.json").read_bytes()
        assert "model.zip" not in packed.namelist()


def test_a_folder_links_the_weights_and_making_it_again_leaves_them(bloom, tmp_path):
    for _ in range(2):
        made = archive("bloom", bloom, tmp_path / "store", archive_format="no-archive")
    assert made == tmp_path / "store/bloom"
    assert (made / "handler/engine/engine.py").is_file() and (made / "MAR-INF/MANIFEST.json").is_file()
    assert (made / "model").is_symlink() and (made / "model").resolve() == bloom
    assert (bloom / "config.json").is_file()


@pytest.mark.parametrize("archive_format", ["zip-store", "no-archive"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_draft_model_travels_beside(bloom, draft_bloom, tmp_path, zipped, archive_format):
    weights = zip_checkpoint(bloom, tmp_path / "model.zip") if zipped else bloom
    made = archive("bloom", weights, tmp_path / "store", archive_format=archive_format, draft_model=draft_bloom)
    if archive_format == "no-archive":
        assert (made / "draft_model").resolve() == draft_bloom
        return
    with zipfile.ZipFile(made) as packed:
        assert packed.read("draft_model/config.json") == (draft_bloom / "config.json").read_bytes()
        assert ("model.zip" in packed.namelist()) == zipped != ("model/config.json" in packed.namelist())


@pytest.mark.parametrize("own, seconds", [("", 300 + 5), ("startupTimeout: 60\n", 60)])
def test_the_start_may_take_as_long_as_all_weights_need(bloom, tmp_path, own, seconds):
    draft, config = tmp_path / "draft", tmp_path / "model-config.yaml"
    draft.mkdir()
    (draft / "config.json").write_text("{}")
    with (draft / "model.safetensors").open("wb") as file:
        file.truncate(100_000_000)  # a hole
    config.write_text(f"batchSize: 4\n{own}")
    made = archive(
        "bloom", bloom, tmp_path / "store", model_config=config, archive_format="no-archive", draft_model=draft
    )
    assert yaml.safe_load((made / "model-config.yaml").read_text()) == {"batchSize": 4, "startupTimeout": seconds}


def test_a_draft_model_that_is_none(bloom, tmp_path):
    with pytest.raises(UserError, match="give DRAFT_MODEL the folder"):
        archive("bloom", bloom, tmp_path / "store", draft_model=tmp_path)


def test_a_setting_that_would_fail_the_load_fails_here(bloom, tmp_path):
    setup = tmp_path / "setup_config.json"
    setup.write_text('{"max_memory": {"cpu": "lots"}}')
    with pytest.raises(SettingsError, match="lots"):
        archive("bloom", bloom, tmp_path / "store", setup)


def test_weights_that_are_not_there_or_no_zip(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        archive("bloom", tmp_path / "model.zip", tmp_path / "store")
    (tmp_path / "model.zip").write_text("cut off")
    with pytest.raises(UserError, match="not a whole zip"):
        archive("bloom", tmp_path / "model.zip", tmp_path / "store")


def test_a_name_that_torch_model_archiver_refuses(bloom, tmp_path):
    with pytest.raises(UserError, match=r"special characters|regular expression|model name"):
        archive("bloom 7b", bloom, tmp_path / "store")


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "no-archive" in capsys.readouterr().out
