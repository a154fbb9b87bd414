"""Put an archive and its config.properties, as a release, where KServe's storage initializer looks for them.

A release is a folder that the SHA-256 of its content names: STORAGE_URI/RELEASE/model-store/NAME.mar (or the files of a
no-archive folder), STORAGE_URI/RELEASE/config/metrics.yaml and, last, STORAGE_URI/RELEASE/config/config.properties. So
what pods read is never written over, and two uploads at once cannot mix. What is there already is not sent again, and
an upload that broke off goes on where it stopped.
"""

import argparse
import contextlib
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from scripts.console import UserError, run
from scripts.releases import CONFIG, release_name, remember
from scripts.stores import check_kserve, explained, least_kserve, open_store
from scripts.stores.base import WORKERS, Part, Store, parts_of
from scripts.zip import files_in, progress_bar
from server.config_properties import METRICS, cluster_properties

STORE, METRICS_CONFIG = "model-store", "config/metrics.yaml"


@dataclass
class Summary:
    """What an upload did."""

    release: str
    bytes: int = 0  # sent
    sent: int = 0  # objects
    skipped: int = 0  # objects that were there already


def upload(archive: Path, storage_uri: str) -> Summary:
    """Upload a .mar or a no-archive folder, and the config.properties that names it, in this order.

    Raises UserError, in one line, when credentials, bucket, permission, space or the connection are not as needed.
    """
    store = open_store(storage_uri)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(WORKERS) as pool:
        files = _files(archive, Path(scratch))
        parts = {key: parts_of(path, pool) for key, path in files.items()}
        summary = Summary(release_name(parts))
        with explained(store), progress_bar(list(files.values()), archive.name) as bar:
            for key, path in files.items():
                _send(store, f"{summary.release}/{key}", path, parts[key], pool, bar, summary)
    return summary


def find_archive(model_store: Path, name: str) -> Path:
    """What `make archive` made. Raises UserError when there is nothing, or both a .mar and a folder."""
    found = [path for path in (model_store / f"{name}.mar", model_store / name) if path.exists()]
    if not found:
        raise UserError(f"{model_store} holds no {name}.mar: make it with make archive MODEL_NAME={name}")
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} are both there: remove the one that you do not want to upload")
    return found[0]


def _files(archive: Path, scratch: Path) -> dict[str, Path]:
    """What a release holds, by its key. The links of a no-archive folder are followed."""
    if archive.is_file():
        files = {f"{STORE}/{archive.name}": archive}
    else:
        paths = [path for entry in archive.iterdir() for path in (files_in(entry) if entry.is_dir() else [entry])]
        files = {f"{STORE}/{archive.name}/{path.relative_to(archive).as_posix()}": path for path in sorted(paths)}
    config = scratch / "config.properties"
    config.write_text(cluster_properties(archive))
    return files | {METRICS_CONFIG: METRICS, CONFIG: config}


def _send(
    store: Store, key: str, path: Path, parts: Sequence[Part], pool: ThreadPoolExecutor, bar: tqdm, summary: Summary
) -> None:
    """Send one file unless it is there, its parts side by side."""
    if store.matches(key, path, parts):
        summary.skipped += 1
        bar.update(path.stat().st_size)
        return
    try:
        _send_parts(store, key, path, parts, pool, bar, summary)
    except store.errors():
        with contextlib.suppress(*store.errors()):
            if store.matches(key, path, parts):  # another upload of the same release was quicker
                summary.skipped += 1
                return
        raise
    summary.sent += 1


def _send_parts(
    store: Store, key: str, path: Path, parts: Sequence[Part], pool: ThreadPoolExecutor, bar: tqdm, summary: Summary
) -> None:
    if len(parts) == 1:
        store.put(key, _read(path, parts[0]), parts[0])
        bar.update(parts[0].size)
        summary.bytes += parts[0].size
        return
    unfinished = store.begin(key, path, parts)
    missing = [part for part in parts if part.number not in unfinished.done]
    bar.update(sum(part.size for part in parts if part.number in unfinished.done))
    for part, _ in zip(missing, pool.map(lambda part: unfinished.put(part, _read(path, part)), missing), strict=True):
        bar.update(part.size)
        summary.bytes += part.size
    unfinished.finish()


def _read(path: Path, part: Part) -> bytes:
    """The part's bytes. Raises UserError when they are no longer those that the release is named by."""
    data = part.read(path)
    if hashlib.sha256(data).digest() != part.sha256:
        raise UserError(f"{path} has changed while it was uploaded: run the same command again")
    return data


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="upload", description=__doc__.splitlines()[0])
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--model-store", type=Path, default=Path("model_store"), help="where make archive put it")
    parser.add_argument(
        "--storage-uri",
        required=True,
        help="gs://BUCKET/PATH, s3://BUCKET/PATH, file:///PATH or https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH",
    )
    parser.add_argument("--kserve", help="the cluster's version, such as 0.16, to refuse what it could not fetch")
    args = parser.parse_args(argv)
    if args.kserve:
        check_kserve(args.storage_uri, args.kserve)
    summary = upload(find_archive(args.model_store, args.model_name), args.storage_uri)
    remember(args.model_store, args.model_name, summary.release, args.storage_uri)
    sent = f"sent {summary.sent} files ({summary.bytes / 1e9:.2f} GB)"
    print(f"{args.storage_uri}: {sent}, {summary.skipped} were there already")
    print(f"release {summary.release}, for KServe {least_kserve(args.storage_uri)} or newer: make deploy takes it")


if __name__ == "__main__":
    sys.exit(run(main))
