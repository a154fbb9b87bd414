"""nginx as it runs before TorchServe: what dies there, and what comes through as one request."""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time

import pytest
import requests

from server import proxy
from server.errors import LaunchError
from tests.nginx import needs_nginx, with_nginx
from tests.ports import free_port

pytestmark = needs_nginx
KEYS = ["first-key-of-this-test", "second+key/of.this_test="]
MAX = 2**20


class Upstream:
    """In TorchServe's place: keeps what arrives on each connection, as bytes, and answers it."""

    def __init__(self):
        self.received: list[bytearray] = []
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        """Read one request and all that follows it, if anything does."""
        received = bytearray()
        self.received.append(received)
        with connection:
            while True:
                head, found, body = received.partition(b"\r\n\r\n")
                if found and len(body) >= int(headers(head).get("content-length", 0)):
                    break
                received += connection.recv(65536)
            connection.sendall(self.answer)
            connection.settimeout(0.2)
            with contextlib.suppress(OSError):
                received += connection.recv(65536)


def headers(head):
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


@contextlib.contextmanager
def running(folder, upstream, api_keys, host="127.0.0.1"):
    port = free_port()
    address = f"http://127.0.0.1:{upstream.port}"
    properties = {"inference_address": address, "metrics_address": address, "max_request_size": str(MAX)}
    command = proxy.command(folder / "nginx", properties, ("bloom", "1.0"), api_keys, port, port + 1, host)
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    yield port
                    break
                time.sleep(0.02)
            else:
                pytest.fail((folder / "log").read_text())
        finally:
            process.terminate()


@pytest.fixture(scope="module", autouse=True)
def nginx_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", with_nginx(os.environ)["PATH"])
        yield


@pytest.fixture(scope="module")
def upstream():
    upstream = Upstream()
    yield upstream
    upstream.listener.close()


@pytest.fixture(scope="module")
def open_port(tmp_path_factory, upstream):
    """The port of an nginx that asks for no key."""
    with running(tmp_path_factory.mktemp("open"), upstream, None) as port:
        yield port


@pytest.fixture(scope="module")
def locked(tmp_path_factory, upstream):
    """The URL of an nginx that asks for a key."""
    with running(tmp_path_factory.mktemp("locked"), upstream, KEYS) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def nothing_received(upstream):
    upstream.received.clear()


