"""Messages of TorchServe are read whole, whatever pieces they come in."""

import socket
import struct
import threading

import pytest
from ts.protocol import otf_message_handler

from handler.field_reader import FieldReader

TORCHSERVES = otf_message_handler._retrieve_buffer


@pytest.fixture
def connection(monkeypatch):
    """Both ends; what the worker reads comes out of a buffer."""
    monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", FieldReader())
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def field(data: bytes) -> bytes:
    return struct.pack("!i", len(data)) + data


def message(*bodies: bytes) -> bytes:
    """As TorchServe sends a batch: of each request its id, its headers and its body, in lists that end with -1."""
    end = struct.pack("!i", -1)
    requests = [
        field(b"id") + field(b"host") + field(b"here") + end + field(b"body") + field(b"text/x") + field(body) + end
        for body in bodies
    ]
    return b"I" + b"".join(requests) + end


def texts(request: tuple) -> list[str]:
    command, batch = request
    assert command == b"I"
    assert [r["headers"] for r in batch] == [[{"name": b"host", "value": b"here"}]] * len(batch)
    return [r["parameters"][0]["value"] for r in batch]


def test_messages_are_the_same_as_torchserve_reads_them(connection, monkeypatch):
    theirs, ours = connection
    sent = [message(b"one", b""), message(b"x" * 200_000), message(b"last")]
    read = []
    for reader in (TORCHSERVES, FieldReader()):
        monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", reader)
        sender = threading.Thread(
            target=lambda: [theirs.sendall(m[i : i + 777]) for m in sent for i in range(0, len(m), 777)], daemon=True
        )
        sender.start()
        read.append([texts(otf_message_handler.retrieve_msg(ours)) for _ in sent])
        sender.join()
    assert read[0] == read[1] == [["one", ""], ["x" * 200_000], ["last"]]


def test_two_messages_at_once_are_two(connection):
    theirs, ours = connection
    theirs.sendall(message(b"one") + message(b"two"))
    assert [texts(otf_message_handler.retrieve_msg(ours)) for _ in range(2)] == [["one"], ["two"]]


def test_another_connection_is_another_buffer(connection):
    theirs, ours = connection
    theirs.sendall(message(b"one") + message(b"never read"))
    assert texts(otf_message_handler.retrieve_msg(ours)) == ["one"]
    others, again = socket.socketpair()
    with others, again:
        others.sendall(message(b"two"))
        assert texts(otf_message_handler.retrieve_msg(again)) == ["two"]


@pytest.mark.parametrize("sent", [b"", message(b"one")[:-9]])
def test_the_worker_ends_when_torchserve_does(connection, sent):
    theirs, ours = connection
    theirs.sendall(sent)
    theirs.close()
    with pytest.raises(SystemExit) as ended:
        otf_message_handler.retrieve_msg(ours)
    assert ended.value.code == 0
