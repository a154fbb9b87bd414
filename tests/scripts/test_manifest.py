import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from handler.settings import Settings
from scripts.archive import ROOT, startup_seconds
from scripts.console import UserError
from scripts.manifest import BASES, IMAGE, Service, check, manifests, variants, warnings
from scripts.manifest.__main__ import main, parse_pairs, parse_tolerations
from scripts.manifest.render import KNATIVE_PORTS
from scripts.plan import make_plan, parallel
from scripts.releases import remember
from server.container import CONFIG, METRICS_PORT, PORT
from server.proxy import API_KEY
from tests.models import save_bloom_7b1_config
from tests.scripts.kserve_rules import (
    MULTINODE,
    TORCHSERVE,
    merged_pod,
    merged_worker,
    quantity,
    refused_by_knative,
    refused_by_kubernetes,
    strategic_merge,
)

GB, GIB = 10**9, 2**30
VOLUME = "pvc://models/bloom-7b1"
RELEASE = "0123456789abcdef"
URIS = dict.fromkeys(["pvc", "air-gapped", "loader", "distributed", "llm"], VOLUME)
TOGETHER = [
    "s3,keda,monitoring",
    "keda,recreate,pvc",
    "concurrency,s3",
    "knative,air-gapped,canary",
    "classic,s3,concurrency",
]


@pytest.fixture(scope="module")
def bloom_7b1(tmp_path_factory):
    return save_bloom_7b1_config(tmp_path_factory.mktemp("bloom-7b1"))


@pytest.fixture(scope="module")
def plan(bloom_7b1):
    settings = Settings(max_memory={0: 10 * GB, "cpu": 10 * GB}, kv_cache_memory=GB)
    return make_plan(bloom_7b1, settings, [16 * GB], 32 * GB)


@pytest.fixture(scope="module")
def on_gpus(bloom_7b1):
    """For vLLM: one node of 4 GPUs holds it."""
    return make_plan(bloom_7b1, Settings(), [16 * GB] * 4)


def render(plan, variant="runtime", **more):
    uri = next((uri for name, uri in URIS.items() if name in variant.split(",")), "gs://bucket/bloom-7b1")
    service = Service("bloom-7b1", uri, plan, **{"namespace": "models", "source_uri": "gs://b/bloom-7b1", **more})
    check(service, variant)
    return {d["kind"]: d for d in manifests(service, variant)}


def pod_of(documents):
    """The pod that KServe makes of them."""
    return merged_pod(documents.get("ServingRuntime", TORCHSERVE), documents["InferenceService"])


def read_by_kserves_models(documents):
    command = [ROOT / ".venv-kserve/bin/python", Path(__file__).with_name("kserve_models.py")]
    return subprocess.run(command, input=json.dumps(documents), capture_output=True, text=True)


def plan_for(variant, plan, on_gpus):
    return on_gpus if variant in ("distributed", "llm") else plan


def test_kserves_own_models_know_every_field(plan, on_gpus):
    rendered = {
        variant: list(render(plan_for(variant, plan, on_gpus), variant).values())
        for variant in [*variants(), *TOGETHER]
    }
    read = read_by_kserves_models(rendered)
    assert (read.returncode, read.stdout.strip()) == (0, ""), read.stdout + read.stderr
    for documents in rendered.values():
        for document in documents:
            own = None if document["kind"] == "LocalModelCache" else "models"
            assert document["metadata"].get("namespace") == own
        text = json.dumps(documents)
        assert '"bloom"' not in text and "NAMESPACE" not in text  # what stands for them in deploy/


@pytest.fixture(scope="module")
def plans(bloom_7b1):
    """Without GPUs, and with one."""
    settings = Settings(max_memory={0: 10 * GB, "cpu": 40 * GB})
    return [make_plan(bloom_7b1, settings, [80 * GB] * gpus) for gpus in (0, 1)]


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("variant", [name for name in [*variants(), *TOGETHER] if name not in ("distributed", "llm")])
def test_kubernetes_takes_the_pod_that_kserve_makes_of_it(plans, variant, gpus):
    plan = plans[gpus]
    documents = render(plan, variant)
    pod = pod_of(documents)
    assert not refused_by_kubernetes(pod)
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["image"].startswith("torchserve-large-models")
    # What the plan needs is what the container gets, whatever the runtime had.
    resources = container["resources"]
    assert quantity(resources["limits"]["memory"]) >= plan.memory_request
    assert resources["requests"]["cpu"] == "4"
    asked = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert asked.get("REQUIRE_GPUS") == ("1" if gpus else None)
    mode = documents["InferenceService"]["metadata"]["annotations"].get("serving.kserve.io/deploymentMode")
    if mode != "RawDeployment":
        # With a disk of 1 GB/s an answer of this model takes longer than Knative's default allows.
        problems = refused_by_knative(pod, documents["InferenceService"]["spec"]["predictor"]["timeout"])
        assert all("max-revision-timeout-seconds" in problem for problem in problems)
        assert "deploymentStrategy" not in documents["InferenceService"]["spec"]["predictor"]


