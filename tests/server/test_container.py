"""What the container's entry asks the kernel, and how it ends."""

import contextlib
import signal
import socket
import subprocess
import sys

import pytest

from server.container import _open_requests


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_open_requests_are_the_connections_to_torchserve():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        port = server.getsockname()[1]
        assert _open_requests(port) == 0  # listening alone is none
        with contextlib.ExitStack() as stack:
            for listener in (server, server, other):
                client = stack.enter_context(socket.create_connection(listener.getsockname()))
                accepted, _ = listener.accept()
                stack.enter_context(accepted)
            assert _open_requests(port) == 2
            client.close()
        assert _open_requests(port) == 0  # nor are those that have ended


CHILD = """
import os, signal, sys, time
seconds, name = float(sys.argv[1]), sys.argv[2]
def end(*_):
    time.sleep(seconds)
    os.write(1, f"{name} ends\\n".encode())
    os._exit(0)
signal.signal(signal.SIGQUIT if name == "nginx" else signal.SIGTERM, end)
os.write(1, b"up\\n")
while True:
    signal.pause()
"""
INIT = f"""
import signal, sys
from pathlib import Path
from server import container
container._work_folder = lambda: Path(sys.argv[1])
children = {{"TorchServe": "0", "nginx": "0.5"}}
commands = {{name: [sys.executable, "-c", {CHILD!r}, seconds, name] for name, seconds in children.items()}}
sys.exit(container._run_as_init(commands, {{}}, signals={{"nginx": signal.SIGQUIT}}))
"""


def test_what_nginx_has_begun_is_answered_before_torchserve_ends(tmp_path):
    with subprocess.Popen([sys.executable, "-c", INIT, tmp_path], stdout=subprocess.PIPE, text=True) as init:
        assert init.stdout and [init.stdout.readline(), init.stdout.readline()] == ["up\n"] * 2
        init.send_signal(signal.SIGTERM)
        assert init.stdout.read() == "nginx ends\nTorchServe ends\n"
    assert init.returncode == 0


def test_who_is_told_to_end_while_it_starts_ends_what_it_has_started(tmp_path):
    """Between the start of one child and the next."""
    told = """
import os, subprocess
start = subprocess.Popen
def told(*arguments, **options):
    process = start(*arguments, **options)
    os.kill(os.getpid(), signal.SIGTERM)
    return process
container.subprocess.Popen = told
"""
    code = INIT.replace("children =", f"{told}children =")
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "nginx" not in ended.stdout


def test_who_is_told_to_end_before_anything_has_started_ends(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from server import container, proxy
container._work_folder = lambda: Path(sys.argv[1], "work")
proxy.command = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
container.serve(Path(sys.argv[1], "config/config.properties"), {}, 1, 2)
"""
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.properties").write_text('model_snapshot={"models": {"bloom": {"1.0": {}}}}')
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
