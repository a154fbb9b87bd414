"""Print the manifests of an InferenceService, with memory, disk and probes reckoned from the checkpoint; or apply them.

They are those of a base in deploy/, and what the files in deploy/variants add that VARIANT names, in its order:
documents of their own, and changes that are merged into the InferenceService.
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from handler.settings import read_settings
from scripts.archive import FORMATS, ROOT
from scripts.console import UserError, parse_gpus, parse_size_option, run
from scripts.plan import make_plan
from scripts.releases import newest, release_uri

from .checks import check, check_version, warnings
from .cluster import apply, claim_bytes, make_key
from .render import manifests
from .service import AUTH, IMAGE, Service
from .variants import ON_VLLM, choose, variants


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="manifest", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-name", required=True, help="as it was archived")
    add("--model-dir", type=Path, required=True, help="the checkpoint, or a folder with its config.json")
    add("--draft-model", type=Path, help="as it was archived: a small checkpoint that guesses tokens")
    add(
        "--storage-uri",
        required=True,
        help="as it was uploaded; pvc://CLAIM/PATH for a volume, oci://IMAGE for an image",
    )
    add("--release", help="of those there (default: the one that was uploaded last from here)")
    add("--model-store", type=Path, default=Path("model_store"), help="where make archive put it")
    add("--kserve", help="the cluster's version, such as 0.16, to refuse what it could not run")
    add("--variant", default="runtime", help=f"of {', '.join(variants())}; several with commas between them")
    add("--setup-config", type=Path, default=ROOT / "setup_config.json")
    add("--archive-format", choices=FORMATS, default="zip-store")
    add("--gpus", default="0", help="of a pod: 1xT4; 1x16GiB; 2x16GiB (default: none)")
    add("--gpu-resource", default="nvidia.com/gpu", help="what Kubernetes calls them (default: %(default)s)")
    add("--cpus", type=int, default=4, help="of a pod (default: %(default)s)")
    add("--cpu", help="the pod's memory, such as 32GiB; without it as much as the plan needs")
    add("--replicas", type=int, default=1, help="at least (default: %(default)s)")
    add("--max-replicas", type=int, help="at most (default: the variant's)")
    add("--image", default=IMAGE, help="of deploy/Dockerfile, in your registry (default: %(default)s)")
    add("--namespace")
    add("--service-account", help="one that is there and may read the archive")
    add("--node-selector", default="", help="KEY=VALUE,…, such as cloud.google.com/gke-accelerator=nvidia-tesla-t4")
    add("--tolerations", default="", help="KEY:NoSchedule,KEY=VALUE:NoSchedule,…")
    add("--source-uri", help="of the variant loader: where make upload put the archive")
    add("--s3-region")
    add("--s3-endpoint", help="of an S3 server that is not Amazon's; http://… for one without TLS")
    add("--s3-role", help="the ARN of a role that the service account takes, instead of keys")
    add("--node-group", default="workers", help="of the variant local-cache (default: %(default)s)")
    add("--prometheus", help="of the variant keda: its address (default: http://prometheus-operated.monitoring:9090)")
    add(
        "--auth",
        choices=AUTH,
        default=AUTH[0],
        help="none: serve whoever comes, for where a mesh or a gateway decides that (default: %(default)s)",
    )
    add("--force", action="store_true", help="also where the plan does not fit")
    add("--apply", action="store_true", help="with kubectl, instead of printing")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    cpu = parse_size_option("CPU", args.cpu) if args.cpu else None
    plan = make_plan(
        args.model_dir, read_settings(args.setup_config), parse_gpus(args.gpus), cpu, draft_dir=args.draft_model
    )
    s3 = {"region": args.s3_region, "endpoint": args.s3_endpoint, "role": args.s3_role}
    options: dict[str, Any] = {
        "archive_format": args.archive_format,
        "image": args.image,
        "cpus": args.cpus,
        "replicas": args.replicas,
        "max_replicas": args.max_replicas,
        "namespace": args.namespace,
        "service_account": args.service_account,
        "node_selector": parse_pairs("NODE_SELECTOR", args.node_selector) if args.node_selector else {},
        "tolerations": parse_tolerations(args.tolerations) if args.tolerations else [],
        "gpu_resource": args.gpu_resource,
        "source_uri": args.source_uri,
        "s3": {name: value for name, value in s3.items() if value},
        "node_group": args.node_group,
        "prometheus": args.prometheus,
        "auth": args.auth,
    }
    service = Service(args.model_name, args.storage_uri, plan, **options)
    check(service, args.variant)
    if args.kserve:
        check_version(service, args.variant, args.kserve)
    service = _with_releases(service, args.variant, args.release, args.model_store)
    base, chosen = choose(args.variant)
    if plan.missing and base not in ON_VLLM and not args.force:
        raise UserError(f"{plan.verdict} (make plan says what would; FORCE=1 goes on all the same)")
    for line in warnings(service, args.variant):
        print(f"warning: {line}", file=sys.stderr)
    if args.apply and "pvc" in chosen:
        service = replace(service, claim_bytes=claim_bytes(service))
    text = yaml.safe_dump_all(manifests(service, args.variant), sort_keys=False)
    if not args.apply:
        print(text, end="")
        return
    if service.auth == "api-key" and base not in ON_VLLM:
        make_key(service)
    apply(text)


def _with_releases(service: Service, variant: str, release: str | None, model_store: Path) -> Service:
    """The service of a release, or of the one that was uploaded last from here, with the URIs that KServe is given.

    An image is named by its tag, and a checkpoint that vLLM alone reads was put there by others.
    """
    base, _ = choose(variant)
    if service.storage_uri.startswith("oci://") or (base in ON_VLLM and service.archive_format != "no-archive"):
        if release:
            raise UserError(
                f"RELEASE is {release!r}, which make upload made; {service.storage_uri} is an image or a checkpoint: "
                "leave it out"
            )
        return service
    release = release or newest(model_store, service.name, service.source_uri or service.storage_uri)
    source = service.source_uri and release_uri(service.source_uri, release)
    return replace(service, storage_uri=release_uri(service.storage_uri, release), source_uri=source)


def parse_pairs(name: str, text: str) -> dict[str, str]:
    """`KEY=VALUE,…`. Raises UserError, with the option's name, for anything else."""
    pairs = [pair.strip().partition("=") for pair in text.split(",")]
    if not all(key and equals for key, equals, _ in pairs):
        raise UserError(f"{name} is {text!r}: write KEY=VALUE, several with commas between them")
    return {key: value for key, _, value in pairs}


def parse_tolerations(text: str) -> list[dict[str, str]]:
    """`KEY:EFFECT` or `KEY=VALUE:EFFECT`, several with commas between them, as kubectl taint has them."""
    tolerations = []
    for one in text.split(","):
        match = re.fullmatch(r"\s*([^=:\s]+)(?:=([^:]*))?:(NoSchedule|NoExecute|PreferNoSchedule)\s*", one)
        if not match:
            raise UserError(
                f"TOLERATIONS is {text!r}: write KEY:NoSchedule or KEY=VALUE:NoSchedule, as kubectl taint does"
            )
        value = {"operator": "Exists"} if match[2] is None else {"operator": "Equal", "value": match[2]}
        tolerations.append({"key": match[1], **value, "effect": match[3]})
    return tolerations


if __name__ == "__main__":
    sys.exit(run(main))
