"""Download a model from the Hugging Face hub: `python -m scripts.download --model-id bigscience/bloom-7b1`.

What arrives is one commit, named in OUTPUT/download.json, and of its weights only those that transformers
would load: a hub repository often holds the same weights two or three times.

A file counts as here when its hash is the hub's. An interrupted download goes on where it stopped, a second
one moves nothing, and a newer commit costs only what changed. `snapshot_download` does not do that:
huggingface_hub 2.4 throws away what it has of a file when a run ends, checks sizes but not hashes, and keeps
an outdated local file when the hub does not answer. Its `http_get` moves the bytes here, with progress bar,
retries and redirects.
"""

import argparse
import hashlib
import io
import json
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the HTTP library that huggingface_hub uses: another one in 1.x than in 2.x
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from handler.errors import first_line
from handler.weights.files import WEIGHTS
from scripts.console import UserError, format_size, require_space, run

# The files beside the weights that a model needs, or that its licence asks to be kept with it.
COMPANIONS = (
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja", "*.py"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "README*", "USE_POLICY*"),
)
DOWNLOAD_RECORD = "download.json"
PARTIAL = ".partial"
# One connection to the hub's storage does not fill a fast line.
CONNECTIONS = 4


@dataclass(frozen=True)
class File:
    """A file of the repository."""

    name: str
    size: int  # bytes
    digest: str  # SHA-256 of a file in large-file storage, else git's SHA-1 of the blob

    def is_at(self, path: Path) -> bool:
        """Whether `path` holds exactly this file; reads all of it if the size is right."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, self._hasher).hexdigest() == self.digest

    def _hasher(self) -> Any:
        return hashlib.sha256() if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % self.size)


@dataclass(frozen=True)
class Commit:
    """One commit of a model's repository on the hub."""

    model_id: str
    revision: str  # the branch, tag or hash that was asked for
    hash: str
    files: dict[str, File]

    def url(self, name: str) -> str:
        return hf_hub_url(self.model_id, name, revision=self.hash)


def resolve(model_id: str, revision: str) -> Commit:
    """Ask the hub which commit `revision` is, and for its files with sizes and hashes.

    Raises huggingface_hub's errors, and UserError when the hub's answer lacks a hash or a size.
    """
    info = HfApi().model_info(model_id, revision=revision, files_metadata=True, timeout=30)
    files = {}
    for entry in info.siblings or []:
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        if entry.size is None or digest is None:
            raise UserError(f"{constants.ENDPOINT} lists {entry.rfilename} without size or hash; try another")
        files[entry.rfilename] = File(entry.rfilename, entry.size, digest)
    if info.sha is None:
        raise UserError(f"{constants.ENDPOINT} does not say which commit {revision} is; try another")
    return Commit(model_id, revision, info.sha, files)


def _choose_files(commit: Commit) -> list[File]:
    """The weights that transformers would load, and their companions.

    Raises UserError when there are no such weights, or the index names a shard that is not there.
    """
    weights = _choose_weights(commit)
    companions = [name for name in commit.files if _is_companion(name)]
    return [commit.files[name] for name in sorted({*weights, *companions})]


def _choose_weights(commit: Commit) -> list[str]:
    first = next((name for name in WEIGHTS if name in commit.files), None)
    if first is None:
        raise UserError(
            f"{commit.model_id} has no weights that transformers loads ({', '.join(WEIGHTS)}); "
            "choose a repository, or a --revision, with one of them"
        )
    if not first.endswith(".index.json"):
        return [first]
    buffer = io.BytesIO()
    http_get(commit.url(first), buffer, headers=build_hf_headers(), displayed_filename=first)
    shards = set(json.loads(buffer.getvalue())["weight_map"].values())
    # A shard lies beside its index. Anything else, "../x" above all, must not become a path on this machine.
    missing = sorted(name for name in shards if name not in commit.files or "/" in name)
    if missing:
        raise UserError(
            f"{first} of {commit.model_id} names {missing[0]}, which is not in the repository; "
            "choose another --revision"
        )
    return [first, *shards]


def _is_companion(name: str) -> bool:
    folder = name.rpartition("/")[0]
    return (
        folder in ("", "additional_chat_templates")
        and any(fnmatchcase(name, pattern) for pattern in COMPANIONS)
        and ".index." not in name
        and name != DOWNLOAD_RECORD
    )


