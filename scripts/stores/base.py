"""What the stores share: the parts of a file, their checksums, and what a store has to be able to do."""

import base64
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from handler.errors import first_line

PART_BYTES = 32 * 2**20
MAX_PARTS = 9000  # S3 takes 10,000 parts of an object, Azure 50,000
WORKERS = 4
RETRIES = 4  # of a request after an error of the connection or the server; each waits twice as long as the one before
METADATA_KEY = "fingerprint"  # where stores without a usable checksum of their own keep ours, in the object's metadata
CHANGED = (
    "an object of this release is there with other content, which somebody has changed: remove the release with "
    "make releases DELETE=RELEASE and upload it again"
)
UNFINISHED = ".uploading"  # folder for parts, in the stores that have no place of their own for them


@dataclass(frozen=True)
class Part:
    """Bytes `offset` to `offset + size` of a file, counted from number 1, and their SHA-256."""

    number: int
    offset: int
    size: int
    sha256: bytes

    @property
    def digest(self) -> str:
        """The SHA-256 in base64, as HTTP headers have it."""
        return base64.b64encode(self.sha256).decode()

    def read(self, path: Path) -> bytes:
        """These bytes of a file."""
        with path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def is_in(self, path: Path) -> bool:
        """Whether a file has these bytes at this offset."""
        return hashlib.sha256(self.read(path)).digest() == self.sha256


def parts_of(path: Path, pool: ThreadPoolExecutor) -> list[Part]:
    """The parts of a file; an empty file is one empty part."""
    size = path.stat().st_size
    step = max(PART_BYTES, -(-size // MAX_PARTS))

    def part(number: int) -> Part:
        offset = (number - 1) * step
        unhashed = Part(number, offset, min(step, size - offset), b"")
        return Part(number, offset, unhashed.size, hashlib.sha256(unhashed.read(path)).digest())

    return list(pool.map(part, range(1, max(1, -(-size // step)) + 1)))


@dataclass(frozen=True)
class Stored:
    """An object as a store lists it: bytes, and when it was written."""

    size: int
    modified: datetime


def fingerprint(parts: Sequence[Part]) -> str:
    """A checksum of the whole file: the SHA-256 of its only part, or that of all parts' SHA-256s, with their number.

    S3 makes the composite checksum of a multipart upload in this way.
    """
    if len(parts) == 1:
        return parts[0].digest
    together = hashlib.sha256(b"".join(part.sha256 for part in parts)).digest()
    return f"{base64.b64encode(together).decode()}-{len(parts)}"


class Store(Protocol):
    """Objects under the prefix of one storage URI. Keys are relative to it. Methods raise the client's own errors.

    An object is never written over: to write one that is there is an error of the client.
    """

    def errors(self) -> tuple[type[Exception], ...]:
        """The exceptions that `explain` can put in words."""

    def explain(self, error: Exception) -> str:
        """One line: whether credentials, bucket, permission, space or connection are to blame, and what to do."""

    def matches(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        """Whether the object is there and has the content of the file `path`."""

    def objects(self, folder: str = "") -> dict[str, Stored]:
        """All objects in a folder and its sub-folders, by key."""

    def delete(self, key: str) -> None: ...

    def abandon(self, folder: str) -> int:
        """End the unfinished uploads of a folder's objects that are no objects themselves; how many there were."""

    def put(self, key: str, data: bytes, part: Part) -> None:
        """Write an object of one part."""

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> "Upload":
        """Go on with the unfinished upload of an object of several parts, or begin one."""


class Upload(Protocol):
    done: set[int]  # numbers of the parts that are there already

    def put(self, part: Part, data: bytes) -> None: ...

    def finish(self) -> None:
        """Make the object of its parts."""


def interrupted(store: str, error: Exception) -> str:
    """What to say of an error that is none of credentials, bucket, permission or space."""
    return f"{store} did not take it ({first_line(error)}): run the same command again to go on where it stopped"