def test_the_rules_notice_what_was_refused(plan):
    """As it was: 4 CPUs under the runtime's limit of one, a hook and a second port on Knative."""
    documents = render(plan, "classic")
    del documents["InferenceService"]["spec"]["predictor"]["pytorch"]["resources"]["limits"]["cpu"]
    assert refused_by_kubernetes(pod_of(documents)) == ["requests.cpu 4 is more than limits.cpu 1"]
    pod = pod_of(render(plan))
    problems = refused_by_knative(pod, 601)
    for field in (
        "terminationGracePeriodSeconds",
        "lifecycle",
        "startupProbe",
        "more than one port",
        "timeoutSeconds 601",
    ):
        assert any(field in problem for problem in problems), field
    pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1] = "900"
    assert any("the hook may take 900" in problem for problem in refused_by_kubernetes(pod))


def test_no_variant_but_the_classic_one_needs_kserves_own_torchserve_runtime(plan):
    for variant in variants():
        if variant not in ("classic", "distributed", "llm"):
            documents = render(plan, variant)
            runtime = documents["InferenceService"]["spec"]["predictor"]["model"]["runtime"]
            assert runtime == documents["ServingRuntime"]["metadata"]["name"]


def test_lists_are_merged_by_their_keys():
    merged = strategic_merge(
        {"env": [{"name": "A", "value": "1"}], "args": ["a"], "resources": {"limits": {"cpu": "1"}}},
        {"env": [{"name": "B", "value": "2"}], "args": ["b"], "resources": {"requests": {"cpu": "4"}}},
    )
    assert merged == {
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
        "args": ["b"],
        "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "4"}},
    }


def test_kserves_models_would_notice(plan):
    document = render(plan)["InferenceService"]
    document["spec"]["predictor"]["minReplica"] = 1
    read = read_by_kserves_models({"one": [document]})
    assert read.returncode == 0, read.stderr
    assert "one: InferenceService.spec.predictor.minReplica" in read.stdout


def test_memory_and_disk_come_from_the_plan(plan):
    documents = render(plan)
    resources = documents["InferenceService"]["spec"]["predictor"]["model"]["resources"]
    memory = int(resources["limits"]["memory"].removesuffix("Gi")) * GIB
    assert plan.memory_request < memory < plan.memory_request + 1.3 * GIB
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert resources["limits"]["nvidia.com/gpu"] == "1"
    (tmp,) = [v for v in documents["ServingRuntime"]["spec"]["volumes"] if v["name"] == "tmp"]
    size = int(tmp["emptyDir"]["sizeLimit"].removesuffix("Gi")) * GIB
    assert plan.disk_request("zip-store") <= size < plan.disk_request("zip-store") + GIB
    disk = int(resources["requests"]["ephemeral-storage"].removesuffix("Gi")) * GIB
    assert disk >= plan.checkpoint_bytes + plan.disk_request("zip-store")
    folder = render(plan, archive_format="no-archive")
    (tmp,) = [v for v in folder["ServingRuntime"]["spec"]["volumes"] if v["name"] == "tmp"]
    assert tmp["emptyDir"]["sizeLimit"] == "1Gi"
    image = Service("bloom-7b1", "oci://registry/bloom-7b1:1", plan, "no-archive")
    check(image, "runtime")
    model = manifests(image)[-1]["spec"]["predictor"]["model"]
    assert model["storageUri"] == "oci://registry/bloom-7b1:1"
    assert model["resources"]["requests"]["ephemeral-storage"] == "1Gi"  # layers of images are the node's
    on_volume = render(plan, "pvc", archive_format="no-archive")
    assert (
        on_volume["InferenceService"]["spec"]["predictor"]["model"]["resources"]["requests"]["ephemeral-storage"]
        == "1Gi"
    )
    assert on_volume["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"] == "27Gi"  # two releases


def test_without_gpus_none_are_asked_for(bloom_7b1):
    resources = render(make_plan(bloom_7b1, Settings(), []))["InferenceService"]["spec"]["predictor"]["model"][
        "resources"
    ]
    assert "nvidia.com/gpu" not in resources["limits"]


