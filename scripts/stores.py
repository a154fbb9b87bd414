"""Where archives are uploaded to: S3, Google Cloud Storage, Azure Blob and folders, each through its vendor's client.

A store takes a file in parts, so that parts travel side by side and an upload that broke off goes on where it stopped.
What is there already is known by checksums: the store's own, or a `fingerprint` that is kept with the object.
"""

import base64
import contextlib
import errno
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from handler.errors import first_line
from scripts.console import UserError

PART_BYTES = 32 * 2**20
MAX_PARTS = 9000  # S3 takes 10,000 parts of an object, Azure 50,000
WORKERS = 4
RETRIES = 4  # of a request that the connection or the server failed, each after twice the time
NOTE = "fingerprint"  # the name under which it is kept in an object's metadata
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
        """As HTTP headers have it: in base64."""
        return base64.b64encode(self.sha256).decode()

    def read(self, path: Path) -> bytes:
        with path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def is_in(self, path: Path) -> bool:
        """Whether a file has these bytes in this place."""
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


def fingerprint(parts: Sequence[Part]) -> str:
    """The SHA-256 of one part, or that of all parts' SHA-256s and their number: S3's own composite checksum."""
    if len(parts) == 1:
        return parts[0].digest
    together = hashlib.sha256(b"".join(part.sha256 for part in parts)).digest()
    return f"{base64.b64encode(together).decode()}-{len(parts)}"


