"""Print the manifests of an InferenceService, with memory, disk and probes reckoned from the checkpoint.

They are deploy/classic.yaml, or deploy/runtime.yaml with deploy/inference-service.yaml, and what a file in
deploy/variants merges into them.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from handler.settings import read_settings
from scripts.archive import FORMATS, ROOT, startup_seconds
from scripts.console import UserError, parse_gpus, run
from scripts.plan import Plan, make_plan
from scripts.stores import parse_uri

DEPLOY = ROOT / "deploy"
# The tag is the version in pyproject.toml: the manifests name modules of the image, so both must be of one version.
IMAGE = "torchserve-large-models:0.2.0"
PLACEHOLDER = "bloom"  # stands for the model's name in deploy/
SHARED_MEMORY = 256 * 2**20


@dataclass(frozen=True)
class Service:
    """What the manifests are rendered for."""

    name: str
    storage_uri: str
    plan: Plan
    archive_format: str = "zip-store"
    image: str = IMAGE
    cpus: int = 4
    replicas: int = 1
    max_replicas: int | None = None
    namespace: str | None = None


def variants() -> list[str]:
    return ["classic", "runtime", *sorted(path.stem for path in (DEPLOY / "variants").glob("*.yaml"))]


def manifests(service: Service, variant: str = "runtime") -> list[dict[str, Any]]:
    """The documents to apply, in order."""
    documents = _assembled(variant, service)
    for document in documents:
        if fill := _FILL.get(document["kind"]):
            fill(document, service)
        if service.namespace:
            document["metadata"]["namespace"] = service.namespace
    return documents


def _assembled(variant: str, service: Service) -> list[dict[str, Any]]:
    """The documents as they stand in deploy/. A variant's are its own, then those of its base; its changes are merged
    into the last one, the InferenceService."""
    if variant == "classic":
        return _load("classic.yaml", service)
    if variant == "runtime":
        return _load("runtime.yaml", service) + _load("inference-service.yaml", service)
    (own,) = _load(f"variants/{variant}.yaml", service)
    *others, inference_service = _assembled(own["base"], service)
    return [*own.get("documents", []), *others, _merged(inference_service, own["merge"])]


def _load(name: str, service: Service) -> list[dict[str, Any]]:
    """The documents of a file in deploy/, under the model's name."""
    return _renamed(list(yaml.safe_load_all((DEPLOY / name).read_text())), service.name)


def _renamed(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, name) for item in value]
    return value.replace(PLACEHOLDER, name) if isinstance(value, str) else value


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], changes[key]) for key in base.keys() & changes.keys() if isinstance(base[key], dict)
    }
    return base | changes | both


def _fill_runtime(document: dict[str, Any], service: Service) -> None:
    (container,) = document["spec"]["containers"]
    container["image"] = service.image
    tmp = next(volume for volume in document["spec"]["volumes"] if volume["name"] == "tmp")
    tmp["emptyDir"]["sizeLimit"] = _gibibytes(service.plan.disk_request(service.archive_format))
    for probe in (container["startupProbe"], container["livenessProbe"]):
        probe["failureThreshold"] = math.ceil(_startup(service) / probe["periodSeconds"])


def _fill_inference_service(document: dict[str, Any], service: Service) -> None:
    predictor = document["spec"]["predictor"]
    model = predictor.get("pytorch") or predictor["model"]
    predictor["minReplicas"] = service.replicas
    predictor["maxReplicas"] = service.max_replicas or max(predictor["maxReplicas"], service.replicas)
    model["resources"] = _resources(service)
    model["storageUri"] = service.storage_uri
    if "pytorch" in predictor:
        repository, tag = _split_tag(service.image)
        model["image"], model["runtimeVersion"] = repository, tag
        document["metadata"]["annotations"]["serving.knative.dev/progress-deadline"] = f"{_startup(service)}s"


def _fill_claim(document: dict[str, Any], service: Service) -> None:
    document["metadata"]["name"] = service.storage_uri.split("/")[2]
    document["spec"]["resources"]["requests"]["storage"] = _gibibytes(service.plan.checkpoint_bytes)


