"""The container's entry, as a pod runs it: probes, drain, end, restart."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import openai
import psutil
import pytest
import requests

from scripts.archive import archive
from scripts.releases import release_uri
from scripts.upload import upload
from server.container import PROBE_SECONDS, SETTLE_SECONDS, _open_requests
from server.properties import parse_properties
from tests.e2e.asking import ENDLESS, PROMPT, complete, describe, events, infer, predict
from tests.e2e.conftest import ENTRY, READY_TIMEOUT, REPOSITORY_SETTINGS, fetch, kill
from tests.nginx import needs_nginx, with_nginx


def mounted(folder, bloom, archive_format):
    """What the storage initializer leaves of a volume without empty files, as S3 and Azure Blob are to KServe."""
    made = archive("bloom", bloom, folder / "store", archive_format=archive_format)
    release = upload(made, f"file://{folder}/volume").release
    for path in [path for path in (folder / "volume").rglob("*") if path.is_file() and not path.stat().st_size]:
        path.unlink()
    fetch(release_uri(f"file://{folder}/volume", release), folder / "models")
    return folder / "models"


@pytest.fixture(scope="module")
def mount(bloom, tmp_path_factory):
    return mounted(tmp_path_factory.mktemp("mount"), bloom, "no-archive")


def torchserves_port(pod):
    """Behind nginx."""
    config = parse_properties((pod.folder / "torchserve/config.properties").read_text())
    return int(config["inference_address"].rpartition(":")[2])


@needs_nginx
def test_probes_drain_and_end(container, mount):
    with container(mount, wait=False) as pod:
        early = pod.run("ready")
        assert early.returncode == 1 and "Traceback" not in early.stderr
        pod.wait_ready()
        assert pod.run("ready").returncode == 0
        with requests.Session() as idle:  # a connection that a router keeps open is nothing to wait for
            assert idle.get(f"{pod.url}/ping", timeout=20).ok
            began = time.monotonic()
            assert pod.run("drain", "--seconds", "100").returncode == 0
            assert time.monotonic() - began < 60
        # A worker in a long step answers nothing. It is busy nevertheless.
        (worker,) = [process for process in pod.family() if "model_service_worker" in " ".join(process.cmdline())]
        worker.suspend()
        answers = []
        long = threading.Thread(target=lambda: answers.extend(events(complete(pod.url, max_tokens=8, stream=True))))
        long.start()
        deadline = time.monotonic() + 60
        while not _open_requests(torchserves_port(pod)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert pod.run("drain", "--seconds", "0").returncode == 0
        assert long.is_alive()
        drain = subprocess.Popen(pod.command("drain", "--seconds", "100"), env=pod.environment, cwd=pod.cwd)
        with pytest.raises(subprocess.TimeoutExpired):
            drain.wait(timeout=PROBE_SECONDS + SETTLE_SECONDS + 2)
        worker.resume()
        assert drain.wait(timeout=100) == 0
        long.join(timeout=60)
        assert answers[-1]["choices"][0]["finish_reason"] == "length"
        assert len(pod.family()) >= 4  # this entry, Java, the worker, nginx
        assert pod.end() == []
        assert pod.process.returncode == 0


def smuggle(port):
    """What comes back for a request with both a length and chunks, in whose body is a second one."""
    hidden = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    body = b"0\r\n\r\n" + hidden
    head = b"POST /ping HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n" % len(body)
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head + body)
        with contextlib.suppress(ConnectionError):
            while received.count(b"HTTP/1.1 ") < 2 and (more := connection.recv(65536)):
                received += more
    return received


@needs_nginx
def test_through_nginx_as_to_torchserve_itself(container, mount, generated):
    expected = generated(settings=REPOSITORY_SETTINGS)
    with container(mount) as pod:
        assert predict(pod.url, PROMPT).json() == {"predictions": [expected]}
        assert infer(pod.url, PROMPT).json()["outputs"][0]["data"] == [expected]
        for path in ("/ping", "/v2/health/live", "/v2/health/ready"):
            assert requests.get(pod.url + path, timeout=20).ok
        # KServe's OpenAI clients.
        with openai.OpenAI(base_url=f"{pod.url}/openai/v1", api_key="any") as client:
            assert [model.id for model in client.models.list()] == ["bloom"]
            asked = {"model": "bloom", "prompt": PROMPT, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
            whole = client.completions.create(**asked).choices[0].text
            parts = [part.choices[0].text for part in client.completions.create(**asked, stream=True)]
            assert len([part for part in parts if part]) > 1 and "".join(parts) == whole
        assert predict(pod.url, PROMPT, temperature="hot").status_code == 400
        # A client that hangs up is noticed. Its answer is as long as the context, and several: one may come too fast.
        answer = complete(pod.url, **{**ENDLESS, "max_tokens": 1900, "n": 8}, stream=True)
        assert next(answer.iter_content(1)) and describe(pod.url)["engine"]["running"]
        answer.close()
        deadline = time.monotonic() + 60
        while describe(pod.url)["engine"]["running"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        port = int(pod.url.rpartition(":")[2])
        scraped = requests.get(f"http://127.0.0.1:{port + 1}/metrics", timeout=20)
        assert scraped.ok and "ts_inference_requests_total" in scraped.text
        for management in ("models", "models/bloom"):
            assert requests.get(f"{pod.url}/{management}", timeout=20).status_code >= 400
        # Why nginx is there: TorchServe itself answers a request that hides in another one's body.
        assert smuggle(port).startswith(b"HTTP/1.1 400 ") and smuggle(port).count(b"HTTP/1.1 ") == 1
        assert smuggle(torchserves_port(pod)).count(b"HTTP/1.1 200 ") == 2
        # All but nginx is on loopback.
        listening = {
            (connection.laddr.ip, connection.laddr.port)
            for process in pod.family()
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        everywhere = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
        assert {at for at in listening if at[0] not in ("127.0.0.1", "::ffff:127.0.0.1")} == {
            (everywhere, port),
            (everywhere, port + 1),
        }
        # Without nginx nobody is served.
        (nginx,) = [child for child in psutil.Process(pod.process.pid).children() if child.name() == "nginx"]
        family = pod.family()
        nginx.kill()
        assert pod.process.wait(timeout=60) != 0
        kill(family)  # as the kernel does when a container's first process has ended: nginx's worker stays otherwise
        assert "error: nginx ended by itself with status -9" in (pod.folder / "log").read_text()


def test_a_key_is_needed_unless_it_is_said_that_none_is(mount, tmp_path):
    command = [*ENTRY, "serve", "--ts-config", mount / "config/config.properties"]
    environment = with_nginx(os.environ) | {"TMPDIR": str(tmp_path)}
    for key in ("", "short"):
        refused = subprocess.run(command, env={**environment, "API_KEY": key}, capture_output=True, text=True)
        assert refused.returncode == 1
        assert refused.stderr.startswith("error: API_KEY must hold one key") and "AUTH=none" in refused.stderr


@needs_nginx
def test_kserves_own_arguments_and_a_restart_on_the_same_volume(container, bloom, tmp_path, generated):
    mount, expected = mounted(tmp_path, bloom, "zip-store"), {"predictions": [generated(settings=REPOSITORY_SETTINGS)]}
    arguments = ["torchserve", "--start", f"--model-store={mount}/model-store"]
    with container(mount, *arguments) as pod:
        assert predict(pod.url, PROMPT).json() == expected
        kill(pod.family())  # the container dies, the volume stays
        pod.process.wait()
        # With a process id that is another's by now.
        (pod.folder / "torchserve/.model_server.pid").write_text(str(os.getpid()))
        (pod.folder / "torchserve/leftover").touch()
        pod.start(*pod.arguments)
        pod.wait_ready()
        assert predict(pod.url, PROMPT).json() == expected
        assert not (pod.folder / "torchserve/leftover").exists()


@needs_nginx
def test_a_model_that_cannot_load_is_never_ready(container, mount, tmp_path):
    subprocess.run(["cp", "-rL", mount, tmp_path / "models"], check=True)
    (tmp_path / "models/model-store/bloom/setup_config.json").write_text('{"max_memory": "all"}')
    with container(tmp_path / "models", wait=False) as pod:
        deadline = time.monotonic() + READY_TIMEOUT
        while b"SettingsError" not in (pod.folder / "log").read_bytes():
            assert time.monotonic() < deadline, (pod.folder / "log").read_text()
            time.sleep(0.2)
        probe = pod.run("ready")
        assert probe.returncode == 1 and probe.stderr.startswith("bloom: ") and probe.stderr.count("\n") == 1
        assert requests.get(f"{pod.url}/ping", timeout=10).status_code == 200  # which is why it is not the probe


def test_what_was_not_uploaded_is_said(tmp_path):
    missing = subprocess.run([*ENTRY, "serve", "--ts-config", tmp_path / "no"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert missing.stderr.startswith(f"error: {tmp_path}/no does not exist: set storageUri to what make upload filled")


def test_a_configuration_without_a_model_is_said(tmp_path):
    (tmp_path / "config.properties").write_text("load_models=all")
    command = [*ENTRY, "serve", "--ts-config", tmp_path / "config.properties"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and "names no model in model_snapshot" in refused.stderr


def test_probes_import_nothing_but_the_standard_library():
    code = "import sys, server.container; print(*(set(sys.modules) & {'torch', 'requests', 'psutil', 'yaml'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
