"""What the commands share: an error that a person can act on is one line, not a traceback."""

import subprocess
import sys
from collections.abc import Callable

from handler.errors import CheckpointError, LoadError, SettingsError
from server.torchserve import LaunchError


class UserError(Exception):
    """Something the person at the terminal can mend; the message is one line that says how."""


def run(main: Callable[[], None]) -> int:
    """Run a command's main; its exit status."""
    try:
        main()
    except (UserError, SettingsError, CheckpointError, LoadError, LaunchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[0]} failed: {(error.stderr or '').strip()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
