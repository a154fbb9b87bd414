"""deploy/Dockerfile: no engine builds it where the tests run, so its own steps are run in a fresh environment."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import requests
import yaml

from scripts.archive import ROOT, archive
from scripts.upload import upload
from tests.e2e import conftest

DOCKERFILE = ROOT / "deploy/Dockerfile"


@pytest.fixture(scope="module")
def instructions():
    """(instruction, its argument), with continued lines joined."""
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


def arguments(instructions, name):
    return [argument for instruction, argument in instructions if instruction == name]


def pins(name):
    """NAME==VERSION of a lock file; which platforms they are for depends on who needs them."""
    return {line.partition(" ;")[0] for line in (ROOT / name).read_text().splitlines()}


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint's wheel is for Linux on x86-64")
    checked = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_it_installs_what_make_setup_installs(instructions):
    makefile = (ROOT / "Makefile").read_text()
    java = re.search(r"^\t(\$\(RUN\) server\.java .*)$", makefile, re.MULTILINE)[1]
    assert java.replace("$(RUN)", "python -m").replace(".venv/$(PIP_INSTALL)", "pip install -r") in arguments(
        instructions, "RUN"
    )
    assert any(step.endswith("-r requirements.lock") for step in arguments(instructions, "RUN"))
    assert pins("requirements.lock") <= pins("requirements-dev.lock")


def test_it_agrees_with_the_manifest(instructions):
    (container,) = yaml.safe_load((ROOT / "deploy/runtime.yaml").read_text())["spec"]["containers"]
    assert arguments(instructions, "USER") == [str(container["securityContext"]["runAsUser"])]
    ports = [str(port["containerPort"]) for port in container["ports"]]
    assert arguments(instructions, "EXPOSE")[0].split() == ports
    assert json.loads(arguments(instructions, "CMD")[0]) == container["args"]
    assert json.dumps(container["startupProbe"]["exec"]["command"]) in arguments(instructions, "HEALTHCHECK")[0]


def test_nothing_is_copied_that_dockerignore_holds_back(instructions):
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for argument in arguments(instructions, "COPY") for source in argument.split()[:-1]}
    assert copied == allowed


def test_what_its_steps_make_serves(instructions, bloom, tmp_path, container, monkeypatch):
    """Without the packages of the tests and of the other commands; the first pip is that of a fresh environment."""
    app = tmp_path / "app"
    app.mkdir()
    venv.create(tmp_path / "python", with_pip=True, symlinks=True)
    environment = {**os.environ, "PATH": f"{tmp_path}/python/bin:/usr/bin:/bin", "TORCH_INDEX_URL": ""}
    environment.pop("JAVA_HOME", None)
    for instruction, argument in instructions:
        if instruction == "COPY":
            *sources, target = argument.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, app / target)
                else:
                    shutil.copy(ROOT / source, app / target)
        elif instruction == "RUN" and not argument.startswith("useradd"):
            done = subprocess.run(argument, shell=True, cwd=app, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    entry = json.loads(arguments(instructions, "ENTRYPOINT")[0])
    monkeypatch.setattr(conftest, "ENTRY", [tmp_path / "python/bin" / entry[0], *entry[1:]])
    monkeypatch.setenv("PATH", environment["PATH"])
    monkeypatch.chdir(app)
    upload(archive("bloom", bloom, tmp_path / "store"), f"file://{tmp_path}/models")
    with container(tmp_path / "models", *json.loads(arguments(instructions, "CMD")[0])) as pod:
        answer = requests.post(f"{pod.url}/v1/models/bloom:predict", json={"instances": ["My dog is cute"]}, timeout=60)
        assert answer.status_code == 200 and answer.json()["predictions"][0].startswith("My dog is cute")