def test_probes_wait_as_long_as_the_checkpoint_may_take(plan):
    (container,) = render(plan)["ServingRuntime"]["spec"]["containers"]
    for probe in (container["startupProbe"], container["livenessProbe"]):
        assert probe["failureThreshold"] * probe["periodSeconds"] >= startup_seconds(plan.checkpoint_bytes)
    for variant, download in [("classic", plan.checkpoint_bytes // 20_000_000), ("knative,pvc", 0)]:
        annotations = render(plan, variant)["InferenceService"]["metadata"]["annotations"]
        deadline = startup_seconds(plan.checkpoint_bytes) + download  # the download comes before the container
        assert annotations["serving.knative.dev/progress-deadline"] == f"{deadline}s"


@pytest.mark.parametrize("on_disk, least", [(False, 600), (True, 2 * (80 + 8) * 14)])
def test_the_timeout_fits_the_models_steps(bloom_7b1, on_disk, least):
    plan = make_plan(bloom_7b1, Settings(max_memory={"cpu": 0} if on_disk else None), [], 200 * GB)
    documents = render(plan)
    service, (container,) = documents["InferenceService"], documents["ServingRuntime"]["spec"]["containers"]
    timeout, grace = (service["spec"]["predictor"][name] for name in ("timeout", "terminationGracePeriodSeconds"))
    assert least <= timeout < 1.1 * least
    assert service["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-read-timeout"] == str(timeout)
    assert grace == (timeout + 10 if on_disk else 120)
    assert container["lifecycle"]["preStop"]["exec"]["command"][-1] == str(grace - 10)
    warned = warnings(Service("bloom", "gs://b/p", plan), "knative")
    assert bool(warned) == on_disk and (not warned or "max-revision-timeout-seconds" in warned[0])


def test_a_gateway_or_a_policy_lets_requests_in_and_nothing_else(plan):
    def ports(variant):
        policy = render(plan, variant)["NetworkPolicy"]["spec"]
        assert policy["podSelector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": "bloom-7b1"}
        return [port["port"] for port in policy["ingress"][0]["ports"]]

    assert ports("runtime") == [PORT]
    assert ports("knative") == list(KNATIVE_PORTS)
    assert ports("classic") == [PORT, *KNATIVE_PORTS]
    for variant in ("runtime", "knative", "classic"):
        scraped = render(plan, variant)["NetworkPolicy"]["spec"]["ingress"][1]
        assert [port["port"] for port in scraped["ports"]] == [METRICS_PORT]
    runtime = render(plan, "keda")["ServingRuntime"]["spec"]
    ports_of_pod = {port["name"]: port["containerPort"] for port in runtime["containers"][0]["ports"]}
    assert ports_of_pod == {"http1": PORT, "metrics": METRICS_PORT}  # nginx's; TorchServe's are on loopback
    assert runtime["annotations"]["prometheus.kserve.io/port"] == str(METRICS_PORT)
    # The way out is closed by a policy of its own.
    policies = [d for d in manifests(Service("bloom", "pvc://c/p", plan), "air-gapped") if d["kind"] == "NetworkPolicy"]
    assert [policy["spec"]["policyTypes"] for policy in policies] == [["Egress"], ["Ingress"]]


def test_probes_hooks_and_arguments_are_commands_that_the_entry_knows(plan):
    (container,) = render(plan)["ServingRuntime"]["spec"]["containers"]
    hook = container["lifecycle"]["preStop"]
    commands = [container[name]["exec"]["command"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert all(command == ["python", "-m", "server.container", "ready"] for command in commands)
    drain = hook["exec"]["command"]
    assert drain[:4] == ["python", "-m", "server.container", "drain"]
    grace = render(plan)["InferenceService"]["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert float(drain[-1]) < grace
    assert container["args"] == ["serve"]
    assert str(CONFIG) == "/mnt/models/config/config.properties"


def test_a_pod_has_no_rights_that_it_does_not_need(plan):
    (container,) = render(plan)["ServingRuntime"]["spec"]["containers"]
    context = container["securityContext"]
    assert context["runAsNonRoot"] and context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/dev/shm"}


def test_the_classic_one_is_as_people_know_it(plan):
    predictor = render(plan, "classic", image="registry.example/team/torchserve:1.2", replicas=2)["InferenceService"][
        "spec"
    ]["predictor"]
    assert predictor["pytorch"]["storageUri"] == "gs://bucket/bloom-7b1"
    assert (predictor["pytorch"]["image"], predictor["pytorch"]["runtimeVersion"]) == (
        "registry.example/team/torchserve",
        "1.2",
    )
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (2, 2)


def test_an_image_by_its_digest(plan):
    """KServe leaves it as it is, and there is no tag that it could replace."""
    image = "registry.example/team/torchserve:1.2@sha256:" + "a" * 64
    predictor = render(plan, "classic", image=image)["InferenceService"]["spec"]["predictor"]
    assert predictor["pytorch"]["image"] == image and "runtimeVersion" not in predictor["pytorch"]


def test_canary_and_concurrency(plan):
    concurrency = render(plan, "concurrency", max_replicas=7)["InferenceService"]["spec"]["predictor"]
    assert (concurrency["scaleMetric"], concurrency["maxReplicas"]) == ("concurrency", 7)
    assert render(plan, "canary")["InferenceService"]["spec"]["predictor"]["canaryTrafficPercent"] == 10


def test_keda_scales_on_what_runs_and_waits_in_this_namespace(bloom_7b1):
    rows = Settings(max_memory={"cpu": 40 * GB}, kv_cache_memory=GB)  # room for one row of full length, or two of half
    documents = render(make_plan(bloom_7b1, rows, []), "keda", prometheus="http://prometheus:9090")
    service = documents["InferenceService"]
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "RawDeployment"
    scaling = service["spec"]["predictor"]["autoScaling"]
    (metric,) = [metric["external"] for metric in scaling["metrics"]]
    labels = '{model_name="bloom-7b1",namespace="models"}'
    assert metric["metric"]["query"] == f"sum(llm_running_sequences{labels}) + sum(llm_waiting_sequences{labels})"
    assert metric["metric"]["serverAddress"] == "http://prometheus:9090"
    assert metric["target"]["value"] == "1"
    assert scaling["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 600
    (endpoint,) = documents["PodMonitor"]["spec"]["podMetricsEndpoints"]
    (container,) = documents["ServingRuntime"]["spec"]["containers"]
    assert endpoint["port"] in [port["name"] for port in container["ports"]]
    with pytest.raises(UserError, match="keda needs NAMESPACE"):
        render(make_plan(bloom_7b1, rows, []), "keda", namespace=None)


def test_variants_combine(plan):
    documents = manifests(Service("bloom", "s3://b/p", plan, namespace="models"), "s3,keda,monitoring")
    kinds = [document["kind"] for document in documents]
    assert kinds.count("PodMonitor") == 1  # both bring it
    assert {"Secret", "ServiceAccount", "PrometheusRule", "ServingRuntime"} < set(kinds)
    predictor = documents[-1]["spec"]["predictor"]
    assert predictor["serviceAccountName"] == "bloom-s3" and predictor["autoScaling"]
    assert documents == manifests(Service("bloom", "s3://b/p", plan, namespace="models"), "runtime, s3,keda,monitoring")


@pytest.mark.parametrize(
    "variant, message",
    [
        ("keda,canary", "keda on runtime, canary on knative or classic"),
        ("classic,keda", "classic, keda on runtime"),
        ("classic,runtime", "does not go together"),
        ("s3,kedas", "'kedas' is none of runtime, knative, classic"),
        ("", "'' is none of"),
    ],
)
def test_variants_that_do_not_go_together(plan, variant, message):
    with pytest.raises(UserError, match=message):
        render(plan, variant)


def test_credentials_reach_the_pod_by_its_service_account(plan):
    for variant in ("s3", "gs", "azure"):
        documents = render(plan, variant)
        account = documents["InferenceService"]["spec"]["predictor"]["serviceAccountName"]
        assert documents["ServiceAccount"]["metadata"]["name"] == account
        assert documents["ServiceAccount"]["secrets"] == [{"name": documents["Secret"]["metadata"]["name"]}]
        # Applied again, it leaves what was put into it.
        assert not documents["Secret"].keys() & {"data", "stringData"}


def test_region_endpoint_and_role_are_options(plan):
    documents = render(
        plan, "s3", s3={"region": "eu-central-1", "endpoint": "http://minio.minio:9000", "role": "arn:x"}
    )
    expected = {
        "serving.kserve.io/s3-endpoint": "minio.minio:9000",
        "serving.kserve.io/s3-usehttps": "0",
        "serving.kserve.io/s3-region": "eu-central-1",
    }
    assert documents["Secret"]["metadata"]["annotations"] == expected
    account = documents["ServiceAccount"]["metadata"]["annotations"]
    assert account == expected | {"eks.amazonaws.com/role-arn": "arn:x"}
    assert render(plan, "s3")["Secret"]["metadata"]["annotations"] == {}


def test_a_service_account_that_is_there(plan):
    predictor = render(plan, service_account="reader")["InferenceService"]["spec"]["predictor"]
    assert predictor["serviceAccountName"] == "reader"
    with pytest.raises(UserError, match="give one of them"):
        render(plan, "s3", service_account="reader")


def test_nodes_are_chosen_by_labels_taints_and_kinds_of_gpu(plan):
    more = {
        "node_selector": parse_pairs("X", "gpu=t4, zone=a"),
        "tolerations": parse_tolerations("gpu:NoSchedule,a=b:NoExecute"),
    }
    documents = render(plan, gpu_resource="nvidia.com/mig-1g.10gb", **more)
    pod = pod_of(documents)
    assert pod["nodeSelector"] == {"gpu": "t4", "zone": "a"}
    assert pod["tolerations"] == [
        {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute"},
    ]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == "1"
    assert len(warnings(Service("bloom", "gs://b/p", plan, **more), "knative")) >= 2
    with pytest.raises(UserError, match="NODE_SELECTOR is 't4': write KEY=VALUE"):
        parse_pairs("NODE_SELECTOR", "t4")
    with pytest.raises(UserError, match="KEY:NoSchedule"):
        parse_tolerations("gpu")


def test_an_update_that_ends_the_old_pod_first(plan):
    predictor = render(plan, "recreate")["InferenceService"]["spec"]["predictor"]
    assert predictor["deploymentStrategy"] == {"type": "Recreate"}


def test_a_job_fills_the_volume(plan):
    documents = render(plan, "loader", source_uri="s3://bucket/bloom-7b1", service_account="reader")
    job, claim = documents["Job"], documents["PersistentVolumeClaim"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert not refused_by_kubernetes(pod)
    assert container["args"] == ["s3://bucket/bloom-7b1", "/mnt/models"]
    assert container["volumeMounts"] == [{"name": "models", "mountPath": "/mnt/models", "subPath": "bloom-7b1"}]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"] == "models"
    assert pod["serviceAccountName"] == "reader" and pod["automountServiceAccountToken"] is False
    # A Job cannot be changed, so that of another archive has another name.
    other = render(plan, "loader", source_uri="s3://bucket/another")["Job"]
    assert other["metadata"]["name"] != job["metadata"]["name"] and len(job["metadata"]["name"]) <= 63
    with pytest.raises(UserError, match="loader needs SOURCE_URI"):
        render(plan, "loader", source_uri=None)


def test_a_smaller_model_does_not_shrink_a_claim(plan):
    def size(**more):
        return render(plan, "pvc", **more)["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]

    assert (size(), size(claim_bytes=100 * GIB), size(claim_bytes=GIB)) == ("27Gi", "100Gi", "27Gi")


def test_a_node_groups_disks_keep_the_archive(plan):
    cache = render(plan, "local-cache", node_group="gpus")["LocalModelCache"]
    assert cache["metadata"].keys() == {"name"}
    assert cache["metadata"]["name"].startswith("models-bloom-7b1-")  # the cluster's, so both names are in it
    assert cache["spec"] == {"sourceModelUri": "gs://bucket/bloom-7b1", "modelSize": "14Gi", "nodeGroups": ["gpus"]}
    uri = render(plan, "local-cache")["InferenceService"]["spec"]["predictor"]["model"]["storageUri"]
    assert uri == cache["spec"]["sourceModelUri"]  # by which KServe finds it


def test_several_nodes(bloom_7b1):
    """On KServe's own runtime, which has limits of its own."""
    plan = make_plan(bloom_7b1, Settings(), [10 * GB] * 2)
    split = parallel(plan)
    # (14.1 GB of weights and 1.0 GB of keys and values) / (2 GPUs of 10 GB * 0.9 - 2 GB)
    assert (split.tensor, split.pipeline) == (2, 2)
    service = render(plan, "distributed", archive_format="no-archive")["InferenceService"]
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["storageUri"] == f"{VOLUME}/model-store/bloom-7b1/model/"
    assert predictor["model"]["args"] == ["--max-model-len=2048", "--dtype=float16"]
    worker = predictor["workerSpec"]
    assert (worker["tensorParallelSize"], worker["pipelineParallelSize"]) == (2, 2)
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "none"
    assert predictor["timeout"] == 600  # nothing is streamed there
    for pod in (merged_pod(MULTINODE, service), merged_worker(MULTINODE, service)):
        assert not refused_by_kubernetes(pod)
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    whole = render(plan, "distributed")["InferenceService"]["spec"]["predictor"]["model"]["storageUri"]
    assert whole == VOLUME  # a checkpoint that was put there


def test_an_llm_inference_service_is_for_one_node(on_gpus, bloom_7b1):
    spec = render(on_gpus, "llm", archive_format="no-archive")["LLMInferenceService"]["spec"]
    assert spec["model"] == {"uri": f"{VOLUME}/model-store/bloom-7b1/model/", "name": "bloom-7b1"}
    assert spec["parallelism"] == {"tensor": 4}
    (container,) = spec["template"]["containers"]
    assert container["name"] == "main" and container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    with pytest.raises(UserError, match="it needs 2 nodes of 2 GPUs"):
        render(make_plan(bloom_7b1, Settings(), [10 * GB] * 2), "llm")


def test_what_vllm_cannot_serve_is_refused_with_the_reason(plan, on_gpus, bloom_7b1, tmp_path):
    config = json.loads((bloom_7b1 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "plain-int", "bits": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="which vLLM does not read"):
        render(make_plan(tmp_path, Settings(), [16 * GB] * 4), "distributed")
    with pytest.raises(UserError, match="needs GPUS"):
        render(make_plan(bloom_7b1, Settings(), []), "distributed")
    with pytest.raises(UserError, match="leave ARCHIVE_FORMAT out"):
        check(Service("bloom", "oci://registry/bloom:1", on_gpus, "no-archive"), "llm")
    for variant, uri in (("distributed", "gs://b/p"), ("llm", "gs://b/p")):
        with pytest.raises(UserError, match="alone"):
            check(Service("bloom", uri, on_gpus), variant)


@pytest.mark.parametrize(
    "name, uri, variant, message",
    [
        ("SmolLM2-135M", "gs://b/p", "runtime", "Kubernetes wants at most 40 lower-case letters"),
        ("bloom", "file:///mnt", "runtime", "no pod can read; for a volume write pvc://CLAIM/PATH"),
        ("bloom", "gs://b", "runtime", "KServe wants a bucket and a path"),
        ("bloom", "gs://b/p", "pvc", "for the variant pvc write pvc://CLAIM/PATH"),
        ("bloom", "gs://b/p", "air-gapped", "for the variant pvc write pvc://CLAIM/PATH"),
        ("bloom", "pvc://c/p", "local-cache", "a node caches what is fetched"),
        ("bloom", "oci://", "runtime", "write gs://BUCKET/PATH"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(plan, name, uri, variant, message):
    with pytest.raises(UserError, match=message):
        check(Service(name, uri, plan), variant)


def test_image_and_manifests_are_of_one_version(plan):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (container,) = render(plan)["ServingRuntime"]["spec"]["containers"]
    assert container["image"] == IMAGE == f"torchserve-large-models:{version}"
    assert BASES.keys() == {"runtime", "knative", "classic", "distributed", "llm"}
    assert f"/{IMAGE} ." in (ROOT / "deploy/Dockerfile").read_text()
    (runtime, *_) = yaml.safe_load_all((ROOT / "deploy/runtime.yaml").read_text())
    assert runtime["spec"]["containers"][0]["image"] == IMAGE
    classic = yaml.safe_load((ROOT / "deploy/classic.yaml").read_text())["spec"]["predictor"]["pytorch"]
    assert f"{classic['image']}:{classic['runtimeVersion']}" == IMAGE


def test_an_image_without_a_tag(plan):
    with pytest.raises(UserError, match="give it with its tag"):
        render(plan, "classic", image="registry.example:5000/torchserve")


def make(target, *variables):
    command = ["make", "--no-print-directory", target, *variables]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def command(bloom_7b1, tmp_path, capsys):
    """What the command prints with these options, by kind."""

    def command(*options):
        fixed = ["--model-name", "bloom-7b1", "--model-dir", str(bloom_7b1), "--model-store", str(tmp_path)]
        main([*fixed, *options])
        return {document["kind"]: document for document in yaml.safe_load_all(capsys.readouterr().out)}

    return command


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A kubectl that keeps what it is given, and knows of a large claim, in a folder: there is no cluster here."""
    folder = tmp_path / "kubectl"
    folder.mkdir()
    claim = '{"spec": {"resources": {"requests": {"storage": "50Gi"}}}}'
    (folder / "kubectl").write_text(
        f"""#!/bin/sh
echo "$@" >> {folder}/commands
case "$1 $2" in
    "get pvc") echo '{claim}';;
    "get secret") test ! -e {folder}/secret || echo "secret/$3";;
    create*) cat > {folder}/secret;;
    apply*) cat > {folder}/applied;;
esac
"""
    )
    (folder / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_the_command_prints_yaml_that_is_applied_by_deploy(bloom_7b1, kubectl):
    more = [f"MODEL_DIR={bloom_7b1}", "MODEL_NAME=bloom-7b1", f"STORAGE_URI={VOLUME}", "VARIANT=pvc,recreate"]
    more += [f"RELEASE={RELEASE}", "NAMESPACE=models"]
    printed = make("manifest", *more)
    assert printed.returncode == 0, printed.stderr
    documents = list(yaml.safe_load_all(printed.stdout))
    kinds = ["PersistentVolumeClaim", "NetworkPolicy", "ServingRuntime", "InferenceService"]
    assert [document["kind"] for document in documents] == kinds
    deployed = make("deploy", *more)
    assert (deployed.returncode, deployed.stdout) == (0, ""), deployed.stderr
    commands = (kubectl / "commands").read_text()
    assert commands.splitlines() == [
        "get pvc models -n models --ignore-not-found -o json",
        "get secret bloom-7b1-api-key -n models --ignore-not-found -o name",
        "create -n models -f -",
        "apply -f -",
    ]
    documents[0]["spec"]["resources"]["requests"]["storage"] = "50Gi"
    assert list(yaml.safe_load_all((kubectl / "applied").read_text())) == documents
    secret = yaml.safe_load((kubectl / "secret").read_text())
    assert secret["metadata"] == {"name": "bloom-7b1-api-key"} and secret["stringData"].keys() == {"API_KEY"}
    key = secret["stringData"]["API_KEY"]
    assert API_KEY.fullmatch(key) and len(key) == 64
    assert key not in commands + deployed.stderr + (kubectl / "applied").read_text()


def test_a_key_is_made_once_and_where_it_is_asked_for(command, kubectl):
    def apply(*more):
        """The commands that kubectl was given."""
        (kubectl / "commands").write_text("")
        command("--storage-uri", VOLUME, "--release", RELEASE, "--apply", *more)
        return (kubectl / "commands").read_text().splitlines()

    look = "get secret bloom-7b1-api-key --ignore-not-found -o name"
    assert apply("--auth", "none") == ["apply -f -"]
    on_vllm = ["--variant", "distributed", "--archive-format", "no-archive", "--gpus", "4x16GB"]
    assert apply(*on_vllm) == ["apply -f -"]
    assert apply() == [look, "create -f -", "apply -f -"]
    key = (kubectl / "secret").read_text()
    assert apply() == [look, "apply -f -"] and (kubectl / "secret").read_text() == key


def test_a_plan_that_does_not_fit_ends_with_an_error(bloom_7b1, capsys, monkeypatch):
    arguments = ["--model-dir", str(bloom_7b1), "--model-name", "bloom", "--storage-uri", "gs://b/p", "--cpu", "8GiB"]
    arguments += ["--release", RELEASE]
    for more in ([], ["--apply"]):
        with pytest.raises(UserError, match=r"does not fit: .*FORCE=1 goes on"):
            main([*arguments, *more])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="kubectl is not on the PATH"):
        main([*arguments, "--force", "--apply"])
    monkeypatch.undo()
    main([*arguments, "--force"])
    assert capsys.readouterr().out.startswith("apiVersion")
    assert "--force" in subprocess.run(
        ["make", "-n", "manifest", "FORCE=1", "MODEL_DIR=m", "STORAGE_URI=u"], cwd=ROOT, capture_output=True, text=True
    ).stdout  # fmt: skip


@pytest.mark.parametrize("variant", ["runtime", "knative", "classic"])
def test_a_key_is_asked_for_unless_a_mesh_decides(plan, variant):
    def environment(auth):
        documents = render(plan, variant, auth=auth)
        predictor = documents["InferenceService"]["spec"]["predictor"]
        return (predictor["pytorch"] if variant == "classic" else documents["ServingRuntime"]["spec"]["containers"][0])[
            "env"
        ]

    (key,) = [entry for entry in environment("api-key") if entry["name"] == "API_KEY"]
    assert key["valueFrom"] == {"secretKeyRef": {"name": "bloom-7b1-api-key", "key": "API_KEY"}}
    names = {entry["name"]: entry.get("value") for entry in environment("none")}
    assert names["AUTH"] == "none" and "API_KEY" not in names and names["HF_HUB_OFFLINE"] == "1"


def test_the_release_is_the_one_uploaded_last_unless_it_is_named(command, tmp_path):
    with pytest.raises(UserError, match="no release of bloom-7b1 was uploaded from here"):
        command("--storage-uri", "gs://b/p")
    for release, storage_uri in (("0" * 16, "gs://b/p/"), ("1" * 16, "gs://b/p"), ("2" * 16, "s3://b/p")):
        remember(tmp_path, "bloom-7b1", release, storage_uri)

    def uri(storage_uri, *more):
        predictor = command("--storage-uri", storage_uri, *more)["InferenceService"]["spec"]["predictor"]
        return predictor["model"]["storageUri"]

    assert uri("gs://b/p") == f"gs://b/p/{'1' * 16}/"
    assert uri("gs://b/p", "--release", "0" * 16) == f"gs://b/p/{'0' * 16}/"
    assert uri("gs://b/p", "--variant", "canary") == f"gs://b/p/{'1' * 16}/"  # beside one of the release before
    assert uri(VOLUME, "--variant", "pvc") == f"{VOLUME}/{'2' * 16}/"
    with pytest.raises(UserError, match="uploaded from here to gs://b/other"):
        uri("gs://b/other")
    image = "oci://registry/bloom-7b1:1"
    assert uri(image) == image
    with pytest.raises(UserError, match="leave it out"):
        uri(image, "--release", "0" * 16)
    with pytest.raises(UserError, match="is not the name of a release"):
        uri("gs://b/p", "--release", "0123")


def test_a_release_is_copied_to_its_own_folder_on_the_volume(command):
    options = ["--variant", "loader", "--storage-uri", VOLUME, "--source-uri", "s3://b/p"]
    first, second = (command(*options, "--release", release) for release in ("0" * 16, "1" * 16))
    (container,) = first["Job"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == [f"s3://b/p/{'0' * 16}/", "/mnt/models"]
    assert container["volumeMounts"][0]["subPath"] == f"bloom-7b1/{'0' * 16}"
    assert first["InferenceService"]["spec"]["predictor"]["model"]["storageUri"] == f"{VOLUME}/{'0' * 16}/"
    assert first["Job"]["metadata"]["name"] != second["Job"]["metadata"]["name"]


def test_each_release_has_a_cache_of_its_own(command):
    """KServe lets nobody change what a LocalModelCache keeps."""
    options = ["--variant", "local-cache", "--storage-uri", "gs://b/p", "--release"]
    first, second = (command(*options, release) for release in ("0" * 16, "1" * 16))
    assert first["LocalModelCache"]["metadata"]["name"] != second["LocalModelCache"]["metadata"]["name"]
    assert first["LocalModelCache"]["spec"]["sourceModelUri"] == f"gs://b/p/{'0' * 16}/"


def test_the_checkpoint_of_a_release(command):
    gpus = ["--gpus", "4x16GB"]
    of_release = ["--archive-format", "no-archive", "--release", RELEASE, *gpus]
    distributed = command("--variant", "distributed", "--storage-uri", VOLUME, *of_release)["InferenceService"]
    path = f"{RELEASE}/model-store/bloom-7b1/model/"
    assert distributed["spec"]["predictor"]["model"]["storageUri"] == f"{VOLUME}/{path}"
    llm = command("--variant", "llm", "--storage-uri", "s3://b/p", *of_release)["LLMInferenceService"]
    assert llm["spec"]["model"]["uri"] == f"s3://b/p/{path}"
    put_there = command("--variant", "llm", "--storage-uri", "s3://b/p", *gpus)["LLMInferenceService"]
    assert put_there["spec"]["model"]["uri"] == "s3://b/p"
    with pytest.raises(UserError, match="leave it out"):
        command("--variant", "llm", "--storage-uri", "s3://b/p", *gpus, "--release", RELEASE)


@pytest.mark.parametrize(
    "variant, uri, least",
    [
        ("runtime", "gs://b/p", "0.13"),
        ("pvc", VOLUME, "0.13"),
        ("canary", "s3://b/p", "0.13"),
        ("local-cache", "gs://b/p", "0.15"),
        ("keda", "s3://b/p", "0.16"),
        ("keda", "https://a.blob.core.windows.net/container/path", "0.17"),
        ("azure", "https://a.blob.core.windows.net/container/path", "0.17"),
    ],
)
def test_what_the_clusters_kserve_is_too_old_for_is_refused(command, variant, uri, least):
    options = ["--variant", variant, "--storage-uri", uri, "--release", RELEASE, "--namespace", "models", "--kserve"]
    assert command(*options, least)
    older = f"v0.{int(least.removeprefix('0.')) - 1}.2"
    with pytest.raises(UserError, match=rf"use (KServe )?{re.escape(least)} or newer"):
        command(*options, older)


def test_vllm_asks_for_no_key_and_that_is_said(on_gpus):
    (line,) = warnings(Service("bloom", VOLUME, on_gpus), "distributed")
    assert "asks for no key" in line
    assert warnings(Service("bloom", VOLUME, on_gpus, auth="none"), "distributed") == []


def test_what_is_missing_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="no config"):
        main(["--model-name", "bloom", "--model-dir", str(tmp_path), "--storage-uri", "gs://b/p"])
    ended = subprocess.run(
        [sys.executable, "-m", "scripts.manifest", "--model-name", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2 and "--storage-uri" in ended.stderr