def send(port, *data):
    """What comes back on one connection until nginx ends it."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        received = b""
        with contextlib.suppress(ConnectionError):
            for part in data:
                connection.sendall(part)
            while more := connection.recv(65536):
                received += more
        return received


HOST = b"POST /predictions/bloom HTTP/1.1\r\nHost: x\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def get(port, path):
    """A GET of exactly this path; clients would tidy it up."""
    return send(port, SMUGGLED.replace(b"/smuggled", path))


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        pytest.param(HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, id="CL.TE"),
        pytest.param(HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400, id="TE.CL"),
        pytest.param(HOST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", 400, id="CL.CL"),
        pytest.param(HOST + b"Content-Length: 5, 5\r\n\r\nabcde", 400, id="a list of lengths"),
        pytest.param(HOST + b"Content-Length: +5\r\n\r\nabcde", 400, id="a signed length"),
        pytest.param(HOST + b"Content-Length: -1\r\n\r\n", 400, id="a negative length"),
        pytest.param(HOST + b"Content-Length: 0x5\r\n\r\nabcde", 400, id="a length in hexadecimal"),
        pytest.param(
            HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", 400, id="TE.TE"
        ),
        pytest.param(HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501, id="another encoding"),
        pytest.param(HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, id="two encodings"),
        pytest.param(HOST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", 501, id="a vertical tab"),
        pytest.param(HOST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400, id="a space before the colon"),
        pytest.param(HOST + b"X: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, id="a folded line"),
        pytest.param(HOST + b"X\x01Y: z\r\nContent-Length: 0\r\n\r\n", 400, id="a control character in a name"),
        pytest.param(HOST + b"X: y\x00z\r\nContent-Length: 0\r\n\r\n", 400, id="a zero byte in a value"),
        pytest.param(HOST + b": z\r\nContent-Length: 0\r\n\r\n", 400, id="no name"),
        pytest.param(HOST + b"no colon\r\nContent-Length: 0\r\n\r\n", 400, id="no colon"),
        pytest.param(HOST + b"Host: y\r\nContent-Length: 0\r\n\r\n", 400, id="two hosts"),
        pytest.param(b"POST /predictions/bloom HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400, id="no host"),
        pytest.param(HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n", 400, id="a chunk's size"),
        pytest.param(HOST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n", 400, id="a negative chunk"),
        pytest.param(HOST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n", 400, id="too long a chunk"),
        pytest.param(
            HOST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\nabc\r\n", 400, id="a size of 68 bits"
        ),
        pytest.param(
            b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, id="chunks in HTTP/1.0"
        ),
        pytest.param(b"GET /ping HTTP/3.0\r\nHost: x\r\n\r\n", 400, id="another version of HTTP"),
        pytest.param(b"GET /ping HTTP/1.1 x\r\nHost: x\r\n\r\n", 400, id="a request line of four words"),
        pytest.param(b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400, id="a space in the path"),
        pytest.param(b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400, id="a zero byte in the path"),
        pytest.param(b"GET /%2e%2e%2fx/../../.. HTTP/1.1\r\nHost: x\r\n\r\n", 400, id="a path above the root"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, id="HTTP/2"),
        pytest.param(b"get /ping HTTP/1.1\r\nHost: x\r\n\r\n", 400, id="a method in lower case"),
        pytest.param(b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405, id="TRACE"),
        pytest.param(b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, id="a long path"),
        pytest.param(HOST + b"X: " + b"a" * 9000 + b"\r\n\r\n", 400, id="a long header"),
        pytest.param(HOST + b"X: aaaaaaaaa\r\n" * 4000 + b"\r\n", 400, id="many headers"),
        pytest.param(
            HOST + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % (MAX + 1) + b"a" * (MAX + 1),
            413,
            id="a large chunk",
        ),
    ],
)
def test_what_is_malformed_or_ambiguous_dies_there(open_port, upstream, request_bytes, status):
    answer = send(open_port, request_bytes, SMUGGLED)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"content-type: application/json" in head.lower() and json.loads(body)["error"]["code"] == status
    assert answer.count(b"HTTP/1.1 ") == 1 and upstream.received == []  # and what follows dies with it


def test_a_body_that_goes_wrong_later_dies_there_too(open_port, upstream):
    with socket.create_connection(("127.0.0.1", open_port), timeout=30) as connection:
        connection.sendall(HOST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n")
        time.sleep(0.2)
        connection.sendall(b"zz\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert upstream.received == []


def test_a_large_body_is_refused_before_it_is_sent(open_port, upstream):
    with socket.create_connection(("127.0.0.1", open_port), timeout=30) as connection:
        connection.sendall(HOST + b"Content-Length: %d\r\n\r\n" % (MAX + 1))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    assert upstream.received == []


def test_a_method_that_nobody_needs_is_refused(open_port, upstream):
    answer = requests.delete(f"http://127.0.0.1:{open_port}/models/bloom", timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, 405)
    refused = send(open_port, b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert refused.startswith((b"HTTP/1.1 405 ", b"HTTP/1.1 400 "))  # nginx 1.22 says 400
    assert upstream.received == []


@pytest.mark.parametrize(
    "framing, body",
    [
        (b"Content-Length: 5\r\n", b"abcde"),
        (b"Transfer-Encoding: chunked\r\n", b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"),
        (b"Transfer-Encoding: CHUNKED\r\n", b"5;name=value\r\nabcde\r\n0\r\nTrailer: x\r\n\r\n"),
        (b"Transfer_Encoding: chunked\r\nContent-Length: 5\r\n", b"abcde"),
        (b"Connection: Content-Length\r\nContent-Length: 5\r\n", b"abcde"),
    ],
)
def test_what_is_well_formed_arrives_as_one_request_with_a_length(open_port, upstream, framing, body):
    more = b"Connection: close\r\nContent-Type: text/plain\r\ndescribe: True\r\nUpgrade: h2c\r\n"
    send(open_port, HOST + framing + more + b"\r\n" + body)
    (received,) = upstream.received
    head, _, rest = received.partition(b"\r\n\r\n")
    assert rest == b"abcde"
    assert head.split(b"\r\n")[0] == b"POST /predictions/bloom HTTP/1.1"
    assert headers(head) == {
        "host": "torchserve",
        "connection": "close",
        "content-type": "text/plain",
        "content-length": "5",
    }


def test_two_requests_in_one_write_go_on_two_connections(open_port, upstream):
    """Nothing that one client sends can become part of another's request."""
    answer = send(open_port, HOST + b"Content-Length: 0\r\n\r\n" + SMUGGLED)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert [received.split(b"\r\n")[0] for received in upstream.received] == [
        b"POST /predictions/bloom HTTP/1.1",
        b"GET /smuggled HTTP/1.1",
    ]


