"""file:///PATH: a folder of this machine."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from .base import CHANGED, UNFINISHED, Part, Stored, Upload


class FolderStore:
    """A folder, such as a volume that is mounted here."""

    def __init__(self, folder: Path):
        self._folder = folder

    def errors(self) -> tuple[type[Exception], ...]:
        return (OSError,)

    def explain(self, error: Exception) -> str:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left in {self._folder}: make room, then run the same command again to go on"
        if isinstance(error, FileExistsError):
            return CHANGED
        if isinstance(error, PermissionError):
            return f"no permission to write in {self._folder}: change its owner or mode, or choose another STORAGE_URI"
        return f"{error}: mend that, then run the same command again to go on"

    def matches(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        stored = self._folder / key
        if not stored.is_file() or stored.stat().st_size != path.stat().st_size:
            return False
        return all(part.is_in(stored) for part in parts)

    def objects(self, folder: str = "") -> dict[str, Stored]:
        found = [path for path in (self._folder / folder).rglob("*") if path.is_file()]
        return {
            path.relative_to(self._folder).as_posix(): Stored(
                path.stat().st_size, datetime.fromtimestamp(path.stat().st_mtime, UTC)
            )
            for path in found
        }

    def delete(self, key: str) -> None:
        path = self._folder / key
        path.unlink()
        with contextlib.suppress(OSError):  # of the folders below this one, the empty ones
            for parent in path.relative_to(self._folder).parents[:-1]:
                (self._folder / parent).rmdir()

    def put(self, key: str, data: bytes, part: Part) -> None:
        target = self._folder / key
        _make_folder(target.parent)
        # Of its own: another upload at the same time would empty what this one is about to rename.
        descriptor, name = tempfile.mkstemp(UNFINISHED, target.name, target.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            partial.write_bytes(data)
            _finish(partial, target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> Upload:
        return _FolderUpload(self._folder / key, parts)

    def abandon(self, folder: str) -> int:
        return 0  # what is unfinished is a file of the folder


def _make_folder(folder: Path) -> None:
    """With the folders above it. Pods read as another user, whatever the umask here is."""
    for missing in [path for path in reversed([folder, *folder.parents]) if not path.exists()]:
        missing.mkdir(exist_ok=True)
        _allow(missing, 0o755)


def _allow(path: Path, mode: int) -> None:
    with contextlib.suppress(PermissionError):  # of a file system that has modes of its own
        path.chmod(mode)


def _finish(partial: Path, target: Path) -> None:
    """Raises FileExistsError when there is such a file."""
    if target.exists():
        partial.unlink(missing_ok=True)
        raise FileExistsError(str(target))
    _allow(partial, 0o644)
    partial.rename(target)


class _FolderUpload:
    def __init__(self, target: Path, parts: Sequence[Part]):
        self._target, self._parts = target, parts
        _make_folder(target.parent)
        self._partial = target.with_name(f"{target.name}{UNFINISHED}")
        self._partial.touch()
        self.done = {part.number for part in parts if part.is_in(self._partial)}

    def put(self, part: Part, data: bytes) -> None:
        with self._partial.open("r+b") as file:
            file.seek(part.offset)
            file.write(data)

    def finish(self) -> None:
        os.truncate(self._partial, self._parts[-1].offset + self._parts[-1].size)
        _finish(self._partial, self._target)
