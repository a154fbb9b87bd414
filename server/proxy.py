"""nginx before TorchServe, in the same container: see nginx.conf for what it is for."""

import re
import shutil
import socket
from pathlib import Path

from server.errors import LaunchError

TEMPLATE = Path(__file__).with_name("nginx.conf")
TORCHSERVES_MAX_REQUEST_SIZE = 6553500  # bytes, unless config.properties says otherwise
API_KEY = re.compile(r"[\w.~+/=-]{16,}", re.ASCII)  # what may follow `Bearer`
NAME = re.compile(r"[\w.-]+", re.ASCII)  # of a model, in a path


def command(
    folder: Path,
    properties: dict[str, str],
    model: tuple[str, str],
    api_keys: list[str] | None,
    port: int,
    metrics_port: int,
    host: str | None = None,
) -> list[str]:
    """The command line that runs nginx in the foreground before the TorchServe of these config.properties.

    folder: where its configuration goes, which holds the keys, and all that it writes. model: name and version, for
    OpenAI's paths. api_keys: one of them is needed for all but health; None: whoever comes is served. host: where it
    listens; None: everywhere.
    Raises LaunchError when there is no nginx, or a key or a name is none.
    """
    nginx = shutil.which("nginx")
    if nginx is None:
        raise LaunchError("nginx is not on the PATH: the image has it (deploy/Dockerfile)")
    for name in model:
        if not NAME.fullmatch(name):
            raise LaunchError(f"a model is called {name!r}: archive it under a name of letters, digits, _, . and -")
    values = {
        "folder": folder,
        "listen": _listen(host, port),
        "listen_metrics": _listen(host, metrics_port),
        "inference": _address(properties["inference_address"]),
        "metrics": _address(properties["metrics_address"]),
        "max_request_size": properties.get("max_request_size", TORCHSERVES_MAX_REQUEST_SIZE),
        "model": model[0],
        "version": model[1],
        "authorization": _authorization(api_keys),
    }
    folder.mkdir(parents=True)
    config = folder / "nginx.conf"
    config.touch(mode=0o600)
    config.write_text(re.sub(r"\{(\w+)\}", lambda match: str(values[match[1]]), TEMPLATE.read_text()))
    return [nginx, "-e", "stderr", "-p", str(folder), "-c", str(config)]


def _listen(host: str | None, port: int) -> str:
    """What nginx listens on. A pod may have IPv6 alone, and a kernel may have none."""
    if host is None and socket.has_dualstack_ipv6():
        return f"[::]:{port} ipv6only=off"
    return f"{host or '*'}:{port}"


def _address(url: str) -> str:
    """HOST:PORT"""
    return url.removeprefix("http://")


def _authorization(api_keys: list[str] | None) -> str:
    """nginx's map from the header Authorization to whether the request is refused."""
    if api_keys is None:
        return 'default "";'
    if not api_keys or not all(map(API_KEY.fullmatch, api_keys)):
        raise LaunchError(
            "API_KEY must hold one key, or several with spaces between, each of 16 or more letters, digits and "
            ". _ ~ + / = -; AUTH=none serves whoever comes, for where a mesh or a gateway decides that"
        )
    keys = "|".join(map(re.escape, api_keys))
    return f'default 1; "~^(?i:Bearer) +(?:{keys})$" "";'
