"""The commands as a person types them."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import REPOSITORY_SETTINGS
from tests.ports import free_port

ROOT = Path(__file__).parents[2]


def start(*command, cwd=ROOT):
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"{text!r} was never printed")


def make(*arguments):
    return subprocess.run(["make", "--silent", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def serves(port):
    """The Java and worker processes of the TorchServe whose work folder is the port's."""
    marker = f".run/{port}/"
    return [p for p in psutil.process_iter(["cmdline"]) if any(marker in part for part in p.info["cmdline"] or [])]


@pytest.mark.parametrize("end", ["Ctrl-C", "make stop"])
def test_serve_predict_and_both_ways_to_end_it(bloom, end, generated):
    port, text = free_port(), "The quick brown fox"
    expected = generated(text, settings=REPOSITORY_SETTINGS)
    serving = start("scripts.serve", "--model-dir", str(bloom), "--model-name", "mine", "--port", str(port))
    try:
        read_until(serving, "READY")
        assert serves(port)
        answer = make("predict", "MODEL_NAME=mine", f"PORT={port}", f"TEXT={text}")
        assert json.loads(answer.stdout) == {"predictions": [expected]}
        if end == "Ctrl-C":
            serving.send_signal(signal.SIGINT)
        else:
            assert make("stop", f"PORT={port}").stdout.strip() == "stopped"
        assert serving.wait(120) == 0
    finally:
        make("stop", f"PORT={port}")
        serving.kill()
    deadline = time.monotonic() + 60
    while serves(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not serves(port)


def test_predict_when_nothing_is_served():
    answer = make("predict", f"PORT={free_port()}")
    assert answer.returncode
    assert "is it served?" in answer.stderr and "Traceback" not in answer.stderr


def test_stop_when_nothing_is_served():
    assert "nothing is served" in make("stop", f"PORT={free_port()}").stdout


def test_serve_on_a_port_that_is_taken(bloom):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        serving = start("scripts.serve", "--model-dir", str(bloom), "--port", str(port))
        output = serving.communicate(timeout=300)[0]
    assert serving.returncode == 1
    assert f"port {port} (inference) is taken" in output and "Traceback" not in output


def test_demo_ends_with_english_and_leaves_nothing():
    """The answer is the last line; the steps before it say their time and size."""
    demo = start("scripts.demo")
    output = demo.communicate(timeout=500)[0]
    assert demo.returncode == 0, output
    lines = output.strip().splitlines()
    (text,) = json.loads(lines[-1])["predictions"]
    assert text.startswith("My dog is cute")
    words = set(re.findall(r"[a-z]+", text.removeprefix("My dog is cute").lower()))
    assert len(words & {"i", "a", "the", "and", "he", "she", "is", "to", "of", "my", "it", "that", "but"}) >= 4
    assert all(re.search(rf"^{number}\. .* \d+\.\d s", output, re.M) for number in range(1, 6))
    assert not serves("demo")


def test_demo_says_the_workers_cause(tmp_path):
    setup = tmp_path / "setup_config.json"
    setup.write_text(json.dumps({"device_map": {"": "mps"}}))
    demo = start("scripts.demo", "--setup-config", str(setup))
    output = demo.communicate(timeout=500)[0]
    assert demo.returncode == 1
    assert "the worker could not load the model" in output and "Traceback" in output
    assert re.match(r"\w*Error: .*mps", output.splitlines()[-1], re.I)
    assert not serves("demo")
