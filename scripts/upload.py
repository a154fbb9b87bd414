"""Put an archive and its config.properties where KServe's storage initializer looks for them.

STORAGE_URI/model-store/NAME.mar (or the files of a no-archive folder), then STORAGE_URI/config/metrics.yaml and
STORAGE_URI/config/config.properties, which names both. What is there already is not sent again, and an upload that
broke off goes on where it stopped.
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
from scripts.stores import open_store
from scripts.stores.base import UNFINISHED, WORKERS, Store, parts_of
from scripts.zip import files_in, progress_bar
from server.config_properties import METRICS, cluster_properties

STORE, CONFIG = "model-store", "config/config.properties"
METRICS_CONFIG = "config/metrics.yaml"


@dataclass
class Summary:
    """What an upload did."""

    bytes: int = 0  # sent
    sent: int = 0  # objects
    skipped: int = 0  # objects that were there already
    stale: tuple[str, ...] = ()  # keys of objects that do not belong to the archive


def upload(archive: Path, storage_uri: str, delete: bool = False) -> Summary:
    """Upload a .mar or a no-archive folder, and the config.properties that names it, in this order.

    delete: once all is uploaded, remove what else lies in model-store/; without it, that is only named.
    Raises UserError, in one line, when credentials, bucket, permission, space or the connection are not as needed.
    """
    store = open_store(storage_uri)
    summary = Summary()
    with _explained(store), ThreadPoolExecutor(WORKERS) as pool:
        files = _keys(archive)
        with progress_bar(list(files.values()), archive.name) as bar:
            for key, path in files.items():
                _send(store, key, path, pool, bar, summary)
            _send(store, METRICS_CONFIG, METRICS, pool, bar, summary)
            with tempfile.NamedTemporaryFile("w", suffix=".properties") as config:
                config.write(cluster_properties(archive))
                config.flush()
                _send(store, CONFIG, Path(config.name), pool, bar, summary)
        summary.stale = tuple(sorted({*store.keys(STORE), *store.keys(UNFINISHED)} - files.keys()))
        for key in summary.stale if delete else ():
            store.delete(key)
    return summary


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


def _send(store: Store, key: str, path: Path, pool: ThreadPoolExecutor, bar: tqdm, summary: Summary) -> None:
    """Send one file unless it is there, its parts side by side."""
    parts = parts_of(path, pool)
    if store.matches(key, path, parts):
        summary.skipped += 1
        bar.update(path.stat().st_size)
        return
    if len(parts) == 1:
        store.put(key, parts[0].read(path), parts[0])
        bar.update(parts[0].size)
        summary.bytes += parts[0].size
    else:
        unfinished = store.begin(key, path, parts)
        missing = [part for part in parts if part.number not in unfinished.done]
        bar.update(sum(part.size for part in parts if part.number in unfinished.done))
        for part, _ in zip(missing, pool.map(lambda part: unfinished.put(part, part.read(path)), missing), strict=True):
            bar.update(part.size)
            summary.bytes += part.size
        unfinished.finish()
    summary.sent += 1


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
    args = parser.parse_args(argv)
    summary = upload(find_archive(args.model_store, args.model_name), args.storage_uri, args.delete)
    sent = f"sent {summary.sent} files ({summary.bytes / 1e9:.2f} GB)"
    print(f"{args.storage_uri}: {sent}, {summary.skipped} were there already")
    if summary.stale:
        what = "removed" if args.delete else "also there, and every pod downloads it (DELETE=1 removes it)"
        print(f"{what}: {', '.join(summary.stale)}")


if __name__ == "__main__":
    sys.exit(run(main))
