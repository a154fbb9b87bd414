"""What KServe's controller and Kubernetes' API server do with our manifests, as far as a pod is concerned.

Read in KServe 0.13, 0.16 and 0.20 (pkg/controller/v1beta1/inferenceservice/utils: MergeRuntimeContainers, MergePodSpec;
config/runtimes/kserve-torchserve.yaml and kserve-huggingfaceserver-multinode.yaml), in Knative Serving 1.13 and 1.18
(pkg/apis/serving: fieldmask.go, k8s_validation.go), and in Kubernetes' pkg/apis/core/validation.
"""

import copy
from typing import Any

Json = dict[str, Any]

# The parts of KServe's own runtimes that a predictor is merged with, the same from 0.13 to 0.20.
TORCHSERVE = {
    "spec": {
        "containers": [
            {
                "name": "kserve-container",
                "image": "pytorch/torchserve-kfs:0.9.0",
                "args": [
                    "torchserve",
                    "--start",
                    "--model-store=/mnt/models/model-store",
                    "--ts-config=/mnt/models/config/config.properties",
                ],
                "env": [{"name": "TS_SERVICE_ENVELOPE", "value": "{{.Labels.serviceEnvelope}}"}],
                "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"cpu": "1", "memory": "2Gi"}},
            }
        ],
    }
}
_NODE = {
    "resources": {"requests": {"cpu": "2", "memory": "6Gi"}, "limits": {"cpu": "4", "memory": "12Gi"}},
    "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
}
_SHM = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "3Gi"}}]
MULTINODE = {
    "spec": {
        "containers": [{"name": "kserve-container", "args": ["--model_name={{.Name}}"], **_NODE}],
        "volumes": _SHM,
        "workerSpec": {"containers": [{"name": "worker-container", **_NODE}], "volumes": _SHM},
    }
}

_KEYS = {"env": "name", "ports": "containerPort", "volumeMounts": "mountPath", "volumes": "name"}
_POD_FIELDS_OF_A_RUNTIME = ("nodeSelector", "affinity", "tolerations", "volumes", "imagePullSecrets")
_POD_FIELDS = {  # of a predictor that go into the pod; the others are KServe's
    "serviceAccountName", "nodeSelector", "tolerations", "affinity", "volumes", "imagePullSecrets",
    "terminationGracePeriodSeconds", "automountServiceAccountToken",
}  # fmt: skip


def merged_pod(runtime: Json, service: Json) -> Json:
    """The pod of a predictor on a runtime."""
    predictor = service["spec"]["predictor"]
    model = predictor.get("model") or predictor["pytorch"]
    return _pod(runtime["spec"], "kserve-container", model, predictor)


def merged_worker(runtime: Json, service: Json) -> Json:
    """The pod of each node but the first."""
    worker = service["spec"]["predictor"]["workerSpec"]
    return _pod(runtime["spec"]["workerSpec"], "worker-container", worker["containers"][0], worker)


def _pod(runtime: Json, name: str, container: Json, pod: Json) -> Json:
    (own,) = [one for one in runtime["containers"] if one["name"] == name]
    merged = strategic_merge(own, container)
    merged["args"] = own.get("args", []) + container.get("args", [])
    base = {key: runtime[key] for key in _POD_FIELDS_OF_A_RUNTIME if key in runtime}
    overrides = {key: pod[key] for key in _POD_FIELDS & pod.keys()}
    return strategic_merge(base, overrides) | {"containers": [merged]}


def strategic_merge(base: Json, patch: Json) -> Json:
    """Key by key; of lists those with a merge key item by item, and others whole."""
    merged = copy.deepcopy(base)
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = strategic_merge(merged[key], value)
        elif isinstance(value, list) and key in _KEYS:
            items = {item[_KEYS[key]]: item for item in merged.get(key, [])}
            for item in value:
                items[item[_KEYS[key]]] = strategic_merge(items.get(item[_KEYS[key]], {}), item)
            merged[key] = list(items.values())
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def refused_by_kubernetes(pod: Json) -> list[str]:
    """Why the API server would refuse a pod."""
    found = []
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    if len(set(volumes)) < len(volumes):
        found.append(f"two volumes of one name: {volumes}")
    for container in pod["containers"]:
        found += _resources(container.get("resources", {}))
        mounts = container.get("volumeMounts", [])
        found += [f"no volume {mount['name']}" for mount in mounts if mount["name"] not in volumes]
        paths = [mount["mountPath"] for mount in mounts]
        ports = container.get("ports", [])
        names = [port.get("name") for port in ports]
        numbers = [port["containerPort"] for port in ports]
        environment = [variable["name"] for variable in container.get("env", [])]
        for kind, values in (("path", paths), ("port", numbers), ("port name", names), ("variable", environment)):
            if len(set(values)) < len(values):
                found.append(f"a {kind} twice: {values}")
        found += [f"port name {name} is too long" for name in names if name and len(name) > 15]
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(kind, {})
            if any(probe.get(key, 1) < 1 for key in ("periodSeconds", "timeoutSeconds", "failureThreshold")):
                found.append(f"{kind} with a number below 1")
            if kind != "readinessProbe" and probe.get("successThreshold", 1) != 1:
                found.append(f"{kind} with a successThreshold")
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if "--seconds" in hook and float(hook[-1]) >= pod.get("terminationGracePeriodSeconds", 30):
            found.append(f"the hook may take {hook[-1]} s, and the pod is killed before that")
    return found


def _resources(resources: Json) -> list[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    found = [
        f"requests.{name} {requests[name]} is more than limits.{name} {limits[name]}"
        for name in requests.keys() & limits.keys()
        if quantity(requests[name]) > quantity(limits[name])
    ]
    extended = {name for name in requests.keys() | limits.keys() if "/" in name}
    return found + [
        f"{name} must be limited to what is requested" for name in extended if requests.get(name) != limits.get(name)
    ]


def quantity(text: str | int) -> float:
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    text = str(text)
    unit = next((unit for unit in units if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)


def refused_by_knative(pod: Json, timeout: int) -> list[str]:
    """Why Knative would refuse it in a revision, with the features that it has by default."""
    allowed = {"serviceAccountName", "containers", "volumes", "imagePullSecrets", "automountServiceAccountToken"}
    found = [f"{field} is not allowed" for field in pod.keys() - allowed]
    if pod.get("automountServiceAccountToken", False):
        found.append("automountServiceAccountToken may only be false")
    for volume in pod.get("volumes", []):
        if not volume.keys() & {"secret", "configMap", "projected", "emptyDir"}:
            found.append(f"volume {volume}")
    for container in pod["containers"]:
        found += [f"{field} is not allowed" for field in ("lifecycle", "stdin", "tty") if field in container]
        if "startupProbe" in container:
            found.append("startupProbe is not allowed before 1.15")
        if len(container.get("ports", [])) > 1:
            found.append("more than one port")
        found += [
            f"port name {port['name']}"
            for port in container.get("ports", [])
            if port.get("name") not in ("h2c", "http1", None)
        ]
        mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
        found += [f"{path} is reserved" for path in mounts & {"/", "/dev", "/dev/log"}]
        variables = {variable["name"] for variable in container.get("env", [])}
        found += [f"{name} is reserved" for name in variables & {"PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION"}]
        if "add" in container.get("securityContext", {}).get("capabilities", {}):
            found.append("capabilities cannot be added")
    if timeout > 600:
        found.append(f"timeoutSeconds {timeout} is more than max-revision-timeout-seconds")
    return found
