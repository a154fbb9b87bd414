"""Ranges of files into memory, as fast as the disk gives them."""

import errno
import logging
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import count
from pathlib import Path
from typing import NamedTuple

from .page_cache import cached_pages

logger = logging.getLogger(__name__)

ALIGNMENT = 4096  # bytes, which direct reads need of offsets, sizes and addresses
_PIECE = 4 << 20  # bytes of one read; larger ones gain nothing, smaller ones leave the disk idle between them
_CALIBRATION = 2.0  # seconds, for all methods together
_WORTH = 1.1  # how much faster a method has to be than one before it
# Of RWF_NOWAIT, by file systems and kernels; None by a Python that was built for a libc or a kernel without it.
_REFUSALS = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, None)


class ReadMethod(NamedTuple):
    """How to read. direct: past the page cache."""

    direct: bool
    threads: int

    def __str__(self) -> str:
        return f"{'direct' if self.direct else 'buffered'} reads, {self.threads} thread{'s' * (self.threads > 1)}"


# Direct reads first: they cost no copy and push nothing out of the page cache.
READ_METHODS = (
    ReadMethod(True, 2),
    ReadMethod(True, 1),
    ReadMethod(True, 4),
    ReadMethod(False, 1),
    ReadMethod(False, 2),
    ReadMethod(False, 4),
)