class Store(Protocol):
    """Objects under the prefix of one storage URI. Keys are relative to it. Methods raise the client's own errors."""

    def errors(self) -> tuple[type[Exception], ...]:
        """What the methods raise for a reason that `explain` can put in words."""

    def explain(self, error: Exception) -> str:
        """Which of credentials, bucket, permission, space or connection it is, and what to do; one line."""

    def holds(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        """Whether the object is there and has the file's content."""

    def keys(self, folder: str) -> list[str]:
        """Of all objects in a folder and its sub-folders."""

    def delete(self, key: str) -> None: ...

    def put(self, key: str, data: bytes, part: Part) -> None:
        """Write an object of one part."""

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> "Upload":
        """Go on with the unfinished upload of an object of several parts, or begin one."""


class Upload(Protocol):
    done: set[int]  # numbers of the parts that are there already

    def put(self, part: Part, data: bytes) -> None: ...

    def finish(self) -> None:
        """Make the object of its parts."""


def parse_uri(uri: str) -> tuple[str, str, str]:
    """(where, bucket, path) of a storageUri as KServe writes it: "gs", "s3", "file" or an Azure account's URL; a
    folder's path is all in the last. Raises UserError for one that names no bucket and path."""
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
    """The store of a storageUri. Raises UserError as `parse_uri`, and for credentials that are not there."""
    where, bucket, path = parse_uri(uri)
    if where == "file":
        return FolderStore(Path(path))
    if where == "s3":
        return S3Store(bucket, path)
    if where == "gs":
        return GoogleStore(bucket, path)
    return AzureStore(where, bucket, path)


class FolderStore:
    """file:///PATH, such as a volume that is mounted here."""

    def __init__(self, folder: Path):
        self._folder = folder

    def errors(self) -> tuple[type[Exception], ...]:
        return (OSError,)

    def explain(self, error: Exception) -> str:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left in {self._folder}: make room, then run the same command again to go on"
        if isinstance(error, PermissionError):
            return f"no permission to write in {self._folder}: change its owner or mode, or choose another STORAGE_URI"
        return f"{error}: mend that, then run the same command again to go on"

    def holds(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        there = self._folder / key
        if not there.is_file() or there.stat().st_size != path.stat().st_size:
            return False
        return all(part.is_in(there) for part in parts)

    def keys(self, folder: str) -> list[str]:
        found = (self._folder / folder).rglob("*")
        return [path.relative_to(self._folder).as_posix() for path in found if path.is_file()]

    def delete(self, key: str) -> None:
        (self._folder / key).unlink()

    def put(self, key: str, data: bytes, part: Part) -> None:
        target = self._folder / key
        partial = _partial(target)
        partial.write_bytes(data)
        partial.rename(target)

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> Upload:
        return _FolderUpload(self._folder / key, parts)


def _partial(target: Path) -> Path:
    """The file to write until it is whole, in a folder that is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f"{target.name}{UNFINISHED}")


class _FolderUpload:
    def __init__(self, target: Path, parts: Sequence[Part]):
        self._target, self._parts = target, parts
        self._partial = _partial(target)
        self._partial.touch()
        self.done = {part.number for part in parts if part.is_in(self._partial)}

    def put(self, part: Part, data: bytes) -> None:
        with self._partial.open("r+b") as file:
            file.seek(part.offset)
            file.write(data)

    def finish(self) -> None:
        os.truncate(self._partial, self._parts[-1].offset + self._parts[-1].size)
        self._partial.rename(self._target)


class S3Store:
    """s3://BUCKET/PATH on AWS, or on any other server that AWS_ENDPOINT_URL names."""

    def __init__(self, bucket: str, prefix: str):
        import boto3
        from botocore.config import Config

        config = Config(retries={"mode": "standard", "total_max_attempts": RETRIES + 1}, max_pool_connections=WORKERS)
        self._client: Any = boto3.Session().client("s3", config=config)
        self._bucket, self._prefix = bucket, prefix

    def errors(self) -> tuple[type[Exception], ...]:
        from botocore.exceptions import BotoCoreError, ClientError

        return (BotoCoreError, ClientError)

    def explain(self, error: Exception) -> str:
        from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run aws configure"
        if not isinstance(error, ClientError):
            return _broken(f"s3://{self._bucket}", error)
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code == "NoSuchBucket":
            return f"there is no bucket {self._bucket}: make it (aws s3 mb s3://{self._bucket}) or name another"
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return f"the AWS credentials are refused ({code}): set ones that are valid for {self._bucket}"
        if status == 403:
            where = f"s3://{self._bucket}/{self._prefix} ({error.operation_name})"
            return f"no permission for {where}: grant s3:PutObject, s3:GetObject and s3:ListBucket"
        return _broken(f"s3://{self._bucket}", error)

    def holds(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        from botocore.exceptions import ClientError

        try:
            found = self._client.head_object(**self._named(key), ChecksumMode="ENABLED")
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return False
            raise
        if "ChecksumSHA256" in found:
            # Some servers leave out the number of parts behind it.
            return found["ChecksumSHA256"].partition("-")[0] == fingerprint(parts).partition("-")[0]
        return _etag(found) == _md5(path, parts)

    def keys(self, folder: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=f"{self._prefix}/{folder}/"
        )
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [key.removeprefix(f"{self._prefix}/") for key in found]

    def delete(self, key: str) -> None:
        self._client.delete_object(**self._named(key))

    def put(self, key: str, data: bytes, part: Part) -> None:
        self._client.put_object(**self._named(key), Body=data, ChecksumSHA256=part.digest)

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> Upload:
        return _S3Upload(self._client, self._named(key), path, parts)

    def _named(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._prefix}/{key}"}


class _S3Upload:
    """A multipart upload, the newest of the key that is not complete. It is S3 that makes the object's checksum."""

    def __init__(self, client: Any, named: dict[str, str], path: Path, parts: Sequence[Part]):
        self._client, self._path, self._parts = client, path, parts
        uploads = self._unfinished(named)
        if not uploads:
            uploads = [client.create_multipart_upload(**named, ChecksumAlgorithm="SHA256")["UploadId"]]
        self._named, *self._older = [{**named, "UploadId": upload} for upload in uploads]
        self._there = self._held()
        self.done = set(self._there)

    def _unfinished(self, named: dict[str, str]) -> list[str]:
        """Of this key, the newest first."""
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=named["Bucket"], Prefix=named["Key"]
        )
        found = [entry for page in pages for entry in page.get("Uploads", []) if entry["Key"] == named["Key"]]
        return [entry["UploadId"] for entry in sorted(found, key=lambda entry: entry["Initiated"], reverse=True)]

    def _held(self) -> dict[int, Any]:
        """What is there of our parts, by number."""
        pages = self._client.get_paginator("list_parts").paginate(**self._named)
        there = {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}
        ours = [part for part in self._parts if part.number in there]
        return {part.number: there[part.number] for part in ours if self._is_same(part, there[part.number])}

    def _is_same(self, part: Part, there: dict[str, Any]) -> bool:
        if "ChecksumSHA256" in there:
            return there["ChecksumSHA256"] == part.digest
        return _etag(there) == _md5(self._path, [part])

    def put(self, part: Part, data: bytes) -> None:
        self._there[part.number] = self._client.upload_part(
            **self._named, PartNumber=part.number, Body=data, ChecksumSHA256=part.digest
        )

    def finish(self) -> None:
        made = [
            {
                "PartNumber": part.number,
                "ETag": self._there[part.number]["ETag"],
                "ChecksumSHA256": part.digest,
            }
            for part in self._parts
        ]
        self._client.complete_multipart_upload(**self._named, MultipartUpload={"Parts": made})
        for older in self._older:
            self._client.abort_multipart_upload(**older)


def _etag(entry: dict[str, Any]) -> str:
    return entry["ETag"].strip('"')


def _md5(path: Path, parts: Sequence[Part]) -> str:
    """The ETag of a file in these parts, for servers that keep no SHA-256: as `fingerprint`, with MD5 in hex."""
    sums = [hashlib.md5(part.read(path), usedforsecurity=False).digest() for part in parts]
    if len(sums) == 1:
        return sums[0].hex()
    return f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}"


class GoogleStore:
    """gs://BUCKET/PATH. Parts are objects of their own, which Google Cloud Storage then composes into one."""

    COMPOSED_AT_ONCE = 32

    def __init__(self, bucket: str, prefix: str):
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY

        try:
            client = storage.Client()
        except (DefaultCredentialsError, OSError):
            raise UserError(
                "no Google credentials: run gcloud auth application-default login, "
                "or set GOOGLE_APPLICATION_CREDENTIALS"
            ) from None
        self.bucket: Any = client.bucket(bucket)
        self.prefix = prefix
        self.retry: Any = DEFAULT_RETRY.with_timeout(2**RETRIES)

    def errors(self) -> tuple[type[Exception], ...]:
        import requests
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError

        return (GoogleAPIError, GoogleAuthError, requests.RequestException)

    def explain(self, error: Exception) -> str:
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError, TransportError

        name = self.bucket.name
        uri = f"gs://{name}"
        if isinstance(error, exceptions.NotFound):
            return f"there is no bucket {name}: make it (gcloud storage buckets create {uri}) or name another"
        refused = isinstance(error, GoogleAuthError) and not isinstance(error, TransportError)
        if refused or isinstance(error, exceptions.Unauthorized):
            return f"Google refuses the credentials ({first_line(error)}): run gcloud auth application-default login"
        if isinstance(error, exceptions.Forbidden):
            return f"no permission for {uri}/{self.prefix}: grant roles/storage.objectUser on the bucket"
        return _broken(uri, error)

    def holds(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        blob = self.bucket.get_blob(f"{self.prefix}/{key}", retry=self.retry)
        return blob is not None and (blob.metadata or {}).get(NOTE) == fingerprint(parts)

    def keys(self, folder: str) -> list[str]:
        blobs = self.bucket.list_blobs(prefix=f"{self.prefix}/{folder}/", retry=self.retry)
        return [blob.name.removeprefix(f"{self.prefix}/") for blob in blobs]

    def delete(self, key: str) -> None:
        self.bucket.blob(f"{self.prefix}/{key}").delete(retry=self.retry)

    def put(self, key: str, data: bytes, part: Part) -> None:
        blob = self.bucket.blob(f"{self.prefix}/{key}")
        blob.metadata = {NOTE: fingerprint([part])}
        blob.upload_from_string(data, "application/octet-stream", checksum="crc32c", retry=self.retry)

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> Upload:
        return _GoogleUpload(self, key, parts)


class _GoogleUpload:
    def __init__(self, store: GoogleStore, key: str, parts: Sequence[Part]):
        self._store, self._key, self._parts = store, key, parts
        self._folder = f"{UNFINISHED}/{key}"
        there = set(store.keys(self._folder))
        self.done = {part.number for part in parts if self._name(part) in there}

    def put(self, part: Part, data: bytes) -> None:
        self._store.put(self._name(part), data, part)

    def finish(self) -> None:
        blobs = [self._blob(self._name(part)) for part in self._parts]
        # At most 32 are composed at once, and what was composed may be composed again.
        while len(blobs) > 1:
            group, blobs = blobs[: GoogleStore.COMPOSED_AT_ONCE], blobs[GoogleStore.COMPOSED_AT_ONCE :]
            made = self._blob(f"{self._folder}/composed-{len(blobs)}" if blobs else self._key)
            made.metadata = {NOTE: fingerprint(self._parts)}
            made.content_type = "application/octet-stream"
            made.compose(group, retry=self._store.retry)
            blobs.insert(0, made)
        for name in self._store.keys(self._folder):
            self._store.delete(name)

    def _name(self, part: Part) -> str:
        return f"{self._folder}/{part.number:05}-{part.sha256.hex()}"

    def _blob(self, key: str) -> Any:
        return self._store.bucket.blob(f"{self._store.prefix}/{key}")


def _azure_identity() -> Any:
    """Of az login, a virtual machine or the environment. Asked for a token at once: the store's client would retry."""
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity import DefaultAzureCredential

    credential = DefaultAzureCredential()
    try:
        credential.get_token("https://storage.azure.com/.default")
    except ClientAuthenticationError:
        raise UserError(
            "no Azure credentials: run az login, or set AZURE_STORAGE_ACCESS_KEY to the account's key"
        ) from None
    return credential


AZURE_REFUSES = (
    "AuthenticationFailed",
    "AuthorizationFailure",
    "InvalidAuthenticationInfo",
    "NoAuthenticationInformation",
)


class AzureStore:
    """https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH, as block blobs."""

    def __init__(self, account_url: str, container: str, prefix: str):
        from azure.storage.blob import ContainerClient

        # The first is the name that KServe's storage initializer reads.
        secret = os.environ.get("AZURE_STORAGE_ACCESS_KEY") or os.environ.get("AZURE_STORAGE_SAS_TOKEN")
        credential = secret or _azure_identity()
        retries: dict[str, Any] = {"retry_total": RETRIES, "initial_backoff": 1, "increment_base": 2}
        self._container: Any = ContainerClient(account_url, container, credential=credential, **retries)
        self._account_url, self._prefix = account_url, prefix

    def errors(self) -> tuple[type[Exception], ...]:
        from azure.core.exceptions import AzureError

        return (AzureError,)

    def explain(self, error: Exception) -> str:
        from azure.core.exceptions import HttpResponseError

        name = self._container.container_name
        code = getattr(error, "error_code", "")
        code = str(getattr(code, "value", code))  # an enumeration's, when it is one that Azure documents
        if code == "ContainerNotFound":
            return f"there is no container {name}: make it (az storage container create --name {name}) or name another"
        if code in AZURE_REFUSES:
            return f"Azure refuses the credentials ({code}): set AZURE_STORAGE_ACCESS_KEY to the account's key"
        if isinstance(error, HttpResponseError) and error.status_code == 403:
            return f"no permission for {self._account_url}/{name} ({code}): grant Storage Blob Data Contributor on it"
        return _broken(self._account_url, error)

    def holds(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        from azure.core.exceptions import ResourceNotFoundError

        try:
            return self._blob(key).get_blob_properties().metadata.get(NOTE) == fingerprint(parts)
        except ResourceNotFoundError as error:
            if getattr(error, "error_code", None) == "ContainerNotFound":
                raise
            return False

    def keys(self, folder: str) -> list[str]:
        names = self._container.list_blob_names(name_starts_with=f"{self._prefix}/{folder}/")
        return [name.removeprefix(f"{self._prefix}/") for name in names]

    def delete(self, key: str) -> None:
        self._blob(key).delete_blob()

    def put(self, key: str, data: bytes, part: Part) -> None:
        self._blob(key).upload_blob(data, overwrite=True, metadata={NOTE: fingerprint([part])}, validate_content=True)

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> Upload:
        return _AzureUpload(self._blob(key), parts)

    def _blob(self, key: str) -> Any:
        return self._container.get_blob_client(f"{self._prefix}/{key}")


class _AzureUpload:
    """Blocks that carry the number and the SHA-256 of their part as their id, until they are committed."""

    def __init__(self, blob: Any, parts: Sequence[Part]):
        from azure.core.exceptions import ResourceNotFoundError

        self._blob, self._parts = blob, parts
        there: set[str] = set()
        with contextlib.suppress(ResourceNotFoundError):
            there = {block.id for block in blob.get_block_list("uncommitted")[1]}
        self.done = {part.number for part in parts if self._id(part) in there}

    def put(self, part: Part, data: bytes) -> None:
        self._blob.stage_block(self._id(part), data, length=len(data), validate_content=True)

    def finish(self) -> None:
        from azure.storage.blob import BlobBlock

        blocks = [BlobBlock(self._id(part)) for part in self._parts]
        self._blob.commit_block_list(blocks, metadata={NOTE: fingerprint(self._parts)})

    @staticmethod
    def _id(part: Part) -> str:
        return f"{part.number:05}-{part.sha256.hex()[:32]}"


def _broken(where: str, error: Exception) -> str:
    return f"{where} did not take it ({first_line(error)}): run the same command again to go on where it stopped"
