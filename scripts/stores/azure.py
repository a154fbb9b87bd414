"""https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH: Azure Blob Storage."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from azure.core import MatchConditions
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceNotFoundError,
)
from azure.identity import DefaultAzureCredential
from azure.storage.blob import BlobBlock, ContainerClient

from scripts.console import UserError

from .base import CHANGED, METADATA_KEY, RETRIES, Part, Stored, Upload, fingerprint, interrupted

REFUSED = (
    "AuthenticationFailed",
    "AuthorizationFailure",
    "InvalidAuthenticationInfo",
    "NoAuthenticationInformation",
)


class AzureStore:
    """A container; objects are block blobs."""

    def __init__(self, account_url: str, container: str, prefix: str):
        # The first is the name that KServe's storage initializer reads.
        secret = os.environ.get("AZURE_STORAGE_ACCESS_KEY") or os.environ.get("AZURE_STORAGE_SAS_TOKEN")
        credential = secret or _identity()
        retries: dict[str, Any] = {"retry_total": RETRIES, "initial_backoff": 1, "increment_base": 2}
        self._container: Any = ContainerClient(account_url, container, credential=credential, **retries)
        self._account_url, self._prefix = account_url, prefix

    def errors(self) -> tuple[type[Exception], ...]:
        return (AzureError,)

    def explain(self, error: Exception) -> str:
        name = self._container.container_name
        code = getattr(error, "error_code", "")
        code = str(getattr(code, "value", code))  # an enumeration's, when it is one that Azure documents
        if code == "ContainerNotFound":
            return f"there is no container {name}: make it (az storage container create --name {name}) or name another"
        if isinstance(error, ResourceExistsError):
            return CHANGED
        if code in REFUSED:
            return f"Azure refuses the credentials ({code}): set AZURE_STORAGE_ACCESS_KEY to the account's key"
        if isinstance(error, HttpResponseError) and error.status_code == 403:
            return f"no permission for {self._account_url}/{name} ({code}): grant Storage Blob Data Contributor on it"
        return interrupted(self._account_url, error)

    def matches(self, key: str, path: Path, parts: Sequence[Part]) -> bool:
        try:
            return self._blob(key).get_blob_properties().metadata.get(METADATA_KEY) == fingerprint(parts)
        except ResourceNotFoundError as error:
            if getattr(error, "error_code", None) == "ContainerNotFound":
                raise
            return False

    def objects(self, folder: str = "") -> dict[str, Stored]:
        blobs = self._container.list_blobs(name_starts_with=f"{self._prefix}/{folder and folder + '/'}")
        return {blob.name.removeprefix(f"{self._prefix}/"): Stored(blob.size, blob.last_modified) for blob in blobs}

    def delete(self, key: str) -> None:
        self._blob(key).delete_blob()

    def abandon(self, folder: str) -> int:
        return 0  # Azure lists no blob that has uncommitted blocks alone, and drops them after a week

    def put(self, key: str, data: bytes, part: Part) -> None:
        self._blob(key).upload_blob(
            data, overwrite=False, metadata={METADATA_KEY: fingerprint([part])}, validate_content=True
        )

    def begin(self, key: str, path: Path, parts: Sequence[Part]) -> Upload:
        return _AzureUpload(self._blob(key), parts)

    def _blob(self, key: str) -> Any:
        return self._container.get_blob_client(f"{self._prefix}/{key}")


class _AzureUpload:
    """Blocks, uncommitted until all are there. A block's id is the number and the SHA-256 of its part."""

    def __init__(self, blob: Any, parts: Sequence[Part]):
        self._blob, self._parts = blob, parts
        there: set[str] = set()
        with contextlib.suppress(ResourceNotFoundError):
            there = {block.id for block in blob.get_block_list("uncommitted")[1]}
        self.done = {part.number for part in parts if self._id(part) in there}

    def put(self, part: Part, data: bytes) -> None:
        self._blob.stage_block(self._id(part), data, length=len(data), validate_content=True)

    def finish(self) -> None:
        blocks = [BlobBlock(self._id(part)) for part in self._parts]
        metadata = {METADATA_KEY: fingerprint(self._parts)}
        self._blob.commit_block_list(blocks, metadata=metadata, match_condition=MatchConditions.IfMissing)

    @staticmethod
    def _id(part: Part) -> str:
        return f"{part.number:05}-{part.sha256.hex()[:32]}"


def _identity() -> Any:
    """The identity of az login, a virtual machine or the environment.

    It is asked for a token at once, because the store's client would retry when there is none. Raises UserError then.
    """
    credential = DefaultAzureCredential()
    try:
        credential.get_token("https://storage.azure.com/.default")
    except ClientAuthenticationError:
        raise UserError(
            "no Azure credentials: run az login, or set AZURE_STORAGE_ACCESS_KEY to the account's key"
        ) from None
    return credential
