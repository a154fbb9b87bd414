"""Put an archive and its config.properties where KServe's storage initializer looks for them.

STORAGE_URI/model-store/NAME.mar (or the files of a no-archive folder), then STORAGE_URI/config/config.properties,
which names it. What is there already is not sent again, and an upload that broke off goes on where it stopped.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from scripts.console import UserError, run
from scripts.stores import UNFINISHED, WORKERS, Store, open_store, parts_of
from scripts.zip import files_in, progress_bar
from server.config_properties import cluster_properties

STORE, CONFIG = "model-store", "config/config.properties"


@dataclass
class Moved:
    """What an upload did: bytes sent, and objects that were sent, were there already, or are nobody's."""

    bytes: int = 0
    sent: int = 0
    kept: int = 0
    stale: tuple[str, ...] = ()


def upload(archive: Path, storage_uri: str, delete: bool = False) -> Moved:
    """Upload a .mar or a no-archive folder, and the config.properties that names it, in this order.

    delete: remove what else lies in model-store/ there, once all is uploaded; it is only named otherwise.
    Raises UserError, in one line, for credentials, bucket, permission, space or a connection that does not do.
    """
    store = open_store(storage_uri)
    moved = Moved()
    with _explained(store), ThreadPoolExecutor(WORKERS) as pool:
        files = _keys(archive)
        with progress_bar(list(files.values()), archive.name) as bar:
            for key, path in files.items():
                _send(store, key, path, pool, bar, moved)
            with tempfile.NamedTemporaryFile("w", suffix=".properties") as config:
                config.write(cluster_properties(archive))
                config.flush()
                _send(store, CONFIG, Path(config.name), pool, bar, moved)
        moved.stale = tuple(sorted({*store.keys(STORE), *store.keys(UNFINISHED)} - files.keys()))
        for key in moved.stale if delete else ():
            store.delete(key)
    return moved


def find_archive(model_store: Path, name: str) -> Path:
    """What `make archive` made. Raises UserError when there is nothing, or both a .mar and a folder."""
    found = [path for path in (model_store / f"{name}.mar", model_store / name) if path.exists()]
    if not found:
        raise UserError(f"{model_store} holds no {name}.mar: make it with make archive MODEL_NAME={name}")
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} are both there: remove the one that you do not want to upload")
    return found[0]


def _keys(archive: Path) -> dict[str, Path]:
    """Where each file goes. The links of a no-archive folder are followed."""
    if archive.is_file():
        return {f"{STORE}/{archive.name}": archive}
    paths = [path for entry in archive.iterdir() for path in (files_in(entry) if entry.is_dir() else [entry])]
    return {f"{STORE}/{archive.name}/{path.relative_to(archive).as_posix()}": path for path in sorted(paths)}


def _send(store: Store, key: str, path: Path, pool: ThreadPoolExecutor, bar: tqdm, moved: Moved) -> None:
    """Send one file unless it is there, its parts side by side."""
    parts = parts_of(path, pool)
    if store.holds(key, path, parts):
        moved.kept += 1
        bar.update(path.stat().st_size)
        return
    if len(parts) == 1:
        store.put(key, parts[0].read(path), parts[0])
        bar.update(parts[0].size)
        moved.bytes += parts[0].size
    else:
        started = store.begin(key, path, parts)
        missing = [part for part in parts if part.number not in started.done]
        bar.update(sum(part.size for part in parts if part.number in started.done))
        for part, _ in zip(missing, pool.map(lambda part: started.put(part, part.read(path)), missing), strict=True):
            bar.update(part.size)
            moved.bytes += part.size
        started.finish()
    moved.sent += 1


@contextmanager
def _explained(store: Store) -> Iterator[None]:
    try:
        yield
    except store.errors() as error:
        raise UserError(store.explain(error)) from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="upload", description=__doc__.splitlines()[0])
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--model-store", type=Path, default=Path("model_store"), help="where make archive put it")
    parser.add_argument(
        "--storage-uri",
        required=True,
        help="gs://BUCKET/PATH, s3://BUCKET/PATH, file:///PATH or https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH",
    )
    parser.add_argument("--delete", action="store_true", help="remove what else lies in model-store/ there")
    given = parser.parse_args(argv)
    moved = upload(find_archive(given.model_store, given.model_name), given.storage_uri, given.delete)
    print(f"{given.storage_uri}: sent {moved.sent} files ({moved.bytes / 1e9:.2f} GB), {moved.kept} were there already")
    if moved.stale:
        what = "removed" if given.delete else "also there, and every pod downloads it (DELETE=1 removes it)"
        print(f"{what}: {', '.join(moved.stale)}")


if __name__ == "__main__":
    sys.exit(run(main))
