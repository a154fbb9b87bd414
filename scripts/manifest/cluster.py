"""What is asked of the cluster, and put there, with kubectl."""

import json
import secrets
import subprocess

from handler.settings import parse_size
from scripts.console import UserError

from .service import Service


def claim_bytes(service: Service) -> int:
    """What a claim asks for that is in the cluster already; 0 where there is none."""
    found = _kubectl("get", "pvc", service.volume[0], *_namespace(service), "--ignore-not-found", "-o", "json")
    return parse_size(json.loads(found)["spec"]["resources"]["requests"]["storage"]) if found.strip() else 0


def make_key(service: Service) -> None:
    """The Secret with the key that requests must bring, unless there is one."""
    name = f"{service.name}-api-key"
    if _kubectl("get", "secret", name, *_namespace(service), "--ignore-not-found", "-o", "name").strip():
        return
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "type": "Opaque",
        "stringData": {"API_KEY": secrets.token_hex(32)},
    }
    print(_kubectl("create", *_namespace(service), "-f", "-", content=json.dumps(secret)), end="")


def apply(documents: str) -> None:
    """documents: as YAML. Raises UserError where there is no kubectl, as all functions here do."""
    print(_kubectl("apply", "-f", "-", content=documents), end="")


def _kubectl(*arguments: str, content: str | None = None) -> str:
    try:
        return subprocess.run(
            ["kubectl", *arguments], input=content, check=True, stdout=subprocess.PIPE, stderr=None, text=True
        ).stdout
    except FileNotFoundError:
        raise UserError("kubectl is not on the PATH; make manifest prints what it would apply") from None


def _namespace(service: Service) -> list[str]:
    return ["-n", service.namespace] if service.namespace else []
