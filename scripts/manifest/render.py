"""The documents of deploy/, filled with what a service needs."""

import copy
import hashlib
import math
import re
from typing import Any

import yaml

from scripts.archive import STARTUP_BYTES_PER_SECOND
from scripts.console import UserError
from scripts.plan import parallel

from .service import IMAGE, Service
from .variants import BASES, DEPLOY, choose

PLACEHOLDER, NAMESPACE = "bloom", "NAMESPACE"  # stand for the model's name and the namespace in deploy/
SHARED_MEMORY = 256 * 2**20
# Of Knative's queue proxy, through which all requests go, and which its autoscaler asks: HTTP, HTTP/2, HTTPS, metrics.
KNATIVE_PORTS = (8012, 8013, 8112, 9090, 9091)
CLUSTER_WIDE = ("LocalModelCache",)


def manifests(service: Service, variant: str = "runtime") -> list[dict[str, Any]]:
    """The documents to apply, in order.

    variant: one of `variants()`, or several with commas between them. Raises UserError for those that do not go
    together.
    """
    base, chosen = choose(variant)
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
    document["metadata"]["name"], _ = service.volume
    # Two releases, the one before this too; and a claim cannot shrink.
    wanted = max(2 * service.plan.checkpoint_bytes, service.claim_bytes)
    document["spec"]["resources"]["requests"]["storage"] = _gibibytes(wanted)


def _fill_loader(document: dict[str, Any], service: Service, base: str) -> None:
    assert service.source_uri  # check() has seen to it
    claim, path = service.volume
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


def _gibibytes(count: float) -> str:
    return f"{math.ceil(count / 2**30)}Gi"
