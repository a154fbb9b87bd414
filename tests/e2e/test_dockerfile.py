"""deploy/Dockerfile: no engine builds it where the tests run, so its steps are run in an environment of their own."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from scripts.archive import ROOT, archive
from scripts.upload import upload
from tests.e2e.asking import PROMPT, predict
from tests.e2e.conftest import REPOSITORY_SETTINGS
from tests.nginx import needs_nginx

DOCKERFILE = ROOT / "deploy/Dockerfile"
KEPT = ROOT / ".run/image"
DECIDES = (
    "requirements.lock",
    "requirements-torch.lock",
    "requirements-java.lock",
    "server/java.py",
)  # with the RUN lines: what is installed


@pytest.fixture(scope="module")
def instructions():
    """(instruction, its argument), with continued lines joined."""
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


def arguments(instructions, name):
    return [argument for instruction, argument in instructions if instruction == name]


def pins(name):
    """NAME==VERSION of a lock file; which platforms they are for depends on who needs them."""
    lines = (ROOT / name).read_text().splitlines()
    return {re.split(r" [;\\]", line)[0] for line in lines if line[0] not in " #"}


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", "requirements-java", "requirements-kserve"])
def test_everything_but_torch_is_locked_by_its_hash(name):
    text = (ROOT / f"{name}.lock").read_text()
    locked = [block for block in re.split(r"\n(?=[a-z0-9])", text) if not block.startswith("#")]
    assert locked and all("--hash=sha256:" in block for block in locked)
    assert not any(block.startswith("torch==") for block in locked)
    assert re.fullmatch(r"torch==[\d.]+\n", (ROOT / "requirements-torch.lock").read_text())


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint's wheel is for Linux on x86-64")
    checked = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_it_installs_what_make_setup_installs(instructions):
    makefile = (ROOT / "Makefile").read_text()
    java = re.search(r"^\t(\$\(RUN\) server\.java .*)$", makefile, re.MULTILINE)[1]
    assert java.replace("$(RUN)", "python -m").replace(".venv/$(PIP_INSTALL)", "pip install --no-deps -r") in arguments(
        instructions, "RUN"
    )
    assert any(step.startswith("pip install --no-deps -r requirements.lock") for step in arguments(instructions, "RUN"))
    assert pins("requirements.lock") <= pins("requirements-dev.lock")


def test_it_installs_what_the_entry_runs_and_the_wheels_do_not_have(instructions):
    assert any(re.search(r"apt-get install .*\bnginx\b", step) for step in arguments(instructions, "RUN"))


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


def copy(argument, app):
    """Do what a COPY says."""
    *sources, target = argument.split()
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, app / target)
        else:
            shutil.copy(ROOT / source, app / target)


@pytest.fixture
def image(instructions, tmp_path):
    """What the image has: its environment without the packages of the tests and of the other commands, and its folder.

    The environment takes a minute to make; it is kept as long as nothing that decides what is in it has changed.
    """
    # Not what changes the machine: the user, and Debian's nginx, for which tests/nginx.py has another one.
    steps = [step for step in arguments(instructions, "RUN") if not step.startswith(("useradd", "apt-get"))]
    decides = [sys.version, *steps, *((ROOT / name).read_text() for name in DECIDES)]
    python = KEPT / hashlib.sha256("\0".join(decides).encode()).hexdigest()[:16]
    variables = {**os.environ, "PATH": f"{python}/bin:/usr/bin:/bin", "TORCH_INDEX_URL": ""}
    variables.pop("JAVA_HOME", None)
    app = tmp_path / "app"
    app.mkdir()
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / "lock"):
        complete = (python / "complete").exists()
        if not complete:
            for other in KEPT.glob("*/"):  # gigabytes each; or this one, broken off
                shutil.rmtree(other)
            venv.create(python, with_pip=True, symlinks=True)
        for instruction, argument in instructions:
            if instruction == "COPY":
                copy(argument, app)
            elif argument in steps and not complete:
                done = subprocess.run(argument, shell=True, cwd=app, env=variables, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
        (python / "complete").touch()
    name, *rest = json.loads(arguments(instructions, "ENTRYPOINT")[0])
    return {"entry": [python / "bin" / name, *rest], "environment": variables, "cwd": app}


@needs_nginx
def test_what_its_steps_make_serves(instructions, image, bloom, tmp_path, container, generated):
    release = upload(archive("bloom", bloom, tmp_path / "store"), f"file://{tmp_path}/models").release
    with container(tmp_path / "models" / release, *json.loads(arguments(instructions, "CMD")[0]), **image) as pod:
        expected = generated(settings=REPOSITORY_SETTINGS)
        assert predict(pod.url, PROMPT).json() == {"predictions": [expected]}
