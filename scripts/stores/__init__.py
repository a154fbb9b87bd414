"""Where archives are uploaded to: S3, Google Cloud Storage, Azure Blob and folders, each through its vendor's client.

A store takes a file in parts, so that parts travel side by side and an upload that broke off goes on where it stopped.
What is there already is recognized by checksums: the store's own, or a `fingerprint` that is kept with the object.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from scripts.console import UserError

from .base import Store

LEAST_KSERVE = "0.13"
LEAST_KSERVE_AZURE = "0.17"  # earlier ones hold a blob in memory, of 1 GiB, and leave out what is six folders deep


def parse_uri(uri: str) -> tuple[str, str, str]:
    """(place, bucket, path) of a storageUri as KServe writes it. place: "gs", "s3", "file" or an Azure account's URL.

    For "file" there is no bucket and the path is absolute. Raises UserError for a URI without bucket or path.
    """
    url = urlsplit(uri)
    azure = url.scheme in ("https", "http") and ".blob." in url.netloc
    if not azure and url.scheme not in ("gs", "s3", "file"):
        raise UserError(
            f"STORAGE_URI is {uri!r}: write gs://BUCKET/PATH, s3://BUCKET/PATH, file:///PATH or "
            "https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH"
        )
    if url.query or url.fragment:
        raise UserError(f"STORAGE_URI is {uri.partition('?')[0]!r} and more: KServe wants a path without ? and #")
    bucket, _, path = f"{'' if azure else url.netloc}{url.path}".strip("/").partition("/")
    if url.scheme == "file":
        if url.netloc or not bucket:
            raise UserError(f"STORAGE_URI is {uri!r}: write file:///an/absolute/path")
        return "file", "", url.path
    if not bucket or not path:
        raise UserError(f"STORAGE_URI is {uri!r}: KServe wants a bucket and a path in it, such as gs://BUCKET/bloom")
    return f"{url.scheme}://{url.netloc}" if azure else url.scheme, bucket, path


def open_store(uri: str) -> Store:
    """The store of a storageUri. Raises UserError as `parse_uri` does, and for missing credentials.

    A vendor's client is imported only where it is used.
    """
    place, bucket, path = parse_uri(uri)
    if place == "file":
        from .folder import FolderStore

        return FolderStore(Path(path))
    if place == "s3":
        from .s3 import S3Store

        return S3Store(bucket, path)
    if place == "gs":
        from .google import GoogleStore

        return GoogleStore(bucket, path)
    from .azure import AzureStore

    return AzureStore(place, bucket, path)


@contextmanager
def explained(store: Store) -> Iterator[None]:
    """Turn the client's errors into a UserError."""
    try:
        yield
    except store.errors() as error:
        raise UserError(store.explain(error)) from error


def least_kserve(uri: str) -> str:
    """The oldest KServe whose storage initializer can fetch a large model from there."""
    return LEAST_KSERVE_AZURE if parse_uri(uri)[0].startswith("http") else LEAST_KSERVE


def is_older(version: str, least: str) -> bool:
    """Whether a KServe of this version, such as 0.16.1, is older than another. Raises UserError if it is none."""
    try:
        return [int(part) for part in version.removeprefix("v").split(".")[:2]] < [int(p) for p in least.split(".")]
    except ValueError:
        raise UserError(f"KSERVE is {version!r}: write the cluster's version, such as {least}") from None


def check_kserve(uri: str, version: str) -> None:
    """Raises UserError when a KServe of this version, such as 0.16.1, could not fetch a model from there."""
    least = least_kserve(uri)
    if is_older(version, least):
        raise UserError(
            f"from {uri} KServe {version} cannot fetch a large model: its storage initializer holds a file in 1 GiB of "
            f"memory and leaves out deep folders; use KServe {least} or newer, or gs://, s3:// or a volume"
            if least == LEAST_KSERVE_AZURE
            else f"KServe {version} is too old: use {least} or newer"
        )
