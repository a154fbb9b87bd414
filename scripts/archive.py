"""Build what TorchServe loads, model_store/NAME.mar or a folder, with torch-model-archiver.

torch-model-archiver copies everything into a temporary folder first. It is given the code and the settings alone;
the weights, which are the gigabytes, are then put into its archive directly.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import yaml

from handler.settings import read_settings
from scripts.console import UserError, run
from scripts.zip import add_file, files_in, progress_bar

ROOT = Path(__file__).parents[1]
FORMATS = ("zip-store", "no-archive")
# The time that a worker gets to become READY: to import, and to read weights as slowly as from a network volume.
STARTUP_SECONDS, STARTUP_BYTES_PER_SECOND = 300, 20_000_000


def archive(
    name: str,
    weights: Path,
    model_store: Path,
    setup_config: Path = ROOT / "setup_config.json",
    model_config: Path = ROOT / "model-config.yaml",
    archive_format: str = "zip-store",
    draft_model: Path | None = None,
) -> Path:
    """Write `model_store/NAME.mar` (zip-store) or the folder `model_store/NAME` (no-archive); its path.

    weights: a model.zip, or the folder of a checkpoint. In a no-archive folder they are linked, not copied.
    draft_model: the folder of a small checkpoint with the same tokenizer, which becomes `draft_model/`.
    Raises UserError for weights that are not there and SettingsError for a setup_config.json that cannot be used.
    """
    if not weights.exists():
        raise UserError(f"{weights} does not exist: give a model.zip (make zip) or a checkpoint folder")
    if weights.is_file() and not zipfile.is_zipfile(weights):
        raise UserError(f"{weights} is not a whole zip file: pack it again with make zip")
    if draft_model and not (draft_model / "config.json").is_file():
        raise UserError(f"{draft_model} holds no config.json: give DRAFT_MODEL the folder of a Hugging Face checkpoint")
    read_settings(setup_config)
    model_store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model_store, prefix=".archive-") as scratch:
        size = sum(path.stat().st_size for folder in (weights, draft_model) if folder for path in _weight_files(folder))
        target = _archive_code(name, size, setup_config, model_config, archive_format, Path(scratch))
        if archive_format == "no-archive":
            link = target / ("model" if weights.is_dir() else "model.zip")
            link.symlink_to(weights.resolve())
            if draft_model:
                (target / "draft_model").symlink_to(draft_model.resolve())
        else:
            _add_weights(target, weights, draft_model)
        return _move_into_place(target, model_store / target.name)


def _archive_code(
    name: str, weight_bytes: int, setup_config: Path, model_config: Path, archive_format: str, scratch: Path
) -> Path:
    """Run torch-model-archiver on everything but the weights; the path of its archive, inside `scratch`."""
    stage = scratch / "stage"
    shutil.copytree(ROOT / "handler", stage / "handler", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(setup_config, stage / "setup_config.json")
    config = scratch / "model-config.yaml"
    config.write_text(_with_startup_timeout(model_config.read_text(), weight_bytes))
    export, temporary = scratch / "export", scratch / "tmp"
    export.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name, "--version", "1.0"]
    command += ["--handler", str(ROOT / "handler/service.py"), "--extra-files", str(stage)]
    command += ["--config-file", str(config), "--archive-format", archive_format, "--export-path", str(export)]
    finished = subprocess.run(command, env={**os.environ, "TMPDIR": str(temporary)}, capture_output=True, text=True)
    if finished.returncode:
        raise UserError(f"torch-model-archiver: {finished.stderr.strip().splitlines()[-1]}")
    return next(export.iterdir())


def _with_startup_timeout(model_config: str, weight_bytes: int) -> str:
    """model-config.yaml with a startupTimeout that so many bytes of weights, a draft model's too, can be unpacked and
    loaded in, unless it has its own.

    TorchServe's default of 120 s would kill a worker that is still unpacking a large checkpoint.
    """
    if "startupTimeout" in yaml.safe_load(model_config):
        return model_config
    return f"{model_config.rstrip()}\nstartupTimeout: {startup_seconds(weight_bytes)}\n"


def startup_seconds(weight_bytes: int) -> int:
    """Seconds that a worker gets to unpack and load so many bytes of weights."""
    return STARTUP_SECONDS + weight_bytes // STARTUP_BYTES_PER_SECOND


def _weight_files(weights: Path) -> list[Path]:
    return [weights] if weights.is_file() else files_in(weights)


def _add_weights(mar: Path, weights: Path, draft_model: Path | None) -> None:
    folders = {"model": weights, "draft_model": draft_model}
    names = {
        path: Path(name) / path.relative_to(folder)
        for name, folder in folders.items()
        if folder and folder.is_dir()
        for path in files_in(folder)
    }
    if weights.is_file():
        names[weights] = Path("model.zip")
    with zipfile.ZipFile(mar, "a", zipfile.ZIP_STORED) as zipped, progress_bar(list(names), mar.name) as bar:
        for path, name in names.items():
            add_file(zipped, path, name, bar)


def _move_into_place(path: Path, target: Path) -> Path:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)  # removes the link to the weights, not the weights
    return path.replace(target)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="archive", description=__doc__.splitlines()[0])
    parser.add_argument("--model-name", required=True, help="the M of /v1/models/M:predict")
    parser.add_argument("--weights", type=Path, required=True, help="a model.zip or a checkpoint folder")
    parser.add_argument("--draft-model", type=Path, help="a small checkpoint with the same tokenizer, to guess tokens")
    parser.add_argument("--setup-config", type=Path, default=ROOT / "setup_config.json")
    parser.add_argument("--model-config", type=Path, default=ROOT / "model-config.yaml")
    parser.add_argument("--archive-format", choices=FORMATS, default="zip-store")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"))
    args = parser.parse_args(argv)
    path = archive(
        args.model_name,
        args.weights,
        args.model_store,
        args.setup_config,
        args.model_config,
        args.archive_format,
        args.draft_model,
    )
    size = f"{path.stat().st_size / 1e9:.2f} GB" if path.is_file() else f"a folder, with {args.weights} linked"
    print(f"{path}: {size}")


if __name__ == "__main__":
    sys.exit(run(main))
