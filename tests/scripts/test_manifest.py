import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from handler.settings import Settings
from scripts.archive import ROOT, startup_seconds
from scripts.console import UserError
from scripts.manifest import IMAGE, Service, check, main, manifests, variants
from scripts.plan import make_plan
from server.container import CONFIG
from tests.models import save_bloom_7b1_config

GB, GIB = 10**9, 2**30
URIS = {"pvc": "pvc://models/bloom-7b1", "air-gapped": "pvc://models/bloom-7b1", "s3": "s3://bucket/bloom-7b1"}


@pytest.fixture(scope="module")
def bloom_7b1(tmp_path_factory):
    return save_bloom_7b1_config(tmp_path_factory.mktemp("bloom-7b1"))


@pytest.fixture(scope="module")
def plan(bloom_7b1):
    settings = Settings(max_memory={0: 10 * GB, "cpu": 10 * GB}, kv_cache_memory=GB)
    return make_plan(bloom_7b1, settings, [16 * GB], 32 * GB)


def render(plan, variant="runtime", **more):
    uri = URIS.get(variant, "gs://bucket/bloom-7b1")
    return {d["kind"]: d for d in manifests(Service("bloom-7b1", uri, plan, **more), variant)}


def read_by_kserves_models(documents):
    command = [ROOT / ".venv-kserve/bin/python", Path(__file__).with_name("kserve_models.py")]
    return subprocess.run(command, input=json.dumps(documents), capture_output=True, text=True)


def test_every_variant_of_the_issue_is_there():
    expected = {"classic", "runtime", "concurrency", "keda", "canary", "pvc", "air-gapped", "s3", "monitoring"}
    assert set(variants()) == expected


@pytest.mark.parametrize("variant", variants())
def test_kserves_own_models_know_every_field(plan, variant):
    documents = list(render(plan, variant, namespace="models").values())
    read = read_by_kserves_models(documents)
    assert (read.returncode, read.stdout.strip()) == (0, ""), read.stdout + read.stderr
    assert {document["metadata"]["namespace"] for document in documents} == {"models"}
    assert '"bloom"' not in json.dumps(documents)  # the name that stands in deploy/


def test_kserves_models_would_notice(plan):
    document = render(plan)["InferenceService"]
    document["spec"]["predictor"]["minReplica"] = 1
    read = read_by_kserves_models([document])
    assert read.returncode == 0, read.stderr
    assert "InferenceService.spec.predictor.minReplica" in read.stdout


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
    on_volume = render(plan, "pvc", archive_format="no-archive")
    assert (
        on_volume["InferenceService"]["spec"]["predictor"]["model"]["resources"]["requests"]["ephemeral-storage"]
        == "1Gi"
    )
    assert on_volume["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"] == "14Gi"


def test_without_gpus_none_are_asked_for(bloom_7b1):
    resources = render(make_plan(bloom_7b1, Settings(), []))["InferenceService"]["spec"]["predictor"]["model"][
        "resources"
    ]
    assert "nvidia.com/gpu" not in resources["limits"]


def test_probes_wait_as_long_as_the_checkpoint_may_take(plan):
    (container,) = render(plan)["ServingRuntime"]["spec"]["containers"]
    for probe in (container["startupProbe"], container["livenessProbe"]):
        assert probe["failureThreshold"] * probe["periodSeconds"] >= startup_seconds(plan.checkpoint_bytes)
    annotations = render(plan, "classic")["InferenceService"]["metadata"]["annotations"]
    assert annotations["serving.knative.dev/progress-deadline"] == f"{startup_seconds(plan.checkpoint_bytes)}s"


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


def test_autoscaling_and_canary(plan):
    concurrency = render(plan, "concurrency", max_replicas=7)["InferenceService"]["spec"]["predictor"]
    assert (concurrency["scaleMetric"], concurrency["maxReplicas"]) == ("concurrency", 7)
    keda = render(plan, "keda")["InferenceService"]
    assert keda["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "RawDeployment"
    (metric,) = keda["spec"]["predictor"]["autoScaling"]["metrics"]
    assert metric["external"]["metric"]["query"] == 'sum(llm_waiting_sequences{model_name="bloom-7b1"})'
    assert render(plan, "canary")["InferenceService"]["spec"]["predictor"]["canaryTrafficPercent"] == 10


def test_credentials_reach_the_pod_by_its_service_account(plan):
    documents = render(plan, "s3")
    account = documents["InferenceService"]["spec"]["predictor"]["serviceAccountName"]
    assert documents["ServiceAccount"]["metadata"]["name"] == account
    assert documents["ServiceAccount"]["secrets"] == [{"name": documents["Secret"]["metadata"]["name"]}]


@pytest.mark.parametrize(
    "name, uri, variant, message",
    [
        ("SmolLM2-135M", "gs://b/p", "runtime", "Kubernetes wants at most 40 lower-case letters"),
        ("bloom", "file:///mnt", "runtime", "no pod can read; for a volume write pvc://CLAIM/PATH"),
        ("bloom", "gs://b", "runtime", "KServe wants a bucket and a path"),
        ("bloom", "gs://b/p", "pvc", "for the variant pvc write pvc://CLAIM/PATH"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(plan, name, uri, variant, message):
    with pytest.raises(UserError, match=message):
        check(Service(name, uri, plan), variant)


def test_image_and_manifests_are_of_one_version(plan):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (container,) = render(plan)["ServingRuntime"]["spec"]["containers"]
    assert container["image"] == IMAGE == f"torchserve-large-models:{version}"
    assert f"/{IMAGE} ." in (ROOT / "deploy/Dockerfile").read_text()
    (runtime, *_) = yaml.safe_load_all((ROOT / "deploy/runtime.yaml").read_text())
    assert runtime["spec"]["containers"][0]["image"] == IMAGE
    classic = yaml.safe_load((ROOT / "deploy/classic.yaml").read_text())["spec"]["predictor"]["pytorch"]
    assert f"{classic['image']}:{classic['runtimeVersion']}" == IMAGE


def test_an_image_without_a_tag(plan):
    with pytest.raises(UserError, match="give it with its tag"):
        render(plan, "classic", image="registry.example:5000/torchserve")


def test_the_command_prints_yaml_that_is_applied_by_deploy(bloom_7b1, tmp_path):
    """kubectl is one that keeps what it is given: there is no cluster here."""
    more = [f"MODEL_DIR={bloom_7b1}", "MODEL_NAME=bloom-7b1", "STORAGE_URI=gs://bucket/bloom-7b1", "GPUS=1x16GB"]
    printed = subprocess.run(
        ["make", "--no-print-directory", "manifest", *more], cwd=ROOT, capture_output=True, text=True
    )
    assert printed.returncode == 0, printed.stderr
    documents = list(yaml.safe_load_all(printed.stdout))
    assert [document["kind"] for document in documents] == ["ServingRuntime", "InferenceService"]
    assert printed.stderr.startswith("warning: does not fit")
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$1 $2"; cat "$3" > {tmp_path}/applied\n')
    kubectl.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    deployed = subprocess.run(
        ["make", "--no-print-directory", "deploy", *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert deployed.stdout == "apply -f\n", deployed.stderr
    assert list(yaml.safe_load_all((tmp_path / "applied").read_text())) == documents


def test_what_is_missing_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="no config"):
        main(["--model-name", "bloom", "--model-dir", str(tmp_path), "--storage-uri", "gs://b/p"])
    ended = subprocess.run(
        [sys.executable, "-m", "scripts.manifest", "--model-name", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2 and "--storage-uri" in ended.stderr