def download(commit: Commit, output: Path) -> str:
    """Make `output` hold the files of `commit` and none of an earlier one; a sentence about what was done.

    Raises UserError, also when space is short or `output` is in use, huggingface_hub's errors and OSError.
    """
    files = _choose_files(commit)
    names = [file.name for file in files]
    record = {
        "model_id": commit.model_id,
        "revision": commit.revision,
        "commit": commit.hash,
        "files": [{"name": file.name, "size": file.size} for file in files],
    }
    old = _read_record(output)
    if _is_complete(output, old, record):
        return f"{output} already holds {commit.model_id} at {commit.hash}: nothing to download"
    _refuse_other_model(output, old, record)

    checked = tqdm(files, "Checking what is here", unit="file", delay=2)
    missing = [file for file in checked if not file.is_at(output / file.name)]
    (output / PARTIAL).mkdir(parents=True, exist_ok=True)
    needed = sum(file.size - _bytes_here(_partial_path(file, output)) for file in missing)
    require_space(output, needed)

    # From here on the folder is no longer what the old record says.
    for name in {entry["name"] for entry in old.get("files", [])}.difference(names):
        (output / name).unlink(missing_ok=True)
    (output / DOWNLOAD_RECORD).unlink(missing_ok=True)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda file: _fetch(file, commit.url(file.name), output), missing))
    shutil.rmtree(output / PARTIAL)
    (output / DOWNLOAD_RECORD).write_text(json.dumps(record, indent=2) + "\n")
    total = sum(file.size for file in files)
    return f"{output}: {len(files)} files, {format_size(total)}, of which {format_size(needed)} downloaded"


def _fetch(file: File, url: str, output: Path) -> None:
    """Download one file, going on from what an earlier run left of it.

    Raises UserError when what arrived is not what the hub lists, huggingface_hub's errors and OSError.
    """
    part = _partial_path(file, output)
    if _bytes_here(part) > file.size:
        part.unlink()
    with part.open("ab") as stream:
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.name,
        )
    if not file.is_at(part):
        part.unlink()
        raise UserError(f"{file.name} arrived damaged and was removed; run the same command again")
    (output / file.name).parent.mkdir(exist_ok=True)
    part.replace(output / file.name)


def _partial_path(file: File, output: Path) -> Path:
    # The hash is in the name, so that the beginning of one file is never continued with the rest of another.
    return output / PARTIAL / f"{file.name.replace('/', '--')}.{file.digest}"


def _bytes_here(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_record(output: Path) -> dict[str, Any]:
    try:
        return json.loads((output / DOWNLOAD_RECORD).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _is_complete(output: Path, old: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether `output` holds `record`'s commit already. Hashes were checked when the record was written."""
    return all(old.get(key) == record[key] for key in ("model_id", "commit", "files")) and all(
        _bytes_here(output / entry["name"]) == entry["size"] for entry in record["files"]
    )


def _refuse_other_model(output: Path, old: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises UserError when `output` holds another model: transformers might load those weights instead."""
    if old and old.get("model_id") != record["model_id"]:
        raise UserError(f"{output} holds {old.get('model_id')}; choose another --output-dir")
    known = {entry["name"] for entry in [*record["files"], *old.get("files", [])]}
    for name in WEIGHTS:
        if name not in known and (output / name).exists():
            raise UserError(f"{output / name} is of another model; remove it or choose another --output-dir")


def _explain(error: Exception, model_id: str, revision: str) -> str:
    """One line: what went wrong and what to do."""
    hub = constants.ENDPOINT
    match error:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it"
        case GatedRepoError():
            return f"{model_id} is gated: accept its terms at {hub}/{model_id}, then set HF_TOKEN"
        case RevisionNotFoundError():
            return f"{model_id} has no revision {revision}; see {hub}/{model_id}/commits/main"
        case HfHubHTTPError() if error.response.status_code in (401, 403, 404):
            # The hub does not tell a stranger whether a private repository exists.
            return (
                f"{hub} has no model {model_id}, or does not show it to you: check --model-id, "
                "or set HF_TOKEN to a token that may read it"
            )
        case HfHubHTTPError():
            return f"{hub} answers {error.response.status_code}; run the same command later, it resumes"
        case HTTPError():
            return f"no answer from {hub} ({first_line(error)}); check the network and run the command again"
        case _:
            return first_line(error)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="download",
        description="Download a model from the Hugging Face hub: one commit, one format of weights; resumes.",
        epilog="Environment: HF_TOKEN, a token for private and gated models; HF_ENDPOINT, another hub.",
    )
    parser.add_argument("--model-id", required=True, help="for example bigscience/bloom-7b1")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, help="default: models/NAME, NAME being the id's last part")
    args = parser.parse_args(argv)
    output = args.output_dir or Path("models") / args.model_id.rpartition("/")[2]
    try:
        commit = resolve(args.model_id, args.revision)
        print(f"{commit.model_id} at {commit.revision} is commit {commit.hash}", flush=True)
        print(download(commit, output))
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(_explain(error, args.model_id, args.revision)) from error


if __name__ == "__main__":
    # Ctrl-C ends the process at once, without waiting for the files that other threads are at: all of them resume.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(run(main))
