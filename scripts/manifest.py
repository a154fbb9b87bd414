"""Print the manifests of an InferenceService, with memory, disk and probes reckoned from the checkpoint; or apply them.

They are those of a base in deploy/, and what the files in deploy/variants add that VARIANT names, in its order:
documents of their own, and changes that are merged into the InferenceService.
"""

import argparse
import copy
import hashlib
import json
import math
import re
import secrets
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from handler.settings import parse_size, read_settings
from scripts.archive import FORMATS, ROOT, STARTUP_BYTES_PER_SECOND, startup_seconds
from scripts.console import UserError, parse_gpus, parse_size_option, run
from scripts.plan import Plan, make_plan, parallel
from scripts.releases import newest, release_uri
from scripts.stores import LEAST_KSERVE, check_kserve, is_older, parse_uri

DEPLOY = ROOT / "deploy"
# The tag is the version in pyproject.toml: the manifests name modules of the image, so both must be of one version.
IMAGE = "torchserve-large-models:0.2.0"
PLACEHOLDER, NAMESPACE = "bloom", "NAMESPACE"  # stand for the model's name and the namespace in deploy/
SHARED_MEMORY = 256 * 2**20
BASES = {  # what each is made of; the last document is the service
    "runtime": ["network-policy.yaml", "runtime.yaml", "inference-service.yaml"],
    "knative": ["network-policy.yaml", "runtime.yaml", "knative.yaml"],
    "classic": ["network-policy.yaml", "classic.yaml"],
    "distributed": ["distributed.yaml"],
    "llm": ["llm.yaml"],
}
ON_VLLM = ("distributed", "llm")
# Of Knative's queue proxy, through which all requests go, and which its autoscaler asks: HTTP, HTTP/2, HTTPS, metrics.
KNATIVE_PORTS = (8012, 8013, 8112, 9090, 9091)
KNATIVE_TIMEOUT = 600  # max-revision-timeout-seconds, unless the cluster's administrator raised it
LEAST_GRACE, MOST_GRACE = 120, 3600  # seconds that a pod gets to answer what it has begun
CLUSTER_WIDE = ("LocalModelCache",)
AUTH = ("api-key", "none")  # as server/container.py knows them
LEAST_KSERVE_OF = {"local-cache": "0.15", "keda": "0.16", "distributed": "0.16", "llm": "0.16"}


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
    service_account: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, str]] = field(default_factory=list)
    gpu_resource: str = "nvidia.com/gpu"
    source_uri: str | None = None  # what the loader fills the volume from
    claim_bytes: int = 0  # of a volume claim that is there
    s3: dict[str, str] = field(default_factory=dict)  # "region", "endpoint", "role"
    node_group: str = "workers"
    prometheus: str | None = None
    auth: str = AUTH[0]

    @property
    def downloads(self) -> bool:
        """Whether the pod fetches the archive before it starts."""
        return not self.storage_uri.startswith(("pvc://", "oci://"))

    @property
    def startup(self) -> int:
        """Seconds that the container gets to unpack and load."""
        return startup_seconds(self.plan.checkpoint_bytes)

    @property
    def longest_answer(self) -> int:
        """Seconds after which a request may be given up: the wait in the queue, then twice the time that the steps of a
        default answer take at least."""
        settings = self.plan.settings
        steps = settings.max_new_tokens + math.ceil(self.plan.max_sequence_length / settings.prefill_chunk)
        return max(600, math.ceil(settings.max_wait + 2 * steps * self.plan.seconds_a_step))

    @property
    def grace(self) -> int:
        return min(max(LEAST_GRACE, self.longest_answer + 10 if self.plan.offloaded else 0), MOST_GRACE)


def variants() -> list[str]:
    return [*BASES, *sorted(path.stem for path in (DEPLOY / "variants").glob("*.yaml"))]


