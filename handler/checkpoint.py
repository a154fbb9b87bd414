"""model.zip -> a verified folder of shards, once, whatever the number of workers and restarts."""

import hashlib
import re
import tempfile
from pathlib import Path

from filelock import FileLock

from handler.errors import CheckpointError
from handler.weights.unpack import unpack


def open_checkpoint(model_dir: Path) -> Path:
    """The folder of `config.json`, weights and tokenizer below TorchServe's `model_dir`.

    A folder `model/` is used where it lies. Otherwise `model.zip` is unpacked, and the zip that TorchServe put
    into its own work folder is removed, since the shards are the same bytes again.

    Raises CheckpointError when there is neither, or the zip is damaged, unsafe or too large for the disk.
    """
    folder = model_dir / "model"
    if not folder.is_dir():
        archive = model_dir / "model.zip"
        folder = _unpacked_folder(model_dir, archive)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                _require_archive(archive)
                unpack(archive, folder)
            if is_unpacked_copy(model_dir):
                archive.unlink(missing_ok=True)
    return find_root(folder)


def open_draft(model_dir: Path) -> Path | None:
    """The checkpoint of the draft model in the folder `draft_model/`, if there is one."""
    folder = model_dir / "draft_model"
    return find_root(folder) if folder.is_dir() else None


def find_root(folder: Path) -> Path:
    """The folder nearest to the top of `folder` that holds a config.json: the sample's zip stores
    `model/models--…/snapshots/HASH/…`. Raises CheckpointError when there is none, or several equally near."""
    found = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    nearest = [path.parent for path in found if len(path.parts) == len(found[0].parts)]
    if not nearest:
        raise CheckpointError(f"{folder} holds no config.json: pack a Hugging Face checkpoint folder")
    if len(nearest) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in nearest)
        raise CheckpointError(f"{folder} holds several checkpoints ({names}): pack one")
    return nearest[0]


def is_unpacked_copy(model_dir: Path) -> bool:
    """Whether TorchServe unpacked this folder from a .mar, so that it is ours to change. A no-archive model is a
    user's folder: TorchServe reaches it through a link that bears the model's name, not a number."""
    unpacked = model_dir.parent.name == "models" and re.fullmatch("[0-9a-f]{32}", model_dir.name)
    return bool(unpacked) and not model_dir.is_symlink()


def work_folder(model_dir: Path) -> Path:
    """Where we may write: TorchServe's copy of the model, or its folder of models; never a user's folder, which can
    be read-only and shared."""
    if is_unpacked_copy(model_dir):
        return model_dir
    return model_dir.parents[1] if model_dir.is_symlink() else Path(tempfile.gettempdir())


def _unpacked_folder(model_dir: Path, archive: Path) -> Path:
    """Where the zip is unpacked. Outside TorchServe's copy the name tells the archive, so that a restarted
    TorchServe, which makes a new link, finds the work done."""
    if is_unpacked_copy(model_dir):
        return model_dir / "model"
    _require_archive(archive)
    status = archive.stat()
    identity = f"{archive.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    return work_folder(model_dir) / f"checkpoint-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _require_archive(archive: Path) -> None:
    if not archive.is_file():
        raise CheckpointError(f"{archive.parent} holds neither model.zip nor a folder model/: archive one of them")
