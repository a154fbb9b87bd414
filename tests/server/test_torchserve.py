"""How a TorchServe is found again, what its worker's log tells, and where it may listen; no TorchServe."""

import contextlib
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from server import torchserve
from server.errors import LaunchError
from server.torchserve import FREE_PORTS, PORTS, TorchServe, free_port, stop


@contextlib.contextmanager
def recorded(work, *arguments):
    """A process with these arguments, which the work folder has recorded."""
    work.mkdir()
    command = [sys.executable, "-c", "import time; time.sleep(600)", *arguments]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            (work / "pid").write_text(str(process.pid))
            yield process
        finally:
            process.kill()


def test_it_is_stopped_by_who_has_another_clock(tmp_path, monkeypatch):
    with recorded(tmp_path / "work", tmp_path / "work/config.properties") as process:
        monkeypatch.setattr(psutil.Process, "create_time", lambda *_: 0.0)
        monkeypatch.chdir(tmp_path)
        assert stop(Path("work"))
        process.wait(timeout=60)
        assert not stop(Path("work"))


def test_a_process_that_has_its_id_by_now_is_left_alone(tmp_path):
    with recorded(tmp_path / "work", tmp_path / "another/config.properties") as process:
        assert not stop(tmp_path / "work") and process.poll() is None


LINE = "2026-01-01T00:00:00,000 [INFO ] W-9000-bloom_1.0-stdout MODEL_LOG - "
TRACEBACK = ["Traceback (most recent call last):", '  File "service.py", line 1', "ValueError: no such thing"]


@pytest.mark.parametrize("after", torchserve.AFTER_TRACEBACK)
def test_the_traceback_is_told_when_its_last_line_is_there(tmp_path, monkeypatch, after):
    server = TorchServe(tmp_path / "bloom.mar", 8080, tmp_path)
    server._process = SimpleNamespace(poll=lambda: None)
    assert server.failure() == ""
    server.logs.mkdir()
    coming = [*TRACEBACK, after, "Traceback (most recent call last):", "RuntimeError: 500"]

    def write_a_line(*_):
        with (server.logs / "model_log.log").open("a") as log:
            log.write(f"{LINE}{coming.pop(0)}\n")

    (server.logs / "model_log.log").write_text(f"{LINE}Failed to load model bloom, exception no such thing\n")
    monkeypatch.setattr(time, "sleep", write_a_line)
    assert server.failure().splitlines() == TRACEBACK


@pytest.mark.parametrize("over", ["the time", "TorchServe"])
def test_a_traceback_whose_end_never_comes_is_told_too(tmp_path, monkeypatch, over):
    server = TorchServe(tmp_path / "bloom.mar", 8080, tmp_path)
    if over == "the time":
        server._process = SimpleNamespace(poll=lambda: None)
        monkeypatch.setattr(torchserve, "TRACEBACK_SECONDS", 0)
    server.logs.mkdir()
    lines = ["Backend worker process died.", *TRACEBACK]
    (server.logs / "model_log.log").write_text("".join(f"{LINE}{line}\n" for line in lines))
    assert server.failure().splitlines() == TRACEBACK


def test_a_free_port_is_none_that_clients_get(monkeypatch):
    monkeypatch.setattr(random, "sample", lambda ports, count: list(ports)[:count])
    first = free_port()
    with socket.create_server(("127.0.0.1", first + len(PORTS) - 1)):
        assert first < free_port() < FREE_PORTS.stop
    monkeypatch.setattr(torchserve, "_is_free", lambda port: False)
    with pytest.raises(LaunchError, match="no free ports between"):
        free_port()