def manifests(service: Service, variant: str = "runtime") -> list[dict[str, Any]]:
    """The documents to apply, in order.

    variant: one of `variants()`, or several with commas between them. Raises UserError for those that do not go
    together.
    """
    base, chosen = _chosen(variant)
    documents = [document for name in BASES[base] for document in _load(name, service)]
    own: dict[tuple[str, str], dict[str, Any]] = {}
    for one in chosen:
        (content,) = _load(f"variants/{one}.yaml", service)
        documents[-1] = _merged(documents[-1], content["merge"])
        for document in content.get("documents", []):  # two variants may bring the same one
            own[document["kind"], document["metadata"]["name"]] = document
    documents = [*own.values(), *documents]
    for document in documents:
        if fill := _FILL.get(document["kind"]):
            fill(document, service, base)
        if service.namespace and document["kind"] not in CLUSTER_WIDE:
            document["metadata"]["namespace"] = service.namespace
    return documents


def _chosen(variant: str) -> tuple[str, list[str]]:
    """The base that a choice of variants runs on, and those that change it."""
    chosen: list[str] = []
    for name in variant.replace(" ", "").split(","):
        if name not in variants():
            raise UserError(f"VARIANT is {variant!r}: {name!r} is none of {', '.join(variants())}")
        chosen += [one for one in [*_implied(name), name] if one not in chosen]
    bases = [name for name in chosen if name in BASES]
    chosen = [name for name in chosen if name not in BASES]
    allowed = bases[:1] or list(BASES)
    for name in chosen:
        allowed = [base for base in allowed if base in _variant(name)["bases"]]
    if not allowed or len(bases) > 1:
        runs_on = [f"{name} on {' or '.join(_variant(name)['bases'])}" for name in chosen]
        raise UserError(f"VARIANT is {variant!r}, which does not go together: {', '.join([*bases, *runs_on])}")
    return allowed[0], chosen


def _variant(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / f"variants/{name}.yaml").read_text())


def _implied(name: str) -> list[str]:
    return [] if name in BASES else _variant(name).get("with", [])


def _load(name: str, service: Service) -> list[dict[str, Any]]:
    """The documents of a file in deploy/, under the model's name."""
    return [_renamed(document, service) for document in yaml.safe_load_all((DEPLOY / name).read_text())]


def _renamed(value: Any, service: Service) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, service) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, service) for item in value]
    if isinstance(value, str):
        return value.replace(PLACEHOLDER, service.name).replace(NAMESPACE, service.namespace or "default")
    return value


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], changes[key]) for key in base.keys() & changes.keys() if isinstance(base[key], dict)
    }
    return base | changes | both


# one function for each kind of document that has rendered parts


def _fill_runtime(document: dict[str, Any], service: Service, base: str) -> None:
    (container,) = document["spec"]["containers"]
    container["image"] = service.image
    container["env"] = _with_auth(container["env"], service)
    if service.plan.gpus:
        container["env"].append({"name": "REQUIRE_GPUS", "value": str(len(service.plan.gpus))})
    tmp = next(volume for volume in document["spec"]["volumes"] if volume["name"] == "tmp")
    tmp["emptyDir"]["sizeLimit"] = _gibibytes(service.plan.disk_request(service.archive_format))
    for probe in (container["startupProbe"], container["livenessProbe"]):
        probe["failureThreshold"] = math.ceil(service.startup / probe["periodSeconds"])
    container["lifecycle"]["preStop"]["exec"]["command"][-1] = str(service.grace - 10)
    if base == "knative":  # what it refuses
        del container["lifecycle"], container["startupProbe"], container["ports"][1:]


def _with_auth(env: list[dict[str, Any]], service: Service) -> list[dict[str, Any]]:
    """The container's environment, in which a key is asked for unless the service goes without."""
    if service.auth == "api-key":
        return env
    return [entry for entry in env if entry["name"] != "API_KEY"] + [{"name": "AUTH", "value": service.auth}]


