"""gs://BUCKET/PATH: Google Cloud Storage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, Unauthorized
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

from handler.errors import first_line
from scripts.console import UserError

from .base import METADATA_KEY, RETRIES, UNFINISHED, Part, Upload, fingerprint, interrupted

MAX_COMPOSED = 32  # objects that one request can compose


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
        if isinstance(error, Forbidden):
            return f"no permission for {uri}/{self.prefix}: grant roles/storage.objectUser on the bucket"
        return interrupted(uri, error)

    def matches(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        blob = self.bucket.get_blob(f"{self.prefix}/{key}", retry=self.retry)
        return blob is not None and (blob.metadata or {}).get(METADATA_KEY) == fingerprint(parts)

    def keys(self, folder: str) -> list[str]:
        blobs = self.bucket.list_blobs(prefix=f"{self.prefix}/{folder}/", retry=self.retry)
        return [blob.name.removeprefix(f"{self.prefix}/") for blob in blobs]

    def delete(self, key: str) -> None:
        self.bucket.blob(f"{self.prefix}/{key}").delete(retry=self.retry)

    def put(self, key: str, data: bytes, part: Part) -> None:
        blob = self.bucket.blob(f"{self.prefix}/{key}")
        blob.metadata = {METADATA_KEY: fingerprint([part])}
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
        # What was composed may be composed again.
        while len(blobs) > 1:
            group, blobs = blobs[:MAX_COMPOSED], blobs[MAX_COMPOSED:]
            composed = self._blob(f"{self._folder}/composed-{len(blobs)}" if blobs else self._key)
            composed.metadata = {METADATA_KEY: fingerprint(self._parts)}
            composed.content_type = "application/octet-stream"
            composed.compose(group, retry=self._store.retry)
            blobs.insert(0, composed)
        for name in self._store.keys(self._folder):
            self._store.delete(name)

    def _name(self, part: Part) -> str:
        return f"{self._folder}/{part.number:05}-{part.sha256.hex()}"

    def _blob(self, key: str) -> Any:
        return self._store.bucket.blob(f"{self._store.prefix}/{key}")
