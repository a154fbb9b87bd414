"""model.zip -> a verified folder of shards, once, whatever the number of workers and restarts."""

import hashlib
import json
import logging
import re
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from filelock import FileLock

from handler.errors import CheckpointError

logger = logging.getLogger(__name__)

# Where transformers looks for weights in a folder; the first one that is there wins.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MANIFEST = "SHA256SUMS"  # at the zip's root, as `sha256sum` writes it
MAX_ENTRIES = 100_000
# Weights hardly compress; a whole archive of them that claims to grow a hundredfold is a bomb.
MAX_RATIO = 100
BUFFER = 4 * 2**20  # bytes


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


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip into the new folder `target`: all of it, checked, or nothing.

    Every byte is checked against the zip's CRCs and, where the zip has one, against its SHA256SUMS.

    Raises CheckpointError for a zip that is damaged, unsafe, a bomb, or larger than the free disk space.
    """
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a worker that was killed
    try:
        with zipfile.ZipFile(archive) as zipped:
            entries = [entry for entry in zipped.infolist() if not entry.is_dir()]
            _check_entries(archive, entries)
            partial.mkdir(parents=True)
            _check_space(archive, sum(entry.file_size for entry in entries), partial)
            digests = {entry.filename: _extract(zipped, entry, partial) for entry in entries}
        _check_digests(archive, partial / MANIFEST, digests)
        partial.rename(target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError) as error:
        what = f"{archive.name} cannot be unpacked: {error}"
        hint = "; it is cut off or damaged: pack or copy it again" if not isinstance(error, OSError) else ""
        raise CheckpointError(what + hint) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def weight_files(folder: Path) -> list[Path]:
    """The files in a checkpoint folder that transformers would load the weights from, in the index's order of names.

    Raises CheckpointError when there are none, or one that the index names is missing.
    """
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise CheckpointError(f"{folder} holds no weights ({', '.join(WEIGHTS)}): download the checkpoint again")
    if first.suffix != ".json":
        return [first]
    try:
        names = sorted(set(json.loads(first.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{first} is not an index of shards: download it again") from None
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{first} names {file.name}, which is not beside it: download it again")
    return files


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


def _check_entries(archive: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if len(names) > MAX_ENTRIES:
        raise CheckpointError(f"{archive.name} has {len(names)} files; at most {MAX_ENTRIES} are unpacked")
    if len(set(names)) != len(names):
        raise CheckpointError(f"{archive.name} holds the same name twice: pack it again")
    for entry in entries:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise CheckpointError(f"{archive.name} would write outside its folder: {entry.filename!r}")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise CheckpointError(f"{archive.name} holds a link, {entry.filename!r}: pack files (zip without -y)")
        if entry.flag_bits & 1:
            raise CheckpointError(f"{archive.name} is encrypted: pack it without a password")
    declared, packed = sum(entry.file_size for entry in entries), archive.stat().st_size
    if declared > MAX_RATIO * packed:
        raise CheckpointError(f"{archive.name} has {packed} bytes and claims to unpack to {declared}: refused")


def _check_space(archive: Path, needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{archive.name} needs {needed / 1e9:.2f} GB unpacked and {folder.parent} has {free / 1e9:.2f} GB free"
        )


def _extract(zipped: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> str:
    """Write one file below `folder`, a buffer at a time; its SHA-256. zipfile stops at the declared size."""
    target = folder / entry.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with zipped.open(entry) as source, target.open("wb") as sink:
        while chunk := source.read(BUFFER):
            digest.update(chunk)
            sink.write(chunk)
    return digest.hexdigest()


def _check_digests(archive: Path, manifest: Path, digests: dict[str, str]) -> None:
    if not manifest.is_file():
        logger.info("%s has no %s: its CRCs alone were checked", archive.name, MANIFEST)
        return
    expected = {}
    for line in manifest.read_text().splitlines():
        digest, _, name = line.partition("  ")
        expected[name] = digest
    found = {name: digest for name, digest in digests.items() if name != MANIFEST}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(f"{archive.name} does not match its {MANIFEST} ({', '.join(wrong[:5])}): pack it again")
