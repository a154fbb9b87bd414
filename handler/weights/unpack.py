"""model.zip -> a folder of shards: all of it, checked, or nothing."""

import hashlib
import logging
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from handler.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "SHA256SUMS"  # at the zip's root, as `sha256sum` writes it
MAX_ENTRIES = 100_000
# Weights hardly compress; a whole archive of them that claims to grow a hundredfold is a bomb.
MAX_RATIO = 100
BUFFER = 4 * 2**20  # bytes


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
