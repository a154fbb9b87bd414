"""file:///PATH: a folder of this machine."""

import contextlib
import errno
import os
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
        partial = _partial(target)
        partial.write_bytes(data)
        _finish(partial, target)

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> Upload:
        return _FolderUpload(self._folder / key, parts)


def _partial(target: Path) -> Path:
    """The file to write until it is whole; its folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f"{target.name}{UNFINISHED}")


def _finish(partial: Path, target: Path) -> None:
    """Raises FileExistsError when there is such a file."""
    if target.exists():
        raise FileExistsError(str(target))
    partial.rename(target)


class _FolderUpload:
    def __init__(self, target: Path, parts: Sequence[Part]):
        self._target, self._parts = target, parts
        self._partial = _partial(target)
        self._partial.touch()
        self.done = {part.number for part in parts if part.is_in(self._partial)}

    def put(self, part: Part, data: bytes) -> None:
        with self._partial.open("r+b") as file:
            file.seek(part.offset)
            file.write(data)

    def finish(self) -> None:
        os.truncate(self._partial, self._parts[-1].offset + self._parts[-1].size)
        _finish(self._partial, self._target)
