"""gs://BUCKET/PATH: Google Cloud Storage."""

import base64
import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import requests
from google.api_core.exceptions import (
    DataLoss,
    Forbidden,
    GoogleAPIError,
    NotFound,
    PreconditionFailed,
    Unauthorized,
)
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

from handler.errors import first_line
from scripts.console import UserError

from .base import CHANGED, METADATA_KEY, RETRIES, UNFINISHED, Part, Stored, Upload, fingerprint, interrupted

MAX_COMPOSED = 32  # objects that one request can compose
NEW = 0  # the generation of an object that is not there


class GoogleStore:
    """A bucket. Parts are uploaded as objects of their own, which Google Cloud Storage then composes into one."""

    def __init__(self, bucket: str, prefix: str):
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
        return (GoogleAPIError, GoogleAuthError, requests.RequestException)

    def explain(self, error: Exception) -> str:
        name = self.bucket.name
        uri = f"gs://{name}"
        if isinstance(error, NotFound):
            return f"there is no bucket {name}: make it (gcloud storage buckets create {uri}) or name another"
        refused = isinstance(error, GoogleAuthError) and not isinstance(error, TransportError)
        if refused or isinstance(error, Unauthorized):
            return f"Google refuses the credentials ({first_line(error)}): run gcloud auth application-default login"
        if isinstance(error, PreconditionFailed):
            return CHANGED
        if isinstance(error, Forbidden):
            return f"no permission for {uri}/{self.prefix}: grant roles/storage.objectUser on the bucket"
        return interrupted(uri, error)

    def matches(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        blob = self.bucket.get_blob(f"{self.prefix}/{key}", retry=self.retry)
        return blob is not None and (blob.metadata or {}).get(METADATA_KEY) == fingerprint(parts)

    def objects(self, folder: str = "") -> dict[str, Stored]:
        blobs = self.bucket.list_blobs(prefix=f"{self.prefix}/{folder and folder + '/'}", retry=self.retry)
        return {blob.name.removeprefix(f"{self.prefix}/"): Stored(blob.size, blob.updated) for blob in blobs}

    def delete(self, key: str) -> None:
        self.bucket.blob(f"{self.prefix}/{key}").delete(retry=self.retry)

    def abandon(self, folder: str) -> int:
        return 0  # parts are objects

    def put(self, key: str, data: bytes, part: Part) -> None:
        blob = self.bucket.blob(f"{self.prefix}/{key}")
        blob.metadata = {METADATA_KEY: fingerprint([part])}
        blob.upload_from_string(
            data, "application/octet-stream", checksum="crc32c", if_generation_match=NEW, retry=self.retry
        )

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> Upload:
        return _GoogleUpload(self, key, path, parts)


class _GoogleUpload:
    """Parts, and what is composed of them on the way, have names that their content decides. So another upload at the
    same time, of another file or of this one, cannot put anything else in their place."""

    def __init__(self, store: GoogleStore, key: str, path: Path, parts: Sequence[Part]):
        self._store, self._key, self._path, self._parts = store, key, path, parts
        self._folder = f"{UNFINISHED}/{key}"
        there = store.objects(self._folder)
        self.done = {part.number for part in parts if self._name(part) in there}

    def put(self, part: Part, data: bytes) -> None:
        with contextlib.suppress(PreconditionFailed):  # another upload has put it there meanwhile
            self._store.put(self._name(part), data, part)

    def finish(self) -> None:
        try:
            composed = self._compose_all()
        except (PreconditionFailed, NotFound):
            # Another upload has made the object, and perhaps removed the parts that this one counted on. Or one broke
            # off before it could verify what it had made.
            there = self._store.bucket.get_blob(self._blob(self._key).name, retry=self._store.retry)
            if there is None:
                raise
            self._verify(there)
        else:
            try:
                self._verify(composed)
            except DataLoss:
                composed.delete(if_generation_match=composed.generation, retry=self._store.retry)
                raise
        for name in self._store.objects(self._folder):
            with contextlib.suppress(NotFound):  # another upload has removed it
                self._store.delete(name)

    def _compose_all(self) -> Any:
        names = [self._name(part) for part in self._parts]
        # What was composed may be composed again.
        while len(names) > MAX_COMPOSED:
            group, names = names[:MAX_COMPOSED], names[MAX_COMPOSED:]
            name = f"{self._folder}/composed-{hashlib.sha256(' '.join(group).encode()).hexdigest()}"
            with contextlib.suppress(PreconditionFailed):
                self._compose(group, name)
            names.insert(0, name)
        return self._compose(names, self._key)

    def _compose(self, names: Sequence[str], key: str) -> Any:
        composed = self._blob(key)
        composed.content_type = "application/octet-stream"
        composed.compose([self._blob(name) for name in names], if_generation_match=NEW, retry=self._store.retry)
        return composed

    def _verify(self, composed: Any) -> None:
        """Put the fingerprint, by which it is recognized, on an object that has the file's size and CRC32C."""
        checksum = google_crc32c.Checksum()
        for part in self._parts:
            checksum.update(part.read(self._path))
        expected = (sum(part.size for part in self._parts), base64.b64encode(checksum.digest()).decode())
        if (composed.size, composed.crc32c) != expected:
            raise DataLoss(f"what Google composed is not {self._path.name}: {composed.size} bytes, not {expected[0]}")
        composed.metadata = {METADATA_KEY: fingerprint(self._parts)}
        composed.patch(if_generation_match=composed.generation, retry=self._store.retry)

    def _name(self, part: Part) -> str:
        return f"{self._folder}/{part.number:05}-{part.sha256.hex()}"

    def _blob(self, key: str) -> Any:
        return self._store.bucket.blob(f"{self._store.prefix}/{key}")