def _fill_inference_service(document: dict[str, Any], service: Service, base: str) -> None:
    predictor, annotations = document["spec"]["predictor"], document["metadata"]["annotations"]
    model = predictor.get("pytorch") or predictor["model"]
    predictor["minReplicas"] = service.replicas
    if service.service_account:
        predictor["serviceAccountName"] = service.service_account
    if service.node_selector:
        predictor["nodeSelector"] = service.node_selector
    if service.tolerations:
        predictor["tolerations"] = service.tolerations
    if base == "distributed":
        _fill_distributed(predictor, service)
        return
    predictor["timeout"] = service.longest_answer
    predictor["maxReplicas"] = service.max_replicas or max(predictor["maxReplicas"], service.replicas)
    model["resources"] = _resources(service)
    model["storageUri"] = service.storage_uri
    if base == "runtime":
        predictor["terminationGracePeriodSeconds"] = service.grace
        for name in ("read", "send"):
            annotations[f"nginx.ingress.kubernetes.io/proxy-{name}-timeout"] = str(service.longest_answer)
    else:
        download = service.plan.checkpoint_bytes // STARTUP_BYTES_PER_SECOND if service.downloads else 0
        annotations["serving.knative.dev/progress-deadline"] = f"{service.startup + download}s"
    if base == "classic":
        model["resources"]["limits"]["cpu"] = model["resources"]["requests"]["cpu"]
        model["env"] += [{"name": "REQUIRE_GPUS", "value": str(len(service.plan.gpus))}] if service.plan.gpus else []
        model["env"] = _with_auth(model["env"], service)
        _fill_image(model, service.image)
    if "autoScaling" in predictor:
        _fill_scaling(predictor["autoScaling"]["metrics"][0]["external"], service)


def _fill_image(model: dict[str, Any], image: str) -> None:
    """A predictor's image and its tag are two fields; with a digest KServe leaves the image as it is."""
    repository, colon, tag = image.rpartition(":")
    if not colon or "/" in tag:
        raise UserError(f"IMAGE is {image!r}: give it with its tag, such as {IMAGE}")
    if "@" in image:
        model["image"] = image
        del model["runtimeVersion"]
    else:
        model["image"], model["runtimeVersion"] = repository, tag


def _fill_scaling(external: dict[str, Any], service: Service) -> None:
    """As many sequences a pod as it has rows of the KV cache for, of half the most tokens each."""
    plan = service.plan
    rows = 2 * plan.kv_cache // (plan.kv_bytes_per_token * plan.max_sequence_length)
    external["target"]["value"] = str(max(1, min(plan.settings.max_batch_size, rows)))
    if service.prometheus:
        external["metric"]["serverAddress"] = service.prometheus


def _fill_distributed(predictor: dict[str, Any], service: Service) -> None:
    split = parallel(service.plan)
    assert split  # check() has seen to it
    resources = _resources_on_vllm(service, split.tensor)
    predictor["model"] |= {
        "storageUri": _checkpoint_uri(service),
        "args": [f"--max-model-len={service.plan.max_sequence_length}", f"--dtype={service.plan.dtype}"],
        "resources": resources,
    }
    worker = predictor["workerSpec"]
    worker["tensorParallelSize"], worker["pipelineParallelSize"] = split.tensor, split.pipeline
    worker["containers"][0]["resources"] = copy.deepcopy(resources)
    for name in ("nodeSelector", "tolerations"):
        if name in predictor:
            worker[name] = predictor[name]


def _fill_llm(document: dict[str, Any], service: Service, base: str) -> None:
    split = parallel(service.plan)
    assert split  # check() has seen to it
    spec = document["spec"]
    spec["model"]["uri"] = _checkpoint_uri(service)
    spec["replicas"] = service.replicas
    spec["parallelism"]["tensor"] = split.tensor
    template = spec["template"]
    template["containers"][0]["resources"] = _resources_on_vllm(service, split.tensor)
    for name, value in (
        ("serviceAccountName", service.service_account),
        ("nodeSelector", service.node_selector),
        ("tolerations", service.tolerations),
    ):
        if value:
            template[name] = value


def _fill_claim(document: dict[str, Any], service: Service, base: str) -> None:
    document["metadata"]["name"], _ = _volume(service)
    # Two releases, the one before this too; and a claim cannot shrink.
    wanted = max(2 * service.plan.checkpoint_bytes, service.claim_bytes)
    document["spec"]["resources"]["requests"]["storage"] = _gibibytes(wanted)