_FILL = {
    "ServingRuntime": _fill_runtime,
    "InferenceService": _fill_inference_service,
    "PersistentVolumeClaim": _fill_claim,
}


def _startup(service: Service) -> int:
    return startup_seconds(service.plan.checkpoint_bytes)


def _resources(service: Service) -> dict[str, dict[str, str]]:
    """Memory is a limit too: the plan knows what the model needs, and no other pod should pay for a mistake in it."""
    plan = service.plan
    disk = plan.disk_request(service.archive_format)
    if not service.storage_uri.startswith("pvc://"):
        disk += plan.checkpoint_bytes  # fetched by the storage initializer
    amounts = {"memory": _gibibytes(plan.memory_request + SHARED_MEMORY)}
    if plan.gpus:
        amounts["nvidia.com/gpu"] = str(len(plan.gpus))
    return {
        "requests": {"cpu": str(service.cpus), "ephemeral-storage": _gibibytes(disk), **amounts},
        "limits": amounts,
    }


def _split_tag(image: str) -> tuple[str, str]:
    repository, colon, tag = image.rpartition(":")
    if not colon or "/" in tag:
        raise UserError(f"IMAGE is {image!r}: give it with its tag, such as {IMAGE}")
    return repository, tag


def _gibibytes(count: float) -> str:
    return f"{math.ceil(count / 2**30)}Gi"


def check(service: Service, variant: str) -> None:
    """Raises UserError for a name that Kubernetes, or a storageUri that KServe, could not read."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", service.name):
        raise UserError(
            f"MODEL_NAME is {service.name!r}: Kubernetes wants at most 40 lower-case letters, digits and hyphens, "
            "such as bloom-7b1; archive it under such a name with make archive MODEL_NAME=…"
        )
    uri = service.storage_uri
    if re.fullmatch(r"pvc://[^/]+/.+", uri):
        return
    if any(document["kind"] == "PersistentVolumeClaim" for document in _assembled(variant, service)):
        raise UserError(f"STORAGE_URI is {uri!r}: for the variant {variant} write pvc://CLAIM/PATH")
    if parse_uri(uri)[0] == "file":
        raise UserError(f"STORAGE_URI is {uri!r}, which no pod can read; for a volume write pvc://CLAIM/PATH")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="manifest", description=__doc__.splitlines()[0])
    parser.add_argument("--model-name", required=True, help="as it was archived")
    parser.add_argument(
        "--model-dir", type=Path, required=True, help="the checkpoint, or a folder with its config.json"
    )
    parser.add_argument("--storage-uri", required=True, help="as it was uploaded; pvc://CLAIM/PATH for a volume")
    parser.add_argument("--variant", choices=variants(), default="runtime")
    parser.add_argument("--setup-config", type=Path, default=ROOT / "setup_config.json")
    parser.add_argument("--archive-format", choices=FORMATS, default="zip-store")
    parser.add_argument("--gpus", default="0", help="of a pod: 1x16GiB; 2x16GiB (default: none)")
    parser.add_argument("--cpus", type=int, default=4, help="of a pod (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=1, help="at least (default: %(default)s)")
    parser.add_argument("--max-replicas", type=int, help="at most (default: the variant's)")
    parser.add_argument("--image", default=IMAGE, help="of deploy/Dockerfile, in your registry (default: %(default)s)")
    parser.add_argument("--namespace")
    args = parser.parse_args(argv)
    plan = make_plan(args.model_dir, read_settings(args.setup_config), parse_gpus(args.gpus))
    service = Service(
        args.model_name,
        args.storage_uri,
        plan,
        args.archive_format,
        args.image,
        args.cpus,
        args.replicas,
        args.max_replicas,
        args.namespace,
    )
    check(service, args.variant)
    if plan.missing:
        print(f"warning: {plan.verdict} (make plan says what would)", file=sys.stderr)
    print(yaml.safe_dump_all(manifests(service, args.variant), sort_keys=False), end="")


if __name__ == "__main__":
    sys.exit(run(main))
