"""Where archives are uploaded to: S3, Google Cloud Storage, Azure Blob and folders, each through its vendor's client.

A store takes a file in parts, so that parts travel side by side and an upload that broke off goes on where it stopped.
What is there already is recognized by checksums: the store's own, or a `fingerprint` that is kept with the object.
"""

from pathlib import Path
from urllib.parse import urlsplit

from scripts.console import UserError

from .base import Store


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
    bucket, _, path = f"{'' if azure else url.netloc}{url.path}".strip("/").partition("/")
    if url.scheme == "file":
        if url.netloc or not bucket:
            raise UserError(f"STORAGE_URI is {uri!r}: write file:///an/absolute/path")
        return "file", "", url.path
    if not bucket or not path or url.query:
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
