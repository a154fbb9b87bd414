"""s3://BUCKET/PATH: Amazon S3, and servers that speak its protocol."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from .base import CHANGED, RETRIES, WORKERS, Part, Stored, Upload, fingerprint, interrupted

RIGHTS = (
    "s3:PutObject, s3:GetObject and s3:ListMultipartUploadParts on its objects, s3:ListBucket and "
    "s3:ListBucketMultipartUploads on the bucket; for make releases DELETE=… s3:DeleteObject and "
    "s3:AbortMultipartUpload too"
)
COMPLETING = {"Delay": 1, "MaxAttempts": 60}  # how often to look for the object that S3 makes of another's parts


class S3Store:
    """A bucket on AWS, or on the server that AWS_ENDPOINT_URL names."""

    def __init__(self, bucket: str, prefix: str):
        config = Config(retries={"mode": "standard", "total_max_attempts": RETRIES + 1}, max_pool_connections=WORKERS)
        self._client: Any = boto3.Session().client("s3", config=config)
        self._bucket, self._prefix = bucket, prefix

    def errors(self) -> tuple[type[Exception], ...]:
        return (BotoCoreError, ClientError)

    def explain(self, error: Exception) -> str:
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run aws configure"
        if not isinstance(error, ClientError):
            return interrupted(f"s3://{self._bucket}", error)
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code == "NoSuchBucket":
            return f"there is no bucket {self._bucket}: make it (aws s3 mb s3://{self._bucket}) or name another"
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return f"the AWS credentials are refused ({code}): set ones that are valid for {self._bucket}"
        if code == "PreconditionFailed":
            return CHANGED
        if status == 403:
            where = f"s3://{self._bucket}/{self._prefix} ({error.operation_name})"
            return f"no permission for {where}: grant {RIGHTS}"
        return interrupted(f"s3://{self._bucket}", error)

    def matches(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        try:
            found = self._client.head_object(**self._location(key), ChecksumMode="ENABLED")
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return False
            raise
        if "ChecksumSHA256" in found:
            # Some servers leave out the number of parts behind it.
            return found["ChecksumSHA256"].partition("-")[0] == fingerprint(parts).partition("-")[0]
        return _etag(found) == _md5(path, parts)

    def objects(self, folder: str = "") -> dict[str, Stored]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=f"{self._prefix}/{folder and folder + '/'}"
        )
        found = [entry for page in pages for entry in page.get("Contents", [])]
        return {
            entry["Key"].removeprefix(f"{self._prefix}/"): Stored(entry["Size"], entry["LastModified"])
            for entry in found
        }

    def delete(self, key: str) -> None:
        self._client.delete_object(**self._location(key))

    def abandon(self, folder: str) -> int:
        unfinished = _unfinished(self._client, self._bucket, f"{self._prefix}/{folder}/")
        for entry in unfinished:
            upload = {"Key": entry["Key"], "UploadId": entry["UploadId"]}
            self._client.abort_multipart_upload(Bucket=self._bucket, **upload)
        return len(unfinished)

    def put(self, key: str, data: bytes, part: Part) -> None:
        self._client.put_object(**self._location(key), Body=data, ChecksumSHA256=part.digest, IfNoneMatch="*")

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> Upload:
        return _S3Upload(self._client, self._location(key), path, parts)

    def _location(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._prefix}/{key}"}


class _S3Upload:
    """A multipart upload: the newest unfinished one of the key, or a new one. S3 makes the object's checksum itself.

    An older one may be somebody's who is at it, so it is left to the bucket's lifecycle.
    """

    def __init__(self, client: Any, location: dict[str, str], path: Path, parts: Sequence[Part]):
        self._client, self._object, self._path, self._parts = client, location, path, parts
        upload = self._unfinished(location)
        if upload is None:
            upload = client.create_multipart_upload(**location, ChecksumAlgorithm="SHA256")["UploadId"]
        self._location = {**location, "UploadId": upload}
        with self._awaiting_another():
            self._uploaded = self._find_uploaded()
        self.done = set(self._uploaded)

    def _unfinished(self, location: dict[str, str]) -> str | None:
        """The id of this key's newest unfinished upload."""
        entries = _unfinished(self._client, location["Bucket"], location["Key"])
        found = [entry for entry in entries if entry["Key"] == location["Key"]]
        return max(found, key=lambda entry: entry["Initiated"])["UploadId"] if found else None

    def _find_uploaded(self) -> dict[int, Any]:
        """Those of our parts that are uploaded, by number."""
        pages = self._client.get_paginator("list_parts").paginate(**self._location)
        there = {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}
        ours = [part for part in self._parts if part.number in there]
        return {part.number: there[part.number] for part in ours if self._is_same(part, there[part.number])}

    def _is_same(self, part: Part, there: dict[str, Any]) -> bool:
        if "ChecksumSHA256" in there:
            return there["ChecksumSHA256"] == part.digest
        return _etag(there) == _md5(self._path, [part])

    def put(self, part: Part, data: bytes) -> None:
        with self._awaiting_another():
            self._uploaded[part.number] = self._client.upload_part(
                **self._location, PartNumber=part.number, Body=data, ChecksumSHA256=part.digest
            )

    def finish(self) -> None:
        completed = [
            {
                "PartNumber": part.number,
                "ETag": self._uploaded[part.number]["ETag"],
                "ChecksumSHA256": part.digest,
            }
            for part in self._parts
        ]
        with self._awaiting_another():
            self._client.complete_multipart_upload(
                **self._location, MultipartUpload={"Parts": completed}, IfNoneMatch="*"
            )

    @contextlib.contextmanager
    def _awaiting_another(self) -> Iterator[None]:
        """An upload that is gone was ended by another one of the same archive, whose object may not be there yet. It is
        when the error is seen."""
        try:
            yield
        except self._client.exceptions.NoSuchUpload:
            self._client.get_waiter("object_exists").wait(**self._object, WaiterConfig=COMPLETING)
            raise


def _unfinished(client: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    """The multipart uploads of objects whose keys begin so."""
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
    return [entry for page in pages for entry in page.get("Uploads", [])]


def _etag(entry: dict[str, Any]) -> str:
    return entry["ETag"].strip('"')


def _md5(path: Path, parts: Sequence[Part]) -> str:
    """The ETag that S3 gives these parts, for servers that keep no SHA-256: as `fingerprint`, but with MD5 in hex."""
    sums = [hashlib.md5(part.read(path), usedforsecurity=False).digest() for part in parts]
    if len(sums) == 1:
        return sums[0].hex()
    return f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}"