def test_what_an_answer_has_too_much_reaches_nobody(open_port, upstream, monkeypatch):
    first = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
    monkeypatch.setattr(upstream, "answer", first)
    answer = send(open_port, SMUGGLED)
    monkeypatch.undo()
    assert answer.endswith(b"\r\n\r\nok")
    assert send(open_port, SMUGGLED).endswith(b"\r\n\r\nok")


def test_openais_paths_are_where_kserve_has_them(open_port, upstream):
    body = {"prompt": "x"}
    requests.post(f"http://127.0.0.1:{open_port}/openai/v1/completions?a=b", json=body, timeout=10)
    requests.get(f"http://127.0.0.1:{open_port}/openai/v1/models", timeout=10)
    get(open_port, b"/openai/v1/%0d%0aX:%20y")
    get(open_port, b"/openai/v1/../../x")
    get(open_port, b"/openai/v1")
    assert [received.split(b"\r\n")[0] for received in upstream.received] == [
        b"POST /predictions/bloom/1.0/v1/completions?a=b HTTP/1.1",
        b"GET /predictions/bloom/1.0/v1/models HTTP/1.1",
        b"GET /predictions/bloom/1.0/v1/%0D%0AX:%20y HTTP/1.1",
        b"GET /openai/v1/../../x HTTP/1.1",
        b"GET /predictions/bloom/1.0/v1 HTTP/1.1",
    ]


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"503 Service Unavailable", b"400 Bad", b"413 Too Large"])
def test_torchserves_errors_pass_as_they_are(open_port, upstream, monkeypatch, status):
    answer = (
        b'HTTP/1.1 %s\r\nContent-Type: application/json\r\nRetry-After: 7\r\nContent-Length: 5\r\n\r\n"own"' % status
    )
    monkeypatch.setattr(upstream, "answer", answer)
    passed = requests.post(f"http://127.0.0.1:{open_port}/predictions/bloom", data=b"x", timeout=10)
    assert (passed.status_code, passed.text) == (int(status[:3]), '"own"')
    assert passed.headers["Retry-After"] == "7"


