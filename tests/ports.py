"""Ports for the servers that tests start, also when several processes run tests at once."""

import contextlib
import socket

from server.config_properties import PORTS

RANGE = range(20_000, 32_000, len(PORTS))  # below the ports that Linux gives to clients
_claims: list[socket.socket] = []


def free_port() -> int:
    """A port with as many free ones after it as TorchServe needs, and no other process's.

    A UDP socket on the first of them claims all of them until this process ends: TorchServe, which uses TCP, is not in
    its way. Looking for a free port alone would give the same one to two processes that look at the same time.
    """
    for port in RANGE:
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        if all(map(_is_free, range(port, port + len(PORTS)))):
            return port
    raise RuntimeError(f"no free ports between {RANGE.start} and {RANGE.stop}")


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False
