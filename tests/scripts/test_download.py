"""The download script, run as people run it, against a small server that speaks the hub's protocol."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import download
from scripts.console import UserError

ROOT = Path(__file__).parents[2]
MODEL = "tiny/bloom"
OLD, NEW = "a" * 40, "b" * 40
CHUNK = 10 * 2**20  # huggingface_hub writes to disk in pieces of this size: what is kept of a cut download
BIG = os.urandom(2 * CHUNK + 1_000_000)
SMALL = {
    "config.json": b"{}",
    "tokenizer.json": b'{"vocab": 1}',
    "README.md": b"# Tiny",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_tiny.py": b"pass",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
}
Sent = namedtuple("Sent", "name status range authorization bytes")


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor{i}": shard for i, shard in enumerate(shards)}}).encode()


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".h5"))


class Hub(ThreadingHTTPServer):
    """What huggingface_hub uses of huggingface.co: a model's file list, and its files.

    Weights are in large-file storage, so `resolve` redirects to another host, which must never see the token.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {"main": OLD}
        self.gated = False
        self.cut_at: int | None = None  # bytes into a large file; the connection breaks and the hub is down
        self.damage = False
        self.down = False
        self.sent: list[Sent] = []

    def weights_sent(self) -> int:
        return sum(sent.bytes for sent in self.sent if is_lfs(sent.name))


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.down:
            return self.answer(503)
        if match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
            return self.model_info(*match.groups())
        if match := re.fullmatch(rf"/{MODEL}/resolve/([0-9a-f]+)/(.+)", path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/storage/([0-9a-f]+)/(.+)", path):
            return self.send_file(match[2], self.server.commits[match[1]][match[2]])
        return self.answer(404, error="EntryNotFound")

    def model_info(self, model_id: str, revision: str) -> None:
        if model_id != MODEL:
            return self.answer(401)  # the hub does not tell a stranger whether a repository exists
        commit = self.server.branches.get(revision, revision)
        if commit not in self.server.commits:
            return self.answer(404, error="RevisionNotFound")
        files = []
        for name, data in self.server.commits[commit].items():
            entry = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if is_lfs(name):
                sha256 = hashlib.sha256(data).hexdigest()
                entry |= {
                    "blobId": "f" * 40,
                    "lfs": {"size": len(data), "sha256": sha256, "pointerSize": 134},
                }
            files.append(entry)
        return self.answer(200, json.dumps({"id": model_id, "sha": commit, "siblings": files}).encode())

    def resolve(self, commit: str, name: str) -> None:
        if self.server.gated:
            return self.answer(403, error="GatedRepo")
        if is_lfs(name):
            self.log(name, 302)
            return self.answer(302, location=f"{self.server.storage}/{commit}/{name}")
        return self.send_file(name, self.server.commits[commit][name])

    def send_file(self, name: str, data: bytes) -> None:
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")) else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        rest = data[start : self.server.cut_at] if is_lfs(name) else data[start:]
        self.log(name, 206 if start else 200, len(rest))  # before the client can be through
        self.wfile.write(bytes(len(rest)) if self.server.damage else rest)
        if start + len(rest) < len(data):
            self.server.down = True
            self.close_connection = True

    def answer(self, status: int, body: bytes = b"", error: str = "", location: str = "") -> None:
        self.send_response(status)
        headers = {"X-Error-Code": error, "Location": location, "Content-Length": str(len(body))}
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log(self, name: str, status: int, size: int = 0) -> None:
        sent = Sent(name, status, self.headers["Range"], self.headers["Authorization"], size)
        self.server.sent.append(sent)

    def log_message(self, *args: object) -> None:
        pass


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


def run(hub: Hub, output: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    home = output.parent / "hf-home"
    return subprocess.run(
        [sys.executable, "-m", "scripts.download", "--model-id", MODEL, "--output-dir", str(output), *args],
        cwd=ROOT,
        env={
            **clean,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **env,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def fails_with(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line on stderr, which begins with "error: " and holds all `words`, and exit code 1."""
    assert result.returncode == 1, result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: "), result.stderr
    for word in words:
        assert word in result.stderr


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_safetensors_come_alone_and_the_commit_is_recorded(hub: Hub, tmp_path: Path) -> None:
    elsewhere = (
        "pytorch_model.bin",
        "tf_model.h5",
        "consolidated.safetensors",
        "original/consolidated.safetensors",
    )
    unwanted = dict.fromkeys((*elsewhere, "pytorch_model.bin.index.json", ".gitattributes", "onnx/config.json"), b"no")
    hub.commits[OLD] = {**SMALL, **unwanted, "model.safetensors": BIG}
    output = tmp_path / "out"

    result = run(hub, output, HF_TOKEN="hf_secret")

    assert result.returncode == 0, result.stderr
    assert OLD in result.stdout
    assert files_in(output) == {*SMALL, "model.safetensors", "download.json"}
    assert (output / "model.safetensors").read_bytes() == BIG
    assert (output / "additional_chat_templates/tool.jinja").read_bytes() == b"{{ tools }}"
    record = json.loads((output / "download.json").read_text())
    assert (record["model_id"], record["revision"], record["commit"]) == (MODEL, "main", OLD)
    assert {"name": "model.safetensors", "size": len(BIG)} in record["files"]
    assert hub.sent and all(sent.name not in unwanted for sent in hub.sent)
    tokens = {sent.status: sent.authorization for sent in hub.sent if is_lfs(sent.name)}
    assert tokens == {302: "Bearer hf_secret", 200: None}


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["pytorch_model.bin"], {"pytorch_model.bin"}),
        # transformers would not load this one, so it does not count as safetensors weights.
        (["pytorch_model.bin", "consolidated.safetensors"], {"pytorch_model.bin"}),
        (["model-1.safetensors", "model-2.safetensors", "model-old.safetensors", "pytorch_model.bin"], None),
    ],
)
def test_the_weights_are_those_that_transformers_loads(hub, tmp_path, present, expected) -> None:
    hub.commits[OLD] = {"config.json": b"{}", **dict.fromkeys(present, b"weights")}
    if expected is None:  # a sharded checkpoint
        hub.commits[OLD]["model.safetensors.index.json"] = index_of("model-1.safetensors", "model-2.safetensors")
        expected = {"model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"}

    assert run(hub, tmp_path / "out").returncode == 0
    assert files_in(tmp_path / "out") == {"config.json", "download.json", *expected}


def test_a_branch_that_moves_does_not_change_the_commit_being_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.commits = {OLD: {"model.safetensors": b"old"}, NEW: {"model.safetensors": b"new"}}
    hub.branches["main"] = NEW
    assert run(hub, tmp_path / "out", "--revision", OLD).returncode == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == b"old"


def test_a_cut_download_resumes_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.commits[OLD] = {**SMALL, "model.safetensors": BIG}
    hub.cut_at = 2 * CHUNK + 500_000
    cut = run(hub, tmp_path / "out")
    assert cut.returncode == 1
    assert "answers 503" in cut.stderr.splitlines()[-1]
    assert "Traceback" not in cut.stderr
    assert "model.safetensors" not in files_in(tmp_path / "out")
    assert "download.json" not in files_in(tmp_path / "out")

    hub.cut_at, hub.down, hub.sent = None, False, []
    assert run(hub, tmp_path / "out").returncode == 0
    assert [sent.range for sent in hub.sent if sent.status == 206] == [f"bytes={2 * CHUNK}-"]
    assert hub.weights_sent() == len(BIG) - 2 * CHUNK
    assert (tmp_path / "out/model.safetensors").read_bytes() == BIG
    assert files_in(tmp_path / "out") == {*SMALL, "model.safetensors", "download.json"}


def test_a_second_run_moves_nothing_and_says_so(hub: Hub, tmp_path: Path) -> None:
    hub.commits[OLD] = {
        **SMALL,
        "model-1.safetensors": BIG,
        "model.safetensors.index.json": index_of("model-1.safetensors"),
    }
    assert run(hub, tmp_path / "out").returncode == 0
    hub.sent.clear()
    again = run(hub, tmp_path / "out")
    assert again.returncode == 0
    assert "nothing to download" in again.stdout
    assert hub.weights_sent() == 0


def test_a_new_commit_costs_what_changed_and_leaves_nothing_of_the_old(hub: Hub, tmp_path: Path) -> None:
    hub.commits[OLD] = {"config.json": b"{}", "tokenizer.model": b"pieces", "model.safetensors": b"one file"}
    hub.commits[NEW] = {
        "config.json": b"[]",  # as long as before: only its hash tells
        "tokenizer.model": b"pieces",
        "model.safetensors.index.json": index_of("model-1.safetensors"),
        "model-1.safetensors": BIG,
    }
    assert run(hub, tmp_path / "out").returncode == 0
    hub.branches["main"] = NEW
    hub.sent.clear()
    assert run(hub, tmp_path / "out").returncode == 0
    # A model.safetensors left behind would win over the index, and the old model be served.
    assert files_in(tmp_path / "out") == {*hub.commits[NEW], "download.json"}
    assert (tmp_path / "out/config.json").read_bytes() == b"[]"
    assert "tokenizer.model" not in {sent.name for sent in hub.sent}
    assert json.loads((tmp_path / "out/download.json").read_text())["commit"] == NEW


def test_a_damaged_file_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.commits[OLD] = {"model.safetensors": BIG}
    hub.damage = True
    fails_with(run(hub, tmp_path / "out"), "model.safetensors", "damaged", "again")
    assert files_in(tmp_path / "out") == set()
    hub.damage = False
    assert run(hub, tmp_path / "out").returncode == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == BIG


def test_a_folder_with_another_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.commits[OLD] = {"model.safetensors.index.json": index_of("a.safetensors"), "a.safetensors": b"a"}
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    fails_with(run(hub, tmp_path), "model.safetensors", "--output-dir")
    (tmp_path / "download.json").write_text(json.dumps({"model_id": "other/model", "files": []}))
    fails_with(run(hub, tmp_path), "other/model", "--output-dir")
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.commits[OLD] = {"model.safetensors": b"x"}
    fails_with(run(hub, tmp_path, "--model-id", "no/such"), "no model no/such", "--model-id", "HF_TOKEN")
    fails_with(run(hub, tmp_path, "--model-id", "a/b/c"), "a/b/c")
    fails_with(run(hub, tmp_path, "--revision", "v9"), "v9", "revision")
    fails_with(run(hub, tmp_path, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    hub.gated = True
    fails_with(run(hub, tmp_path), "gated", "HF_TOKEN", hub.url)


def test_an_unreachable_hub_is_one_line(hub: Hub, tmp_path: Path) -> None:
    fails_with(run(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:1"), "http://127.0.0.1:1", "network")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b"{}", "model.gguf": b"x"}, ["no weights", "model.safetensors"]),
        ({"model.safetensors.index.json": index_of("gone.safetensors")}, ["gone.safetensors", "--revision"]),
        ({"model.safetensors.index.json": index_of("../evil"), "../evil": b"x"}, ["../evil"]),
    ],
)
def test_a_repository_that_cannot_be_loaded_is_refused(hub, tmp_path, files, words) -> None:
    hub.commits[OLD] = files
    fails_with(run(hub, tmp_path / "out"), *words)


def test_too_little_space_is_told_with_both_numbers(tmp_path, monkeypatch) -> None:
    weights = download.File("model.safetensors", 2_000_000_000, "0" * 64)
    commit = download.Commit(MODEL, "main", OLD, {weights.name: weights})
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_500_000_000))
    with pytest.raises(UserError, match=r"2\.00GB needed, 1\.50GB free"):
        download.download(commit, tmp_path / "out")
