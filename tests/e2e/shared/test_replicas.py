"""Two TorchServes behind one nginx, as replicas behind a cluster's router; one is killed under load."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests

from tests.e2e.asking import PROMPT, predict, worker
from tests.nginx import NGINX, needs_nginx
from tests.ports import free_port

CLIENTS, REQUESTS = 6, 60
CONFIG = """
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
  log_format told '$status|$upstream_addr';
  access_log {folder}/access.log told;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream replicas {{ least_conn; server 127.0.0.1:{first}; server 127.0.0.1:{second}; }}
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://replicas; proxy_buffering off; }} }}
}}
"""


@pytest.fixture(scope="module")
def replica(serving, bloom):
    """A server of this module's own: the last test kills it. A prompt of 4,096 tokens goes in one forward."""
    settings = {"max_new_tokens": 8, "max_sequence_length": 4500, "prefill_chunk": 1024}
    # One thread: stacks of more, which end and begin again with how busy cores are, may not fit what a test leaves it.
    with serving(bloom, settings, "no-archive", environment={"OMP_NUM_THREADS": "1"}) as server:
        yield server


@contextlib.contextmanager
def balanced(first, second, folder):
    """nginx before two TorchServes; its URL."""
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, first=first.port, second=second.port, port=port))
    with subprocess.Popen([NGINX, "-p", folder, "-c", config]) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(requests.RequestException):
                    requests.get(f"http://127.0.0.1:{port}/ping", timeout=5)
                    break
                time.sleep(0.05)
            (folder / "access.log").write_text("")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def kill(server):
    """As a node that dies: nothing is closed in order, no process is left."""
    java = psutil.Process(int((server.work / "pid").read_text().split()[0]))
    for process in [java, *java.children(recursive=True)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def test_a_worker_out_of_memory_says_507_and_serves_on(replica, generated):
    """Its address space is limited to what it has, so that the keys and values of a long prompt do not fit."""
    assert predict(replica.url, PROMPT).json() == {"predictions": [generated()]}
    process = worker(replica)
    limit = process.memory_info().vms + 64 * 2**20
    process.rlimit(psutil.RLIMIT_AS, (limit, psutil.RLIM_INFINITY))
    refused = predict(replica.url, "long " * 800)
    assert refused.status_code == 507, refused.text
    assert "memory" in refused.json()["error"]["message"]
    assert predict(replica.url, PROMPT).json() == {"predictions": [generated()]}
    process.rlimit(psutil.RLIMIT_AS, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    assert predict(replica.url, "long " * 800).ok
    assert process.is_running()


@needs_nginx
def test_one_of_two_is_killed_under_load(replica, continuous, tmp_path):
    body = {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True}
    done = threading.Semaphore(0)

    def ask(_):
        try:
            answer = requests.post(f"{url}/predictions/bloom", json=body, timeout=120)
            return answer.status_code, answer.text
        except requests.RequestException as error:  # the reply had begun
            return "cut", str(error)
        finally:
            done.release()

    process = worker(replica)
    with balanced(replica, continuous, tmp_path) as url, ThreadPoolExecutor(CLIENTS) as pool:
        expected = requests.post(f"{replica.url}/predictions/bloom", json=body, timeout=120).json()["choices"]
        answers = pool.map(ask, range(REQUESTS))
        for _ in range(REQUESTS // 3):
            done.acquire()
        process.suspend()  # what is sent there from now on is in flight when it dies
        while done.acquire(blocking=False):  # those that had ended by then
            pass
        for _ in range(CLIENTS):
            assert done.acquire(timeout=120), "too few requests are left for this test"
        kill(replica)
        answers = list(answers)
    kept = [answer for status, answer in answers if status == 200]
    told = [status for status, _ in answers if status != 200]
    assert len(answers) == REQUESTS
    assert set(told) <= {502, "cut"}, told
    assert 1 <= len(told) <= CLIENTS  # those in flight on the one that died
    assert all(json.loads(answer)["choices"] == expected for answer in kept)
    assert continuous.ready()
    log = [line.split("|") for line in (tmp_path / "access.log").read_text().splitlines()]
    failed = [upstream for status, upstream in log if status == "502"]
    assert all(upstream.split(", ")[0] == f"127.0.0.1:{replica.port}" for upstream in failed)
    assert any(upstream == f"127.0.0.1:{continuous.port}" for status, upstream in log[-CLIENTS:] if status == "200")
