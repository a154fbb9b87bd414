"""Pack a checkpoint folder into model.zip: stored, since weights do not compress, with the SHA-256 of every file."""

import argparse
import hashlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from handler.weights.unpack import BUFFER, MANIFEST
from scripts.console import UserError, run


def files_in(folder: Path) -> list[Path]:
    """The files to pack, sorted; hidden ones (.cache, .git) stay behind."""
    relative = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [folder / path for path in relative if not any(part.startswith(".") for part in path.parts)]


def zip_checkpoint(model_dir: Path, archive: Path) -> Path:
    """Write `archive` (whole or not at all) with the files of `model_dir` and a SHA256SUMS; its path.

    Raises UserError when `model_dir` holds no config.json or when `archive` lies inside it.
    """
    if not any(model_dir.rglob("config.json")):
        raise UserError(f"{model_dir} holds no config.json: give the folder of a Hugging Face checkpoint")
    if archive.resolve().is_relative_to(model_dir.resolve()):
        raise UserError(f"{archive} lies inside {model_dir} and would pack itself: choose another --output")
    files = files_in(model_dir)
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f"{archive.name}.partial")
    sums = ""
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as zipped, progress_bar(files, archive.name) as bar:
            for path in files:
                digest, name = hashlib.sha256(), path.relative_to(model_dir)
                add_file(zipped, path, name, bar, digest.update)
                sums += f"{digest.hexdigest()}  {name.as_posix()}\n"
            zipped.writestr(MANIFEST, sums)
        partial.rename(archive)
    finally:
        partial.unlink(missing_ok=True)
    return archive


def progress_bar(files: list[Path], title: str) -> tqdm:
    """A progress bar over the bytes of `files`."""
    total = sum(path.stat().st_size for path in files)
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None)


def add_file(
    zipped: zipfile.ZipFile, path: Path, name: Path, bar: tqdm, on_chunk: Callable[[bytes], None] = lambda chunk: None
) -> None:
    """Store one file in the zip under `name`; `on_chunk` is called with its bytes, chunk by chunk."""
    with zipped.open(zipfile.ZipInfo.from_file(path, name.as_posix()), "w", force_zip64=True) as sink:
        for chunk in _chunks(path):
            on_chunk(chunk)
            sink.write(chunk)
            bar.update(len(chunk))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while chunk := source.read(BUFFER):
            yield chunk


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="zip", description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True, help="folder of the (sharded) checkpoint")
    parser.add_argument("--output", type=Path, default=Path("model.zip"), help="default: model.zip")
    args = parser.parse_args(argv)
    archive = zip_checkpoint(args.model_dir, args.output)
    print(f"{archive}: {archive.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    sys.exit(run(main))
