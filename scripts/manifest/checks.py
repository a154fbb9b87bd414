"""What the cluster would refuse, could not read or is too old for, said before anything is applied."""

import re

from scripts.console import UserError
from scripts.plan import parallel
from scripts.stores import LEAST_KSERVE, check_kserve, is_older, parse_uri

from .service import Service
from .variants import LEAST_KSERVE_OF, ON_VLLM, choose

KNATIVE_TIMEOUT = 600  # max-revision-timeout-seconds, unless the cluster's administrator raised it


def check(service: Service, variant: str) -> None:
    """Raises UserError for what Kubernetes or KServe would refuse, or could not read."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", service.name):
        raise UserError(
            f"MODEL_NAME is {service.name!r}: Kubernetes wants at most 40 lower-case letters, digits and hyphens, "
            "such as bloom-7b1; archive it under such a name with make archive MODEL_NAME=…"
        )
    base, chosen = choose(variant)
    _check_uri(service, base, chosen)
    own = [name for name in chosen if name in ("s3", "gs", "azure")]
    if service.service_account and own:
        raise UserError(
            f"SERVICE_ACCOUNT names an account that is there and VARIANT={own[0]} makes one: give one of them"
        )
    if "keda" in chosen and not service.namespace:
        raise UserError("VARIANT=keda needs NAMESPACE=…: Prometheus knows the models of all namespaces")
    if "loader" in chosen and not service.source_uri:
        raise UserError("VARIANT=loader needs SOURCE_URI=…: where make upload put the archive")
    if base in ON_VLLM:
        _check_on_vllm(service, base)


def _check_uri(service: Service, base: str, chosen: list[str]) -> None:
    uri = service.storage_uri
    scheme = uri.partition("://")[0]
    if "pvc" in chosen and scheme != "pvc":
        raise UserError(f"STORAGE_URI is {uri!r}: for the variant pvc write pvc://CLAIM/PATH")
    if base == "distributed" and scheme not in ("pvc", "oci"):
        raise UserError(f"STORAGE_URI is {uri!r}: for several nodes KServe takes pvc://CLAIM/PATH or oci://IMAGE alone")
    if base == "llm" and scheme not in ("pvc", "oci", "s3"):
        raise UserError(f"STORAGE_URI is {uri!r}: an LLMInferenceService takes pvc://, oci:// and s3:// alone")
    if "local-cache" in chosen and scheme in ("pvc", "oci"):
        raise UserError(f"STORAGE_URI is {uri!r}: a node caches what is fetched from gs://, s3:// or Azure Blob")
    if re.fullmatch(r"pvc://[^/]+/.+", uri) or re.fullmatch(r"oci://[^/]+/.+", uri):
        return
    if parse_uri(uri)[0] == "file":
        raise UserError(f"STORAGE_URI is {uri!r}, which no pod can read; for a volume write pvc://CLAIM/PATH")


def _check_on_vllm(service: Service, base: str) -> None:
    plan = service.plan
    if plan.quantization == "plain-int":
        raise UserError(
            "int8 and int4 checkpoints of make shard are in a format of this package, which vLLM does not read: "
            "upload the checkpoint that they were made of"
        )
    if service.storage_uri.startswith("oci://") and service.archive_format == "no-archive":
        raise UserError(
            f"STORAGE_URI is {service.storage_uri!r}: in an image vLLM looks for a checkpoint, not for a release; "
            "build one of the checkpoint's folder and leave ARCHIVE_FORMAT out"
        )
    split = parallel(plan)
    if split is None:
        raise UserError(f"VARIANT={base} needs GPUS=…, those of a node, such as 4x80GiB or 8xH100")
    if base == "llm" and split.pipeline > 1:
        raise UserError(
            f"it needs {split.pipeline} nodes of {split.tensor} GPUs, for which KServe comes with no "
            "LLMInferenceServiceConfig: VARIANT=distributed"
        )


def check_version(service: Service, variant: str, kserve: str) -> None:
    """Raises UserError when a cluster with a KServe of this version, such as 0.16.1, could not run it."""
    if service.downloads:
        check_kserve(service.storage_uri, kserve)
    base, chosen = choose(variant)
    for name in (base, *chosen):
        least = LEAST_KSERVE_OF.get(name, LEAST_KSERVE)
        if is_older(kserve, least):
            raise UserError(f"KServe {kserve} is too old for VARIANT={name}: use {least} or newer")


def warnings(service: Service, variant: str) -> list[str]:
    """What the cluster's administrator must have seen to."""
    base, _ = choose(variant)
    lines = []
    if base in ON_VLLM and service.auth != "none":
        lines.append(f"VARIANT={base} asks for no key: let a mesh or a gateway decide who may call, and say AUTH=none")
    if base in ("knative", "classic"):
        if service.longest_answer > KNATIVE_TIMEOUT:
            lines.append(
                f"Knative refuses a timeout of {service.longest_answer} s unless max-revision-timeout-seconds is so"
            )
        if service.node_selector:
            lines.append("Knative refuses a node selector unless kubernetes.podspec-nodeselector is enabled")
        if service.tolerations:
            lines.append("Knative refuses tolerations unless kubernetes.podspec-tolerations is enabled")
    return lines
