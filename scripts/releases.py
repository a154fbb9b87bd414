"""List the releases that `make upload` put at a storage URI, the newest last, and delete one."""

import argparse
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from scripts.console import UserError, format_size, run
from scripts.stores import explained, open_store
from scripts.stores.base import UNFINISHED, Part, Stored, fingerprint

CONFIG = "config/config.properties"  # of a release, uploaded last
RELEASE = re.compile(r"[0-9a-f]{16}")


def release_name(parts: Mapping[str, Sequence[Part]]) -> str:
    """Of a release with these files: a part of the SHA-256 of their keys and content.

    It is like no other name, and always of one length, because KServe's storage initializers take prefixes for more
    than they are: S3's before 0.15 flattens objects whose name begins with the URI's last segment, and takes out every
    repetition of the URI's path; Azure's fetches siblings whose name begins with it.
    """
    lines = [f"{key} {fingerprint(parts[key])}\n" for key in sorted(parts)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def release_uri(storage_uri: str, release: str) -> str:
    """The storageUri of a release. Without the slash at its end its siblings would be fetched too.

    Raises UserError when that is no release's name.
    """
    _check_name(release)
    return f"{storage_uri.rstrip('/')}/{release}/"


@dataclass(frozen=True)
class Release:
    """A release at a storage URI: bytes, when its last object was written, and whether it is all there."""

    name: str
    size: int
    modified: datetime
    whole: bool


def releases(storage_uri: str) -> list[Release]:
    """What is there, the newest last. Raises UserError as `upload` does."""
    store = open_store(storage_uri)
    with explained(store):
        objects = store.objects()
    found: dict[str, dict[str, Stored]] = {}
    for key, stored in objects.items():
        name, _, rest = key.removeprefix(f"{UNFINISHED}/").partition("/")
        if RELEASE.fullmatch(name):
            found.setdefault(name, {})[rest if not key.startswith(UNFINISHED) else key] = stored
    return sorted(
        (
            Release(
                name,
                sum(stored.size for stored in files.values()),
                max(stored.modified for stored in files.values()),
                CONFIG in files,
            )
            for name, files in found.items()
        ),
        key=lambda release: release.modified,
    )


def delete(storage_uri: str, release: str) -> None:
    """Delete a release, and what an upload of it that broke off has left. Raises UserError when there is none."""
    _check_name(release)
    store = open_store(storage_uri)
    with explained(store):
        keys = [*store.objects(release), *store.objects(f"{UNFINISHED}/{release}")]
        abandoned = store.abandon(release)
        if not keys and not abandoned:
            raise UserError(f"{storage_uri} has no release {release}: make releases lists them")
        # The configuration first: what has lost it is not whole.
        for key in sorted(keys, key=lambda key: key != f"{release}/{CONFIG}"):
            store.delete(key)


def _check_name(release: str) -> None:
    if not RELEASE.fullmatch(release):
        raise UserError(f"{release!r} is not the name of a release: make releases STORAGE_URI=… lists them")


def remember(model_store: Path, model_name: str, release: str, storage_uri: str) -> None:
    """Note what was uploaded where, beside the archive."""
    with _notes(model_store, model_name).open("a") as notes:
        notes.write(f"{release} {storage_uri.rstrip('/')}\n")


def newest(model_store: Path, model_name: str, storage_uri: str) -> str:
    """The release that was uploaded last from here to a storage URI; a volume is filled from whatever URI.

    Raises UserError when none was.
    """
    notes = _notes(model_store, model_name)
    uploads = [line.split(maxsplit=1) for line in notes.read_text().splitlines()] if notes.is_file() else []
    is_volume = storage_uri.startswith("pvc://")
    there = [release for release, uri in uploads if is_volume or uri == storage_uri.rstrip("/")]
    if not there:
        raise UserError(
            f"no release of {model_name} was uploaded from here to {storage_uri}: run make upload, or name with "
            "RELEASE=… one that make releases STORAGE_URI=… lists"
        )
    return there[-1]


def _notes(model_store: Path, model_name: str) -> Path:
    return model_store / f"{model_name}.releases"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="releases", description=__doc__)
    parser.add_argument("--storage-uri", required=True, help="as for upload")
    parser.add_argument("--delete", metavar="RELEASE", help="which no pod may read any more")
    args = parser.parse_args(argv)
    if args.delete:
        delete(args.storage_uri, args.delete)
    for release in releases(args.storage_uri):
        state = "" if release.whole else "  not whole: run make upload again to go on"
        print(f"{release.name}  {release.modified:%Y-%m-%d %H:%M}  {format_size(release.size)}{state}")


if __name__ == "__main__":
    sys.exit(run(main))