def test_an_answer_that_is_cut_is_not_whole_for_the_client(open_port, upstream, monkeypatch):
    monkeypatch.setattr(upstream, "answer", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    assert send(open_port, SMUGGLED).endswith(b"3\r\nabc\r\n")


def test_without_an_answer_the_client_may_come_again(open_port, upstream, monkeypatch):
    monkeypatch.setattr(upstream, "answer", b"")
    answer = requests.get(f"http://127.0.0.1:{open_port}/predictions/bloom", timeout=10)
    assert (answer.status_code, answer.headers["Retry-After"]) == (502, "1")
    assert "send the request again" in answer.json()["error"]["message"]
    assert len(upstream.received) == 1


def test_prometheus_gets_metrics_and_nothing_else(open_port, upstream):
    url = f"http://127.0.0.1:{open_port + 1}"
    assert requests.get(f"{url}/metrics?name[]=x", timeout=10).text == "ok"
    assert requests.get(f"{url}/predictions/bloom", timeout=10).status_code == 404
    assert len(upstream.received) == 1


@pytest.mark.parametrize(
    "given",
    [None, "Bearer", "Bearer wrong", f"Bearer {KEYS[0].upper()}", f"Bearer {KEYS[0]}x", f"Bearer x{KEYS[0]}", KEYS[0]],
)
@pytest.mark.parametrize(
    "path", ["/predictions/bloom", "/v1/models/bloom:predict", "/openai/v1/models", "/openai/v1", "/"]
)
def test_without_a_key_nothing_is_served(locked, upstream, given, path):
    answer = requests.post(locked + path, headers={"Authorization": given} if given else {}, data=b"x", timeout=10)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert "api_key" in answer.json()["error"]["message"]
    assert upstream.received == []


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("path", ["/predictions/bloom", "/v1/models/bloom:predict", "/openai/v1/models", "/"])
def test_each_key_opens(locked, upstream, key, path):
    assert requests.get(locked + path, headers={"Authorization": f"bearer {key}"}, timeout=10).text == "ok"
    assert key.encode() not in upstream.received[0]


def test_health_needs_no_key_and_is_no_way_in(locked, upstream):
    port = int(locked.rpartition(":")[2])
    for path in ("/ping", "/v2/health/live", "/v2/health/ready"):
        assert requests.get(locked + path, timeout=10).text == "ok"
        get(port, b"/predictions/bloom/1.0/x/../../../.." + path.encode())
    paths = [received.split(b" ")[1] for received in upstream.received]
    assert paths == [path for path in (b"/ping", b"/v2/health/live", b"/v2/health/ready") for _ in range(2)]
    assert requests.get(f"{locked}/ping/", timeout=10).status_code == 401


@pytest.mark.parametrize("path", ["/ping", "/v2/health/ready", "/predictions/bloom"])
def test_without_a_key_no_body_is_kept(locked, upstream, path):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", int(locked.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 401 "))
    assert upstream.received == []


def test_a_pod_may_have_ipv6_alone_and_its_kernel_none(tmp_path, upstream, monkeypatch):
    if socket.has_dualstack_ipv6():
        with running(tmp_path / "both", upstream, None, host=None) as port:
            for host in ("127.0.0.1", "[::1]"):
                for each in (port, port + 1):
                    assert requests.get(f"http://{host}:{each}/metrics", timeout=10).text == "ok"
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with running(tmp_path / "old", upstream, None, host=None) as port:
        assert requests.get(f"http://127.0.0.1:{port}/ping", timeout=10).text == "ok"


def test_keys_are_for_nobody_elses_eyes(tmp_path, upstream):
    with running(tmp_path, upstream, KEYS):
        assert (tmp_path / "nginx/nginx.conf").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("keys", [[], ["short"], [KEYS[0], 'quote"in-this-one-here'], ["braces{}in-this-one-here"]])
def test_a_key_that_is_none_is_refused(tmp_path, keys):
    with pytest.raises(LaunchError, match="API_KEY must hold one key"):
        proxy._authorization(keys)


def test_a_models_name_cannot_change_the_configuration(tmp_path):
    with pytest.raises(LaunchError, match="archive it under a name"):
        proxy.command(tmp_path / "nginx", {}, ("bloom; }", "1.0"), None, 1, 2)


def test_without_nginx_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="nginx is not on the PATH"):
        proxy.command(tmp_path / "nginx", {}, ("bloom", "1.0"), None, 1, 2)
