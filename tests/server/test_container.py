"""What the container's entry asks the kernel."""

import contextlib
import socket
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
