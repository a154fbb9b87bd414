"""What KServe's storage initializer does before the container starts: python storage_initializer.py URI MOUNT [CODE]

CODE: a folder with an older KServe's code, to be run instead of the one that is installed. Before 0.16 it is a part of
the package `kserve`, whose other parts need what is not installed.
"""

import sys
import types
from pathlib import Path

uri, mount, *code = sys.argv[1:]
sys.path[:0] = code
if code and not Path(code[0], "kserve_storage").exists():
    package = sys.modules["kserve"] = types.ModuleType("kserve")
    package.__path__ = [f"{code[0]}/kserve"]
    from kserve.storage import Storage
else:
    from kserve_storage import Storage
assert not code or sys.modules[Storage.__module__].__file__.startswith(code[0])
Storage.download(uri, mount)