def _fill_loader(document: dict[str, Any], service: Service, base: str) -> None:
    assert service.source_uri  # check() has seen to it
    claim, path = _volume(service)
    document["metadata"]["name"] += _digest(service.source_uri, service.storage_uri)
    pod = document["spec"]["template"]["spec"]
    (container,), (volume,) = pod["containers"], pod["volumes"]
    container["args"][0] = service.source_uri
    container["volumeMounts"][0]["subPath"] = path
    volume["persistentVolumeClaim"]["claimName"] = claim
    if service.service_account:
        pod["serviceAccountName"] = service.service_account


def _digest(*texts: str) -> str:
    """The end of the name of what cannot be changed once it is applied."""
    return f"-{hashlib.sha256(' '.join(texts).encode()).hexdigest()[:8]}"


def _fill_network_policy(document: dict[str, Any], service: Service, base: str) -> None:
    if base == "runtime" or "ingress" not in document["spec"]:
        return
    ports = KNATIVE_PORTS if base == "knative" else (8080, *KNATIVE_PORTS)  # the classic one runs on either
    document["spec"]["ingress"][0]["ports"] = [{"port": port, "protocol": "TCP"} for port in ports]


def _fill_credentials(document: dict[str, Any], service: Service, base: str) -> None:
    annotations = document["metadata"].get("annotations")
    if annotations is None:
        return
    endpoint = service.s3.get("endpoint")
    if endpoint:
        annotations["serving.kserve.io/s3-endpoint"] = re.sub("^https?://", "", endpoint)
        annotations["serving.kserve.io/s3-usehttps"] = "0" if endpoint.startswith("http://") else "1"
    if "region" in service.s3:
        annotations["serving.kserve.io/s3-region"] = service.s3["region"]
    if document["kind"] == "ServiceAccount" and "role" in service.s3:
        annotations["eks.amazonaws.com/role-arn"] = service.s3["role"]


def _fill_cache(document: dict[str, Any], service: Service, base: str) -> None:
    if service.namespace:
        document["metadata"]["name"] = f"{service.namespace}-{service.name}"
    document["metadata"]["name"] += _digest(service.storage_uri)
    document["spec"] = {
        "sourceModelUri": service.storage_uri,
        "modelSize": _gibibytes(service.plan.checkpoint_bytes),
        "nodeGroups": [service.node_group],
    }


_FILL = {
    "ServingRuntime": _fill_runtime,
    "InferenceService": _fill_inference_service,
    "LLMInferenceService": _fill_llm,
    "PersistentVolumeClaim": _fill_claim,
    "Job": _fill_loader,
    "NetworkPolicy": _fill_network_policy,
    "Secret": _fill_credentials,
    "ServiceAccount": _fill_credentials,
    "LocalModelCache": _fill_cache,
}


def _resources(service: Service) -> dict[str, dict[str, str]]:
    """Memory is a limit too: the plan knows what the model needs, and no other pod should pay for a mistake in it."""
    plan = service.plan
    disk = plan.disk_request(service.archive_format)
    if service.downloads:
        disk += plan.checkpoint_bytes  # fetched by the storage initializer
    amounts = {"memory": _gibibytes(plan.memory_request + SHARED_MEMORY)}
    if plan.gpus:
        amounts[service.gpu_resource] = str(len(plan.gpus))
    return {
        "requests": {"cpu": str(service.cpus), "ephemeral-storage": _gibibytes(disk), **amounts},
        "limits": amounts.copy(),
    }


def _resources_on_vllm(service: Service, gpus: int) -> dict[str, dict[str, str]]:
    """Of a node's pod. Requests are limits too: KServe's runtime has limits of its own, which would be below them."""
    memory = service.plan.largest_shard * gpus + 8 * 2**30  # each process reads a shard at a time; CUDA, Ray
    amounts = {"cpu": str(service.cpus), "memory": _gibibytes(memory), service.gpu_resource: str(gpus)}
    return {"requests": amounts, "limits": amounts.copy()}