@dataclass(frozen=True)
class Range:
    """Bytes of a file."""

    path: Path
    start: int
    size: int

    @property
    def aligned_start(self) -> int:
        return self.start - self.start % ALIGNMENT

    @property
    def aligned_size(self) -> int:
        """Size of the whole blocks of the file around the range."""
        return -(-(self.start + self.size) // ALIGNMENT) * ALIGNMENT - self.aligned_start

    @property
    def buffer_size(self) -> int:
        """Room for those blocks wherever a range of this size begins, so that buffers can be used again."""
        return (-(-self.size // ALIGNMENT) + 1) * ALIGNMENT

    @property
    def pieces(self) -> "list[Piece]":
        """What is read at once, of whole blocks, one behind the other."""
        needed, size = self.start + self.size - self.aligned_start, self.aligned_size
        return [
            Piece(
                path=self.path,
                start=self.aligned_start + at,
                size=min(size - at, _PIECE),
                needed=min(needed - at, _PIECE),
                following=max(0, min(size - at - _PIECE, _PIECE)),
            )
            for at in range(0, size, _PIECE)
        ]


class Piece(NamedTuple):
    """Blocks of a file. needed: bytes of them that have to be there. following: bytes behind them that come next."""

    path: Path
    start: int
    size: int
    needed: int
    following: int


class Reader:
    """Reads with a pool of threads.

    bytes_read: how many so far, whole blocks, from the page cache too.
    kept: what is left in the page cache.
    bytes_lost: how many of it so far were there and were not when they were read again.
    tells_what_is_cached: whether file system and Python can tell that; they are asked when something is read again.
    """

    def __init__(self, method: ReadMethod):
        self.method = method
        self.bytes_read = self.bytes_lost = 0
        self.kept: set[Piece] = set()
        self._kept_starts: set[tuple[Path, int]] = set()
        self._cached: set[Piece] = set()  # of these, what has been read
        self.tells_what_is_cached = True
        self._pool = ThreadPoolExecutor(method.threads, thread_name_prefix="weights")
        self._files: dict[tuple[Path, bool], FileIO] = {}  # by path, and whether it is open for direct reads

    def start(self, source: Range, buffer: memoryview, drop: bool = True) -> list[Future]:
        """Begin to read the blocks around `source` into `buffer`, at least `aligned_size` bytes at an aligned address.

        drop: let go of them in the page cache if they are not among those to be kept there.
        Each future raises OSError when the file cannot be read, or ends too early.
        """
        return [
            self._pool.submit(self._read, piece, buffer[piece.start - source.aligned_start :][: piece.size], drop)
            for piece in source.pieces
        ]

    def keep(self, pieces: set[Piece]) -> None:
        """From now on leave these, and no others, in the page cache, and look for them there, whatever the method."""
        dropped, self.kept = self.kept - pieces, pieces
        self._kept_starts = {(piece.path, piece.start) for piece in pieces}
        for piece in dropped:
            self._pool.submit(self._drop, piece)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.clear()

    def _read(self, piece: Piece, buffer: memoryview, drop: bool = True) -> None:
        path, start, size, needed, following = piece
        keeps, done, direct = piece in self.kept, 0, self.method.direct
        try:
            if keeps and piece in self._cached and not self._is_cached(piece):
                keeps = False  # not into the page cache again: it would push out what is read next, and so on
                self._cached.discard(piece)
                self.bytes_lost += size
            direct = direct and not keeps
            file = self._file(path, direct)
            if not self.method.direct and following and (path, start + size) not in self._kept_starts:
                os.posix_fadvise(file.fileno(), start + size, following, os.POSIX_FADV_WILLNEED)
            while done < needed:
                got = os.preadv(file.fileno(), [buffer[done:]], start + done)
                if done + got < needed:
                    got -= got % ALIGNMENT  # a direct read can only go on from the start of a block
                if not got:
                    raise OSError(f"{path.name} ends too early, or was cut while it was read")
                done += got
            if keeps and piece in self.kept:
                self._cached.add(piece)
            elif drop and not direct:  # or whoever asked for it to be dropped meanwhile came too early
                self._drop(piece)
        except OSError:
            self._files.pop((path, direct), None)  # the next try opens it anew, which a network's file system may need
            raise
        self.bytes_read += done

    def _is_cached(self, piece: Piece) -> bool:
        """By its second block: the kernel takes pages back in the order in which they were read, and of the first a
        tensor before it may have a part, and let go of it. True where nobody can tell."""
        try:
            file, at = self._file(piece.path, direct=False), piece.start + min(ALIGNMENT, piece.needed - 1)
            if (pages := cached_pages(file.fileno(), at, 1)) is not None:
                return pages > 0
            return os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except (OSError, AttributeError, NotImplementedError) as error:
            self.tells_what_is_cached &= getattr(error, "errno", None) not in _REFUSALS
            return True  # whatever else is wrong, the read itself finds out

    def _drop(self, piece: Piece) -> None:
        """Out of the page cache with it."""
        self._cached.discard(piece)
        file = self._file(piece.path, direct=False)
        os.posix_fadvise(file.fileno(), piece.start, piece.size, os.POSIX_FADV_DONTNEED)

    def _file(self, path: Path, direct: bool) -> FileIO:
        file = self._files.get((path, direct))
        if file is None:
            flags = os.O_DIRECT if direct else 0
            file = FileIO(path, opener=lambda name, mode: os.open(name, mode | flags))
            if not direct:  # the kernel would read on behind a tensor, megabytes of what is in memory already
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            self._files[path, direct] = file
        return file


def fastest_reader(ranges: Sequence[Range], seconds: float = _CALIBRATION) -> tuple[Reader, float]:
    """A reader by the method that is fastest on the disk of `ranges`; all are tried on them, for `seconds` together.

    Also returns the bytes a second that it reached. Methods that the file system refuses are left out.
    Raises OSError when none can read them.
    """
    best: ReadMethod | None = None
    best_rate, problem = 0.0, OSError()
    pieces = [piece for r in ranges for piece in r.pieces]
    for path in {r.path for r in ranges}:
        with path.open("rb") as file:  # the disk is to be measured, not what is in memory of a file just written
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for number, method in enumerate(READ_METHODS):
        # Each method begins elsewhere, so that none finds in a cache what another has read.
        first = len(pieces) * number // len(READ_METHODS)
        try:
            rate = _rate(method, pieces[first:] + pieces[:first], seconds / len(READ_METHODS))
        except OSError as error:
            problem = error
            continue
        logger.debug("%s: %.2f GB/s", method, rate / 1e9)
        if best is None or rate > best_rate * _WORTH:
            best, best_rate = method, rate
    if best is None:
        raise problem
    return Reader(best), best_rate


def _rate(method: ReadMethod, pieces: Sequence[Piece], seconds: float) -> float:
    """Bytes a second that the threads of a method read of the pieces, until time or pieces are over; of the first at
    least, however late the threads come to it."""
    reader, turns = Reader(method), count()
    start = time.perf_counter()

    def work() -> None:
        buffer = memoryview(mmap.mmap(-1, _PIECE))
        while (turn := next(turns)) < len(pieces) and (not turn or time.perf_counter() < start + seconds):
            reader._read(pieces[turn], buffer[: pieces[turn].size])

    workers = [reader._pool.submit(work) for _ in range(method.threads)]
    try:
        for worker in workers:
            worker.result()
        return reader.bytes_read / (time.perf_counter() - start)
    finally:
        reader.close()