def _checkpoint_uri(service: Service) -> str:
    """Of the checkpoint in a no-archive folder that was uploaded; of a folder that is a checkpoint otherwise.

    With the slash at its end, because model-config.yaml lies beside it: see `release_uri`.
    """
    uri = service.storage_uri.rstrip("/")
    return f"{uri}/model-store/{service.name}/model/" if service.archive_format == "no-archive" else uri


def _volume(service: Service) -> tuple[str, str]:
    """Claim and path of pvc://CLAIM/PATH."""
    claim, _, path = service.storage_uri.removeprefix("pvc://").partition("/")
    return claim, path.strip("/")


def _gibibytes(count: float) -> str:
    return f"{math.ceil(count / 2**30)}Gi"


def check(service: Service, variant: str) -> None:
    """Raises UserError for what Kubernetes or KServe would refuse, or could not read."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", service.name):
        raise UserError(
            f"MODEL_NAME is {service.name!r}: Kubernetes wants at most 40 lower-case letters, digits and hyphens, "
            "such as bloom-7b1; archive it under such a name with make archive MODEL_NAME=…"
        )
    base, chosen = _chosen(variant)
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


def _with_releases(service: Service, variant: str, release: str | None, model_store: Path) -> Service:
    """The service of a release, or of the one that was uploaded last from here, with the URIs that KServe is given.

    An image is named by its tag, and a checkpoint that vLLM alone reads was put there by others.
    """
    base, _ = _chosen(variant)
    if service.storage_uri.startswith("oci://") or (base in ON_VLLM and service.archive_format != "no-archive"):
        if release:
            raise UserError(
                f"RELEASE is {release!r}, which make upload made; {service.storage_uri} is an image or a checkpoint: "
                "leave it out"
            )
        return service
    release = release or newest(model_store, service.name)
    source = service.source_uri and release_uri(service.source_uri, release)
    return replace(service, storage_uri=release_uri(service.storage_uri, release), source_uri=source)


def check_version(service: Service, variant: str, kserve: str) -> None:
    """Raises UserError when a cluster with a KServe of this version, such as 0.16.1, could not run it."""
    if service.downloads:
        check_kserve(service.storage_uri, kserve)
    base, chosen = _chosen(variant)
    for name in (base, *chosen):
        least = LEAST_KSERVE_OF.get(name, LEAST_KSERVE)
        if is_older(kserve, least):
            raise UserError(f"KServe {kserve} is too old for VARIANT={name}: use {least} or newer")


def warnings(service: Service, variant: str) -> list[str]:
    """What the cluster's administrator must have seen to."""
    base, _ = _chosen(variant)
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


def _kubectl(*arguments: str, content: str | None = None) -> str:
    try:
        return subprocess.run(
            ["kubectl", *arguments], input=content, check=True, stdout=subprocess.PIPE, stderr=None, text=True
        ).stdout
    except FileNotFoundError:
        raise UserError("kubectl is not on the PATH; make manifest prints what it would apply") from None


def _claim_bytes(service: Service) -> int:
    """What a claim asks for that is in the cluster already; 0 where there is none."""
    found = _kubectl("get", "pvc", _volume(service)[0], *_namespace(service), "--ignore-not-found", "-o", "json")
    return parse_size(json.loads(found)["spec"]["resources"]["requests"]["storage"]) if found.strip() else 0


def _make_key(service: Service) -> None:
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


def _namespace(service: Service) -> list[str]:
    return ["-n", service.namespace] if service.namespace else []


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
    base, chosen = _chosen(args.variant)
    if plan.missing and base not in ON_VLLM and not args.force:
        raise UserError(f"{plan.verdict} (make plan says what would; FORCE=1 goes on all the same)")
    for line in warnings(service, args.variant):
        print(f"warning: {line}", file=sys.stderr)
    if args.apply and "pvc" in chosen:
        service = replace(service, claim_bytes=_claim_bytes(service))
    text = yaml.safe_dump_all(manifests(service, args.variant), sort_keys=False)
    if not args.apply:
        print(text, end="")
        return
    if service.auth == "api-key" and base not in ON_VLLM:
        _make_key(service)
    print(_kubectl("apply", "-f", "-", content=text), end="")


if __name__ == "__main__":
    sys.exit(run(main))
